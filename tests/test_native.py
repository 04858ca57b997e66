"""The native route: graphs made from the checkpoint's tensors, against optimum-intel's and against transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgevlm import VLM, GenerationConfig
from edgevlm.families.base import IMAGE_EMBEDS, ImageBudget
from edgevlm.inputs.chat_template import user_message
from edgevlm.manifest import LANGUAGE, SUBMODELS, VISION, hash_file, load_manifest
from edgevlm.metrics import Stopwatch
from edgevlm.runtime.core import import_openvino
from edgevlm_export import ExportOptions, export
from edgevlm_export import compress as compress_module
from edgevlm_export.graphs.rope import make_rope
from edgevlm_export.options import Int4Recipe
from edgevlm_export.routes import native as native_route
from edgevlm_export.samples import pixel_views
from tests.conftest import F32, make_checkpoint, photograph
from tests.helpers.exports import compiled, language_outputs, model

QUICK = ExportOptions("fp32", via="native", verify=False)
RANDOM = np.random.default_rng(11)


@pytest.fixture(scope="module", params=["idefics3", "smolvlm"])
def routes(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """One checkpoint, head untied or tied, exported natively and through optimum-intel."""
    names = {"idefics3": ("exported", "exported_via_optimum"), "smolvlm": ("exported_smolvlm", "smolvlm_via_optimum")}
    native, optimum = (request.getfixturevalue(name) for name in names[request.param])
    return native, optimum


@pytest.mark.optimum
def test_the_manifest_records_the_route(routes: tuple[Path, Path]) -> None:
    native, optimum = (load_manifest(folder) for folder in routes)
    assert (native.export_options["via"], optimum.export_options["via"]) == ("native", "optimum")
    assert native.verification is not None and optimum.verification is not None
    assert native.verification["reference"] == "openvino, float32, uncompressed"
    assert optimum.verification["reference"] == "transformers"
    assert native.verification["greedy_agreement"] == 1


@pytest.mark.optimum
def test_both_routes_make_the_same_interface(routes: tuple[Path, Path]) -> None:
    for part in SUBMODELS:
        native, optimum = (model(folder, part) for folder in routes)
        described = [
            (
                {
                    (name.get_any_name(), str(name.get_element_type()), str(name.get_partial_shape()))
                    for name in m.inputs
                },
                {
                    (name.get_any_name(), str(name.get_element_type()), str(name.get_partial_shape()))
                    for name in m.outputs
                },
                {(v.info.variable_id, str(v.info.data_shape), str(v.info.data_type)) for v in m.get_variables()},
            )
            for m in (native, optimum)
        ]
        assert described[0] == described[1], part


@pytest.mark.optimum
def test_both_routes_give_the_runtime_the_same_hints(routes: tuple[Path, Path]) -> None:
    names = ("ACTIVATIONS_SCALE_FACTOR", "KV_CACHE_PRECISION")
    native, optimum = (
        [model(folder, LANGUAGE).get_rt_info(["runtime_options", name]).astype(str) for name in names]
        for folder in routes
    )
    assert native == optimum


@pytest.mark.optimum
def test_logits_equal_those_of_the_optimum_route(routes: tuple[Path, Path]) -> None:
    for native, optimum in zip(*(language_outputs(folder) for folder in routes), strict=True):
        assert np.ptp(optimum) > 5
        np.testing.assert_allclose(native, optimum, atol=1e-4)


@pytest.mark.optimum
def test_image_embeds_equal_those_of_the_optimum_route(routes: tuple[Path, Path]) -> None:
    """Also where a part of the patches is padding."""
    mask = np.ones((2, 8, 8), np.bool_)
    mask[1, :, 5:] = False
    inputs = {
        "pixel_values": RANDOM.normal(size=(2, 3, 64, 64)).astype(np.float32),
        "patch_attention_mask": mask,
        "patch_position_ids": np.stack([np.arange(64), RANDOM.integers(0, 64, 64)]),
    }
    native, optimum = (compiled(folder, VISION)(inputs)[0] for folder in routes)
    assert native.shape == (2, 4, 64)
    np.testing.assert_allclose(native, optimum, atol=1e-4)


@pytest.mark.optimum
def test_the_same_greedy_text_over_64_tokens(routes: tuple[Path, Path]) -> None:
    config = GenerationConfig(max_new_tokens=64)
    budget = ImageBudget("high")
    native, optimum = (VLM(folder, F32).generate(photograph("china.jpg"), "What?", config, budget) for folder in routes)
    assert native.token_ids == optimum.token_ids
    assert native.text


def language_logits(folder: Path) -> np.ndarray:
    """Return the logits of a text prompt, every position's."""
    vlm = VLM(folder, F32)
    prompt = vlm.prepare([user_message("What is red, and what is 42.7?", 0)], [], GenerationConfig(), Stopwatch())
    return vlm.language_model.session().prefill(prompt.inputs_embeds, logits_to_keep=len(prompt))


def reference_logits(checkpoint: Path, folder: Path) -> np.ndarray:
    """Return what transformers computes for the same prompt."""
    from transformers import AutoModelForImageTextToText

    vlm = VLM(folder, F32)
    prompt = vlm.prepare([user_message("What is red, and what is 42.7?", 0)], [], GenerationConfig(), Stopwatch())
    reference = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        return reference(input_ids=torch.tensor([prompt.ids])).logits[0].numpy()


