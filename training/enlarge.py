"""From a checkpoint that looks at smaller pictures to one of today's size, to go on training from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.model import IMAGE_SIZE, SIDE, load_model, save_grown
from training.settings import GUIDE


def enlarge(old: Path, new: Path) -> None:
    """Write the checkpoint `old` to `new`, its tower with today's number of patches, and its guide beside it.

    A patch still shows as many pixels, of a larger picture, and its place's embedding is interpolated between those of
    the old places (as Dosovitskiy et al. 2021 go to another resolution). The guide learns rows and columns anew.
    """
    import torch
    from safetensors.torch import load_file, save_file

    model = load_model(old)
    weights = model.state_dict()
    name = "model.vision_model.embeddings.position_embedding.weight"
    weights[name] = _interpolated(weights[name])
    model.config.vision_config.image_size = IMAGE_SIZE
    save_grown(model.config, weights, old, new)
    guide = load_file(old.parent / GUIDE)
    guide |= {key: torch.zeros(2 * SIDE, *guide[key].shape[1:]) for key in ("place.weight", "place.bias")}
    save_file(guide, new.parent / GUIDE)


def _interpolated(table: Any) -> Any:
    """Return `(places, width)` for today's places, of a table for those of a smaller picture."""
    import torch

    side = round(len(table) ** 0.5)
    grid = table.T.reshape(1, -1, side, side)
    return torch.nn.functional.interpolate(grid, (SIDE, SIDE), mode="bicubic")[0].flatten(1).T.contiguous()
