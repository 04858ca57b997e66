"""The architecture of `panel`: a small Idefics3, and an initialisation that learns at this width."""

from __future__ import annotations

import math
from typing import Any

IMAGE_SIZE, PATCH, SHUFFLE = 192, 16, 2
IMAGE_TOKENS = (IMAGE_SIZE // PATCH // SHUFFLE) ** 2


def make_config(tokenizer: Any, width: int = 192, vision_layers: int = 6, text_layers: int = 4) -> Any:
    """Return the Idefics3 configuration."""
    from transformers import Idefics3Config

    end = tokenizer.convert_tokens_to_ids("<|end|>")
    return Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=end,
        scale_factor=SHUFFLE,
        tie_word_embeddings=False,
        text_config={
            "model_type": "llama",
            "vocab_size": -(-len(tokenizer) // 32) * 32,
            "hidden_size": width,
            "intermediate_size": width * 8 // 3 // 64 * 64,
            "num_hidden_layers": text_layers,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 64,
            "head_dim": 32,
            "max_position_embeddings": 512,
            "rope_theta": 10000.0,
            "pad_token_id": end,
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": width,
            "intermediate_size": width * 4,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": width // 32,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH,
        },
    )


def make_model(config: Any, seed: int) -> Any:
    """Return the model, each matrix drawn with std 1/sqrt(fan-in).

    transformers' own 0.02 leaves every task at chance for tens of thousands of pictures at this width.
    """
    import torch
    from transformers import Idefics3ForConditionalGeneration

    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name or "position_embedding" in name:
                weight.normal_(0.0, 0.5)
            elif weight.ndim > 1:
                weight.normal_(0.0, weight[0].numel() ** -0.5)
            elif name.endswith("bias"):
                weight.zero_()
        _prime_tower(model.model.vision_model)
    return model


def _prime_tower(tower: Any) -> None:
    """Let each patch begin by looking at its neighbours, which otherwise takes the tower most of its training to find.

    Positions become waves in two dimensions, as in plain ViTs (Beyer et al. 2022), queries and keys the same random
    projection, so that near positions attend to each other (after Trockman and Kolter 2023), and the branches weak.
    """
    import torch

    table = tower.embeddings.position_embedding.weight
    side, width = round(len(table) ** 0.5), table.shape[1]
    frequencies = math.pi / 2 * 30.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # (side, width / 2)
    rows, columns = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
    table.copy_(0.7 * torch.cat([rows, columns], -1).reshape(side * side, width))
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        for head in range(attention.num_heads):
            rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            projection = torch.linalg.qr(torch.randn(width, attention.head_dim))[0].T
            attention.q_proj.weight[rows] = projection
            attention.k_proj.weight[rows] = projection
        attention.out_proj.weight.mul_(0.3)
        layer.mlp.fc2.weight.mul_(0.3)


def load_model(folder: Any) -> Any:
    """Return a saved checkpoint's model with float32 weights, to go on training."""
    import torch
    from transformers import Idefics3ForConditionalGeneration

    return Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def save_checkpoint(model: Any, tokenizer: Any, folder: Any) -> None:
    """Write the checkpoint in Hugging Face layout, weights in BF16."""
    import torch
    from transformers import GenerationConfig, Idefics3ImageProcessor, Idefics3Processor

    end = tokenizer.convert_tokens_to_ids("<|end|>")
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    state = {name: weight.to(torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder, state_dict=state)
    image_processor = Idefics3ImageProcessor(
        size={"longest_edge": IMAGE_SIZE},
        max_image_size={"longest_edge": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    processor = Idefics3Processor(
        image_processor, tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=tokenizer.chat_template
    )
    processor.save_pretrained(folder)
