"""Gemma 4 (E2B, E4B) without sound: the facts about preprocessing and prompt that the runtime needs, and graphs."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from edgevlm.errors import SourceError
from edgevlm.families.base import DecoderTraits
from edgevlm_export.families.base import Architecture, FamilyExporter, is_tied, read_activation
from edgevlm_export.families.preprocessing import check_always_done, read_arithmetic, read_image_token_id
from edgevlm_export.families.text_models import Names, text_section
from edgevlm_export.families.text_models.gemma4 import read_gemma4
from edgevlm_export.graphs.attention import ReusingAttention
from edgevlm_export.graphs.gemma4_vit import Block, ClippedLinear, Gemma4ViT, vision_stages
from edgevlm_export.graphs.modules import Linear, Norm, Tensor
from edgevlm_export.graphs.stages import Graph
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError

# What transformers' Gemma4Config, Gemma4VisionConfig and Gemma4ImageProcessor assume where the checkpoint is silent:
# models/gemma4/ of transformers 5.24.
_DEFAULTS: dict[str, Any] = {"image_token_id": 258880, "boi_token_id": 255999, "eoi_token_id": 258882}
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "pooling_kernel_size": 3,
    "patch_size": 16,
    "position_embedding_size": 10240,
    "use_clipped_linears": False,
    "standardize": False,
}
_PREPROCESSOR_DEFAULTS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": False,
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "max_soft_tokens": 280,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.0, 0.0, 0.0],
    "image_std": [1.0, 1.0, 1.0],
}
_HARMLESS = ("audio_config", "audio_token_id", "boa_token_id", "eoa_token_id", "eoa_token_index", "video_token_id")
"""Of sound and videos, which are left out."""
_VISION_HARMLESS = ("default_output_length", "global_head_dim", "max_position_embeddings", "num_global_key_value_heads")
_TOKENS = {"boi": "<|image>", "eoi": "<image|>", "image": "<|image|>"}


def family_config(checkpoint: Checkpoint) -> tuple[dict[str, Any], ConfigReader]:
    """Return the facts that `edgevlm.families.gemma4` reads, and the image processor's settings as they were read.

    Raises `SourceError` where they do not fit together.
    """
    preprocessor = checkpoint.image_processor(
        _PREPROCESSOR_DEFAULTS, ("image_processor_type", "image_seq_length", "data_format", "size", "default_to_square")
    )
    if preprocessor.flag("do_normalize"):
        raise SourceError(f"{preprocessor.file} sets do_normalize to true, which edgevlm does not support")
    check_always_done(preprocessor, ("do_convert_rgb", "do_resize", "do_rescale"))
    vision = checkpoint.section("vision_config", _VISION_DEFAULTS)
    sizes = {}
    for name in ("patch_size", "pooling_kernel_size"):
        sizes[name] = preprocessor.size(name)
        if sizes[name] != vision.size(name):
            raise SourceError(
                f"the checkpoint contradicts itself: {name} of {preprocessor.file} is {sizes[name]},"
                f" {vision.name_of(name)} is {vision.size(name)}"
            )
    most = preprocessor.size("max_soft_tokens")
    if most * sizes["pooling_kernel_size"] > vision.size("position_embedding_size"):
        raise SourceError(
            f"the checkpoint contradicts itself: a row of max_soft_tokens {most} has more patches than the"
            f" {vision.size('position_embedding_size')} that {vision.name_of('position_embedding_size')} places"
        )
    facts = {
        **_tokens(checkpoint),
        "preprocessing": {**sizes, "max_soft_tokens": most, **read_arithmetic(preprocessor)},
    }
    return facts, preprocessor


def _tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the tokens of an image block are called, and the ids of the image token and of padding."""
    config, facts = checkpoint.section("", _DEFAULTS), dict[str, Any]()
    for name, usual in _TOKENS.items():
        key, token = f"{name}_token_id", checkpoint.named_tokens.get(f"{name}_token", usual)
        token_id = read_image_token_id(checkpoint, config.get(key), key)
        if (held := checkpoint.added_tokens.get(token, {}).get("id", token_id)) != token_id:
            raise SourceError(f"the checkpoint contradicts itself: {token} is {held}, {key} of config.json {token_id}")
        facts |= {f"{name}_token": token, key: token_id}
    padding = text_section(checkpoint.section("")).get("pad_token_id", 0)
    return {**facts, "pad_token_id": padding}


