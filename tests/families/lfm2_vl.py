"""Tiny seeded LFM2-VL checkpoints, and transformers on them.

transformers' image processor is torchvision's. What it takes of torchvision are `resize` and `normalize`; here it is
given both, so that it runs without, and resizes with what a test asks for: Pillow where pixels must be equal.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

from edgevlm.families.imaging import resized
from tests.conftest import make_tokenizer, seed_weights
from tests.families.base import Builder, Reference
from tests.helpers.json_files import read_json, write_json

PATCH, MERGE, TILE, MAX_TILES = 4, 2, 32, 10
UNIT = PATCH * MERGE
BOS = "<|startoftext|>"
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", BOS, "<image>"]
TOKENS += [f"<|img_row_{r}_col_{c}|>" for r in range(1, 11) for c in range(1, 11) if r * c <= MAX_TILES]
TOKENS += ["<|img_thumbnail|>", "<|image_start|>", "<|image_end|>"]
TEMPLATE = (
    "{{- bos_token -}}{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'assistant' -%}{%- generation -%}{%- for part in message['content'] -%}"
    "{{- part['text'] -}}{%- endfor -%}{{- '<|im_end|>\n' -}}{%- endgeneration -%}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<image>' -}}{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{{- '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
TEXT: dict[str, Any] = {
    "model_type": "lfm2",
    "hidden_size": 64,
    "intermediate_size": 130,
    "block_multiple_of": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "max_position_embeddings": 2048,
}
VISION: dict[str, Any] = {
    "model_type": "siglip2_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
    "num_patches": 25,
    "vision_use_head": False,
}
SETTINGS: dict[str, Any] = {
    "image_processor_type": "Lfm2VlImageProcessor",
    "encoder_patch_size": PATCH,
    "downsample_factor": MERGE,
    "do_image_splitting": True,
    "min_tiles": 2,
    "max_tiles": MAX_TILES,
    "use_thumbnail": True,
    "tile_size": TILE,
    "min_image_tokens": 4,
    "max_image_tokens": 16,
    "max_pixels_tolerance": 2.0,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.4, 0.6],
    "image_std": [0.5, 0.6, 0.4],
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_pad": True,
    "return_row_col_info": True,
}
_REPEATED = {name: SETTINGS[name] for name in ("do_image_splitting", "encoder_patch_size", "max_image_tokens")}
_TRAINED = {"block_dim": 64, "block_norm_eps": 1e-5, "block_use_swiglu": True, "conv_dim": 64, "use_pos_enc": True}
Resize = Callable[[Any, tuple[int, int]], Any]
"""Takes pictures `(B, 3, H, W)`, a uint8 tensor, and a height and a width."""


class _Interpolation(Enum):
    BILINEAR = "bilinear"
    LANCZOS = "lanczos"
    BICUBIC = "bicubic"


def pillow_resize(images: Any, size: tuple[int, int]) -> Any:
    """Resize as edgevlm does."""
    import torch

    found = [resized(each.permute(1, 2, 0).numpy(), size, Image.Resampling.BILINEAR) for each in images]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


def torch_resize(images: Any, size: tuple[int, int]) -> Any:
    """Resize as torchvision 0.28 does (`resize_image`): on uint8 where the CPU has AVX2, else in float32, rounded."""
    import torch

    if tuple(images.shape[-2:]) == tuple(size):
        return images
    native = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    given = images if native else images.to(torch.float32)
    found = torch.nn.functional.interpolate(given, size=size, mode="bilinear", align_corners=False, antialias=True)
    return found if native else found.round().to(torch.uint8)


def _normalize(image: Any, mean: Any, std: Any, inplace: bool = False) -> Any:
    """What torchvision 0.28 does."""
    import torch

    mean, std = (torch.as_tensor(each, dtype=image.dtype).view(-1, 1, 1) for each in (mean, std))
    return (image.sub_(mean) if inplace else image.sub(mean)).div_(std)


@cache
def image_processor_class() -> Any:
    """Return transformers' `Lfm2VlImageProcessor`, whose module names torchvision's functions in its signatures."""
    name = "transformers.models.lfm2_vl.image_processing_lfm2_vl"
    if find_spec("torchvision") is not None:
        return import_module(name).Lfm2VlImageProcessor
    packages = ["torchvision", "torchvision.transforms", "torchvision.transforms.v2"]
    sys.modules |= {package: ModuleType(package) for package in packages}
    sys.modules[packages[-1]].functional = SimpleNamespace()  # type: ignore[attr-defined]
    try:
        return import_module(name).Lfm2VlImageProcessor
    finally:
        for package in packages:
            del sys.modules[package]


@contextmanager
def resizing_with(resize: Resize) -> Iterator[None]:
    """Let transformers' processors of torchvision resize like this."""
    from transformers import image_processing_backends as backends

    functions = SimpleNamespace(
        InterpolationMode=_Interpolation,
        resize=lambda images, size, **_: resize(images, size),
        normalize=_normalize,
    )
    kinds = {Image.Resampling.BILINEAR: _Interpolation.BILINEAR}
    with (
        patch.object(backends, "tvF", functions, create=True),
        patch.object(backends, "pil_torch_interpolation_mapping", kinds),
    ):
        yield


