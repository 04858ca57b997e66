"""A Qwen3-VL checkpoint as llama.cpp reads it: `text.gguf` and `mmproj.gguf`.

    python -m benchmarks.qwen_gguf CHECKPOINT OUT_DIR

The matrices of the text part become Q4_0, its embedding table (the head, too) Q8_0, the vision part F16. Keys and
names are those of llama.cpp's own converter. Tensors are written one at a time. Needs `gguf`, torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peer_models import add_text, close, make

TEXT_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
BLOCK_PARTS = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out",
    "mlp.linear_fc1": "ffn_up",
    "mlp.linear_fc2": "ffn_down",
}
DEEPSTACK_PARTS = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}
WHOLE = {
    "model.language_model.embed_tokens.weight": "token_embd.weight",
    "model.language_model.norm.weight": "output_norm.weight",
    "model.visual.patch_embed.proj.bias": "v.patch_embd.bias",
    "model.visual.pos_embed.weight": "v.position_embd.weight",
    **{f"model.visual.merger.norm.{kind}": f"v.post_ln.{kind}" for kind in ("weight", "bias")},
    **{f"model.visual.merger.linear_fc1.{kind}": f"mm.0.{kind}" for kind in ("weight", "bias")},
    **{f"model.visual.merger.linear_fc2.{kind}": f"mm.2.{kind}" for kind in ("weight", "bias")},
}


def gguf_name(name: str, deepstack: list[int]) -> str:
    """Return llama.cpp's name of a tensor; a deep-stack merger has its encoder layer's number in it."""
    if name in WHOLE:
        return WHOLE[name]
    _, side, group, number, rest = name.split(".", 4)
    part, kind = rest.rsplit(".", 1)
    if side == "language_model":
        return f"blk.{number}.{TEXT_PARTS[part]}.{kind}"
    if group == "blocks":
        return f"v.blk.{number}.{BLOCK_PARTS[part]}.{kind}"
    return f"v.deepstack.{deepstack[int(number)]}.{DEEPSTACK_PARTS[part]}.{kind}"


def tensors(checkpoint: Path, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and float32 values of the tensors whose names begin with `prefix`."""
    from safetensors import safe_open

    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                if name.startswith(prefix):
                    yield name, file.get_tensor(name).float().numpy()


def write_text(checkpoint: Path, config: dict[str, Any], path: Path) -> None:
    """Write the text part."""
    import gguf

    text, deepstack = config["text_config"], config["vision_config"]["deepstack_visual_indexes"]
    writer = gguf.GGUFWriter(path, "qwen3vl", use_temp_file=True)
    add_text(writer, text, checkpoint)
    writer.add_key_length(text["head_dim"])
    writer.add_value_length(text["head_dim"])
    writer.add_rope_dimension_sections([*text["rope_scaling"]["mrope_section"], 0])
    writer.add_num_deepstack_layers(len(deepstack))
    q4, q8 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0
    for name, values in tensors(checkpoint, "model.language_model."):
        kind = None if values.ndim == 1 else q8 if "embed_tokens" in name else q4
        data = values if kind is None else gguf.quants.quantize(values, kind)
        writer.add_tensor(gguf_name(name, deepstack), data, raw_dtype=kind)
    close(writer)


def write_vision(checkpoint: Path, config: dict[str, Any], path: Path) -> None:
    """Write the vision part."""
    import gguf

    vision = config["vision_config"]
    deepstack = vision["deepstack_visual_indexes"]
    writer = gguf.GGUFWriter(path, "clip", use_temp_file=True)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "qwen3vl_merger")
    writer.add_bool("clip.use_gelu", True)
    sizes = {
        "image_size": round(vision["num_position_embeddings"] ** 0.5) * vision["patch_size"],
        "patch_size": vision["patch_size"],
        "embedding_length": vision["hidden_size"],
        "feed_forward_length": vision["intermediate_size"],
        "block_count": vision["depth"],
        "attention.head_count": vision["num_heads"],
        "projection_dim": vision["out_hidden_size"],
        "spatial_merge_size": vision["spatial_merge_size"],
    }
    for name, size in sizes.items():
        writer.add_uint32(f"clip.vision.{name}", size)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", config["text_config"]["rms_norm_eps"])
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.is_deepstack_layers", [layer in deepstack for layer in range(vision["depth"])])
    for name, values in tensors(checkpoint, "model.visual."):
        if name.endswith("patch_embed.proj.weight"):  # a kernel for each of the two frames of a temporal patch
            for number, kernel in enumerate(values.swapaxes(0, 2).swapaxes(1, 2)):
                suffix = f".{number}" if number else ""
                writer.add_tensor(f"v.patch_embd.weight{suffix}", np.ascontiguousarray(kernel, np.float16))
        else:
            plain = values.ndim == 1 or "pos_embed" in name
            writer.add_tensor(gguf_name(name, deepstack), values.astype(np.float32 if plain else np.float16))
    close(writer)


def write(checkpoint: Path, folder: Path) -> None:
    """Write both parts and the chat template."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    write_text(checkpoint, config, folder / "text.gguf")
    write_vision(checkpoint, config, folder / "mmproj.gguf")
    shutil.copyfile(checkpoint / "chat_template.jinja", folder / "chat_template.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    make(arguments.folder, lambda folder: write(arguments.checkpoint, folder))


if __name__ == "__main__":
    main()
