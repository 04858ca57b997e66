"""Every mistake a user can make: one exact line on stderr, an exit code, and no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edgevlm import VLM
from edgevlm.families import FAMILIES
from edgevlm.inputs.chat_template import user_message
from edgevlm.runtime.core import core
from tests.helpers.command import COMMAND, POSIX, cli
from tests.helpers.damage import copy_export, edit_manifest, flip, reseal, truncate

QUESTION = "What is in this picture?"


def error(*arguments: object, stdin: bytes | None = None, code: int = 1) -> str:
    """Run a command that must fail with one line on stderr; return that line without its `Error: `."""
    result = cli(*arguments, stdin=stdin)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("Error: ").removesuffix("\n")


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, without models."""
    home = tmp_path / "own-home"
    monkeypatch.setenv("EDGEVLM_HOME", str(home))
    return home


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export, to be damaged."""
    return copy_export(exported, tmp_path / "tiny")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, not 0"),
        (["--temperature", "-0.5"], "temperature must be 0 or more, not -0.5"),
        (["--temperature", "nan"], "temperature must be 0 or more, not nan"),
        (["--top-p", "0"], "top_p must be above 0 and at most 1, not 0.0"),
        (["--top-p", "1.5"], "top_p must be above 0 and at most 1, not 1.5"),
        (["--top-p", "nan"], "top_p must be above 0 and at most 1, not nan"),
        (["--top-k", "-1"], "top_k must be 0 (all) or more, not -1"),
        (["--seed", "-1"], "seed must be 0 or more, not -1"),
        (["--seed", "-1", "--temperature", "1"], "seed must be 0 or more, not -1"),
        (["--stop", ""], "stop must be a tuple of texts, none of them empty"),
        (["--stop", "a", "--stop", ""], "stop must be a tuple of texts, none of them empty"),
        (["--max-image-tokens", "0"], "max_image_tokens must be at least 1, not 0"),
        (["--threads", "0"], "threads must be between 1 and 1024, not 0"),
        (["--threads", "1025"], "threads must be between 1 and 1024, not 1025"),
    ],
)
def test_option_out_of_range(options: list[str], line: str) -> None:
    assert error("run", QUESTION, *options) == line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run"], "Missing argument '[IMAGE]... QUESTION'."),
        (["run", "--max-new-tokens", "many", "hi"], "'many' is not a valid integer"),
        (["run", "--detail", "medium", "hi"], "'medium' is not one of 'auto', 'low', 'high'."),
        (["run", "--nonesuch", "hi"], "No such option"),
        (["nonesuch"], "No such command 'nonesuch'."),
        (["models", "surplus"], "Got unexpected extra argument (surplus)"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], line: str) -> None:
    result = cli(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert line in result.stderr.splitlines()[-1]


def test_no_such_image(tmp_path: Path) -> None:
    path = tmp_path / "nonesuch.png"
    assert error("run", path, QUESTION) == f"no such image file: {path}"


def test_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are notes", encoding="utf-8")
    assert error("run", path, QUESTION) == f"{path} is not an image in a format that edgevlm reads (JPEG, PNG, WebP, …)"


def test_a_folder_for_an_image(tmp_path: Path) -> None:
    reason = "is a folder without pictures; a video is a file, or a folder of its frames"
    assert error("run", tmp_path, QUESTION) == f"{tmp_path} {reason}"


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_image(china: Path, exported: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"china.{suffix}"
    Image.open(china).save(path)
    truncate(path)
    assert error("run", path, QUESTION, "-m", exported).startswith(f"{path} cannot be decoded, it may be truncated: ")


def test_an_empty_image(tmp_path: Path) -> None:
    path = tmp_path / "empty.png"
    path.touch()
    assert error("run", path, QUESTION) == f"{path} is empty, not an image"


def test_a_bad_second_image(china: Path, tmp_path: Path) -> None:
    assert error("run", china, tmp_path / "b.png", QUESTION) == f"no such image file: {tmp_path / 'b.png'}"


def test_nothing_on_stdin() -> None:
    line = "no image came on stdin, where an IMAGE of - is read from"
    assert error("run", "-", QUESTION, stdin=b"") == line


def test_only_one_image_comes_on_stdin(china: Path) -> None:
    line = "no image came on stdin, where an IMAGE of - is read from"
    assert error("run", "-", "-", QUESTION, stdin=china.read_bytes()) == line


def test_text_on_stdin() -> None:
    line = "the image is not an image in a format that edgevlm reads (JPEG, PNG, WebP, …)"
    assert error("run", "-", QUESTION, stdin=b"hello") == line


@POSIX
def test_a_closed_stdin() -> None:
    run = [*COMMAND, "run", "-", QUESTION]
    done = subprocess.run(["/bin/sh", "-c", 'exec "$@" <&-', "sh", *run], capture_output=True, check=False)
    line = b"Error: no image came on stdin, where an IMAGE of - is read from\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", line)


@pytest.mark.parametrize("name", ["picture.jfif", "picture.PGM", "picture.j2k", "picture.tga"])
def test_a_picture_of_any_format_and_no_question(name: str) -> None:
    assert error("run", name) == f"no question: {name} is an image; put the question after it, in quotes"


def test_a_picture_and_no_question(china: Path) -> None:
    line = "no question: {} is an image; put the question after it, in quotes"
    assert error("run", china) == line.format(china)
    assert error("run", QUESTION, china) == line.format(china)
    assert error("run", "misspelt.jpeg") == line.format("misspelt.jpeg")
    assert error("run", "-", stdin=china.read_bytes()) == line.format("-")


@pytest.mark.parametrize("question", ["Is this photo.jpg", "Read the display. " * 20 + "It shows 42.7"])
def test_a_question_that_resembles_a_file_name_is_a_question(exported: Path, question: str) -> None:
    result = cli("run", question, "-m", exported, "--max-new-tokens", 1, "--json")
    assert result.exit_code == 0, result.exception


def test_a_question_that_is_not_utf_8(exported: Path) -> None:
    line = "the question is not valid Unicode text; write it in UTF-8"
    assert error("run", "What is \udcff?", "-m", exported) == line


def test_a_prompt_longer_than_the_context(exported: Path) -> None:
    question = "what is " * 200
    tokens = len(VLM(exported).processor.prompt_ids([user_message(question, 0)], []))
    assert tokens > 512
    assert error("run", question, "-m", exported) == (
        f"the prompt has {tokens:,} tokens and the model's context holds 512;"
        " shorten the question, or use fewer pictures or frames, a lower detail or max_image_tokens"
    )


@pytest.mark.parametrize("name", ["nonesuch", "folder/nonesuch", "n" * 300])
def test_no_such_model(own_home: Path, name: str) -> None:
    assert error("run", QUESTION, "-m", name) == (
        f"no model {name!r}: not a folder here and not under {own_home / 'models'};"
        " `edgevlm models` lists what is there"
    )


def test_a_file_for_a_model(china: Path) -> None:
    line = f"{china} is a file; a model is the folder that `edgevlm export` writes"
    assert error("run", QUESTION, "-m", china) == line


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    assert error("run", QUESTION, "-m", tmp_path) == (
        f"{tmp_path} has no edgevlm.json, so it is no edgevlm export; make one with `edgevlm export SOURCE`"
    )


def test_no_such_device(exported: Path) -> None:
    line = f"no device TPU here; OpenVINO sees {', '.join(core().available_devices)}"
    assert error("run", QUESTION, "-m", exported, "--device", "TPU") == line


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda data: data.update(schema_version=99), "has schema version 99, this edgevlm reads 1 and 2"),
        (lambda data: data.pop("schema_version"), "has schema version None, this edgevlm reads 1 and 2"),
        (lambda data: data["submodels"].pop("language"), "names no language submodel"),
        (lambda data: data.pop("submodels"), "is damaged (Object missing required field `submodels`)"),
        (lambda data: data.update(files=[]), "is damaged (Expected `object`, got `array` - at `$.files`)"),
        (
            lambda data: data.update(context_length="512"),
            "is damaged (Expected `int`, got `str` - at `$.context_length`)",
        ),
        (
            lambda data: data.update(special_tokens=None),
            "is damaged (Expected `object`, got `null` - at `$.special_tokens`)",
        ),
        (lambda data: data.update(chat_template=5), "is damaged (Expected `str`, got `int` - at `$.chat_template`)"),
        (
            lambda data: data["submodels"]["language"].update(file=None),
            "is damaged (Expected `str`, got `null` - at `$.submodels[...].file`)",
        ),
        (
            lambda data: data["files"]["tokenizer.json"].update(size_bytes="21 kB"),
            "is damaged (Expected `int`, got `str` - at `$.files[...].size_bytes`)",
        ),
    ],
)
def test_a_manifest_that_does_not_hold(folder: Path, edit: Callable[[dict[str, Any]], Any], line: str) -> None:
    edit_manifest(folder, edit)
    assert error("run", QUESTION, "-m", folder) == f"{folder / 'edgevlm.json'} {line}; export the model again"


def test_a_manifest_without_a_field(folder: Path) -> None:
    edit_manifest(folder, lambda data: data.pop("family"))
    line = f"{folder / 'edgevlm.json'} is damaged (Object missing required field `family`); export the model again"
    assert error("run", QUESTION, "-m", folder) == line


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b"\xff\xfe", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    ],
)
def test_a_manifest_that_is_no_json(folder: Path, data: bytes, why: str) -> None:
    (folder / "edgevlm.json").write_bytes(data)
    line = f"{folder / 'edgevlm.json'} cannot be read ({why}); export the model again"
    assert error("run", QUESTION, "-m", folder) == line


def test_a_manifest_that_is_no_object(folder: Path) -> None:
    (folder / "edgevlm.json").write_text("[]", encoding="utf-8")
    line = f"{folder / 'edgevlm.json'} has schema version None, this edgevlm reads 1 and 2; export the model again"
    assert error("run", QUESTION, "-m", folder) == line


def test_an_unknown_family_is_told_with_the_known_ones(folder: Path) -> None:
    edit_manifest(folder, lambda data: data.update(family="mllama"))
    line = f"the model's family 'mllama' is unknown to this edgevlm; it knows {', '.join(sorted(FAMILIES))}"
    assert error("run", QUESTION, "-m", folder) == line


def test_incomplete_facts_about_the_family(folder: Path) -> None:
    edit_manifest(folder, lambda data: data["family_config"].pop("image_seq_len"))
    line = "the manifest's facts about family 'idefics3' are incomplete: KeyError('image_seq_len')"
    assert error("run", QUESTION, "-m", folder) == line


@pytest.mark.parametrize("name", ["openvino_language_model.bin", "tokenizer.json"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert error("run", QUESTION, "-m", folder) == f"{folder} lacks its file {name}; export the model again"


@pytest.mark.parametrize("name", ["openvino_vision_embeddings_model.bin", "openvino_language_model.xml"])
def test_a_truncated_file(folder: Path, name: str) -> None:
    path = folder / name
    size = path.stat().st_size
    truncate(path)
    assert error("run", QUESTION, "-m", folder) == (
        f"{path} has {size // 2:,} bytes instead of {size:,}: truncated or replaced; export again"
    )


@pytest.mark.parametrize("name", ["openvino_language_model.bin", "preprocessor_config.json", "chat_template.jinja"])
def test_a_changed_file(folder: Path, name: str) -> None:
    flip(folder / name)
    line = f"{folder / name} is not what was exported (SHA-256 differs); export the model again"
    assert error("run", QUESTION, "-m", folder) == line


def test_a_folder_in_place_of_a_file(folder: Path) -> None:
    path = folder / "config.json"
    path.unlink()
    path.mkdir()
    edit_manifest(folder, lambda data: data["files"]["config.json"].update(size_bytes=path.stat().st_size))
    assert error("run", QUESTION, "-m", folder).startswith(f"{path} cannot be read: ")


def test_a_damaged_tokenizer(folder: Path) -> None:
    truncate(folder / "tokenizer.json")
    reseal(folder)
    line = error("run", QUESTION, "-m", folder)
    assert line.startswith(f"{folder / 'tokenizer.json'} cannot be read as a tokenizer: ")
    assert line.endswith("; export the model again")


def test_a_chat_template_that_is_no_text(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    reseal(folder)
    line = error("run", QUESTION, "-m", folder)
    assert line.startswith(f"{folder / 'chat_template.jinja'} cannot be read: 'utf-8' codec can't decode")


@pytest.mark.parametrize("part", ["vision_embeddings", "text_embeddings", "language"])
def test_a_part_that_is_no_ir(folder: Path, part: str) -> None:
    path = folder / f"openvino_{part}_model.xml"
    path.write_text("<net", encoding="utf-8")
    reseal(folder)
    assert error("run", QUESTION, "-m", folder).startswith(f"{path} cannot be read by OpenVINO: ")


def test_a_part_without_its_weights(folder: Path) -> None:
    name = "openvino_language_model.bin"
    (folder / name).unlink()
    edit_manifest(folder, lambda data: data["files"].pop(name))
    line = error("run", QUESTION, "-m", folder)
    assert line.startswith(f"{folder / 'openvino_language_model.xml'} cannot be read by OpenVINO: ")


LONG = "n" * 300
TOO_LONG = "File name too long"


@POSIX
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["run", LONG, QUESTION], f"cannot read {LONG}: {TOO_LONG}"),
        (["run", QUESTION, "--schema", LONG], f"cannot read the schema {LONG}: {TOO_LONG}"),
        (["batch", LONG, "-o", "out.jsonl", "-m", "panel"], f"cannot read the jobs file {LONG}: {TOO_LONG}"),
        (["batch", "jobs.jsonl", "-o", LONG, "-m", "panel"], f"cannot read {LONG}: {TOO_LONG}"),
        (["batch", "jobs.jsonl", "-o", ".", "-m", "panel"], ". is a folder; name a file in it for the answers"),
        (["batch", "jobs.jsonl", "-o", "/", "-m", "panel"], "/ is a folder; name a file in it for the answers"),
        (["watch", LONG, "--question", QUESTION, "-o", "out"], f"cannot read the folder {LONG}: {TOO_LONG}"),
        (["watch", ".", "--question", QUESTION, "-o", ".."], ".. is a folder; name a file in it for the answers"),
        (["serve", "--image-folder", LONG], f"image folder {LONG} cannot be read: {TOO_LONG}"),
        (["serve", "--image-folder", "jobs.jsonl"], "image folder jobs.jsonl is no folder"),
        (["serve", "--api-key-file", LONG], f"API key file {LONG} cannot be read: {TOO_LONG}"),
        (["bench", "--report", f"{LONG}/a.html"], f"no folder {LONG} for the report"),
        (["bench", "--report", "folder.html"], "folder.html cannot be written; choose another place for the report"),
        (["bench", "--report", "."], "a report is .html or .png, not ."),
        (["export", LONG], f"no folder {LONG!r} here, and it is no hub id of the form owner/name"),
        (["export", ".", "-o", LONG], f"cannot use {LONG}: {TOO_LONG}; choose another folder with -o"),
    ],
)
def test_a_path_that_cannot_be(
    arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.jsonl").write_text('{"question": "What?"}', encoding="utf-8")
    (tmp_path / "folder.html").mkdir()
    before = sorted(tmp_path.iterdir())
    assert error(*arguments) == line
    assert sorted(tmp_path.iterdir()) == before


@POSIX
def test_a_file_where_the_models_folder_would_be(own_home: Path) -> None:
    own_home.write_text("no folder", encoding="utf-8")
    assert error("models") == f"the models folder {own_home / 'models'} cannot be read: Not a directory"
    result = cli("doctor", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["models folder"] == f"{own_home / 'models'} (cannot be read: Not a directory)"
    assert facts["cache folder"] == f"{own_home / 'cache'} (cannot be read: Not a directory)"


@pytest.mark.parametrize("host", ["a..b", "n" * 70])
def test_a_host_that_is_no_name(exported: Path, host: str) -> None:
    line = error("serve", exported, "--host", host, "--allow-anyone", "--port", 0)
    assert line.startswith(f"cannot listen on {host} port 0: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, which is full as a disk may be")
def test_an_answer_that_a_full_disk_does_not_take() -> None:
    """No module foresees it: the command line itself tells what the system said."""
    for command in (["models"], ["doctor", "--json"], ["run", "What?", "-m", "panel", "--max-new-tokens", "1"]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [*COMMAND, *command], stdout=full, stderr=subprocess.PIPE, encoding="utf-8", check=False
            )
        assert (done.returncode, done.stderr) == (1, "Error: No space left on device\n")


def held_to_permissions() -> list[str]:
    """Return what a command is run through to be denied what its permissions deny; the superuser is denied nothing."""
    if sys.platform == "win32":
        pytest.skip("permissions of POSIX")
    if os.geteuid():
        return []
    if not sys.platform.startswith("linux") or not shutil.which("setpriv"):
        pytest.skip("the superuser may read everything, and there is no setpriv to take that from it")
    drop = "-dac_override,-dac_read_search"
    return ["setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}"]


@pytest.fixture
def private(exported: Path, idefics3: Path, tmp_path: Path) -> Iterator[Path]:
    """A folder that may not be looked into; beside it a checkpoint of which one file may not be read."""
    folder, half = tmp_path / "private", tmp_path / "half"
    copy_export(exported, folder / "model")
    (folder / "home" / "models").mkdir(parents=True)
    (folder / "jobs.jsonl").write_text('{"question": "What?"}', encoding="utf-8")
    shutil.copytree(idefics3, half)
    (half / "tokenizer.json").chmod(0)
    folder.chmod(0)
    yield folder
    folder.chmod(0o700)


BARRED: dict[str, tuple[list[str], str]] = {
    "run, model": (["run", QUESTION, "-m", "private/model"], "private/model cannot be read: permission denied"),
    "run, picture": (["run", "private/a.png", QUESTION], "cannot read private/a.png: Permission denied"),
    "chat, picture": (["chat", "private/a.png"], "cannot read private/a.png: Permission denied"),
    "batch, jobs": (
        ["batch", "private/jobs.jsonl", "-o", "out.jsonl", "-m", "panel"],
        "cannot read the jobs file private/jobs.jsonl: Permission denied",
    ),
    "batch, model": (
        ["batch", "jobs.jsonl", "-o", "out.jsonl", "-m", "private/model"],
        "private/model cannot be read: permission denied",
    ),
    "batch, output": (
        ["batch", "jobs.jsonl", "-o", "private/out.jsonl", "-m", "panel"],
        "cannot read private/out.jsonl: Permission denied",
    ),
    "watch, folder": (
        ["watch", "private/model", "--question", QUESTION, "-o", "out.jsonl"],
        "cannot read the folder private/model: Permission denied",
    ),
    "watch, output": (
        ["watch", ".", "--question", QUESTION, "-o", "private/out.jsonl", "-m", "panel"],
        "cannot write private/out.jsonl: Permission denied; nothing is lost, run the same command again",
    ),
    "serve, model": (["serve", "private/model"], "private/model cannot be read: permission denied"),
    "serve, pictures": (
        ["serve", "--image-folder", "private/model"],
        "image folder private/model cannot be read: Permission denied",
    ),
    "serve, keys": (
        ["serve", "--api-key-file", "private/keys"],
        "API key file private/keys cannot be read: Permission denied",
    ),
    "bench, report": (["bench", "--report", "private/model/a.html"], "no folder private/model for the report"),
    "export, source": (["export", "private/model"], "private/model cannot be read: permission denied"),
    "export, file of the source": (
        ["export", "half", "-o", "out", "--fp32", "--no-verify"],
        "half/tokenizer.json cannot be read: Permission denied",
    ),
    "export, target": (
        ["export", "half", "-o", "private/out"],
        "cannot use private/out: Permission denied; choose another folder with -o",
    ),
    "models": (["models"], "the models folder private/home/models cannot be read: Permission denied"),
}


@pytest.mark.parametrize("case", BARRED)
def test_what_may_not_be_read_is_named(case: str, private: Path) -> None:
    arguments, line = BARRED[case]
    place = private.parent
    (place / "jobs.jsonl").write_text('{"question": "What?"}', encoding="utf-8")
    command = [*held_to_permissions(), *COMMAND, *arguments]
    home = os.environ | ({"EDGEVLM_HOME": "private/home"} if case == "models" else {})
    done = subprocess.run(command, cwd=place, env=home, capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"Error: {line}\n")


def test_a_home_that_may_not_be_used_costs_no_answer(private: Path) -> None:
    place, home = private.parent, os.environ | {"EDGEVLM_HOME": "private/home"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*held_to_permissions(), *COMMAND, *arguments]
        return subprocess.run(command, cwd=place, env=home, capture_output=True, encoding="utf-8", check=True)

    facts = json.loads(run("doctor", "--json").stdout)
    for name, folder in (("models folder", "models"), ("cache folder", "cache")):
        assert facts[name] == str(Path("private", "home", folder)) + " (cannot be read: Permission denied)"
    assert json.loads(run("run", "What?", "-m", "panel", "--max-new-tokens", "1", "--json").stdout)["answer"]


def test_a_model_of_somebody_else_s_is_listed(exported: Path, own_home: Path) -> None:
    folder = copy_export(exported, own_home / "models" / "theirs")
    folder.chmod(0)
    try:
        command = [*held_to_permissions(), *COMMAND, "models", "--json"]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    finally:
        folder.chmod(0o700)
    states = {each["name"]: each["state"] for each in json.loads(done.stdout)}
    line = f"damaged: {folder / 'edgevlm.json'} cannot be read: Permission denied"
    assert states == {"panel": "ok", "theirs": line}


def test_the_real_command_prints_one_line(folder: Path) -> None:
    shutil.rmtree(folder)
    run = [*COMMAND, "run", QUESTION, "-m", str(folder)]
    done = subprocess.run(run, capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [f"Error: {error('run', QUESTION, '-m', folder)}"]
    usage = subprocess.run([*COMMAND, "run"], capture_output=True, encoding="utf-8", check=False)
    assert (usage.returncode, usage.stdout) == (2, "")
    assert "Traceback" not in usage.stderr
