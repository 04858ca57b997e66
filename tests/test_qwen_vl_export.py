"""The graphs of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5 against transformers, on inputs of its own functions."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openvino import PartialShape

from edgevlm import VLM, RuntimeConfig
from edgevlm.errors import SourceError
from edgevlm.families.base import DecoderTraits
from edgevlm.manifest import LANGUAGE, TEXT_EMBEDDINGS, VISION
from edgevlm.runtime.core import core
from edgevlm_export import ExportOptions, export
from edgevlm_export.families import Architecture, architecture, family_config
from edgevlm_export.families import qwen_vl as exporter
from edgevlm_export.graphs.constants import Constants
from edgevlm_export.graphs.stages import partition, stitch
from edgevlm_export.routes import native as native_route
from edgevlm_export.routes.native import PARTITION_WEIGHTS
from edgevlm_export.source.checkpoint import Checkpoint, open_checkpoint
from edgevlm_export.source.config_reader import overlooked
from edgevlm_export.source.safetensors_reader import Weights
from tests.conftest import F32, noise
from tests.families.qwen_vl import (
    NAMES,
    OF_QWEN3,
    PATCH,
    TEMPLATE,
    TEXT,
    QwenReference,
    as_published,
    make_checkpoint,
)
from tests.helpers.graphs import runtime_kinds
from tests.helpers.json_files import read_json, write_json
from tests.helpers.published import published_folder

KINDS = tuple(NAMES)
WORDS = [40, 51, 62, 73, 84, 95, 106, 117, 128]
PICTURES = [noise(44, 61), noise(33, 15)]
"""Of 5x7 and of 4x2 image tokens; of the windows of the former the last row and the last column are cut."""


class Model:
    """A checkpoint's graphs, read, built and stitched as the native route does it, and compiled in float32."""

    def __init__(self, checkpoint: Path, limit: int = PARTITION_WEIGHTS, *, upcast: bool = True) -> None:
        found, weights = read(checkpoint)
        weights.expect(found.shapes, found.unused)
        self.architecture = found
        self._constants = constants = Constants(weights, upcast=upcast)  # they hold the memory that the graphs read
        self.compiled = {}
        self.inputs: dict[str, dict[str, Any]] = {}
        for name, graph in found.graphs.items():
            model = stitch([*partition(graph, constants, limit)], graph, name)
            self.inputs[name] = {each.get_any_name(): each.get_partial_shape() for each in model.inputs}
            self.compiled[name] = core().compile_model(model, "CPU", F32.language_properties("CPU"))

    def encode(self, view: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs `(M, D)` of one picture, in the graph's order."""
        return [each[0] for each in self.compiled[VISION](view).values()]

    def logits(
        self,
        reference: QwenReference,
        inputs: dict[str, Any],
        features: Sequence[Sequence[np.ndarray]],
        cuts: Sequence[int],
    ) -> np.ndarray:
        """Return the logits `(S, V)` of a prompt that is read in pieces."""
        ids = inputs["input_ids"].numpy()
        shown = ids[0] == reference.config.image_token_id
        embeds = self.compiled[TEXT_EMBEDDINGS](ids)[0]
        deep = np.zeros((self.architecture.decoder.deepstack, *embeds.shape), np.float32)
        if features:
            first, *others = [np.concatenate(each) for each in zip(*features, strict=True)]
            embeds[0, shown] = first
            for each, rows in zip(deep, others, strict=True):
                each[0, shown] = rows
        positions, request = reference.positions(inputs)[:, None], self.compiled[LANGUAGE].create_infer_request()
        found = []
        for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
            given = {
                "inputs_embeds": embeds[:, start:stop],
                "attention_mask": np.ones((1, stop), np.int64),
                "position_ids": positions[:, :, start:stop],
                "beam_idx": np.zeros(1, np.int32),
                **{f"deepstack_embeds.{number}": each[:, start:stop] for number, each in enumerate(deep)},
            }
            found.append(np.array(request.infer(given)["logits"][0]))
        return np.concatenate(found)


def read(folder: Path) -> tuple[Architecture, Weights]:
    """Return a checkpoint's architecture, nothing of its configuration overlooked."""
    checkpoint = open_checkpoint(folder)
    facts, preprocessor = family_config(checkpoint)
    weights = Weights(checkpoint)
    found = architecture(checkpoint, facts, weights)
    assert overlooked([*found.sections, preprocessor]) == {}
    return found, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qwen")


@lru_cache
def saved(folder: Path, kind: str) -> Path:
    """A checkpoint as transformers 5 saves it. Tests must not change it."""
    return make_checkpoint(folder / kind, kind)


@lru_cache
def published(folder: Path, kind: str) -> Path:
    """A checkpoint as those on the hub are. Tests must not change it."""
    return as_published(saved(folder, kind), folder / f"{kind}-published")


VARIANTS: dict[str, Any] = {
    "saved": saved,
    "published": published,
    "held": lambda folder, kind: make_checkpoint(folder / f"{kind}-held", kind, held=True),
    "tied": lambda folder, kind: make_checkpoint(folder / f"{kind}-tied", kind, tied=True),
    "bfloat16": lambda folder, kind: in_bfloat16(saved(folder, kind), folder / f"{kind}-bfloat16"),
    "yarn": lambda folder, kind: make_checkpoint(
        folder / f"{kind}-yarn", kind, text_config={"rope_parameters": yarn(kind)}
    ),
}


def in_bfloat16(checkpoint: Path, folder: Path) -> Path:
    """Write the checkpoint with weights of 16 bits, as most are published."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(halved, folder / "model.safetensors", {"format": "pt"})
    return folder


def yarn(kind: str) -> dict[str, Any]:
    """RoPE stretched as the model cards advise for long texts."""
    stated = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    return {**TEXT[kind]["rope_parameters"], **stated}


OF_EACH = [(kind, each) for kind in KINDS for each in VARIANTS if kind != "qwen3_5" or each not in ("saved", "held")]
"""Published tensors of Qwen3.5 are called as they are held, and the tied variant is saved by transformers 5."""


@pytest.mark.parametrize(("kind", "variant"), OF_EACH)
def test_features_and_logits_are_those_of_transformers(kind: str, variant: str, folder: Path) -> None:
    """Without pictures, with one and with two, read at once and in two pieces, the cut within a picture."""
    checkpoint = VARIANTS[variant](folder, kind)
    model, reference = Model(checkpoint, upcast=variant != "bfloat16"), QwenReference(checkpoint)
    for images in ([], PICTURES[:1], PICTURES):
        inputs = reference.around(images, WORDS)
        expected = reference.features(inputs)
        features = [model.encode(view) for view in reference.views(inputs)]
        for found, wanted in zip(features, expected, strict=True):
            assert len(found) == len(wanted) == (3 if kind == "qwen3_vl" else 1)
            for one, other in zip(found, wanted, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-4)
        logits = reference.logits(inputs)
        for cuts in ([], [7]):
            found = model.logits(reference, inputs, features, cuts)
            np.testing.assert_allclose(found, logits, atol=reference.logits_atol)


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_the_same_model(kind: str, folder: Path) -> None:
    """With a limit below one layer's weights, every stage is a piece of its own."""
    checkpoint = saved(folder, kind)
    whole, pieced, reference = Model(checkpoint), Model(checkpoint, 1000), QwenReference(checkpoint)
    assert whole.inputs == pieced.inputs
    inputs = reference.around(PICTURES, WORDS)
    views = reference.views(inputs)
    one, other = ([model.encode(view) for view in views] for model in (whole, pieced))
    for first, second in zip([*chain(*one)], [*chain(*other)], strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)
    logits = (model.logits(reference, inputs, one, []) for model in (whole, pieced))
    np.testing.assert_allclose(*logits, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_outputs_are_what_the_runtime_expects(kind: str, folder: Path) -> None:
    """Every picture may have a size of its own; no input is there that is not read."""
    model = Model(saved(folder, kind))
    patches = {"pixel_values": [-1, -1, 3 * 2 * PATCH**2], "patch_positions": [-1, -1, 2]}
    own = {
        "qwen2_vl": {},
        "qwen2_5_vl": {"window_index": [-1, -1], "window_ids": [-1, -1]},
        "qwen3_vl": {"table_indices": [-1, 4, -1], "table_weights": [-1, 4, -1]},
        "qwen3_5": {"table_indices": [-1, 4, -1], "table_weights": [-1, 4, -1]},
    }
    assert model.inputs[VISION] == {name: PartialShape(shape) for name, shape in {**patches, **own[kind]}.items()}
    extras = ["deepstack_embeds.0", "deepstack_embeds.1"] if kind == "qwen3_vl" else []
    shapes = {"attention_mask": [-1, -1], "position_ids": [3, -1, -1], "inputs_embeds": [-1, -1, 64], "beam_idx": [-1]}
    shapes |= {name: [-1, -1, 64] for name in extras}
    assert model.inputs[LANGUAGE] == {name: PartialShape(shape) for name, shape in shapes.items()}
    assert [each.get_any_name() for each in model.compiled[VISION].outputs] == ["image_embeds", *extras]
    has_nets = kind == "qwen3_5"
    assert model.architecture.traits == DecoderTraits(
        3, recurrent=has_nets, rewindable=not has_nets, fixed_states=has_nets
    )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "qwen3_5"])
