"""A file of jobs to a file of answers: in order, whole after a kill, shared by processes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm import VLM, GenerationConfig, OptionError, OutputError
from edgevlm.decoding.output_format import OutputFormat
from edgevlm.families.base import ImageBudget
from edgevlm.inputs.image import load_image
from edgevlm.jobs.batch import Batch, run_batch
from edgevlm.jobs.spec import Defaults, read_jobs
from edgevlm.jobs.work_queue import CHUNK, Row, WorkQueue
from tests.conftest import F32, photograph
from tests.helpers.batches import LOW, OPTIONS, QUESTION, SHORT, lines, questions, read, start, wait_for, write
from tests.helpers.command import COMMAND, POSIX, cli

DEFAULTS = Defaults("The default question?", OutputFormat(), SHORT, LOW)


@pytest.fixture
def folder(twelve_pictures: Path) -> Path:
    """A folder of twelve pictures."""
    return twelve_pictures


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows without what is measured."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_answers_are_those_of_the_model_in_the_order_of_the_jobs(vlm: VLM, exported: Path, folder: Path) -> None:
    schema = {"enum": ["open", "shut"]}
    (folder / "schema.json").write_text(json.dumps(schema), encoding="utf-8")
    rows: list[Any] = [
        {"image": "0.png", "question": QUESTION, "id": "first"},
        b"",
        {"image": ["0.png", "1.png"], "question": "Compare."},
        {"question": "Name a river.", "max_new_tokens": 3},
        {"image": "2.png", "question": QUESTION, "schema": schema},
        {"image": "2.png", "question": QUESTION, "schema": "schema.json"},
        {"image": "2.png", "question": QUESTION, "choices": ["yes", "no"]},
        {"image": "2.png", "question": QUESTION, "regex": "[0-9]{3}"},
        {"image": "2.png"},
        {"image": "2.png", "question": QUESTION, "crop": [4, 8, 44, 38]},
    ]
    jobs = write(folder / "jobs.jsonl", rows)
    batch = Batch(
        jobs,
        folder / "out.jsonl",
        str(exported),
        F32,
        DEFAULTS,
    )
    progress: list[tuple[int, int]] = []
    tally = run_batch(batch, on_progress=lambda *each: progress.append(each))
    assert tally.to_dict() == {"jobs": 9, "answered": 9, "failed": 0, "resumed": 0}
    found = read(folder / "out.jsonl")
    assert [row["line"] for row in found] == [1, 3, 4, 5, 6, 7, 8, 9, 10]
    assert found[0]["id"] == "first"
    assert found[0]["answer"] == vlm.generate(folder / "0.png", QUESTION, SHORT, LOW).text
    assert found[1]["answer"] == vlm.generate([folder / "0.png", folder / "1.png"], "Compare.", SHORT, LOW).text
    assert len(found[1]["sha256"]) == 2
    assert found[2]["finish_reason"] == "length"
    assert found[3]["value"] == found[4]["value"] in ("open", "shut")
    assert found[5]["probabilities"] == pytest.approx(
        vlm.score(folder / "2.png", QUESTION, ["yes", "no"], SHORT, LOW).probabilities, abs=1e-3
    )
    assert found[6]["answer"].isdigit()
    assert found[7]["answer"] == vlm.generate(folder / "2.png", "The default question?", SHORT, LOW).text
    part = load_image(folder / "2.png")[8:38, 4:44]
    assert (found[8]["answer"], found[8]["crop"]) == (vlm.generate(part, QUESTION, SHORT, LOW).text, [4, 8, 44, 38])
    assert progress[0] == (0, 9)
    assert progress[-1] == (9, 9)
    assert sorted(path.name for path in folder.glob("out*")) == ["out.jsonl"]


BAD = [
    (b"{", "the row is not JSON"),
    (b"[]", "the row cannot be used: Expected `object`, got `array`; its fields are id, image, question,"),
    (b'{"question": "Why?", "id": 1e999}', "1e999 is a larger number than readers of JSON can hold"),
    (b'{"question": "Why?", "id": NaN}', "NaN is not JSON"),
    (b'{"question": "Why?", "id": ' + b"9" * 5000 + b"}", "99999999999999999999… is a larger number"),
    (b'{"question": "Why?", "id": ' + b"[" * 100_000, "it is nested too deeply"),
    (b"\xff\xfe", "the row is not JSON"),
    ({"image": "nonesuch.png", "question": QUESTION}, "no such image file"),
    ({"image": "notes.txt", "question": QUESTION}, "not an image"),
    ({"image": "cut.png", "question": QUESTION}, "cannot be decoded"),
    ({"imgae": "0.png", "question": QUESTION}, "Object contains unknown field `imgae`"),
    ({"image": 7, "question": QUESTION}, "Expected `str | array`, got `int` - at `$.image`"),
    ({"question": QUESTION, "choices": ["a", 1]}, "Expected `str`, got `int` - at `$.choices[1]`"),
    ({"question": QUESTION, "max_new_tokens": True}, "Expected `int`, got `bool` - at `$.max_new_tokens`"),
    ({"question": QUESTION, "regex": None}, "got `null` - at `$.regex`"),
    ({"image": "0.png"}, 'no "question"'),
    ({"question": "word " * 600}, "the model's context holds 512"),
    ({"question": QUESTION, "schema": {"type": "nonesuch"}}, "the JSON schema cannot be used"),
    ({"question": QUESTION, "schema": "nonesuch.json"}, "no such schema file"),
    ({"question": QUESTION, "choices": []}, "choices must be"),
    ({"question": QUESTION, "regex": "a", "choices": ["a"]}, "exclude each other"),
    ({"question": QUESTION, "regex": "[a-z]{100}"}, "the answer is not whole"),
    ({"question": QUESTION, "max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ({"image": "0.png", "question": QUESTION, "crop": [5, 5, 5, 9]}, "the crop [5, 5, 5, 9] is empty"),
    ({"image": "0.png", "question": QUESTION, "crop": [-1, 0, 5, 9]}, "the crop [-1, 0, 5, 9] reaches outside"),
    ({"image": "0.png", "question": QUESTION, "crop": [0, 0, 5]}, "`array` of length 4, got 3 - at `$.crop`"),
    ({"question": QUESTION, "crop": [0, 0, 5, 9]}, 'a row with a "crop" has one "image", not 0'),
]


def test_a_bad_row_is_told_and_the_others_are_answered(exported: Path, folder: Path) -> None:
    (folder / "notes.txt").write_text("not a picture", encoding="utf-8")
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:2000])
    rows = [row for bad, _ in BAD for row in (bad, {"question": "Name a river.", "max_new_tokens": 2})]
    write(folder / "jobs.jsonl", rows)
    arguments = ["batch", folder / "jobs.jsonl", "-o", folder / "out.jsonl", "-m", exported, *OPTIONS]
    result = cli(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    found = read(folder / "out.jsonl")
    assert [row["line"] for row in found] == list(range(1, len(rows) + 1))
    told = result.stderr.splitlines()
    assert told[-1] == f"{len(BAD)} of {len(rows)} rows answered: {folder / 'out.jsonl'}"
    for number, (_, message) in enumerate(BAD):
        assert message in found[2 * number]["error"]
        assert "answer" in found[2 * number + 1]
        assert told[number].startswith(f"line {2 * number + 1}: ")
        assert message in told[number]
    again = cli(*arguments, "--json")
    assert json.loads(again.stdout) == {
        "jobs": len(rows), "answered": len(BAD), "failed": len(BAD), "resumed": len(rows)
    }  # fmt: skip
    assert read(folder / "out.jsonl") == found


def mutations(data: bytes, count: int) -> list[bytes]:
    """Return copies of a file with bytes flipped, cut, repeated or put elsewhere."""
    random = np.random.default_rng(5)
    found = []
    for _ in range(count):
        mutant = bytearray(data)
        for _ in range(int(random.integers(1, 6))):
            at, size = int(random.integers(len(mutant))), int(random.integers(1, 40))
            kind = random.integers(4)
            if kind == 0:
                mutant[at] = int(random.integers(256))
            elif kind == 1:
                del mutant[at : at + size]
            elif kind == 2:
                mutant[at:at] = mutant[at : at + size]
            else:
                mutant[at : at + size] = random.bytes(min(size, len(mutant) - at))
        found.append(bytes(mutant))
    return found


def test_hundreds_of_mutated_pictures_cost_their_own_rows_only(exported: Path, tmp_path: Path) -> None:
    picture = Image.fromarray(photograph("flower.jpg")[:60, :60])
    rows = []
    for kind in ("png", "jpeg", "webp", "gif", "bmp", "tiff"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        for number, data in enumerate(mutations(buffer.getvalue(), 60)):
            (tmp_path / f"{number}.{kind}").write_bytes(data)
            rows.append({"image": f"{number}.{kind}", "question": "?"})
    jobs = write(tmp_path / "jobs.jsonl", rows)
    config = GenerationConfig(max_new_tokens=1)
    budget = ImageBudget("low")
    run_batch(Batch(jobs, tmp_path / "out.jsonl", str(exported), F32, Defaults(config=config, image_budget=budget)))
    found = read(tmp_path / "out.jsonl")
    assert [row["image"] for row in found] == [row["image"] for row in rows]
    failed = [row for row in found if "error" in row]
    assert 50 < len(failed) < 350
    assert all("answer" in row for row in found if row not in failed)


@POSIX
def test_killed_again_and_again_nothing_is_lost_and_nothing_twice(exported: Path, folder: Path) -> None:
    rows = questions(90)
    write(folder / "jobs.jsonl", rows)
    for goal in (1, 20, 45):
        process = start(folder, exported)
        wait_for(lambda goal=goal: lines(folder / "out.jsonl") >= goal, process)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        before = lines(folder / "out.jsonl")
        assert before < 90
    process = start(folder, exported, "--json")
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    found = read(folder / "out.jsonl")
    assert [row["id"] for row in found] == list(range(90))
    assert json.loads(stdout)["resumed"] >= before
    batch = Batch(
        folder / "jobs.jsonl",
        folder / "whole.jsonl",
        str(exported),
        F32,
        Defaults(config=SHORT, image_budget=LOW),
    )
    run_batch(batch)
    assert plain(found) == plain(read(folder / "whole.jsonl"))
    assert not (folder / "out.jsonl.parts").exists()


@POSIX
def test_processes_share_a_folder_and_take_over_from_one_that_dies(exported: Path, folder: Path) -> None:
    rows = 300  # more than one process answers before the other has started, on a busy machine too
    write(folder / "jobs.jsonl", questions(rows))
    first, second = start(folder, exported, "--workers", "2"), start(folder, exported)
    parts = folder / "out.jsonl.parts"
    wait_for(lambda: lines(folder / "out.jsonl") and len(list(parts.glob("*.jsonl"))) > 1, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert lines(folder / "out.jsonl") < rows
    _, stderr = second.communicate()
    assert second.returncode == 0, stderr
    found = read(folder / "out.jsonl")
    assert [row["id"] for row in found] == list(range(rows))
    wait_for(lambda: not parts.exists())


@POSIX
def test_one_of_several_workers_may_die(exported: Path, folder: Path) -> None:
    import psutil

    write(folder / "jobs.jsonl", questions(80))
    process = start(folder, exported, "--workers", "2", "--json")
    wait_for(lambda: lines(folder / "out.jsonl") > 3, process)
    workers = [each for each in psutil.Process(process.pid).children() if "spawn_main" in " ".join(each.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["answered"] == 80
    assert [row["id"] for row in read(folder / "out.jsonl")] == list(range(80))


@POSIX
def test_workers_do_not_outlive_a_parent_that_is_killed(exported: Path, folder: Path) -> None:
    import psutil

    write(folder / "jobs.jsonl", questions(400))
    process = start(folder, exported, "--workers", "2")
    wait_for(lambda: lines(folder / "out.jsonl") > 3, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_FSIZE of Linux")
def test_a_write_that_the_system_refuses_loses_nothing(exported: Path, folder: Path) -> None:
    """The kernel cuts the write in the middle of a row, as a full disk does."""
    write(folder / "jobs.jsonl", questions(30))
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000));"
        "from edgevlm.cli.main import main; main(sys.argv[1:])"
    )
    arguments = ["batch", "jobs.jsonl", "-o", "out.jsonl", "-m", str(exported), *OPTIONS]
    done = subprocess.run(
        [sys.executable, "-c", limited, *arguments], cwd=folder, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 1
    assert done.stderr == (
        "Error: cannot write out.jsonl: File too large; nothing is lost, run the same command again\n"
    )
    assert (folder / "out.jsonl").stat().st_size == 3000
    assert not (folder / "out.jsonl").read_bytes().endswith(b"\n")
    process = start(folder, exported)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert [row["id"] for row in read(folder / "out.jsonl")] == list(range(30))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a small file system of Linux's")
def test_a_full_disk_loses_nothing(exported: Path, folder: Path) -> None:
    write(folder / "jobs.jsonl", questions(30))
    disk = folder / "disk"
    disk.mkdir()
    arguments = ["batch", "jobs.jsonl", "-o", "disk/out.jsonl", "-m", str(exported), *OPTIONS]
    command = " ".join([*COMMAND, *arguments])
    script = f"""
        mount -t tmpfs -o size=12k none disk && {command}; code=$?
        mount -o remount,size=10m disk && {command} || exit 7
        cat disk/out.jsonl; exit $code
    """
    done = subprocess.run(
        ["/usr/bin/env", "unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        cwd=folder, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip("no file system may be mounted here")
    assert done.returncode == 1, done.stderr
    assert "No space left on device; nothing is lost, run the same command again" in done.stderr
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == list(range(30))


def queue_of(folder: Path, count: int, salt: str = "") -> WorkQueue:
    write(folder / "jobs.jsonl", questions(count))
    return WorkQueue(folder / "out.jsonl", read_jobs(folder / "jobs.jsonl", salt))


def answer(job: Any) -> Row:
    return {"line": job.line, "job": job.key, "answer": f"to {job.line}"}


DYING = """
import os, random, sys, time
from pathlib import Path
from edgevlm.jobs.spec import read_jobs
from edgevlm.jobs.work_queue import WorkQueue

