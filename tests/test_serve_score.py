"""`POST /v1/score`: the scores are `VLM.score`'s, beside running answers, too; its decisions, bounds and errors."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edgevlm import VLM
from edgevlm.decoding import stream
from edgevlm.decoding.scoring import Scores
from edgevlm.server.models import Source
from edgevlm.server.run import Server
from edgevlm.server.schemas import MAX_CHOICES
from edgevlm.strict_json import read_json
from tests.conftest import F32, noise
from tests.helpers.serving import Braked, ask, data_url, raw, request, serving, shown, wait_until

QUESTION = "What is in this picture?"
CHOICES = ["yes", "yes, two", "no", "a red circle above a blue square", "Größe 🙂"]
PAGED = replace(F32, kv_cache="paged")
PICTURE = noise(60, 90)


@pytest.fixture(scope="module")
def server(vlm: VLM) -> Iterator[Server]:
    with serving(vlm, max_prompt_chars=80_000) as server:
        yield server


def score(server: Server, headers: dict[str, str] | None = None, **fields: Any) -> tuple[int, Any]:
    body = {"messages": [{"role": "user", "content": QUESTION}], **fields}
    status, _, answer = request(server, "POST", "/v1/score", body, headers)
    return status, read_json(answer)


def same(answer: dict[str, Any], expected: Scores) -> None:
    assert answer["log_likelihoods"] == pytest.approx(dict(expected.log_likelihoods), abs=2e-3)
    assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-3)
    assert list(answer["probabilities"]) == list(expected.log_likelihoods)
    assert answer["total_probability"] == pytest.approx(expected.total_probability, rel=1e-2)


def test_the_server_scores_as_the_api_does(server: Server, vlm: VLM) -> None:
    messages = shown(data_url(Image.fromarray(PICTURE)), text=QUESTION, detail="low")
    status, answer = score(server, model="tiny", messages=messages, choices=CHOICES, user="me", think=False)
    assert status == 200, answer
    expected = vlm.score(PICTURE, QUESTION, CHOICES, detail="low")
    same(answer, expected)
    assert (answer["object"], answer["model"], answer["type"]) == ("scores", "tiny", "choice")
    assert answer["value"] == expected.best
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (expected.prompt_tokens, 0)
    assert usage["total_tokens"] == expected.prompt_tokens
    assert usage["prompt_tokens_details"]["image_tokens"] == expected.image_tokens > 0
    assert answer["timings"]["total_s"] > 0 and answer["timings"]["views"] == expected.views
    figures = request(server, "GET", "/metrics")[2].decode()
    assert 'edgevlm_requests_total{path="/v1/score",status="200"}' in figures
    assert 'edgevlm_answers_total{end="scored",model="tiny"}' in figures


def test_a_conversation_is_scored_after_its_turns(server: Server, vlm: VLM) -> None:
    turns = [("system", "Be brief."), ("user", "What is it?"), ("assistant", "A gauge."), ("user", QUESTION)]
    status, answer = score(server, messages=[{"role": role, "content": text} for role, text in turns], choices=CHOICES)
    assert status == 200, answer
    said = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    *_, expected = vlm.score_steps(said, [], CHOICES)
    assert isinstance(expected, Scores)
    same(answer, expected)


def test_typed_decisions(server: Server, vlm: VLM) -> None:
    _, answer = score(server, type="bool")
    expected = vlm.score(None, QUESTION, ["yes", "no"])
    same(answer, expected)
    assert (answer["type"], answer["value"]) == ("bool", expected.best == "yes")
    _, turned = score(server, type="bool", choices=["no", "yes"])
    assert turned["value"] is not answer["value"]
    _, answer = score(server, type="score", minimum=-1, maximum=3)
    expected = vlm.score(None, QUESTION, ["-1", "0", "1", "2", "3"])
    same(answer, expected)
    mean = sum(int(number) * p for number, p in expected.probabilities.items())
    assert answer["value"] == pytest.approx(mean, abs=2e-3)


def test_labels_are_each_judged_on_their_own(server: Server, vlm: VLM) -> None:
    labels, question = ["a red circle", "a gauge", "Größe 🙂"], "Is there {label} in this picture?"
    messages = shown(data_url(Image.fromarray(PICTURE)), text=question, detail="low")
    status, answer = score(server, type="multi_label", messages=messages, choices=labels)
    assert status == 200, answer
    expected = vlm.score_labels(PICTURE, question, labels, detail="low")
    assert (answer["type"], answer["value"]) == ("multi_label", expected.above())
    assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-3)
    assert answer["total_probability"] == pytest.approx(expected.total_probabilities, rel=1e-2)
    for label in labels:
        assert answer["log_likelihoods"][label] == pytest.approx(dict(expected.log_likelihoods[label]), abs=2e-3)
    usage = answer["usage"]
    assert usage["prompt_tokens"] == expected.prompt_tokens
    assert usage["prompt_tokens_details"]["image_tokens"] == expected.image_tokens
    threshold = sum(sorted(expected.probabilities.values())[:2]) / 2
    _, answer = score(server, type="multi_label", messages=messages, choices=labels, threshold=threshold)
    assert answer["value"] == expected.above(threshold) and len(answer["value"]) == 2


def test_a_calibration_temperature_scales_the_probabilities(server: Server, vlm: VLM) -> None:
    _, answer = score(server, choices=CHOICES)
    assert answer["temperature"] == 1
    _, answer = score(server, choices=CHOICES, calibration_temperature=2.5)
    same(answer, vlm.score(None, QUESTION, CHOICES, calibration_temperature=2.5))
    assert answer["temperature"] == 2.5


def test_scores_beside_running_answers_are_those_alone(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their steps are made in one inference with those of the answers."""
    counts: list[int] = []
    step_together = stream.step_together
    monkeypatch.setattr(
        stream, "step_together", lambda sessions, ids: counts.append(len(sessions)) or step_together(sessions, ids)
    )
    alone = VLM(exported, PAGED)
    expected, labels = alone.score(None, QUESTION, CHOICES), alone.score_labels(None, QUESTION, CHOICES[:2])
    model = Braked(VLM(exported, PAGED))
    answered = VLM(exported, PAGED).generate(None, "How many parts are there?", max_new_tokens=40)
    with serving(model) as server, ThreadPoolExecutor() as pool:
        messages = [{"role": "user", "content": "How many parts are there?"}]
        model.tokens.clear()
        running = pool.submit(ask, server, messages=messages, max_tokens=40)
        wait_until(lambda: model.holding)
        scored = pool.submit(score, server, choices=CHOICES)
        judged = pool.submit(score, server, type="multi_label", choices=CHOICES[:2])
        wait_until(lambda: server.worker.waiting == 2)
        model.release()
        status, answer = scored.result()
        assert status == 200, answer
        same(answer, expected)
        status, answer = judged.result()
        assert status == 200, answer
        assert answer["probabilities"] == pytest.approx(labels.probabilities, abs=1e-3)
        assert running.result()[1]["choices"][0]["message"]["content"] == answered.text
    assert max(counts) == 3


