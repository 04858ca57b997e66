"""LLaVA (1.5 and interleave): the facts about preprocessing and prompt that the runtime needs, and the model's graphs.

What LLaVA's younger relatives share with it is here, too: the vision tower, the projector, and the names of weights.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgevlm.errors import SourceError
from edgevlm.runtime.core import import_openvino
from edgevlm_export.families.base import Architecture, FamilyExporter, is_tied, read_activation, read_vision_sizes
from edgevlm_export.families.preprocessing import check_always_done, read_arithmetic, read_image_token_id
from edgevlm_export.families.text_models import read_decoder, text_section
from edgevlm_export.graphs.constants import Constants
from edgevlm_export.graphs.layers import activation, linear, repeated
from edgevlm_export.graphs.modules import Linear, Tensor
from edgevlm_export.graphs.stages import Graph, Stage, Values
from edgevlm_export.graphs.token_merging import merged_tokens
from edgevlm_export.graphs.tower import Tower, tower_stages, unused
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError

# What transformers' classes assume where the checkpoint is silent: models/llava/, models/clip/ and models/siglip/ of
# transformers 5.24.
DEFAULTS: dict[str, Any] = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
}
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
STEPS = dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"), True)
_CLIP_PROCESSOR: dict[str, Any] = {
    **STEPS,
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_pad": False,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
_PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP_PROCESSOR,
    "LlavaImageProcessor": _CLIP_PROCESSOR,
    "SiglipImageProcessor": _CLIP_PROCESSOR
    | {
        "size": {"height": 224, "width": 224},
        "crop_size": None,
        "do_center_crop": False,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}
_TOWER: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
}
_TOWERS: dict[str, dict[str, Any]] = {
    "clip_vision_model": _TOWER | {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "siglip_vision_model": _TOWER | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
}
HARMLESS = ("ignore_index", "image_seq_length", "vocab_size")
"""Of training, and what follows from the sizes."""
PROCESSOR_HARMLESS = ("image_processor_type", "default_to_square", "data_format", "input_data_format")
_TOWER_HARMLESS = ("initializer_factor", "projection_dim", "vision_use_head", "vocab_size")
"""How training began, and what comes after the last layer, or in the text half of CLIP."""


def family_config(checkpoint: Checkpoint) -> tuple[dict[str, Any], ConfigReader]:
    """Return the facts that `edgevlm.families.llava` reads, and the image processor's settings as they were read.

    Raises `SourceError` where they do not fit together.
    """
    kind = str(checkpoint.image_processor({}, ()).get("image_processor_type", "LlavaImageProcessor"))
    kind = kind.removesuffix("Fast").removesuffix("Pil")
    if kind not in _PROCESSORS:
        raise SourceError(f"edgevlm does not know the image processor {kind}; it knows {', '.join(_PROCESSORS)}")
    preprocessor = checkpoint.image_processor(_PROCESSORS[kind], PROCESSOR_HARMLESS)
    check_always_done(preprocessor)
    side, shortest_edge = _view(preprocessor, pads=kind == "LlavaImageProcessor")
    config = checkpoint.section("", DEFAULTS)
    tower = read_tower(config)
    if side != tower.image_size:
        raise SourceError(
            f"the checkpoint contradicts itself: the image processor makes views of {side} pixels a side,"
            f" vision_config.image_size is {tower.image_size}"
        )
    facts = {
        **image_token(checkpoint, config),
        "image_seq_len": _image_seq_len(checkpoint, config, tower),
        "preprocessing": {
            "side": side,
            "shortest_edge": shortest_edge,
            "pad": kind == "LlavaImageProcessor" and preprocessor.flag("do_pad"),
            **read_arithmetic(preprocessor),
        },
    }
    return facts, preprocessor


def image_token(checkpoint: Checkpoint, config: ConfigReader) -> dict[str, Any]:
    """Return what the image token is called, by the tokenizer or else by the processor, and its id."""
    stated = checkpoint.read("processor_config.json").get("image_token", "<image>")
    key = "image_token_id" if "image_token_id" in config else "image_token_index"
    return {
        "image_token": checkpoint.named_tokens.get("image_token", stated),
        "image_token_id": read_image_token_id(checkpoint, config.get(key), key),
    }


def _view(preprocessor: ConfigReader, *, pads: bool) -> tuple[int, int | None]:
    """Return a view's side, and the shorter side that a picture is resized to before it is cropped to that."""
    size, crop = _sides(preprocessor, "size"), _sides(preprocessor, "crop_size")
    shortest_edge = size.get("shortest_edge")
    if preprocessor.flag("do_center_crop"):
        side, height = crop.get("height"), crop.get("width")
    else:
        square = shortest_edge if pads and preprocessor.flag("do_pad") else size.get("height")
        side, height, shortest_edge = square, square if shortest_edge else size.get("width"), None
    if not side or side != height or (shortest_edge or side) < side or size.get("height", side) != side:
        raise SourceError(f"{preprocessor.file}: size and crop_size make no square view of every picture")
    return side, shortest_edge


