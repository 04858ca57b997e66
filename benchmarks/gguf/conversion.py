"""What all families share: sizes, tokenizer, tensors by llama.cpp's names, and how each of them is stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.peer_models import add_text, close

BLOCK = 32
"""Q4_0 and Q8_0 have a scale for as many weights of a row."""
PROJECTOR_PARTS = 4
"""A projector's parts are numbered like layers."""
TEXT = "model.language_model."


class Conversion:
    """A checkpoint on its way to llama.cpp; a family says what is its own."""

    architecture: ClassVar[str]
    """llama.cpp's name of the text part."""
    projector: ClassVar[str]
    """llama.cpp's name of the vision part."""
    text_part: ClassVar[str] = TEXT
    """What the names of the text part's tensors begin with, but for an output head of its own."""
    mean_and_std: ClassVar[tuple[list[float], list[float]]] = ([0.5] * 3, [0.5] * 3)
    """Of a picture's pixels."""
    names: ClassVar[dict[str, str]] = {}
    """llama.cpp's names of tensors that `gguf`'s own tables lack, without `.weight` and `.bias`."""

    def __init__(self, checkpoint: Path, config: dict[str, Any], float32: bool) -> None:
        self.checkpoint, self.config, self.float32 = checkpoint, config, float32
        self.text = self.text_config()
        self.vision = self.vision_config()

    def text_config(self) -> dict[str, Any]:
        """Return the text part's config with the sizes by the names that Llama has for them."""
        return dict(self.config["text_config"])

    def vision_config(self) -> dict[str, Any]:
        """Return the vision part's config with the sizes by the names that SigLIP has for them."""
        return dict(self.config["vision_config"])

    def image_size(self) -> dict[str, int]:
        """Return `size` of the image processor, whichever file holds it."""
        paths = [self.checkpoint / name for name in ("preprocessor_config.json", "processor_config.json")]
        files = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
        return dict(next(held["size"] for each in files if "size" in (held := each.get("image_processor", each))))

    def add_text_keys(self, writer: Any) -> None:
        """Add keys of the text part beyond its sizes."""

    def add_vision_keys(self, writer: Any) -> None:
        """Add keys of the vision part beyond its sizes."""

    def turned(self, name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield a tensor of the checkpoint as llama.cpp wants it."""
        yield name, values

    def write(self, folder: Path) -> None:
        """Write both parts and the chat template."""
        self.write_text(folder / "text.gguf")
        self.write_vision(folder / "mmproj.gguf")
        shutil.copyfile(self.checkpoint / "chat_template.jinja", folder / "chat_template.jinja")

    def write_text(self, path: Path) -> None:
        """Write the text part."""
        import gguf

        writer = gguf.GGUFWriter(path, self.architecture, use_temp_file=True)
        add_text(writer, self.text, self.checkpoint)
        self.add_text_keys(writer)
        kind = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        table = gguf.get_tensor_name_map(kind, self.text["num_hidden_layers"])
        for name, values in self.tensors(text=True):
            place = self.place(table, name.replace(self.text_part, "model."))
            stored = self.text_type(place, values)
            data = values if stored is None else gguf.quants.quantize(values, stored)
            writer.add_tensor(place, np.ascontiguousarray(data), raw_dtype=stored)
        close(writer)

    def text_type(self, place: str, values: np.ndarray) -> Any:
        """Return how a tensor of the text part is quantized, None for float32."""
        import gguf

        if self.float32 or values.ndim == 1 or values.shape[-1] % BLOCK:  # a convolution's kernel is short
            return None
        whole = place in ("token_embd.weight", "output.weight")
        return gguf.GGMLQuantizationType.Q8_0 if whole else gguf.GGMLQuantizationType.Q4_0

    def write_vision(self, path: Path) -> None:
        """Write the vision part."""
        import gguf

        vision = self.vision
        writer = gguf.GGUFWriter(path, "clip", use_temp_file=True)
        writer.add_bool("clip.has_vision_encoder", True)
        writer.add_string("clip.projector_type", self.projector)
        writer.add_bool("clip.use_gelu", True)
        writer.add_uint32("clip.vision.image_size", vision["image_size"])
        writer.add_uint32("clip.vision.patch_size", vision["patch_size"])
        writer.add_uint32("clip.vision.embedding_length", vision["hidden_size"])
        writer.add_uint32("clip.vision.feed_forward_length", vision["intermediate_size"])
        writer.add_uint32("clip.vision.block_count", vision["num_hidden_layers"])
        writer.add_uint32("clip.vision.attention.head_count", vision["num_attention_heads"])
        writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision["layer_norm_eps"])
        writer.add_uint32("clip.vision.projection_dim", self.text["hidden_size"])
        for name, values in zip(("mean", "std"), self.mean_and_std, strict=True):
            writer.add_array(f"clip.vision.image_{name}", values)
        self.add_vision_keys(writer)
        numbers = max(vision["num_hidden_layers"], PROJECTOR_PARTS)
        table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, numbers)
        for name, values in self.tensors(text=False):
            place = self.place(table, name)
            plain = self.float32 or values.ndim == 1 or "position_embd" in place
            writer.add_tensor(place, np.ascontiguousarray(values, np.float32 if plain else np.float16))
        close(writer)

    def tensors(self, *, text: bool) -> Iterator[tuple[str, np.ndarray]]:
        """Yield name and float32 values of the tensors of the text part, or of all others."""
        from safetensors import safe_open

        for path in sorted(self.checkpoint.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    if text is name.startswith((self.text_part, "lm_head.")):
                        yield from self.turned(name, file.get_tensor(name).float().numpy())

    def place(self, table: Any, name: str) -> str:
        """Return llama.cpp's name of a tensor; what has one already keeps it."""
        part, dot, kind = name.rpartition(".")
        if part in self.names:
            return f"{self.names[part]}{dot}{kind}"
        for each in (name, name.removeprefix("model.")):
            if found := table.get_name(each, try_suffixes=(".weight", ".bias")):
                return str(found)
        if name.startswith("v."):
            return name
        raise ValueError(f"llama.cpp has no place for {name}")
