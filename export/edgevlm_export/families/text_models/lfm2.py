"""LFM2: short convolutions, and attention in some layers."""

from __future__ import annotations

import math

from edgevlm.errors import SourceError
from edgevlm_export.families.text_models.common import Names, read_heads, read_layer_types
from edgevlm_export.families.text_models.rotation import GLOBAL, read_rope
from edgevlm_export.graphs.attention import Attention
from edgevlm_export.graphs.decoder import Decoder, GatedMLP, Layer
from edgevlm_export.graphs.modules import DepthwiseConvolution, Embedding, Linear, Norm
from edgevlm_export.graphs.short_conv import ShortConv
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError

_SHORT_CONV = "conv"


def read_lfm2(text: ConfigReader, names: Names) -> Decoder:
    """Layers of two kinds: short convolutions, and attention with RMSNorms over each head of q and k."""
    hidden, vocab, eps = text.size("hidden_size"), text.size("vocab_size"), text.number("norm_eps")
    heads, kv_heads, head_dim = read_heads(text, hidden)
    inner, rope = _lfm2_inner(text), read_rope(text, head_dim)
    bias, places = text.flag("conv_bias"), text.size("conv_L_cache")
    text.get("tie_embedding")  # another name of `tie_word_embeddings`
    if places < 2:
        raise UnsupportedError(f"the native route builds no convolution of {text.name_of('conv_L_cache')} {places}")

    def attention(at: str) -> Attention:
        q, k, v = (
            Linear(f"{at}.{name}_proj", rows * head_dim, hidden)
            for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q_norm, k_norm = (Norm(f"{at}.{name}_layernorm", head_dim, eps) for name in "qk")
        o = Linear(f"{at}.out_proj", hidden, heads * head_dim)
        return Attention(q, k, v, o, heads, kv_heads, head_dim, rope, q_norm, k_norm)

    def short_conv(at: str) -> ShortConv:
        conv = DepthwiseConvolution(f"{at}.conv", hidden, places, bias)
        return ShortConv(
            Linear(f"{at}.in_proj", 3 * hidden, hidden, bias), conv, Linear(f"{at}.out_proj", hidden, hidden, bias)
        )

    def layer(at: str, kind: str) -> Layer:
        before, after = (Norm(f"{at}.{name}_norm", hidden, eps) for name in ("operator", "ffn"))
        gate, up = (Linear(f"{at}.feed_forward.{name}", inner, hidden) for name in ("w1", "w3"))
        mlp = GatedMLP(gate, up, Linear(f"{at}.feed_forward.w2", hidden, inner), "silu")
        mixer = short_conv(f"{at}.conv") if kind == _SHORT_CONV else attention(f"{at}.self_attn")
        return Layer(at, before, mixer, after, mlp)

    layers = tuple(layer(f"{names.prefix}.layers.{index}", kind) for index, kind in enumerate(_layer_types(text)))
    table, norm = Embedding(f"{names.prefix}.embed_tokens", vocab, hidden), f"{names.prefix}.embedding_norm"
    return Decoder(table, layers, Norm(norm, hidden, eps), Linear(names.head, vocab, hidden))


def _lfm2_inner(text: ConfigReader) -> int:
    """Return the channels within an MLP: two thirds of what is stated, rounded up, unless the config says not to."""
    inner = text.size("block_ff_dim", text.size("intermediate_size"))
    multiplier, multiple = text.number("block_ffn_dim_multiplier"), text.size("block_multiple_of")
    if not text.flag("block_auto_adjust_ff_dim"):
        return inner
    return multiple * math.ceil(int(multiplier * int(2 * inner / 3)) / multiple)


def _layer_types(text: ConfigReader) -> list[str]:
    """Return the type of each layer; without either list all are attention. Raises as `read_layer_types` does."""
    layers = range(text.size("num_hidden_layers"))
    full = text.get("full_attn_idxs", list(layers))
    if not isinstance(full, list):
        raise SourceError(f"config.json: {text.name_of('full_attn_idxs')} must be a list of layers, not {full!r}")
    return read_layer_types(text, (_SHORT_CONV, GLOBAL), [GLOBAL if index in full else _SHORT_CONV for index in layers])
