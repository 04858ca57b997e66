"""From worker processes that draw to batches where they are learned from."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count, islice
from typing import Any

import numpy as np

from training.data import Batch, Drawer
from training.settings import Settings

USES = {True: 3, False: 2}
"""How often a batch of sheets, and of other pictures, is learned from."""
LAG = 40
"""How many batches are drawn until one is learned from again."""


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
