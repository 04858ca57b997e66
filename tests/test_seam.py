"""What a family may ask of sessions: positions on several axes, extra inputs, caches that cannot be cut anywhere."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import VLM, Constraint, GenerationConfig
from edgevlm.families import FAMILIES
from edgevlm.families.base import IMAGE_EMBEDS, Array, Arrays, ImageBudget, LanguageInputs
from edgevlm.families.idefics3 import Idefics3
from edgevlm.inputs.chat_template import user_message
from edgevlm.inputs.prompt import Prompt
from edgevlm.manifest import LANGUAGE
from edgevlm.metrics import Stopwatch
from edgevlm.runtime.config import KVCache
from edgevlm.runtime.core import import_openvino, read_ir
from edgevlm.runtime.kv_paged import PagedSession
from edgevlm.runtime.kv_stateful import StatefulSession
from edgevlm_export.output_folder import FILE_NAMES
from tests.conftest import F32, photograph
from tests.helpers.damage import copy_export, edit_manifest, reseal
from tests.helpers.together import together

QUESTION = "What is in this picture?"
NEXT = "And what is left of it? The number 42.7."
SHORT = GenerationConfig(max_new_tokens=16, draft_tokens=8)


class Axial(Idefics3):
    """Idefics3 as Qwen-VL would count it: of a picture's tokens the first axis counts none, the others its places; and
    what a picture's tokens are is told to the decoder by another input, too."""

    def language_inputs(
        self,
        ids: np.ndarray,
        layouts: Sequence[Hashable],
        features: Sequence[Arrays],
    ) -> LanguageInputs:
        shown = ids == self.image_token_id
        steps = np.stack([np.where(shown, 0, 1), np.ones(len(ids), int), np.where(shown, 2, 1)])
        rows = np.concatenate([np.zeros((0, 64), np.float32), *(each[IMAGE_EMBEDS] for each in features)])
        deep = np.zeros((len(ids), 64), np.float32)
        deep[shown] = 0.1 * rows
        return LanguageInputs(np.cumsum(steps, axis=1) - 1, {"deep_embeds": deep})


def axial(exported: Path, folder: Path) -> Path:
    """The tiny export whose decoder takes positions on three axes, of which it looks at one, and an input more."""
    openvino = import_openvino()
    copy_export(exported, folder)
    path = folder / FILE_NAMES[LANGUAGE]
    model = read_ir(path)
    inputs = {each.get_any_name(): each.get_node() for each in model.inputs}
    axes = openvino.op.Parameter(openvino.Type.i64, openvino.PartialShape([3, -1, -1]))
    deep = openvino.op.Parameter(openvino.Type.f32, openvino.PartialShape([-1, -1, 64]))
    for node, name in ((axes, "position_ids"), (deep, "deep_embeds")):
        node.output(0).set_names({name})
        node.set_friendly_name(name)
    opset = openvino.opset13
    readers = inputs["position_ids"].output(0).get_target_inputs()
    for reader in readers:
        reader.replace_source_output(opset.gather(axes, np.int64(1), np.int64(0)).output(0))
    readers = inputs["inputs_embeds"].output(0).get_target_inputs()
    together = opset.add(inputs["inputs_embeds"], deep)
    for reader in readers:
        reader.replace_source_output(together.output(0))
    model.remove_parameter(inputs["position_ids"])
    model.add_parameters([axes, deep])
    model.validate_nodes_and_infer_types()
    openvino.save_model(model, folder / "new.xml", compress_to_fp16=False)
    del model
    for suffix in (".xml", ".bin"):
        (folder / f"new{suffix}").replace(path.with_suffix(suffix))
    edit_manifest(folder, lambda data: data.update(family="axial"))
    return folder


