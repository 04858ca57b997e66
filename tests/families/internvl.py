"""Tiny seeded InternVL checkpoints, and transformers' processor for them."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.conftest import make_tokenizer

TILE, PATCH = 32, 4
IMAGE_SEQ_LEN = (TILE // PATCH // 2) ** 2
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<ref>", "</ref>"]
NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "model_type": "qwen2",
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": [TILE, TILE],
    "patch_size": [PATCH, PATCH],
    "attention_bias": True,
}


def image_processor(**options: Any) -> Any:
    """Return the reference's image processor on Pillow and NumPy with the tiny checkpoint's sizes."""
    from transformers import GotOcr2ImageProcessorPil

    sizes = {"size": {"height": TILE, "width": TILE}}
    return GotOcr2ImageProcessorPil(**{**sizes, "image_mean": MEAN, "image_std": STD, **options})


def tokenizer() -> Any:
    """Return a tokenizer that names the image tokens."""
    made = make_tokenizer(TOKENS, end="<|im_end|>")
    made._set_model_specific_special_tokens(NAMED)
    return made


def processor(tokenizer: Any, image_processor: Any, image_seq_length: int = IMAGE_SEQ_LEN) -> Any:
    """Return `InternVLProcessor` without its video part, which needs torchvision."""
    from transformers import InternVLProcessor

    class ForPictures(InternVLProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    return ForPictures(image_processor, tokenizer, image_seq_length=image_seq_length)


def reference_pixels(image: np.ndarray, image_processor: Any, **options: Any) -> np.ndarray:
    """Return what the reference's image processor makes of one picture, `(T, 3, H, W)`.

    It is told that channels come last: left to guess, it takes a picture of 1, 3 or 4 rows for one of as many channels.
    """
    given = {"crop_to_patches": True, "input_data_format": "channels_last", "return_tensors": "np", **options}
    return np.asarray(image_processor([image], **given)["pixel_values"])
