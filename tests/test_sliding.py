"""Layers with a sliding window: their cache does not grow, and whatever was cut from it, answers are the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import edgevlm.runtime.kv_sliding
import edgevlm.runtime.kv_stateful
from edgevlm import VLM, Answer, GenerationConfig, ImageBudget
from edgevlm.answer import Piece
from edgevlm.families.base import SLIDING_CACHE_START
from edgevlm.inputs.messages import Message, text_message, user_message
from edgevlm.manifest import LANGUAGE, load_manifest
from edgevlm.runtime.core import import_openvino, read_ir
from edgevlm.runtime.kv_stateful import StatefulSession
from edgevlm_export import ExportOptions, export
from edgevlm_export.output_folder import save_ir
from tests.conftest import F32, photograph
from tests.families import BUILDERS, gemma3
from tests.families.base import Reference
from tests.helpers.damage import copy_export, edit_manifest, reseal

QUESTION, NEXT = "What does the display of unit 12 show?", "And what is left of it? The number 42.7."
HIGH, SHORT = ImageBudget("high"), GenerationConfig(max_new_tokens=16, draft_tokens=8)
REWOUND = 12
"""In place of the runtime's own bound: prompts here are short."""
QUICK = ExportOptions("fp32", via="native", verify=False)


class Case(NamedTuple):
    """One family's reference, export and sliding window."""

    reference: Reference
    vlm: VLM
    window: int

    @property
    def most(self) -> int:
        """Entries that local layers hold at most before a step."""
        return 2 * (self.window + REWOUND)


