"""Tiny seeded InternVL checkpoints, and transformers' processor for them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import make_tokenizer, seed_weights
from tests.families.base import Builder, Reference
from tests.helpers.json_files import read_json, write_json

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


def make_checkpoint(folder: Path, *, tied: bool = False, held: bool = False, **sections: dict[str, Any]) -> Path:
    """Write a seeded checkpoint as transformers 5.24 saves it; `sections` change what config.json says in them.

    `held` calls the tensors as transformers' classes do in memory.
    """
    import transformers

    made = tokenizer()
    config = transformers.InternVLConfig(
        image_token_id=made.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=IMAGE_SEQ_LEN,
        tie_word_embeddings=tied,
        text_config={**TEXT, "vocab_size": len(made), "tie_word_embeddings": tied, **sections.get("text_config", {})},
        vision_config={**VISION, **sections.get("vision_config", {})},
    )
    model = seed_weights(transformers.InternVLForConditionalGeneration(config))
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=made.eos_token_id, pad_token_id=made.pad_token_id
    )
    model.save_pretrained(folder, save_original_format=not held)
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    given = {**processor(made, image_processor()).to_dict(), "processor_class": "InternVLProcessor"}
    write_json(folder / "processor_config.json", {name: each for name, each in given.items() if each is not None})
    return folder


def as_published(checkpoint: Path, folder: Path) -> Path:
    """Write the checkpoint as those on the hub are laid out, which transformers 4 saved: most keys left to the class,
    RoPE of the type that the config of the original model names, and a template that writes `<image>`."""
    shutil.copytree(checkpoint, folder)
    config = read_json(folder / "config.json")
    text = config["text_config"]
    theta = text.pop("rope_parameters")["rope_theta"]
    scaling = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
    config["text_config"] = {name: text[name] for name in (*TEXT, "vocab_size", "max_window_layers")} | {
        "rope_theta": theta,
        "rope_scaling": scaling,
        "torch_dtype": "float32",
    }
    config.pop("tie_word_embeddings")
    write_json(folder / "config.json", config)
    processor_config = read_json(folder / "processor_config.json")
    settings = {**processor_config["image_processor"], "crop_to_patches": False, "data_format": "channels_first"}
    write_json(folder / "preprocessor_config.json", settings)
    stated = {"image_seq_length": IMAGE_SEQ_LEN, "processor_class": "InternVLProcessor"}
    write_json(folder / "processor_config.json", stated)
    named = read_json(folder / "tokenizer_config.json")
    named["extra_special_tokens"] = {name: named.pop(name) for name in NAMED}
    write_json(folder / "tokenizer_config.json", named)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<IMG_CONTEXT>", "<image>"), encoding="utf-8")
    return folder


def reference_processor(words: Any, image_processor: Any, config: Any) -> Any:
    """Return the processor of a checkpoint, whose template may have been published with `<image>`."""
    words._set_model_specific_special_tokens(NAMED)
    made = processor(words, image_processor)
    made.chat_template = TEMPLATE
    return made


def make_reference(checkpoint: Path) -> Reference:
    """Return transformers on a checkpoint."""
    return Reference(checkpoint, reference_processor)


BUILDER = Builder(
    {
        "published": lambda folder: as_published(make_checkpoint(folder / "saved"), folder / "published"),
        "saved": lambda folder: make_checkpoint(folder / "saved"),
        "held": lambda folder: make_checkpoint(folder / "saved", held=True),
        "tied": lambda folder: make_checkpoint(folder / "saved", tied=True),
        "qwen3": lambda folder: make_checkpoint(folder / "saved", text_config={"model_type": "qwen3", "head_dim": 32}),
        "norms": lambda folder: make_checkpoint(
            folder / "saved",
            vision_config={"use_qk_norm": True, "norm_type": "rms_norm", "use_mean_pooling": False},
        ),
        "bare": lambda folder: make_checkpoint(
            folder / "saved",
            vision_config={
                "attention_bias": False,
                "use_absolute_position_embeddings": False,
                "use_mask_token": True,
            },
        ),
    },
    make_reference,
)
