"""The trainer: the same on a CPU (BF16 autocast) and a GPU; it checkpoints and resumes by itself."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from training.data import IGNORED, Batch, Drawer, shrink
from training.feed import batches, on
from training.guide import Gaze, Guide
from training.model import SIDE, load_model, make_config, make_model, save_checkpoint
from training.settings import GUIDE, Settings
from training.tokenizer import train_tokenizer

GUIDE_LEFT = 0.25
"""The guide's weight that is left when the rates have fallen."""


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


def pixel_values(batch: Batch, device: str) -> Any:
    """Return the pictures `(B, 3, H, W)` as the model takes them."""
    import torch

    return torch.as_tensor(batch.pixels).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def look(model: Any, batch: Batch, device: str, bf16: bool = True) -> None:
    """Let the vision tower alone look at the pictures, for the guide."""
    import torch

    mask = torch.ones(len(batch.pixels), SIDE, SIDE, dtype=torch.bool, device=device)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        model.model.vision_model(pixel_values=pixel_values(batch, device), patch_attention_mask=mask)


def loss_of(model: Any, batch: Batch, device: str, bf16: bool = True) -> tuple[Any, Any]:
    """Return the mean loss over answer tokens, and the share of them that are right."""
    import torch

    segments, wanted = on(batch.segments, device), np.flatnonzero(batch.labels != IGNORED)
    mask = attention_mask(segments)
    bias = torch.zeros(mask.shape, dtype=torch.float32, device=device).masked_fill_(
        ~mask, torch.finfo(torch.float32).min
    )
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        hidden = model.model(
            input_ids=on(batch.input_ids, device),
            attention_mask=bias,
            position_ids=on(batch.positions, device),
            pixel_values=pixel_values(batch, device)[:, None],
            use_cache=False,
            prefix=int((batch.segments[0] == 0).sum()),
        ).last_hidden_state
        logits = model.lm_head(hidden.flatten(0, 1)[on(wanted, device)]).float()
    labels = on(batch.labels.reshape(-1)[wanted], device)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    return loss, (logits.argmax(-1) == labels).float().mean()


def make_optimisers(model: Any, guide: Guide, settings: Settings) -> list[Any]:
    """Return Muon for the hidden matrices and AdamW for everything else."""
    import torch

    from training.muon import Muon

    hidden: list[Any] = []
    rest = [*guide.layer.parameters()]
    for name, weight in model.named_parameters():
        matrix = weight.ndim == 2 and "embed" not in name and "lm_head" not in name
        (hidden if matrix else rest).append(weight)
    rest += [weight for name, each in guide.layers.items() if name != "layer" for weight in each.parameters()]
    muon = Muon(hidden, lr=settings.muon_rate, weight_decay=0.01, momentum=0.95)
    return [muon, torch.optim.AdamW(rest, lr=settings.rate, betas=(0.9, 0.98), weight_decay=0.01)]


def rate_at(seen: int, settings: Settings, minutes: float = 0.0) -> float:
    """Return the rate's factor after `seen` pictures and `minutes`: warm up, stay, fall to zero."""
    done = max(seen / settings.pictures, minutes / settings.minutes)
    falling = (1 - done) / settings.decay
    return max(0.0, min(1.0, seen / settings.warmup, falling))


def train(settings: Settings, sheets: bool = False) -> None:
    """Run, or go on with, one training; with `sheets`, of the vision tower by the guide alone."""
    settings.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(settings)
    run = Run(settings, tokenizer, "sheets" if sheets else "pictures")
    log = Log(settings.folder / "log.jsonl", run.stage, run.seen)
    started = saved = time.time()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside, it saves as after Ctrl-C
    try:
        for batch in batches(settings, tokenizer, run.seen, sheets):
            log.add(run.step(batch), run.seen)
            if time.time() - started > settings.stop_minutes * 60 or run.minutes > settings.minutes:
                break
            if time.time() - saved > settings.save_minutes * 60:
                run.save()
                saved = time.time()
    finally:
        run.save()
    save_checkpoint(run.model.to("cpu").eval(), tokenizer, settings.folder / "checkpoint")
    run.guide.save(settings.folder / GUIDE)


