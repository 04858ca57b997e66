"""The architecture of `panel`: a small Idefics3, and an initialisation that learns at this width."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

IMAGE_SIZE, PATCH = 384, 16
SIDE = IMAGE_SIZE // PATCH
"""Patches, and image tokens, in a row of the picture."""
IMAGE_TOKENS = SIDE**2
CONTEXT = 2048
"""Positions that the text part has room for."""
VISION_LAYERS, TEXT_LAYERS = 8, 7


def make_config(
    tokenizer: Any, width: int = 192, vision_layers: int = VISION_LAYERS, text_layers: int = TEXT_LAYERS
) -> Any:
    """Return the Idefics3 configuration."""
    from transformers import Idefics3Config

    end = tokenizer.convert_tokens_to_ids("<|end|>")
    return Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=end,
        scale_factor=1,
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
            "max_position_embeddings": CONTEXT,
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


def make_model(config: Any, seed: int, pictures: Any = None) -> Any:
    """Return the model, each matrix drawn with std 1/sqrt(fan-in), its tower primed with `pictures` if there are any.

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
        if pictures is not None:
            prime_tower(model.model.vision_model, pictures)
    return model


PLACE = 1 / 3
"""Share of the tower's width that begins with where a patch is; the rest holds what it shows."""
OFFSETS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (0, 0))
"""Rows and columns from a patch to the one that each attention head begins by looking at; the last looks around."""


def prime_tower(tower: Any, pictures: Any) -> None:
    """Let the tower begin as a convolution, which otherwise takes it most of its training to find.

    Patches enter by their whitened principal components over `pictures` `(B, H, W, 3)` uint8 (as the first layer of
    Jordan's airbench networks, 2024); positions are waves in two dimensions in dimensions of their own (Beyer et al.
    2022), and each head's queries are its keys turned by one patch, so that it attends to one neighbour (the idea of
    ConViT, d'Ascoli et al. 2021). The branches begin weak.
    """
    width = tower.config.hidden_size
    content = width - int(width * PLACE) // 4 * 4
    _prime_patches(tower.embeddings.patch_embedding, pictures, content)
    _prime_heads(tower, content)
    for layer in tower.encoder.layers:
        layer.self_attn.out_proj.weight.mul_(0.3)
        layer.mlp.fc2.weight.mul_(0.3)


def _prime_patches(embedding: Any, pictures: Any, content: int) -> None:
    import torch

    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).double().div(127.5).sub(1.0)
    patches = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    mean = patches.mean(0)
    strengths, components = torch.linalg.eigh(torch.cov((patches - mean).T))
    strengths, components = strengths.flip(0)[:content], components.flip(1)[:, :content].T
    kernel = 0.8 * components / (strengths + 0.02).sqrt()[:, None]
    embedding.weight.zero_()
    embedding.bias.zero_()
    embedding.weight[:content] = kernel.reshape(content, 3, PATCH, PATCH).float()
    embedding.bias[:content] = -(kernel @ mean).float()


def _prime_heads(tower: Any, content: int) -> None:
    import torch

    table = tower.embeddings.position_embedding.weight
    side, width = round(len(table) ** 0.5), table.shape[1]
    count = (width - content) // 4
    frequencies = 2.2 * 8.0 ** -(torch.arange(count) / count)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # (side, 2 count)
    rows, columns = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
    table.zero_()
    table[:, content:] = torch.cat([rows, columns], -1).reshape(side * side, -1)
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        size = attention.head_dim
        for head in range(attention.num_heads):
            offset = OFFSETS[head % len(OFFSETS)]
            sharpness = 0.25 if head % len(OFFSETS) == len(OFFSETS) - 1 else 1.0
            query, key = _turned(frequencies, offset, size), _turned(frequencies, (0, 0), size)
            for matrix, turned in ((attention.q_proj, query), (attention.k_proj, key)):
                part = matrix.weight[head * size : (head + 1) * size]
                part.normal_(0.0, 0.3 * width**-0.5)
                part[:, content:] += sharpness**0.5 * turned


def _turned(frequencies: Any, offset: tuple[int, int], size: int) -> Any:
    """Return `(size, 4 len(frequencies))`: it takes some waves out of a position, moved by `offset` patches."""
    import torch

    count = len(frequencies)
    matrix = torch.zeros(size, 4 * count)
    chosen = torch.linspace(0, count - 1, size // 4).round().long().tolist()
    for axis, distance in enumerate(offset):
        for place, index in enumerate(chosen):
            row, sine = axis * size // 2 + 2 * place, axis * 2 * count + index
            cos, sin = math.cos(frequencies[index] * distance), math.sin(frequencies[index] * distance)
            matrix[row, sine], matrix[row, sine + count] = cos, sin
            matrix[row + 1, sine + count], matrix[row + 1, sine] = cos, -sin
    return matrix


def load_model(folder: Any) -> Any:
    """Return a saved checkpoint's model with float32 weights, to go on training."""
    import torch
    from transformers import Idefics3ForConditionalGeneration

    return Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def save_grown(config: Any, weights: dict[str, Any], old: Any, new: Any) -> None:
    """Write to `new` the checkpoint `old` in the larger shape of `config`, for which `weights` are."""
    from transformers import AutoTokenizer, Idefics3ForConditionalGeneration

    model = Idefics3ForConditionalGeneration(config)
    model.load_state_dict(weights)
    save_checkpoint(model.eval(), AutoTokenizer.from_pretrained(old), new)


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
        image_processor, deepcopy(tokenizer), image_seq_len=IMAGE_TOKENS, chat_template=tokenizer.chat_template
    )  # which adds a token to its tokenizer that the model has no embedding for
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
