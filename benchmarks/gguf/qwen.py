"""Qwen3-VL and Qwen3.5: one vision encoder, before a Qwen3 or one of linear and full attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from benchmarks.gguf.conversion import TEXT, Conversion


class Qwen3Vl(Conversion):
    """Qwen3-VL."""

    architecture, projector = "qwen3vl", "qwen3vl_merger"
    names: ClassVar[dict[str, str]] = {
        "model.visual.merger.norm": "v.post_ln",
        "model.visual.merger.linear_fc1": "mm.0",
        "model.visual.merger.linear_fc2": "mm.2",
    }

    def text_config(self) -> dict[str, Any]:
        text = super().text_config()
        rope = text.get("rope_parameters") or text["rope_scaling"]
        return {"rope_theta": rope.get("rope_theta"), **text, "rope_scaling": rope}

    def vision_config(self) -> dict[str, Any]:
        vision = super().vision_config()
        named = {"num_hidden_layers": vision["depth"], "num_attention_heads": vision["num_heads"]}
        side = round(vision["num_position_embeddings"] ** 0.5) * vision["patch_size"]
        return {**vision, **named, "image_size": side, "layer_norm_eps": self.text["rms_norm_eps"]}

    def add_text_keys(self, writer: Any) -> None:
        writer.add_key_length(self.text["head_dim"])
        writer.add_value_length(self.text["head_dim"])
        writer.add_rope_dimension_sections([*self.text["rope_scaling"]["mrope_section"], 0])
        if self.vision["deepstack_visual_indexes"]:
            writer.add_num_deepstack_layers(len(self.vision["deepstack_visual_indexes"]))

    def add_vision_keys(self, writer: Any) -> None:
        layers = range(self.vision["num_hidden_layers"])
        deepstack = [layer in self.vision["deepstack_visual_indexes"] for layer in layers]
        writer.add_uint32("clip.vision.spatial_merge_size", self.vision["spatial_merge_size"])
        writer.add_array("clip.vision.is_deepstack_layers", deepstack)

    def turned(self, name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        if name.endswith("patch_embed.proj.weight"):  # a kernel for each of the two frames of a temporal patch
            yield "v.patch_embd.weight", values[:, :, 0]
            yield "v.patch_embd.weight.1", values[:, :, 1]
        elif "deepstack_merger_list." in name:  # is called by the encoder layer that it comes after
            number, part, kind = name.split(".")[-3:]
            layer = self.vision["deepstack_visual_indexes"][int(number)]
            yield f"v.deepstack.{layer}.{part.removeprefix('linear_')}.{kind}", values
        else:
            yield name, values


class Qwen35(Qwen3Vl):
    """Qwen3.5: three layers of linear attention (a gated delta net), then one of attention, and so on."""

    architecture = "qwen35"

    def add_text_keys(self, writer: Any) -> None:
        super().add_text_keys(writer)
        text = self.text
        writer.add_rope_dimension_count(int(text["head_dim"] * text["rope_scaling"]["partial_rotary_factor"]))
        writer.add_full_attention_interval(text["full_attention_interval"])
        writer.add_ssm_conv_kernel(text["linear_conv_kernel_dim"])
        writer.add_ssm_state_size(text["linear_key_head_dim"])
        writer.add_ssm_group_count(text["linear_num_key_heads"])
        writer.add_ssm_time_step_rank(text["linear_num_value_heads"])
        writer.add_ssm_inner_size(text["linear_value_head_dim"] * text["linear_num_value_heads"])

    def turned(self, name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        if ".linear_attn." in name:
            part = name.partition(".linear_attn.")[2]
            values = self.regrouped(part, values.squeeze(1) if part == "conv1d.weight" else values)
            if part == "A_log":
                values = -np.exp(values)
            name = name.replace(".dt_bias", ".dt_proj.bias")
        elif name.startswith(TEXT) and name.endswith("norm.weight"):  # stated as what is added to one
            values = values + 1
        yield from super().turned(name, values)

    def regrouped(self, part: str, values: np.ndarray) -> np.ndarray:
        """Return the weights with the value heads in llama.cpp's order: each key head's first, then its second ..."""
        text = self.text
        groups, size = text["linear_num_key_heads"], text["linear_value_head_dim"]
        if part == "norm.weight" or groups == text["linear_num_value_heads"]:
            return values
        keys = 2 * groups * text["linear_key_head_dim"] if part in ("in_proj_qkv.weight", "conv1d.weight") else 0
        axis = 1 if part == "out_proj.weight" else 0
        width = 1 if part in ("A_log", "dt_bias", "in_proj_a.weight", "in_proj_b.weight") else size
        kept, heads = np.split(values, [keys], axis)
        shape = (*heads.shape[:axis], groups, -1, width, *heads.shape[axis + 1 :])
        return np.concatenate([kept, heads.reshape(shape).swapaxes(axis, axis + 1).reshape(heads.shape)], axis)
