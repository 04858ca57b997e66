"""Make a seeded checkpoint with Qwen3-VL-2B's shape and no model hub.

    python -m benchmarks.make_qwen_checkpoint OUT_DIR [--layers 28] [--vision-layers 24] [--gguf FILE]

config.json and the image processor's settings are those of Qwen3-VL-2B-Instruct, special tokens have their published
ids, and weights are noise, BF16, written shard by shard (4.3 GB in all): time and memory are the model's, answers mean
nothing. Text is split by SmolLM2's tokenizer (of `benchmarks.make_checkpoint`), filled up to Qwen's vocabulary with
tokens that no text has. Needs `gguf`, and transformers to write the tokenizer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.export_memory import write_shards
from benchmarks.make_checkpoint import fetch_gguf

FIRST_SPECIAL = 151643
SPECIAL_TOKENS = [
    f"<|{name}|>"
    for name in (
        "endoftext",
        "im_start",
        "im_end",
        "object_ref_start",
        "object_ref_end",
        "box_start",
        "box_end",
        "quad_start",
        "quad_end",
        "vision_start",
        "vision_end",
        "vision_pad",
        "image_pad",
        "video_pad",
    )
]
"""From `FIRST_SPECIAL` on, as published."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""What the published template makes of a user's question about a picture."""
TEXT = {
    "attention_bias": False,
    "bos_token_id": 151643,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 262144,
    "model_type": "qwen3_vl_text",
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    "rope_theta": 5000000,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
}
VISION = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1024,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "model_type": "qwen3_vl",
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 2048,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
DEEPSTACK = [5, 11, 17]
PIXELS = {"shortest_edge": 65536, "longest_edge": 16777216}


def config(layers: int, vision_layers: int) -> dict[str, Any]:
    """Return config.json of Qwen3-VL-2B-Instruct with as many layers; a small encoder is tapped after its first."""
    tapped = DEEPSTACK if vision_layers > DEEPSTACK[-1] else [*range(len(DEEPSTACK))]
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": TEXT | {"num_hidden_layers": layers},
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "video_token_id": 151656,
        "vision_config": VISION | {"depth": vision_layers, "deepstack_visual_indexes": tapped},
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }


def preprocessor() -> dict[str, Any]:
    """Return preprocessor_config.json of Qwen3-VL-2B-Instruct."""
    sizes = {"size": PIXELS, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    kinds = {"processor_class": "Qwen3VLProcessor", "image_processor_type": "Qwen2VLImageProcessorFast"}
    return {**sizes, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **kinds}


def make_tokenizer(gguf: Path) -> Any:
    """Return SmolLM2's byte-level BPE with Qwen's special tokens where Qwen has them."""
    import gguf as gguf_reader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = gguf_reader.GGUFReader(str(gguf)).fields
    tokens = [str(token) for token in fields["tokenizer.ggml.tokens"].contents()]
    taken = {*SPECIAL_TOKENS}
    vocabulary = {f"[{number}]" if token in taken else token: number for number, token in enumerate(tokens)}
    vocabulary |= {f"[{number}]": number for number in range(len(tokens), FIRST_SPECIAL)}
    merges = [tuple(str(merge).split(" ", 1)) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def tokenizer_config() -> dict[str, Any]:
    """Return tokenizer_config.json, the chat template in it."""
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": SPECIAL_TOKENS[3:]}
    return {"tokenizer_class": "Qwen2Tokenizer", **tokens, "model_max_length": 262144, "chat_template": CHAT_TEMPLATE}


def make_checkpoint(folder: Path, layers: int = 28, vision_layers: int = 24, gguf: Path | None = None) -> int:
    """Write the checkpoint in Hugging Face layout; return its number of weights."""
    from edgevlm_export.families import architecture, family_config
    from edgevlm_export.source.checkpoint import Checkpoint

    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        make_tokenizer(gguf or fetch_gguf(Path(scratch))).save_pretrained(folder)
    video = preprocessor() | {"video_processor_type": "Qwen3VLVideoProcessor", "fps": 2}
    files = {
        "config.json": config(layers, vision_layers),
        "preprocessor_config.json": preprocessor(),
        "video_preprocessor_config.json": video | {"size": {"shortest_edge": 4096, "longest_edge": 25165824}},
        "generation_config.json": {"eos_token_id": 151645, "pad_token_id": 151643},
        "tokenizer_config.json": tokenizer_config(),  # as transformers 4 reads it, too
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    checkpoint = Checkpoint(folder, folder.name, None, files["config.json"])
    facts, _ = family_config(checkpoint)
    names = ("model.language_model.embed_tokens.weight", "model.visual.patch_embed.proj.weight")
    return write_shards(folder, architecture(checkpoint, facts, names).shapes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28, help="of the text model, 3 at least")
    parser.add_argument("--vision-layers", type=int, default=24, help="3 at least")
    parser.add_argument("--gguf", type=Path, help="a GGUF of SmolLM2-135M-Instruct already on disk")
    arguments = parser.parse_args()
    print(make_checkpoint(arguments.folder, arguments.layers, arguments.vision_layers, arguments.gguf))


if __name__ == "__main__":
    main()
