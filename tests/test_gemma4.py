"""Gemma 4 against transformers: sizes of pictures, what layers share, names of weights, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, Gemma4Config, Gemma4ImageProcessorPil, Gemma4VisionConfig
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

from edgevlm import VLM, GenerationConfig, ImageBudget
from edgevlm.errors import SourceError
from edgevlm.families import make_family
from edgevlm.families.base import PER_LAYER_IDS
from edgevlm.families.gemma4 import pooled_grid
from edgevlm.families.qwen_vl import Grid
from edgevlm.inputs.chat_template import user_message
from edgevlm.metrics import Stopwatch
from edgevlm_export import ExportOptions, export
from edgevlm_export.families import architecture, family_config
from edgevlm_export.families import gemma4 as exporter
from edgevlm_export.routes import native as native_route
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import overlooked
from tests.conftest import F32, noise, photograph
from tests.families import gemma4 as tiny
from tests.helpers.graphs import runtime_kinds
from tests.helpers.json_files import read_json, write_json

QUESTION = "What does the display of unit 12 show?"
QUICK = ExportOptions("fp32", via="native", verify=False)
SHORT, HIGH = GenerationConfig(max_new_tokens=16, draft_tokens=8), ImageBudget("high")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint. Tests must not change it."""
    return tiny.make_checkpoint(tmp_path_factory.mktemp("gemma4") / "saved")


