"""Text models: one small reader for each `text_config.model_type`, and what its config class assumes.

A reader turns config.json's `text_config` into a `Decoder`; the table `TEXT_MODELS` names all that there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from edgevlm.errors import SourceError
from edgevlm_export.families.base import read_activation
from edgevlm_export.graphs.attention import Attention
from edgevlm_export.graphs.decoder import Decoder, GatedMLP, Layer, Mixer
from edgevlm_export.graphs.gated_delta_net import GatedDeltaNet
from edgevlm_export.graphs.modules import DepthwiseConvolution, Embedding, Linear, Norm, Tensor
from edgevlm_export.graphs.rope import Rope, interleaved, make_rope, sectioned
from edgevlm_export.graphs.short_conv import ShortConv
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError

_LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
}
_QWEN2 = _LLAMA | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_QWEN2_VL = _LLAMA | {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
    "granite_docling_text": _LLAMA
    | {
        "vocab_size": 133800,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.015625,
        "residual_multiplier": 0.263,
        "logits_scaling": 4.0,
    },
    "gemma3_text": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    "gemma4_text": {
        "vocab_size": 262144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        },
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window": 512,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 256,
        "num_kv_shared_layers": 0,
        "pad_token_id": 0,
    },
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128},
    "qwen2_vl_text": _QWEN2_VL,
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen3_vl_text": _QWEN2
    | {
        "hidden_size": 4096,
        "head_dim": 128,
        "rope_theta": 500000.0,
        "max_position_embeddings": 128000,
    },
    "qwen3_5_text": _LLAMA
    | {
        "vocab_size": 248320,
        "intermediate_size": 12288,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "partial_rotary_factor": 0.25,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    },
    "lfm2": {
        "vocab_size": 65536,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 128000,
        "conv_L_cache": 3,
        "conv_bias": False,
        "block_multiple_of": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": True,
        "tie_word_embeddings": True,
    },
}
"""What the config classes of transformers 5.24 assume where a checkpoint is silent (`models/*/configuration_*.py`; 4.57
assumes the same). Checkpoints saved by transformers 4 are silent about every value that is the class's own."""
_FLAT = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}
"""Families whose config.json may have the text model's keys beside the others, instead of in `text_config`."""
LOCAL, GLOBAL = "sliding_attention", "full_attention"
"""Types of layers, as configs name them."""
_WINDOW = 4096
"""Of the classes, where windows slide and no size is stated."""
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
class Names:
    """What a checkpoint calls the decoder's weights."""

    prefix: str
    """What they begin with, up to `embed_tokens`."""
    head: str
    """The LM head, or the embedding table that it is tied to."""


@dataclass(frozen=True)
class MRope:
    """What a text model assumes of rotary positions on three axes: time, height and width."""

    sections: tuple[int, ...]
    """Pairs of channels of each axis, where the config does not say."""
    interleaved: bool


def text_section(config: ConfigReader, harmless: Collection[str] = (), usual: str = "llama") -> ConfigReader:
    """Return config.json's `text_config` with its class's defaults, none where the class is not known here.

    It is config.json itself where the family has the text model's keys there. `harmless` keys change nothing. `usual`
    is the text model where config.json names none and none is called after the family.
    """
    family = str(config.get("model_type", ""))
    if family in _FLAT and "text_config" not in config:
        return config.assuming(DEFAULTS[_FLAT[family]])
    inner = f"{family}_text" if f"{family}_text" in DEFAULTS else usual
    kind = ConfigReader(config.get("text_config"), "text_config").get("model_type", inner)
    return config.section(
        "text_config", {"model_type": kind, **DEFAULTS.get(_FLAT.get(str(kind), str(kind)), {})}, harmless=harmless
    )


def read_decoder(text: ConfigReader, prefix: str, head: str, *, tied: bool) -> Decoder:
    """Return the decoder of `text_config`; `tied` where the LM head is the embedding table.

    Raises `SourceError`, and `UnsupportedError` for what is not built here.
    """
    model_type = str(text.get("model_type", "llama"))
    if model_type not in TEXT_MODELS:
        known = ", ".join(TEXT_MODELS)
        raise UnsupportedError(f"the native route builds no {model_type!r} decoder; it knows {known}")
    return TEXT_MODELS[model_type](text, Names(prefix, f"{prefix}.embed_tokens" if tied else head))


def read_llama(text: ConfigReader, names: Names) -> Decoder:
    """Full attention; biases where the config asks for them."""
    _refuse_sliding_windows(text, always=False)
    bias = text.flag("attention_bias")
    return make_decoder(text, names, qkv_bias=bias, o_bias=bias, mlp_bias=text.flag("mlp_bias"))


def read_mistral(text: ConfigReader, names: Names) -> Decoder:
    """Llama without biases, whose attention slides wherever `sliding_window` is stated."""
    _refuse_sliding_windows(text, always=True)
    return make_decoder(text, names)


