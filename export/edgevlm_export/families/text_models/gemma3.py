"""Gemma 3: layers with a sliding window and without, each with two norms more."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from edgevlm_export.families.text_models.common import Names, make_decoder, read_layer_types
from edgevlm_export.families.text_models.rotation import GLOBAL, LOCAL, read_ropes
from edgevlm_export.graphs.attention import Attention
from edgevlm_export.graphs.decoder import Decoder, Layer
from edgevlm_export.graphs.modules import Norm
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError


def read_gemma3(text: ConfigReader, names: Names) -> Decoder:
    """Llama with norms of each head, of what attention gives and of what the MLP gives, and with scaled embeddings.

    Layers are local, with a sliding window, or global, each kind with a rotation of its own.
    """
    if text.flag("use_bidirectional_attention"):
        raise UnsupportedError("the native route does not build text_config.use_bidirectional_attention")
    bias, make_norm = text.flag("attention_bias"), partial(Norm, unit_offset=True)
    kinds, ropes = layer_types(text), read_ropes(text, dict.fromkeys((LOCAL, GLOBAL), text.size("head_dim")))
    plain = make_decoder(
        text,
        names,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        act_key="hidden_activation",
        rope=ropes[GLOBAL],
        make_norm=make_norm,
    )
    window, scale = text.size("sliding_window"), text.number("query_pre_attn_scalar") ** -0.5

    def layer(each: Layer, kind: str) -> Layer:
        assert isinstance(each.mixer, Attention)
        mixer = replace(each.mixer, rope=ropes[kind], scale=scale, window=window if kind == LOCAL else None)
        before, after = (
            replace(each.mlp_norm, name=f"{each.name}.{place}_feedforward_layernorm") for place in ("pre", "post")
        )
        return replace(each, mixer=mixer, mixer_output_norm=each.mlp_norm, mlp_norm=before, mlp_output_norm=after)

    table = replace(plain.embed_tokens, scale=plain.hidden_size**0.5)
    layers = tuple(layer(each, kind) for each, kind in zip(plain.layers, kinds, strict=True))
    return replace(plain, embed_tokens=table, layers=layers)


def layer_types(text: ConfigReader) -> list[str]:
    """Return the type of each layer: the last of every few is global. Raises as `read_layer_types` does."""
    count, pattern = text.size("num_hidden_layers"), text.size("sliding_window_pattern", 6)
    text.get("_sliding_window_pattern")  # transformers 5 saves it beside `layer_types`
    usual = [LOCAL if (index + 1) % pattern else GLOBAL for index in range(count)]
    return read_layer_types(text, (LOCAL, GLOBAL), usual)
