"""The bundled model: shipped in the wheel, right about the shipped pictures, and used when none is named."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgevlm import VLM, GenerationConfig, ModelNotFoundError, paths
from edgevlm.manifest import check_files
from training.evaluate import judge
from training.scene import QA

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
QUESTIONS = [json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def panel() -> VLM:
    """The model that answers when none is named."""
    return VLM()


@pytest.mark.parametrize("line", QUESTIONS, ids=lambda line: f"{line['image']} {line['question']}")
def test_it_is_right_about_the_shipped_pictures(panel: VLM, line: dict[str, Any]) -> None:
    answer = panel.generate(EXAMPLES / line["image"], line["question"], GenerationConfig(max_new_tokens=64))
    assert judge(QA("", line["question"], line["answer"], line["tolerance"]), answer.text), answer.text
    assert answer.finish_reason == "stop"


def test_the_examples_are_pictures_of_every_kind() -> None:
    assert len({line["image"] for line in QUESTIONS}) >= 8
    assert {line["image"] for line in QUESTIONS} == {path.name for path in EXAMPLES.glob("*.png")}


def test_its_files_are_what_was_exported(panel: VLM) -> None:
    check_files(panel.folder, panel.manifest, full=True)
    assert panel.manifest.source == "panel"
    assert panel.manifest.family == "idefics3"
    assert panel.manifest.size_bytes <= 12e6


def test_it_is_an_ordinary_export_of_the_checkpoint_in_the_tree(panel: VLM) -> None:
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (panel.folder / name).read_bytes() == (ROOT / "training" / "panel" / name).read_bytes()


def test_the_command_uses_it_and_says_so_on_stderr() -> None:
    line = QUESTIONS[0]
    command = [sys.executable, "-m", "edgevlm.cli", "run", str(EXAMPLES / line["image"]), line["question"]]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    assert done.stdout == line["answer"] + "\n"
    assert done.stderr == paths.DEFAULT_NOTICE + "\n"
    assert "edgevlm export" in done.stderr
    named = subprocess.run([*command, "-m", "panel"], capture_output=True, text=True, encoding="utf-8", check=True)
    assert (named.stdout, named.stderr) == (done.stdout, "")


def test_the_api_says_so_through_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "edgevlm"):
        VLM("panel")
        assert caplog.messages == []
        VLM()
    assert caplog.messages == [paths.DEFAULT_NOTICE]


def test_a_model_of_the_user_s_goes_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    assert paths.find_model("panel") == paths.default_model()
    own = tmp_path / "models" / "panel"
    own.mkdir(parents=True)
    assert paths.find_model("panel") == own
    assert paths.find_model(None) == paths.default_model()


def test_an_installation_without_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "_BUNDLED", tmp_path)
    with pytest.raises(ModelNotFoundError, match="panel, the bundled model, is missing; name another with -m"):
        VLM()