def read_qwen2(text: ConfigReader, names: Names) -> Decoder:
    """Llama with biases of q, k and v; `attention_bias` is not the class's own and changes nothing."""
    _refuse_sliding_windows(text, always=False)
    text.flag("attention_bias")
    return make_decoder(text, names, qkv_bias=True)


def read_qwen3(text: ConfigReader, names: Names) -> Decoder:
    """Llama with RMSNorms over each head of q and k."""
    _refuse_sliding_windows(text, always=False)
    bias = text.flag("attention_bias")
    return make_decoder(text, names, qkv_bias=bias, o_bias=bias, qk_norm=True)


def read_qwen2_vl(text: ConfigReader, names: Names) -> Decoder:
    """Qwen2 with positions on three axes, whose frequencies follow each other."""
    _refuse_sliding_windows(text, always=False)
    return make_decoder(text, names, qkv_bias=True, mrope=MRope((16, 24, 24), interleaved=False))


def read_qwen3_vl(text: ConfigReader, names: Names) -> Decoder:
    """Qwen3 with positions on three axes, whose frequencies alternate."""
    _refuse_sliding_windows(text, always=False)
    bias = text.flag("attention_bias")
    mrope = MRope((24, 20, 20), interleaved=True)
    return make_decoder(text, names, qkv_bias=bias, o_bias=bias, qk_norm=True, mrope=mrope)


def read_granite(text: ConfigReader, names: Names) -> Decoder:
    """Llama with four scalars: of embeddings, of attention scores, of what each mixer and MLP adds, and of logits."""
    _refuse_sliding_windows(text, always=False)
    bias = text.flag("attention_bias")
    plain = make_decoder(text, names, qkv_bias=bias, o_bias=bias, mlp_bias=text.flag("mlp_bias"))
    scale, residual = text.number("attention_multiplier"), text.number("residual_multiplier")
    embedding, logits = text.number("embedding_multiplier"), text.number("logits_scaling")

    def layer(each: Layer) -> Layer:
        assert isinstance(each.mixer, Attention)
        return replace(each, mixer=replace(each.mixer, scale=scale), residual_multiplier=residual)

    layers = tuple(map(layer, plain.layers))
    return replace(plain, layers=layers, embedding_multiplier=embedding, logits_scaling=logits)


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
        for index, kind in enumerate(_read_layer_types(text))
        if kind == "linear_attention"
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


def _read_layer_types(text: ConfigReader) -> list[str]:
    """Return what each layer mixes positions with, some of them with attention. Raises `SourceError`."""
    count, interval = text.size("num_hidden_layers"), text.size("full_attention_interval", 4)
    regular = ["linear_attention" if (index + 1) % interval else "full_attention" for index in range(count)]
    found = text.get("layer_types", regular)
    kinds = found if isinstance(found, list) and all(isinstance(each, str) for each in found) else []
    if other := {*kinds} - {"linear_attention", "full_attention"}:
        raise UnsupportedError(f"the native route does not build layers of type {min(other)}")
    if len(kinds) != count or "full_attention" not in kinds:
        raise SourceError(
            f"config.json: {text.name_of('layer_types')} must be {count} types of layers, full_attention among them"
        )
    return kinds


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


def read_lfm2(text: ConfigReader, names: Names) -> Decoder:
    """Layers of two kinds: short convolutions, and attention with RMSNorms over each head of q and k."""
    hidden, vocab, eps = text.size("hidden_size"), text.size("vocab_size"), text.number("norm_eps")
    heads, kv_heads, head_dim = _heads(text, hidden)
    inner, rope = _lfm2_inner(text), _read_rope(text, head_dim)
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
        mixer = short_conv(f"{at}.conv") if kind == "conv" else attention(f"{at}.self_attn")
        return Layer(at, before, mixer, after, mlp)

    layers = tuple(layer(f"{names.prefix}.layers.{index}", kind) for index, kind in enumerate(_lfm2_kinds(text)))
    table, norm = Embedding(f"{names.prefix}.embed_tokens", vocab, hidden), f"{names.prefix}.embedding_norm"
    return Decoder(table, layers, Norm(norm, hidden, eps), Linear(names.head, vocab, hidden))


def read_gemma3(text: ConfigReader, names: Names) -> Decoder:
    """Llama with norms of each head, of what attention gives and of what the MLP gives, and with scaled embeddings.

    Layers are local, with a sliding window, or global, each kind with a rotation of its own.
    """
    if text.flag("use_bidirectional_attention"):
        raise UnsupportedError("the native route does not build text_config.use_bidirectional_attention")
    bias, make_norm = text.flag("attention_bias"), partial(Norm, unit_offset=True)
    kinds, ropes = read_layer_types(text), read_ropes(text, dict.fromkeys((LOCAL, GLOBAL), text.size("head_dim")))
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