def architecture(checkpoint: Checkpoint, facts: Mapping[str, Any], tensors: Container[str]) -> Architecture:  # noqa: ARG001
    """Return the model's graphs. Raises `SourceError`, and `UnsupportedError` for what is not built here."""
    config = checkpoint.section("", _DEFAULTS, harmless=(*_HARMLESS, *_DEFAULTS))
    text = text_section(config)
    if text.get("model_type") != "gemma4_text":
        raise UnsupportedError(f"the native route builds no Gemma 4 of a {text.get('model_type')!r} decoder")
    seen = config.section("vision_config", _VISION_DEFAULTS, harmless=_VISION_HARMLESS)
    at, tied = "model.language_model", is_tied(config, text, tensors)
    decoder = read_gemma4(text, Names(at, f"{at}.embed_tokens" if tied else "lm_head"))
    vision = _VisionReader(seen).read(decoder.hidden_size)
    graph = Graph(vision.inputs, vision_stages(vision), "image_embeds", "image_embeds")
    reusing = [layer.name for layer in decoder.layers if isinstance(layer.mixer, ReusingAttention)]
    unused = [f"{name}.self_attn.{each}.*" for name in reusing for each in ("k_proj", "v_proj", "k_norm", "v_norm")]
    traits = DecoderTraits(atomic_images=True)  # which keeps it out of paged attention: that knows no windows
    others = ("model.audio_tower.*", "model.embed_audio.*", *unused)
    return Architecture(decoder, graph, others, (config, text, seen), traits)


class _VisionReader:
    """Reads `vision_config` of one checkpoint."""

    def __init__(self, section: ConfigReader) -> None:
        self.section, self.prefix = section, "model.vision_tower"
        self.hidden, self.inner = section.size("hidden_size"), section.size("intermediate_size")
        self.heads, self.kv_heads = section.size("num_attention_heads"), section.size("num_key_value_heads")
        self.head_dim, self.eps = section.size("head_dim"), section.number("rms_norm_eps")
        self.clipped = section.flag("use_clipped_linears")
        if self.head_dim % 4 or self.heads != self.kv_heads:
            raise UnsupportedError(
                f"the native route builds no vision transformer of {self.heads} heads and {self.kv_heads} key-value"
                f" heads of {self.head_dim} channels"
            )

    def read(self, width: int) -> Gemma4ViT:
        """Return the vision submodel, which projects to `width` channels."""
        section, prefix = self.section, self.prefix
        if section.flag("attention_bias"):
            raise UnsupportedError(f"the native route does not build {section.name_of('attention_bias')}")
        patch, places = section.size("patch_size"), section.size("position_embedding_size")
        standard = tuple(Tensor(f"{prefix}.std_{name}", (self.hidden,)) for name in ("bias", "scale"))
        return Gemma4ViT(
            Linear(f"{prefix}.patch_embedder.input_proj", self.hidden, 3 * patch**2),
            Tensor(f"{prefix}.patch_embedder.position_embedding_table", (2, places, self.hidden)),
            tuple(self._block(f"{prefix}.encoder.layers.{n}") for n in range(section.size("num_hidden_layers"))),
            self.heads,
            self.kv_heads,
            self.head_dim,
            self._theta(),
            read_activation(section, "hidden_activation"),
            section.size("pooling_kernel_size"),
            (standard[0], standard[1]) if section.flag("standardize") else None,
            Norm("model.embed_vision.embedding_pre_projection_norm", self.hidden, self.eps, scaled=False),
            Linear("model.embed_vision.embedding_projection", width, self.hidden),
        )

    def _theta(self) -> float:
        """Return the base of the rotation by column and row, which files call axial or default."""
        rope = self.section.section("rope_parameters", {"rope_theta": 100.0})
        kind, theta = rope.get("rope_type", "axial"), rope.number("rope_theta")
        if kind not in ("axial", "default"):
            raise UnsupportedError(f"the native route builds no {rope.name_of('rope_type')} {kind!r}")
        if other := next(rope.unread(), None):
            raise UnsupportedError(f"the native route builds no {other[1]}")
        return theta

    def _linear(self, name: str, rows: int, columns: int) -> ClippedLinear:
        return ClippedLinear(name, rows, columns, self.clipped)

    def _norm(self, name: str, size: int, *, scaled: bool = True) -> Norm:
        return Norm(name, size, self.eps, scaled=scaled)

    def _block(self, at: str) -> Block:
        hidden, inner, head_dim = self.hidden, self.inner, self.head_dim
        own, shared = self.heads * head_dim, self.kv_heads * head_dim
        names = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        first, second, third, fourth = (self._norm(f"{at}.{name}_layernorm", hidden) for name in names)
        return Block(
            at,
            (first, second, third, fourth),
            self._linear(f"{at}.self_attn.q_proj", own, hidden),
            self._linear(f"{at}.self_attn.k_proj", shared, hidden),
            self._linear(f"{at}.self_attn.v_proj", shared, hidden),
            self._linear(f"{at}.self_attn.o_proj", hidden, own),
            (
                self._norm(f"{at}.self_attn.q_norm", head_dim),
                self._norm(f"{at}.self_attn.k_norm", head_dim),
                self._norm(f"{at}.self_attn.v_norm", head_dim, scaled=False),
            ),
            self._linear(f"{at}.mlp.gate_proj", inner, hidden),
            self._linear(f"{at}.mlp.up_proj", inner, hidden),
            self._linear(f"{at}.mlp.down_proj", hidden, inner),
        )


EXPORTER = FamilyExporter(family_config, architecture, covers_onnx=False)