@pytest.fixture(scope="module")
def folder(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return axial(exported, tmp_path_factory.mktemp("axial") / "tiny")


def load(folder: Path, monkeypatch: pytest.MonkeyPatch, traits: Mapping[str, Any], **options: Any) -> VLM:
    """Load the export as of a family whose decoder has these traits."""
    monkeypatch.setitem(FAMILIES, "axial", Axial)
    edit_manifest(folder, lambda data: data.update(decoder_traits={"position_axes": 3, **traits}))
    reseal(folder)
    return VLM(folder, replace(F32, **options))


def prepare(vlm: VLM, question: str, images: Sequence[Array]) -> Prompt:
    return vlm.prepare([user_message(question, len(images))], images, GenerationConfig(), Stopwatch())


def uncached(vlm: VLM, question: str, images: Sequence[Array], count: int) -> list[int]:
    """Greedy tokens, each from a fresh session that reads all that came before, its positions counted here."""
    prompt = prepare(vlm, question, images)
    tokens: list[int] = []
    for _ in range(count):
        after = prompt.inputs.positions.max() + 1 + np.arange(len(tokens))
        positions = np.concatenate([prompt.inputs.positions, np.broadcast_to(after, (3, len(tokens)))], axis=1)
        deep = np.concatenate([prompt.inputs.extras["deep_embeds"], np.zeros((len(tokens), 64), np.float32)])
        session = vlm.language_model.session()
        embeds = [prompt.inputs_embeds, *([session.embed(tokens)] if tokens else [])]
        inputs = LanguageInputs(positions, {"deep_embeds": deep})
        tokens.append(int(session.prefill(np.concatenate(embeds, axis=1), inputs=inputs)[-1].argmax()))
        if tokens[-1] in vlm.manifest.eos_token_ids:
            break
    return tokens


TRAITS: list[dict[str, Any]] = [{}, {"atomic_images": True}, {"rewindable": False}]


@pytest.mark.parametrize(("traits", "kv_cache"), [*((traits, "stateful") for traits in TRAITS), ({}, "paged")], ids=str)
def test_answers_are_those_of_sessions_that_read_all_anew(
    traits: dict[str, Any], kv_cache: KVCache, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after reuse of a prefix, of another picture's beginning, of a whole conversation, and with drafts."""
    vlm = load(folder, monkeypatch, traits, kv_cache=kv_cache)
    assert isinstance(vlm.language_model.session(), PagedSession if kv_cache == "paged" else StatefulSession)
    china = photograph("china.jpg")
    changed = china.copy()
    changed[300:] //= 2
    for image, question in ((china, QUESTION), (china, NEXT), (changed, NEXT), (china, QUESTION)):
        answer = vlm.generate(image, question, SHORT)
        assert list(answer.token_ids) == uncached(vlm, question, [image], 16)
    answer = vlm.generate([china, changed], NEXT, SHORT)
    assert list(answer.token_ids) == uncached(vlm, NEXT, [china, changed], 16)


def test_answers_made_together_are_those_made_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load(folder, monkeypatch, {}, kv_cache="paged")
    china = photograph("china.jpg")
    asked = [([china], QUESTION), ([china, china[:64, :128]], NEXT), ([], NEXT)]
    found = together(vlm.steps([user_message(text, len(images))], images, SHORT) for images, text in asked)
    assert [list(each.token_ids) for each in found] == [uncached(vlm, text, images, 16) for images, text in asked]


def test_positions_and_extra_inputs_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests here would show nothing."""
    vlm = load(folder, monkeypatch, {})
    prompt = prepare(vlm, QUESTION, [photograph("china.jpg")])
    right = vlm.language_model.session().prefill(prompt.inputs_embeds, inputs=prompt.inputs)
    flat = LanguageInputs(np.broadcast_to(np.arange(len(prompt)), (3, len(prompt))), prompt.inputs.extras)
    for other in (None, LanguageInputs(prompt.inputs.positions), flat):
        wrong = vlm.language_model.session().prefill(prompt.inputs_embeds, inputs=other)
        assert np.abs(wrong - right).max() > 0.01 or other is flat  # the axis looked at counts every token here


def test_what_stands_elsewhere_is_not_reused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load(folder, monkeypatch, {})
    prompt = prepare(vlm, QUESTION, [photograph("china.jpg")])
    session = vlm.language_model.session()
    session.prefill(prompt.inputs_embeds, 1, prompt.prefix_keys, prompt.inputs)
    moved = prompt.inputs.positions.copy()
    moved[2, 40:] += 1
    assert session.reuse_prefix(prompt.prefix_keys, replace(prompt.inputs, positions=moved), prompt.images) == 40
    assert session.reuse_prefix(prompt.prefix_keys, prompt.inputs, prompt.images) == 40


def test_a_picture_is_reused_whole_or_not_at_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load(folder, monkeypatch, {"atomic_images": True})
    china = photograph("china.jpg")
    pair = china[:64, :128]  # two tiles and a global view
    changed = pair.copy()
    changed[:, 64:] //= 2
    first, second = (prepare(vlm, QUESTION, [china, each]) for each in (pair, changed))
    session = vlm.language_model.session()
    session.prefill(first.inputs_embeds, 1, first.prefix_keys, first.inputs)
    assert session.reuse_prefix(second.prefix_keys, second.inputs, second.images) == second.images[1].start
    assert second.images[0].stop <= second.images[1].start


def test_a_state_that_cannot_be_cut_goes_on_or_begins_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load(folder, monkeypatch, {"rewindable": False})
    china = photograph("china.jpg")
    first = vlm.generate(china, QUESTION, SHORT)
    assert first.drafted_tokens == 0
    assert vlm.generate(china, QUESTION, SHORT).cached_tokens == 0  # it holds the answer, too
    session = vlm.language_model.session()
    session.step(range(60, 70))
    session.rewind(10)
    assert session.length == 10
    session.rewind(5)
    assert session.length == 0
    longer = prepare(vlm, QUESTION, [china])
    positions, extras = longer.inputs.positions[:, :-3], {"deep_embeds": longer.inputs.extras["deep_embeds"][:-3]}
    session.prefill(longer.inputs_embeds[:, :-3], 1, longer.prefix_keys[:-3], LanguageInputs(positions, extras))
    assert session.reuse_prefix(longer.prefix_keys, longer.inputs, longer.images) == len(longer) - 3


def test_choices_and_forms_of_a_state_that_cannot_be_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = ["yes", "no", "yes it is"]
    scores, answers = [], []
    for traits in ({}, {"rewindable": False}):
        vlm = load(folder, monkeypatch, traits)
        scores.append(vlm.score(photograph("china.jpg"), QUESTION, choices).log_likelihoods)
        constraint = Constraint.json_schema(
            {"type": "object", "properties": {"a": {"enum": ["left", "right"]}}, "required": ["a"]}
        )
        answers.append(vlm.generate(None, QUESTION, replace(SHORT, constraint=constraint, max_new_tokens=40)).text)
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("traits", TRAITS[1:], ids=str)
def test_a_state_that_is_not_causal_attentions_stays_out_of_the_paged_cache(
    traits: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="edgevlm.runtime.loader"):
        vlm = load(folder, monkeypatch, traits, kv_cache="paged")
    assert "no paged attention: the decoder's state is not that of causal attention alone" in caplog.text
    assert isinstance(vlm.language_model.session(), StatefulSession)


def test_one_request_encodes_all_views_of_a_picture(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    compiled = vlm.vision._compiled

    class Counting:
        def create_infer_request(self) -> object:
            made.append(compiled.create_infer_request())
            return made[-1]

    monkeypatch.setattr(vlm.vision, "_compiled", Counting())
    noise = np.random.default_rng(8).integers(0, 256, (427, 640, 3), np.uint8)
    assert vlm.generate(noise, QUESTION, GenerationConfig(1), ImageBudget("high")).views == 13
    assert len(made) == 1
