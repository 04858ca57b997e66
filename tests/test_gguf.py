"""GGUF files for llama.cpp: every tensor of a checkpoint once, turned as llama.cpp wants it, and stored as told."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors import safe_open

from benchmarks.gguf import write
from benchmarks.gguf.idefics3 import by_neighbours
from benchmarks.gguf.qwen import Qwen35
from benchmarks.make_seeded_checkpoint import make_checkpoint, read_shape
from tests.test_seeded_checkpoint import BYTES, SMALL

VOCABULARY = 512


def small_checkpoint(name: str, folder: Path) -> Path:
    """Make a checkpoint with few weights and a short vocabulary."""
    changes = [
        f"{section}.{key}={json.dumps(value)}" for section, given in SMALL[name].items() for key, value in given.items()
    ]
    shape = read_shape(name, [*changes, f"text_config.vocab_size={VOCABULARY}"])
    config, first = shape["files"]["config.json"], shape["first_special_token"]
    if first > VOCABULARY:
        shape["first_special_token"] = len(BYTES.tokens)
        for section in (config, config["text_config"]):
            moved = {
                key: len(BYTES.tokens) + value - first for key, value in section.items() if key.endswith("_token_id")
            }
            section.update(moved)
    make_checkpoint(folder / name, shape, BYTES)
    return folder / name


def expected(checkpoint: Path) -> Iterator[np.ndarray]:
    """Yield the values that the files must hold, in any order."""
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                values = file.get_tensor(name).float().numpy()
                if values.ndim == 5:
                    yield from (values[:, :, 0], values[:, :, 1])
                elif name.endswith("A_log"):
                    yield -np.exp(values)
                elif "qwen3.5" in checkpoint.name and "language_model" in name and name.endswith("norm.weight"):
                    yield values if "linear_attn" in name else values + 1
                else:
                    yield values


def sorted_values(tensors: Iterator[np.ndarray]) -> Counter[bytes]:
    return Counter(np.sort(each.astype(np.float32), axis=None).tobytes() for each in tensors)


def read(folder: Path) -> list[gguf.ReaderTensor]:
    return [tensor for name in ("text", "mmproj") for tensor in gguf.GGUFReader(folder / f"{name}.gguf").tensors]


NAMES = ["granite-docling-258m", "lfm2.5-vl-450m", "paddleocr-vl-0.9b", "qwen3-vl-2b", "qwen3.5-0.8b"]


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_written_once(name: str, tmp_path: Path) -> None:
    checkpoint = small_checkpoint(name, tmp_path)
    write(checkpoint, tmp_path, float32=True)
    tensors = read(tmp_path)
    assert sorted_values(expected(checkpoint)) == sorted_values(each.data for each in tensors)
    assert len({each.name for each in tensors}) == len(tensors)


def test_matrices_of_the_text_part_are_quantized(tmp_path: Path) -> None:
    write(small_checkpoint("lfm2.5-vl-450m", tmp_path), tmp_path)
    kinds = {each.name: each.tensor_type.name for each in read(tmp_path)}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down.weight"] == kinds["blk.0.shortconv.in_proj.weight"] == "Q4_0"
    assert kinds["v.blk.0.ffn_down.weight"] == kinds["v.patch_embd.weight"] == "F16"
    assert kinds["blk.0.shortconv.conv.weight"] == kinds["blk.0.attn_norm.weight"] == kinds["v.blk.0.ln1.bias"] == "F32"


def test_value_heads_are_regrouped_for_broadcasting(tmp_path: Path) -> None:
    config = read_shape("qwen3.5-0.8b")["files"]["config.json"]
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 1}
    config["text_config"] |= {**sizes, "linear_value_head_dim": 2}
    made = Qwen35(tmp_path, config, float32=True)
    heads = np.array([0, 3, 1, 4, 2, 5])
    channels = (2 * heads[:, None] + [0, 1]).ravel()
    assert made.regrouped("A_log", np.arange(6)).tolist() == heads.tolist()
    assert made.regrouped("in_proj_z.weight", np.arange(12)[:, None])[:, 0].tolist() == channels.tolist()
    assert made.regrouped("out_proj.weight", np.arange(12)[None])[0].tolist() == channels.tolist()
    kept = made.regrouped("in_proj_qkv.weight", np.arange(16)[:, None])[:, 0].tolist()
    assert kept == [0, 1, 2, 3, *(4 + channels).tolist()]
    assert made.regrouped("norm.weight", np.arange(2)).tolist() == [0, 1]


def score(query: np.ndarray, key: np.ndarray, *, neighbours: bool) -> float:
    """Return the score of a query at place 5 for a key at place 2, rotated by pairs of neighbours or of halves."""
    angles = np.outer([5, 2], 1e5 ** -np.linspace(0, 1, len(query) // 2, endpoint=False))
    pairs = [each.reshape(-1, 2).T if neighbours else each.reshape(2, -1) for each in (query, key)]
    turned = [(one + 1j * other) * np.exp(1j * angle) for (one, other), angle in zip(pairs, angles, strict=True)]
    return float(np.vdot(*turned).real)


def test_a_head_that_turns_neighbours_scores_as_one_that_turns_halves() -> None:
    width, random = 8, np.random.default_rng(0)
    weights, hidden = random.standard_normal((2, 2 * width, 16)), random.standard_normal((2, 16))
    query, key = ((weight @ each)[width:] for weight, each in zip(weights, hidden, strict=True))
    other = [(by_neighbours(weight, width) @ each)[width:] for weight, each in zip(weights, hidden, strict=True)]
    wanted = score(query, key, neighbours=False)
    assert score(*other, neighbours=True) == pytest.approx(wanted)
    assert score(query, key, neighbours=True) != pytest.approx(wanted, rel=1e-3)
