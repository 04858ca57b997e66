"""States that cannot be cut: whatever a session goes back to, it answers as one that read everything anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgevlm.runtime.kv_session
import edgevlm.runtime.kv_snapshots
import edgevlm.runtime.kv_stateful
from edgevlm import VLM, Answer, Constraint, GenerationConfig, ImageBudget
from edgevlm.answer import Piece
from edgevlm.inputs.messages import Message, text_message, user_message
from edgevlm.manifest import load_manifest
from edgevlm.runtime.kv_stateful import StatefulSession
from edgevlm_export import ExportOptions, export
from tests.conftest import F32, photograph
from tests.families.lfm2_vl import make_checkpoint
from tests.helpers.damage import copy_export, edit_manifest, reseal

QUESTION = "What is in this picture?"
NEXT = "And what is left of it? The number 42.7."
REPEATING = "one two three four five six seven. " * 3
SHORT = GenerationConfig(max_new_tokens=16)
WHOLE = ImageBudget("low")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder of convolutions and attention. Tests must not change it."""
    folder = tmp_path_factory.mktemp("lfm2")
    return export(
        make_checkpoint(folder / "saved"), folder / "out", ExportOptions("fp32", via="native", verify=False)
    ).folder


@pytest.fixture(scope="module")
def fresh(exported: Path) -> VLM:
    """A model that knows nothing of what it was asked before."""
    return VLM(exported, replace(F32, image_cache_bytes=0, kept_sessions=0))


@pytest.fixture
def vlm(exported: Path) -> VLM:
    """A model that has not been asked anything yet."""
    return VLM(exported, F32)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """A photograph, in tiles and as a whole."""
    return photograph("china.jpg")


def new_session(vlm: VLM) -> StatefulSession:
    session = vlm.language_model.session()
    assert isinstance(session, StatefulSession)
    return session


def said(
    vlm: VLM, messages: Sequence[Message], images: Sequence[np.ndarray], config: GenerationConfig = SHORT
) -> Answer:
    """Return the answer to a conversation."""
    *_, last = vlm.events(messages, images, config)
    assert isinstance(last, Piece)
    assert last.answer
    return last.answer


def test_the_next_question_on_a_picture_reads_only_the_question(vlm: VLM, fresh: VLM, picture: np.ndarray) -> None:
    first = vlm.generate(picture, QUESTION, SHORT)
    assert first.cached_tokens == 0
    for question in ("How many parts are there?", QUESTION, NEXT):
        answer = vlm.generate(picture, question, SHORT)
        assert answer.image_tokens < answer.cached_tokens < answer.prompt_tokens
        assert answer.token_ids == fresh.generate(picture, question, SHORT).token_ids


def test_a_conversation_goes_on_and_goes_back(vlm: VLM, fresh: VLM, picture: np.ndarray) -> None:
    """A second turn, the same one asked otherwise, an edited answer before it, and the first turn again."""
    asked = user_message(QUESTION, 1)
    first = said(vlm, [asked], [picture])
    for before, question in (
        (first.text, NEXT),
        (first.text, "Describe it."),
        ("A bridge.", NEXT),
        ("A bridge.", "Why?"),
    ):
        messages = [asked, text_message("assistant", before), user_message(question, 0)]
        answer = said(vlm, messages, [picture])
        assert answer.cached_tokens >= first.prompt_tokens
        assert answer.token_ids == said(fresh, messages, [picture]).token_ids
    again = said(vlm, [asked], [picture])
    assert again.token_ids == first.token_ids
    assert again.image_tokens < again.cached_tokens < first.prompt_tokens


