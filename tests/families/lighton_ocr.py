"""Tiny seeded LightOnOCR checkpoints, and transformers' processor for them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.families.lighton_ocr import LightOnOcr
from tests.conftest import make_tokenizer, seed_weights
from tests.families.base import Builder, Reference
from tests.helpers.json_files import read_json, write_json

PATCH, MERGE = 4, 2
LONGEST_EDGE = 52
"""Thirteen patches: an odd last column makes no image tokens."""
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>", "<|vision_end|>", "<|image_pad|>"]
NAMED = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|image_pad|>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}
VISION: dict[str, Any] = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": LONGEST_EDGE,
    "patch_size": PATCH,
    "hidden_act": "silu",
}


def image_processor(**options: Any) -> Any:
    """Return the reference's image processor on Pillow and NumPy with the tiny checkpoint's sizes."""
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    sizes = {"size": {"longest_edge": LONGEST_EDGE}, "patch_size": {"height": PATCH, "width": PATCH}}
    return PixtralImageProcessorPil(**{**sizes, **options})


def reference_processor(words: Any, image_processor: Any, config: Any) -> Any:
    """Return `LightOnOcrProcessor`."""
    from transformers import LightOnOcrProcessor

    words._set_model_specific_special_tokens(NAMED)
    return LightOnOcrProcessor(
        image_processor, words, patch_size=PATCH, spatial_merge_size=MERGE, chat_template=TEMPLATE
    )


def family(processor: Any) -> LightOnOcr:
    """Return the runtime's family from the facts that the exporter takes from such a processor's file."""
    names = ("resample", "rescale_factor", "image_mean", "image_std")
    return LightOnOcr(
        {
            "image_token": "<|image_pad|>",
            "image_token_id": 5,
            "patch_size": PATCH,
            "merge_size": MERGE,
            "unit": processor.patch_size["height"],
            "longest_edge": processor.size["longest_edge"],
            **{name: getattr(processor, name) for name in names},
        }
    )


def make_checkpoint(folder: Path, *, tied: bool = True, **sections: dict[str, Any]) -> Path:
    """Write a seeded checkpoint as transformers 5.24 saves it; `sections` change what config.json says in them."""
    from transformers import GenerationConfig, LightOnOcrConfig, LightOnOcrForConditionalGeneration

    words = make_tokenizer(TOKENS, end="<|im_end|>")
    config = LightOnOcrConfig(
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        tie_word_embeddings=tied,
        text_config={
            **TEXT,
            "vocab_size": len(words),
            "tie_word_embeddings": tied,
            **sections.get("text_config", {}),
        },
        vision_config={**VISION, **sections.get("vision_config", {})},
    )
    model = seed_weights(LightOnOcrForConditionalGeneration(config))
    model.generation_config = GenerationConfig(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    model.save_pretrained(folder)
    reference_processor(words, image_processor(), config).save_pretrained(folder)
    return folder


def as_published(checkpoint: Path, folder: Path) -> Path:
    """Write the checkpoint with the keys that published files have besides, and the settings in files of their own."""
    shutil.copytree(checkpoint, folder)
    config = read_json(folder / "config.json")
    config |= {"projector_hidden_act": "gelu", "multimodal_projector_bias": False, "vision_feature_layer": -1}
    config["vision_config"]["rope_theta"] = config["vision_config"].pop("rope_parameters")["rope_theta"]
    write_json(folder / "config.json", config)
    stated = read_json(folder / "processor_config.json")
    settings = stated.pop("image_processor")
    write_json(folder / "preprocessor_config.json", {**settings, "patch_size": settings["patch_size"]["height"]})
    write_json(folder / "processor_config.json", stated)
    return folder


def packed(inputs: Mapping[str, Any]) -> np.ndarray:
    """Return the patches of all pictures one after another, without what makes these equally large, flat."""
    values = []
    for picture, (height, width) in zip(inputs["pixel_values"], inputs["image_sizes"].tolist(), strict=True):
        patches = picture[:, :height, :width].unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)
        values.append(patches.permute(1, 2, 0, 3, 4).reshape(-1).numpy())
    return np.concatenate(values)


class LightOnReference(Reference):
    """transformers on one checkpoint, which takes no picture of less than an image token."""

    strip = 100

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint, reference_processor)

    def pixels(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Return the patches of all pictures one after another, flat."""
        return packed(inputs)


BUILDER = Builder(
    {
        "published": lambda folder: as_published(make_checkpoint(folder / "saved"), folder / "published"),
        "saved": lambda folder: make_checkpoint(
            folder / "saved", tied=False, vision_config={"rope_parameters": {"rope_theta": 5000.0}}
        ),
    },
    LightOnReference,
    shapes=((20, 150), (150, 20), (97, 28), (8, 8)),
)
