"""The trainer: the same on a CPU (BF16 autocast) and a GPU; it checkpoints and resumes by itself."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from training.data import IGNORED, MARKS, Batch, Drawer
from training.model import load_model, make_config, make_model, save_checkpoint
from training.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Settings:
    """One training run."""

    folder: Path
    pictures: int
    batch: int = 48
    rate: float = 2e-3
    muon_rate: float = 0.02
    warmup: int = 4000
    """Pictures over which the rates rise."""
    ramp: int = 60_000
    """Pictures over which the camera's damage grows to its full strength."""
    guide: float = 0.5
    """Weight of the guide's loss, which falls with the rates."""
    decay: float = 0.3
    """The last share of the run, over which the rates fall to zero."""
    seed: int = 1
    workers: int = 1
    save_minutes: float = 5.0
    width: int = 192
    vision_layers: int = 6
    text_layers: int = 4
    stop_minutes: float = math.inf
    """Save and end after this time; the same command goes on from there."""
    start: Path | None = None
    """A checkpoint to begin with, instead of chance."""


def batches(settings: Settings, tokenizer: Any, first: int) -> Iterator[list[Batch]]:
    """Yield batches, each in halves, from picture `first` on, drawn by worker processes, in a fixed order."""
    starts = range(first, settings.pictures, settings.batch)
    context = get_context("spawn")
    with context.Pool(settings.workers, _start_worker, (tokenizer, settings)) as pool:
        pending: list[Any] = []
        ahead = settings.workers * 6
        for start in starts:
            pending.append(pool.apply_async(_draw, (start,)))
            if len(pending) > ahead:
                yield pending.pop(0).get()
        for each in pending:
            yield each.get()


_worker: dict[str, Any] = {}


def _start_worker(tokenizer: Any, settings: Settings) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "nice"):
        os.nice(5)
    _worker.update(drawer=Drawer(tokenizer, settings.seed, settings.ramp), batch=settings.batch)


def _draw(start: int) -> list[Batch]:
    return _worker["drawer"].batch(start, _worker["batch"])


def attention_mask(segments: Any) -> Any:
    """Return `(B, 1, S, S)`, True where position i may see position j: causal, the prefix and its own question."""
    import torch

    own = segments[:, :, None] == segments[:, None, :]
    prefix = segments[:, None, :] == 0
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    seen = (own | prefix) & causal
    seen |= torch.eye(length, dtype=torch.bool, device=segments.device)  # padding sees itself: no empty row
    return seen[:, None]


class Guide:
    """A linear layer that names what is drawn at each patch: it teaches the vision tower, and is not part of the model.

    Answers alone leave the tower at chance for tens of thousands of pictures, since they say nothing of where to look.
    """

    def __init__(self, model: Any, device: str) -> None:
        import torch

        tower = model.model.vision_model
        self.layer = torch.nn.Linear(tower.config.hidden_size, len(MARKS)).to(device)
        torch.nn.init.constant_(self.layer.bias, -4.0)
        self._patches: Any = None
        tower.post_layernorm.register_forward_hook(lambda *args: setattr(self, "_patches", args[2]))

    def loss(self, batch: Batch) -> Any:
        """Return the binary cross-entropy of the batch's marks in the last forward pass, by mark."""
        import torch

        logits = self.layer(self._patches.float())  # (B, patches, names)
        target = torch.zeros_like(logits)
        picture, patch, name = torch.from_numpy(batch.marks).to(logits.device).unbind(1)
        target[picture, patch, name] = 1.0
        every = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        return every / max(len(batch.marks), 1)


def loss_of(model: Any, batch: Batch, device: str) -> tuple[Any, Any]:
    """Return the mean loss over answer tokens, and the share of them that are right."""
    import torch

    def on(array: np.ndarray) -> Any:
        return torch.from_numpy(array).to(device, non_blocking=True)

    pixels = on(batch.pixels).permute(0, 3, 1, 2)[:, None].float().div_(127.5).sub_(1.0)  # (B, 1, 3, H, W)
    segments, labels = on(batch.segments), on(batch.labels)
    mask = attention_mask(segments)
    bias = torch.zeros(mask.shape, dtype=torch.float32, device=device).masked_fill_(
        ~mask, torch.finfo(torch.float32).min
    )
    with torch.autocast(device, torch.bfloat16):
        hidden = model.model(
            input_ids=on(batch.input_ids),
            attention_mask=bias,
            position_ids=on(batch.positions),
            pixel_values=pixels,
            use_cache=False,
        ).last_hidden_state
        wanted = labels != IGNORED
        logits = model.lm_head(hidden[wanted]).float()
    loss = torch.nn.functional.cross_entropy(logits, labels[wanted])
    return loss, (logits.argmax(-1) == labels[wanted]).float().mean()