def test_what_was_said_last_is_kept_too(vlm: VLM, fresh: VLM) -> None:
    """The second question asked otherwise: the first answer is not read again, for the turn before was kept."""
    session, words = new_session(vlm), list(range(60, 100))
    session.prefill(session.embed(words), 1, words, marks=[len(words)])
    session.step([70, 71, 72])  # the answer
    session.prefill(session.embed(range(80, 90)), 1, [*range(80, 90)], marks=[10])
    assert session.reuse_prefix([*words, 70, 71, 72, *range(90, 99)]) == len(words) + 3
    straight = new_session(fresh)
    straight.step([*words, 70, 71, 72])
    np.testing.assert_allclose(session.step([90, 91]), straight.step([90, 91]), atol=1e-4)


def test_two_pictures_and_their_order(vlm: VLM, fresh: VLM, picture: np.ndarray) -> None:
    flower = photograph("flower.jpg")[:90, :120]
    for images in ([picture, flower], [picture, flower], [flower, picture], [flower]):
        for question in (QUESTION, NEXT):
            answer = vlm.generate(images, question, SHORT, WHOLE)
            assert answer.token_ids == fresh.generate(images, question, SHORT, WHOLE).token_ids


def test_drafts_change_the_speed_only(fresh: VLM) -> None:
    """An answer of few letters repeats itself, and so is drafted, rightly and wrongly."""
    config = GenerationConfig(120, temperature=2.0, seed=3, constraint=Constraint.regex("[ab]{100}"))
    plain = fresh.generate(None, REPEATING, replace(config, draft_tokens=0))
    answer = fresh.generate(None, REPEATING, config)
    assert answer.token_ids == plain.token_ids
    assert plain.drafted_tokens == 0
    assert 0 < answer.accepted_tokens < answer.drafted_tokens


def test_a_draft_taken_back_is_as_one_that_never_was(vlm: VLM) -> None:
    session, straight = new_session(vlm), new_session(vlm)
    session.step(range(60, 90))
    for accepted in (0, 1, 3, 4):
        session.step([70, 71, 72, 73, 74], drafted=4)
        again = session.take_back(4 - accepted)
        assert again == ([] if accepted == 4 else [70, 71, 72, 73, 74][: accepted + 1])
        found = session.step([*again, 80])[-1]
        straight.reset()
        straight.step(session.prefix_keys[:-1])
        np.testing.assert_allclose(found, straight.step([80])[-1], atol=1e-4)


def test_states_too_large_to_copy_take_no_drafts(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgevlm.runtime.kv_stateful, "_MOST_DRAFT_BYTES", 1000)
    config = GenerationConfig(120, constraint=Constraint.regex("[ab]{100}"))
    assert VLM(exported, F32).generate(None, REPEATING, config).drafted_tokens == 0


