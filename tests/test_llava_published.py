"""LLaVA's and LLaVA-OneVision's published configurations, and what is refused of a checkpoint.

The real files are taken from the folder that `EDGEVLM_PUBLISHED_CONFIGS` names (`tests/published.py`), else made up
from the facts here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaOnevisionProcessor

from edgevlm.errors import SourceError
from edgevlm.families import make_family
from edgevlm.families.base import IMAGE_EMBEDS, ImageBudget
from edgevlm.inputs.prompt import feature_keys
from edgevlm.inputs.vision_cache import EncodedImage
from edgevlm_export import ExportOptions, export
from edgevlm_export.families import architecture, family_config
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import overlooked
from tests.conftest import noise
from tests.families import llava, llava_onevision

_FOLDER = os.environ.get("EDGEVLM_PUBLISHED_CONFIGS")
_GRIDS = [[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)]
_DONE = {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True}
LLAVA = "llava-hf__llava-1.5-7b-hf"
ONEVISION = "llava-hf__llava-onevision-qwen2-0.5b-ov-hf"
INTERLEAVE = "llava-hf__llava-interleave-qwen-0.5b-hf"
_SIGLIP = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "patch_size": 14,
    "vision_use_head": False,
}
_QWEN = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 152000,
}
FILES: dict[str, dict[str, dict[str, Any]]] = {
    LLAVA: {
        "config.json": {
            "architectures": ["LlavaForConditionalGeneration"],
            "ignore_index": -100,
            "image_seq_length": 576,
            "image_token_index": 32000,
            "model_type": "llava",
            "pad_token_id": 32001,
            "projector_hidden_act": "gelu",
            "text_config": {  # width, heads and layers are LlamaConfig's own
                "_name_or_path": "lmsys/vicuna-7b-v1.5",
                "architectures": ["LlamaForCausalLM"],
                "max_position_embeddings": 4096,
                "model_type": "llama",
                "rms_norm_eps": 1e-05,
                "torch_dtype": "float16",
                "vocab_size": 32064,
            },
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "vision_config": {
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "model_type": "clip_vision_model",
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
                "vocab_size": 32000,
            },
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "vocab_size": 32064,
        },
        "preprocessor_config.json": {
            **_DONE,
            "crop_size": {"height": 336, "width": 336},
            "do_center_crop": True,
            "image_mean": llava.MEAN,
            "image_processor_type": "CLIPImageProcessor",
            "image_std": llava.STD,
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"shortest_edge": 336},
        },
        "processor_config.json": {
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    },
    INTERLEAVE: {
        "config.json": {
            "image_token_index": 151646,
            "model_type": "llava",
            "projector_hidden_act": "gelu",
            "text_config": {**_QWEN, "tie_word_embeddings": False},
            "vision_config": _SIGLIP,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        "preprocessor_config.json": {
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "SiglipImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": 384, "width": 384},
        },
        "processor_config.json": {},
    },
    ONEVISION: {
        "config.json": {
            "ignore_index": -100,
            "image_grid_pinpoints": _GRIDS,
            "image_token_index": 151646,
            "model_type": "llava_onevision",
            "projector_hidden_act": "gelu",
            "text_config": _QWEN,
            "tie_word_embeddings": False,
            "use_image_newline_parameter": True,
            "video_token_index": 151647,
            "vision_aspect_ratio": "anyres_max_9",
            "vision_config": _SIGLIP,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        "preprocessor_config.json": {
            **_DONE,
            "do_pad": True,
            "image_grid_pinpoints": _GRIDS,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_std": [0.5, 0.5, 0.5],
            "resample": 3,
            "rescale_factor": 0.00392156862745098,
            "size": {"height": 384, "width": 384},
        },
        "processor_config.json": {
            "image_token": "<image>",
            "num_image_tokens": 729,
            "video_token": "<video>",
            "vision_feature_select_strategy": "full",
        },
    },
}
QUICK = ExportOptions("fp32", via="native", verify=False)


def published(name: str, folder: Path, **changes: dict[str, Any]) -> Checkpoint:
    """Write a configuration without weights; `changes` are laid over its files, by stem, sections joined."""
    found = [path for path in (Path(_FOLDER).glob(f"{name}*") if _FOLDER else []) if path.is_dir()]
    for file, facts in FILES[name].items():
        real = found[0] / file if found else folder / file
        content = json.loads(real.read_text(encoding="utf-8")) if real.is_file() else facts
        wanted = changes.get(file.removesuffix(".json"), {})
        joined = {key: content[key] | value for key, value in wanted.items() if "config" in key}
        (folder / file).write_text(json.dumps({**content, **wanted, **joined}), encoding="utf-8")
    return Checkpoint(folder, name, None, json.loads((folder / "config.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("layout", ["held", "old"])
@pytest.mark.parametrize(("name", "tokens"), [(LLAVA, 576), (INTERLEAVE, 729), (ONEVISION, 730)])
def test_tensors_and_their_shapes_are_those_of_transformers_5(
    name: str, tokens: int, layout: str, tmp_path: Path
) -> None:
    checkpoint = published(name, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    rename = {"held": lambda name: name, "old": llava.old_name}[layout]
    wanted = {rename(name): tuple(weight.shape) for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop(rename("lm_head.weight"))
    facts, preprocessor = family_config(checkpoint)
    found = architecture(checkpoint, facts, wanted)
    unused = {each for each in found.unused if each in wanted}
    assert dict(found.shapes) == {name: shape for name, shape in wanted.items() if name not in unused}
    assert all("post_layernorm" in each or "layers.23." in each for each in unused)
    assert overlooked([*found.sections, preprocessor]) == {}
    family = make_family(checkpoint.model_type, facts)
    layout_of_one = family.preprocess(noise(9, 9), ImageBudget("low")).layout
    assert family.image_text(layout_of_one) == "<image>" * tokens
    assert family.image_token_id == config.image_token_id


@pytest.mark.parametrize("size", [(1080, 1920), (3000, 2000), (480, 640), (100, 2500), (700, 90), (768, 768)])
def test_a_picture_has_as_many_tokens_as_the_reference_counts(size: tuple[int, int], tmp_path: Path) -> None:
    counting = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=_GRIDS),
        num_image_tokens=729,
        vision_aspect_ratio="anyres_max_9",
    )
    counting._get_unpadded_features = partial(LlavaOnevisionProcessor._get_unpadded_features, counting)
    wanted = LlavaOnevisionProcessor._get_number_of_features(counting, *size, 384, 384)
    family = make_family("llava_onevision", family_config(published(ONEVISION, tmp_path))[0])
    visual = family.preprocess(noise(*size), ImageBudget("high"))
    assert family.image_text(visual.layout) == "<image>" * wanted


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (LLAVA, {"config": {"vision_feature_scale": 2}}),
        (LLAVA, {"config": {"vision_config": {"qkv_bias": True}}}),
        (LLAVA, {"config": {"text_config": {"logits_scaling": 4.0}}}),
        (LLAVA, {"preprocessor_config": {"do_flip_channel_order": True}}),
        (ONEVISION, {"config": {"vision_config": {"layer_scale": 0.1}}}),
        (ONEVISION, {"preprocessor_config": {"resize_mode": "shortest"}}),
    ],
)
def test_a_key_that_speaks_of_the_arithmetic_and_is_not_read_is_refused(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = published(name, tmp_path, **changes)
    facts, preprocessor = family_config(checkpoint)
    sections = architecture(checkpoint, facts, ("lm_head.weight",)).sections
    with pytest.raises(SourceError, match=r"^(pre)?(processor_)?config\.json: edgevlm does not know"):
        overlooked([*sections, preprocessor])


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another image processor": (
        LLAVA,
        {"preprocessor_config": {"image_processor_type": "BitImageProcessor"}},
        "edgevlm does not know the image processor BitImageProcessor; it knows CLIPImageProcessor,",
    ),
    "views of another size": (
        LLAVA,
        {"preprocessor_config": {"crop_size": {"height": 224, "width": 224}}},
        "makes views of 224 pixels a side, vision_config.image_size is 336",
    ),
    "no crop": (LLAVA, {"preprocessor_config": {"do_center_crop": False}}, "make no square view of every picture"),
    "more crop than picture": (
        LLAVA,
        {"preprocessor_config": {"size": {"shortest_edge": 300}}},
        "make no square view of every picture",
    ),
    "other image tokens": (
        LLAVA,
        {"processor_config": {"patch_size": 16}},
        "processor_config.json makes 441 image tokens of a picture, config.json 576",
    ),
    "a strategy": (
        LLAVA,
        {"config": {"vision_feature_select_strategy": "cls"}},
        "vision_feature_select_strategy must be default or full, not 'cls'",
    ),
    "several layers": (
        LLAVA,
        {"config": {"vision_feature_layer": [-2, -5]}},
        "the native route builds no vision_feature_layer [-2, -5] of 24 layers",
    ),
    "another tower": (
        LLAVA,
        {"config": {"vision_config": {"model_type": "pixtral"}}},
        "the native route builds no 'pixtral' vision tower; it knows clip_vision_model, siglip_vision_model",
    ),
    "no conversion to RGB": (LLAVA, {"preprocessor_config": {"do_normalize": False}}, "sets do_normalize to false"),
    "other grids": (
        ONEVISION,
        {"config": {"image_grid_pinpoints": [[384, 768]]}},
        "its processor and its config.json differ in image_grid_pinpoints",
    ),
    "other ratio": (
        ONEVISION,
        {"config": {"vision_aspect_ratio": "anyres_max_6"}},
        "its processor and its config.json differ in vision_aspect_ratio",
    ),
    "no ratio": (
        ONEVISION,
        {"config": {"vision_aspect_ratio": "pad"}, "processor_config": {"vision_aspect_ratio": "pad"}},
        "the native route builds no vision_aspect_ratio 'pad'",
    ),
    "grids of no tiles": (
        ONEVISION,
        {"preprocessor_config": {"image_grid_pinpoints": [[384, 400]]}},
        "image_grid_pinpoints must be heights and widths in tiles of 384, not [384, 400]",
    ),
    "oblong views": (
        ONEVISION,
        {"preprocessor_config": {"size": {"height": 384, "width": 448}}},
        "views must be squares of one size, not cropped",
    ),
    "no kind of decoder": (
        ONEVISION,
        {"config": {"text_config": {"model_type": None}}},
        "config.json states no text_config.model_type",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_together_or_is_not_built_is_refused(case: str, tmp_path: Path) -> None:
    name, changes, line = REFUSED[case]
    checkpoint = published(name, tmp_path, **changes)
    with pytest.raises(SourceError, match=re.escape(line)):
        architecture(checkpoint, family_config(checkpoint)[0], ("lm_head.weight",))


def test_sizes_may_be_numbers_alone(tmp_path: Path) -> None:
    facts, _ = family_config(published(LLAVA, tmp_path, preprocessor_config={"size": 336, "crop_size": 336}))
    assert (facts["preprocessing"]["side"], facts["preprocessing"]["shortest_edge"]) == (336, 336)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "llava": llava.make_llava,
    "llava_onevision": llava_onevision.make_llava_onevision,
}


@pytest.mark.parametrize("family", MAKERS)
def test_other_routes_say_what_they_do_not_cover(family: str, tmp_path: Path) -> None:
    checkpoint = MAKERS[family](tmp_path / "checkpoint")
    with pytest.raises(SourceError, match=f"through optimum-intel does not cover family '{family}'"):
        export(checkpoint, tmp_path / "out", ExportOptions(via="optimum"))
    if family == "llava_onevision":
        (checkpoint / "onnx").mkdir()
        for part in ("vision_encoder", "embed_tokens", "decoder_model_merged"):
            (checkpoint / "onnx" / f"{part}.onnx").write_bytes(b"")
        with pytest.raises(SourceError, match="from ONNX files does not cover family 'llava_onevision'"):
            export(checkpoint, tmp_path / "out", ExportOptions(via="onnx"))


def test_a_checkpoint_without_its_newline_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    checkpoint = llava_onevision.make_llava_onevision(tmp_path / "checkpoint")
    weights = load_file(checkpoint / "model.safetensors")
    kept = {name: array for name, array in weights.items() if not name.endswith("image_newline")}
    assert len(kept) == len(weights) - 1
    save_file(kept, checkpoint / "model.safetensors")
    with pytest.raises(SourceError, match="lacks weights that its config asks for, such as image_newline"):
        export(checkpoint, tmp_path / "out", QUICK)


def test_as_many_rows_as_the_views_have_are_not_the_views_rows() -> None:
    from edgevlm.inputs.vision_cache import EncodedView

    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    views = [EncodedView(name, {IMAGE_EMBEDS: rows[at : at + 2]}) for name, at in ((b"a", 0), (b"b", 2))]
    picture = EncodedImage("layout", views, 2)
    assert feature_keys(picture, {IMAGE_EMBEDS: rows}) == [(b"a", 0), (b"a", 1), (b"b", 0), (b"b", 1)]
    mixed = feature_keys(picture, {IMAGE_EMBEDS: rows[[0, 1, 3, 2]]})
    assert mixed == [(("layout", b"a", b"b"), row) for row in range(4)]


@pytest.mark.parametrize("via", ["auto", "native"])
def test_what_only_one_route_covers_is_not_sent_to_another(via: Any, tmp_path: Path) -> None:
    checkpoint = llava.make_llava(tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    config["projector_hidden_act"] = "mish"
    (checkpoint / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(SourceError, match=r"mish.*, and no other route covers family 'llava'$"):
        export(checkpoint, tmp_path / "out", ExportOptions(via=via))