def test_another_model_scores_by_its_name(server: Server, vlm: VLM, exported: Path) -> None:
    with serving(vlm, Source("other", lambda: VLM(exported, F32))) as both:
        status, answer = score(both, model="other", choices=CHOICES)
        assert (status, answer["model"]) == (200, "other")
        same(answer, vlm.score(None, QUESTION, CHOICES))
    status, answer = score(server, model="nonesuch", choices=CHOICES)
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_callers_share_no_cache(vlm: VLM) -> None:
    keys = ("k" * 16, "l" * 16)
    with serving(vlm, api_keys=keys) as server:
        cached = []
        for key in (*keys, keys[0]):
            _, answer = score(
                server, {"Authorization": f"Bearer {key}"}, choices=["a", "b"], messages=shown(text="Hm?")
            )
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[:2] == [0, 0] and cached[2] > 0


CASES: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({}, 400, "invalid_request", "choices"),
    ({"choices": []}, 400, "invalid_request", "choices"),
    ({"choices": "yes"}, 400, "invalid_request", "choices"),
    ({"choices": ["a", ""]}, 400, "invalid_request", "choices.1"),
    ({"choices": ["a", 5]}, 400, "invalid_request", "choices.1"),
    ({"choices": ["a", "a"]}, 400, "invalid_value", "choices"),
    ({"choices": ["x" * 1001]}, 400, "invalid_request", "choices.0"),
    ({"choices": [str(n) for n in range(MAX_CHOICES + 1)]}, 400, "invalid_request", "choices"),
    ({"choices": [f"{n:0900}" for n in range(MAX_CHOICES)]}, 413, "prompt_too_long", "choices"),
    ({"choices": ["a", "so " * 300], "messages": shown(text="so " * 400)}, 400, "context_length_exceeded", "messages"),
    ({"choices": ["a"], "temperature": 1}, 400, "unsupported_parameter", "temperature"),
    ({"choices": ["a"], "think": True}, 400, "unsupported_parameter", "think"),
    ({"choices": ["a"], "stream": True}, 400, "unsupported_parameter", "stream"),
    ({"choices": ["a"], "type": "rank"}, 400, "invalid_request", "type"),
    ({"choices": ["a"], "minimum": 1}, 400, "invalid_value", "minimum"),
    ({"choices": ["a"], "maximum": 1}, 400, "invalid_value", "maximum"),
    ({"choices": ["a"], "type": "bool"}, 400, "invalid_value", "choices"),
    ({"choices": ["a", "b"], "type": "score", "minimum": 1, "maximum": 5}, 400, "invalid_value", "choices"),
    ({"type": "score", "maximum": 5}, 400, "invalid_request", "minimum"),
    ({"type": "score", "minimum": 5}, 400, "invalid_request", "maximum"),
    ({"type": "score", "minimum": 5, "maximum": 5}, 400, "invalid_value", "maximum"),
    ({"type": "score", "minimum": 0, "maximum": 100}, 400, "invalid_value", "maximum"),
    ({"type": "multi_label"}, 400, "invalid_request", "choices"),
    ({"type": "multi_label", "choices": ["a", "a"]}, 400, "invalid_value", "choices"),
    ({"type": "multi_label", "choices": ["a"], "threshold": 1.5}, 400, "invalid_request", "threshold"),
    ({"type": "multi_label", "choices": ["a"], "minimum": 1}, 400, "invalid_value", "minimum"),
    ({"type": "multi_label", "choices": ["a"], "messages": [{"role": "assistant", "content": "a"}]}, 400,
     "invalid_prompt", "messages"),
    ({"type": "multi_label", "choices": ["a"], "messages": shown(text="so " * 400)}, 400, "context_length_exceeded",
     "messages"),
    ({"choices": ["a"], "threshold": 0.5}, 400, "invalid_value", "threshold"),
    ({"choices": ["a"], "calibration_temperature": 0}, 400, "invalid_request", "calibration_temperature"),
    ({"choices": ["a"], "calibration_temperature": "1"}, 400, "invalid_request", "calibration_temperature"),
    ({"choices": ["a"], "messages": []}, 400, "invalid_request", "messages"),
    ({"choices": ["a"], "messages": shown("data:,x")}, 400, "invalid_image", "messages.0.content.0.image_url"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "status", "code", "param"), CASES)