def test_any_walk_back_and_forth_equals_a_straight_one(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past entries that were masked, and entries that were cut out of the KV cache."""
    monkeypatch.setattr(edgevlm.runtime.kv_stateful, "_MOST_STALE", 40)
    random = np.random.default_rng(3)
    session, straight = new_session(vlm), new_session(vlm)
    reached = set()
    for _ in range(40):
        words = random.integers(50, 250, int(random.integers(2, 20))).tolist()
        if random.integers(3):
            session.prefill(
                session.embed(words), 1, words, marks=sorted(random.integers(0, len(words) + 1, 2).tolist())
            )
        else:
            session.step(words, drafted=len(words) - 1)
        wanted = int(random.integers(0, session.length + 1))
        if random.integers(2):
            session.rewind(wanted)
        else:
            session.reuse_prefix([*session.prefix_keys[:wanted], 7])
        assert session.length <= wanted
        reached.add(session.length)
        straight.reset()
        if session.length:
            straight.step(session.prefix_keys)
        np.testing.assert_allclose(session.step([60, 61]), straight.step([60, 61]), atol=1e-4)
        assert session._mask.sum() == session.length
    assert len(reached) > 8
    assert session._mask.shape[1] < session.length + 200


def test_a_session_keeps_no_more_than_its_bounds(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    session = new_session(vlm)
    snapshots = session._snapshots
    assert snapshots is not None
    for length in range(5, 200, 5):
        session.prefill(session.embed(range(60, 65)), 1, [*range(60, 65)], marks=[5])
        assert session.length == length
        if length > 100:
            assert snapshots.longest(100) == 100
            snapshots.keep(100)  # as if it were used
    assert len(snapshots._kept) == edgevlm.runtime.kv_snapshots.MOST_SNAPSHOTS
    assert snapshots.size_bytes == 2 * 2 * 64 * 4  # two convolutions of two places and 64 channels
    monkeypatch.setattr(edgevlm.runtime.kv_snapshots, "MOST_BYTES", 3 * snapshots.size_bytes)
    session.prefill(session.embed([60]), 1, [60], marks=[1])
    assert len(snapshots._kept) == 3
    session.reset()
    assert snapshots.longest(1000) == 0


def test_a_prefill_stops_only_where_that_costs_little(vlm: VLM) -> None:
    session = new_session(vlm)
    assert session._stops([180, 200, 0, -3, 210], 210) == [180, 200]
    assert session._stops([1000], 2000) == []


def test_probabilities_are_those_of_answers_read_one_by_one(vlm: VLM, fresh: VLM, picture: np.ndarray) -> None:
    choices = ["yes", "no", "yes it is", "yes it was"]
    vlm.generate(picture, NEXT, SHORT)
    scores = vlm.score(picture, QUESTION, choices)
    assert scores.cached_tokens > scores.image_tokens
    for choice in choices:
        [alone] = fresh.score(picture, QUESTION, [choice]).log_likelihoods.values()
        assert scores.log_likelihoods[choice] == pytest.approx(alone, abs=1e-3)


def test_labels_share_the_picture_and_are_judged_as_by_a_fresh_model(vlm: VLM, fresh: VLM, picture: np.ndarray) -> None:
    labels = ["a gauge", "a lamp"]
    scores = vlm.score_labels(picture, "Is there {label}?", labels, cache_salt="labels")
    assert scores.cached_tokens >= scores.image_tokens // 2 > 0
    for label in labels:
        alone = fresh.score(picture, f"Is there {label}?", ["yes", "no"])
        assert scores.log_likelihoods[label] == pytest.approx(dict(alone.log_likelihoods), abs=1e-3)


def test_a_form_is_filled_in_as_by_a_fresh_model(vlm: VLM, fresh: VLM, picture: np.ndarray) -> None:
    """Its fixed parts are read with the prompt and in steps of several tokens."""
    schema = {"properties": {"a": {"enum": ["left", "right"]}}, "required": ["a"], "additionalProperties": False}
    constraint = Constraint.json_schema({"type": "object", **schema})
    config = replace(SHORT, constraint=constraint, max_new_tokens=40)
    for _ in range(2):
        answer = vlm.generate(picture, QUESTION, config)
        assert answer.token_ids == fresh.generate(picture, QUESTION, config).token_ids
    assert answer.fast_forward_tokens > 0
    assert answer.cached_tokens > answer.image_tokens


def test_an_export_of_before_goes_on_or_begins_anew(exported: Path, fresh: VLM, tmp_path: Path, picture: Any) -> None:
    """Its manifest says that its state cannot be cut, and nothing of copies."""
    folder = copy_export(exported, tmp_path / "before")
    edit_manifest(folder, lambda data: data["decoder_traits"].pop("fixed_states"))
    reseal(folder)
    traits = load_manifest(folder).decoder_traits
    assert (traits.rewindable, traits.fixed_states) == (False, False)
    assert load_manifest(exported).decoder_traits.fixed_states
    vlm = VLM(folder, F32)
    for question in (QUESTION, NEXT):
        answer = vlm.generate(picture, question, SHORT)
        assert answer.cached_tokens == answer.drafted_tokens == 0
        assert answer.token_ids == fresh.generate(picture, question, SHORT).token_ids
