"""The bundled model: shipped in the wheel, right about the shipped pictures, and used when none is named."""

from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from edgevlm import VLM, GenerationConfig, ModelNotFoundError, model_store
from edgevlm.manifest import check_files
from edgevlm.server.run import Server
from tests.helpers.command import COMMAND, cli
from tests.helpers.serving import ask, data_url, serving, shown, wait_until
from training.evaluate import judge
from training.scene import QA
from training.scenes import SCENES
from training.settings import PANEL

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
QUESTIONS = [json.loads(line) for line in (EXAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def panel() -> VLM:
    """The model that answers when none is named."""
    return VLM()


def is_right(line: dict[str, Any], answer: str) -> bool:
    """Tell whether the question of a line was answered with what is true."""
    return judge(QA("", line["question"], line["answer"], line["tolerance"]), answer)


@pytest.mark.parametrize("line", QUESTIONS, ids=lambda line: f"{line['image']} {line['question']}")
def test_it_is_right_about_the_shipped_pictures(panel: VLM, line: dict[str, Any]) -> None:
    answer = panel.generate(EXAMPLES / line["image"], line["question"], GenerationConfig(max_new_tokens=64))
    assert is_right(line, answer.text), answer.text
    assert answer.finish_reason == "stop"


def test_the_examples_are_pictures_of_every_kind() -> None:
    assert {line["image"] for line in QUESTIONS} == {f"{kind}.png" for kind in SCENES}
    assert {line["image"] for line in QUESTIONS} == {path.name for path in EXAMPLES.glob("*.png")}


@pytest.fixture(scope="module")
def server(panel: VLM) -> Iterator[Server]:
    with serving(panel, model_name="panel") as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
def test_openai_s_client_gets_its_answers(server: Server, stream: bool) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        for line in QUESTIONS:
            messages = shown(data_url(EXAMPLES / line["image"]), text=line["question"])
            answer = client.chat.completions.create(model="panel", messages=messages, stream=stream)
            said = (
                "".join(chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices)
                if stream
                else answer.choices[0].message.content
            )
            assert is_right(line, said), said


def test_an_answer_fits_a_form(panel: VLM, server: Server) -> None:
    line = next(line for line in QUESTIONS if line["answer"] in {"yes", "no"})
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    messages = shown(data_url(EXAMPLES / line["image"]), text=line["question"])
    status, answer = ask(server, messages=messages, response_format=form, max_tokens=40)
    assert status == 200
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"answer": line["answer"]}
    scores = panel.score(EXAMPLES / line["image"], line["question"], ["yes", "no"])
    assert scores.probabilities[line["answer"]] > 0.5


def test_its_tokens_come_with_their_probabilities(server: Server) -> None:
    line = next(line for line in QUESTIONS if line["image"] == "light.png")
    messages = shown(data_url(EXAMPLES / line["image"]), text=line["question"])
    status, answer = ask(server, messages=messages, logprobs=True, top_logprobs=2)
    assert status == 200
    [choice] = answer["choices"]
    tokens = choice["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == choice["message"]["content"]
    assert all(math.exp(token["logprob"]) > 0.5 for token in tokens)


def test_a_form_holds_what_the_picture_shows(server: Server) -> None:
    line = next(line for line in QUESTIONS if line["image"] == "light.png" and "colour" in line["question"])
    colours = {"enum": ["red", "yellow", "green", "blue", "white"]}
    schema = {"type": "object", "properties": {"colour": colours}, "required": ["colour"]}
    form = {"type": "json_schema", "json_schema": {"name": "lamp", "schema": schema | {"additionalProperties": False}}}
    messages = shown(data_url(EXAMPLES / line["image"]), text=line["question"])
    status, answer = ask(server, messages=messages, response_format=form, max_tokens=40)
    assert status == 200
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"colour": line["answer"]}


def test_a_file_of_jobs_gets_its_answers(tmp_path: Path) -> None:
    jobs, answers = tmp_path / "jobs.jsonl", tmp_path / "answers.jsonl"
    rows = [{"image": str(EXAMPLES / line["image"]), "question": line["question"]} for line in QUESTIONS]
    jobs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = cli("batch", jobs, "-o", answers)
    assert result.exit_code == 0, result.stderr
    found = [json.loads(row) for row in answers.read_text(encoding="utf-8").splitlines()]
    assert len(found) == len(QUESTIONS)
    assert all(is_right(line, row["answer"]) for line, row in zip(QUESTIONS, found, strict=True))


def test_a_watched_folder_gets_its_answers(tmp_path: Path) -> None:
    line = QUESTIONS[0]
    shutil.copy(EXAMPLES / line["image"], tmp_path)
    answers = tmp_path / "answers.jsonl"
    command = [*COMMAND, "watch", str(tmp_path), "--question", line["question"], "-o", str(answers), "--settle", "0.1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as watcher:
        try:
            wait_until(lambda: answers.is_file() and answers.read_bytes().endswith(b"\n"))
        finally:
            watcher.terminate()
            watcher.communicate()
    [row] = [json.loads(each) for each in answers.read_text(encoding="utf-8").splitlines()]
    assert is_right(line, row["answer"]), row


def test_its_files_are_what_was_exported(panel: VLM) -> None:
    check_files(panel.folder, panel.manifest, full=True)
    assert panel.manifest.source == "panel"
    assert panel.manifest.family == "idefics3"
    assert panel.manifest.size_bytes <= 12e6


def test_it_is_an_ordinary_export_of_the_checkpoint_in_the_tree(panel: VLM) -> None:
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (panel.folder / name).read_bytes() == (PANEL / name).read_bytes()


def test_the_command_uses_it_and_says_so_on_stderr() -> None:
    line = QUESTIONS[0]
    command = [sys.executable, "-m", "edgevlm", "run", str(EXAMPLES / line["image"]), line["question"]]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    assert done.stdout == line["answer"] + "\n"
    assert done.stderr == model_store.DEFAULT_NOTICE + "\n"
    assert "edgevlm export" in done.stderr
    named = subprocess.run([*command, "-m", "panel"], capture_output=True, text=True, encoding="utf-8", check=True)
    assert (named.stdout, named.stderr) == (done.stdout, "")


def test_the_api_says_so_through_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "edgevlm"):
        VLM("panel")
        assert caplog.messages == []
        VLM()
    assert caplog.messages == [model_store.DEFAULT_NOTICE]


def test_a_model_of_the_user_s_goes_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    assert model_store.find_model("panel") == model_store.default_model()
    own = tmp_path / "models" / "panel"
    own.mkdir(parents=True)
    assert model_store.find_model("panel") == own
    assert model_store.find_model(None) == model_store.default_model()


def test_an_installation_without_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_store, "_BUNDLED", tmp_path)
    with pytest.raises(ModelNotFoundError, match="panel, the bundled model, is missing; name another with -m"):
        VLM()
