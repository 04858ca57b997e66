"""What a family tells the native route, and reading a config without trusting it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgevlm.errors import SourceError
from edgevlm_export.graphs import decoder as decoders
from edgevlm_export.graphs.blocks import Graph
from edgevlm_export.graphs.decoder import Decoder
from edgevlm_export.graphs.layers import ACTIVATIONS, Constants
from edgevlm_export.graphs.rope import make_rope


class UncoveredError(SourceError):
    """The checkpoint asks for something that the native route does not build; optimum-intel may."""


@dataclass(frozen=True)
class Architecture:
    """A checkpoint's model as graphs."""

    decoder: Decoder
    shapes: Mapping[str, tuple[int, ...]]
    """Every tensor that the config asks for."""
    unused: tuple[str, ...]
    """Tensors that may be there and are not read."""
    vision_graph: Callable[[Constants], Graph]

    def graphs(self) -> dict[str, Callable[[Constants], Graph]]:
        """Return what builds each part, by the part's name."""
        from edgevlm.manifest import LANGUAGE, TEXT_EMBEDDINGS, VISION

        return {
            VISION: self.vision_graph,
            TEXT_EMBEDDINGS: lambda constants: decoders.text_embeddings_graph(self.decoder, constants),
            LANGUAGE: lambda constants: decoders.language_graph(self.decoder, constants),
        }


class Section:
    """One object of config.json, read with the defaults that transformers has for it."""

    def __init__(self, config: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> None:
        stated = config.get(name, {}) if name else config
        if not isinstance(stated, Mapping):
            raise SourceError(f"config.json: {name} is not a JSON object")
        self._name = f"{name}." if name else ""
        self._values = {**defaults, **{key: value for key, value in stated.items() if value is not None}}

    def get(self, key: str) -> Any:
        """Return a value, None where there is neither one nor a default."""
        return self._values.get(key)

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive whole number. Raises `SourceError`."""
        value = self._values.get(key, default)
        if value is None:
            raise SourceError(f"config.json states no {self._name}{key}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SourceError(f"config.json: {self._name}{key} must be a positive whole number, not {value!r}")
        return value

    def number(self, key: str) -> float:
        """Return a number above 0. Raises `SourceError`."""
        value = self._values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise SourceError(f"config.json: {self._name}{key} must be a number above 0, not {value!r}")
        return float(value)

    def activation(self, key: str) -> str:
        """Return the name of an activation function. Raises `UncoveredError`."""
        value = self._values.get(key)
        if value not in ACTIVATIONS:
            raise UncoveredError(f"the native route does not build the activation {value!r} of {self._name}{key}")
        return str(value)

    def heads(self, key: str, channels: int) -> int:
        """Return a number of heads that divides the channels. Raises `SourceError`."""
        heads = self.size(key)
        if channels % heads:
            raise SourceError(f"config.json contradicts itself: {self._name}{key} {heads} does not divide {channels}")
        return heads


_LLAMA = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
}
_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32},
    "qwen2": _LLAMA | {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": _LLAMA | {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
}
"""What transformers' config classes assume where a checkpoint is silent; sizes it must state itself."""


def read_decoder(config: Mapping[str, Any], prefix: str, head: str) -> Decoder:
    """Return the decoder of `text_config`. Raises `SourceError`, and `UncoveredError` for what is not built here."""
    kind = str(Section(config, "text_config", {"model_type": "llama"}).get("model_type"))
    if kind not in _TEXT_DEFAULTS:
        raise UncoveredError(f"the native route builds no {kind!r} decoder; it knows {', '.join(_TEXT_DEFAULTS)}")
    text = Section(config, "text_config", _TEXT_DEFAULTS[kind])
    hidden = text.size("hidden_size")
    heads = text.size("num_attention_heads")
    head_dim = text.size("head_dim", hidden // heads)
    kv_heads = text.size("num_key_value_heads", heads)
    if heads % kv_heads or (text.get("head_dim") is None and hidden % heads) or head_dim % 2:
        raise SourceError(
            f"config.json contradicts itself: {heads} heads and {kv_heads} key-value heads of {head_dim} channels"
        )
    _refuse_what_is_not_built(text, kind)
    try:
        context_length = text.size("max_position_embeddings")
        rope = make_rope(head_dim, text.number("rope_theta"), text.get("rope_scaling"), context_length)
    except NotImplementedError as error:
        raise UncoveredError(f"the native route does not build RoPE of type {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"config.json: text_config.rope_scaling is incomplete: {error}") from None
    tied = bool(text.get("tie_word_embeddings"))
    biased = bool(text.get("attention_bias"))
    return Decoder(
        prefix=prefix,
        head=f"{prefix}.embed_tokens" if tied else head,
        vocab_size=text.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=text.size("intermediate_size"),
        num_hidden_layers=text.size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=text.number("rms_norm_eps"),
        hidden_act=text.activation("hidden_act"),
        rope=rope,
        qkv_bias=biased or kind == "qwen2",
        o_bias=biased and kind != "qwen2",
        mlp_bias=bool(text.get("mlp_bias")) and kind == "llama",
        qk_norm=kind == "qwen3",
    )


def _refuse_what_is_not_built(text: Section, kind: str) -> None:
    window = text.get("sliding_window")
    slides = kind == "mistral" or text.get("use_sliding_window")
    if slides and window and window < text.size("max_position_embeddings"):
        raise UncoveredError(f"the native route does not build attention over a sliding window of {window} tokens")
    if text.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UncoveredError("the native route does not build RoPE over a part of each head")