TEXT_MODELS: dict[str, Callable[[ConfigReader, Names], Decoder]] = {
    "gemma3_text": read_gemma3,
    "granite_docling_text": read_granite,
    "llama": read_llama,
    "mistral": read_mistral,
    "qwen2": read_qwen2,
    "qwen3": read_qwen3,
    "qwen2_vl": read_qwen2_vl,
    "qwen2_vl_text": read_qwen2_vl,
    "qwen2_5_vl": read_qwen2_vl,
    "qwen2_5_vl_text": read_qwen2_vl,
    "qwen3_vl_text": read_qwen3_vl,
    "lfm2": read_lfm2,
    "qwen3_5_text": read_qwen3_5,
}


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
    heads, kv_heads, head_dim = _heads(text, hidden)
    inner, eps = text.size("intermediate_size"), text.number("rms_norm_eps")
    act = read_activation(text, act_key)
    rotation = rope or _read_rope(text, head_dim, mrope, allow_partial=partial_rotary)
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


def _heads(text: ConfigReader, hidden: int) -> tuple[int, int, int]:
    """Return heads, key-value heads, and channels of each. Raises `SourceError` where they do not fit together."""
    heads = text.size("num_attention_heads")
    head_dim = text.size("head_dim", hidden // heads)
    kv_heads = text.size("num_key_value_heads", heads)
    if heads % kv_heads or ("head_dim" not in text and hidden % heads) or head_dim % 2:
        raise SourceError(
            f"config.json contradicts itself: {heads} heads and {kv_heads} key-value heads of {head_dim} channels"
        )
    return heads, kv_heads, head_dim


def _lfm2_inner(text: ConfigReader) -> int:
    """Return the channels within an MLP: two thirds of what is stated, rounded up, unless the config says not to."""
    inner = text.size("block_ff_dim", text.size("intermediate_size"))
    multiplier, multiple = text.number("block_ffn_dim_multiplier"), text.size("block_multiple_of")
    if not text.flag("block_auto_adjust_ff_dim"):
        return inner
    return multiple * math.ceil(int(multiplier * int(2 * inner / 3)) / multiple)


def _lfm2_kinds(text: ConfigReader) -> list[str]:
    """Return each layer's kind, `conv` or `full_attention`; without either list all layers are attention."""
    count = text.size("num_hidden_layers")
    kinds, full = text.get("layer_types"), text.get("full_attn_idxs", list(range(count)))
    if kinds is None:
        if not isinstance(full, list):
            raise SourceError(f"config.json: {text.name_of('full_attn_idxs')} must be a list of layers, not {full!r}")
        kinds = ["full_attention" if index in full else "conv" for index in range(count)]
    if not isinstance(kinds, list) or len(kinds) != count:
        raise SourceError(f"config.json: {text.name_of('layer_types')} must name the kinds of {count} layers")
    if unknown := next((kind for kind in kinds if kind not in ("conv", "full_attention")), None):
        raise UnsupportedError(f"the native route builds no layer of the kind {unknown!r}")
    return kinds


def _refuse_sliding_windows(text: ConfigReader, *, always: bool) -> None:
    """Raise `UnsupportedError` for a window shorter than the context; `always`: it slides without being told to."""
    window = text.get("sliding_window", _WINDOW)
    text.get("max_window_layers")  # counts only where windows slide
    slides = always or text.flag("use_sliding_window")
    if slides and window and window < text.size("max_position_embeddings"):
        raise UnsupportedError(f"the native route does not build attention over a sliding window of {window} tokens")
    if other := set(text.get("layer_types", [])) - {"full_attention"}:
        raise UnsupportedError(f"the native route does not build layers of type {min(other)}")


def _read_rope(text: ConfigReader, head_dim: int, mrope: MRope | None = None, *, allow_partial: bool = False) -> Rope:
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
    return replace(_make_rope(text, name, parameters, text.number("rope_theta"), rotary_dim), axes=axes)


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


def read_layer_types(text: ConfigReader) -> list[str]:
    """Return the type of each layer, stated or every so many of them global. Raises `SourceError`."""
    count, pattern = text.size("num_hidden_layers"), text.size("sliding_window_pattern", 6)
    text.get("_sliding_window_pattern")  # transformers 5 saves it beside `layer_types`
    usual = [LOCAL if (index + 1) % pattern else GLOBAL for index in range(count)]
    found = text.get("layer_types", usual)
    kinds = found if isinstance(found, list) else []
    if len(kinds) != count or any(each not in (LOCAL, GLOBAL) for each in kinds):
        raise SourceError(
            f"config.json: text_config.layer_types must be {count} times {LOCAL} or {GLOBAL}, not {found!r}"
        )
    return kinds


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
