"""A watched folder: each picture once, however it comes and whatever happens to the watcher."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edgevlm import VLM, OptionError, OutputError
from edgevlm.jobs.sinks import JsonlSink, SqliteSink
from edgevlm.jobs.spec import Defaults
from edgevlm.jobs.watch import Watch, Watcher
from tests.conftest import heed_interrupts, photograph
from tests.helpers.batches import LOW, OPTIONS, SHORT, wait_for
from tests.helpers.command import COMMAND, POSIX, cli

QUESTION = "What is in this picture?"
pytestmark = POSIX


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Forty pictures, elsewhere."""
    folder = tmp_path_factory.mktemp("pictures")
    flower = photograph("flower.jpg")
    paths = [folder / f"{number:02}.png" for number in range(40)]
    for number, path in enumerate(paths):
        Image.fromarray(flower[number * 5 : number * 5 + 200, :200]).save(path)
    return paths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder to watch, empty."""
    path = tmp_path / "camera"
    path.mkdir()
    return path


class Running:
    """`edgevlm watch` in a process of its own."""

    def __init__(self, exported: Path, folder: Path, *options: str) -> None:
        arguments = ["watch", str(folder), "--question", QUESTION, "-m", str(exported), *OPTIONS]
        self.process = subprocess.Popen(
            [*COMMAND, *arguments, "--settle", "0.2", "--patience", "1", *options],
            cwd=folder.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, preexec_fn=heed_interrupts,  # noqa: PLW1509
        )  # fmt: skip

    def wait_for(self, condition: Any) -> None:
        wait_for(condition, self.process)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; return the exit code and what came on stderr."""
        self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stderr.decode()


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows of either kind of store."""
    if path.suffix == ".jsonl":
        data = path.read_bytes() if path.exists() else b""
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
    if not path.exists():
        return []
    database = sqlite3.connect(path)
    try:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute("SELECT * FROM answers ORDER BY id")]
    except sqlite3.OperationalError:  # no table yet
        return []
    finally:
        database.close()


def store_options(path: Path) -> list[str]:
    return ["-o" if path.suffix == ".jsonl" else "--sqlite", str(path)]


@pytest.mark.parametrize("kind", ["answers.jsonl", "answers.db"])
def test_pictures_are_answered_as_they_come(
    exported: Path, vlm: VLM, folder: Path, pictures: list[Path], kind: str
) -> None:
    store = folder.parent / kind
    shutil.copy(pictures[0], folder)
    (folder / "notes.txt").write_text("no picture", encoding="utf-8")
    shutil.copy(pictures[5], folder / ".hidden.png")
    watcher = Running(exported, folder, *store_options(store), "--json")
    watcher.wait_for(lambda: len(rows_of(store)) == 1)  # it was there before
    shutil.copy(pictures[1], folder)
    watcher.wait_for(lambda: len(rows_of(store)) == 2)
    shutil.copy(pictures[2], folder.parent / "moved.png")
    (folder.parent / "moved.png").rename(folder / "moved.png")
    watcher.wait_for(lambda: len(rows_of(store)) == 3)
    os.utime(folder / "00.png")  # the same bytes: nothing new
    shutil.copy(pictures[3], folder / "01.png")  # another picture under an old name
    watcher.wait_for(lambda: len(rows_of(store)) == 4)
    assert watcher.end()[0] == 0
    found = rows_of(store)
    assert [row["path"] for row in found] == ["00.png", "01.png", "moved.png", "01.png"]
    for row, picture in zip(found, (pictures[0], pictures[1], pictures[2], pictures[3]), strict=True):
        digest = hashlib.sha256(picture.read_bytes()).hexdigest()
        assert row["sha256"] == (digest if kind.endswith(".db") else [digest])
        assert row["answer"] == vlm.generate(picture, QUESTION, SHORT, LOW).text
        assert row["time"].endswith("+00:00")


class Stepped:
    """A watcher in this process whose time passes only when a test says so."""

    def __init__(self, vlm: VLM, folder: Path, store: Path) -> None:
        self.now = 100.0
        self._sink = JsonlSink(store) if store.suffix == ".jsonl" else SqliteSink(store)
        self._sink.__enter__()
        watch = Watch(folder, Defaults(QUESTION, config=SHORT, image_budget=LOW), stable_for_s=1, give_up_after_s=20)
        self._watcher = Watcher(watch, vlm, self._sink, clock=lambda: self.now)

    def after(self, seconds: float, *changed: Path) -> None:
        """Let time pass, then report changed files and do what is due."""
        self.now += seconds
        self._watcher.step(changed)

    def end(self) -> None:
        self._sink.__exit__(None, None, None)


def test_a_file_that_is_still_being_written_is_waited_for(vlm: VLM, folder: Path, pictures: list[Path]) -> None:
    store = folder.parent / "answers.jsonl"
    watcher, data, slow = Stepped(vlm, folder, store), pictures[0].read_bytes(), folder / "slow.png"
    watcher.after(0)
    with slow.open("wb") as file:
        for start in range(0, len(data), len(data) // 6 + 1):
            file.write(data[start : start + len(data) // 6 + 1])
            file.flush()
            watcher.after(0.1, slow)
            watcher.after(1.5)  # stable, and still no whole picture until the last piece
            assert bool(rows_of(store)) == (slow.stat().st_size == len(data))
    [row] = rows_of(store)
    assert (row["path"], row["sha256"]) == ("slow.png", [hashlib.sha256(data).hexdigest()])
    assert row["answer"]
    watcher.end()


def test_a_file_is_read_when_it_has_been_stable_for_long_enough(vlm: VLM, folder: Path, pictures: list[Path]) -> None:
    store, path = folder.parent / "answers.jsonl", folder / "00.png"
    watcher = Stepped(vlm, folder, store)
    watcher.after(0)
    shutil.copy(pictures[0], path)
    watcher.after(0.5, path)
    watcher.after(0.9)
    assert rows_of(store) == []
    os.utime(path, ns=(1, 1))  # written again: the time begins anew
    watcher.after(0, path)
    watcher.after(0.9)
    assert rows_of(store) == []
    watcher.after(0.2)
    assert len(rows_of(store)) == 1
    watcher.end()


def test_a_file_that_no_event_announces_is_found_by_the_next_scan(vlm: VLM, folder: Path, pictures: list[Path]) -> None:
    store = folder.parent / "answers.jsonl"
    watcher = Stepped(vlm, folder, store)
    watcher.after(0)
    shutil.copy(pictures[0], folder)
    watcher.after(9)
    watcher.after(0.5)
    assert rows_of(store) == []
    watcher.after(1)  # more than ten seconds since the last scan
    watcher.after(1.1)
    assert [row["path"] for row in rows_of(store)] == ["00.png"]
    watcher.end()


def test_what_never_becomes_a_picture_is_reported_once(vlm: VLM, folder: Path, pictures: list[Path]) -> None:
    store = folder.parent / "answers.db"
    (folder / "cut.png").write_bytes(pictures[0].read_bytes()[:3000])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "gone.png").write_bytes(pictures[0].read_bytes()[:3000])
    shutil.copy(pictures[1], folder)
    for rows in (3, 4):  # and not again after a restart
        watcher = Stepped(vlm, folder, store)
        watcher.after(0)
        watcher.after(1.1)
        assert len(rows_of(store)) == (1 if rows == 3 else 4)  # what was decoded at once
        (folder / "gone.png").unlink(missing_ok=True)
        watcher.after(18)
        assert len(rows_of(store)) == (1 if rows == 3 else 4)
        watcher.after(1.1)
        watcher.after(30)
        watcher.end()
        found = {row["path"]: row for row in rows_of(store)}
        assert len(rows_of(store)) == len(found) == rows
        shutil.copy(pictures[2], folder)
    assert found["01.png"]["error"] is None
    assert "cannot be decoded" in found["cut.png"]["error"]
    assert "is empty" in found["empty.jpg"]["error"]


@pytest.mark.parametrize("kind", ["answers.jsonl", "answers.db"])
def test_killed_and_started_again_each_picture_has_one_row(
    exported: Path, folder: Path, pictures: list[Path], kind: str
) -> None:
    store = folder.parent / kind
    for picture in pictures[:25]:
        shutil.copy(picture, folder)
    for goal in (1, 9, 18):
        watcher = Running(exported, folder, *store_options(store))
        watcher.wait_for(lambda goal=goal: len(rows_of(store)) >= goal)
        watcher.end(signal.SIGKILL)
        assert len(rows_of(store)) < 25
    for picture in pictures[25:]:  # while nobody watches
        shutil.copy(picture, folder)
    watcher = Running(exported, folder, *store_options(store))
    watcher.wait_for(lambda: len(rows_of(store)) >= 40)
    assert watcher.end()[0] == 0
    found = rows_of(store)
    assert sorted(row["path"] for row in found) == [picture.name for picture in pictures]
    assert all(row["answer"] for row in found)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_FSIZE of Linux")
@pytest.mark.parametrize(("kind", "limit"), [("answers.jsonl", 3000), ("answers.db", 131072)])
def test_a_write_that_the_system_refuses_loses_nothing(
    exported: Path, folder: Path, pictures: list[Path], kind: str, limit: int
) -> None:
    """The kernel refuses what would make the store larger, as a full disk does."""
    store = folder.parent / kind
    for picture in pictures:
        shutil.copy(picture, folder)
    limited = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "from edgevlm.cli.main import main; main(sys.argv[1:])"
    )
    arguments = ["watch", str(folder), "--question", QUESTION, "-m", str(exported), *OPTIONS, "--settle", "0.2"]
    done = subprocess.run(
        [sys.executable, "-c", limited, *arguments, *store_options(store)],
        capture_output=True, encoding="utf-8", check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: cannot ")
    assert str(store) in last
    before = rows_of(store)
    assert 0 < len(before) < len(pictures)
    watcher = Running(exported, folder, *store_options(store))
    watcher.wait_for(lambda: len(rows_of(store)) == len(pictures))
    assert watcher.end()[0] == 0
    found = rows_of(store)
    assert found[: len(before)] == before
    assert sorted(row["path"] for row in found) == [picture.name for picture in pictures]


def test_forms_and_folders_within(exported: Path, folder: Path, pictures: list[Path]) -> None:
    (folder / "line 1").mkdir()
    shutil.copy(pictures[0], folder / "line 1")
    schema = folder / "schema.json"
    schema.write_text(json.dumps({"enum": ["open", "shut"]}), encoding="utf-8")
    store = folder.parent / "answers.db"
    watcher = Running(exported, folder, "--sqlite", str(store), "--recursive", "--schema", str(schema))
    watcher.wait_for(lambda: rows_of(store))
    watcher.end()
    watcher = Running(exported, folder, "--sqlite", str(store), "--recursive", "--choices", "yes,no")
    watcher.wait_for(lambda: len(rows_of(store)) == 2)  # asked something else, it is a new question
    watcher.end()
    first, second = rows_of(store)
    assert first["path"] == "line 1/00.png"
    assert json.loads(first["value"]) in ("open", "shut")
    assert set(json.loads(second["probabilities"])) == {"yes", "no"}


def test_every_format_is_watched_and_what_is_passed_over_is_told_once(
    exported: Path, folder: Path, pictures: list[Path]
) -> None:
    wanted = ["a.jfif", "b.JPE", "c.j2k", "d.dib", "e.pgm", "f.ico", "g.tga", "h.apng", "i.avif", "j.png"]
    with Image.open(pictures[0]) as image:
        for name in wanted:
            image.save(folder / name)
    for name in ("photo.heic", "scan.pdf", "1.TXT", "2.txt", "3.txt", "README", "odd\n.xyz"):
        (folder / name).write_bytes(b"no picture")
    for name in (".hidden.txt", "half.png.part", "upload.tmp", "~lock", "notes~", "notes.swp"):
        (folder / name).write_bytes(b"no picture")
    (folder / "sub.folder").mkdir()
    store = folder / "answers.db"
    watcher = Running(exported, folder, "--sqlite", str(store))
    watcher.wait_for(lambda: len(rows_of(store)) == len(wanted))
    (folder / "late.txt").write_bytes(b"no picture")  # of a kind that was told
    (folder / "late.mp4").write_bytes(b"no picture")
    shutil.copy(pictures[1], folder / "last.png")
    watcher.wait_for(lambda: len(rows_of(store)) == len(wanted) + 1)
    code, stderr = watcher.end()
    assert code == 0
    rows = rows_of(store)
    assert sorted(row["path"] for row in rows) == sorted([*wanted, "last.png"])
    assert all(row["error"] is None for row in rows)
    told = [line.removeprefix("passed over: ") for line in stderr.splitlines() if line.startswith("passed over: ")]
    first = min(told, key=lambda line: not line.lower().split(",")[0].endswith(".txt"))
    assert first.split(",")[0] in {"1.TXT", "2.txt", "3.txt"}
    assert sorted(set(told) - {first}) == [
        "'odd\\n.xyz', .xyz is no format that edgevlm reads; further such files are not told",
        "README, it has no suffix; further such files are not told",
        "late.mp4, this model takes pictures, not video; give it single frames as pictures;"
        " further such files are not told",
        "photo.heic, .heic is no format that edgevlm reads; further such files are not told",
        "scan.pdf, .pdf is no format that edgevlm reads; further such files are not told",
    ]
    assert len(told) == 6


def test_kinds_without_end_are_told_twenty_times(exported: Path, folder: Path, pictures: list[Path]) -> None:
    for number in range(30):
        (folder / f"camera.log.{number}").write_bytes(b"no picture")
    shutil.copy(pictures[0], folder)
    store = folder.parent / "answers.jsonl"
    watcher = Running(exported, folder, "-o", str(store))
    watcher.wait_for(lambda: rows_of(store))
    told = [line for line in watcher.end()[1].splitlines() if line.startswith("passed over: ")]
    assert len(told) == 20
    assert [line for line in told if line.endswith("such files, and of more kinds, are not told")] == told[-1:]


def test_wrong_use_is_one_line(exported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(*arguments: object) -> str:
        result = cli("watch", *arguments, "--question", QUESTION, "-m", exported)
        assert result.exit_code in (1, 2)
        return result.stderr.splitlines()[-1]

    out = folder.parent / "out.jsonl"
    assert "no such folder" in error(folder / "nonesuch", "-o", out)
    assert "name one place" in error(folder)
    assert "name one place" in error(folder, "-o", out, "--sqlite", out)
    assert "the time to settle must be" in error(folder, "-o", out, "--settle", 0)
    out.write_text("my diary\n", encoding="utf-8")
    assert "holds something other than answers" in error(folder, "-o", out)
    out.write_text('{"mine": 1}\n', encoding="utf-8")
    assert "holds other rows" in error(folder, "-o", out)
    assert "cannot use the database" in error(folder, "--sqlite", out)
    assert "cannot use the database" in error(folder, "--sqlite", folder)
    assert "cannot read" in error(folder, "-o", folder)
    assert error(folder, "-o", ".") == "Error: . is a folder; name a file in it for the answers"
    assert "no such folder" in error(out, "-o", folder / "own.jsonl")
    monkeypatch.setattr("edgevlm.jobs.watch.find_spec", lambda _: None)
    with pytest.raises(OptionError, match=r"pip install 'edgevlm\[watch\]'"):
        Watch(folder, Defaults(question="?"))


def test_two_do_not_write_one_file(folder: Path) -> None:
    path = folder / "out.jsonl"
    with JsonlSink(path), pytest.raises(OutputError, match="another process is writing"), JsonlSink(path):
        pass
    with JsonlSink(path):
        pass
    assert [each.name for each in folder.iterdir()] == ["out.jsonl"]


def test_a_database_of_somebody_else_s_is_left_alone(folder: Path) -> None:
    path = folder / "other.db"
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE answers (mine TEXT)")
    database.commit()
    with pytest.raises(OutputError, match="cannot use the database"), SqliteSink(path):
        pass
    assert database.execute("SELECT * FROM answers").fetchall() == []
    database.close()
