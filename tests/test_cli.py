"""The command line as a person or a script meets it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from edgevlm import VLM, GenerationConfig, __version__
from edgevlm.cli.main import main
from tests.conftest import heed_interrupts, photograph
from tests.helpers.command import COMMAND, POSIX, cli
from tests.helpers.damage import copy_export, edit_manifest, flip, truncate

QUESTION = "What is in this picture?"
JSON_KEYS = {"answer", "finish_reason", "prompt_tokens", "image_tokens", "generated_tokens", "views", "timings"}
JSON_KEYS |= {"cached_tokens", "cached_views", "drafted_tokens", "accepted_tokens", "fast_forward_tokens", "satisfied"}
JSON_KEYS |= {"reasoning_content", "reasoning_tokens"}
TIMING_KEYS = {
    "load_s",
    "preprocess_s",
    "vision_s",
    "prefill_s",
    "ttft_s",
    "tpot_s",
    "total_s",
    "tokens_per_s",
    "peak_memory_bytes",
}


def answered(*arguments: object, stdin: bytes | None = None) -> dict[str, Any]:
    """Run `edgevlm run --json` and return what it prints."""
    result = cli("run", *arguments, "--json", stdin=stdin)
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, without models."""
    home = tmp_path / "own home"
    monkeypatch.setenv("EDGEVLM_HOME", str(home))
    return home


def test_the_answer_alone_is_on_stdout(exported: Path, china: Path) -> None:
    arguments = ["run", str(china), QUESTION, "-m", str(exported), "--max-new-tokens", "20"]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, check=False)
    wanted = VLM(exported).generate(china, QUESTION, GenerationConfig(max_new_tokens=20)).text
    assert done.returncode == 0
    assert done.stdout.decode().replace("\r\n", "\n") == wanted + "\n"
    assert done.stderr.decode().splitlines() == ["(cut: --max-new-tokens was reached)"]


OPENS = """
import sys

picture, opened = sys.argv.pop(1), []
sys.addaudithook(lambda event, args: event == "open" and str(args[0]) == picture and opened.append(1))
from edgevlm.cli.main import main

main(sys.argv[1:], standalone_mode=False)
print(len(opened), file=sys.stderr)
"""


def test_a_picture_is_read_once(exported: Path, china: Path, tmp_path: Path) -> None:
    options = ["-m", str(exported), "--max-new-tokens", "2", "--detail", "low"]
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"image": str(china), "question": "?"}), encoding="utf-8")
    for command in (
        ["run", str(china), QUESTION],
        ["run", str(china), QUESTION, "--choices", "yes,no"],
        ["chat", str(china)],
        ["batch", str(tmp_path / "jobs.jsonl"), "-o", str(tmp_path / "answers.jsonl")],
    ):
        arguments = [sys.executable, "-c", OPENS, str(china), *command, *options]
        done = subprocess.run(arguments, input="What?\nAnd?\n", capture_output=True, encoding="utf-8", check=True)
        assert done.stderr.split()[-1] == "1", (command, done.stderr)


def test_stats_go_to_stderr(exported: Path, china: Path) -> None:
    arguments = ["run", china, QUESTION, "-m", exported, "--max-new-tokens", 8]
    plain, with_stats = cli(*arguments), cli(*arguments, "--stats")
    assert with_stats.exit_code == 0
    assert with_stats.stdout == plain.stdout
    labels = [line.split("  ")[0] for line in with_stats.stderr.splitlines()[1:]]
    wanted = ["prompt", "cached", "answer", "drafts", "load", "preprocess", "vision", "prefill", "TTFT", "TPOT"]
    assert labels == [*wanted, "peak memory"]
    assert "52 of them image tokens of 13 views" in with_stats.stderr
    assert "8 tokens (length)" in with_stats.stderr


def test_json_is_one_object_with_these_keys(exported: Path, china: Path) -> None:
    found = answered(china, QUESTION, "-m", exported, "--max-new-tokens", 12)
    assert set(found) == JSON_KEYS
    assert set(found["timings"]) == TIMING_KEYS
    assert (found["views"], found["image_tokens"], found["generated_tokens"]) == (13, 52, 12)
    assert found["finish_reason"] == "length"
    assert found["timings"]["peak_memory_bytes"] > 2**20
    assert all(found["timings"][name] > 0 for name in TIMING_KEYS)


def test_one_token_has_no_time_per_token(exported: Path) -> None:
    timings = answered(QUESTION, "-m", exported, "--max-new-tokens", 1)["timings"]
    assert (timings["tpot_s"], timings["tokens_per_s"]) == (None, None)