@pytest.fixture(scope="module", params=["gemma3", "gemma4"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Each family with windows. Tests must not change its folder."""
    folder, builder = tmp_path_factory.mktemp(request.param), BUILDERS[request.param]
    checkpoint = builder.variants["saved"](folder)
    vlm = VLM(export(checkpoint, folder / "out", QUICK).folder, F32)
    window = vlm.manifest.decoder_traits.sliding_window
    assert window is not None
    return Case(builder.reference(checkpoint), vlm, window)


@pytest.fixture
def vlm(case: Case, monkeypatch: pytest.MonkeyPatch) -> VLM:
    """Its export, whose local layers are cut often."""
    monkeypatch.setattr(edgevlm.runtime.kv_sliding, "MOST_REWOUND", REWOUND)
    return case.vlm


@pytest.fixture(scope="module")
def fresh(case: Case) -> VLM:
    """A model that keeps nothing of what it was asked before."""
    return VLM(case.vlm.folder, replace(F32, image_cache_bytes=0, kept_sessions=0))


def new_session(vlm: VLM) -> StatefulSession:
    session = vlm.language_model.session()
    assert isinstance(session, StatefulSession)
    return session


def lengths(session: StatefulSession) -> tuple[set[int], set[int]]:
    """Return how many entries the states of layers with a window hold, and those of the others."""
    sliding, states = session._sliding, session._request.query_state()
    assert sliding is not None
    held = [{state.state.shape[2] for state in states if sliding.holds(state.name) == kind} for kind in (True, False)]
    return held[0], held[1]


def words(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(50, 250, count).tolist()  # type: ignore[no-any-return]


def said(vlm: VLM, messages: list[Message], images: list[np.ndarray]) -> Answer:
    """Return the answer to a conversation."""
    *_, last = vlm.events(messages, images, SHORT, HIGH)
    assert isinstance(last, Piece)
    assert last.answer
    return last.answer


def test_a_long_answer_equals_the_reference_s(case: Case, vlm: VLM) -> None:
    """Token for token past several cuts, about two pictures in a prompt that is longer than the window."""
    images = [photograph("china.jpg"), photograph("flower.jpg")]
    answer = vlm.generate(images, QUESTION, GenerationConfig(max_new_tokens=60), HIGH)
    assert list(answer.token_ids) == case.reference.generate(images, QUESTION, answer.generated_tokens)
    assert answer.prompt_tokens > case.most
    assert answer.generated_tokens > case.most


def test_the_cache_does_not_grow_and_logits_stay_the_reference_s(case: Case, vlm: VLM) -> None:
    session, ids, logits = new_session(vlm), words(300), []
    for start, stop in ((0, 70), *((place, place + 1) for place in range(70, 200)), (200, 240), (240, 300)):
        logits.append(session.step(ids[start:stop]))
        local, others = lengths(session)
        assert max(local) <= case.most + stop - start
        assert others == {stop}
    with torch.inference_mode():
        wanted = case.reference.model(input_ids=torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(np.concatenate(logits), wanted, atol=case.reference.logits_atol)


def test_a_cut_leaves_what_the_next_token_attends_to_and_no_more(
    case: Case, vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else equal logits would show nothing."""
    ids, logits = words(case.most + 20), []
    for rewound in (REWOUND, -1, -2):  # a token is one of its own window
        monkeypatch.setattr(edgevlm.runtime.kv_sliding, "MOST_REWOUND", rewound)
        session = new_session(vlm)
        session.step(ids[:-1])
        logits.append(session.step(ids[-1:]))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)
    assert np.abs(logits[2] - logits[0]).max() > 0.01


def test_a_sequence_goes_back_as_far_as_its_windows_are_held(case: Case, vlm: VLM) -> None:
    length = case.most + 20
    ids, more = words(length), words(5, 1)
    for back in (1, REWOUND, REWOUND + 1, REWOUND + 2, REWOUND + 20):
        session, straight = new_session(vlm), new_session(vlm)
        session.step(ids)
        session.step(more[:1])  # which cuts first
        assert lengths(session)[0] == {case.window + REWOUND + 1}
        wanted = length - back if back <= REWOUND + 1 else 0
        assert session.reusable_length(ids[: length - back]) == wanted
        assert session.reuse_prefix([*ids[: length - back], 7]) == session.length == wanted
        straight.step([*ids[:wanted], *more[:2]])
        session.step(more[:2])
        np.testing.assert_allclose(session.step(more[2:]), straight.step(more[2:]), atol=1e-4)


def test_any_walk_back_and_forth_equals_a_straight_one(case: Case, vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past entries that were masked and those that were removed, with drafts taken back."""
    monkeypatch.setattr(edgevlm.runtime.kv_stateful, "_MOST_STALE", 40)
    random = np.random.default_rng(3)
    session, straight, reached = new_session(vlm), new_session(vlm), set()
    for _ in range(40):
        chunk = random.integers(50, 250, int(random.integers(1, 30))).tolist()
        drafted = int(random.integers(0, len(chunk)))
        session.step(chunk, drafted=drafted)
        assert session.take_back(int(random.integers(0, drafted + 1))) == []
        if not random.integers(3):
            back = int(random.integers(0, 2 * REWOUND)) if random.integers(4) else session.length
            wanted = max(0, session.length - back)
            if random.integers(2):
                session.rewind(wanted)
            else:
                session.reuse_prefix([*session.prefix_keys[:wanted], 7])
            assert session.length in (wanted, 0)
        reached.add(session.length)
        straight.reset()
        if session.length:
            straight.step(session.prefix_keys)
        np.testing.assert_allclose(session.step([60, 61]), straight.step([60, 61]), atol=1e-4)
        assert max(lengths(session)[0]) <= case.most + 30
    assert len(reached) > 20
    assert max(reached) > 5 * case.window


def test_a_chat_of_many_turns_equals_one_that_is_read_anew(vlm: VLM, fresh: VLM) -> None:
    """With a second picture on its way, an earlier turn edited, and the first question asked again."""
    images, messages, cached = [photograph("china.jpg")], [user_message(QUESTION, 1)], []
    for turn in range(6):
        answer = said(vlm, messages, images)
        assert answer.token_ids == said(fresh, messages, images).token_ids
        cached.append(answer.cached_tokens)
        if turn == 2:
            images = [*images, photograph("flower.jpg")]
        messages = [*messages, text_message("assistant", answer.text), user_message(NEXT, int(turn == 2))]
    assert all(cached[1:])
    for edited in ([*messages[:4], user_message("Why?", 0)], messages[:1], [user_message(NEXT, 1)]):
        answer = said(vlm, edited, images[:1])
        assert answer.token_ids == said(fresh, edited, images[:1]).token_ids


def test_choices_are_scored_as_by_a_fresh_model(vlm: VLM, fresh: VLM) -> None:
    choices = ["yes", "no, it is not", "yes it is", "yes it was in the picture"]
    image = photograph("china.jpg")
    vlm.generate(image, NEXT, SHORT)
    scores = vlm.score(image, QUESTION, choices)
    for choice in choices:
        [alone] = fresh.score(image, QUESTION, [choice]).log_likelihoods.values()
        assert scores.log_likelihoods[choice] == pytest.approx(alone, abs=1e-3)


def test_an_export_of_before_keeps_all(vlm: VLM, tmp_path: Path) -> None:
    """Its graph has no such input, and its manifest says nothing of windows."""
    folder = copy_export(vlm.folder, tmp_path / "before")

    def forget(data: dict[str, Any]) -> None:
        for name in ("sliding_window", "sliding_layers"):
            data["decoder_traits"].pop(name)

    file = folder / load_manifest(folder).submodels[LANGUAGE].file
    model = read_ir(vlm.folder / file.name)
    [start] = [each for each in model.get_parameters() if SLIDING_CACHE_START in each.output(0).get_names()]
    start.output(0).replace(import_openvino().opset13.constant([0], np.int64).output(0))
    model.remove_parameter(start)
    save_ir(model, file, "fp32")
    edit_manifest(folder, forget)
    reseal(folder)
    before = VLM(folder, F32)
    ids, session, cut = words(200), new_session(before), new_session(vlm)
    assert SLIDING_CACHE_START not in {each.any_name for each in before.language_model._compiled.inputs}
    for start in range(0, 200, 50):
        np.testing.assert_allclose(session.step(ids[start : start + 50]), cut.step(ids[start : start + 50]), atol=1e-4)
    assert {state.state.shape[2] for state in session._request.query_state()} == {200}


def test_a_decoder_of_local_layers_alone_holds_no_more_than_its_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edgevlm.runtime.kv_sliding, "MOST_REWOUND", REWOUND)
    text = {**gemma3.TEXT, "layer_types": ["sliding_attention"] * 3}
    checkpoint = gemma3.make_checkpoint(tmp_path / "saved", text_config=text)
    vlm, reference = VLM(export(checkpoint, tmp_path / "out", QUICK).folder, F32), gemma3.make_reference(checkpoint)
    answer = vlm.generate(None, QUESTION, GenerationConfig(max_new_tokens=80), HIGH)
    assert list(answer.token_ids) == reference.generate([], QUESTION, answer.generated_tokens)
    session = new_session(vlm)
    for _ in range(10):
        session.step(words(20))
    assert max(lengths(session)[0]) <= 2 * (gemma3.WINDOW + REWOUND) + 20
