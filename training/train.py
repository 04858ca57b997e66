"""The trainer: the same on a CPU (BF16 autocast) and a GPU; it checkpoints and resumes by itself."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from training.data import IGNORED, MARKS, SCALES, Batch, Drawer, shrink
from training.gaze import SINK_WEIGHT
from training.model import (
    IMAGE_TOKENS,
    SIDE,
    TEXT_LAYERS,
    VISION_LAYERS,
    load_model,
    make_config,
    make_model,
    save_checkpoint,
)
from training.tokenizer import train_tokenizer

STEPS = 50
"""Into how many steps the guide parts a scale."""
GUIDE_LEFT = 0.25
"""The guide's weight that is left when the rates have fallen."""
GUIDE = "guide.safetensors"
"""What is written beside a finished checkpoint, to go on from there when the run's own state is gone."""
USES = {True: 3, False: 2}
"""How often a batch of sheets, and of other pictures, is learned from."""
LAG = 40
"""How many batches are drawn until one is learned from again."""


@dataclass(frozen=True)
class Settings:
    """One training run."""

    folder: Path
    pictures: int
    batch: int = 48
    rate: float = 4e-3
    muon_rate: float = 0.05
    warmup: int = 4000
    """Pictures over which the rates rise."""
    ramp: int = 60_000
    """Pictures over which the camera's damage grows to its full strength, all of it with `start`."""
    guide: float = 1.0
    """Weight of the guide's loss, which falls with the rates down to `GUIDE_LEFT`."""
    gaze: float = 0.3
    """Weight of the gaze's loss, which does not fall."""
    decay: float = 0.3
    """The last share of the run, over which the rates fall to zero."""
    seed: int = 1
    workers: int = 1
    save_minutes: float = 5.0
    width: int = 192
    vision_layers: int = VISION_LAYERS
    text_layers: int = TEXT_LAYERS
    minutes: float = math.inf
    """The run's length in time, if that is over before its pictures are: the rates fall by the clock."""
    stop_minutes: float = math.inf
    """Save and end after this time; the same command goes on from there."""
    start: Path | None = None
    """A checkpoint to begin with, instead of chance, and the guide that lies beside it, if one does."""
    float32: bool = False
    """Multiply in float32: faster on CPUs that have AVX512-BF16 at half the rate of float32, as Intel's without AMX."""


def order(uses: int) -> Iterator[int]:
    """Yield the numbers of the batches to learn from: each comes `uses` times, `LAG` fresh ones apart."""
    for fresh in count():
        yield from range(fresh, -1, -LAG)[:uses]