def test_a_question_without_a_picture(exported: Path) -> None:
    found = answered(QUESTION, "-m", exported, "--max-new-tokens", 8)
    assert (found["views"], found["image_tokens"]) == (0, 0)
    assert found["answer"]


def test_several_pictures(exported: Path, china: Path) -> None:
    one = answered(china, QUESTION, "-m", exported, "--max-new-tokens", 8)
    two = answered(china, china, QUESTION, "-m", exported, "--max-new-tokens", 8)
    assert (two["views"], two["image_tokens"]) == (26, 104)
    assert two["answer"] != one["answer"]


def test_a_picture_from_stdin(exported: Path, china: Path) -> None:
    arguments = [QUESTION, "-m", exported, "--max-new-tokens", 12]
    assert answered("-", *arguments, stdin=china.read_bytes())["answer"] == answered(china, *arguments)["answer"]


def test_detail_and_max_image_tokens_reach_the_preprocessing(exported: Path, china: Path) -> None:
    arguments = [china, QUESTION, "-m", exported, "--max-new-tokens", 1]
    assert answered(*arguments, "--detail", "low")["views"] == 1
    assert 1 < answered(*arguments, "--max-image-tokens", 31)["views"] <= 7
    assert 1 < answered(*arguments, "--max-tiles", 7)["views"] <= 7  # what it was called before