def test_the_parts_run_fused(kind: str, folder: Path) -> None:
    """Of both parts every attention is one node, every norm, every rotation of q and of k.

    In the decoder attention holds the KV cache, too; in the encoder it is a `Subgraph`, windows included.
    Not fused are the angles (a gather by axis and a product, once for all layers) and what puts patches into windows.
    """
    model = Model(saved(folder, kind))
    vision, language = runtime_kinds(model.compiled[VISION]), runtime_kinds(model.compiled[LANGUAGE])
    mergers = 3 if kind == "qwen3_vl" else 1
    for kinds in (vision, language):
        assert kinds["Softmax"] == kinds["MatMul"] == 0
        assert kinds["RoPE"] == 3 * 2
    assert vision["FullyConnected"] == 1 + 3 * 4 + 2 * mergers
    assert vision["Subgraph"] == 3
    assert vision["RMS" if kind == "qwen2_5_vl" else "MVN"] == 3 * 2 + mergers
    assert language["ScaledDotProductAttention"] == 3
    assert language["MemoryInput"] == language["MemoryOutput"] == 3 * 2
    assert language["FullyConnected"] == 3 * 4 + 1
    assert language["RMS"] == 3 * (4 if kind == "qwen3_vl" else 2) + 1


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 9), (2, 2), (3, 4), (4, 6)])
def test_windows_of_every_shape_are_those_of_transformers(rows: int, cols: int, folder: Path) -> None:
    """Less than one window, a strip, one window, cut windows, whole ones."""
    import torch

    checkpoint = saved(folder, "qwen2_5_vl")
    model, reference = Model(checkpoint), QwenReference(checkpoint)
    values = noise(4 * rows * cols, 3 * 2 * PATCH**2 // 3).reshape(4 * rows * cols, -1) / 128 - 1
    grid = torch.tensor([[1, 2 * rows, 2 * cols]])
    inputs = {"pixel_values": torch.from_numpy(values.astype(np.float32)), "image_grid_thw": grid}
    [view], [[expected]] = reference.views(inputs), reference.features(inputs)
    [found] = model.encode(view)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_windows_take_no_memory_of_the_square_of_the_patches(folder: Path) -> None:
    checkpoint, patches = saved(folder, "qwen2_5_vl"), 4096
    found, weights = read(checkpoint)
    graph, constants = found.graphs[VISION], Constants(weights, upcast=True)
    model = stitch([*partition(graph, constants, PARTITION_WEIGHTS)], graph, VISION)
    shapes = {"pixel_values": [1, patches, 96], "patch_positions": [1, patches, 2]}
    model.reshape({**shapes, "window_index": [1, patches // 4], "window_ids": [1, patches]})
    outputs = [output.get_partial_shape() for node in model.get_ops() for output in node.outputs()]
    known = [shape.to_shape() for shape in outputs if shape.is_static]
    assert patches * 96 in [math.prod(shape) for shape in known]
    assert max(math.prod(shape) for shape in known) < patches**2 // 8


def test_pictures_of_all_sizes_share_one_compiled_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the kernels that it keeps for sizes met before are fewer than OpenVINO would keep."""
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "home"))
    config, options = RuntimeConfig(device="CPU"), ExportOptions(precision="fp32", verify=False)
    vlm = VLM(export(str(saved(folder, "qwen3_vl")), tmp_path / "model", options).folder, config)
    assert config.properties("CPU")["CPU_RUNTIME_CACHE_CAPACITY"] < 1000
    compiled = sorted((tmp_path / "home").rglob("*.blob"))
    assert len(compiled) == 3
    counts = {vlm.generate(noise(side, 40), "?", max_new_tokens=1).image_tokens for side in range(16, 48, 8)}
    assert len(counts) == 4
    assert sorted((tmp_path / "home").rglob("*.blob")) == compiled


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_in_pieces_is_verified(kind: str, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Every output of the encoder, the decoder on three axes, and compression that is calibrated between the pieces."""
    monkeypatch.setattr(native_route, "PARTITION_WEIGHTS", 1000)
    checkpoint = published(folder, kind)
    for precision, least in (("fp32", 1.0), ("int8", 0.8)):
        report = export(checkpoint, tmp_path / precision, ExportOptions(precision, via="native"))
        assert report.verification is not None
        assert report.verification.greedy_agreement >= least
        assert report.verification.parts[VISION].cosine > 0.99


@pytest.mark.parametrize(
    ("kind", "file", "section", "changes", "line"),
    [
        ("qwen2_5_vl", "config.json", "vision_config", {"fullatt_block_indexes": [1, 0]}, "rising indexes of 3 blocks"),
        ("qwen2_5_vl", "config.json", "vision_config", {"fullatt_block_indexes": 1}, "rising indexes of 3 blocks"),
        ("qwen2_5_vl", "config.json", "vision_config", {"fullatt_block_indexes": [0, 1, 2]}, "without windows"),
        ("qwen2_5_vl", "config.json", "vision_config", {"window_size": 7}, "7 is less than an image token's 8"),
        (
            "qwen3_vl",
            "config.json",
            "vision_config",
            {"deepstack_visual_indexes": [0, 3]},
            "rising indexes of 3 blocks",
        ),
        ("qwen3_vl", "config.json", "vision_config", {"num_position_embeddings": 35}, "must be a square, not 35"),
        ("qwen3_vl", "config.json", "vision_config", {"out_hidden_size": 32}, "is 32, and the decoder has 64 channels"),
        ("qwen2_vl", "config.json", "vision_config", {"hidden_size": 32}, "is 32, and the decoder has 64 channels"),
        ("qwen2_vl", "config.json", "vision_config", {"hidden_act": "mish"}, "does not build the activation 'mish'"),
        ("qwen2_vl", "config.json", "vision_config", {"num_heads": 3}, "num_heads 3 does not divide 32"),
        ("qwen2_vl", "config.json", "vision_config", {"num_heads": 16}, "heads of 2 channels cannot be rotated"),
        ("qwen2_vl", "config.json", "vision_config", {"qk_norm": True}, "does not know vision_config.qk_norm (True)"),
        (
            "qwen2_vl",
            "config.json",
            "vision_config",
            {"rope_parameters": {"rope_type": "yarn"}},
            "builds no vision_config.rope_parameters.rope_type 'yarn'",
        ),
        (
            "qwen2_vl",
            "config.json",
            "vision_config",
            {"rope_parameters": {"rope_type": "axial", "factor": 2}},
            "builds no vision_config.rope_parameters.factor",
        ),
        ("qwen2_vl", "config.json", "text_config", {"layer_types": 3}, "must name the types of"),
        ("qwen3_vl", "config.json", "text_config", {"num_hidden_layers": 1}, "more than the decoder's layers"),
        ("qwen3_5", "config.json", "", {"vision_config": None}, "is a text model of Qwen3.5"),
        ("qwen3_5", "config.json", "", {"language_model_only": True}, "is a text model of Qwen3.5"),
        ("qwen3_5", "config.json", "", {"quantization": {"bits": 4}}, "quantized already"),
        ("qwen3_5", "config.json", "vision_config", {"deepstack_visual_indexes": [0]}, "with deepstack_visual_indexes"),
        ("qwen3_5", "config.json", "text_config", {"attn_output_gate": False}, "with attn_output_gate false"),
        ("qwen3_5", "config.json", "text_config", {"output_gate_type": "sigmoid"}, "output_gate_type 'sigmoid'"),
        ("qwen3_5", "config.json", "text_config", {"mamba_ssm_dtype": "float16"}, "in float32, not in 'float16'"),
        ("qwen3_5", "config.json", "text_config", {"mlp_only_layers": [0]}, "as mlp_only_layers [0] asks"),
        ("qwen3_5", "config.json", "text_config", {"layer_types": ["full_attention"]}, "the types of 4 layers"),
        ("qwen3_5", "config.json", "text_config", {"layer_types": ["linear_attention"] * 4}, "all without attention"),
        ("qwen3_5", "config.json", "text_config", {"layer_types": ["mamba"] * 4}, "layers of type mamba"),
        ("qwen3_5", "config.json", "text_config", {"linear_num_value_heads": 3}, "3 value heads cannot share 2 key"),
        ("qwen3_5", "config.json", "text_config", {"linear_conv_kernel_dim": 1}, "with linear_conv_kernel_dim 1"),
        ("qwen3_5", "config.json", "text_config", {"jev_qk_normalization": "x"}, "does not know text_config.jev_qk_"),
        ("qwen3_5", "config.json", "rope", {"partial_rotary_factor": 0.1}, "partial_rotary_factor 0.1 makes no pairs"),
        ("qwen3_5", "config.json", "rope", {"partial_rotary_factor": 0.25}, "three numbers that make 4 together"),
        ("qwen3_vl", "config.json", "rope", {"partial_rotary_factor": 0.5}, "RoPE over a part of each head"),
        ("qwen2_vl", "config.json", "text_config", {"use_sliding_window": True, "sliding_window": 64}, "of 64 tokens"),
        (
            "qwen2_vl",
            "config.json",
            "text_config",
            {"use_sliding_window": True, "max_position_embeddings": 8192},
            "of 4096",
        ),
        ("qwen2_vl", "config.json", "rope", {"mrope_section": [2, 3, 4]}, "three numbers that make 8 together"),
        ("qwen2_vl", "config.json", "rope", {"mrope_section": 8}, "three numbers that make 8 together, not 8"),
        ("qwen2_vl", "config.json", "rope", {"mrope_interleaved": True}, "with mrope_interleaved True"),
        ("qwen3_vl", "config.json", "rope", {"mrope_interleaved": False}, "with mrope_interleaved False"),
        ("qwen3_vl", "config.json", "rope", {"rope_type": "longrope"}, "RoPE of type longrope"),
        (
            "qwen2_vl",
            "config.json",
            "",
            {"vision_start_token_id": 5},
            "<|vision_start|> is 4, vision_start_token_id of",
        ),
        ("qwen2_vl", "config.json", "", {"image_token_id": True}, "image_token_id must be a whole number, not True"),
        ("qwen2_vl", "preprocessor_config.json", "", {"patch_size": 8}, "patch_size of preprocessor_config.json is 8"),
        ("qwen2_vl", "preprocessor_config.json", "", {"merge_size": 4}, "vision_config.spatial_merge_size is 2"),
        ("qwen2_vl", "preprocessor_config.json", "", {"do_resize": False}, "sets do_resize to false"),
        ("qwen2_vl", "preprocessor_config.json", "", {"max_pixels": 64}, "256 pixels or more, and of 64 at most"),
        ("qwen2_vl", "preprocessor_config.json", "", {"size": {"longest_edge": 64}}, "states no size.shortest_edge"),
    ],
)
def test_what_is_not_built_is_refused(
    kind: str, file: str, section: str, changes: dict[str, Any], line: str, folder: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(saved(folder, kind), tmp_path / "checkpoint"))
    content = read_json(checkpoint / file)
    part = content["text_config"]["rope_parameters"] if section == "rope" else content[section] if section else content
    part.update(changes)
    write_json(checkpoint / file, content)
    with pytest.raises(SourceError, match=re.escape(line)):
        read(checkpoint)


@pytest.mark.parametrize(
    ("name", "file", "content", "what"),
    [
        ("Qwen3-VL-Embedding-2B", "", "", "embedding"),
        ("Qwen3-VL-Reranker-2B", "", "", "reranker"),
        ("mine", "modules.json", "[]", "embedding or reranker"),
        ("mine", "1_LogitScore/config.json", "{}", "reranker"),
        ("mine", "1_Pooling/config.json", "{}", "embedding"),
        ("mine", "README.md", "---\ntags: [rerank]\n---\n\n# Qwen3-VL-Reranker-2B\n", "reranker"),
        (
            "mine",
            "additional_chat_templates/reranker.jinja",
            "Judge whether the Document meets the requirements" + TEMPLATE,
            "reranker",
        ),
        (
            "mine",
            "chat_template.jinja",
            "{%- set default = 'Represent the user\\'s input.' -%}" + TEMPLATE,
            "embedding",
        ),
        ("mine", "chat_template.jinja", "Judge whether the Document meets the requirements" + TEMPLATE, "reranker"),
    ],
)
def test_embedding_and_reranker_checkpoints_are_refused(
    name: str, file: str, content: str, what: str, folder: Path, tmp_path: Path
) -> None:
    """Their config.json is that of Qwen3-VL."""
    checkpoint = Path(shutil.copytree(saved(folder, "qwen3_vl"), tmp_path / name))
    if file:
        (checkpoint / file).parent.mkdir(exist_ok=True)
        (checkpoint / file).write_text(content, encoding="utf-8")
    with pytest.raises(SourceError, match=f"{name} is a Qwen3-VL {what} checkpoint, which writes no answers"):
        read(checkpoint)


def test_a_card_that_speaks_of_retrieval_is_that_of_a_model_that_answers(folder: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(saved(folder, "qwen3_vl"), tmp_path / "mine"))
    card = "# Qwen3-VL-2B-Instruct\n\nSee also Qwen3-VL-Embedding and Qwen3-VL-Reranker.\n\n# Qwen3-VL-Reranker\n"
    (checkpoint / "README.md").write_text(card, encoding="utf-8")
    read(checkpoint)


def test_text_keys_that_are_there_twice(folder: Path, tmp_path: Path) -> None:
    """transformers 4.52 to 4.57 write them beside text_config, too; one that differs is not passed over."""
    checkpoint = Path(shutil.copytree(saved(folder, "qwen2_5_vl"), tmp_path / "checkpoint"))
    config = read_json(checkpoint / "config.json")
    config = {**config["text_config"], **config, "sliding_window": 32768}
    write_json(checkpoint / "config.json", config)
    read(checkpoint)
    write_json(checkpoint / "config.json", {**config, "rms_norm_eps": 0.5})
    with pytest.raises(SourceError, match=re.escape("does not know rms_norm_eps (0.5)")):
        read(checkpoint)


_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_FLAT = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 151936, "rms_norm_eps": 1e-6}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Qwen__Qwen2-VL-2B-Instruct": (
        {
            "model_type": "qwen2_vl",
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_attention_heads": 12,
            "num_hidden_layers": 28,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "vision_config": {"hidden_size": 1536, "in_chans": 3, "spatial_patch_size": 14},
            **_FLAT,
        },
        {"min_pixels": 3136, "max_pixels": 12845056, **_CLIP},
    ),
    "Qwen__Qwen2.5-VL-3B-Instruct": (
        {
            "model_type": "qwen2_5_vl",
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048, "tokens_per_second": 2},
            **_FLAT,
        },
        {"min_pixels": 3136, "max_pixels": 12845056, **_CLIP},
    ),
    "Qwen__Qwen3-VL-4B-Instruct": (
        {
            "model_type": "qwen3_vl",
            "text_config": {
                "model_type": "qwen3_vl_text",
                "hidden_size": 2560,
                "intermediate_size": 9728,
                "num_attention_heads": 32,
                "num_hidden_layers": 36,
                "num_key_value_heads": 8,
                "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
                "rope_theta": 5000000,
            },
            "tie_word_embeddings": True,
            "vision_config": {
                "deepstack_visual_indexes": [5, 11, 17],
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "out_hidden_size": 2560,
            },
        },
        {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16, **_HALF},
    ),
    "Qwen__Qwen3.5-0.8B": (
        {
            "model_type": "qwen3_5",
            "text_config": {
                "model_type": "qwen3_5_text",
                "hidden_size": 1024,
                "intermediate_size": 3584,
                "linear_num_value_heads": 16,
                "max_position_embeddings": 262144,
                "num_attention_heads": 8,
                "num_hidden_layers": 24,
                "num_key_value_heads": 2,
                "rope_parameters": {
                    "mrope_interleaved": True,
                    "mrope_section": [11, 11, 10],
                    "rope_type": "default",
                    "rope_theta": 10000000,
                },
            },
            "tie_word_embeddings": True,
            "vision_config": {
                "depth": 12,
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_heads": 12,
                "out_hidden_size": 1024,
            },
        },
        {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16, **_HALF},
    ),
}


