"""What a family tells the exporter, and what families read alike."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from edgevlm.errors import OptionError, SourceError
from edgevlm.families.base import DecoderTraits
from edgevlm.manifest import LANGUAGE, TEXT_EMBEDDINGS, VISION
from edgevlm_export.graphs.decoder import Decoder, language_graph, text_embeddings_graph
from edgevlm_export.graphs.layers import ACTIVATIONS
from edgevlm_export.graphs.stages import Graph
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError


@dataclass(frozen=True)
class Architecture:
    """A checkpoint's model as graphs."""

    decoder: Decoder
    vision: Graph
    unused: tuple[str, ...]
    """Tensors that may be there and are not read, by name or pattern (`mtp.*`)."""
    sections: tuple[ConfigReader, ...]
    """What of config.json the model was read from."""
    traits: DecoderTraits = field(default_factory=DecoderTraits)
    """What reuse of the decoder's cache has to respect."""
    merged_vision: Callable[[float], Graph] | None = None
    """Returns the vision submodel with that share of a view's tokens merged; None where views differ in size."""
    reference_vision: Graph | None = None
    """The vision submodel without merging, which the verification compares with; None where `vision` is that."""

    @cached_property
    def graphs(self) -> dict[str, Graph]:
        """The submodels by name."""
        return {
            VISION: self.vision,
            TEXT_EMBEDDINGS: text_embeddings_graph(self.decoder),
            LANGUAGE: language_graph(self.decoder),
        }

    @property
    def decoder_traits(self) -> DecoderTraits:
        """The family's traits, and the sliding windows of its decoder."""
        window, layers = self.decoder.sliding_window, self.decoder.sliding_layers
        return replace(self.traits, sliding_window=window, sliding_layers=layers)

    def with_merged_tokens(self, ratio: float, kind: str) -> Architecture:
        """Return it with that share of the vision encoder's tokens merged, itself for 0; `kind` names its family.

        Raises `OptionError`.
        """
        if not ratio:
            return self
        if self.merged_vision is None:
            raise OptionError(f"--merge-tokens needs views of one size, and those of {kind} differ; leave it out")
        return replace(self, vision=self.merged_vision(ratio), reference_vision=self.vision)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the graphs read."""
        return {name: shape for graph in self.graphs.values() for name, shape in graph.tensors().items()}


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
    """False where the runtime's family needs more of the vision submodel than an ONNX file's encoder gives."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Parts of tensors' names in published files, with those that transformers 5 has for them in memory: an adapter may
    have either."""


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
    """Return the name of an activation function. Raises `UnsupportedError` for one that no graph has."""
    found = section.get(key)
    if found not in ACTIVATIONS:
        raise UnsupportedError(f"the native route does not build the activation {found!r} of {section.name_of(key)}")
    return str(found)


def read_side(section: ConfigReader, key: str) -> int:
    """Return the one side of a size that is stated as one number or as two. Raises `SourceError`."""
    found = section.get(key)
    sides = found if isinstance(found, list) else [found]
    if any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides) or len({*sides}) != 1:
        raise SourceError(f"{section.file}: {section.name_of(key)} must be the side of a square, not {found!r}")
    return int(sides[0])


def read_axial_theta(vision: ConfigReader) -> float:
    """Return the base of the rotation by row and column; transformers takes its type `default` for `axial`.

    Raises `UnsupportedError` for another type.
    """
    rope = vision.section("rope_parameters", {"rope_theta": 10000.0})
    kind, theta = rope.get("rope_type", rope.get("type", "axial")), rope.number("rope_theta")
    if kind not in ("axial", "default"):
        raise UnsupportedError(f"the native route builds no {rope.name_of('rope_type')} {kind!r}")
    if other := next(rope.unread(), None):
        raise UnsupportedError(f"the native route builds no {other[1]}")
    return theta


def read_layer_indexes(section: ConfigReader, key: str, count: int) -> list[int]:
    """Return the indexes of some of `count` layers, which must rise. Raises `SourceError`."""
    found = section.get(key)
    numbers = found if isinstance(found, list) else [None]
    is_whole = all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < count for each in numbers)
    if not is_whole or sorted({*numbers}) != numbers:
        raise SourceError(
            f"config.json: {section.name_of(key)} must be rising indexes of {count} blocks, not {found!r}"
        )
    return numbers
