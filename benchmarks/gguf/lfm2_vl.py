"""LFM2-VL: an LFM2 of short convolutions and attention, SigLIP2 NaFlex and a pixel unshuffle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from benchmarks.gguf.conversion import Conversion


class Lfm2Vl(Conversion):
    """LFM2-VL and LFM2.5-VL."""

    architecture, projector = "lfm2", "lfm2"

    def text_config(self) -> dict[str, Any]:
        text = super().text_config()
        heads = text["num_key_value_heads"]
        text["num_key_value_heads"] = [heads if kind == "full_attention" else 0 for kind in text["layer_types"]]
        return {**text, "rms_norm_eps": text["norm_eps"], "intermediate_size": feed_forward_length(text)}

    def vision_config(self) -> dict[str, Any]:
        vision = super().vision_config()
        return {**vision, "image_size": round(vision["num_patches"] ** 0.5) * vision["patch_size"]}

    def add_text_keys(self, writer: Any) -> None:
        writer.add_shortconv_l_cache(self.text["conv_L_cache"])

    def add_vision_keys(self, writer: Any) -> None:
        writer.add_uint32("clip.vision.projector.scale_factor", self.config["downsample_factor"])

    def turned(self, name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        if name.endswith("conv.conv.weight"):
            values = values.squeeze(1)
        elif name.endswith("patch_embedding.weight"):  # of a patch's pixels, channels last
            side = self.vision["patch_size"]
            values = values.reshape(len(values), side, side, -1).transpose(0, 3, 1, 2)
        yield name, values


def feed_forward_length(text: dict[str, Any]) -> int:
    """Return the width of the feed-forward network, which the config states before it is adjusted."""
    stated = int(text.get("block_ff_dim", text["intermediate_size"]))
    if not text["block_auto_adjust_ff_dim"]:
        return stated
    adjusted = int(text["block_ffn_dim_multiplier"] * int(2 * stated / 3))
    return -(-adjusted // text["block_multiple_of"]) * int(text["block_multiple_of"])
