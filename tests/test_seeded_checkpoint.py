"""Seeded checkpoints with published shapes: as many weights as published, and an export that answers."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from benchmarks.make_checkpoint import BPE
from benchmarks.make_seeded_checkpoint import SHAPES, make_checkpoint, read_shape, small_files, tensor_shapes
from edgevlm import VLM
from edgevlm_export import ExportOptions, export
from tests.conftest import F32

BYTES = BPE(sorted(pre_tokenizers.ByteLevel.alphabet()), [], [])
SMALL = {
    "gemma-3-4b": {
        "text_config": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    },
    "gemma-4-e4b": {
        "text_config": {
            "hidden_size": 32,
            "hidden_size_per_layer_input": 4,
            "intermediate_size": 32,
            "num_hidden_layers": 12,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 1,
            "head_dim": 16,
            "global_head_dim": 32,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
    },
    "granite-docling-258m": {
        "text_config": {
            "hidden_size": 128,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    },
    "granite-docling-500m": {
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "deepstack_visual_indexes": [0, 1, 2],
            "out_hidden_size": 64,
        },
    },
    "lfm2.5-vl-450m": {
        "text_config": {
            "hidden_size": 64,
            "block_ff_dim": 96,
            "num_hidden_layers": 2,
            "layer_types": ["conv", "full_attention"],
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    },
    "internvl3-1b": {
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    },
    "paddleocr-vl-0.9b": {
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
        },
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    },
    "qwen3-vl-2b": {
        "text_config": {
            "hidden_size": 128,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
        },
        "vision_config": {
            "depth": 3,
            "deepstack_visual_indexes": [0, 1, 2],
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 128,
        },
    },
    "qwen3.5-0.8b": {
        "text_config": {
            "head_dim": 128,
            "hidden_size": 64,
            "intermediate_size": 64,
            "linear_key_head_dim": 16,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "linear_value_head_dim": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [6, 5, 5],
                "partial_rotary_factor": 0.25,
                "rope_theta": 10000000,
                "rope_type": "default",
            },
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 64,
        },
    },
}
"""Changes of config.json that leave the vocabulary, the picture's tokens and the structure as they are."""


WEIGHTS = {
    "gemma-3-4b": 4300e6,
    "gemma-4-e4b": 7632e6,
    "granite-docling-258m": 258e6,
    "granite-docling-500m": 528e6,
    "internvl3-1b": 938e6,
    "lfm2.5-vl-450m": 449e6,
    "paddleocr-vl-0.9b": 904e6,
    "qwen3-vl-2b": 2127e6,
    "qwen3.5-0.8b": 853e6,
}


@pytest.mark.parametrize(("name", "weights"), WEIGHTS.items())
def test_a_shape_has_as_many_weights_as_the_model(name: str, weights: float, tmp_path: Path) -> None:
    shape = read_shape(name)
    for file, content in small_files(shape).items():
        (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    assert sum(map(prod, tensor_shapes(tmp_path, shape).values())) == pytest.approx(weights, rel=0.002)


@pytest.mark.parametrize("name", SHAPES)
def test_a_small_one_is_exported_and_answers(name: str, tmp_path: Path) -> None:
    changes = [
        f"{section}.{key}={json.dumps(value)}" for section, given in SMALL[name].items() for key, value in given.items()
    ]
    make_checkpoint(tmp_path / "checkpoint", read_shape(name, changes), BYTES)
    folder = export(tmp_path / "checkpoint", tmp_path / "export", ExportOptions("fp32", verify=False)).folder
    vlm = VLM(folder, F32)
    answer = vlm.generate(None, "What?", max_new_tokens=2)
    assert answer.generated_tokens >= 1
    picture = Path(__file__).parents[1] / "examples"
    shown = vlm.generate(next(picture.glob("*.png")), "What?", max_new_tokens=2, detail="low")
    assert shown.image_tokens >= (15 if name == "gemma-4-e4b" else 64)  # it does not enlarge a small picture


def test_a_change_of_what_is_not_there_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"config.json of internvl3-1b has no text_config\.layers"):
        read_shape("internvl3-1b", ["text_config.layers=3"])
