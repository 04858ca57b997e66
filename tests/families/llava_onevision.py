"""Tiny seeded LLaVA-OneVision checkpoints, and transformers' processor for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import make_tokenizer, seed_weights
from tests.families.base import Builder, Reference
from tests.families.llava import TEXT, as_held, in_old_layout
from tests.helpers.graphs import least_w8a8_cosine

TILE, PATCH = 28, 7
MEAN, STD = [0.5, 0.4, 0.6], [0.5, 0.6, 0.4]
GRIDS = [[TILE * rows, TILE * cols] for rows in range(1, 7) for cols in range(1, 7)]
ASPECT_RATIO = "anyres_max_4"
"""So that pictures of some more tiles are shrunk."""
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": PATCH,
    "vision_use_head": False,
}


def image_processor(**options: Any) -> Any:
    """Return the reference's image processor on Pillow and NumPy with the tiny checkpoint's sizes."""
    from transformers import LlavaOnevisionImageProcessorPil

    sizes = {"size": {"height": TILE, "width": TILE}, "image_grid_pinpoints": GRIDS}
    return LlavaOnevisionImageProcessorPil(**{**sizes, "image_mean": MEAN, "image_std": STD, **options})


def reference_processor(words: Any, image_processor: Any, config: Any) -> Any:
    """Return `LlavaOnevisionProcessor` without its video part, which needs torchvision."""
    from transformers import LlavaOnevisionProcessor

    class ForPictures(LlavaOnevisionProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

    vision = config.vision_config
    return ForPictures(
        image_processor,
        words,
        num_image_tokens=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=config.vision_aspect_ratio,
        chat_template=TEMPLATE,
    )


def make_llava_onevision(folder: Path, text: Any = None, vision: Any = None, **config: Any) -> Path:
    """Write a seeded checkpoint as transformers 5 lays it out; the arguments change its parts' configurations."""
    from transformers import GenerationConfig, LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    words = make_tokenizer(TOKENS, end="<|im_end|>")
    model = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(words), **(text or {})},
            vision_config={**VISION, **(vision or {})},
            image_token_index=words.convert_tokens_to_ids("<image>"),
            video_token_index=words.convert_tokens_to_ids("<video>"),
            **{"image_grid_pinpoints": GRIDS, "vision_aspect_ratio": ASPECT_RATIO, **config},
        )
    )
    seed_weights(model)
    model.generation_config = GenerationConfig(eos_token_id=words.eos_token_id)
    model.save_pretrained(folder)
    reference_processor(words, image_processor(), model.config).save_pretrained(folder)
    return folder


def reference_views(images: list[np.ndarray], image_processor: Any) -> list[np.ndarray]:
    """Return what the reference's image processor makes of the pictures of one prompt, each `(T, 3, H, W)`.

    Pictures are padded to the largest number of views: what is made up is left out.
    """
    made = image_processor([images], input_data_format="channels_last", return_tensors="np", do_pad=False)
    return [np.asarray(each) for each in made["pixel_values"]]


def make_reference(checkpoint: Path) -> Reference:
    """Return transformers on a checkpoint."""
    return Reference(checkpoint, reference_processor)


BUILDER = Builder(
    {
        "saved": lambda folder: make_llava_onevision(folder / "saved"),
        "old": lambda folder: in_old_layout(make_llava_onevision(folder / "saved"), folder / "old"),
        "held": lambda folder: as_held(make_llava_onevision(folder / "saved"), folder / "held"),
    },
    make_reference,
    shapes=((12, 150), (150, 12), (30, 60), (97, 28), (20, 20)),
    int8_cosine=least_w8a8_cosine(),
)
