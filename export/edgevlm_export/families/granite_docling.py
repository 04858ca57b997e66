"""Granite for Docling: the facts about preprocessing and prompt that the runtime needs, and the model's graphs."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

from edgevlm.errors import SourceError
from edgevlm_export.families.base import (
    Architecture,
    FamilyExporter,
    is_tied,
    read_layer_indexes,
    read_side,
    read_vision_sizes,
)
from edgevlm_export.families.preprocessing import CLIP_DEFAULTS, check_always_done, read_arithmetic, read_image_token_id
from edgevlm_export.families.text_models import read_decoder, text_section
from edgevlm_export.graphs.decoder import Decoder
from edgevlm_export.graphs.modules import Linear, Norm, declared
from edgevlm_export.graphs.packed_vit import Merger, PlainMLP
from edgevlm_export.graphs.stages import Graph
from edgevlm_export.graphs.tapped_tower import Connector, ConnectorPath, tapped_stages
from edgevlm_export.graphs.token_merging import merged_tokens
from edgevlm_export.graphs.tower import Tower
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import ConfigReader

# What transformers' GraniteDoclingImageProcessor, GraniteDoclingConfig and GraniteDoclingVisionConfig assume where the
# checkpoint is silent: models/granite_docling/ of transformers 5.24.
_DEFAULTS: dict[str, Any] = {"image_token_id": 100337, "tie_word_embeddings": True}
_PREPROCESSOR_DEFAULTS: dict[str, Any] = {
    "size": {"height": 512, "width": 512},
    "crop_to_patches": True,
    "min_patches": 1,
    "max_patches": 32,
    "fine_route": False,
    "dense_max_patches": 0,
    "dense_max_scale": 0.0,
    "dense_min_aspect": 0.0,
    "dense_max_aspect": 0.0,
    **CLIP_DEFAULTS,
}
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 512,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "out_hidden_size": 1024,
    "scale_factor": 4,
    "deepstack_visual_indexes": [3, 7, 10],
    "use_fine_route": True,
}
_HARMLESS = ("density_router_loss_weight", "density_router_threshold")
"""They count with a router, which is refused."""
_PREPROCESSOR_HARMLESS = ("data_format", "default_to_square", "image_processor_type")
_TOKEN_NAMES = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
}
_DECODER, _TOWER = "model.text_model", "model.vision_model"
_UNUSED = ("mtp.*", "model.density_router.*")
"""Heads that predict further tokens, and a router that config.json has switched off."""
_EPS = 1e-5
"""Of torch's LayerNorm, which no config changes."""


def family_config(checkpoint: Checkpoint) -> tuple[dict[str, Any], ConfigReader]:
    """Return the facts that `edgevlm.families.granite_docling` reads, and the image processor's settings as read.

    Raises `SourceError` where they do not fit together.
    """
    _refuse_router(checkpoint)
    preprocessor = checkpoint.image_processor(_PREPROCESSOR_DEFAULTS, _PREPROCESSOR_HARMLESS)
    check_always_done(preprocessor)
    vision = checkpoint.section("vision_config", _VISION_DEFAULTS)
    size, least, most = preprocessor.section("size"), preprocessor.size("min_patches"), preprocessor.size("max_patches")
    tile = size.size("height")
    if size.size("width") != tile:
        raise SourceError(f"{preprocessor.file}: size must be a square, not {size.size('width')}x{tile}")
    if least > most:
        raise SourceError(f"{preprocessor.file}: min_patches {least} is more than max_patches {most}")
    names = {"image_token": checkpoint.named_tokens.get("image_token", _TOKEN_NAMES["image_token"])}
    is_fine = preprocessor.flag("fine_route")
    facts = {
        **_TOKEN_NAMES,
        **names,
        "image_token_id": read_image_token_id(checkpoint, _DEFAULTS["image_token_id"]),
        "image_seq_len": _image_seq_len(checkpoint, vision, tile) * (4 if is_fine else 1),
        "fine": is_fine,
        "preprocessing": {
            "tile": tile,
            "min_patches": least,
            "max_patches": most if preprocessor.flag("crop_to_patches") else 1,
            **_spreads(preprocessor),
            **read_arithmetic(preprocessor),
        },
    }
    return facts, preprocessor


def _refuse_router(checkpoint: Checkpoint) -> None:
    """Raise `SourceError` for a density router, which chooses the connector's path of each page."""
    if (size := checkpoint.section("").get("density_router_hidden_size")) is not None:
        raise SourceError(
            f"config.json has a density router (density_router_hidden_size {size}), and edgevlm takes the path of the"
            " image processor's fine_route for every page; set density_router_hidden_size to null to export that"
        )


