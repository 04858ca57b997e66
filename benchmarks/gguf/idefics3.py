"""Idefics3, such as granite-docling-258M: a Llama, SigLIP on square tiles and a pixel shuffle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.gguf.conversion import Conversion


class Idefics3(Conversion):
    """Idefics3 and SmolVLM."""

    architecture, projector = "llama", "idefics3"
    text_part = "model.text_model."

    def text_config(self) -> dict[str, Any]:
        text = super().text_config()
        return {**(text.get("rope_parameters") or {}), **text}

    def add_text_keys(self, writer: Any) -> None:
        writer.add_rope_dimension_count(self.text["head_dim"])

    def add_vision_keys(self, writer: Any) -> None:
        writer.add_uint32("clip.vision.preproc_image_size", self.image_size()["longest_edge"])
        writer.add_uint32("clip.vision.projector.scale_factor", self.config["scale_factor"])

    def turned(self, name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        if name.startswith(self.text_part) and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = by_neighbours(values, self.text["head_dim"])
        yield name, values


def by_neighbours(values: np.ndarray, width: int) -> np.ndarray:
    """Return the rows of queries or keys for a rotary embedding that turns neighbours, not halves, of a head."""
    return values.reshape(-1, 2, width // 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
