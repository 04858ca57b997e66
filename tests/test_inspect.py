"""Inspect AI asks the bundled model, in this process and over HTTP, and is told what the API tells."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import VLM, EdgeVLMError, GenerationConfig
from tests.conftest import F32
from tests.helpers.serving import data_url, serving
from training.evaluate import judge
from training.scenes import SCENES

inspect_ai = pytest.importorskip("inspect_ai", reason="Inspect AI is not installed: pip install 'edgevlm[inspect]'")
from inspect_ai import Task, model  # noqa: E402
from inspect_ai.dataset import Sample  # noqa: E402
from inspect_ai.model import ChatMessageUser, ContentImage, ContentText, GenerateConfig  # noqa: E402
from inspect_ai.scorer import match  # noqa: E402
from inspect_ai.util import json_schema  # noqa: E402

from edgevlm.evals import inspect_provider  # noqa: E402

ROOT = Path(__file__).parents[1]
ARGS = {"inference_precision": "f32", "device": "CPU", "cache": False}
DRAWN = [SCENES[name](np.random.default_rng((3, at))) for at, name in enumerate(SCENES)]

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def panel() -> VLM:
    return VLM("panel", F32)


@pytest.fixture
def provided() -> Iterator[Any]:
    yield model.get_model("edgevlm/panel", **ARGS)


def asked(url: str, question: str) -> list[Any]:
    return [ChatMessageUser(content=[ContentImage(image=url), ContentText(text=question)])]


def drawn_task() -> Any:
    asks = [(asked(data_url(scene.image), scene.pairs[0].question), scene.pairs[0].answer) for scene in DRAWN]
    samples = [Sample(input=question, target=answer) for question, answer in asks]
    return Task(dataset=samples, scorer=match(location="exact"), config=GenerateConfig(max_tokens=32))


def outputs(name: str, folder: Path, **options: Any) -> list[str]:
    [log] = inspect_ai.eval(drawn_task(), name, display="none", log_dir=str(folder), **options)
    assert log.status == "success", log.error
    assert log.stats.model_usage[name].output_tokens > 0
    return [sample.output.completion for sample in log.samples]


def test_drawn_pictures_are_answered_as_the_api_answers(panel: VLM, tmp_path: Path) -> None:
    expected = [panel.generate(each.image, each.pairs[0].question, max_new_tokens=32).text for each in DRAWN]
    assert sum(judge(each.pairs[0], answer) for each, answer in zip(DRAWN, expected, strict=True)) >= 6
    assert outputs("edgevlm/panel", tmp_path / "process", model_args=ARGS) == expected
    with serving(panel, model_name="panel") as server:
        options = {"model_base_url": f"{server.url}/v1", "model_args": {"api_key": "none"}}
        assert outputs("openai-api/edgevlm/panel", tmp_path / "http", **options) == expected


def test_inspect_finds_the_provider() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["inspect_ai"] == {"edgevlm": inspect_provider.__name__}


@pytest.mark.anyio
async def test_settings_reach_the_model(provided: Any, panel: VLM) -> None:
    scene = DRAWN[0]
    question = scene.pairs[0].question
    settings = GenerateConfig(logprobs=True, top_logprobs=2, max_tokens=2)
    found = await provided.generate(asked(data_url(scene.image), question), config=settings)
    expected = panel.generate(scene.image, question, GenerationConfig(max_new_tokens=2, top_logprobs=2))
    assert (found.completion, found.stop_reason) == (expected.text, "max_tokens")
    told = [(each.token, round(each.logprob, 3)) for each in found.choices[0].logprobs.content]
    assert told == [(each.text, round(each.logprob, 3)) for each in expected.logprobs]
    assert found.usage.total_tokens == expected.prompt_tokens + expected.generated_tokens
    schema = model.ResponseSchema(name="reading", json_schema=json_schema(bool))
    formed = await provided.generate(
        asked(data_url(scene.image), question), config=GenerateConfig(response_schema=schema)
    )
    assert formed.completion in ("true", "false")


@pytest.mark.anyio
async def test_what_cannot_be_honoured_is_told(provided: Any) -> None:
    for settings, told in (
        (GenerateConfig(num_choices=2), "num_choices is not honoured"),
        (GenerateConfig(reasoning_effort="high"), "does not think"),
        (GenerateConfig(extra_body={"detial": "low"}), "did you mean detail"),
    ):
        with pytest.raises(EdgeVLMError, match=told):
            await provided.generate("Hello", config=settings)
    with pytest.raises(EdgeVLMError, match="data: URL is not valid base64"):
        await provided.generate(asked("data:image/png;base64,!", "What?"))
    long = await provided.generate("word " * 9_000)
    assert (long.stop_reason, long.completion) == ("model_length", "")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
