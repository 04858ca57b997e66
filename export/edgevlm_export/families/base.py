"""What a family tells the native route, and the decoders that families share."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

from edgevlm.errors import SourceError
from edgevlm.families.base import DecoderTraits
from edgevlm_export.graphs import decoder as decoders
from edgevlm_export.graphs.decoder import Decoder
from edgevlm_export.graphs.layers import ACTIVATIONS, Constants
from edgevlm_export.graphs.rope import Rope, make_rope
from edgevlm_export.graphs.stages import Graph
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError


@dataclass(frozen=True)
class Architecture:
    """A checkpoint's model as graphs."""

    decoder: Decoder
    shapes: Mapping[str, tuple[int, ...]]
    """Every tensor that the config asks for."""
    unused: tuple[str, ...]
    """Tensors that may be there and are not read."""
    vision_graph: Callable[[Constants], Graph]
    sections: tuple[ConfigReader, ...]
    """What of config.json the model was read from."""
    traits: DecoderTraits = field(default_factory=DecoderTraits)
    """What reuse of the decoder's cache has to respect."""

    def graphs(self) -> dict[str, Callable[[Constants], Graph]]:
        """Return what builds each part, by the part's name."""
        from edgevlm.manifest import LANGUAGE, TEXT_EMBEDDINGS, VISION

        return {
            VISION: self.vision_graph,
            TEXT_EMBEDDINGS: lambda constants: decoders.text_embeddings_graph(self.decoder, constants),
            LANGUAGE: lambda constants: decoders.language_graph(self.decoder, constants),
        }


@dataclass(frozen=True)
class FamilyExporter:
    """What a family tells the exporter."""

    family_config: Callable[[Checkpoint], tuple[dict[str, Any], ConfigReader]]
    """Returns what the runtime's family reads, and the image processor's settings as they were read."""
    architecture: Callable[[Checkpoint, Mapping[str, Any], Container[str]], Architecture]
    """Returns the model as graphs, for the native route, of the tensors called so."""
    encode_in_torch: Callable[[Any, Any, Mapping[str, Any]], tuple[Any, dict[str, Any]]] | None = None
    """For the route through optimum-intel, in its child with torch.

    Takes transformers' model, `pixel_values` `(T, 3, H, W)` and the family's constants; returns `image_embeds`
    `(T, tokens, hidden)`, and the keywords under which the model's forward takes them. None where that route does not
    cover the family.
    """
    covers_onnx: bool = True
    """False where the runtime's family needs more of the vision part than an ONNX file's encoder gives."""


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
_TEXT_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN2,
    "qwen3": _QWEN2 | {"head_dim": 128},
}
"""What the config classes of transformers 5.24 assume where a checkpoint is silent (`models/*/configuration_*.py`; 4.57
assumes the same). Checkpoints saved by transformers 4 are silent about every value that is the class's own."""
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


def text_section(config: ConfigReader) -> ConfigReader:
    """Return config.json's `text_config` with its class's defaults, none where the class is not known here."""
    kind = ConfigReader(config.get("text_config"), "text_config").get("model_type", "llama")
    return config.section("text_config", _TEXT_DEFAULTS.get(str(kind)))


def read_decoder(text: ConfigReader, prefix: str, head: str, *, tied: bool) -> Decoder:
    """Return the decoder of `text_config`; `tied` where the head is the embedding table.

    Raises `SourceError`, and `UnsupportedError` for what is not built here.
    """
    kind = str(text.get("model_type", "llama"))
    if kind not in _TEXT_DEFAULTS:
        raise UnsupportedError(f"the native route builds no {kind!r} decoder; it knows {', '.join(_TEXT_DEFAULTS)}")
    hidden = text.size("hidden_size")
    heads = text.size("num_attention_heads")
    head_dim = text.size("head_dim", hidden // heads)
    kv_heads = text.size("num_key_value_heads", heads)
    if heads % kv_heads or ("head_dim" not in text and hidden % heads) or head_dim % 2:
        raise SourceError(
            f"config.json contradicts itself: {heads} heads and {kv_heads} key-value heads of {head_dim} channels"
        )
    _refuse_sliding_windows(text, kind)
    biased = kind != "mistral" and text.flag("attention_bias")
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
        hidden_act=read_activation(text, "hidden_act"),
        rope=_read_rope(text, head_dim),
        qkv_bias=biased or kind == "qwen2",
        o_bias=biased and kind != "qwen2",
        mlp_bias=kind == "llama" and text.flag("mlp_bias"),
        qk_norm=kind == "qwen3",
    )


