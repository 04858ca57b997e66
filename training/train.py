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

from training.data import IGNORED, Batch, Drawer
from training.model import make_config, make_model, save_checkpoint
from training.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Settings:
    """One training run."""

    folder: Path
    pictures: int
    batch: int = 64
    rate: float = 2e-3
    muon_rate: float = 0.02
    warmup: float = 0.01
    decay: float = 0.3
    """The last share of the run, over which the rates fall to zero."""
    seed: int = 1
    workers: int = 1
    save_minutes: float = 5.0
    width: int = 192
    vision_layers: int = 8
    text_layers: int = 6
    stop_minutes: float = math.inf
    """Save and end after this time; the same command goes on from there."""


def batches(settings: Settings, tokenizer: Any, first: int) -> Iterator[Batch]:
    """Yield batches from picture `first` on, drawn by worker processes, in a fixed order."""
    starts = range(first, settings.pictures, settings.batch)
    context = get_context("spawn")
    with context.Pool(settings.workers, _start_worker, (tokenizer, settings.seed, settings.batch)) as pool:
        pending: list[Any] = []
        ahead = settings.workers * 6
        for start in starts:
            pending.append(pool.apply_async(_draw, (start,)))
            if len(pending) > ahead:
                yield pending.pop(0).get()
        for each in pending:
            yield each.get()


_worker: dict[str, Any] = {}


def _start_worker(tokenizer: Any, seed: int, batch: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "nice"):
        os.nice(5)
    _worker.update(drawer=Drawer(tokenizer, seed), batch=batch)


def _draw(start: int) -> Batch:
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


def make_optimisers(model: Any, settings: Settings) -> list[Any]:
    """Return Muon for the hidden matrices and AdamW for everything else."""
    import torch

    hidden, rest = [], []
    for name, weight in model.named_parameters():
        matrix = weight.ndim == 2 and "embed" not in name and "lm_head" not in name
        (hidden if matrix else rest).append(weight)
    muon = torch.optim.Muon(hidden, lr=settings.muon_rate, weight_decay=0.01, momentum=0.95)
    return [muon, torch.optim.AdamW(rest, lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.01)]


def rate_at(share: float, settings: Settings) -> float:
    """Return the rate's factor at `share` of the run: warm up, stay, fall to zero (warmup-stable-decay)."""
    if share < settings.warmup:
        return share / settings.warmup
    return min(1.0, (1 - share) / settings.decay)


def train(settings: Settings) -> None:
    """Run, or go on with, one training."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(settings)
    config = make_config(tokenizer, settings.width, settings.vision_layers, settings.text_layers)
    model = make_model(config, settings.seed).to(device).train()
    if device == "cpu":
        model.set_attn_implementation("eager")  # the fused kernel's backward takes a third of the step here
    optimisers = make_optimisers(model, settings)
    bases = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    state = settings.folder / "state.pt"
    seen = resume(state, model, optimisers, device)
    started = saved = reported = time.time()
    losses: list[tuple[float, float]] = []
    since = seen
    for batch in batches(settings, tokenizer, seen):
        factor = rate_at(seen / settings.pictures, settings)
        for optimiser, rates in zip(optimisers, bases, strict=True):
            for group, base in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = base * factor
        loss, right = loss_of(model, batch, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        seen += len(batch.pixels)
        losses.append((loss.detach(), right.detach()))  # type: ignore[arg-type]
        now = time.time()
        if now - reported > 20:
            mean = [float(torch.stack([each[i] for each in losses]).mean()) for i in (0, 1)]  # type: ignore[arg-type]
            row = {"pictures": seen, "loss": round(mean[0], 4), "right": round(mean[1], 4)}
            row |= {"per_s": round((seen - since) / (now - reported), 1), "minutes": round((now - started) / 60, 1)}
            print(json.dumps(row), flush=True)
            with (settings.folder / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(row) + "\n")
            losses, since, reported = [], seen, now
        over = now - started > settings.stop_minutes * 60
        if now - saved > settings.save_minutes * 60 or over:
            save(state, model, optimisers, seen)
            saved = now
        if over:
            break
    save(state, model, optimisers, seen)
    save_checkpoint(model.to("cpu").eval(), tokenizer, settings.folder / "checkpoint")


def load_tokenizer(settings: Settings) -> Any:
    """Return the run's tokenizer, trained at its first start."""
    from transformers import AutoTokenizer

    folder = settings.folder / "tokenizer"
    if not folder.is_dir():
        train_tokenizer(settings.seed).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def save(path: Path, model: Any, optimisers: list[Any], seen: int) -> None:
    """Write the run's state so that a kill leaves the old one or the new one."""
    import torch

    draft = path.with_suffix(".tmp")
    torch.save(
        {"model": model.state_dict(), "optimisers": [each.state_dict() for each in optimisers], "seen": seen}, draft
    )
    draft.replace(path)


def resume(path: Path, model: Any, optimisers: list[Any], device: str) -> int:
    """Load the run's state, if there is one, and return how many pictures it has seen."""
    import torch

    if not path.is_file():
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    for optimiser, each in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(each)
    return int(state["seen"])