def _sides(preprocessor: ConfigReader, name: str) -> dict[str, int]:
    """Return what `size` or `crop_size` states; a number alone is the shorter side of one, both sides of the other."""
    stated = preprocessor.get(name)
    if isinstance(stated, int):
        return {"shortest_edge": stated} if name == "size" else {"height": stated, "width": stated}
    section = preprocessor.section(name)
    return {key: section.size(key) for key in ("shortest_edge", "height", "width") if key in section}


def _image_seq_len(checkpoint: Checkpoint, config: ConfigReader, tower: Tower) -> int:
    """Return the image tokens of a picture: what the tower gives, without the class token."""
    dropped = int(_drops_first(config))
    stated = checkpoint.read("processor_config.json")
    names = ("patch_size", "num_additional_image_tokens", "vision_feature_select_strategy")
    patch_size, additional, strategy = (stated.get(name) for name in names)
    if isinstance(patch_size, int) and isinstance(additional, int) and strategy:
        said = (tower.image_size // patch_size) ** 2 + additional - int(strategy == "default")
        if said != tower.positions - dropped:
            raise SourceError(
                f"the checkpoint contradicts itself: processor_config.json makes {said} image tokens of a picture,"
                f" config.json {tower.positions - dropped}"
            )
    return tower.positions - dropped


def _drops_first(config: ConfigReader) -> bool:
    strategy = config.get("vision_feature_select_strategy")
    if strategy not in ("default", "full"):
        raise SourceError(f"config.json: vision_feature_select_strategy must be default or full, not {strategy!r}")
    return bool(strategy == "default")


def architecture(checkpoint: Checkpoint, facts: Mapping[str, Any], tensors: Container[str]) -> Architecture:  # noqa: ARG001
    """Return the model's graphs. Raises `SourceError`, and `UnsupportedError` for what is not built here."""
    return make_architecture(checkpoint.section("", DEFAULTS, harmless=HARMLESS), tensors)


def make_architecture(config: ConfigReader, tensors: Container[str], *, has_newline: bool = False) -> Architecture:
    """Return the graphs of tower, projector and decoder.

    `has_newline`: the checkpoint has an `image_newline`, and the vision submodel gives it as the last row of each view,
    so that the runtime needs no weights of its own.
    """
    names, text = Names.found(tensors), text_section(config)
    decoder = read_decoder(text, names.decoder, names.head, tied=is_tied(config, text, tensors, names.head))
    seen = tower_section(config)
    tower = make_tower(seen, config.get("vision_feature_layer"), names.tower)
    first, biased = int(_drops_first(config)), config.flag("multimodal_projector_bias")
    act = read_activation(config, "projector_hidden_act")
    for name in ("image_token_index", "image_token_id"):
        config.get(name)
    hidden = decoder.hidden_size
    linear_1 = Linear(f"{names.projector}.linear_1", hidden, tower.hidden_size, biased)
    linear_2 = Linear(f"{names.projector}.linear_2", hidden, hidden, biased)
    newline = Tensor(names.newline, (hidden,)) if has_newline else None

    def connect(values: Values, constants: Constants) -> None:
        opset = import_openvino().opset13
        x, axis = values["hidden_states"], np.array([1])
        if first:
            x = opset.slice(x, axis, np.array([tower.positions]), axis, axis)
        x = linear(activation(linear(x, constants, linear_1), act), constants, linear_2)
        if newline:
            x = opset.concat([x, repeated(constants.vector(newline.name), x)], 1)
        values["last_hidden_state"] = x

    def graph(tower: Tower) -> Graph:
        inputs = {"pixel_values": ("f32", (-1, tower.num_channels, tower.image_size, tower.image_size))}
        stages = [*tower_stages(tower), Stage(connect, (linear_1, linear_2, newline))]
        return Graph(inputs, stages, "last_hidden_state", "last_hidden_state")

    def merged(ratio: float) -> Graph:
        return graph(replace(tower, merged_tokens=merged_tokens(ratio, tower.patches, tower.layers)))

    return Architecture(decoder, graph(tower), unused(tower), (config, text, seen), merged_vision=merged)


RENAMED = {"vision_tower.vision_model.": "vision_tower."}
"""Of a SigLIP or CLIP tower: `FamilyExporter.renamed`."""


@dataclass(frozen=True)
class Names:
    """What the names of weights begin with, which depends on what saved them.

    Published checkpoints have those that transformers 4 saves, and 5 after it where it has loaded such a one:
    `language_model.model.…`, `vision_tower.vision_model.…`. Within transformers 5 all stand below `model`, and the
    tower has lost its `vision_model`.
    """

    decoder: str
    head: str
    tower: str
    projector: str
    newline: str

    @classmethod
    def found(cls, tensors: Container[str], projector: str = "linear_1.weight") -> Names:
        """Return the names that these tensors have; `projector` is one of the projector's."""
        at = "model." if f"model.multi_modal_projector.{projector}" in tensors else ""
        decoder = next(
            (each for each in ("model.language_model", "language_model") if f"{each}.embed_tokens.weight" in tensors),
            "language_model.model",
        )
        inner = f"{at}vision_tower.vision_model"
        has_inner = f"{inner}.embeddings.patch_embedding.weight" in tensors
        return cls(
            decoder=decoder,
            head="language_model.lm_head" if "language_model.lm_head.weight" in tensors else "lm_head",
            tower=inner if has_inner else f"{at}vision_tower",
            projector=f"{at}multi_modal_projector",
            newline=f"{at}image_newline",
        )


def read_tower(config: ConfigReader, prefix: str = "") -> Tower:
    """Return the vision tower of `vision_config`. Raises `SourceError` and `UnsupportedError`."""
    return make_tower(tower_section(config), config.get("vision_feature_layer"), prefix)


def tower_section(config: ConfigReader, usual: str = "clip_vision_model") -> ConfigReader:
    """Return `vision_config` with its class's defaults; `usual` is its model_type where it states none."""
    kind = config.section("vision_config").get("model_type", usual)
    if kind not in _TOWERS:
        raise UnsupportedError(f"the native route builds no {kind!r} vision tower; it knows {', '.join(_TOWERS)}")
    return config.section("vision_config", {"model_type": kind, **_TOWERS[kind]}, harmless=_TOWER_HARMLESS)


def make_tower(section: ConfigReader, layer: Any, prefix: str) -> Tower:
    """Return the tower of that section up to a layer, counted as `vision_feature_layer` is.

    Raises `SourceError` and `UnsupportedError`.
    """
    count = section.size("num_hidden_layers")
    if isinstance(layer, bool) or not isinstance(layer, int) or not -count - 1 <= layer <= count:
        raise UnsupportedError(f"the native route builds no vision_feature_layer {layer!r} of {count} layers")
    return Tower(
        prefix=prefix,
        image_size=section.size("image_size"),
        patch_size=section.size("patch_size"),
        **read_vision_sizes(section),
        has_class_token=section.get("model_type") == "clip_vision_model",
        layers=layer % (count + 1),
    )


EXPORTER = FamilyExporter(family_config, architecture, renamed=RENAMED)
