"""Tiny seeded Gemma 3 checkpoints, and transformers' processor for them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import make_tokenizer, seed_weights
from tests.families.base import Builder, Reference
from tests.families.llava import as_held, old_name
from tests.helpers.graphs import least_w8a8_cosine
from tests.helpers.json_files import read_json, write_json

SIDE, PATCH = 32, 4
IMAGE_SEQ_LEN = 16
WINDOW = 10
"""Shorter than a picture's image tokens, and than every prompt."""
TOKENS = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"]
TOKENS += ["<image_soft_token>"]
NAMED = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
"""As published: it writes <bos>, which the tokenizer adds by itself, too."""
GLOBAL = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}
TEXT: dict[str, Any] = {
    "hidden_size": 96,  # its root is no whole number
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 20,
    "max_position_embeddings": 2048,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 3,
    "rope_parameters": {
        "full_attention": GLOBAL,
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
USUAL: dict[str, Any] = {  # heads and the order of layers are those of the class
    **{name: TEXT[name] for name in ("hidden_size", "intermediate_size", "sliding_window", "rope_parameters")},
    "num_hidden_layers": 6,
}
VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
    "vision_use_head": False,
}


def image_processor(**options: Any) -> Any:
    """Return the reference's image processor on Pillow and NumPy with the tiny checkpoint's sizes."""
    from transformers import Gemma3ImageProcessorPil

    return Gemma3ImageProcessorPil(**{"size": {"height": SIDE, "width": SIDE}, **options})


def reference_pixels(image: np.ndarray, image_processor: Any, **options: Any) -> np.ndarray:
    """Return what the reference's image processor makes of one picture, `(T, 3, H, W)`.

    It is told that channels come last: left to guess, it takes a picture of 1, 3 or 4 rows for one of as many channels.
    """
    given = {"input_data_format": "channels_last", "return_tensors": "np", **options}
    return np.asarray(image_processor([image], **given)["pixel_values"])


def tokenizer() -> Any:
    """Return a tokenizer that begins a text with <bos> and names the image tokens."""
    from tokenizers.processors import TemplateProcessing

    made = make_tokenizer(TOKENS, end="<end_of_turn>")
    made.bos_token, made.pad_token, made.unk_token = "<bos>", "<pad>", "<eos>"
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", made.convert_tokens_to_ids("<bos>"))]
    )
    made._set_model_specific_special_tokens(NAMED)
    return made


def make_checkpoint(folder: Path, *, tied: bool = True, bfloat16: bool = False, **sections: dict[str, Any]) -> Path:
    """Write a seeded checkpoint as transformers 5.24 saves it; `sections` replace or change those of config.json."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, GenerationConfig

    made = tokenizer()
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={"vocab_size": len(made), **sections.get("text_config", TEXT)},
            vision_config={**VISION, **sections.get("vision_config", {})},
            mm_tokens_per_image=IMAGE_SEQ_LEN,
            tie_word_embeddings=tied,
            **{f"{name}_index": made.convert_tokens_to_ids(token) for name, token in NAMED.items()},
        )
    )
    seed_weights(model)
    with torch.no_grad():
        if tied:  # else a token's own embedding would outweigh all that layers add, and the answer repeat it
            model.model.language_model.embed_tokens.weight.mul_(0.03)
            model.model.language_model.norm.weight.add_(8)
    if bfloat16:
        model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=made.bos_token_id, eos_token_id=made.eos_token_id)
    model.save_pretrained(folder)
    reference_processor(made, image_processor(), model.config).save_pretrained(folder)
    return folder


def reference_processor(words: Any, image_processor: Any, config: Any) -> Any:
    """Return `Gemma3Processor` as published checkpoints set it up."""
    from transformers import Gemma3Processor

    words._set_model_specific_special_tokens(NAMED)
    return Gemma3Processor(image_processor, words, TEMPLATE, image_seq_length=config.mm_tokens_per_image)


def as_published(checkpoint: Path, folder: Path) -> Path:
    """Write the checkpoint as transformers 4 laid it out: most of the text model is left to its class."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({old_name(name): array for name, array in tensors.items()}, folder / "model.safetensors")
    config = read_json(folder / "config.json")
    text = config["text_config"]
    kept = ("hidden_size", "intermediate_size", "model_type", "num_hidden_layers", "sliding_window", "vocab_size")
    config["text_config"] = {name: text[name] for name in kept}
    config["text_config"]["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}
    config["vision_config"] = VISION
    config.pop("tie_word_embeddings", None)
    write_json(folder / "config.json", config)
    both = read_json(folder / "processor_config.json")
    settings = both.pop("image_processor")
    unset = dict.fromkeys(("do_convert_rgb", "do_pan_and_scan", "pan_and_scan_min_crop_size"))
    write_json(folder / "preprocessor_config.json", {**settings, **unset, "image_seq_length": IMAGE_SEQ_LEN})
    write_json(folder / "processor_config.json", both)
    return folder


def make_reference(checkpoint: Path) -> Reference:
    """Return transformers on a checkpoint."""
    return Reference(checkpoint, reference_processor)


BUILDER = Builder(
    {
        "saved": lambda folder: make_checkpoint(folder / "saved"),
        "published": lambda folder: as_published(
            make_checkpoint(folder / "saved", text_config=USUAL), folder / "published"
        ),
        "held": lambda folder: as_held(make_checkpoint(folder / "saved"), folder / "held"),
        "untied": lambda folder: make_checkpoint(folder / "saved", tied=False),
    },
    make_reference,
    int8_cosine=least_w8a8_cosine(),
)
