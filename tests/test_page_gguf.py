"""Checkpoints written for llama.cpp: every tensor once and whole, in the order that its rotary embedding takes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from benchmarks import page_gguf
from benchmarks.qwen_gguf import tensors
from tests.test_seeded_checkpoint import make_small

gguf = pytest.importorskip("gguf")


class Made(NamedTuple):
    """A small checkpoint of a shape, and both files: what they say but for the tokenizer, and their tensors."""

    checkpoint: Path
    folder: Path
    keys: dict[str, Any]
    tensors: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=["granite-docling-258m", "paddleocr-vl-0.9b"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return what is written of each shape, the text part in F32."""
    folder = tmp_path_factory.mktemp(request.param)
    found = Made(folder / "checkpoint", folder, {}, {})
    make_small(request.param, found.checkpoint)
    page_gguf.write(found.checkpoint, folder, quantized=False)
    for name in ("text.gguf", "mmproj.gguf"):
        reader = gguf.GGUFReader(folder / name)
        found.keys.update({k: each.contents() for k, each in reader.fields.items() if not k.startswith("tokenizer.")})
        for each in reader.tensors:
            assert each.name not in found.tensors
            found.tensors[each.name] = gguf.quants.dequantize(each.data, each.tensor_type)
    return found


def test_every_weight_is_there_once(made: Made) -> None:
    wanted = [np.sort(values, axis=None) for _, values in tensors(made.checkpoint, "")]
    held = [np.sort(values, axis=None) for values in made.tensors.values()]
    assert len(held) == len(wanted)
    for values in wanted:
        alike = [each for each in held if each.size == values.size]
        assert any(np.allclose(each, values, rtol=2e-3, atol=1e-6) for each in alike)  # the vision part is F16


def test_the_files_say_what_llama_cpp_asks_for(made: Made) -> None:
    said = made.keys
    tied = made.folder.name.startswith("granite-docling")
    assert ("output.weight" in made.tensors) is not tied
    if tied:
        assert said["llama.rope.freq_base"] == 100000.0
        assert said["clip.projector_type"] == "idefics3"
        assert said["clip.vision.projector.scale_factor"] == 4
    else:
        assert said["paddleocr.rope.freq_base"] == 500000.0
        assert said["paddleocr.rope.dimension_sections"] == [16, 24, 24, 0]
        assert said["paddleocr.attention.key_length"] == 128
        assert said["clip.projector_type"] == "paddleocr"
        assert said["clip.vision.image_max_pixels"] == 2359296
    assert (made.folder / "chat_template.jinja").read_bytes() == (made.checkpoint / "chat_template.jinja").read_bytes()


def scores(q: np.ndarray, k: np.ndarray, width: int, adjacent: bool) -> np.ndarray:
    """Return the score of a query at place 5 for a key at place 2, both rotated by pairs of neighbours or of halves."""
    angles = np.outer([5, 2], 1e5 ** (-np.arange(width // 2) / (width // 2)))
    pairs = [each.reshape(-1, 2) if adjacent else each.reshape(2, -1).T for each in (q, k)]
    turned = [(pair[:, 0] + 1j * pair[:, 1]) * np.exp(1j * angle) for pair, angle in zip(pairs, angles, strict=True)]
    return np.vdot(turned[0], turned[1]).real


@pytest.mark.parametrize("made", ["granite-docling-258m"], indirect=True)
def test_a_llama_turns_neighbours_and_scores_as_transformers_which_turns_halves(made: Made) -> None:
    own = {part.removeprefix("model.text_model."): values for part, values in tensors(made.checkpoint, "")}
    hidden = np.random.default_rng(0).standard_normal((2, 128), np.float32)
    width = 64
    q, k = (own[f"layers.0.self_attn.{part}_proj.weight"] @ x for part, x in zip("qk", hidden, strict=True))
    other_q, other_k = (made.tensors[f"blk.0.attn_{part}.weight"] @ x for part, x in zip("qk", hidden, strict=True))
    wanted = scores(q[:width], k[:width], width, adjacent=False)
    assert scores(other_q[:width], other_k[:width], width, adjacent=True) == pytest.approx(wanted, rel=1e-4)
    assert scores(q[:width], k[:width], width, adjacent=True) != pytest.approx(wanted, rel=1e-2)


def test_another_family_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}', encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["page_gguf", str(tmp_path), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="is llava: there are idefics3, paddleocr_vl"):
        page_gguf.main()