def image_processor(**options: Any) -> Any:
    """Return the reference's image processor with the tiny checkpoint's sizes."""
    return image_processor_class()(**{**SETTINGS, **options})


def packed(inputs: Mapping[str, Any]) -> list[np.ndarray]:
    """Return the values of each view's patches `(N, P * P * 3)`, without padding, those of an image token together."""
    views = []
    for values, shape in zip(inputs["pixel_values"].numpy(), inputs["spatial_shapes"].tolist(), strict=True):
        rows, cols = shape
        grid = values[: rows * cols].reshape(rows // MERGE, MERGE, cols // MERGE, MERGE, -1)
        views.append(grid.transpose(0, 2, 1, 3, 4).reshape(rows * cols, -1))
    return views


def reference_processor(words: Any, image_processor: Any, config: Any) -> Any:
    """Return `Lfm2VlProcessor`, whose check of the image processor's class needs torchvision."""
    from transformers.models.lfm2_vl.processing_lfm2_vl import Lfm2VlProcessor

    class ForPictures(Lfm2VlProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return (
                None
                if argument_name == "image_processor"
                else super().check_argument_for_proper_class(argument_name, argument)
            )

    return ForPictures(image_processor, words, chat_template=TEMPLATE)


class Lfm2VlReference(Reference):
    """transformers on one checkpoint, its image processor resizing with Pillow."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint, reference_processor)

    def image_processor(self, checkpoint: Path) -> Any:
        """Return the checkpoint's image processor."""
        return image_processor_class().from_dict(read_json(checkpoint / "processor_config.json")["image_processor"])

    def inputs(self, images: Sequence[np.ndarray], question: str) -> dict[str, Any]:
        """Return the model's inputs for one question about `images`."""
        with resizing_with(pillow_resize):
            return super().inputs([np.array(each) for each in images], question)  # torch wants arrays of its own

    def pixels(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Return what the vision model is given of all pictures, packed and flat."""
        return np.concatenate([each.ravel() for each in packed(inputs)])


def make_checkpoint(
    folder: Path, *, tied: bool = True, held: bool = False, settings: Mapping[str, Any] | None = None, **config: Any
) -> Path:
    """Write a seeded checkpoint as transformers 5.24 saves it; `config` changes what config.json says.

    `held` calls the tensors as transformers' classes do in memory, `settings` are the image processor's.
    """
    import transformers
    from tokenizers import processors

    made = make_tokenizer(TOKENS, end="<|im_end|>")
    made.bos_token = BOS
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, made.convert_tokens_to_ids(BOS))]
    )
    model_config = transformers.Lfm2VlConfig(
        image_token_id=made.convert_tokens_to_ids("<image>"),
        downsample_factor=MERGE,
        tie_word_embeddings=tied,
        text_config={
            **TEXT,
            "vocab_size": len(made),
            "tie_word_embeddings": tied,
            "pad_token_id": made.pad_token_id,
            **config.pop("text_config", {}),
        },
        vision_config={**VISION, **config.pop("vision_config", {})},
        **{"projector_hidden_size": 40, "projector_use_layernorm": False, **config},
    )
    model = seed_weights(transformers.Lfm2VlForConditionalGeneration(model_config))
    if tied:  # logits of 40 would differ by more than 1e-4 for their size alone
        model.get_input_embeddings().weight.data.div_(3)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=made.eos_token_id, pad_token_id=made.pad_token_id
    )
    model.save_pretrained(folder, save_original_format=not held)
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    write_json(
        folder / "processor_config.json",
        {"image_processor": {**SETTINGS, **(settings or {})}, "processor_class": "Lfm2VlProcessor"},
    )
    return folder


def as_published(checkpoint: Path, folder: Path) -> Path:
    """Write the checkpoint's configuration as those on the hub are: RoPE and sizes in older words, keys of training,
    and the processor's settings repeated."""
    shutil.copytree(checkpoint, folder)
    config = read_json(folder / "config.json")
    text = config["text_config"]
    kept = {name: text[name] for name in (*TEXT, "vocab_size")}
    kept["block_ff_dim"] = kept.pop("intermediate_size")
    kept |= {"rope_theta": text["rope_parameters"]["rope_theta"], "tie_embedding": True, **_TRAINED}
    config |= {"text_config": kept, "vision_config": VISION, "vision_feature_layer": -1, **_REPEATED}
    write_json(folder / "config.json", config)
    return folder


def _saved(**options: Any) -> Callable[[Path], Path]:
    """Return what writes a checkpoint that shows a long strip as a whole: where it splits one, the reference fails."""
    settings = {"max_image_tokens": 100, "max_tiles": 4, **options.pop("settings", {})}
    return lambda folder: make_checkpoint(folder / "saved", settings=settings, **options)


BUILDER = Builder(
    {
        "published": lambda folder: as_published(_saved()(folder), folder / "published"),
        "held": _saved(held=True, projector_use_layernorm=True),
        "indexed": _saved(
            tied=False,
            text_config={
                "layer_types": None,
                "full_attn_idxs": [0, 3],
                "conv_bias": True,
                "conv_L_cache": 4,
                "block_auto_adjust_ff_dim": False,
                "intermediate_size": 96,
            },
            projector_bias=False,
            vision_config={"vision_use_head": True, "num_patches": 144},
            settings={"do_image_splitting": False},
        ),
    },
    Lfm2VlReference,
)
