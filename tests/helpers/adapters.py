"""Adapters as peft makes and saves them, and what peft makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForImageTextToText

from edgevlm_export.source.adapter import plain_name
from tests.helpers.json_files import read_json, write_json

LINEAR = ["q_proj", "v_proj", "down_proj", "fc1"]


def load(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return transformers' model."""
    return AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype).eval()


def quietly(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Return what a call returns; peft warns about tied weights, and of names that transformers 5 has changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*arguments, **options)


def train(checkpoint: Path, folder: Path, seed: int = 1, **options: Any) -> Any:
    """Save a seeded adapter of a checkpoint, all of whose weights have moved; return peft's model."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": LINEAR, **options})
    model = quietly(get_peft_model, load(checkpoint), config)
    move(model, seed)
    quietly(model.save_pretrained, folder)
    return model.eval()


def move(model: Any, seed: int) -> None:
    """Change all that is trained, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted((name, each) for name, each in model.named_parameters() if each.requires_grad):
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator).to(weight.dtype))


def merged_by_peft(checkpoint: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return the model that `merge_and_unload` makes of a checkpoint and a saved adapter."""
    model = quietly(PeftModel.from_pretrained, load(checkpoint, dtype), folder)
    return quietly(model.merge_and_unload).eval()


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """Return a model's tensors by their plain names; in memory none is renamed."""
    return {plain_name(name, {}): tensor.float().numpy() for name, tensor in model.state_dict().items()}


def edit_config(folder: Path, **changes: object) -> None:
    """Change an adapter's config."""
    write_json(folder / "adapter_config.json", read_json(folder / "adapter_config.json") | changes)


def edit_tensors(folder: Path, edit: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]) -> None:
    """Let `edit` return an adapter's tensors anew."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(dict(edit(tensors)), path, {"format": "pt"})