def make_optimisers(model: Any, guide: Guide, settings: Settings) -> list[Any]:
    """Return Muon for the hidden matrices and AdamW for everything else."""
    import torch

    hidden, rest = [], [*guide.layer.parameters()]
    for name, weight in model.named_parameters():
        matrix = weight.ndim == 2 and "embed" not in name and "lm_head" not in name
        (hidden if matrix else rest).append(weight)
    muon = torch.optim.Muon(hidden, lr=settings.muon_rate, weight_decay=0.01, momentum=0.95)
    return [muon, torch.optim.AdamW(rest, lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.01)]


def rate_at(seen: int, settings: Settings) -> float:
    """Return the rate's factor after `seen` pictures: warm up, stay, fall to zero (warmup-stable-decay)."""
    falling = (1 - seen / settings.pictures) / settings.decay
    return max(0.0, min(1.0, seen / settings.warmup, falling))


def train(settings: Settings) -> None:
    """Run, or go on with, one training."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(settings)
    config = make_config(tokenizer, settings.width, settings.vision_layers, settings.text_layers)
    model = load_model(settings.start) if settings.start else make_model(config, settings.seed)
    model = model.to(device).train()
    if device == "cpu":
        model.set_attn_implementation("eager")  # the fused kernel's backward takes a third of the step here
    guide = Guide(model, device)
    optimisers = make_optimisers(model, guide, settings)
    bases = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    state = settings.folder / "state.pt"
    seen = resume(state, model, guide, optimisers, device)
    started = saved = reported = time.time()
    losses: list[Any] = []
    since, steps = seen, 0
    for batch in batches(settings, tokenizer, seen):
        factor = rate_at(seen, settings)
        for optimiser, rates in zip(optimisers, bases, strict=True):
            for group, base in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = base * factor
        answers = sum(int((part.labels != IGNORED).sum()) for part in batch)
        for part in batch:
            loss, right = loss_of(model, part, device)
            share = int((part.labels != IGNORED).sum()) / answers
            guiding = guide.loss(part)
            ((loss + settings.guide * factor * guiding) * share).backward()
            losses.append(torch.stack([each.detach() * share for each in (loss, right, guiding)]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        seen += sum(len(part.pixels) for part in batch)
        steps += 1
        now = time.time()
        if now - reported > 20:
            mean = (torch.stack(losses).sum(0) / steps).tolist()
            row: dict[str, float] = {"pictures": seen}
            row |= {name: round(value, 4) for name, value in zip(("loss", "right", "guide"), mean, strict=True)}
            row |= {"per_s": round((seen - since) / (now - reported), 1), "minutes": round((now - started) / 60, 1)}
            print(json.dumps(row), flush=True)
            with (settings.folder / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            losses, steps, since, reported = [], 0, seen, now
        over = now - started > settings.stop_minutes * 60
        if now - saved > settings.save_minutes * 60 or over:
            save(state, model, guide, optimisers, seen)
            saved = now
        if over:
            break
    save(state, model, guide, optimisers, seen)
    save_checkpoint(model.to("cpu").eval(), tokenizer, settings.folder / "checkpoint")


def load_tokenizer(settings: Settings) -> Any:
    """Return the run's tokenizer, trained at its first start."""
    from transformers import AutoTokenizer

    folder = settings.start or settings.folder / "tokenizer"
    if not folder.is_dir():
        train_tokenizer(settings.seed).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def save(path: Path, model: Any, guide: Guide, optimisers: list[Any], seen: int) -> None:
    """Write the run's state so that a kill leaves the old one or the new one."""
    import torch

    draft = path.with_suffix(".tmp")
    state = {"model": model.state_dict(), "guide": guide.layer.state_dict(), "seen": seen}
    torch.save(state | {"optimisers": [each.state_dict() for each in optimisers]}, draft)
    draft.replace(path)


def resume(path: Path, model: Any, guide: Guide, optimisers: list[Any], device: str) -> int:
    """Load the run's state, if there is one, and return how many pictures it has seen."""
    import torch

    if not path.is_file():
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    guide.layer.load_state_dict(state["guide"])
    for optimiser, each in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(each)
    return int(state["seen"])
