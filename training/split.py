"""From a checkpoint whose image tokens show four patches each to one whose tokens show one, to go on training from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.data import MARKS, Drawer, collate
from training.model import CONTEXT, SIDE, load_model, save_checkpoint
from training.train import GUIDE, STEPS, pixel_values

OLD = 2
"""Patches in a row of an old token."""
PICTURES = 96
"""How many pictures tell what a patch shows on the average."""


def split(old: Path, new: Path, seed: int = 2) -> None:
    """Write the checkpoint `old` with a token for each patch to `new`, and its guide beside it.

    The text part has learned to read a token as four patches. It now gets one that shows a patch in the first place and
    the average in the three others: W h becomes W_0 h + sum(W_s mean(h)), the mean by way of the direction in which all
    h agree, since the connector has no bias.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(old)
    model = load_model(old)
    drawer = Drawer(tokenizer, seed)
    pictures = collate([drawer.row(drawer.scene(index)) for index in range(PICTURES)])
    with torch.no_grad():
        patches = model.model.vision_model(
            pixel_values=pixel_values(pictures, "cpu"),
            patch_attention_mask=torch.ones(PICTURES, SIDE, SIDE, dtype=torch.bool),
        ).last_hidden_state.flatten(0, 1)
        blocks = model.model.connector.modality_projection.proj.weight.chunk(OLD**2, 1)
        constant = torch.linalg.lstsq(patches, torch.ones(len(patches), 1)).solution
        others = sum(block @ patches.mean(0) for block in blocks[1:])
        weight = blocks[0] + others[:, None] * constant.T
    _shrink_tokens(model, weight)
    save_checkpoint(model.eval(), tokenizer, new)
    guide = load_file(old.parent / GUIDE)
    for name, size in (("joint", len(MARKS)), ("share", STEPS + 1)):
        for key in (f"{name}.weight", f"{name}.bias"):
            guide[key] = guide[key][:size].clone()
    for key in ("place.weight", "place.bias"):
        guide[key] = torch.zeros(2 * SIDE, *guide[key].shape[1:], dtype=guide[key].dtype)
    width = model.config.text_config.hidden_size
    guide |= {"recall.weight": torch.zeros(STEPS + 1, width), "recall.bias": torch.zeros(STEPS + 1)}
    save_file(guide, new.parent / GUIDE)


def _shrink_tokens(model: Any, weight: Any) -> None:
    import torch

    projection = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    projection.weight = torch.nn.Parameter(weight)
    model.model.connector.modality_projection.proj = projection
    model.model.connector.scale_factor = model.config.scale_factor = 1
    model.config.text_config.max_position_embeddings = CONTEXT
