"""What text models share: a decoder of Llama's kind, and what is read of every config."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgevlm.errors import SourceError
from edgevlm_export.families.base import read_activation
from edgevlm_export.families.text_models.rotation import GLOBAL, LOCAL, MRope, read_rope
from edgevlm_export.graphs.attention import Attention
from edgevlm_export.graphs.decoder import Decoder, GatedMLP, Layer, Mixer
from edgevlm_export.graphs.modules import Embedding, Linear, Norm
from edgevlm_export.graphs.rope import Rope
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError

_WINDOW = 4096
"""Of the classes, where windows slide and no size is stated."""


@dataclass(frozen=True)
class Names:
    """What a checkpoint calls the decoder's weights."""

    prefix: str
    """What they begin with, up to `embed_tokens`."""
    head: str
    """The LM head, or the embedding table that it is tied to."""


def make_decoder(
    text: ConfigReader,
    names: Names,
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    mrope: MRope | None = None,
    partial_rotary: bool = False,
    rope: Rope | None = None,
    act_key: str = "hidden_act",
    make_norm: Callable[[str, int, float], Norm] = Norm,
    gated: bool = False,
    mixers: Mapping[int, Mixer] | None = None,
) -> Decoder:
    """Return Llama's decoder, with biases, norms, RoPE and gates of attention as asked for.

    RoPE is as the config states it where `rope` is None; `partial_rotary` allows it to rotate a part of each head.
    `mixers` are the layers', by index, that have no attention.
    """
    hidden, vocab = text.size("hidden_size"), text.size("vocab_size")
    heads, kv_heads, head_dim = read_heads(text, hidden)
    inner, eps = text.size("intermediate_size"), text.number("rms_norm_eps")
    act = read_activation(text, act_key)
    rotation = rope or read_rope(text, head_dim, mrope, allow_partial=partial_rotary)
    others = mixers or {}

    def attention(at: str) -> Attention:
        q, k, v = (
            Linear(f"{at}.{name}_proj", rows * head_dim, hidden, qkv_bias)
            for name, rows in (("q", heads * (2 if gated else 1)), ("k", kv_heads), ("v", kv_heads))
        )
        q_norm, k_norm = (make_norm(f"{at}.{name}_norm", head_dim, eps) if qk_norm else None for name in "qk")
        o = Linear(f"{at}.o_proj", hidden, heads * head_dim, o_bias)
        return Attention(q, k, v, o, heads, kv_heads, head_dim, rotation, q_norm, k_norm, gated=gated)

    def mlp(at: str) -> GatedMLP:
        gate, up = (Linear(f"{at}.{name}_proj", inner, hidden, mlp_bias) for name in ("gate", "up"))
        return GatedMLP(gate, up, Linear(f"{at}.down_proj", hidden, inner, mlp_bias), act)

    def layer(index: int) -> Layer:
        at = f"{names.prefix}.layers.{index}"
        before, after = (make_norm(f"{at}.{name}_layernorm", hidden, eps) for name in ("input", "post_attention"))
        mixer = others[index] if index in others else attention(f"{at}.self_attn")
        return Layer(at, before, mixer, after, mlp(f"{at}.mlp"))

    layers = tuple(layer(index) for index in range(text.size("num_hidden_layers")))
    table = Embedding(f"{names.prefix}.embed_tokens", vocab, hidden)
    return Decoder(table, layers, make_norm(f"{names.prefix}.norm", hidden, eps), Linear(names.head, vocab, hidden))


def read_heads(text: ConfigReader, hidden: int) -> tuple[int, int, int]:
    """Return heads, key-value heads, and channels of each. Raises `SourceError` where they do not fit together."""
    heads = text.size("num_attention_heads")
    head_dim = text.size("head_dim", hidden // heads)
    kv_heads = text.size("num_key_value_heads", heads)
    if heads % kv_heads or ("head_dim" not in text and hidden % heads) or head_dim % 2:
        raise SourceError(
            f"config.json contradicts itself: {heads} heads and {kv_heads} key-value heads of {head_dim} channels"
        )
    return heads, kv_heads, head_dim


def read_layer_types(text: ConfigReader, known: Sequence[str], usual: Sequence[str]) -> list[str]:
    """Return the type of each layer, one of `known`: as the config states them, or else `usual`.

    Raises `SourceError`, and `UnsupportedError` for another type and where none is attention.
    """
    count, found = text.size("num_hidden_layers"), text.get("layer_types", usual)
    types = found if isinstance(found, list) and all(isinstance(each, str) for each in found) else []
    if other := {*types} - {*known}:
        raise UnsupportedError(f"the native route does not build layers of type {min(other)}")
    if len(types) != count:
        name = text.name_of("layer_types")
        raise SourceError(f"config.json: {name} must name the types of {count} layers, {' or '.join(known)}")
    if not {LOCAL, GLOBAL} & {*types}:
        raise UnsupportedError("the native route builds no decoder whose layers are all without attention")
    return types


def refuse_sliding_windows(text: ConfigReader, *, always: bool) -> None:
    """Raise `UnsupportedError` for a window shorter than the context; `always`: it slides without being told to."""
    window = text.get("sliding_window", _WINDOW)
    text.get("max_window_layers")  # counts only where windows slide
    slides = always or text.flag("use_sliding_window")
    if slides and window and window < text.size("max_position_embeddings"):
        raise UnsupportedError(f"the native route does not build attention over a sliding window of {window} tokens")
    read_layer_types(text, [GLOBAL], [GLOBAL] * text.size("num_hidden_layers"))
