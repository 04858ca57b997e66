"""Rotary positions, as configs state them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgevlm.errors import SourceError
from edgevlm_export.graphs.rope import Rope, interleaved, make_rope, sectioned
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError

LOCAL, GLOBAL = "sliding_attention", "full_attention"
"""Types of layers, as configs name them."""
_ROPE_KEYS = frozenset(
    [
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
        "partial_rotary_factor",
    ]
)


@dataclass(frozen=True)
class MRope:
    """What a text model assumes of rotary positions on three axes: time, height and width."""

    sections: tuple[int, ...]
    """Pairs of channels of each axis, where the config does not say."""
    interleaved: bool
    adjacent: bool = False
    """Whether a pair of channels is two side by side."""


def read_rope(text: ConfigReader, head_dim: int, mrope: MRope | None = None, *, allow_partial: bool = False) -> Rope:
    """Return the rotation, stated as transformers 5 does it (`rope_parameters`) or as 4 (`rope_theta`, `rope_scaling`).

    What goes before what follows `RotaryEmbeddingConfigMixin` of transformers 5.24. Raises `UnsupportedError` for a
    rotation of a part of each head, unless `allow_partial`.
    """
    old, new = text.get("rope_scaling"), text.get("rope_parameters")
    stated, name = (old, "rope_scaling") if old else (new or {}, "rope_parameters")
    if not isinstance(stated, Mapping):
        raise SourceError(f"config.json: text_config.{name} is not a JSON object")
    parameters = {key: value for key, value in stated.items() if value is not None}
    rotary_dim = _rotary_dim(text, parameters, head_dim, allow_partial=allow_partial)
    axes = _read_axes(parameters, mrope, rotary_dim) if mrope else None
    rope = _make_rope(text, name, parameters, text.number("rope_theta"), rotary_dim)
    return replace(rope, axes=axes, adjacent=mrope is not None and mrope.adjacent)


def read_ropes(text: ConfigReader, head_dims: Mapping[str, int]) -> dict[str, Rope]:
    """Return the rotation of each type of layers, whose heads have so many channels, as transformers 5 or 4 states it.

    The one has `rope_parameters` of each type. The other has `rope_theta` and `rope_scaling`, of global layers alone,
    and `rope_local_base_freq`. `Gemma3TextConfig` of transformers 5.24 reads both, in this order.
    """
    scaling, stated = text.section("rope_scaling"), text.section("rope_parameters")
    ropes = {}
    for kind, base in ((GLOBAL, "rope_theta"), (LOCAL, "rope_local_base_freq")):
        parameters = stated.section(kind).stated | (scaling.stated if kind == GLOBAL else {})
        if parameters.get("rope_type") != "proportional":
            _rotary_dim(text, parameters, head_dims[kind], allow_partial=False)
        rope = _make_rope(text, f"rope_parameters.{kind}", parameters, text.number(base), head_dims[kind])
        ropes[kind] = replace(rope, name=kind)
    if other := next(stated.unread(), None):
        raise UnsupportedError(f"the native route does not build {other[1]}")
    return ropes


def _make_rope(text: ConfigReader, name: str, parameters: dict[str, Any], theta: float, head_dim: int) -> Rope:
    """Return the rotation of these parameters, which stand at `name`; `theta` is the base where they have none.

    `head_dim` channels of each head are rotated.
    """
    if unknown := sorted(parameters.keys() - _ROPE_KEYS):
        raise UnsupportedError(f"the native route does not build RoPE with text_config.{name}.{unknown[0]}")
    if (original := text.get("original_max_position_embeddings")) is not None:
        parameters["original_max_position_embeddings"] = original
    try:
        theta = float(parameters.get("rope_theta", theta))
        return make_rope(head_dim, theta, parameters, text.size("max_position_embeddings"))
    except NotImplementedError as error:
        raise UnsupportedError(f"the native route does not build RoPE of type {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise SourceError(f"config.json: text_config.{name} is incomplete: {error}") from None


def _rotary_dim(text: ConfigReader, parameters: Mapping[str, Any], head_dim: int, *, allow_partial: bool) -> int:
    """Return how many channels of each head are rotated. Raises `SourceError`, `UnsupportedError` for not all."""
    factor = parameters.get("partial_rotary_factor", text.get("partial_rotary_factor", 1))
    if factor == 1:
        return head_dim
    if not allow_partial:
        raise UnsupportedError("the native route does not build RoPE over a part of each head")
    is_share = isinstance(factor, int | float) and not isinstance(factor, bool) and 0 < factor < 1
    rotary_dim = int(head_dim * factor) if is_share else 0
    if rotary_dim < 2 or rotary_dim % 2:
        raise SourceError(
            f"config.json: partial_rotary_factor {factor!r} makes no pairs of channels of heads that have {head_dim}"
        )
    return rotary_dim


def _read_axes(parameters: dict[str, Any], mrope: MRope, rotary_dim: int) -> tuple[int, ...]:
    """Return the axis of each pair of channels, and take what `parameters` say of it out of them.

    The type `mrope` of older checkpoints is the default one, as in `Qwen2VLTextConfig` of transformers 5.24.
    """
    sections = parameters.pop("mrope_section", list(mrope.sections))
    if parameters.pop("mrope_interleaved", mrope.interleaved) != mrope.interleaved:
        raise UnsupportedError(
            f"the native route does not build this text model with mrope_interleaved {not mrope.interleaved}"
        )
    counts = sections if isinstance(sections, list) else []
    is_whole = all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in counts)
    if len(counts) != 3 or not is_whole or sum(counts) != rotary_dim // 2:
        raise SourceError(
            f"config.json: mrope_section must be three numbers that make {rotary_dim // 2} together, not {sections!r}"
        )
    for key in ("rope_type", "type"):
        if parameters.get(key) == "mrope":
            parameters[key] = "default"
    return interleaved(counts) if mrope.interleaved else sectioned(counts)
