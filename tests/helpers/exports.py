"""Running exported submodels outside edgevlm's sessions, and with optimum-intel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgevlm import VLM, GenerationConfig
from edgevlm.families.base import ImageBudget
from edgevlm.inputs.chat_template import user_message
from edgevlm.manifest import LANGUAGE
from edgevlm.runtime.core import core, read_ir
from edgevlm_export.output_folder import FILE_NAMES
from edgevlm_export.samples import pixel_values
from tests.conftest import F32, photograph


def model(folder: Path, part: str) -> Any:
    return read_ir(folder / FILE_NAMES[part])


def compiled(folder: Path, part: str) -> Any:
    return core().compile_model(model(folder, part), "CPU", F32.language_properties("CPU"))


def language_outputs(folder: Path) -> list[np.ndarray]:
    """Return the logits of a prompt of two sequences, of a step with masked entries, and of one with beams swapped."""
    request = compiled(folder, LANGUAGE).create_infer_request()
    random = np.random.default_rng(5)
    mask = np.ones((2, 14), np.int64)
    mask[1, :3] = 0
    positions = np.arange(14)[None].repeat(2, 0)
    positions[1] = np.maximum(positions[1] - 3, 0)
    embeds = random.normal(size=(2, 17, 64)).astype(np.float32) * 0.5
    last = np.concatenate([mask, np.ones((2, 3), np.int64)], axis=1)
    last[0, 10:14] = 0
    steps = [
        (embeds[:, :12], mask[:, :12], positions[:, :12], [0, 1]),
        (embeds[:, 12:14], mask, positions[:, 12:], [1, 0]),
        (embeds[:, 14:], last, np.arange(10, 13)[None].repeat(2, 0), [0, 0]),
    ]
    names = ("inputs_embeds", "attention_mask", "position_ids", "beam_idx")
    return [
        np.array(request.infer({**dict(zip(names, step, strict=True)), "beam_idx": np.array(step[3], np.int32)})[0])
        for step in steps
    ]


def says_the_same_with_optimum_intel(folder: Path, vlm: VLM) -> None:
    """Fail unless optimum-intel, given the folder, continues a picture's prompt token for token as `vlm` does.

    Its own count of the patches' positions is transformers 4.57's, one too low, and is put right here.
    """
    from optimum.intel import OVModelForVisualCausalLM

    model = OVModelForVisualCausalLM.from_pretrained(
        folder, ov_config={"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "CACHE_DIR": ""}
    )
    positions = torch.from_numpy(vlm.processor.family.constants["patch_position_ids"])
    encode = model.vision_embeddings
    model.vision_embeddings = lambda pixel_values, **inputs: encode(
        pixel_values, **inputs | {"patch_position_ids": positions.expand(len(pixel_values), -1)}
    )
    config = GenerationConfig(max_new_tokens=32)
    budget = ImageBudget("high")
    image = photograph("china.jpg")
    answer = vlm.generate(image, "What is this?", config, budget)
    tiles = vlm.processor.preprocess([image], budget)
    ids = torch.tensor([vlm.processor.prompt_ids([user_message("What is this?", 1)], tiles)])
    shown = torch.from_numpy(pixel_values(tiles[0].views))[None]
    outputs = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=shown,
        do_sample=False,
        max_new_tokens=32,
    )
    assert tuple(outputs[0, ids.shape[1] :].tolist()) == answer.token_ids
