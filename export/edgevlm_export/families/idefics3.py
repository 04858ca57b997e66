"""Idefics3 and SmolVLM: the facts about preprocessing and prompt that the runtime needs."""

from __future__ import annotations

from typing import Any

from edgevlm.errors import SourceError
from edgevlm_export.checkpoint import Checkpoint

# What transformers' Idefics3ImageProcessor and Idefics3VisionConfig assume where the checkpoint is silent.
_PREPROCESSOR_DEFAULTS: dict[str, Any] = {
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "do_image_splitting": True,
    "resample": 1,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
}
_VISION_DEFAULTS = {"image_size": 224, "patch_size": 32}
_ALWAYS_DONE = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")


def family_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the facts that `edgevlm.families.idefics3` reads. Raises `SourceError` where they do not fit together."""
    stated = checkpoint.read("preprocessor_config.json")
    preprocessor = _PREPROCESSOR_DEFAULTS | {name: value for name, value in stated.items() if value is not None}
    for name in _ALWAYS_DONE:
        if not preprocessor[name]:
            raise SourceError(f"preprocessor_config.json sets {name} to false, which edgevlm does not support")
    vision = _VISION_DEFAULTS | checkpoint.config.get("vision_config", {})
    try:
        longest_edge, tile = preprocessor["size"]["longest_edge"], preprocessor["max_image_size"]["longest_edge"]
    except (KeyError, TypeError):
        raise SourceError("preprocessor_config.json states no longest_edge for size and max_image_size") from None
    names = checkpoint.read("tokenizer_config.json")
    return {
        "image_token": names.get("image_token") or "<image>",
        "image_token_id": _image_token_id(checkpoint),
        "fake_image_token": names.get("fake_image_token") or "<fake_token_around_image>",
        "global_image_token": names.get("global_image_token") or "<global-img>",
        "image_seq_len": _image_seq_len(checkpoint, tile, vision["patch_size"]),
        "patch_size": vision["patch_size"],
        "position_grid": vision["image_size"] // vision["patch_size"],
        "preprocessing": {
            "longest_edge": longest_edge,
            "tile": tile,
            "do_image_splitting": preprocessor["do_image_splitting"],
            "resample": preprocessor["resample"],
            "rescale_factor": preprocessor["rescale_factor"],
            "image_mean": preprocessor["image_mean"],
            "image_std": preprocessor["image_std"],
        },
    }


def _image_token_id(checkpoint: Checkpoint) -> int:
    image_token_id = checkpoint.config.get("image_token_id")
    if image_token_id is None:
        raise SourceError("config.json states no image_token_id")
    return int(image_token_id)


def _image_seq_len(checkpoint: Checkpoint, tile: int, patch_size: int) -> int:
    """Return the image tokens of one tile: its patches, `scale_factor` x `scale_factor` of them in each token."""
    scale_factor = int(checkpoint.config.get("scale_factor", 2))
    computed = (tile // patch_size) ** 2 // scale_factor**2
    stated = checkpoint.read("processor_config.json").get("image_seq_len", computed)
    if stated != computed:
        raise SourceError(
            f"the checkpoint contradicts itself: processor_config.json says {stated} image tokens a tile, "
            f"the sizes in config.json and preprocessor_config.json make {computed}"
        )
    return computed