def test_what_is_refused(server: Server, fields: dict[str, Any], status: int, code: str, param: str | None) -> None:
    found, answer = score(server, **fields)
    assert (found, answer["error"]["code"], answer["error"]["param"]) == (status, code, param), answer
    assert "\n" not in answer["error"]["message"]


def test_the_time_is_up_and_callers_hang_up(vlm: VLM) -> None:
    model = Braked(vlm)
    with serving(model, time_limit_s=1.0, max_running=1) as server, ThreadPoolExecutor() as pool:
        model.tokens.clear()
        pool.submit(ask, server)
        wait_until(lambda: model.holding)
        status, answer = score(server, choices=CHOICES)
        assert (status, answer["error"]["code"]) == (504, "time_limit")
        with raw(server, {"messages": shown(text=QUESTION), "choices": CHOICES}, "/v1/score"):
            wait_until(lambda: server.worker.waiting == 1)
        wait_until(lambda: server.worker.waiting == 0)
        model.release()
        wait_until(lambda: not server.worker.held)
        assert score(server, choices=CHOICES)[0] == 200


def test_who_hangs_up_is_scored_no_further(exported: Path) -> None:
    choices = [f"{number} " + "and so on " * 20 for number in range(MAX_CHOICES)]
    with serving(VLM(exported, F32)) as server:
        with raw(server, {"messages": shown(text=QUESTION), "choices": choices}, "/v1/score"):
            wait_until(lambda: server.worker.running == 1)
        wait_until(lambda: not server.worker.held)
        figures = request(server, "GET", "/metrics")[2].decode()
    assert 'edgevlm_answers_total{end="abandoned",model="tiny"} 1.0' in figures
    assert "scored" not in figures
