"""Under paged attention the server decodes several answers together, and each is the one that it would be alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm import VLM, Constraint, GenerationConfig
from edgevlm.answer import Answer, Piece
from edgevlm.decoding import stream
from edgevlm.families.base import ImageBudget
from edgevlm.inputs.chat_template import user_message
from edgevlm.runtime.kv_paged import PagedSession
from edgevlm.server.engine import Job, Worker
from edgevlm.server.errors import AbandonedError
from edgevlm.server.metrics import Metrics
from edgevlm.server.models import Models, Source
from edgevlm.server.settings import ServeConfig
from tests.conftest import F32, noise
from tests.helpers.serving import KIND, PATIENCE_S, Braked, ask, data_url, serving, shown, wait_until

PAGED = replace(F32, kv_cache="paged")
FIRST, SECOND = noise(40, 90), noise(90, 40)
LONG = 60
CASES: list[tuple[str, list[np.ndarray], dict[str, Any]]] = [
    ("What is in this picture?", [FIRST], {}),
    ("How many parts are there?", [], {"temperature": 1.0, "seed": 5}),
    ("Describe the gauge, the display and the label.", [SECOND, FIRST], {"draft_tokens": 0}),
    ("A circle, or a square?", [SECOND], {"constraint": Constraint.regex("(circle|square|, )+"), "seed": 2}),
]
"""Questions, pictures and options: greedy with drafts, sampled, without drafts, under a grammar."""


class Asked:
    """A job, and what its caller is told."""

    def __init__(self, worker: Worker, question: str, images: Sequence[np.ndarray], config: GenerationConfig) -> None:
        self._told: SimpleQueue[Piece | BaseException] = SimpleQueue()
        messages = [user_message(question, len(images))]
        self.job = Job(messages, images, config, ImageBudget(), "someone", self._told.put)
        worker.submit(self.job)

    @property
    def end(self) -> Answer | BaseException:
        """The answer, or the error that came instead."""
        while True:
            told = self._told.get(timeout=PATIENCE_S)
            if isinstance(told, BaseException):
                return told
            if told.answer:
                return told.answer


@pytest.fixture(scope="module")
def paged(exported: Path) -> VLM:
    return VLM(exported, PAGED)


@pytest.fixture(scope="module")
def alone(exported: Path) -> list[Answer]:
    """What each case is answered by a model that answers nothing else."""
    vlm = VLM(exported, replace(PAGED, kept_sessions=0))
    return [vlm.generate(images, question, config_of(options)) for question, images, options in CASES]


def config_of(options: dict[str, Any]) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=LONG, **options)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of answers in each inference that several shared."""
    counts: list[int] = []
    step_together = stream.step_together

    def spy(sessions: Any, token_ids: Any) -> Any:
        counts.append(len(sessions))
        return step_together(sessions, token_ids)

    monkeypatch.setattr(stream, "step_together", spy)
    return counts


@contextmanager
def answering(vlm: VLM, cases: int, metrics: list[Any] | None = None) -> Iterator[tuple[Worker, list[Asked]]]:
    """Ask the first cases at once: the first answer is held at its third token until all others wait."""
    model, ends = Braked(vlm), [] if metrics is None else metrics
    worker = Worker(lambda: model, 16, lambda *end: ends.append(end), max_running=4)
    worker.start()
    try:
        wait_until(lambda: worker.ready)
        asked = []
        for question, images, options in CASES[:cases]:
            asked.append(Asked(worker, question, images, config_of(options)))
            wait_until(lambda: model.holding)
        assert (worker.running, worker.waiting) == (1, cases - 1)
        model.release()
        yield worker, asked
    finally:
        model.release()
        assert worker.stop(PATIENCE_S)


def same(answer: Answer | BaseException, expected: Answer) -> bool:
    """Whether an answer is the expected one, token for token."""
    assert isinstance(answer, Answer), answer
    return (answer.token_ids, answer.text, answer.finish_reason) == (
        expected.token_ids,
        expected.text,
        expected.finish_reason,
    )


@pytest.mark.parametrize("count", [2, 4])
def test_answers_decoded_together_are_those_decoded_alone(
    paged: VLM, alone: list[Answer], joined: list[int], count: int
) -> None:
    with answering(paged, count) as (_, asked):
        assert all(same(each.end, expected) for each, expected in zip(asked, alone, strict=False))
    assert max(joined) == count


def test_one_answer_alone_shares_no_inference(paged: VLM, alone: list[Answer], joined: list[int]) -> None:
    with answering(paged, 1) as (_, asked):
        assert same(asked[0].end, alone[0])
    assert joined == []