def _image_seq_len(checkpoint: Checkpoint, vision: ConfigReader, tile: int) -> int:
    """Return the image tokens of one tile on the coarse path."""
    size, patch, factor = read_side(vision, "image_size"), read_side(vision, "patch_size"), vision.size("scale_factor")
    if size != tile:
        raise SourceError(
            f"the checkpoint contradicts itself: tiles of {tile} pixels, and vision_config.image_size {size}"
        )
    by = f"{factor} and by half of that" if vision.flag("use_fine_route") else f"{factor}"
    if size // patch % factor or (vision.flag("use_fine_route") and factor % 2):
        raise SourceError(f"config.json contradicts itself: {size // patch} patches a side cannot be folded by {by}")
    computed = (size // patch // factor) ** 2
    stated = checkpoint.read("processor_config.json").get("image_seq_len", computed)
    if stated != computed:
        raise SourceError(
            f"the checkpoint contradicts itself: processor_config.json says {stated} image tokens a tile, "
            f"the sizes in config.json make {computed}"
        )
    return computed


def _spreads(preprocessor: ConfigReader) -> dict[str, Any]:
    """Return the rule for pages with more tiles as `spreads`, none where it is off."""
    rule = {
        "max_patches": preprocessor.get("dense_max_patches"),
        "max_scale": preprocessor.get("dense_max_scale"),
        "min_aspect": preprocessor.get("dense_min_aspect"),
        "max_aspect": preprocessor.get("dense_max_aspect"),
    }
    for name, found in rule.items():
        if isinstance(found, bool) or not isinstance(found, int | float) or found < 0:
            raise SourceError(f"{preprocessor.file}: dense_{name} must be a number and not below 0, not {found!r}")
    if not rule["max_patches"] or not (rule["max_scale"] or rule["min_aspect"]):
        return {}
    return {"spreads": rule | {"max_patches": int(rule["max_patches"])}}


def architecture(checkpoint: Checkpoint, facts: Mapping[str, Any], tensors: Container[str]) -> Architecture:
    """Return the model's graphs. Raises `SourceError`, and `UnsupportedError` for what is not built here."""
    config = checkpoint.section("", _DEFAULTS, harmless=_HARMLESS)
    text, seen = text_section(config), config.section("vision_config", _VISION_DEFAULTS)
    decoder = read_decoder(text, _DECODER, "lm_head", tied=is_tied(config, text, tensors))
    config.get("image_token_id")
    tower = _tower(seen)
    taps = _taps(seen, tower, decoder)
    paths = _paths(seen, tower, decoder.hidden_size, len(taps))
    name = "fine" if facts["fine"] else "coarse"
    if name not in paths:
        raise SourceError("the image processor's fine_route needs vision_config.use_fine_route, which is false")
    connector = _connector(paths.pop(name), tower, decoder.hidden_size, taps)
    tile, (first, *others) = facts["preprocessing"]["tile"], connector.outputs

    def graph(tower: Tower) -> Graph:
        inputs = {"pixel_values": ("f32", (-1, tower.num_channels, tile, tile))}
        return Graph(inputs, tapped_stages(tower, connector), first, first, others=others)

    def merged(ratio: float) -> Graph:
        return graph(replace(tower, merged_tokens=merged_tokens(ratio, tower.patches, tower.layers)))

    unused = (*_UNUSED, *(name for name, _ in declared([*paths.values()])))
    decoder = replace(decoder, deepstack=len(taps))
    return Architecture(decoder, graph(tower), unused, (config, text, seen), merged_vision=merged)


def _tower(section: ConfigReader) -> Tower:
    sizes = read_vision_sizes(section)
    return Tower(
        prefix=_TOWER,
        image_size=read_side(section, "image_size"),
        patch_size=read_side(section, "patch_size"),
        **sizes,
        layers=sizes["num_hidden_layers"],
    )


def _taps(section: ConfigReader, tower: Tower, decoder: Decoder) -> tuple[int, ...]:
    """Return the tower's tapped layers, of which as many layers of the decoder get something added."""
    taps = read_layer_indexes(section, "deepstack_visual_indexes", tower.num_hidden_layers)
    if len(taps) > len(decoder.layers):
        name = section.name_of("deepstack_visual_indexes")
        raise SourceError(f"config.json: {name} are more than the decoder's layers")
    return tuple(taps)


def _paths(section: ConfigReader, tower: Tower, hidden: int, taps: int) -> dict[str, ConnectorPath]:
    """Return the connector's paths by name, the fine one where there is one; `hidden` are the decoder's channels."""
    if (out := section.size("out_hidden_size")) != hidden or hidden % 4:
        name = section.name_of("out_hidden_size")
        raise SourceError(f"config.json: {name} {out} must be the decoder's hidden_size {hidden}, a multiple of 4")
    factors = {"coarse": section.size("scale_factor")}
    if section.flag("use_fine_route"):
        factors["fine"] = factors["coarse"] // 2
    return {name: _path(name, tower, factor, hidden, taps) for name, factor in factors.items()}


def _path(name: str, tower: Tower, factor: int, hidden: int, taps: int) -> ConnectorPath:
    """Return the connector's path called so, which folds `factor` patches a side."""
    at, folded = f"{_TOWER}.connector.{name}", tower.hidden_size * factor**2

    def merger(at: str) -> Merger:
        linear_1, linear_2 = (Linear(f"{at}.linear_{n}", hidden, size, True) for n, size in ((1, folded), (2, hidden)))
        return Merger(Norm(f"{at}.layer_norm", folded, _EPS, bias=True), PlainMLP(linear_1, linear_2, "gelu"), True)

    mergers = tuple(merger(f"{at}.deepstack_mergers.{number}") for number in range(taps))
    return ConnectorPath(factor, Linear(f"{at}.projection", hidden, folded), mergers)


def _connector(path: ConnectorPath, tower: Tower, hidden: int, taps: tuple[int, ...]) -> Connector:
    """Return the connector with one of its paths."""
    at = f"{_TOWER}.connector"
    ln_in, ln_mid, ln_out = (
        Norm(f"{at}.{name}", size, _EPS, bias=True)
        for name, size in (("ln_in", tower.hidden_size), ("ln_mid", hidden), ("ln_out", hidden))
    )
    return Connector(ln_in, path, ln_mid, Linear(f"{at}.mlp_fc2", hidden, hidden), ln_out, taps)


EXPORTER = FamilyExporter(family_config, architecture, covers_onnx=False)
