"""A checkpoint in torch: batches of examples as the runtime sees them, steps of AdamW, greedy answers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from edgevlm.families.base import ImageBudget
from edgevlm.inputs.messages import user_message
from edgevlm.inputs.processor import Processor
from edgevlm.manifest import Manifest
from edgevlm_export.samples import pixel_values
from edgevlm_export.tune.rows import Example

WHOLE = 60_000_000
"""Weights of a checkpoint up to which all of it learns; of a larger one, LoRA on the text part does."""
RANK, LORA_RATE = 16, 1e-3
"""LoRA's rank (Hu et al. 2021) and its highest rate; not compared with others yet."""
RATE = 5e-4
"""AdamW's highest rate. At 1e-3 in batches of 8 a model that learned two woods had 27 of 62 known scenes right, 51
before; at this rate 29 to 35. After 100 pictures of a gauge 144 of 200 others were right at 1e-3, 102 at this rate."""
WEIGHT_DECAY = 0.01
WARM_UP = 0.06
"""Share of the time over which the rate rises; it falls along a cosine after that (Loshchilov and Hutter 2017)."""
IGNORED = -100
_LONGEST_ANSWER = 64
_TOGETHER = 16


@dataclass(frozen=True)
class Encoded:
    """One example as the model takes it."""

    prompt: list[int]
    answer: list[int]
    pixels: npt.NDArray[np.float32]
    """`(views, 3, H, W)`."""
    features: Any = None
    """The connector's output `(views, tokens, D)`, a tensor, where the vision part does not learn."""


class Learner:
    """An Idefics3 checkpoint that learns; prompts and pixels are those of the runtime's processor."""

    def __init__(self, checkpoint: Path, export: Path, manifest: Manifest) -> None:
        import torch
        from transformers import AutoModelForImageTextToText
        from transformers.utils import logging

        from edgevlm_export.tune.attention import install

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
        install(self.model)
        self.size = sum(weight.numel() for weight in self.model.parameters())
        self.has_lora = self.size > WHOLE
        if self.has_lora:
            self._put_lora()
        self._processor = Processor(export, manifest)
        self._end = manifest.eos_token_ids[0]
        self._ends = set(manifest.eos_token_ids)
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self._rate = LORA_RATE if self.has_lora else RATE
        self._optimizer = torch.optim.AdamW(weights, lr=self._rate, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
        self._bf16 = False

    def _put_lora(self) -> None:
        """Leave the weights as they are, and let low-rank additions to the text part's matrices learn."""
        from peft import LoraConfig, get_peft_model

        self.model.requires_grad_(False)
        matrices = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=matrices)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an attribute's old name
            self.model.model.text_model = get_peft_model(self.model.model.text_model, config)

    def encode(self, example: Example, pixels: npt.NDArray[np.uint8] | None = None) -> Encoded:
        """Return an example's tokens and pixels, those of `pixels` `(H, W, 3)` in place of its picture's if given."""
        image = example.picture.pixels if pixels is None else pixels
        visual = self._processor.preprocess([image], ImageBudget())[0]
        prompt = self._processor.prompt_ids([user_message(example.question, 1)], [visual])
        answer = self._processor.tokenizer.encode(example.answer, add_special_tokens=False)
        values = pixel_values(visual.views)
        return Encoded(prompt, [*answer, self._end], values, self._features(values) if self.has_lora else None)

    def _features(self, pixels: npt.NDArray[np.float32]) -> Any:
        import torch

        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            found = self.model.model.get_image_features(torch.from_numpy(pixels)[None]).pooler_output
        return torch.cat(list(found)).float()  # one of each picture, or of all

    def step(self, batch: Sequence[Encoded], done: float) -> float:
        """Learn from a batch at the rate of the time's share `done`; return its loss."""
        import torch

        rising, falling = done / WARM_UP, (1 + np.cos(np.pi * min(1.0, done))) / 2
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * min(1.0, rising + 0.02) * max(0.02, falling)
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            loss = self.model(**_padded(batch, self._end)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def choose_arithmetic(self, batch: Sequence[Encoded]) -> float:
        """Multiply in BF16 where this CPU is quicker in it; return the seconds of a step. Nothing is learned."""
        import torch

        seconds = {}
        for bf16 in (True, False, True, False):
            started = perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                self.model(**_padded(batch, self._end)).loss.backward()
            seconds[bf16] = perf_counter() - started
        self._optimizer.zero_grad(set_to_none=True)
        self._bf16 = seconds[True] < 0.9 * seconds[False]
        return min(seconds.values())

    def answers(self, examples: Sequence[Example]) -> list[str]:
        """Return the greedy answer to each example."""
        found: dict[int, str] = {}
        encoded = [(index, self.encode(example)) for index, example in enumerate(examples)]
        by_shape: dict[tuple[int, tuple[int, ...]], list[tuple[int, Encoded]]] = {}
        for index, each in encoded:
            by_shape.setdefault((len(each.prompt), each.pixels.shape), []).append((index, each))
        for group in by_shape.values():
            for first in range(0, len(group), _TOGETHER):
                some = group[first : first + _TOGETHER]
                texts = self._greedy([each for _, each in some])
                found |= dict(zip([index for index, _ in some], texts, strict=True))
        return [found[index] for index in range(len(examples))]

    def _greedy(self, batch: Sequence[Encoded]) -> list[str]:
        import torch

        self.model.eval()
        ids = torch.tensor([each.prompt for each in batch])
        longest = min(_LONGEST_ANSWER, max(len(each.answer) for each in batch) + 6)
        with torch.no_grad():
            made = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **_seen(batch),
                max_new_tokens=longest,
                do_sample=False,
                eos_token_id=sorted(self._ends),
                pad_token_id=self._end,
            )[:, ids.shape[1] :].tolist()
        return [self._processor.tokenizer.decode(list(_until(each, self._ends))) for each in made]

    def state(self) -> dict[str, Any]:
        """Return a copy of the weights that learn."""
        return {name: weight.detach().clone() for name, weight in self.model.named_parameters() if weight.requires_grad}

    def load(self, state: dict[str, Any]) -> None:
        """Take weights back."""
        self.model.load_state_dict(state, strict=False)

    def save(self, folder: Path) -> None:
        """Write the weights, in BF16, and config.json to `folder`."""
        import torch

        if self.has_lora:
            self.model.model.text_model = self.model.model.text_model.merge_and_unload()
        state = {name: weight.to(torch.bfloat16).contiguous() for name, weight in self.model.state_dict().items()}
        self.model.save_pretrained(folder, state_dict=state)