chance = random.Random(int(sys.argv[1]))

def answer(job):
    time.sleep(0.004 * chance.random())
    if chance.random() < 0.02:
        os._exit(9)
    return {"line": job.line, "job": job.key}

WorkQueue(Path("out.jsonl"), read_jobs(Path("jobs.jsonl"), "")).work(answer)
"""


def test_processes_that_keep_dying_write_each_row_once(tmp_path: Path) -> None:
    write(tmp_path / "jobs.jsonl", questions(150))
    running: list[subprocess.Popen[bytes]] = []
    started, codes = 0, set()
    while running or not started or lines(tmp_path / "out.jsonl") < 150:
        while len(running) < 4 and lines(tmp_path / "out.jsonl") < 150:
            started += 1
            running.append(subprocess.Popen([sys.executable, "-c", DYING, str(started)], cwd=tmp_path))
        time.sleep(0.02)
        codes |= {process.poll() for process in running}
        running = [process for process in running if process.poll() is None]
        assert started < 60
    assert codes <= {None, 0, 9}
    assert [row["line"] for row in read(tmp_path / "out.jsonl")] == list(range(1, 151))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jobs.jsonl", "out.jsonl"]


def test_a_folder_that_another_process_removes_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[Path] = []
    mkdir = Path.mkdir

    def made_and_removed(self: Path, *arguments: Any, **options: Any) -> None:
        mkdir(self, *arguments, **options)
        if len(removed) < 3:
            self.rmdir()
            removed.append(self)

    ledger = queue_of(tmp_path, 3)
    monkeypatch.setattr(Path, "mkdir", made_and_removed)
    ledger.work(answer)
    assert len(removed) == 3
    assert [row["line"] for row in read(tmp_path / "out.jsonl")] == [1, 2, 3]


def test_more_jobs_may_be_added_later(tmp_path: Path) -> None:
    asked: list[int] = []
    for count in (3, 3, CHUNK, 2 * CHUNK + 1):
        ledger = queue_of(tmp_path, count)
        ledger.refresh()
        ledger.work(lambda job: asked.append(job.line) or answer(job))
        assert [row["line"] for row in read(tmp_path / "out.jsonl")] == list(range(1, count + 1))
    assert asked == list(range(1, 2 * CHUNK + 2))


@pytest.mark.parametrize("left", [b'{"line": 99, "job"', b"\0" * 40, b"\0" * 40 + b"\n", b'{"answer": 1'])
def test_what_a_crash_left_of_a_row_is_cut_off(tmp_path: Path, left: bytes) -> None:
    ledger = queue_of(tmp_path, CHUNK)

    def crash(job: Any) -> Row:
        if job.line == 4:
            raise ZeroDivisionError
        return answer(job)

    with pytest.raises(ZeroDivisionError):
        ledger.work(crash)
    for path in (tmp_path / "out.jsonl", *(tmp_path / "out.jsonl.parts").glob("*.jsonl")):
        assert lines(path) == 3
        path.write_bytes(path.read_bytes() + left)
    again = queue_of(tmp_path, CHUNK)
    again.refresh()
    assert again.answered() == 3
    again.work(answer)
    assert [row["line"] for row in read(tmp_path / "out.jsonl")] == list(range(1, CHUNK + 1))


def test_answers_to_other_jobs_are_left_alone(tmp_path: Path) -> None:
    queue_of(tmp_path, 5).work(answer)
    before = (tmp_path / "out.jsonl").read_bytes()
    for other in (queue_of(tmp_path, 5, salt="another model"), queue_of(tmp_path, 4)):
        with pytest.raises(OutputError, match="answers other jobs"):
            other.work(answer)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    (tmp_path / "out.jsonl").write_text("my diary\nof today\n", encoding="utf-8")
    with pytest.raises(OutputError, match="holds something other than answers"):
        queue_of(tmp_path, 5).work(answer)
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == "my diary\nof today\n"


def test_the_same_row_twice_is_answered_twice(tmp_path: Path) -> None:
    write(tmp_path / "jobs.jsonl", [{"question": "?"}] * 20)
    ledger = WorkQueue(tmp_path / "out.jsonl", read_jobs(tmp_path / "jobs.jsonl", ""))
    ledger.work(answer)
    assert [row["line"] for row in read(tmp_path / "out.jsonl")] == list(range(1, 21))


def test_another_model_or_other_options_make_another_key(exported: Path, exported_int4: Path) -> None:
    digests = {
        Defaults().config_digest(str(exported)),
        Defaults().config_digest(str(exported_int4)),
        Defaults(question="What?").config_digest(str(exported)),
        Defaults(config=SHORT, image_budget=LOW).config_digest(str(exported)),
        Defaults(output_format=OutputFormat.of(regex="a")).config_digest(str(exported)),
    }
    assert len(digests) == 5


def test_what_concerns_all_rows_is_one_error(exported: Path, folder: Path) -> None:
    write(folder / "jobs.jsonl", questions(3))

    def error(*arguments: object) -> str:
        result = cli("batch", *arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.count("\n") == 1
        return result.stderr

    out = folder / "out.jsonl"
    assert "no such jobs file" in error(folder / "nonesuch.jsonl", "-o", out, "-m", exported)
    assert "cannot read the jobs file" in error(folder, "-o", out, "-m", exported)
    assert "no model 'nonesuch'" in error(folder / "jobs.jsonl", "-o", out, "-m", "nonesuch")
    assert "workers must be between 1 and 256, not 0" in error(
        folder / "jobs.jsonl", "-o", out, "-m", exported, "--workers", 0
    )
    assert "cannot" in error(folder / "jobs.jsonl", "-o", folder / "0.png" / "out.jsonl", "-m", exported)
    assert "cannot read" in error(folder / "jobs.jsonl", "-o", folder, "-m", exported)
    with pytest.raises(OptionError):
        Batch(folder / "jobs.jsonl", out, workers=1000)


def test_nothing_to_do_is_done_without_loading_the_model(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "jobs.jsonl").write_text("\n\n", encoding="utf-8")
    result = cli("batch", tmp_path / "jobs.jsonl", "-o", tmp_path / "out.jsonl", "-m", exported)
    assert (result.exit_code, result.stderr) == (0, f"0 of 0 rows answered: {tmp_path / 'out.jsonl'}\n")
