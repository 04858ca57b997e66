"""Tiny seeded GLM-OCR checkpoints, and transformers on them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import make_tokenizer, seed_weights
from tests.families.base import Builder, Reference
from tests.helpers.json_files import read_json, write_json

PATCH, MERGE = 4, 2
UNIT = PATCH * MERGE
TOKENS = ["<|endoftext|>", "[gMASK]", "<|user|>", "<sop>", "<|system|>", "<|assistant|>", "<|begin_of_image|>"]
TOKENS += ["<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>"]
TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}{{ '\n<|' + message['role'] + '|>\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<|begin_of_image|><|image|><|end_of_image|>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0},
}
PARTIAL = {**TEXT["rope_parameters"], "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
}


def image_processor(**options: Any) -> Any:
    """Return the reference's image processor on Pillow and NumPy with the tiny checkpoint's sizes."""
    from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

    sizes = {"size": {"shortest_edge": 8 * UNIT**2, "longest_edge": 80 * UNIT**2}}
    return Glm46VImageProcessorPil(**{**sizes, "patch_size": PATCH, "merge_size": MERGE, **options})


def reference_processor(words: Any, image_processor: Any, config: Any) -> Any:
    """Return `Glm46VProcessor` without its video part, which needs torchvision."""
    from transformers import Glm46VProcessor

    class ForPictures(Glm46VProcessor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

        def create_mm_token_type_ids(self, input_ids: Any) -> list[list[int]]:
            return super().create_mm_token_type_ids(input_ids.tolist())  # NumPy warns of tensors

    return ForPictures(image_processor, words, chat_template=TEMPLATE)


def make_checkpoint(folder: Path, *, tied: bool = False, **sections: dict[str, Any]) -> Path:
    """Write a seeded checkpoint as transformers 5.24 saves it; `sections` change what config.json says in them."""
    from transformers import GenerationConfig, GlmOcrConfig, GlmOcrForConditionalGeneration

    words = make_tokenizer(TOKENS, end="<|user|>")
    ids = {
        "image": "image",
        "video": "video",
        "image_start": "begin_of_image",
        "image_end": "end_of_image",
        "video_start": "begin_of_video",
        "video_end": "end_of_video",
    }
    config = GlmOcrConfig(
        **{f"{name}_token_id": words.convert_tokens_to_ids(f"<|{token}|>") for name, token in ids.items()},
        tie_word_embeddings=tied,
        text_config={**TEXT, "vocab_size": len(words), **sections.get("text_config", {})},
        vision_config={**VISION, **sections.get("vision_config", {})},
    )
    model = seed_weights(GlmOcrForConditionalGeneration(config))
    model.generation_config = GenerationConfig(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    model.save_pretrained(folder)
    words.chat_template = TEMPLATE
    words.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def as_published(checkpoint: Path, folder: Path) -> Path:
    """Write the checkpoint with what published files have besides, a layer for multi-token prediction among it."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, folder)
    config = read_json(folder / "config.json")
    config["text_config"] |= {"attention_bias": False, "num_nextn_predict_layers": 1}
    config["text_config"]["rope_parameters"] |= {"partial_rotary_factor": 1.0}
    config["vision_config"] |= {"hidden_dropout_prob": 0.0, "image_size": 336}
    write_json(folder / "config.json", config)
    tensors = load_file(folder / "model.safetensors")
    norm = tensors["model.language_model.norm.weight"]
    extra = f"model.language_model.layers.{TEXT['num_hidden_layers']}.shared_head.norm.weight"
    save_file({**tensors, extra: norm.clone()}, folder / "model.safetensors", {"format": "pt"})
    return folder


class GlmReference(Reference):
    """transformers on one checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint, reference_processor)

    def inputs(self, images: Sequence[np.ndarray], question: str) -> dict[str, Any]:
        """Return the model's inputs for one question about `images`."""
        self.model.model.rope_deltas = None  # of the prompt before
        return super().inputs(images, question)

    def positions(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Return the position ids `(3, S)`."""
        found, _ = self.model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs.get("image_grid_thw")
        )
        return np.ascontiguousarray(found[:, 0].numpy())


BUILDER = Builder(
    {
        "published": lambda folder: as_published(make_checkpoint(folder / "saved"), folder / "published"),
        "partial": lambda folder: make_checkpoint(
            folder / "saved",
            text_config={"rope_parameters": PARTIAL},
            vision_config={"attention_bias": False},
        ),
    },
    GlmReference,
)
