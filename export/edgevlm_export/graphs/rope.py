"""Rotary position embeddings (https://arxiv.org/abs/2104.09864) and the ways to stretch them.

The frequencies follow transformers' `modeling_rope_utils` (5.24): default, linear, dynamic, llama3, yarn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Output
from edgevlm_export.graphs.layers import split

if TYPE_CHECKING:
    import openvino as ov

Frequencies = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rope:
    """Angle per position of each pair of channels, and what cosine and sine are multiplied by."""

    frequencies: Frequencies  # (rotary_dim / 2,)
    scale: float = 1.0
    axes: tuple[int, ...] | None = None
    """Which axis of the positions turns each pair of channels, `(rotary_dim / 2,)`; None where there is one axis."""
    name: str = ""
    """Tells the rotations of one decoder apart, where its layers differ in them."""
    adjacent: bool = False
    """A pair is two channels side by side, instead of one of each half of those that are rotated."""

    @property
    def names(self) -> tuple[str, str]:
        """What the values of its cosines and sines are called."""
        return (f"cos.{self.name}", f"sin.{self.name}") if self.name else ("cos", "sin")

    @property
    def rotary_dim(self) -> int:
        """How many of a head's channels are rotated, from the first on."""
        return 2 * len(self.frequencies)


def make_rope(rotary_dim: int, theta: float, scaling: Mapping[str, Any] | None, context_length: int) -> Rope:
    """Return the rotation of `rotary_dim` channels that `theta` and `rope_scaling` (or `rope_parameters`) ask for.

    Raises `KeyError` for a value that `scaling` lacks, and `NotImplementedError` naming an unknown type.
    """
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    frequencies = (1 / np.float32(theta) ** exponents).astype(np.float32)
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("default", "dynamic"):  # the latter stretches beyond the context only, where no prompt goes
        return Rope(frequencies)
    if kind == "linear":
        return Rope(frequencies / np.float32(scaling["factor"]))
    if kind == "proportional":
        return Rope(_proportional(frequencies, scaling))
    if kind == "llama3":
        return Rope(_llama3(frequencies, scaling, context_length))
    if kind == "yarn":
        return _yarn(frequencies, rotary_dim, theta, scaling, context_length)
    raise NotImplementedError(str(kind))


def _proportional(frequencies: Frequencies, scaling: Mapping[str, Any]) -> Frequencies:
    """The first pairs of channels turn, `partial_rotary_factor` of all, and the others stand still."""
    turning = int(scaling.get("partial_rotary_factor", 1.0) * 2 * len(frequencies) // 2)
    kept = np.where(np.arange(len(frequencies)) < turning, frequencies, np.float32(0))
    return np.asarray(kept / np.float32(scaling.get("factor", 1.0)), np.float32)


def _llama3(frequencies: Frequencies, scaling: Mapping[str, Any], context_length: int) -> Frequencies:
    """Slow waves are stretched by `factor`, fast ones are not, those between in part."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling.get("original_max_position_embeddings", context_length) * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray((1 - kept) * frequencies / scaling["factor"] + kept * frequencies, np.float32)


def _yarn(
    frequencies: Frequencies, rotary_dim: int, theta: float, scaling: Mapping[str, Any], context_length: int
) -> Rope:
    """https://arxiv.org/abs/2309.00071: as above over channels, and attention made sharper."""
    original = scaling.get("original_max_position_embeddings") or context_length
    factor = scaling.get("factor") or context_length / original

    def channel(turns: float) -> float:
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.get("beta_fast") or 32), channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = np.clip((np.arange(rotary_dim // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    stretched = frequencies / factor * ramp + frequencies * (1 - ramp)
    scale = scaling.get("attention_factor")
    if scale is None:
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        scale = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor)
    return Rope(stretched.astype(np.float32), float(scale))


def _mscale(factor: float, mscale: float = 1) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def sectioned(sections: Sequence[int]) -> tuple[int, ...]:
    """Return the axis of each frequency of Qwen2-VL's M-RoPE (https://arxiv.org/abs/2409.12191): axis after axis.

    `sections` says how many frequencies each axis has.
    """
    return tuple(axis for axis, count in enumerate(sections) for _ in range(count))


def interleaved(sections: Sequence[int]) -> tuple[int, ...]:
    """Return the axis of each frequency of Qwen3-VL's M-RoPE (https://arxiv.org/abs/2511.21631): t, h, w, t, h, w, …

    Each axis but the first has every third frequency, as many as its section says; the first has all others.
    """
    axes = np.zeros(sum(sections), np.int64)
    for axis in range(1, len(sections)):
        axes[axis : len(sections) * sections[axis] : len(sections)] = axis
    return tuple(axes.tolist())


def rotations(position_ids: Output, rope: Rope) -> tuple[ov.Node, ov.Node]:
    """Return cosine and sine `(B, 1, S, rotary_dim)` of int64 position ids `(B, S)`, of several axes `(axes, B, S)`."""
    opset = import_openvino().opset13
    if rope.axes is None:
        positions = opset.unsqueeze(position_ids, np.array([1, 3]))
    else:
        each = opset.gather(position_ids, np.array(rope.axes), np.int64(0))  # (rotary_dim / 2, B, S)
        positions = opset.unsqueeze(opset.transpose(each, np.array([1, 2, 0])), np.array([1]))
    positions = opset.convert(positions, "f32")
    angles = opset.multiply(positions, rope.frequencies.reshape(1, 1, 1, -1))
    angles = opset.concat([angles, angles], -1)
    cos, sin = opset.cos(angles), opset.sin(angles)
    if rope.scale == 1:
        return cos, sin
    return opset.multiply(cos, np.float32(rope.scale)), opset.multiply(sin, np.float32(rope.scale))


def halved(x: Output, head_dim: int, rotary_dim: int) -> ov.Node:
    """Return `(B, H, S, head_dim)` with the pairs of channels that are side by side apart, as `rotate` takes them.

    Done to q and k alike, it changes no score.
    """
    opset = import_openvino().opset13
    if rotary_dim < head_dim:
        rotated, kept = split(x, [rotary_dim, head_dim - rotary_dim])
        return opset.concat([halved(rotated, rotary_dim, rotary_dim), kept], -1)
    pairs = opset.reshape(x, np.array([0, 0, 0, head_dim // 2, 2]), special_zero=True)
    pairs = opset.transpose(pairs, np.array([0, 1, 2, 4, 3]))
    return opset.reshape(pairs, np.array([0, 0, 0, head_dim]), special_zero=True)


def rotate(x: Output, cos: Output, sin: Output, head_dim: int, rotary_dim: int | None = None) -> ov.Node:
    """x * cos + rotate_half(x) * sin, for x `(B, H, S, head_dim)`; of the first `rotary_dim` channels, where given."""
    opset = import_openvino().opset13
    if rotary_dim is not None and rotary_dim < head_dim:
        rotated, kept = split(x, [rotary_dim, head_dim - rotary_dim])
        return opset.concat([rotate(rotated, cos, sin, rotary_dim), kept], -1)
    half, end = np.array([head_dim // 2]), np.array([np.iinfo(np.int64).max])
    start, step, axis = np.array([0]), np.array([1]), np.array([3])
    second = opset.multiply(opset.slice(x, half, end, step, axis), np.float32(-1))
    turned = opset.concat([second, opset.slice(x, start, half, step, axis)], -1)
    return opset.add(opset.multiply(x, cos), opset.multiply(turned, sin))
