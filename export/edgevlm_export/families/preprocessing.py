"""What families read alike of a checkpoint's image processor and image token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from edgevlm.errors import SourceError
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.config_reader import ConfigReader

_ALWAYS_DONE = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")
CLIP_DEFAULTS: Mapping[str, Any] = {
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    **dict.fromkeys(_ALWAYS_DONE, True),
}
"""What image processors that resize by BICUBIC and normalise as CLIP does assume (`image_utils.OPENAI_CLIP_MEAN` and
`OPENAI_CLIP_STD` of transformers 5.24)."""


def check_always_done(preprocessor: ConfigReader, steps: Sequence[str] = _ALWAYS_DONE) -> None:
    """Raise `SourceError` where a step that edgevlm never leaves out is switched off."""
    for name in steps:
        if not preprocessor.flag(name):
            raise SourceError(f"{preprocessor.file} sets {name} to false, which edgevlm does not support")


def read_arithmetic(preprocessor: ConfigReader) -> dict[str, Any]:
    """Return the filter that pictures are resized with, and what their values are scaled by. Raises `SourceError`."""
    return {
        "resample": _resample(preprocessor),
        "rescale_factor": preprocessor.number("rescale_factor"),
        "image_mean": _channels(preprocessor, "image_mean"),
        "image_std": _channels(preprocessor, "image_std"),
    }


def read_image_token_id(checkpoint: Checkpoint, default: int | None = None, name: str = "image_token_id") -> int:
    """Return config.json's `image_token_id`, which families may call otherwise. Raises `SourceError`."""
    found = checkpoint.section("").get(name, default)
    if found is None:
        raise SourceError(f"config.json states no {name}")
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise SourceError(f"config.json: {name} must be a whole number, not {found!r}")
    return found


def read_pixels(preprocessor: ConfigReader) -> dict[str, int]:
    """Return the fewest and the most pixels of a resized picture; `min_pixels` and `max_pixels` go before `size`.

    Raises `SourceError`.
    """
    size, pixels = preprocessor.section("size"), {}
    for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        pixels[name] = preprocessor.size(name) if name in preprocessor else size.size(edge)
    if pixels["min_pixels"] > pixels["max_pixels"]:
        least, most = pixels.values()
        raise SourceError(f"{preprocessor.file} asks for pictures of {least} pixels or more, and of {most} at most")
    return pixels


def read_block_token_ids(
    checkpoint: Checkpoint, tokens: Mapping[str, str], defaults: Mapping[str, Any]
) -> dict[str, int]:
    """Return the ids of the tokens of an image block, each by its key in config.json: `image_start_token_id`.

    `tokens` are called there `image_start` or `image_token`. Raises `SourceError` where the tokenizer has another id.
    """
    ids = {}
    for name, token in tokens.items():
        key = f"{name.removesuffix('_token')}_token_id"
        ids[key] = read_image_token_id(checkpoint, defaults[key], key)
        if (held := checkpoint.added_tokens.get(token, {}).get("id", ids[key])) != ids[key]:
            raise SourceError(f"the checkpoint contradicts itself: {token} is {held}, {key} of config.json {ids[key]}")
    return ids


def _resample(preprocessor: ConfigReader) -> int:
    found = preprocessor.get("resample")
    if found not in list(Image.Resampling):
        raise SourceError(f"{preprocessor.file}: resample must be one of Pillow's filters, 0 to 5, not {found!r}")
    return int(found)


def _channels(preprocessor: ConfigReader, name: str) -> float | list[float]:
    """Return a number for each channel, or one for all."""
    found = preprocessor.get(name)
    numbers = found if isinstance(found, list) and len(found) == 3 else [found]
    if any(isinstance(each, bool) or not isinstance(each, int | float) for each in numbers):
        raise SourceError(f"{preprocessor.file}: {name} must be a number or three, not {found!r}")
    return found  # type: ignore[no-any-return]