VARIANTS: dict[str, dict[str, Any]] = {
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, one head each": {"num_key_value_heads": 4, "head_dim": 24},
    "llama, llama3 rope": {
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama, gelu": {"hidden_act": "gelu"},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoders_equal_transformers(variant: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "idefics3", **VARIANTS[variant])
    folder = export(checkpoint, tmp_path / "out", QUICK).folder
    wanted = reference_logits(checkpoint, folder)
    assert np.ptp(wanted) > 5
    np.testing.assert_allclose(language_logits(folder), wanted, atol=1e-4)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.1, "beta_fast": 24, "truncate": False},
    ],
)
def test_rope_frequencies_equal_transformers(scaling: dict[str, Any] | None) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=512, num_attention_heads=8, rope_theta=10000.0, rope_scaling=scaling, max_position_embeddings=8192
    )
    reference = LlamaRotaryEmbedding(config)
    rope = make_rope(64, 10000.0, scaling, 8192)
    np.testing.assert_allclose(rope.frequencies, reference.inv_freq.numpy(), rtol=3e-7)
    assert rope.scale == pytest.approx(reference.attention_scaling)


def bins(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in folder.glob("openvino_*.bin")}


def test_pieces_make_the_same_model(exported: Path, idefics3: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """With a limit below one layer's weights, every block is a piece of its own."""
    monkeypatch.setattr(native_route, "PARTITION_WEIGHTS", 1000)
    report = export(idefics3, tmp_path / "out", ExportOptions("fp32", via="native"))
    assert report.verification is not None
    assert report.verification.greedy_agreement == 1
    assert language_logits(report.folder) == pytest.approx(language_logits(exported), abs=1e-5)
    images = [
        next(VLM(folder, F32).vision.encode(pixel_views(np.ones((1, 3, 64, 64), np.float32))))[IMAGE_EMBEDS]
        for folder in (exported, tmp_path / "out")
    ]
    np.testing.assert_allclose(images[1], images[0], atol=1e-5)
    assert {path.name for path in report.folder.iterdir()} == {path.name for path in exported.iterdir()}


def test_a_calibration_set_of_pictures_alone(idefics3: Path, china: Path, tmp_path: Path) -> None:
    """The question without a picture that is verified on is then none of the set."""
    options = ExportOptions("int4", via="native", calibration=china.parent)
    report = export(idefics3, tmp_path / "out", options)
    assert report.verification is not None
    assert report.verification.positions > 32


def stored_as(checkpoint: Path, folder: Path, dtype: torch.dtype, shards: int = 1) -> Path:
    """Copy a checkpoint with its tensors in another type, in one file or several with an index."""
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[shard::shards]}
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.mark.parametrize(("dtype", "shards"), [(torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 3)])
def test_every_type_and_sharding_is_read(dtype: torch.dtype, shards: int, idefics3: Path, tmp_path: Path) -> None:
    checkpoint = stored_as(idefics3, tmp_path / "checkpoint", dtype, shards)
    folder = export(checkpoint, tmp_path / "out", QUICK).folder
    np.testing.assert_allclose(language_logits(folder), reference_logits(checkpoint, folder), atol=1e-4)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_16_bit_weights_compress_like_float32(precision: Any, idefics3: Path, tmp_path: Path) -> None:
    checkpoint = stored_as(idefics3, tmp_path / "half", torch.bfloat16)
    wide = stored_as(checkpoint, tmp_path / "wide", torch.float32)
    logits = [
        language_logits(export(each, tmp_path / f"{each.name}-out", ExportOptions(precision, verify=False)).folder)
        for each in (checkpoint, wide)
    ]
    assert np.corrcoef(logits[0].ravel(), logits[1].ravel())[0, 1] > 0.999


def matrix_model(weights: Any, dtype: str, kind: str) -> Any:
    """Return a model of one matrix that is looked up, or multiplied by its rows or by its columns."""
    openvino, opset = import_openvino(), import_openvino().opset13
    constant = openvino.op.Constant(openvino.Tensor(weights, list(weights.shape), getattr(openvino.Type, dtype)), True)
    matrix = constant if dtype == "f32" else opset.convert(constant, "f32")
    if kind == "gather":
        asked = opset.parameter([-1], np.int32)
        return openvino.Model([opset.gather(matrix, asked, np.int32(0))], [asked])
    asked = opset.parameter([-1, -1], np.float32)
    return openvino.Model([opset.matmul(asked, matrix, False, kind == "rows")], [asked])


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("kind", ["gather", "rows", "columns"])
def test_large_tables_in_int8_are_those_of_nncf(dtype: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, though compressed some rows at a time; the last block is smaller."""
    weights = RANDOM.standard_normal((50, 16)).astype(np.float32)
    stored = (weights.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bf16" else weights
    matrices = []
    for limit in (compress_module.BLOCK_WEIGHTS, 20 * 16):
        monkeypatch.setattr(compress_module, "BLOCK_WEIGHTS", limit)
        found = compress_module.compress(matrix_model(stored, dtype, kind), "int8", Int4Recipe()).get_ordered_ops()
        held = [np.array(node.data) for node in found if node.get_type_name() == "Constant"]
        matrices.append(([node.get_type_name() for node in found], [(each.dtype, each.tolist()) for each in held]))
    assert matrices[0] == matrices[1]