@pytest.fixture(scope="module")
def vlm(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    """Its export, without compression."""
    return VLM(export(saved, tmp_path_factory.mktemp("exported") / "out", QUICK).folder, F32)


def test_sizes_equal_the_reference() -> None:
    random = np.random.default_rng(4)
    sizes = [(1200, 1600), (48, 48), (1, 5000), (3000, 7), *random.integers(1, 3000, (300, 2)).tolist()]
    for most in (70, 280, 1120):
        for height, width in sizes:
            wanted = get_aspect_ratio_preserving_size(height, width, 16, most * 9, 3)
            grid = pooled_grid(height, width, 48, most)
            assert (grid.rows * 48, grid.cols * 48) == wanted
    assert pooled_grid(1200, 1600, 48, 280) == Grid(14, 19)


def test_a_picture_is_not_enlarged_unless_asked_for(vlm: VLM) -> None:
    family = vlm.processor.family
    details: list[Any] = ["low", "auto", "high"]
    small, large = ([family.preprocess(noise(*size), ImageBudget(each)).layout for each in details] for size in SIZES)
    assert [each.tokens for each in small] == [8, 8, 60]
    assert [each.tokens for each in large] == [63, 63, 63]


SIZES = [(24, 36), (300, 400)]


def test_the_graphs_run_fused_but_for_layers_that_share_keys(vlm: VLM) -> None:
    """Of five layers three add keys, and the others read those of two of them."""
    language, vision = runtime_kinds(vlm.language_model._compiled), runtime_kinds(vlm.vision._compiled)
    assert language["MemoryInput"] == language["MemoryOutput"] == 2 * 3
    assert language["ScaledDotProductAttention"] == 1
    assert language["RoPE"] == 3 * 2 + 2
    assert vision["FullyConnected"] == 2 * 7 + 2
    assert vision["Softmax"] == vision["MatMul"] == 0


def test_a_stage_in_each_partition_makes_the_same_model(
    saved: Path, vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values pass from partition to partition, in one of which they become state."""
    monkeypatch.setattr(native_route, "PARTITION_WEIGHTS", 1000)
    report = export(saved, tmp_path / "out", ExportOptions("fp32", via="native"))
    assert report.verification is not None
    assert report.verification.greedy_agreement == 1
    found, wanted = (
        each.generate(photograph("china.jpg"), QUESTION, SHORT, HIGH) for each in (VLM(report.folder, F32), vlm)
    )
    assert found.token_ids == wanted.token_ids


def test_text_after_the_prompt_has_its_own_per_layer_embeddings(vlm: VLM) -> None:
    """In the same step, as fast-forwarded tokens are, and in later ones."""
    prompt = vlm.prepare([user_message(QUESTION, 1)], [photograph("china.jpg")], SHORT, Stopwatch(), HIGH)
    ids = prompt.inputs.extras[PER_LAYER_IDS]
    shown = np.asarray(prompt.ids) == vlm.processor.family.image_token_id
    assert np.array_equal(ids, np.where(shown, 0, prompt.ids))
    after = [60, 61, 62]
    one, two, blind = (vlm.language_model.session() for _ in range(3))
    one.prefill(prompt.inputs_embeds, 1, prompt.prefix_keys, prompt.inputs)
    wanted = one.step(after)
    embeds = np.concatenate([prompt.inputs_embeds, two.embed(after)], axis=1)
    found = two.prefill(embeds, len(after), [*prompt.prefix_keys, *after], prompt.inputs)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(blind.prefill(embeds, len(after), None, prompt.inputs) - wanted).max() > 0.1


def test_sound_and_keys_that_no_layer_reads_are_left_out(saved: Path, vlm: VLM, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    checkpoint = Path(shutil.copytree(saved, tmp_path / "checkpoint"))
    weights = load_file(checkpoint / "model.safetensors")
    more = ["model.audio_tower.layers.0.weight", "model.embed_audio.embedding_projection.weight"]
    more += [f"model.language_model.layers.4.self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm")]
    save_file(weights | {name: np.ones((2, 2), np.float32) for name in more}, checkpoint / "model.safetensors")
    found = VLM(export(checkpoint, tmp_path / "out", QUICK).folder, F32).generate(None, QUESTION, SHORT)
    assert found.token_ids == vlm.generate(None, QUESTION, SHORT).token_ids
    save_file(weights | {"model.audio.weight": np.ones(2, np.float32)}, checkpoint / "model.safetensors")
    with pytest.raises(SourceError, match=r"has no place for, such as model\.audio\.weight"):
        export(checkpoint, tmp_path / "other", QUICK)


E2B: dict[str, Any] = {
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 35,
    "num_key_value_heads": 1,
    "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
    "final_logit_softcapping": 30.0,
}
"""The text model of a checkpoint of E2B's size."""


def write_config(folder: Path, text: dict[str, Any], vision: dict[str, Any], **changes: Any) -> Checkpoint:
    """Write the files of a checkpoint of E2B's size, weights excepted."""
    config = Gemma4Config(
        text_config={**E2B, **text}, vision_config={"use_clipped_linears": True, **vision}, audio_config=None
    ).to_dict()
    write_json(folder / "config.json", {**config, **changes})
    write_json(folder / "preprocessor_config.json", Gemma4ImageProcessorPil().to_dict())
    return Checkpoint(folder, "gemma-4", None, read_json(folder / "config.json"))


def test_tensors_and_their_shapes_are_those_of_transformers(tmp_path: Path) -> None:
    checkpoint = write_config(tmp_path, {}, {"standardize": True})
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(Gemma4Config.from_pretrained(tmp_path))
    wanted = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    wanted.pop("lm_head.weight")
    facts, preprocessor = family_config(checkpoint)
    found = architecture(checkpoint, facts, wanted)
    assert dict(found.shapes) == wanted
    assert overlooked([*found.sections, preprocessor]) == {}
    assert make_family("gemma4", facts).image_text(Grid(14, 19)).count("<|image|>") == 266


def test_what_files_are_silent_about_is_what_the_classes_have() -> None:
    for made, defaults in (
        (Gemma4Config(), exporter._DEFAULTS),
        (Gemma4VisionConfig(), exporter._VISION_DEFAULTS),
        (Gemma4ImageProcessorPil(), exporter._PREPROCESSOR_DEFAULTS),
    ):
        found = {name: getattr(made, name) for name in defaults}
        lists = {name: list(value) for name, value in found.items() if isinstance(value, tuple)}
        assert found | lists == defaults


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "experts": ({"enable_moe_block": True, "num_experts": 2, "top_k_experts": 1}, {}, {}, "enable_moe_block"),
    "keys that are values": ({"attention_k_eq_v": True}, {}, {}, "does not build text_config.attention_k_eq_v"),
    "pictures read both ways": (
        {"use_bidirectional_attention": "vision"},
        {},
        {},
        "does not build text_config.use_bidirectional_attention 'vision'",
    ),
    "a head bent": ({}, {"attention_bias": True}, {}, "does not build vision_config.attention_bias"),
    "other patches": (
        {},
        {"patch_size": 14},
        {},
        "patch_size of preprocessor_config.json is 16, vision_config.patch_size",
    ),
    "too few places": ({}, {"position_embedding_size": 800}, {}, "a row of max_soft_tokens 280 has more patches than"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_built_or_does_not_fit_together_is_refused(case: str, tmp_path: Path) -> None:
    text, vision, changes, line = REFUSED[case]
    checkpoint = write_config(tmp_path, text, vision, **changes)
    with pytest.raises(SourceError, match=re.escape(line)):
        architecture(checkpoint, family_config(checkpoint)[0], ())
