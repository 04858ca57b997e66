"""Tiny seeded Gemma 4 checkpoints, and transformers' processor for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.families.qwen_vl import packed_order
from tests.conftest import make_tokenizer, seed_weights
from tests.families.base import Builder, Reference
from tests.helpers.graphs import least_w8a8_cosine

PATCH, POOLED, MOST = 4, 2, 70
WINDOW = 10
TOKENS = ["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|image>", "<image|>", "<|image|>"]
TOKENS += ["<|audio>", "<audio|>", "<|audio|>", "<|video|>"]
NAMED = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
SOUND = {"boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>"}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '\n\n<|image|>\n\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}{{ '<turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\n' }}{% endif %}"
)
TEXT: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "max_position_embeddings": 2048,
    "sliding_window": WINDOW,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "full")],
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 32,
    "final_logit_softcapping": 30.0,
}
VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": PATCH,
    "pooling_kernel_size": POOLED,
    "position_embedding_size": 256,
    "use_clipped_linears": True,
}


def image_processor(**options: Any) -> Any:
    """Return the reference's image processor on Pillow and NumPy with the tiny checkpoint's sizes."""
    from transformers import Gemma4ImageProcessorPil

    return Gemma4ImageProcessorPil(
        **{"patch_size": PATCH, "pooling_kernel_size": POOLED, "max_soft_tokens": MOST, **options}
    )


def tokenizer() -> Any:
    """Return a tokenizer that names the image tokens."""
    made = make_tokenizer(TOKENS, end="<turn|>")
    made.bos_token, made.pad_token, made.unk_token = "<bos>", "<pad>", "<eos>"
    made._set_model_specific_special_tokens({**NAMED, **SOUND})
    return made


def make_checkpoint(folder: Path, *, tied: bool = True, **sections: dict[str, Any]) -> Path:
    """Write a seeded checkpoint as transformers 5.24 saves it; `sections` change what config.json says in them."""
    import torch
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration, GenerationConfig

    made = tokenizer()
    size = len(made)
    text = {**TEXT, "vocab_size": size, "vocab_size_per_layer_input": size, **sections.get("text_config", {})}
    model = Gemma4ForConditionalGeneration(
        Gemma4Config(
            text_config=text,
            vision_config={**VISION, **sections.get("vision_config", {})},
            audio_config=None,
            tie_word_embeddings=tied,
            video_token_id=made.convert_tokens_to_ids("<|video|>"),
            **{f"{name}_id": made.convert_tokens_to_ids(token) for name, token in (NAMED | SOUND).items()},
        )
    )
    seed_weights(model)
    with torch.no_grad():
        if tied:  # else a token's own embedding would outweigh all that layers add, and the answer repeat it
            model.model.language_model.embed_tokens.weight.mul_(0.03)
            model.model.language_model.norm.weight.mul_(9)
        for token in ("<|image|>", "<|audio|>", "<|video|>"):  # transformers reads such an answer as padding
            model.lm_head.weight[made.convert_tokens_to_ids(token)] = 0
        for name, weight in model.named_parameters():  # scores have no scale but these
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.mul_(0.5)
        for name, value in model.named_buffers():  # as if they had been trained
            if name.endswith("layer_scalar"):
                value.fill_(0.9)
            elif name.endswith(("_min", "_max")):
                value.fill_(-2.0 if name.endswith("_min") else 1.5)
    model.generation_config = GenerationConfig(bos_token_id=made.bos_token_id, eos_token_id=made.eos_token_id)
    model.save_pretrained(folder)
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def reference_processor(words: Any, image_processor: Any, config: Any) -> Any:
    """Return `Gemma4Processor` without its parts for sound and videos, which need torchvision."""
    from transformers import Gemma4Processor

    class ForPictures(Gemma4Processor):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    words._set_model_specific_special_tokens({**NAMED, **SOUND})
    return ForPictures(None, image_processor, words, None, chat_template=TEMPLATE)


class Gemma4Reference(Reference):
    """transformers on one checkpoint, whose patches are padded and lie in rows."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint, reference_processor)

    def pixels(self, inputs: Mapping[str, Any]) -> np.ndarray:
        """Return the patches of all pictures without padding, in the order of the image tokens that they become."""
        packed = []
        for patches, places in zip(inputs["pixel_values"].numpy(), inputs["image_position_ids"].numpy(), strict=True):
            cols, rows = places.max(axis=0) + 1
            packed.append(patches[: rows * cols][packed_order(rows, cols, POOLED)].ravel())
        return np.concatenate(packed)


BUILDER = Builder(
    {
        "saved": lambda folder: make_checkpoint(folder / "saved"),
        "untied": lambda folder: make_checkpoint(
            folder / "saved",
            tied=False,
            text_config={"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "final_logit_softcapping": None},
            vision_config={"use_clipped_linears": False, "standardize": True},
        ),
    },
    Gemma4Reference,
    shapes=((9, 150), (97, 28)),
    int8_cosine=least_w8a8_cosine(),
)