def test_greedy_is_deterministic_and_a_seed_repeats_a_sample(exported: Path, china: Path) -> None:
    arguments = [china, QUESTION, "-m", exported, "--max-new-tokens", 16]
    assert answered(*arguments)["answer"] == answered(*arguments)["answer"]
    warm = [*arguments, "--temperature", 1.5, "--top-k", 50, "--top-p", 0.95]
    first, again, other = (answered(*warm, "--seed", seed)["answer"] for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_stop_ends_the_answer_before_its_text(exported: Path) -> None:
    whole = answered(QUESTION, "-m", exported, "--max-new-tokens", 40)["answer"]
    stop = whole[12:15]
    result = cli("run", QUESTION, "-m", exported, "--max-new-tokens", 40, "--stop", "never seen", "--stop", stop)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == whole[: whole.find(stop)] + "\n"


def test_a_full_context_is_told(exported: Path) -> None:
    result = cli("run", "what is " * 100, "-m", exported, "--max-new-tokens", 500)
    assert result.exit_code == 0
    assert result.stderr == "(cut: the context is full)\n"


def test_short_names(exported: Path, own_home: Path) -> None:
    copy_export(exported, own_home / "models" / "tiny")
    by_path = answered(QUESTION, "-m", exported, "--max-new-tokens", 8)["answer"]
    assert answered(QUESTION, "-m", "tiny", "--max-new-tokens", 8)["answer"] == by_path
    assert list((own_home / "cache" / "compiled").rglob("*.blob"))


@pytest.mark.skipif(sys.platform != "linux", reason="XDG folders")
def test_xdg_folders_hold_models_and_cache(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGEVLM_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    copy_export(exported, tmp_path / "data" / "edgevlm" / "models" / "tiny")
    assert answered(QUESTION, "-m", "tiny", "--max-new-tokens", 4)["generated_tokens"] == 4
    assert list((tmp_path / "cache" / "edgevlm" / "compiled").rglob("*.blob"))


def test_no_cache_leaves_no_compiled_model(exported: Path, own_home: Path) -> None:
    answered(QUESTION, "-m", exported, "--max-new-tokens", 1, "--no-cache")
    assert not (own_home / "cache").exists()


def test_without_exports_the_bundled_model_is_listed(own_home: Path) -> None:
    [only] = json.loads(cli("models", "--check", "--json").stdout)
    assert (only["name"], only["source"], only["state"]) == ("panel", "panel", "checked")
    assert "panel" in cli("models").stdout


def test_models_lists_sound_and_damaged_ones(exported_int4: Path, own_home: Path) -> None:
    sound = copy_export(exported_int4, own_home / "models" / "sound")
    damaged = copy_export(exported_int4, own_home / "models" / "damaged")
    unreadable = copy_export(exported_int4, own_home / "models" / "unreadable")
    truncate(damaged / "openvino_language_model.bin")
    (unreadable / "edgevlm.json").write_text("{", encoding="utf-8")
    copy_export(exported_int4, own_home / "models" / ".hidden")
    found = {each["name"]: each for each in json.loads(cli("models", "--json").stdout)}
    assert sorted(found) == ["damaged", "panel", "sound", "unreadable"]
    assert found["sound"]["state"] == "ok"
    assert found["sound"]["size_bytes"] == sum(path.stat().st_size for path in sound.iterdir()) - manifest_size(sound)
    assert found["sound"]["precision"] == "vision_embeddings w8a8, text_embeddings int8, language int4"
    assert found["damaged"]["state"].startswith(f"damaged: {damaged / 'openvino_language_model.bin'} has ")
    assert found["unreadable"]["state"].startswith(f"damaged: {unreadable / 'edgevlm.json'} cannot be read (")
    table = cli("models")
    assert table.exit_code == 0
    assert all(name in table.stdout for name in found)


def manifest_size(folder: Path) -> int:
    return (folder / "edgevlm.json").stat().st_size


def test_check_reads_what_a_load_does_not(exported: Path, own_home: Path) -> None:
    folder = copy_export(exported, own_home / "models" / "tiny")
    size = 17 * 2**20
    with (folder / "large.bin").open("wb") as file:
        file.truncate(size)
    edit_manifest(folder, lambda data: data["files"].update({"large.bin": {"sha256": "0" * 64, "size_bytes": size}}))
    (_, quick), (_, full) = (json.loads(cli("models", "--json", *option).stdout) for option in ([], ["--check"]))
    assert quick["state"] == "ok"
    wanted = f"{folder / 'large.bin'} is not what was exported (SHA-256 differs); export the model again"
    assert full["state"] == f"damaged: {wanted}"


def test_a_checked_model_is_said_to_be_checked(exported: Path, own_home: Path) -> None:
    folder = copy_export(exported, own_home / "models" / "tiny")
    assert [each["state"] for each in json.loads(cli("models", "--json", "--check").stdout)] == ["checked"] * 2
    flip(folder / "openvino_language_model.bin")
    bundled, own = json.loads(cli("models", "--json").stdout)
    assert bundled["state"] == "ok"
    assert own["state"].startswith("damaged: ")


def test_doctor_tells_what_a_bug_report_needs(own_home: Path) -> None:
    facts = json.loads(cli("doctor", "--json").stdout)
    assert facts["edgevlm"] == __version__
    assert facts["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert {"openvino", "numpy", "pillow", "tokenizers"} <= set(facts["runtime"])
    assert {"torch", "transformers", "optimum-intel", "nncf"} <= set(facts["export extra"])
    assert "CPU" in facts["devices"]
    assert isinstance(facts["isa"], list)
    assert facts["models folder"] == str(own_home / "models")
    assert facts["cache folder"] == str(own_home / "cache")
    assert "GiB" in facts["memory"]


def test_doctor_keeps_long_paths_on_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / ("long" * 30)
    monkeypatch.setenv("EDGEVLM_HOME", str(home))
    result = cli("doctor")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "models folder" in result.stdout
    assert any(line.endswith(str(home / "models")) for line in result.stdout.splitlines())


@pytest.mark.parametrize("name", [None, *main.list_commands(click.Context(main))])
def test_help_shows_an_example(name: str | None) -> None:
    result = cli(*([name] if name else []), "--help")
    assert result.exit_code == 0
    examples = [line for line in result.stdout.splitlines() if line.startswith(f"  edgevlm {name or ''}")]
    assert examples
    assert result.stdout.startswith("Usage: ")


def test_version() -> None:
    assert __version__ in cli("--version").stdout


def generating(exported: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start an answer of some hundred tokens."""
    arguments = ["run", "what", "-m", str(exported), "--max-new-tokens", "500", *options]
    heed = {} if sys.platform == "win32" else {"preexec_fn": heed_interrupts}
    return subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **heed)


@POSIX
def test_ctrl_c_ends_with_130_and_no_traceback(exported: Path) -> None:
    with generating(exported) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.decode() == "\nInterrupted.\n"


@POSIX
@pytest.mark.parametrize("options", [[], ["--json"], ["--stats"]])
def test_a_closed_pipe_is_no_traceback(exported: Path, options: list[str]) -> None:
    with generating(exported, *options) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 1
    assert errors == b""


@POSIX
def test_a_closed_stdout_is_no_traceback(exported: Path) -> None:
    run = [*COMMAND, "run", "what", "-m", str(exported), "--max-new-tokens", "4"]
    done = subprocess.run(["/bin/sh", "-c", 'exec "$@" >&-', "sh", *run], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"(cut: --max-new-tokens was reached)\n")


def test_the_picture_is_decoded_as_the_python_api_does(exported: Path, china: Path) -> None:
    by_array = VLM(exported).generate(photograph("china.jpg"), QUESTION, GenerationConfig(max_new_tokens=12)).text
    assert answered(china, QUESTION, "-m", exported, "--max-new-tokens", 12)["answer"] == by_array