def write_published(name: str, folder: Path) -> Path:
    """Write a published checkpoint's files, weights excepted: the real ones where they are at hand, else its facts."""
    config, settings = PUBLISHED[name]
    if found := published_folder(name):
        shutil.copytree(found, folder)
    else:
        folder.mkdir()
        write_json(folder / "config.json", config)
    if not (folder / "preprocessor_config.json").is_file():
        write_json(folder / "preprocessor_config.json", settings)
    return folder


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_and_their_shapes_are_those_of_transformers(name: str, held: bool, tmp_path: Path) -> None:
    """With all layers, and so with the sizes that a config leaves to its class."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder = write_published(name, tmp_path / "checkpoint")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    checkpoint = Checkpoint(folder, folder.name, None, read_json(folder / "config.json"))
    kind = checkpoint.model_type
    wanted = {
        each if held or kind in OF_QWEN3 else published_name(each): tuple(weight.shape)
        for each, weight in model.state_dict().items()
        if each != "lm_head.weight"  # tied
    }
    facts, preprocessor = family_config(checkpoint)
    found = architecture(checkpoint, facts, wanted)
    assert dict(found.shapes) == wanted
    assert overlooked([*found.sections, preprocessor]) == {}
    rope = next(rope for layer in found.decoder.layers if (rope := layer.mixer.rope))
    sections = {"qwen3_vl": ([24, 20, 20], 5e6), "qwen3_5": ([11, 11, 10], 1e7)}
    counts, theta = sections.get(kind, ([16, 24, 24], 1e6))
    assert rope.axes is not None
    assert np.bincount(rope.axes).tolist() == counts
    assert rope.frequencies[1] ** -sum(counts) == pytest.approx(theta, rel=1e-5)
    small = {"qwen2_vl": (3136, None, None), "qwen2_5_vl": (3136, 112, None)}
    assert (facts["min_pixels"], facts.get("window_size"), facts.get("table_side")) == small.get(
        kind, (65536, None, 48)
    )


def published_name(name: str) -> str:
    """Return what a tensor of a class is called in the published files of Qwen2-VL and Qwen2.5-VL."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def test_what_a_config_is_silent_about_is_what_the_class_has() -> None:
    import transformers

    for kind, name in NAMES.items():
        classes = [
            (getattr(transformers, f"{name}Config")(), exporter._DEFAULTS[kind]),
            (getattr(transformers, f"{name}VisionConfig")(), exporter._VISION_DEFAULTS[kind]),
            (transformers.Qwen2VLImageProcessorPil(), exporter._PREPROCESSOR_DEFAULTS),
        ]
        for made, defaults in classes:
            found = {key: getattr(made, key) for key in defaults}
            plain = {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}
            assert plain | ({"size": dict(plain["size"])} if "size" in plain else {}) == defaults
