"""Tiny seeded PaddleOCR-VL checkpoints, and transformers on them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.families.packing import packed_order
from tests.conftest import make_tokenizer, seed_weights
from tests.families.base import Builder, Reference
from tests.helpers.json_files import read_json, write_json

PATCH, MERGE = 4, 2
UNIT = PATCH * MERGE
TABLE_SIDE = 5
TOKENS = ["<unk>", "<|begin_of_sentence|>", "</s>", "<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_END|>"]
NAMED = {"image_token": "<|IMAGE_PLACEHOLDER|>"}
TEMPLATE = (
    "<|begin_of_sentence|>{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '\n' }}{% else %}{{ 'Assistant: ' }}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}"
    "{{ '</s>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": TABLE_SIDE * PATCH + 1,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
}


def image_processor(**options: Any) -> Any:
    """Return the reference's image processor on Pillow and NumPy with the tiny checkpoint's sizes."""
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

    sizes = {"size": {"shortest_edge": 4 * UNIT**2, "longest_edge": 40 * UNIT**2}}
    return PaddleOCRVLImageProcessorPil(**{**sizes, "patch_size": PATCH, "merge_size": MERGE, **options})


def reference_processor(words: Any, image_processor: Any, config: Any) -> Any:
    """Return `PaddleOCRVLProcessor`."""
    from transformers import PaddleOCRVLProcessor

    words._set_model_specific_special_tokens(NAMED)
    return PaddleOCRVLProcessor(image_processor, words, chat_template=TEMPLATE)


def make_checkpoint(folder: Path, *, tied: bool = False, held: bool = False, **sections: dict[str, Any]) -> Path:
    """Write a seeded checkpoint as transformers 5.24 saves it; `sections` change what config.json says in them.

    `held` calls the tensors as transformers' classes do in memory.
    """
    from transformers import GenerationConfig, PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

    words = make_tokenizer(TOKENS, end="</s>")
    ids = {name: words.convert_tokens_to_ids(f"<|IMAGE_{token}|>") for name, token in _IDS.items()}
    config = PaddleOCRVLConfig(
        **{f"{name}_token_id": number for name, number in ids.items()},
        tie_word_embeddings=tied,
        text_config={
            **TEXT,
            "vocab_size": len(words),
            "tie_word_embeddings": tied,
            **sections.get("text_config", {}),
        },
        vision_config={**VISION, **sections.get("vision_config", {})},
    )
    model = seed_weights(PaddleOCRVLForConditionalGeneration(config))
    model.generation_config = GenerationConfig(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    model.save_pretrained(folder, save_original_format=not held)
    reference_processor(words, image_processor(), config).save_pretrained(folder)
    return folder


_IDS = {"image": "PLACEHOLDER", "vision_start": "START", "vision_end": "END"}


def as_published(checkpoint: Path, folder: Path) -> Path:
    """Write the checkpoint as those on the hub are: the text model's keys beside the others, RoPE as transformers 4.

    They also have keys and tensors that the reference does not read, and the image processor's settings in a file of
    their own.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, folder)
    config = read_json(folder / "config.json")
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    kept = {name: text[name] for name in (*TEXT, "vocab_size", "rms_norm_eps", "use_bias") if name in text}
    scaling = {"mrope_section": rope["mrope_section"], "rope_type": "default", "type": "default"}
    config |= {**kept, "rope_scaling": scaling, "rope_theta": rope["rope_theta"], "sliding_window": None}
    config |= {"compression_ratio": 1.0, "hidden_dropout_prob": 0.0, "ignored_index": -100, "max_sequence_length": None}
    config |= {"rope_is_neox_style": True, "use_3d_rope": True, "use_flash_attention": False}
    config |= {"weight_share_add_bias": True}
    config["vision_config"] = {**VISION, "model_type": "paddleocr_vl", "temporal_patch_size": 2, "tokens_per_second": 2}
    write_json(folder / "config.json", config)
    stated = read_json(folder / "processor_config.json")
    settings = stated.pop("image_processor")
    size = settings.pop("size")
    bounds = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    write_json(folder / "preprocessor_config.json", {**settings, **bounds, "size": bounds})
    write_json(folder / "processor_config.json", stated)
    tensors = load_file(folder / "model.safetensors")
    norm = tensors["visual.vision_model.post_layernorm.weight"]
    extras = ("embeddings.packing_position_embedding.weight", "head.layernorm.weight")
    tensors |= {f"visual.vision_model.{name}": norm.clone() for name in extras}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def packed(inputs: Mapping[str, Any]) -> np.ndarray:
    """Return the patches of all pictures, those of an image token one after another, flat."""
    values, start = [], 0
    pixels = inputs["pixel_values"].numpy()
    for _, rows, cols in inputs["image_grid_thw"].tolist():
        values.append(pixels[start : start + rows * cols][packed_order(rows, cols, MERGE)].ravel())
        start += rows * cols
    return np.concatenate(values)


class PaddleReference(Reference):
    """transformers on one checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint, reference_processor)

    def inputs(self, images: Sequence[np.ndarray], question: str) -> dict[str, Any]:
        """Return the model's inputs for one question about `images`."""
        self.model.model.rope_deltas = None  # of the prompt before
        return super().inputs(images, question)

    def pixels(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Return the patches of all pictures in the order that they have here, flat."""
        return packed(inputs)

    def positions(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Return the position ids `(3, S)`."""
        found, _ = self.model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs.get("image_grid_thw")
        )
        return np.ascontiguousarray(found[:, 0].numpy())


BUILDER = Builder(
    {
        "published": lambda folder: as_published(make_checkpoint(folder / "saved"), folder / "published"),
        "held": lambda folder: make_checkpoint(folder / "saved", tied=True, held=True, text_config={"use_bias": True}),
    },
    PaddleReference,
)
