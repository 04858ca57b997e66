"""Every family's uncompressed export against transformers on the same checkpoint: equal to the token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import VLM, GenerationConfig, ImageBudget
from edgevlm.families import FAMILIES
from edgevlm.families.base import PIXEL_VALUES
from edgevlm.inputs.chat_template import user_message
from edgevlm.metrics import Stopwatch
from edgevlm_export import ExportOptions, export
from tests.conftest import F32, noise, photograph
from tests.families import BUILDERS
from tests.families.base import Reference

QUESTION = "What does the display of unit 12 show? Größe 42.7"
TOKENS = 40
CONFIG, HIGH = GenerationConfig(max_new_tokens=TOKENS), ImageBudget("high")
VARIANTS = [(name, variant) for name, builder in BUILDERS.items() for variant in builder.variants]


def test_every_family_is_in_the_suite() -> None:
    assert BUILDERS.keys() == FAMILIES.keys()


def pictures(case: str, strip: int) -> list[np.ndarray]:
    china, flower = photograph("china.jpg"), photograph("flower.jpg")
    return {
        "one": [china],
        "two": [china[:90], flower[:, :200]],
        "odd": [china[:strip], flower[::40, ::40]],
        "none": [],
    }[case]


@pytest.fixture(scope="module", params=VARIANTS, ids="-".join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, VLM]:
    """The reference and the float32 export of one checkpoint, of which nothing may be passed over."""
    name, variant = request.param
    folder = tmp_path_factory.mktemp(f"{name}-{variant}")
    checkpoint = BUILDERS[name].variants[variant](folder)
    report = export(checkpoint, folder / "out", ExportOptions("fp32", via="native", verify=False))
    assert report.manifest.overlooked == {}
    return BUILDERS[name].reference(checkpoint), VLM(folder / "out", F32)


@pytest.mark.parametrize("case", ["one", "two", "odd", "none"])
def test_an_answer_equals_the_reference_s(pair: tuple[Reference, VLM], case: str) -> None:
    check_parity(*pair, pictures(case, pair[0].strip))


def check_parity(reference: Reference, vlm: VLM, images: list[np.ndarray]) -> None:
    """Compare all that is made of one question about the pictures."""
    inputs = reference.inputs(images, QUESTION)
    prompt = vlm.prepare([user_message(QUESTION, len(images))], images, CONFIG, Stopwatch(), HIGH)
    assert prompt.ids == inputs["input_ids"][0].tolist()
    assert np.array_equal(prompt.inputs.positions, reference.positions(inputs))
    if images:
        views = [view for visual in vlm.processor.preprocess(images, HIGH) for view in visual.views]
        found = np.concatenate([view.inputs()[PIXEL_VALUES].ravel() for view in views])  # views may differ in size
        assert np.array_equal(found, reference.pixels(inputs))
    logits, image_embeds = reference.run(images, QUESTION)
    places = np.asarray(prompt.ids) == vlm.processor.family.image_token_id
    assert not images or np.ptp(image_embeds) > 1
    np.testing.assert_allclose(prompt.inputs_embeds[0, places], image_embeds, atol=1e-4)
    assert np.ptp(logits) > 5  # logits flat enough to agree by accident would prove nothing
    found = vlm.language_model.session().prefill(prompt.inputs_embeds, len(prompt), inputs=prompt.inputs)
    np.testing.assert_allclose(found, logits, atol=reference.logits_atol)
    check_tokens(vlm, images, reference.generate(images, QUESTION, TOKENS))


def check_tokens(vlm: VLM, images: list[np.ndarray], wanted: list[int]) -> None:
    """Compare greedy tokens, at least 32 or up to the end of the answer, and the text that they make."""
    answer = vlm.generate(images, QUESTION, CONFIG, HIGH)
    ids = list(answer.token_ids)
    assert ids == wanted[: len(ids)]
    assert len(ids) >= 32 or ids[-1] in vlm.manifest.eos_token_ids
    assert answer.text == vlm.processor.tokenizer.decode(ids)


def test_a_second_question_reuses_the_first_s_prefix(pair: tuple[Reference, VLM]) -> None:
    """Its answer is that of a model that has seen nothing before."""
    vlm, config = pair[1], GenerationConfig(max_new_tokens=12)
    chat, wanted = vlm.chat(config, image_budget=HIGH), VLM(vlm.folder, F32).chat(config, image_budget=HIGH)
    first = chat.ask(QUESTION, photograph("china.jpg"))
    second = chat.ask("And the number?")
    assert wanted.ask(QUESTION, photograph("china.jpg")).token_ids == first.token_ids
    wanted._vlm = VLM(vlm.folder, F32)
    assert wanted.ask("And the number?").token_ids == second.token_ids
    if vlm.manifest.decoder_traits.rewindable:  # else only where the answer's text makes the tokens that it was
        assert second.cached_tokens >= first.prompt_tokens - 1
    assert second.cached_views == second.views == first.views
    assert second.image_tokens == first.image_tokens


SHAPES = [(name, shape) for name, builder in BUILDERS.items() for shape in builder.shapes]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that gives a family's first variant with its reference, made once."""
    made: dict[str, tuple[Path, Reference, VLM]] = {}

    def pair_of(name: str) -> tuple[Path, Reference, VLM]:
        if name not in made:
            folder, builder = tmp_path_factory.mktemp(f"first-{name}"), BUILDERS[name]
            checkpoint = next(iter(builder.variants.values()))(folder)
            exported = export(checkpoint, folder / "out", ExportOptions("fp32", via="native", verify=False)).folder
            made[name] = checkpoint, builder.reference(checkpoint), VLM(exported, F32)
        return made[name]

    return pair_of


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_every_shape_of_picture_equals_the_reference(name: str, shape: tuple[int, int], pairs: Any) -> None:
    _, reference, vlm = pairs(name)
    check_parity(reference, vlm, [noise(*shape)])


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", BUILDERS)
def test_a_compressed_export_answers(name: str, precision: Any, pairs: Any, tmp_path: Path) -> None:
    """With as many tokens as are asked for, from image embeddings near the reference's."""
    checkpoint, _, whole = pairs(name)
    report = export(checkpoint, tmp_path / "out", ExportOptions(precision, via="native"))
    assert report.verification is not None
    assert report.verification.parts["vision_embeddings"].cosine > BUILDERS[name].int8_cosine
    assert report.manifest.size_bytes < whole.manifest.size_bytes
    answer = VLM(report.folder, F32).generate(photograph("china.jpg"), QUESTION, CONFIG, HIGH)
    assert answer.image_tokens == whole.generate(photograph("china.jpg"), QUESTION, CONFIG, HIGH).image_tokens
    assert answer.generated_tokens == TOKENS or answer.finish_reason == "stop"
