"""Tiny seeded MiniCPM-V 4.6 checkpoints, and transformers on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.families.minicpm import MERGED, packed_order
from tests.conftest import make_tokenizer, seed_weights
from tests.families import qwen_vl
from tests.families.base import Builder, Reference
from tests.helpers.json_files import read_json, write_json

PATCH, SIDE, RESOLUTION = 4, 8, 48
"""A view has about 3 x 3 image tokens of 16 x 16 pixels."""
NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *NAMED.values()]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|image_pad|>\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE * PATCH,
    "patch_size": PATCH,
}


def image_processor() -> Any:
    """Return the reference's image processor on Pillow and NumPy with the tiny checkpoint's sizes."""
    from transformers import MiniCPMV4_6ImageProcessorPil

    return MiniCPMV4_6ImageProcessorPil(patch_size=PATCH, scale_resolution=RESOLUTION, max_slice_nums=4)


def make_checkpoint(folder: Path) -> Path:
    """Write a seeded checkpoint as transformers 5.24 saves it."""
    import transformers

    made = make_tokenizer(TOKENS, end="<|im_end|>")
    made._set_model_specific_special_tokens(NAMED)
    config = transformers.MiniCPMV4_6Config(
        image_token_id=made.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=made.convert_tokens_to_ids("<|video_pad|>"),
        insert_layer_id=1,
        text_config={"model_type": "qwen3_5_text", **qwen_vl.TEXT["qwen3_5"], "vocab_size": len(made)},
        vision_config=VISION,
    )
    transformers.set_seed(7)  # what is left as it is initialised, such as the decay of a delta net
    model = seed_weights(transformers.MiniCPMV4_6ForConditionalGeneration(config))
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=made.eos_token_id, pad_token_id=made.pad_token_id
    )
    model.save_pretrained(folder)
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def as_silent(folder: Path) -> Path:
    """Let config.json say no more than it must: the rest is the classes' own."""
    config = read_json(folder / "config.json")
    config["text_config"].pop("model_type")
    config["vision_config"] = VISION
    for key in ("downsample_mode", "merge_kernel_size", "merger_times", "drop_vision_last_layer"):
        config.pop(key, None)
    write_json(folder / "config.json", config)
    return folder


def reference_processor(words: Any, image_processor: Any, config: Any) -> Any:
    """Return `MiniCPMV4_6Processor`, the image processor standing for that of videos, which needs torchvision."""
    from transformers import MiniCPMV4_6Processor

    class ForPictures(MiniCPMV4_6Processor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None

    words._set_model_specific_special_tokens(NAMED)
    return ForPictures(image_processor, image_processor, words, chat_template=TEMPLATE)


class MiniCPMReference(Reference):
    """transformers on one checkpoint."""

    logits_atol = 1e-3  # its text model is Qwen3.5's

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint, reference_processor)

    def positions(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Return the position ids `(3, S)`: the text model takes one number for all axes."""
        return np.tile(super().positions(inputs), (3, 1))

    def pixels(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Return the values of all patches, in the order in which the encoder takes them here."""
        values, start, found = inputs["pixel_values"][0].numpy(), 0, []
        for rows, cols in inputs["target_sizes"].tolist():
            packed = values[:, :, start : start + rows * cols * PATCH].reshape(3, PATCH, rows * cols, PATCH)
            found.append(packed.transpose(2, 0, 1, 3)[packed_order(rows, cols)].ravel())
            start += rows * cols * PATCH
        assert all(side % MERGED == 0 for side in inputs["target_sizes"].ravel().tolist())
        return np.concatenate(found)


BUILDER = Builder(
    {"silent": lambda folder: as_silent(make_checkpoint(folder / "saved"))},
    MiniCPMReference,
    shapes=((9, 150), (7, 7)),
)
