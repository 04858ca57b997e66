"""Gemma 3 against transformers: views, masks, windows, embeddings' scale, names of weights, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
)
from transformers.models.gemma3 import modeling_gemma3

from edgevlm import VLM, GenerationConfig, ImageBudget
from edgevlm.errors import SourceError
from edgevlm.families import make_family
from edgevlm.families.base import IMAGE_GROUPS, DecoderTraits
from edgevlm.inputs.chat_template import user_message
from edgevlm.metrics import Stopwatch
from edgevlm.runtime.core import core, import_openvino
from edgevlm_export import ExportOptions, export
from edgevlm_export.families import architecture, family_config
from edgevlm_export.families import gemma3 as exporter
from edgevlm_export.graphs.attention import bias_name, causal_biases
from edgevlm_export.graphs.rope import make_rope
from edgevlm_export.samples import pixel_values
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import overlooked
from edgevlm_export.source.safetensors_reader import RawTensor
from tests.conftest import F32, noise, photograph
from tests.families import gemma3 as tiny
from tests.families.llava import old_name
from tests.helpers.graphs import runtime_kinds
from tests.helpers.json_files import read_json, write_json
from tests.helpers.published import published_folder

QUESTION, NEXT = "What does the display of unit 12 show?", "And what is left of it? The number 42.7."
QUICK = ExportOptions("fp32", via="native", verify=False)
SHORT, HIGH = GenerationConfig(max_new_tokens=16, draft_tokens=8), ImageBudget("high")
CROPS = {"min_crop_size": 40, "max_num_crops": 4, "min_ratio_to_activate": 1.2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint. Tests must not change it."""
    return tiny.make_checkpoint(tmp_path_factory.mktemp("gemma3") / "saved")


