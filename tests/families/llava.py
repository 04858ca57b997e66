"""Tiny seeded LLaVA checkpoints, and transformers' processor for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tests.conftest import make_tokenizer, seed_weights
from tests.families.base import Builder, Reference
from tests.helpers.graphs import least_w8a8_cosine

SIDE, PATCH = 28, 7
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As llava-hf's checkpoints have it: the tokenizer adds the first token, not the template."""
TEXT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
    "projection_dim": 16,
}


def clip_processor(kind: str = "CLIP", **options: Any) -> Any:
    """Return the reference's image processor on Pillow and NumPy with the tiny checkpoint's sizes."""
    import transformers

    made = getattr(transformers, f"{kind}ImageProcessorPil")
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return made(**{**sizes, "image_mean": MEAN, "image_std": STD, **options})


def siglip_processor(**options: Any) -> Any:
    """Return SigLIP's image processor, which distorts."""
    from transformers import SiglipImageProcessorPil

    return SiglipImageProcessorPil(**{"size": {"height": SIDE, "width": SIDE}, **options})


def tokenizer() -> Any:
    """Return a tokenizer that begins a text with <s>, as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    made = make_tokenizer(TOKENS, end="</s>")
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", made.convert_tokens_to_ids("<s>"))]
    )
    made.bos_token, made.pad_token, made.unk_token = "<s>", "<pad>", "<unk>"
    return made


def make_llava(folder: Path, image_processor: Any = None, text: Any = None, vision: Any = None, **config: Any) -> Path:
    """Write a seeded checkpoint as transformers 5 lays it out; the arguments change its parts' configurations."""
    from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

    words = tokenizer()
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config={**TEXT, "vocab_size": len(words), **(text or {})},
            vision_config={**CLIP, **(vision or {})},
            image_token_index=words.convert_tokens_to_ids("<image>"),
            **config,
        )
    )
    seed_weights(model)
    model.generation_config = GenerationConfig(bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id)
    model.save_pretrained(folder)
    reference_processor(words, image_processor or clip_processor(), model.config).save_pretrained(folder)
    return folder


def reference_processor(words: Any, image_processor: Any, config: Any) -> Any:
    """Return `LlavaProcessor` as published checkpoints set it up."""
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor,
        words,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(config.vision_config.model_type == "clip_vision_model"),
        chat_template=TEMPLATE,
    )


def reference_pixels(image: np.ndarray, image_processor: Any) -> np.ndarray:
    """Return what the reference's image processor makes of one picture, `(T, 3, H, W)`.

    It is told that channels come last: left to guess, it takes a picture of 1, 3 or 4 rows for one of as many channels.
    """
    return np.asarray(image_processor([image], input_data_format="channels_last", return_tensors="np")["pixel_values"])


def make_reference(checkpoint: Path) -> Reference:
    """Return transformers on a checkpoint."""
    return Reference(checkpoint, reference_processor)


def in_old_layout(checkpoint: Path, folder: Path) -> Path:
    """Write the checkpoint anew as transformers 4 laid it out: names of tensors, and files of the processor."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors", "chat_template.jinja"))
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({old_name(name): array for name, array in tensors.items()}, folder / "model.safetensors")
    both = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    _write(folder / "preprocessor_config.json", both.pop("image_processor"))
    _write(folder / "processor_config.json", both)
    _write(folder / "chat_template.json", {"chat_template": (checkpoint / "chat_template.jinja").read_text("utf-8")})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["rope_theta"] = config["text_config"].pop("rope_parameters")["rope_theta"]
    _write(folder / "config.json", config)
    return folder


def old_name(name: str) -> str:
    """Return what transformers 4 called a tensor, whatever 5 saved it as."""
    name = name.removeprefix("model.")
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    if name.startswith("language_model.") and not name.startswith(("language_model.model.", "language_model.lm_head.")):
        return name.replace("language_model.", "language_model.model.", 1)
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name


def as_held(checkpoint: Path, folder: Path) -> Path:
    """Write the checkpoint anew with its tensors called as transformers 5's classes call them."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({new_name(name): array for name, array in tensors.items()}, folder / "model.safetensors")
    return folder


def new_name(name: str) -> str:
    """Return what a tensor is called within transformers 5's model."""
    old = old_name(name).replace("vision_tower.vision_model.", "vision_tower.")
    if old.startswith("language_model.lm_head."):
        return old.removeprefix("language_model.")
    return "model." + old.replace("language_model.model.", "language_model.")


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def interleave(folder: Path) -> Path:
    """A checkpoint in the manner of llava-interleave: SigLIP's last layer, and a Qwen2 decoder with a tied head."""
    return make_llava(
        folder,
        siglip_processor(),
        {"model_type": "qwen2", "tie_word_embeddings": True},
        {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"},
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def padded(folder: Path) -> Path:
    """A checkpoint whose processor pads, without biases in the projector."""
    return make_llava(folder, clip_processor("Llava", do_pad=True), multimodal_projector_bias=False)


BUILDER = Builder(
    {
        "saved": lambda folder: make_llava(folder / "saved"),
        "old": lambda folder: in_old_layout(make_llava(folder / "saved"), folder / "old"),
        "held": lambda folder: as_held(make_llava(folder / "saved"), folder / "held"),
        "interleave": lambda folder: interleave(folder / "saved"),
        "interleave-old": lambda folder: in_old_layout(interleave(folder / "saved"), folder / "old"),
        "padded": lambda folder: padded(folder / "saved"),
    },
    make_reference,
    int8_cosine=least_w8a8_cosine(),
)
