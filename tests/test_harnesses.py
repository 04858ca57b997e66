"""Requests as evaluation harnesses send them (see docs/eval.md): each is answered as the Python API answers."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgevlm import VLM, GenerationConfig
from edgevlm.answer import Answer, Piece
from edgevlm.families.base import ImageBudget
from edgevlm.server.run import Server
from edgevlm.strict_json import read_json
from tests.helpers.serving import request, serving

REQUESTS = json.loads((Path(__file__).parent / "harness_requests.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def server(vlm: VLM) -> Iterator[Server]:
    with serving(vlm) as server:
        yield server


def answered(vlm: VLM, body: dict[str, Any]) -> Answer:
    """Return what the API answers."""
    messages, images, detail = [], [], "auto"
    for message in body["messages"]:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "image_url":
                images.append(b64decode(part["image_url"]["url"].partition(",")[2]))
                detail = part["image_url"].get("detail", "auto")
        told = [{"type": "text", "text": part["text"]} if "text" in part else {"type": "image"} for part in parts]
        messages.append({"role": message["role"], "content": told})
    config = GenerationConfig(
        max_new_tokens=body["max_tokens"], stop=tuple(body.get("stop", ())), top_p=body.get("top_p", 1.0)
    )
    *_, last = vlm.events(messages, images, config, ImageBudget(detail))
    assert isinstance(last, Piece) and last.answer
    return last.answer


@pytest.mark.parametrize("name", REQUESTS)
def test_a_harness_is_answered(server: Server, vlm: VLM, name: str) -> None:
    body = REQUESTS[name]
    status, _, data = request(server, "POST", "/v1/chat/completions", body)
    answer = read_json(data)
    assert status == 200, answer
    expected = answered(vlm, body)
    [choice] = answer["choices"]
    assert choice["message"]["content"] == expected.text
    usage = answer["usage"]  # Inspect and lmms-eval read it
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (expected.prompt_tokens, expected.generated_tokens)
    assert (usage["prompt_tokens_details"]["image_tokens"] > 0) == ("image_url" in json.dumps(body))


def test_a_limit_of_tiles_in_a_picture_is_refused_by_its_name(server: Server) -> None:
    """VLMEvalKit's LMDeployAPI sends it where the model is called InternVL2."""
    body = json.loads(json.dumps(REQUESTS["VLMEvalKit, LMDeployAPI"]))
    body["messages"][0]["content"][1]["image_url"]["max_dynamic_patch"] = 6
    status, _, data = request(server, "POST", "/v1/chat/completions", body)
    error = read_json(data)["error"]
    assert (status, error["code"]) == (400, "unsupported_parameter")
    assert error["param"] == "messages.0.content.1.image_url.max_dynamic_patch"
