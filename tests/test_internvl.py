"""InternVL checkpoints exported natively, against transformers: prompts, embeddings, logits and greedy tokens."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLVisionConfig,
)

from edgevlm import VLM
from edgevlm.inputs.chat_template import text_message, user_message
from edgevlm_export import ExportOptions, export
from edgevlm_export.families import architecture, family_config
from edgevlm_export.families import internvl as exporter
from edgevlm_export.routes import native as native_route
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import overlooked
from tests.conftest import F32, photograph
from tests.families.internvl import (
    as_published,
    image_processor,
    make_checkpoint,
)
from tests.helpers.checkpoints import QUICK, check_class_defaults, check_refused
from tests.helpers.graphs import check_fused, runtime_kinds
from tests.helpers.json_files import read_json, write_json
from tests.helpers.published import published_folder

QUESTION = "What does the display of unit 12 show? Größe 42.7"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as those on the hub are. Tests must not change it."""
    folder = tmp_path_factory.mktemp("published")
    return as_published(make_checkpoint(folder / "saved"), folder / "checkpoint")


@pytest.fixture(scope="module")
def exported(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export, without compression."""
    return export(published, tmp_path_factory.mktemp("exported") / "out", QUICK).folder


@pytest.mark.parametrize("said", ["<image>", "is <image> one?", "<IMG_CONTEXT><img>", "<image><image>\n"])
def test_a_placeholder_that_a_user_writes_is_no_picture(said: str, exported: Path) -> None:
    vlm = VLM(exported, F32)
    fast = vlm.processor.tokenizer
    ids = vlm.processor.prompt_ids([user_message(said, 0), text_message("assistant", said)], [])
    image_ids = {vlm.processor.family.image_token_id, *fast.encode("<img>"), *fast.encode("</img>")}
    assert not image_ids & set(ids)
    assert fast.decode(ids, skip_special_tokens=False).count(said) == 2


def test_pieces_make_the_same_model(exported: Path, published: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """With a limit below one layer's weights, every block is a piece of its own."""
    monkeypatch.setattr(native_route, "PARTITION_WEIGHTS", 1000)
    report = export(published, tmp_path / "out", ExportOptions("fp32", via="native"))
    assert report.verification is not None
    assert report.verification.greedy_agreement == 1
    options: dict[str, Any] = {"max_new_tokens": 32, "detail": "high"}
    whole, pieced = (
        VLM(folder, F32).generate(photograph("china.jpg"), QUESTION, **options) for folder in (exported, report.folder)
    )
    assert pieced.token_ids == whole.token_ids


def test_the_parts_run_fused(exported: Path) -> None:
    """Of vision two layers with four products each and the projector's two; attention is one node, as Idefics3's is."""
    check_fused(exported)
    kinds = runtime_kinds(VLM(exported, F32).vision._compiled)
    assert kinds["FullyConnected"] == 2 * 4 + 2
    assert kinds["MVN"] == 2 * 2 + 1
    assert kinds["Softmax"] == kinds["MatMul"] == 0


@pytest.mark.parametrize(
    ("file", "section", "changes", "line"),
    [
        (
            "config.json",
            "vision_config",
            {"image_size": [64, 64]},
            "of 32 pixels, and vision_config.image_size 64",
        ),
        (
            "config.json",
            "vision_config",
            {"patch_size": [4, 8]},
            "patch_size must be the side of a square",
        ),
        (
            "config.json",
            "vision_config",
            {"norm_type": "group"},
            "does not build the norm 'group'",
        ),
        (
            "config.json",
            "vision_config",
            {"num_attention_heads": 3},
            "num_attention_heads 3 does not divide 32",
        ),
        ("config.json", "vision_config", {"use_rope": True}, "edgevlm does not know vision_config.use_rope (True)"),
        ("config.json", "", {"vision_feature_layer": -2}, "builds no vision_feature_layer -2"),
        ("config.json", "", {"vision_feature_select_strategy": "full"}, "no vision_feature_select_strategy 'full'"),
        ("config.json", "", {"downsample_ratio": 2.0}, "downsample_ratio must be one over a whole number, not 2.0"),
        ("config.json", "", {"downsample_ratio": 0.2}, "8 patches a side cannot be folded by 5"),
        ("config.json", "", {"downsample_ratio": 0.3}, "downsample_ratio must be one over a whole number, not 0.3"),
        ("config.json", "text_config", {"model_type": None}, "config.json states no text_config.model_type"),
        (
            "processor_config.json",
            "",
            {"image_seq_length": 256},
            "says 256 image tokens a tile",
        ),
        ("preprocessor_config.json", "", {"size": {"height": 32, "width": 64}}, "size must be a square, not 64x32"),
        ("preprocessor_config.json", "", {"min_patches": 13}, "min_patches 13 is more than max_patches 12"),
        ("preprocessor_config.json", "", {"do_rescale": False}, "sets do_rescale to false"),
    ],
)
def test_what_is_not_built_is_refused(
    file: str, section: str, changes: dict[str, Any], line: str, published: Path, tmp_path: Path
) -> None:
    check_refused(published, tmp_path, file, section, changes, line)


def qwen(kind: str, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    """The `text_config` of a published checkpoint."""
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        **more,
    }


QWEN3 = {"head_dim": 128, "max_position_embeddings": 40960, "vocab_size": 151936, "rope_scaling": None}
QWEN2 = {
    "max_position_embeddings": 32768,
    "vocab_size": 151674,
    "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
}
PUBLISHED = {
    "OpenGVLab__InternVL3-1B-hf": qwen("qwen2", 896, 4864, 24, 14, 2, **QWEN2),
    "OpenGVLab__InternVL3-2B-hf": qwen("qwen2", 1536, 8960, 28, 12, 2, **QWEN2),
    "OpenGVLab__InternVL3_5-1B-HF": qwen("qwen3", 1024, 3072, 28, 16, 8, **QWEN3),
    "OpenGVLab__InternVL3_5-2B-HF": qwen("qwen3", 2048, 6144, 28, 16, 8, **QWEN3),
    "OpenGVLab__InternVL3_5-4B-HF": qwen("qwen3", 2560, 9728, 36, 32, 8, **QWEN3),
}


def write_published(name: str, folder: Path) -> Path:
    """Write a published checkpoint's files, weights excepted: the real ones where they are at hand, else its facts."""
    if found := published_folder(name):
        return Path(shutil.copytree(found, folder))
    folder.mkdir()
    config = {
        "model_type": "internvl",
        "image_token_id": 151667,
        "image_seq_length": 256,
        "text_config": PUBLISHED[name],
    }
    write_json(folder / "config.json", {**config, "vision_config": {"attention_bias": True}})
    settings = image_processor(size={"height": 448, "width": 448}).to_dict()
    write_json(folder / "preprocessor_config.json", {**settings, "crop_to_patches": False})
    write_json(folder / "processor_config.json", {"image_seq_length": 256})
    return folder


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_and_their_shapes_are_those_of_transformers(name: str, held: bool, tmp_path: Path) -> None:
    """With all layers, and so with the sizes that a config leaves to its class."""
    folder = write_published(name, tmp_path / "checkpoint")
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    wanted = {each if held else published_name(each): tuple(w.shape) for each, w in model.state_dict().items()}
    checkpoint = Checkpoint(folder, folder.name, None, read_json(folder / "config.json"))
    facts, preprocessor = family_config(checkpoint)
    found = architecture(checkpoint, facts, wanted)
    assert dict(found.shapes) == wanted
    assert overlooked([*found.sections, preprocessor]) == {}
    assert (facts["image_seq_len"], facts["preprocessing"]["tile"], facts["image_token_id"]) == (256, 448, 151667)
    rope = found.decoder.layers[0].mixer.rope
    assert rope.scale == 1
    assert rope.frequencies[1] ** (-found.decoder.layers[0].mixer.head_dim / 2) == pytest.approx(1000000.0, rel=1e-5)


def published_name(name: str) -> str:
    """Return what a tensor of a class is called in published files."""
    name = name.removeprefix("model.")
    return re.sub("^language_model", "language_model.model", name).replace("lm_head", "language_model.lm_head")


def test_what_a_config_is_silent_about_is_what_the_class_has() -> None:
    classes = [
        (InternVLConfig(), exporter._DEFAULTS),
        (InternVLVisionConfig(), exporter._VISION_DEFAULTS),
        (GotOcr2ImageProcessorPil(), exporter._PREPROCESSOR_DEFAULTS),
    ]
    check_class_defaults(classes)