def _until(ids: Sequence[int], ends: set[int]) -> Iterator[int]:
    for each in ids:
        if each in ends:
            return
        yield each


def _padded(batch: Sequence[Encoded], pad: int) -> dict[str, Any]:
    """Return a batch as the model's arguments, its rows filled up on the right."""
    import torch

    longest = max(len(each.prompt) + len(each.answer) for each in batch)
    ids = torch.full((len(batch), longest), pad)
    labels = torch.full((len(batch), longest), IGNORED)
    mask = torch.zeros(len(batch), longest, dtype=torch.long)
    for row, each in enumerate(batch):
        both = [*each.prompt, *each.answer]
        ids[row, : len(both)] = torch.tensor(both)
        labels[row, len(each.prompt) : len(both)] = torch.tensor(each.answer)
        mask[row, : len(both)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False, **_seen(batch)}


def _seen(batch: Sequence[Encoded]) -> dict[str, Any]:
    """Return the pictures of a batch, those with fewer views filled up with empty ones, which the model drops."""
    import torch

    if batch[0].features is not None:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        features = torch.cat([each.features for each in batch])
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=features)}}
    most = max(len(each.pixels) for each in batch)
    pixels = np.zeros((len(batch), most, *batch[0].pixels.shape[1:]), np.float32)
    seen = np.zeros((len(batch), most, *batch[0].pixels.shape[2:]), bool)
    for row, each in enumerate(batch):
        pixels[row, : len(each.pixels)] = each.pixels
        seen[row, : len(each.pixels)] = True
    return {"pixel_values": torch.from_numpy(pixels), "pixel_attention_mask": torch.from_numpy(seen)}