@pytest.fixture(scope="module")
def vlm(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    """Its export, without compression."""
    return VLM(export(saved, tmp_path_factory.mktemp("exported") / "out", QUICK).folder, F32)


def facts(crops: dict[str, Any] | None) -> dict[str, Any]:
    """The facts that the exporter takes from the tiny checkpoint, with pan-and-scan or without."""
    pixels = {"resample": 2, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    preprocessing = {"side": tiny.SIDE, "pan_and_scan": crops, **pixels}
    return {**tiny.NAMED, "image_token_id": 7, "image_seq_len": tiny.IMAGE_SEQ_LEN, "preprocessing": preprocessing}


SIZES = [(1, 1), (2, 3), (1, 500), (500, 1), (32, 32), (79, 80), (100, 119), (100, 120), (100, 250), (330, 70)]
SIZES += [(90, 900)]


@pytest.mark.parametrize("crops", [None, CROPS], ids=["whole", "pan-and-scan"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_views_and_their_text_equal_the_reference(crops: dict[str, Any] | None, height: int, width: int) -> None:
    asked = {"do_pan_and_scan": bool(crops), **{f"pan_and_scan_{name}": each for name, each in (crops or {}).items()}}
    processor, image = tiny.image_processor(), noise(height, width)
    visual = make_family("gemma3", facts(crops)).preprocess(image, HIGH)
    assert np.array_equal(pixel_values(visual.views), tiny.reference_pixels(image, processor, **asked))
    block = tiny.reference_processor(tiny.tokenizer(), processor, Gemma3Config(mm_tokens_per_image=tiny.IMAGE_SEQ_LEN))
    wanted = block.replace_image_token({"num_crops": [len(visual) - 1]}, 0)
    assert make_family("gemma3", facts(crops)).image_text(visual.layout) == wanted


def test_a_budget_lowers_the_number_of_crops() -> None:
    family, image = make_family("gemma3", facts(CROPS)), noise(90, 900)
    views = [len(family.preprocess(image, ImageBudget("high", max_views=most))) for most in range(1, 7)]
    assert views == [1, 1, 3, 4, 5, 5]  # one crop would be the whole picture again
    assert len(family.preprocess(image, ImageBudget("low"))) == 1


def test_an_export_of_pan_and_scan_is_what_the_checkpoint_s_file_asks_for(saved: Path, tmp_path: Path) -> None:
    """Each crop is a view of its own to the decoder, too."""
    checkpoint = Path(shutil.copytree(saved, tmp_path / "checkpoint"))
    stated = read_json(checkpoint / "processor_config.json")
    asked = {"do_pan_and_scan": True, **{f"pan_and_scan_{name}": each for name, each in CROPS.items()}}
    write_json(checkpoint / "processor_config.json", {**stated, "image_processor": stated["image_processor"] | asked})
    cropping, image = VLM(export(checkpoint, tmp_path / "out", QUICK).folder, F32), photograph("china.jpg")[:200]
    reference = tiny.make_reference(saved)
    text = reference.processor.tokenizer.apply_chat_template(
        [user_message(QUESTION, 1)], chat_template=tiny.TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    inputs = reference.processor(
        text=[text], images=[[image]], add_special_tokens=False, return_tensors="pt", images_kwargs=asked
    )
    prompt = cropping.prepare([user_message(QUESTION, 1)], [image], SHORT, Stopwatch(), HIGH)
    assert prompt.ids == inputs["input_ids"][0].tolist()
    assert prompt.views == 4
    with torch.inference_mode():
        wanted = reference.model(**inputs).logits[0].numpy()
    found = cropping.language_model.session().prefill(prompt.inputs_embeds, len(prompt), inputs=prompt.inputs)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_the_graphs_run_fused(vlm: VLM) -> None:
    """Attention is one node each, with its cache in the decoder, although masks and rotations differ by layer."""
    layers, language = 3, runtime_kinds(vlm.language_model._compiled)
    assert language["ScaledDotProductAttention"] == layers
    assert language["MemoryInput"] == language["MemoryOutput"] == 2 * layers
    assert language["FullyConnected"] == 4 * layers + 1
    assert language["RMS"] == 6 * layers + 1
    assert language["RoPE"] == 2 * layers
    vision = runtime_kinds(vlm.vision._compiled)
    assert vision["FullyConnected"] == 2 * 4 + 1
    assert vision["Softmax"] == vision["MatMul"] == 0


def masks(window: int, groups: np.ndarray, mask: np.ndarray, new: int) -> list[np.ndarray]:
    """Return which keys the last `new` tokens attend to `(B, S, T)`, without a window and with one."""
    openvino = import_openvino()
    opset = openvino.opset13
    given = {
        "embeds": opset.parameter([-1, -1, 4], np.float32),
        "mask": opset.parameter([-1, -1], np.int64),
        "groups": opset.parameter([-1, -1], np.int64),
    }
    biases = causal_biases(given["embeds"], given["mask"], (None, window), given["groups"])
    model = openvino.Model([biases[bias_name(each)] for each in (None, window)], list(given.values()))
    embeds = np.zeros((len(mask), new, 4), np.float32)
    outputs = core().compile_model(model, "CPU")([embeds, mask, groups[:, -new:]])
    return [np.array(outputs[index][:, 0]) == 0 for index in range(2)]


def test_masks_equal_the_reference() -> None:
    """Of texts with two pictures each, one of which is padded on the left."""
    types = np.zeros((2, 40), np.int64)
    types[0, 3:17] = types[0, 20:34] = types[1, 9:23] = types[1, 25:39] = 1
    padding = np.ones((2, 40), np.int64)
    padding[1, :7] = 0
    config = Gemma3TextConfig(sliding_window=6)
    config._attn_implementation = "eager"
    blocks = modeling_gemma3.get_block_sequence_ids_for_mask(torch.from_numpy(types))
    reference = modeling_gemma3.create_masks_for_vision_model(
        config,
        torch.zeros(2, 40, 4),
        torch.from_numpy(padding),
        None,
        torch.arange(40)[None],
        blocks,
    )
    real = padding[:, :, None].astype(bool)  # what padding attends to is of no consequence
    found_masks = masks(6, blocks.numpy() + 1, padding, 40)
    for found, kind in zip(found_masks, ("full_attention", "sliding_attention"), strict=True):
        wanted = reference[kind][:, 0].numpy() == 0
        assert np.array_equal(found & real, wanted & real)
        assert found[0, 3, 16]
        assert found[0, 16, 3] == (kind == "full_attention")


def test_cached_tokens_are_of_no_group_and_masked_ones_of_no_window() -> None:
    mask = np.ones((1, 12), np.int64)
    mask[0, 4:8] = 0  # taken back
    groups = np.array([[1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1]])
    whole, local = masks(3, groups, mask, 3)
    assert np.flatnonzero(whole[0, 0]).tolist() == [0, 1, 2, 3, 8, 9]
    assert np.flatnonzero(whole[0, 1]).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert np.flatnonzero(local[0, 0]).tolist() == [3, 8, 9]
    assert np.flatnonzero(local[0, 1]).tolist() == [8, 9, 10, 11]


def test_what_was_taken_back_leaves_no_trace(vlm: VLM) -> None:
    """A window counts the tokens of the sequence and not the entries of the cache."""
    ids = vlm.processor.tokenizer.encode(QUESTION + NEXT)
    assert len(ids) > 3 * tiny.WINDOW
    session, fresh = vlm.language_model.session(), vlm.language_model.session()
    session.step(ids[:20])
    session.step(ids[5:13])
    session.rewind(20)
    np.testing.assert_allclose(session.step(ids[20:]), fresh.step(ids)[20:], atol=1e-4)


def uncached(vlm: VLM, question: str, images: list[np.ndarray]) -> list[int]:
    """Greedy tokens of a session that has seen nothing before."""
    prompt = vlm.prepare([user_message(question, len(images))], images, SHORT, Stopwatch(), HIGH)
    session, tokens = vlm.language_model.session(), []
    logits = session.prefill(prompt.inputs_embeds, inputs=prompt.inputs)
    while len(tokens) < 16 and not {*tokens[-1:]} & {*vlm.manifest.eos_token_ids}:
        tokens.append(int(logits[-1].argmax()))
        logits = session.step(tokens[-1:])
    return tokens


def test_answers_after_reuse_are_those_of_sessions_that_read_all_anew(vlm: VLM) -> None:
    """Pictures are reused whole; another one in the same place, a longer and a shorter prompt, drafts taken back."""
    assert vlm.manifest.decoder_traits == DecoderTraits(
        atomic_images=True, sliding_window=tiny.WINDOW, sliding_layers=(0, 1)
    )
    china, flower = photograph("china.jpg"), photograph("flower.jpg")
    cached = []
    for images, question in (
        ([china, flower], QUESTION),
        ([china, flower], NEXT),
        ([china], NEXT),
        ([flower, china], NEXT),
        ([china], QUESTION),
        ([], NEXT),
    ):
        answer = vlm.generate(images, question, SHORT, HIGH)
        assert list(answer.token_ids) == uncached(vlm, question, images)
        prompt = vlm.prepare([user_message(question, len(images))], images, SHORT, Stopwatch(), HIGH)
        assert all(not place.start < answer.cached_tokens < place.stop for place in prompt.images)
        cached.append(answer.cached_tokens)
    assert cached[1] > 2 * tiny.IMAGE_SEQ_LEN


def test_image_tokens_that_did_not_see_each_other_would_answer_otherwise(vlm: VLM) -> None:
    """Else the tests here would show nothing."""
    image = photograph("china.jpg")
    prompt = vlm.prepare([user_message(QUESTION, 1)], [image], SHORT, Stopwatch(), HIGH)
    groups = prompt.inputs.extras[IMAGE_GROUPS]
    assert np.array_equal(groups > 0, np.asarray(prompt.ids) == vlm.processor.family.image_token_id)
    right = vlm.language_model.session().prefill(prompt.inputs_embeds, inputs=prompt.inputs)
    wrong = vlm.language_model.session().prefill(prompt.inputs_embeds)
    assert np.abs(right - wrong).max() > 0.1


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "bf16"), (torch.float16, "f16"), (torch.float32, "f32")])
def test_a_number_is_rounded_as_torch_rounds_it(dtype: torch.dtype, kind: str) -> None:
    stored = {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}[kind]
    for size in (2560, 3840, 5376, 96, 2304, 3072, 1152):
        found = RawTensor(np.zeros(1, stored), kind).rounded(size**0.5)
        assert found == torch.tensor(size**0.5).to(dtype).float().item()
    assert RawTensor(np.zeros(1, np.uint16), "bf16").rounded(2560**0.5) == 50.5


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_bfloat16_weights_have_the_scale_that_they_were_trained_with(precision: Any, tmp_path: Path) -> None:
    checkpoint = tiny.make_checkpoint(tmp_path / "checkpoint", bfloat16=True)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    table = model.get_input_embeddings()
    assert table.weight.dtype == torch.bfloat16
    wanted = table.weight.float() * table.embed_scale.to(torch.bfloat16).float()
    assert torch.equal(wanted.to(torch.bfloat16), table(torch.arange(len(wanted))))
    options = ExportOptions(precision, via="native", verify=precision == "fp32")
    exported = VLM(export(checkpoint, tmp_path / "out", options).folder, F32)
    found = exported.language_model.embed(np.arange(len(wanted)))[0]
    np.testing.assert_allclose(found, wanted.detach(), rtol=1e-6, atol=0 if precision == "fp32" else 0.1)


PUBLISHED = "google__gemma-3-4b-it"
FACTS: dict[str, Any] = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
LATER = {  # what later files of the same checkpoint state beside it
    "_sliding_window_pattern": 6,
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "layer_types": ["full_attention" if index % 6 == 5 else "sliding_attention" for index in range(34)],
    "max_position_embeddings": 131072,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "use_cache": True,
    "vocab_size": 262208,
}


def write_published(folder: Path, text: dict[str, Any], **changes: Any) -> Checkpoint:
    """Write the published files, weights excepted: the real ones where they are at hand, else their facts."""
    real = published_folder(PUBLISHED)
    config = read_json(real / "config.json") if real else FACTS
    config = {**config, "text_config": {**config["text_config"], **text}, **changes}
    write_json(folder / "config.json", config)
    settings = tiny.image_processor(size={"height": 896, "width": 896}).to_dict()
    write_json(folder / "preprocessor_config.json", {**settings, "image_seq_length": 256, "do_convert_rgb": None})
    write_json(folder / "processor_config.json", {"image_seq_length": 256, "processor_class": "Gemma3Processor"})
    return Checkpoint(folder, PUBLISHED, None, config)


@pytest.mark.parametrize("layout", ["held", "old"])
@pytest.mark.parametrize("text", [{}, LATER], ids=["first", "later"])
def test_tensors_and_their_shapes_are_those_of_transformers(text: dict[str, Any], layout: str, tmp_path: Path) -> None:
    checkpoint = write_published(tmp_path, text)
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    rename = {"held": lambda name: name, "old": old_name}[layout]
    wanted = {rename(name): tuple(weight.shape) for name, weight in model.state_dict().items()}
    wanted.pop(rename("lm_head.weight"))
    found_facts, preprocessor = family_config(checkpoint)
    found = architecture(checkpoint, found_facts, wanted)
    assert dict(found.shapes) == wanted
    assert overlooked([*found.sections, preprocessor]) == {}
    decoder = found.decoder
    assert decoder.embed_tokens.scale == 2560**0.5
    mixers: list[Any] = [layer.mixer for layer in decoder.layers]
    assert [mixer.window for mixer in mixers] == [None if index % 6 == 5 else 1024 for index in range(34)]
    assert {mixer.scale for mixer in mixers} == {1 / 16}
    for index, base, factor in ((0, 10000.0, 1.0), (5, 1000000.0, 8.0)):
        scaling = {"rope_type": "linear", "factor": factor}
        assert np.array_equal(mixers[index].rope.frequencies, make_rope(256, base, scaling, 1).frequencies)
    family = make_family("gemma3", found_facts)
    for size in ((1200, 1600), (9, 9)):
        visual = family.preprocess(noise(*size), ImageBudget("high"))
        assert family.image_text(visual.layout).count("<image_soft_token>") == 256


def test_what_files_are_silent_about_is_what_the_classes_have() -> None:
    config, processor = Gemma3Config(), Gemma3ImageProcessorPil()
    assert {name: getattr(config, name) for name in exporter._DEFAULTS} == exporter._DEFAULTS
    found = {name: Gemma3Processor.images_kwargs.get(name) for name in exporter._PREPROCESSOR_DEFAULTS}
    found |= {name: getattr(processor, name) for name, value in found.items() if value is None}
    lists = {name: list(found[name]) for name in ("image_mean", "image_std")}
    assert {**found, **lists, "size": dict(found["size"])} == exporter._PREPROCESSOR_DEFAULTS


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a softcap of logits": ({"final_logit_softcapping": 30.0}, {}, "does not know text_config.final_logit_softcapping"),
    "a softcap of scores": ({"attn_logit_softcapping": 50.0}, {}, "does not know text_config.attn_logit_softcapping"),
    "text read both ways": ({"use_bidirectional_attention": True}, {}, "use_bidirectional_attention"),
    "too few types of layers": (
        {"layer_types": ["full_attention"]},
        {},
        "layer_types must name the types of 34 layers, sliding_attention or full_attention",
    ),
    "a type of layers": ({"layer_types": ["chunked_attention"] * 34}, {}, "layers of type chunked_attention"),
    "one rotation for all": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {},
        "does not build text_config.rope_parameters.rope_type",
    ),
    "a rotation of another kind": (
        {"rope_scaling": {"rope_type": "longrope", "factor": 8.0}},
        {},
        "does not build RoPE of type longrope",
    ),
    "image tokens of no square": ({}, {"mm_tokens_per_image": 200}, "mm_tokens_per_image 200 are no square"),
    "image tokens that no patches make": ({}, {"mm_tokens_per_image": 225}, "mm_tokens_per_image 225 are no square"),
    "other image tokens": ({}, {"mm_tokens_per_image": 1024}, "says 256 image tokens a view, config.json 1024"),
    "views of another size": (
        {},
        {"vision_config": {**FACTS["vision_config"], "image_size": 448}},
        "makes views of 896 x 896 pixels, vision_config.image_size is 448",
    ),
    "a relative without pictures": ({}, {"model_type": "gemma3_text"}, "family 'gemma3_text' (a Gemma 3 that takes no"),
    "another relative": ({}, {"model_type": "gemma3n"}, "is of family 'gemma3n' (Gemma 3n, whose encoders"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_built_or_does_not_fit_together_is_refused(case: str, tmp_path: Path) -> None:
    text, changes, line = REFUSED[case]
    checkpoint = write_published(tmp_path, text, **changes)
    with pytest.raises(SourceError, match=re.escape(line)):
        found, preprocessor = family_config(checkpoint)
        overlooked([*architecture(checkpoint, found, ()).sections, preprocessor])


def test_a_token_of_another_id_is_refused(saved: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(saved, tmp_path / "checkpoint"))
    config = read_json(checkpoint / "config.json")
    write_json(checkpoint / "config.json", {**config, "boi_token_index": 3})
    with pytest.raises(SourceError, match=r"<start_of_image> is 5, boi_token_index of config\.json 3$"):
        export(checkpoint, tmp_path / "out", QUICK)
