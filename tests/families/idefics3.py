"""Tiny seeded Idefics3 and SmolVLM checkpoints for the parity suite, and their processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgevlm.families.idefics3 import Idefics3
from tests.conftest import TILE, image_processor_class, make_checkpoint
from tests.families.base import Builder, Reference


def sized(longest_edge: int, tile: int, **options: Any) -> Any:
    """The reference's image processor with a checkpoint's sizes."""
    sizes = {"size": {"longest_edge": longest_edge}, "max_image_size": {"longest_edge": tile}}
    return image_processor_class("smolvlm")(**sizes, image_mean=[0.5] * 3, image_std=[0.5] * 3, **options)


def family(processor: Any, patch_size: int = 8, image_size: int = TILE) -> Idefics3:
    """The runtime's family as the exporter configures it for such a processor's file."""
    return Idefics3(
        {
            "image_token": "<image>",
            "image_token_id": 45,
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "image_seq_len": 4,
            "patch_size": patch_size,
            "position_grid": image_size // patch_size,
            "preprocessing": {
                "longest_edge": processor.size["longest_edge"],
                "tile": processor.max_image_size["longest_edge"],
                "do_image_splitting": processor.do_image_splitting,
                "resample": processor.resample,
                "rescale_factor": processor.rescale_factor,
                "image_mean": processor.image_mean,
                "image_std": processor.image_std,
            },
        }
    )


def reference_processor(words: Any, image_processor: Any, config: Any) -> Any:
    """Return `Idefics3Processor`, for SmolVLM, too: its own needs torchvision and is this one on pictures."""
    from transformers import Idefics3Processor

    return Idefics3Processor(image_processor, words, image_seq_len=4)


def make_reference(checkpoint: Path) -> Reference:
    """Return transformers on a checkpoint."""
    return Reference(checkpoint, reference_processor)


def builder(name: str) -> Builder:
    """Return the builder of one of the two families, whose graphs differ in the LM head alone."""
    return Builder({"saved": lambda folder: make_checkpoint(folder / "saved", name)}, make_reference)
