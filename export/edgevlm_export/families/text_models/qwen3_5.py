"""Qwen3.5: gated delta nets, and attention in every few layers."""

from __future__ import annotations

from functools import partial

from edgevlm.errors import SourceError
from edgevlm_export.families.base import read_activation
from edgevlm_export.families.text_models.common import Names, make_decoder, read_layer_types
from edgevlm_export.families.text_models.rotation import GLOBAL, MRope
from edgevlm_export.graphs.decoder import Decoder
from edgevlm_export.graphs.gated_delta_net import GatedDeltaNet
from edgevlm_export.graphs.modules import DepthwiseConvolution, Linear, Norm, Tensor
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError

_DELTA_NET = "linear_attention"


def read_qwen3_5(text: ConfigReader, names: Names) -> Decoder:
    """Gated delta nets, and in every few layers attention that rotates a part of each head and gates its output.

    All norms multiply by 1 + weight, but those of the delta nets.
    """
    if not text.flag("attn_output_gate", True):
        raise UnsupportedError("the native route does not build this text model with attn_output_gate false")
    gate, dtype = text.get("output_gate_type", "swish"), text.get("mamba_ssm_dtype", "float32")
    if gate not in ("swish", "silu"):
        raise UnsupportedError(f"the native route does not build a delta net with output_gate_type {gate!r}")
    if dtype != "float32":
        raise UnsupportedError(f"the native route keeps a delta net's state in float32, not in {dtype!r}")
    if others := text.get("mlp_only_layers"):
        raise UnsupportedError(f"the native route builds no layers without attention, as mlp_only_layers {others} asks")
    bias = text.flag("attention_bias")
    mixers = {
        index: _read_delta_net(text, f"{names.prefix}.layers.{index}.linear_attn")
        for index, kind in enumerate(_layer_types(text))
        if kind == _DELTA_NET
    }
    mrope = MRope((11, 11, 10), interleaved=True)
    return make_decoder(
        text,
        names,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        mrope=mrope,
        partial_rotary=True,
        gated=True,
        make_norm=partial(Norm, unit_offset=True),
        mixers=mixers,
    )


def _layer_types(text: ConfigReader) -> list[str]:
    """Return the type of each layer: attention in the last of every few. Raises as `read_layer_types` does."""
    count, interval = text.size("num_hidden_layers"), text.size("full_attention_interval", 4)
    usual = [GLOBAL if (index + 1) % interval == 0 else _DELTA_NET for index in range(count)]
    return read_layer_types(text, (_DELTA_NET, GLOBAL), usual)


def _read_delta_net(text: ConfigReader, at: str) -> GatedDeltaNet:
    """Return the delta net whose weights begin with `at`. Raises `SourceError` and `UnsupportedError`."""
    hidden, kernel = text.size("hidden_size"), text.size("linear_conv_kernel_dim")
    k_heads, v_heads = text.size("linear_num_key_heads"), text.size("linear_num_value_heads")
    k_dim, v_dim = text.size("linear_key_head_dim"), text.size("linear_value_head_dim")
    if v_heads % k_heads:
        raise SourceError(f"config.json contradicts itself: {v_heads} value heads cannot share {k_heads} key heads")
    if kernel < 2:
        raise UnsupportedError(f"the native route does not build a delta net with linear_conv_kernel_dim {kernel}")
    channels, values = 2 * k_heads * k_dim + v_heads * v_dim, v_heads * v_dim
    qkv, z, b, a = (
        Linear(f"{at}.in_proj_{name}", rows, hidden)
        for name, rows in (("qkv", channels), ("z", values), ("b", v_heads), ("a", v_heads))
    )
    return GatedDeltaNet(
        qkv,
        z,
        b,
        a,
        DepthwiseConvolution(f"{at}.conv1d", channels, kernel),
        Tensor(f"{at}.dt_bias", (v_heads,)),
        Tensor(f"{at}.A_log", (v_heads,)),
        Norm(f"{at}.norm", v_dim, text.number("rms_norm_eps")),
        Linear(f"{at}.out_proj", hidden, values),
        k_heads,
        v_heads,
        k_dim,
        v_dim,
        read_activation(text, "hidden_act"),
    )