class Run:
    """Model, guide and optimisers of one training, and how far it has come in each stage."""

    def __init__(self, settings: Settings, tokenizer: Any, stage: str) -> None:
        import torch

        from training.attention import install

        self.stage = stage
        self._settings = settings
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        if self._device == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for what is not in BF16
        config = make_config(tokenizer, settings.width, settings.vision_layers, settings.text_layers)
        if settings.start:
            self.model = load_model(settings.start)
        elif (settings.folder / "state.pt").is_file():
            self.model = make_model(config, settings.seed)  # which takes its weights from there
        else:
            self.model = make_model(config, settings.seed, _some_sheets(tokenizer, settings))
        self.model.to(self._device).train()
        install(self.model)
        self.guide = Guide(self.model, self._device)
        if guide := settings.guide_file:
            self.guide.load(guide)
        self._gaze = Gaze(self.model)
        self._optimisers = make_optimisers(self.model, self.guide, settings)
        rates = [group["lr"] for each in self._optimisers for group in each.param_groups]
        self._counts: dict[str, int] = {}
        self._minutes: dict[str, float] = {}
        self._begun: float | None = None
        self._resume()  # which makes new groups
        groups = [group for each in self._optimisers for group in each.param_groups]
        self._groups = list(zip(groups, rates, strict=True))

    @property
    def seen(self) -> int:
        """Pictures of this stage that the model has learned from."""
        return self._counts.get(self.stage, 0)

    @property
    def minutes(self) -> float:
        """How long it has learned in this stage, without what came before the first step."""
        before = self._minutes.get(self.stage, 0.0)
        return before + (0.0 if self._begun is None else (time.time() - self._begun) / 60)

    def step(self, batch: list[Batch]) -> Any:
        """Learn from one batch; return its figures, as `NAMES` has them."""
        import torch

        self._begun = self._begun or time.time()
        factor = rate_at(self.seen, self._settings, self.minutes)
        for group, rate in self._groups:
            group["lr"] = rate * factor
        bf16 = not self._settings.float32
        weights = [len(part.pixels) if self.stage == "sheets" else _answer_tokens(part) for part in batch]
        figures = torch.zeros(5, device=self._device)
        for part, weight in zip(batch, weights, strict=True):
            loss, right = self._look(part) if self.stage == "sheets" else loss_of(self.model, part, self._device, bf16)
            guiding, joining = self.guide.loss(part)
            gazing = self._gaze.loss(part) if self.stage == "pictures" else torch.zeros((), device=self._device)
            share = weight / sum(weights)
            guided = max(self._settings.guide * factor, GUIDE_LEFT) * (guiding + joining) / 2
            ((loss + guided + self._settings.gaze * gazing) * share).backward()
            figures += share * torch.stack([each.detach() for each in (loss, right, guiding, joining, gazing)])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self._optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self._counts[self.stage] = self.seen + sum(len(part.pixels) for part in batch)
        return figures

    def _look(self, batch: Batch) -> tuple[Any, Any]:
        import torch

        look(self.model, batch, self._device, not self._settings.float32)
        nothing = torch.zeros((), device=self._device)
        return nothing, nothing

    def save(self) -> None:
        """Write the run's state so that a kill leaves the old one or the new one."""
        import torch

        path = self._settings.folder / "state.pt"
        state = {
            "model": self.model.state_dict(),
            "guide": self.guide.state_dict(),
            "optimisers": [each.state_dict() for each in self._optimisers],
            "counts": self._counts,
            "minutes": self._minutes | {self.stage: self.minutes},
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def _resume(self) -> None:
        import torch

        path = self._settings.folder / "state.pt"
        if not path.is_file():
            return
        state = torch.load(path, map_location=self._device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.guide.load_state_dict(state["guide"])
        for optimiser, each in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(each)
        self._counts, self._minutes = dict(state["counts"]), dict(state["minutes"])


def _some_sheets(tokenizer: Any, settings: Settings) -> np.ndarray:
    drawer = Drawer(tokenizer, settings.seed, sheets=True)
    return np.stack([shrink(drawer.scene(index).image) for index in range(120)])


def _answer_tokens(batch: Batch) -> int:
    return int((batch.labels != IGNORED).sum())


NAMES = ("loss", "right", "guide", "joint", "gaze")
"""A step's figures: the loss, the share of right answer tokens, the losses of the guide's layers and of the gaze."""


class Log:
    """Prints and keeps a line of means every twenty seconds."""

    def __init__(self, path: Path, stage: str, seen: int) -> None:
        self._path, self._stage = path, stage
        self._started = time.time()
        self._begin(seen)

    def _begin(self, seen: int) -> None:
        self._figures: list[Any] = []
        self._since, self._reported = seen, time.time()

    def add(self, figures: Any, seen: int) -> None:
        """Take one step's figures, `seen` pictures having been seen."""
        self._figures.append(figures)
        now = time.time()
        if now - self._reported < 20:
            return
        means = (sum(self._figures) / len(self._figures)).tolist()
        row: dict[str, float] = {self._stage: seen}
        row |= {name: round(value, 4) for name, value in zip(NAMES, means, strict=True)}
        row["per_s"] = round((seen - self._since) / (now - self._reported), 1)
        row["minutes"] = round((now - self._started) / 60, 1)
        print(json.dumps(row), flush=True)
        with self._path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
        self._begin(seen)


def load_tokenizer(settings: Settings) -> Any:
    """Return the run's tokenizer, trained at its first start."""
    from transformers import AutoTokenizer

    folder = settings.start or settings.folder / "tokenizer"
    if not folder.is_dir():
        train_tokenizer(settings.seed).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
