"""Text models of attention and gated MLPs alone."""

from __future__ import annotations

from dataclasses import replace

from edgevlm_export.families.text_models.common import Names, make_decoder, refuse_sliding_windows
from edgevlm_export.families.text_models.rotation import MRope
from edgevlm_export.graphs.attention import Attention
from edgevlm_export.graphs.decoder import Decoder, Layer
from edgevlm_export.graphs.modules import Linear
from edgevlm_export.source.config_reader import ConfigReader


def read_llama(text: ConfigReader, names: Names) -> Decoder:
    """Full attention; biases where the config asks for them."""
    refuse_sliding_windows(text, always=False)
    bias = text.flag("attention_bias")
    return make_decoder(text, names, qkv_bias=bias, o_bias=bias, mlp_bias=text.flag("mlp_bias"))


def read_mistral(text: ConfigReader, names: Names) -> Decoder:
    """Llama without biases, whose attention slides wherever `sliding_window` is stated."""
    refuse_sliding_windows(text, always=True)
    return make_decoder(text, names)


def read_qwen2(text: ConfigReader, names: Names) -> Decoder:
    """Llama with biases of q, k and v; `attention_bias` is not the class's own and changes nothing."""
    refuse_sliding_windows(text, always=False)
    text.flag("attention_bias")
    return make_decoder(text, names, qkv_bias=True)


def read_qwen3(text: ConfigReader, names: Names) -> Decoder:
    """Llama with RMSNorms over each head of q and k."""
    refuse_sliding_windows(text, always=False)
    bias = text.flag("attention_bias")
    return make_decoder(text, names, qkv_bias=bias, o_bias=bias, qk_norm=True)


def read_qwen2_vl(text: ConfigReader, names: Names) -> Decoder:
    """Qwen2 with positions on three axes, whose frequencies follow each other."""
    refuse_sliding_windows(text, always=False)
    return make_decoder(text, names, qkv_bias=True, mrope=MRope((16, 24, 24), interleaved=False))


def read_paddleocr_vl(text: ConfigReader, names: Names) -> Decoder:
    """ERNIE 4.5 with the positions of Qwen2-VL; `use_bias` gives every `Linear` a bias."""
    refuse_sliding_windows(text, always=False)
    bias = text.flag("use_bias")
    mrope = MRope((16, 24, 24), interleaved=False)
    return make_decoder(text, names, qkv_bias=bias, o_bias=bias, mlp_bias=bias, mrope=mrope)


def read_glm_ocr(text: ConfigReader, names: Names) -> Decoder:
    """Llama with norms behind attention and MLP, too, gate and up in one module, and positions on three axes."""
    refuse_sliding_windows(text, always=False)
    decoder = make_decoder(text, names, mrope=MRope((8, 12, 12), False, adjacent=True), partial_rotary=True)
    return replace(decoder, layers=tuple(_with_post_norms(layer) for layer in decoder.layers))


def _with_post_norms(layer: Layer) -> Layer:
    """Return a layer of GLM-OCR."""
    mlp, norm = layer.mlp, layer.input_norm
    gate_up = Linear(f"{layer.name}.mlp.gate_up_proj", 2 * mlp.gate_proj.rows, mlp.gate_proj.columns)
    after_mixer, after_mlp = (
        replace(norm, name=f"{layer.name}.post_{name}_layernorm") for name in ("self_attn", "mlp")
    )
    mlp = replace(mlp, gate_proj=gate_up, up_proj=None)
    return replace(layer, mlp=mlp, mixer_output_norm=after_mixer, mlp_output_norm=after_mlp)


def read_qwen3_vl(text: ConfigReader, names: Names) -> Decoder:
    """Qwen3 with positions on three axes, whose frequencies alternate."""
    refuse_sliding_windows(text, always=False)
    bias = text.flag("attention_bias")
    mrope = MRope((24, 20, 20), interleaved=True)
    return make_decoder(text, names, qkv_bias=bias, o_bias=bias, qk_norm=True, mrope=mrope)


def read_granite(text: ConfigReader, names: Names) -> Decoder:
    """Llama with four scalars: of embeddings, of attention scores, of what each mixer and MLP adds, and of logits."""
    refuse_sliding_windows(text, always=False)
    bias = text.flag("attention_bias")
    plain = make_decoder(text, names, qkv_bias=bias, o_bias=bias, mlp_bias=text.flag("mlp_bias"))
    scale, residual = text.number("attention_multiplier"), text.number("residual_multiplier")
    embedding, logits = text.number("embedding_multiplier"), text.number("logits_scaling")

    def layer(each: Layer) -> Layer:
        assert isinstance(each.mixer, Attention)
        return replace(each, mixer=replace(each.mixer, scale=scale), residual_multiplier=residual)

    layers = tuple(map(layer, plain.layers))
    return replace(plain, layers=layers, embedding_multiplier=embedding, logits_scaling=logits)
