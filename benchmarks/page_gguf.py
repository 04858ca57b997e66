"""A checkpoint of a model that reads pages, as llama.cpp reads it: `text.gguf`, `mmproj.gguf` and the chat template.

    python -m benchmarks.page_gguf CHECKPOINT OUT_DIR [--f32]

It takes Idefics3, such as granite-docling-258M, and PaddleOCR-VL with the tensor names of transformers 5. The matrices
of the text part become Q4_0, its embedding table and head Q8_0 (`--f32`: all of them F32), the vision part F16. Keys
and names are those of llama.cpp's own converter. Needs `gguf`, torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peer_models
from benchmarks.peer_models import TEXT_NAMES, VISION_NAMES, add_text, close, make, text_types
from benchmarks.qwen_gguf import tensors

WHOLE = {
    "model.language_model.embed_tokens.weight": "token_embd.weight",
    "model.language_model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    **{
        f"{name}.{kind}": f"{other}.{kind}"
        for kind in ("weight", "bias")
        for name, other in {
            "model.visual.vision_model.embeddings.patch_embedding": "v.patch_embd",
            "model.visual.vision_model.embeddings.position_embedding": "v.position_embd",
            "model.visual.vision_model.post_layernorm": "v.post_ln",
            "model.projector.pre_norm": "mm.input_norm",
            "model.projector.linear_1": "mm.1",
            "model.projector.linear_2": "mm.2",
        }.items()
    },
}


def paddleocr_name(name: str) -> str:
    """Return llama.cpp's name of one of PaddleOCR-VL's tensors."""
    if name in WHOLE:
        return WHOLE[name]
    block, _, rest = name.partition(".layers.")
    number, rest = rest.split(".", 1)
    part, kind = rest.rsplit(".", 1)
    if block == "model.language_model":
        return f"blk.{number}.{TEXT_NAMES[part]}.{kind}"
    return f"v.blk.{number}.{VISION_NAMES[part]}.{kind}"


def paddleocr(checkpoint: Path, folder: Path, quantized: bool = True) -> None:
    """Write both parts of PaddleOCR-VL and its chat template."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    _write_text(checkpoint, config["text_config"], folder / "text.gguf", quantized)
    _write_vision(checkpoint, config, folder / "mmproj.gguf")
    shutil.copyfile(checkpoint / "chat_template.jinja", folder / "chat_template.jinja")


def _write_text(checkpoint: Path, text: dict[str, Any], path: Path, quantized: bool) -> None:
    import gguf

    rope = text["rope_parameters"]
    writer = gguf.GGUFWriter(path, "paddleocr", use_temp_file=True)
    add_text(writer, text | {"rope_theta": rope["rope_theta"]}, checkpoint)
    writer.add_key_length(text["head_dim"])
    writer.add_value_length(text["head_dim"])
    writer.add_rope_dimension_count(text["head_dim"])
    writer.add_rope_dimension_sections([*rope["mrope_section"], 0])
    matrix, table = text_types(quantized)
    for part in ("model.language_model.", "lm_head."):
        for name, values in tensors(checkpoint, part):
            kind = None if values.ndim == 1 else matrix if ".layers." in name else table
            data = values if kind is None else gguf.quants.quantize(values, kind)
            writer.add_tensor(paddleocr_name(name), data, raw_dtype=kind)
    close(writer)


def _write_vision(checkpoint: Path, config: dict[str, Any], path: Path) -> None:
    import gguf

    vision = config["vision_config"]
    pixels = json.loads((checkpoint / "preprocessor_config.json").read_text(encoding="utf-8"))["size"]
    writer = gguf.GGUFWriter(path, "clip", use_temp_file=True)
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "paddleocr")
    writer.add_bool("clip.use_gelu", True)
    sizes = {
        "image_size": vision["image_size"],
        "image_min_pixels": pixels["shortest_edge"],
        "image_max_pixels": pixels["longest_edge"],
        "patch_size": vision["patch_size"],
        "embedding_length": vision["hidden_size"],
        "feed_forward_length": vision["intermediate_size"],
        "block_count": vision["num_hidden_layers"],
        "attention.head_count": vision["num_attention_heads"],
        "projection_dim": config["text_config"]["hidden_size"],
        "spatial_merge_size": vision["spatial_merge_size"],
    }
    for name, size in sizes.items():
        writer.add_uint32(f"clip.vision.{name}", size)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision["layer_norm_eps"])
    writer.add_array("clip.vision.image_mean", [0.48145466, 0.4578275, 0.40821073])
    writer.add_array("clip.vision.image_std", [0.26862954, 0.26130258, 0.27577711])
    for part in ("model.visual.", "model.projector."):
        for name, values in tensors(checkpoint, part):
            plain = values.ndim == 1 or "position" in name
            writer.add_tensor(paddleocr_name(name), values.astype(np.float32 if plain else np.float16))
    close(writer)


WRITERS: dict[str, Callable[[Path, Path, bool], None]] = {"idefics3": peer_models.gguf, "paddleocr_vl": paddleocr}


def write(checkpoint: Path, folder: Path, quantized: bool = True) -> None:
    """Write a checkpoint of any family that is known here."""
    model_type = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["model_type"]
    if model_type not in WRITERS:
        raise SystemExit(f"{checkpoint} is {model_type}: there are {', '.join(WRITERS)}")
    WRITERS[model_type](checkpoint, folder, quantized)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--f32", action="store_true", help="keep the text part's weights as they are")
    arguments = parser.parse_args()
    make(arguments.folder, lambda folder: write(arguments.checkpoint, folder, not arguments.f32))


if __name__ == "__main__":
    main()
