"""PaddleOCR-VL: an ERNIE 4.5 with multimodal rotary embedding, SigLIP at the page's own shape and a projector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from benchmarks.gguf.conversion import Conversion


class PaddleOcrVl(Conversion):
    """PaddleOCR-VL with the tensor names of transformers 5."""

    architecture, projector = "paddleocr", "paddleocr"
    mean_and_std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    names: ClassVar[dict[str, str]] = {
        "model.projector.pre_norm": "mm.input_norm",
        "model.projector.linear_1": "mm.1",
        "model.projector.linear_2": "mm.2",
    }

    def text_config(self) -> dict[str, Any]:
        text = super().text_config()
        return {**text["rope_parameters"], **text}

    def add_text_keys(self, writer: Any) -> None:
        writer.add_key_length(self.text["head_dim"])
        writer.add_value_length(self.text["head_dim"])
        writer.add_rope_dimension_count(self.text["head_dim"])
        writer.add_rope_dimension_sections([*self.text["mrope_section"], 0])

    def add_vision_keys(self, writer: Any) -> None:
        pixels = self.image_size()
        writer.add_uint32("clip.vision.image_min_pixels", pixels["shortest_edge"])
        writer.add_uint32("clip.vision.image_max_pixels", pixels["longest_edge"])
        writer.add_uint32("clip.vision.spatial_merge_size", self.vision["spatial_merge_size"])

    def turned(self, name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        yield name.replace("model.visual.", "model."), values
