"""A checkpoint in torch: batches of examples as the runtime sees them, steps of AdamW, greedy answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from edgevlm.families.base import ImageBudget
from edgevlm.inputs.chat_template import user_message
from edgevlm.inputs.processor import Processor
from edgevlm.manifest import Manifest
from edgevlm_export.samples import pixel_values
from edgevlm_export.tune.rows import Example

RATE = 1e-3
"""AdamW's highest rate. Of 3e-4, 1e-3 and 2e-3 the best on the little factories of benchmarks/factories.py."""
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


class Learner:
    """An Idefics3 checkpoint that learns; prompts and pixels are those of the runtime's processor."""

    def __init__(self, checkpoint: Path, export: Path, manifest: Manifest) -> None:
        import torch
        from transformers import AutoModelForImageTextToText
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
        self._processor = Processor(export, manifest)
        self._end = manifest.eos_token_ids[0]
        self._ends = set(manifest.eos_token_ids)
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
        self._bf16 = False

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(weight.numel() for weight in self.model.parameters())

    def encode(self, example: Example, pixels: npt.NDArray[np.uint8] | None = None) -> Encoded:
        """Return an example's tokens and pixels, those of `pixels` `(H, W, 3)` in place of its picture's if given."""
        image = example.picture.pixels if pixels is None else pixels
        visual = self._processor.preprocess([image], ImageBudget())[0]
        prompt = self._processor.prompt_ids([user_message(example.question, 1)], [visual])
        answer = self._processor.tokenizer.encode(example.answer, add_special_tokens=False)
        return Encoded(prompt, [*answer, self._end], pixel_values(visual.views))

    def step(self, batch: Sequence[Encoded], done: float) -> float:
        """Learn from a batch at the rate of the time's share `done`; return its loss."""
        import torch

        rising, falling = done / WARM_UP, (1 + np.cos(np.pi * min(1.0, done))) / 2
        for group in self._optimizer.param_groups:
            group["lr"] = RATE * min(1.0, rising + 0.02) * max(0.02, falling)
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            loss = self.model(**_padded(batch, self._end)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def choose_arithmetic(self, batch: Sequence[Encoded]) -> None:
        """Multiply in BF16 where this CPU is quicker in it, after one trial of each; nothing is learned."""
        import torch

        seconds = {}
        for bf16 in (True, False, True, False):
            started = perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                self.model(**_padded(batch, self._end)).loss.backward()
            seconds[bf16] = perf_counter() - started
        self._optimizer.zero_grad(set_to_none=True)
        self._bf16 = seconds[True] < 0.9 * seconds[False]

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
                **_pixels(batch),
                max_new_tokens=longest,
                do_sample=False,
                eos_token_id=sorted(self._ends),
                pad_token_id=self._end,
            )[:, ids.shape[1] :].tolist()
        return [self._processor.tokenizer.decode(list(_until(each, self._ends))) for each in made]

    def state(self) -> dict[str, Any]:
        """Return a copy of the weights."""
        return {name: weight.clone() for name, weight in self.model.state_dict().items()}

    def load(self, state: dict[str, Any]) -> None:
        """Take weights back."""
        self.model.load_state_dict(state)

    def save(self, folder: Path) -> None:
        """Write the weights, in BF16, and config.json to `folder`."""
        import torch

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
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False, **_pixels(batch)}


def _pixels(batch: Sequence[Encoded]) -> dict[str, Any]:
    """Return the pictures of a batch, those with fewer views filled up with empty ones, which the model drops."""
    import torch

    most = max(len(each.pixels) for each in batch)
    pixels = np.zeros((len(batch), most, *batch[0].pixels.shape[1:]), np.float32)
    seen = np.zeros((len(batch), most, *batch[0].pixels.shape[2:]), bool)
    for row, each in enumerate(batch):
        pixels[row, : len(each.pixels)] = each.pixels
        seen[row, : len(each.pixels)] = True
    return {"pixel_values": torch.from_numpy(pixels), "pixel_attention_mask": torch.from_numpy(seen)}