def batches(settings: Settings, tokenizer: Any, first: int, sheets: bool = False) -> Iterator[list[Batch]]:
    """Yield batches, each in halves, after `first` pictures, drawn by worker processes, in a fixed order.

    Drawing takes time that learning lacks, so that each batch is learned from more than once.
    """
    numbers = list(islice(order(USES[sheets]), first // settings.batch, -(-settings.pictures // settings.batch)))
    if not numbers:
        return
    oldest, newest = min(numbers), max(numbers)
    drawn = enumerate(_drawn(settings, tokenizer, oldest, newest + 1, sheets), oldest)
    kept: dict[int, list[Batch]] = {}
    for number in numbers:
        while number not in kept:
            fresh, batch = next(drawn)
            kept[fresh] = batch
            kept.pop(fresh - LAG * (USES[sheets] - 1) - 1, None)
        yield kept[number]


def _drawn(settings: Settings, tokenizer: Any, first: int, last: int, sheets: bool) -> Iterator[list[Batch]]:
    """Yield batches as the workers draw them; where there is a GPU, the pictures lie there.

    Hundreds of pictures a second are more than a pipe carries beside a busy interpreter: they come in shared memory.
    """
    import torch

    gpu = torch.cuda.is_available()
    stream = torch.cuda.Stream() if gpu else None
    context = torch.multiprocessing.get_context("spawn")
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a worker inherits while it starts
    pool = context.Pool(settings.workers, _start_worker, (tokenizer, settings, sheets, gpu))
    signal.signal(signal.SIGINT, interrupted)
    receiver = ThreadPoolExecutor(1)
    with pool:
        pending: list[Any] = []
        ahead = settings.workers * (2 if gpu else 6)
        try:
            for number in range(first, last):
                drawing = pool.apply_async(_draw, (number * settings.batch,))
                pending.append(receiver.submit(_receive, drawing, stream))
                if len(pending) > ahead:
                    yield pending.pop(0).result()
            for each in pending:
                yield each.result()
        finally:
            receiver.shutdown(cancel_futures=True)


def _receive(drawing: Any, stream: Any) -> list[Batch]:
    """Return a batch once it is drawn, its pictures on the GPU if there is one: a stream of its own brings them."""
    batch: list[Batch] = drawing.get()
    if stream is None:
        return batch
    import torch

    with torch.cuda.stream(stream):
        batch = [replace(part, pixels=part.pixels.cuda()) for part in batch]
    for part in batch:
        part.pixels.record_stream(torch.cuda.default_stream())
    return batch


_worker: dict[str, Any] = {}


def _start_worker(tokenizer: Any, settings: Settings, sheets: bool, shared: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it, too; ended at its queue's lock, the pool hangs
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "nice"):
        os.nice(5)
    drawer = Drawer(tokenizer, settings.seed, 0 if settings.start else settings.ramp, sheets)
    _worker.update(drawer=drawer, batch=settings.batch, shared=shared)


def _draw(start: int) -> list[Batch]:
    drawer: Drawer = _worker["drawer"]
    batch = drawer.batch(start, _worker["batch"])
    if not _worker["shared"]:
        return batch
    import torch

    return [replace(part, pixels=torch.from_numpy(part.pixels)) for part in batch]


def on(array: np.ndarray, device: Any) -> Any:
    """Return the array as a tensor on `device`, without waiting for what a GPU has to do before."""
    import torch

    return torch.from_numpy(array).to(device, non_blocking=True)


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
    """Linear layers that name what is drawn at each patch: they teach the vision tower, and are not part of the model.

    Answers alone leave the tower at chance for tens of thousands of pictures, since they say nothing of where to look.
    `layer` looks at the tower's patches, `joint` at the image tokens made of them, `place` tells a token's row and
    column, `share` how far along its scale stands what each patch shows, and `scale` which scale that is. `recall` and
    `recall_scale` ask the text part, whose heads have looked there by then, for the share and the scale that a reading
    is about to tell.
    """

    def __init__(self, model: Any, device: str) -> None:
        import torch

        tower, width = model.model.vision_model, model.config.text_config.hidden_size
        self.layer = torch.nn.Linear(tower.config.hidden_size, len(MARKS)).to(device)
        self.joint = torch.nn.Linear(width, len(MARKS)).to(device)
        self.place = torch.nn.Linear(width, 2 * SIDE).to(device)
        self.share = torch.nn.Linear(width, STEPS + 1).to(device)
        self.recall = torch.nn.Linear(width, STEPS + 1).to(device)
        self.scale = torch.nn.Linear(width, len(SCALES)).to(device)
        self.recall_scale = torch.nn.Linear(width, len(SCALES)).to(device)
        self._patches: Any = None
        self._looked: Any = None
        self._tokens: Any = None
        for layer in self.layers.values():
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.constant_(layer.bias, -4.0)
        tower.post_layernorm.register_forward_hook(lambda *args: setattr(self, "_patches", args[2]))
        model.model.connector.register_forward_hook(lambda *args: setattr(self, "_tokens", args[2]))
        layers = model.model.text_model.layers
        layers[min(max(GAZERS), len(layers) - 1)].register_forward_hook(lambda *args: setattr(self, "_looked", args[2]))

    @property
    def layers(self) -> dict[str, Any]:
        """The layers by name."""
        names = ("layer", "joint", "place", "share", "recall", "scale", "recall_scale")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Return all layers' weights."""
        return {name: layer.state_dict() for name, layer in self.layers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take all layers' weights."""
        for name, layer in self.layers.items():
            layer.load_state_dict(state[name])

    def save(self, path: Path) -> None:
        """Write the layers' weights in BF16, for a run that begins with the checkpoint beside them."""
        import torch
        from safetensors.torch import save_file

        state = {f"{name}.{key}": weight for name, each in self.state_dict().items() for key, weight in each.items()}
        save_file({name: weight.to("cpu", torch.bfloat16) for name, weight in state.items()}, path)

    def load(self, path: Path) -> None:
        """Take the weights that `save` wrote; one that names scales among the marks only begins with those."""
        from safetensors.torch import load_file

        state = load_file(path)
        for name, layer in self.layers.items():
            if f"{name}.weight" in state:
                layer.load_state_dict({key: state[f"{name}.{key}"].float() for key in layer.state_dict()})
        if "scale.weight" not in state:
            first = MARKS.index(SCALES[0])
            for key, weight in self.joint.state_dict().items():
                self.scale.state_dict()[key].copy_(weight[first : first + len(SCALES)])

    def loss(self, batch: Batch) -> tuple[Any, Any]:
        """Return the binary cross-entropy of the last forward pass' marks, by mark: of patches, of image tokens.

        The places' and shares' cross-entropy is part of the second, which is zero if the tower alone has looked.
        """
        import torch

        logits = self.layer(self._patches.float())  # (B, patches, names)
        target = torch.zeros_like(logits)
        picture, patch, name = on(batch.marks, logits.device).unbind(1)
        target[picture, patch, name] = 1.0
        count = max(len(batch.marks), 1)
        entropy = partial(torch.nn.functional.binary_cross_entropy_with_logits, reduction="sum")
        if self._tokens is None:
            return entropy(logits, target) / count, torch.zeros((), device=logits.device)
        tokens, self._tokens = self._tokens.float(), None
        named = entropy(self.joint(tokens), target) / count
        looked = torch.nn.functional.rms_norm(self._looked.float(), self._looked.shape[-1:])
        read = _misread(self.share, tokens, batch.shares) + _misread(self.recall, looked, batch.readings)
        read += _mistaken(self.scale, tokens, batch.scales) + _mistaken(self.recall_scale, looked, batch.told_scales)
        return entropy(logits, target) / count, named + self._misplaced(tokens) + read

    def _misplaced(self, tokens: Any) -> Any:
        """Return the mean cross-entropy of rows and columns."""
        import torch

        rows, columns = self.place(tokens).flatten(0, 1).chunk(2, -1)
        places = torch.arange(IMAGE_TOKENS, device=tokens.device).repeat(len(tokens))
        entropy = torch.nn.functional.cross_entropy
        return (entropy(rows, places // SIDE) + entropy(columns, places % SIDE)) / 2


def _misread(layer: Any, held: Any, shares: np.ndarray) -> Any:
    """Return the mean cross-entropy of the `shares` (n, 3 or more): picture, place in `held`, share.

    Each is parted between the two nearest of the steps that `layer` tells. All pictures that have any weigh the same:
    of things that are counted there are many in one, of needles a single one.
    """
    import torch

    if not len(shares):
        return torch.zeros((), device=held.device)
    picture, place = on(shares[:, :2].astype(np.int64), held.device).unbind(1)
    logits = layer(held[picture, place])
    steps = torch.arange(STEPS + 1, device=held.device)
    wanted = on(shares[:, 2:3].astype(np.float32) * STEPS, held.device)
    _, which, each = np.unique(shares[:, 0], return_inverse=True, return_counts=True)
    missed = torch.nn.functional.cross_entropy(logits, (1 - (wanted - steps).abs()).clamp(0, 1), reduction="none")
    return missed @ on(1 / (each[which] * len(each)), held.device).to(missed)


def _mistaken(layer: Any, held: Any, scales: np.ndarray) -> Any:
    """Return the mean cross-entropy of the `scales` (n, 3): picture, place in `held`, index into `SCALES`."""
    import torch

    if not len(scales):
        return torch.zeros((), device=held.device)
    picture, place, scale = on(scales, held.device).unbind(1)
    return torch.nn.functional.cross_entropy(layer(held[picture, place]), scale)


READERS, GAZERS = {0: 3}, {1: 2, 2: 4}
"""Layers of the text part and how many heads of each are told which words matter, or where to look."""
COUNTING = 0.3
"""Weight of the divergence of counts within the gaze's loss."""


class Gaze:
    """Tells some heads of the text part what is asked about, and which image tokens show what the answer says next.

    The answers' own loss has them look about for tens of thousands of pictures before they find it out.
    """

    def __init__(self, model: Any) -> None:
        self._seen: dict[int, Any] = {}
        for index, layer in enumerate(model.model.text_model.layers):
            if heads := (READERS | GAZERS).get(index):
                layer.self_attn.register_forward_hook(partial(self._keep, index, heads))

    def _keep(self, index: int, heads: int, _module: Any, _inputs: Any, outputs: Any) -> None:
        self._seen[index] = outputs[1][:, :heads]

    def loss(self, batch: Batch) -> Any:
        """Return the mean -log of the attention that falls on the words and on the places to look at."""
        losses = [self._missed(index, batch.words if index in READERS else batch.gazes) for index in self._seen]
        return sum(losses) / len(losses) + self._miscounted(batch.counts)

    def _miscounted(self, counts: np.ndarray) -> Any:
        """Return how far the gazers' attention is from the `counts` (n, 4): picture, from, to, share.

        Its mean divergence from them, and the mean error of the number that it gives: w / a - w things, if the sink,
        worth w, has the share a. The divergence hardly minds that one thing has twice the attention of another.
        """
        import torch

        every = [weights for index, weights in self._seen.items() if index in GAZERS]
        if not len(counts) or not every:
            return torch.zeros(())
        weights = torch.cat(every, 1)
        picture, position, seen = on(counts[:, :3].astype(np.int64), weights.device).unbind(1)
        share = on(counts[:, 3].astype(np.float32), weights.device)
        row = position - _unseen(weights)
        given = weights.transpose(0, 1)[:, picture, row, seen].float() + 1e-6  # (heads, n)
        questions = len(np.unique(counts[:, :2], axis=0))
        diverged = (share * (share / given).log()).sum() / (len(given) * questions)
        sink = on(np.flatnonzero(counts[:, 2] == 0), weights.device)
        told, wanted = (SINK_WEIGHT / each[..., sink].clamp(0.1) for each in (given, share.expand_as(given)))
        return COUNTING * diverged + torch.nn.functional.smooth_l1_loss(told, wanted)

    def _missed(self, index: int, wanted: np.ndarray) -> Any:
        """Return the mean -log of what one layer's heads give to the `wanted` (n, 3): picture, from, to."""
        import torch

        weights = self._seen[index]
        if not len(wanted):
            return torch.zeros((), device=weights.device)
        pairs = np.unique(wanted, axis=0)
        rows, row = np.unique(pairs[:, :2], axis=0, return_inverse=True)
        picture, position, seen = on(pairs, weights.device).unbind(1)
        each = weights.transpose(0, 1)[:, picture, position - _unseen(weights), seen].float()  # (heads, n)
        given = each.new_zeros(len(each), len(rows)).index_add(1, on(row.reshape(-1), weights.device), each)
        return -(given + 1e-6).log().mean()


def _unseen(weights: Any) -> int:
    """Return which position has the first row of `weights` (B, heads, rows, S), which end with the last one's."""
    return int(weights.shape[3] - weights.shape[2])


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
        if settings.start and (settings.start.parent / GUIDE).is_file():
            self.guide.load(settings.start.parent / GUIDE)
        self._gaze = Gaze(self.model)
        self._optimisers = make_optimisers(self.model, self.guide, settings)
        rates = [group["lr"] for each in self._optimisers for group in each.param_groups]
        self._counts: dict[str, int] = {}
        self._minutes = 0.0
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
        """How long it has learned, without what came before its first step."""
        return self._minutes + (0.0 if self._begun is None else (time.time() - self._begun) / 60)

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
            "minutes": self.minutes,
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
        self._counts, self._minutes = dict(state["counts"]), state["minutes"]


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