def test_between_two_prefills_every_answer_goes_on(
    exported: Path, monkeypatch: pytest.MonkeyPatch, alone: list[Answer]
) -> None:
    """So that a newcomer stops those that run for no longer than one prefill."""
    order: list[tuple[str, int]] = []
    read_all = PagedSession._read_all

    def spy(self: PagedSession, parts: Any, logits_to_keep: int) -> Any:
        longest = max(len(part.embeds) for part in parts)
        kind = "prefill" if longest > logits_to_keep else "step"
        order.append((kind, len(parts)))
        return read_all(self, parts, logits_to_keep)

    vlm = VLM(exported, replace(PAGED, kept_sessions=0))  # no prompt is known
    monkeypatch.setattr(PagedSession, "_read_all", spy)
    with answering(vlm, 4) as (_, asked):
        assert all(same(each.end, expected) for each, expected in zip(asked, alone, strict=True))
    at = [place for place, (kind, _) in enumerate(order) if kind == "prefill"]
    assert [order[place] for place in at[-4:]] == [("prefill", 1)] * 4  # those before are the warm-up's
    for running, (before, after) in enumerate(zip(at[-4:], at[-3:], strict=False), 1):
        steps = [count for kind, count in order[before + 1 : after] if kind == "step"]
        assert sum(steps) >= running


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_an_answer_that_is_abandoned_leaves_the_others_as_they_are(
    paged: VLM, alone: list[Answer], monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    joined: list[int] = []
    step_together = stream.step_together
    abandon: list[Callable[[], None]] = []

    def spy(sessions: Any, token_ids: Any) -> Any:
        joined.append(len(sessions))
        if joined.count(3) == 2 and abandon:
            abandon.pop()()
        return step_together(sessions, token_ids)

    monkeypatch.setattr(stream, "step_together", spy)
    with answering(paged, 3) as (worker, asked):
        abandon.append(lambda: worker.abandon(asked[gone].job))
        for number, (each, expected) in enumerate(zip(asked, alone, strict=False)):
            assert isinstance(each.end, AbandonedError) if number == gone else same(each.end, expected)
        wait_until(lambda: not worker.running)
    assert joined.count(3) == 2
    assert not abandon


def test_a_joint_inference_that_fails_is_made_again_one_by_one(
    paged: VLM, alone: list[Answer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed: list[int] = []
    read_all = PagedSession._read_all

    def fail(self: PagedSession, parts: Any, logits_to_keep: int) -> Any:
        if len(parts) == 2:
            failed.append(1)
            raise RuntimeError("what OpenVINO would say")
        return read_all(self, parts, logits_to_keep)

    monkeypatch.setattr(PagedSession, "_read_all", fail)
    with answering(paged, 2) as (_, asked):
        assert all(same(each.end, expected) for each, expected in zip(asked, alone, strict=False))
    assert failed
    assert "unexpected RuntimeError" in caplog.text


def test_every_answer_is_counted_once(paged: VLM) -> None:
    ends: list[Any] = []
    with answering(paged, 4, ends) as (worker, asked):
        answers = [each.end for each in asked]
        wait_until(lambda: not worker.running)
    models = Models([Source("tiny", lambda: paged)], ServeConfig(), lambda *_: None, lambda: None)
    metrics = Metrics(models)
    for job, end in ends:
        metrics.count_answer("tiny", job, end)
    told = metrics.render().decode()
    tokens = sum(answer.generated_tokens for answer in answers if isinstance(answer, Answer))
    assert f'edgevlm_generated_tokens_total{{model="tiny"}} {tokens:.1f}' in told
    assert 'edgevlm_time_to_first_token_seconds_count{model="tiny"} 4.0' in told


def test_a_state_is_never_shared(vlm: VLM, joined: list[int]) -> None:
    """OpenVINO's own state holds one sequence: answers are made one after another, as ever."""
    with answering(vlm, 2) as (_, asked):
        assert not isinstance(asked[0].end, BaseException)
        assert not isinstance(asked[1].end, BaseException)
    assert joined == []


def test_over_http(exported: Path, joined: list[int]) -> None:
    """JSON of a schema and plain text, a stream's pieces and whole answers, two callers' and one model's."""
    from concurrent.futures import ThreadPoolExecutor

    vlm = VLM(exported, PAGED)
    wanted = {"type": "json_schema", "json_schema": {"name": "kind", "schema": KIND}}
    messages = shown(data_url(Image.fromarray(FIRST)))
    fields: list[dict[str, Any]] = [
        {"messages": messages, "max_tokens": LONG},
        {"messages": messages, "max_tokens": LONG, "response_format": wanted},
        {"messages": shown(data_url(Image.fromarray(SECOND))), "max_tokens": LONG, "temperature": 1.0, "seed": 3},
    ]
    with serving(vlm, max_running=1) as server:
        expected = [ask(server, **each)[1]["choices"] for each in fields]
    assert joined == []
    model = Braked(vlm)
    with serving(model, max_running=4) as server, ThreadPoolExecutor() as pool:
        asked = [pool.submit(ask, server, **fields[0])]
        wait_until(lambda: model.holding)
        asked += [pool.submit(ask, server, **each) for each in fields[1:]]
        wait_until(lambda: server.worker.waiting == 2)
        model.release()
        assert [each.result()[1]["choices"] for each in asked] == expected
    assert max(joined) >= 2