def is_tied(config: ConfigReader, text: ConfigReader, tensors: Container[str], head: str = "lm_head") -> bool:
    """Tell whether the head is the embedding table: where the checkpoint has no other.

    transformers 4 looks for the flag in text_config and 5 beside it, and 5 overlooks it where both tensors are stored.
    """
    stated = [section.flag("tie_word_embeddings") for section in (config, text) if "tie_word_embeddings" in section]
    tied = f"{head}.weight" not in tensors
    if tied and stated and not any(stated):
        config.note("tie_word_embeddings", f"false, but there is no {head}.weight: the embeddings are the head")
    return tied


def read_vision_sizes(section: ConfigReader) -> dict[str, Any]:
    """Return what every vision transformer states alike, by the names of `VisionTransformer`'s fields.

    Raises `SourceError`, and `UnsupportedError` for an activation that is not built.
    """
    hidden = section.size("hidden_size")
    return {
        "hidden_size": hidden,
        "intermediate_size": section.size("intermediate_size"),
        "num_hidden_layers": section.size("num_hidden_layers"),
        "num_attention_heads": section.heads("num_attention_heads", hidden),
        "num_channels": section.size("num_channels"),
        "layer_norm_eps": section.number("layer_norm_eps"),
        "hidden_act": read_activation(section, "hidden_act"),
    }


def read_activation(section: ConfigReader, key: str) -> str:
    """Return the name of an activation function. Raises `UnsupportedError`."""
    found = section.get(key)
    if found not in ACTIVATIONS:
        raise UnsupportedError(f"the native route does not build the activation {found!r} of {section.name_of(key)}")
    return str(found)


def _refuse_sliding_windows(text: ConfigReader, kind: str) -> None:
    window, _ = text.get("sliding_window"), text.get("max_window_layers")  # the latter counts only where windows slide
    slides = kind == "mistral" or text.flag("use_sliding_window")
    if slides and window and window < text.size("max_position_embeddings"):
        raise UnsupportedError(f"the native route does not build attention over a sliding window of {window} tokens")
    if other := set(text.get("layer_types", [])) - {"full_attention"}:
        raise UnsupportedError(f"the native route does not build layers of type {min(other)}")


def _read_rope(text: ConfigReader, head_dim: int) -> Rope:
    """Return the rotation, stated as transformers 5 does it (`rope_parameters`) or as 4 (`rope_theta`, `rope_scaling`).

    What goes before what follows `RotaryEmbeddingConfigMixin` of transformers 5.24.
    """
    old, new = text.get("rope_scaling"), text.get("rope_parameters")
    stated, name = (old, "rope_scaling") if old else (new or {}, "rope_parameters")
    if not isinstance(stated, Mapping):
        raise SourceError(f"config.json: text_config.{name} is not a JSON object")
    parameters = {key: value for key, value in stated.items() if value is not None}
    if unknown := sorted(parameters.keys() - _ROPE_KEYS):
        raise UnsupportedError(f"the native route does not build RoPE with text_config.{name}.{unknown[0]}")
    if (original := text.get("original_max_position_embeddings")) is not None:
        parameters["original_max_position_embeddings"] = original
    if parameters.get("partial_rotary_factor", text.get("partial_rotary_factor", 1)) != 1:
        raise UnsupportedError("the native route does not build RoPE over a part of each head")
    theta = text.number("rope_theta")
    try:
        theta = float(parameters.get("rope_theta", theta))
        return make_rope(head_dim, theta, parameters, text.size("max_position_embeddings"))
    except NotImplementedError as error:
        raise UnsupportedError(f"the native route does not build RoPE of type {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise SourceError(f"config.json: text_config.{name} is incomplete: {error}") from None
