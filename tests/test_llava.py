"""LLaVA against transformers: views and prompts bit for bit, embeddings, logits and greedy tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import VLM, GenerationConfig
from edgevlm.cli.doctor import cpu_features
from edgevlm.families.base import Detail, ImageBudget
from edgevlm.families.llava import Llava
from edgevlm.inputs.chat_template import user_message
from edgevlm.inputs.prompt import join
from edgevlm.metrics import Stopwatch
from edgevlm_export import ExportOptions, export
from edgevlm_export.samples import pixel_values
from tests.conftest import F32, noise, photograph
from tests.families import llava as tiny
from tests.test_graph import runtime_kinds

QUESTION = "What does the display of unit 12 show? Größe 42.7"
TOKENS = 40
HIGH = GenerationConfig(max_new_tokens=TOKENS)
HIGH_BUDGET = ImageBudget("high")
QUICK = ExportOptions("fp32", via="native", verify=False)

DETAILS: tuple[Detail, ...] = ("auto", "low", "high")
SIZES = [  # height, width
    (1, 1),
    (2, 3),
    (1, 500),
    (500, 1),
    (3, 200),
    (28, 28),
    (28, 56),
    (57, 28),
    (33, 77),
    (101, 99),
    (427, 641),
]


def family(processor: Any) -> Llava:
    """The runtime's family from the facts that the exporter takes from such a processor's file."""
    same = ("resample", "rescale_factor", "image_mean", "image_std")
    return Llava(
        {
            "image_token": "<image>",
            "image_token_id": 4,
            "image_seq_len": 16,
            "preprocessing": {
                "side": processor.size.get("height") or processor.crop_size["height"],
                "shortest_edge": processor.size.get("shortest_edge"),
                "pad": bool(processor.do_pad),
                **{name: getattr(processor, name) for name in same},
            },
        }
    )


PROCESSORS = {
    "CLIP": tiny.clip_processor(),
    "CLIP, bilinear": tiny.clip_processor(resample=2),
    "CLIP, smaller crop": tiny.clip_processor(crop_size={"height": 21, "width": 21}),
    "LLaVA, padded": tiny.clip_processor("Llava", do_pad=True),
    "SigLIP": tiny.siglip_processor(),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_pixel_values_equal_the_reference(name: str, height: int, width: int) -> None:
    processor, image = PROCESSORS[name], noise(height, width)
    wanted = tiny.reference_pixels(image, processor)
    for detail in DETAILS:
        found = pixel_values(family(processor).preprocess(image, ImageBudget(detail)).views)
        assert found.dtype == wanted.dtype == np.float32
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("photo", ["china.jpg", "flower.jpg"])
def test_pixel_values_equal_the_reference_at_the_real_size(photo: str) -> None:
    processor = tiny.clip_processor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    found = family(processor).preprocess(photograph(photo), ImageBudget("high"))
    assert np.array_equal(pixel_values(found.views), tiny.reference_pixels(photograph(photo), processor))


@pytest.mark.parametrize("name", ["CLIP", "LLaVA, padded"])
@pytest.mark.parametrize("shape", [(2, 40_000), (40_000, 2)])
def test_a_picture_too_long_to_be_resized_is_cropped_first(
    name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgevlm.families.llava.MAX_PIXELS", 1_000_000)
    [view] = family(PROCESSORS[name]).preprocess(np.full((*shape, 3), 200, np.uint8), ImageBudget("high")).views
    assert view.pixels.shape == (tiny.SIDE, tiny.SIDE, 3)
    assert name != "CLIP" or (view.pixels == 200).all()


def test_a_crop_while_resizing_is_the_crop_of_what_was_resized(monkeypatch: pytest.MonkeyPatch) -> None:
    made, image = family(PROCESSORS["CLIP"]), photograph("china.jpg")
    [wanted] = made.preprocess(image, ImageBudget("high")).views
    monkeypatch.setattr("edgevlm.families.llava.MAX_PIXELS", 100)
    [found] = made.preprocess(image, ImageBudget("high")).views
    assert np.abs(found.pixels.astype(int) - wanted.pixels).max() <= 1


def interleave(folder: Path) -> Path:
    """A checkpoint in the manner of llava-interleave: SigLIP's last layer, and a Qwen2 decoder with a tied head."""
    return tiny.make_llava(
        folder,
        tiny.siglip_processor(),
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"},
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def padded(folder: Path) -> Path:
    """A checkpoint whose processor pads, without biases in the projector."""
    return tiny.make_llava(folder, tiny.clip_processor("Llava", do_pad=True), multimodal_projector_bias=False)


MAKERS: dict[str, Callable[[Path], Path]] = {"llava": tiny.make_llava, "interleave": interleave, "padded": padded}
LAYOUTS: dict[str, Callable[[Path, Path], Path]] = {"old": tiny.in_old_layout, "held": tiny.as_held}
CASES = ["llava", "llava, old", "llava, held", "interleave", "interleave, old", "padded"]


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[tiny.Reference, VLM]:
    """The reference on a checkpoint in one layout, and its export."""
    name, _, layout = request.param.partition(", ")
    folder = tmp_path_factory.mktemp(name)
    checkpoint = MAKERS[name](folder / "checkpoint")
    if layout:
        checkpoint = LAYOUTS[layout](checkpoint, folder / layout)
    report = export(checkpoint, folder / "out", QUICK)
    assert report.manifest.overlooked == {}
    return tiny.Reference(checkpoint), VLM(folder / "out", F32)


def pictures(case: str) -> list[np.ndarray]:
    china, flower = photograph("china.jpg"), photograph("flower.jpg")
    return {"one": [china], "two": [china, flower[:, :150]], "none": []}[case]


@pytest.mark.parametrize("case", ["one", "two", "none"])
def test_prompts_pictures_logits_and_tokens_equal_the_reference(pair: tuple[tiny.Reference, VLM], case: str) -> None:
    check_parity(*pair, pictures(case))


def check_parity(reference: tiny.Reference, vlm: VLM, images: list[np.ndarray]) -> None:
    """Compare all that the reference makes of one question about the pictures."""
    inputs = reference.inputs(images, QUESTION)
    prompt = vlm.prepare([user_message(QUESTION, len(images))], images, HIGH, Stopwatch(), HIGH_BUDGET)
    assert prompt.ids == inputs["input_ids"][0].tolist()
    visuals = vlm.processor.preprocess(images, HIGH_BUDGET)
    logits, features = reference.run(images, QUESTION)
    if images:
        found, wanted = pixel_values([view for each in visuals for view in each.views]), inputs["pixel_values"].numpy()
        assert np.array_equal(found, wanted.reshape(found.shape))
    places = np.asarray(prompt.ids) == vlm.processor.family.image_token_id
    image_embeds = join(features, vlm.manifest.hidden_size)
    np.testing.assert_allclose(prompt.inputs_embeds[0, places], image_embeds, atol=1e-4)
    assert np.ptp(logits) > 5  # logits flat enough to agree by accident would prove nothing
    found = vlm.language_model.session().prefill(prompt.inputs_embeds, logits_to_keep=len(prompt))
    np.testing.assert_allclose(found, logits, atol=1e-4)
    check_tokens(vlm, images, reference.generate(images, QUESTION, TOKENS))


def check_tokens(vlm: VLM, images: list[np.ndarray], wanted: list[int]) -> None:
    """Compare greedy tokens, up to the end of the answer."""
    answered = list(vlm.generate(images, QUESTION, HIGH, HIGH_BUDGET).token_ids)
    assert answered == wanted[: len(answered)]
    assert len(answered) >= 32 or answered[-1] in vlm.manifest.eos_token_ids


def test_a_second_question_reads_no_picture_anew(pair: tuple[tiny.Reference, VLM]) -> None:
    check_chat(pair[1])


def check_chat(vlm: VLM) -> None:
    """Ask twice about one picture; the answers are those of a model that has seen nothing before."""
    config = GenerationConfig(max_new_tokens=12)
    budget = ImageBudget("high")
    chat, wanted = vlm.chat(config, image_budget=budget), VLM(vlm.folder, F32).chat(config, image_budget=budget)
    first = chat.ask(QUESTION, photograph("china.jpg"))
    second = chat.ask("And the number?")
    assert wanted.ask(QUESTION, photograph("china.jpg")).token_ids == first.token_ids
    wanted._vlm = VLM(vlm.folder, F32)
    assert wanted.ask("And the number?").token_ids == second.token_ids
    assert second.cached_tokens >= first.prompt_tokens - 1
    assert second.cached_views == second.views == first.views


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA checkpoint."""
    return tiny.make_llava(tmp_path_factory.mktemp("llava") / "checkpoint")


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_compressed_exports_answer(precision: Any, checkpoint: Path, tmp_path: Path) -> None:
    report = export(checkpoint, tmp_path / "out", ExportOptions(precision, via="native"))
    assert report.verification is not None
    assert report.verification.parts["vision_embeddings"].cosine > least_w8a8_cosine()
    check_fused(VLM(report.folder, F32), layers=2, quantized=True)
    assert VLM(report.folder, F32).generate(photograph("china.jpg"), QUESTION, HIGH, HIGH_BUDGET).text


def least_w8a8_cosine() -> float:
    """Without VNNI a CPU adds products of quantized activations in 16 bits, where they saturate."""
    return 0.99 if {"avx512_vnni", "avx_vnni"} & set(cpu_features()) else 0.97


def check_fused(vlm: VLM, layers: int, quantized: bool = False) -> None:
    """The vision part: four products a layer and two of the projector; attention in one node each.

    A CPU without AVX-512 takes attention of quantized activations apart.
    """
    paged = VLM(vlm.folder, replace(F32, kv_cache="paged"))
    vision, language = runtime_kinds(vlm.vision._compiled), runtime_kinds(paged.language_model._compiled)
    assert vision["FullyConnected"] == layers * 4 + 2
    if not quantized or "avx512f" in cpu_features():
        assert vision["Softmax"] == vision["MatMul"] == 0
    assert language["FullyConnected"] == 2 * 4 + 1
    assert language["PagedAttention"] == 2
    assert language["RMS"] == 2 * 2 + 1
    assert language["RoPE"] == 2 * 2


def test_the_graphs_run_fused(pair: tuple[tiny.Reference, VLM]) -> None:
    reference, vlm = pair
    config = reference.model.config
    has_class_token = config.vision_config.model_type == "clip_vision_model"
    layers = 3 + 1 + config.vision_feature_layer
    check_fused(vlm, layers)
    assert runtime_kinds(vlm.vision._compiled)["MVN"] == 2 * layers + int(has_class_token)
