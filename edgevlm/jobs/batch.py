"""A file of jobs to a file of answers, by this process or several."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any, Protocol

from edgevlm.errors import EdgeVLMError, OptionError, OutputError
from edgevlm.jobs.jsonl import Row
from edgevlm.jobs.spec import Defaults, Job, RowRunner, read_jobs
from edgevlm.jobs.work_queue import WorkQueue, noop
from edgevlm.runtime.config import RuntimeConfig

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue


class Errors(Protocol):
    """A queue of what went wrong in workers, a line each."""

    def empty(self) -> bool: ...
    def get(self) -> str: ...


OnProgress = Callable[[int, int], object]
"""Called with the jobs answered and the jobs in all."""
_POLL_S = 0.3


@dataclass(frozen=True)
class Batch:
    """What is asked of which model, and where the answers go."""

    jobs: Path
    """JSON Lines; the paths in it are relative to its folder."""
    output: Path
    model: str | None = None
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    defaults: Defaults = field(default_factory=Defaults)
    workers: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= 256:
            raise OptionError(f"workers must be between 1 and 256, not {self.workers}")

    def read(self) -> list[Job]:
        """Return the jobs. Raises `OptionError` and `ModelNotFoundError`."""
        return read_jobs(self.jobs, self.defaults.config_digest(self.model))

    def runner(self) -> RowRunner:
        """Load the model. Raises `ModelError` and `DeviceError`."""
        from edgevlm.vlm import VLM

        return RowRunner(VLM(self.model, self.runtime), self.defaults, self.jobs.parent)


@dataclass
class BatchSummary:
    """What a batch came to."""

    jobs: int
    known: int = 0
    """Answered by an earlier run."""
    failed: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return what `edgevlm batch --json` prints."""
        return {"jobs": self.jobs, "answered": self.jobs - self.failed, "failed": self.failed, "known": self.known}


def run_batch(
    batch: Batch,
    on_row: Callable[[Row], object] = noop,
    on_progress: OnProgress = noop,
    executor: Callable[[Batch, WorkQueue, Callable[[], object]], None] | None = None,
) -> BatchSummary:
    """Answer all jobs that the output does not answer yet; `on_row` is given each row that comes to the output.

    Safe to kill, to run again, and to run several times at once, on machines that share the folder. Raises
    `OptionError`, `OutputError`, `ModelError` and `DeviceError`; what is wrong with a single job is in its row.
    """
    jobs = batch.read()
    tally = BatchSummary(len(jobs))
    told = False

    def note(row: Row) -> None:
        tally.failed += "error" in row
        if told:
            on_row(row)

    queue = WorkQueue(batch.output, jobs, note)
    queue.refresh()
    told, tally.known = True, queue.answered()
    if not queue.complete:
        on_progress(tally.known, len(jobs))
        do = executor or (_work_here if batch.workers == 1 else _work_in_processes)
        do(batch, queue, lambda: on_progress(queue.answered(), len(jobs)))
        queue.clean()
    return tally


def _work_here(batch: Batch, queue: WorkQueue, on_change: Callable[[], object]) -> None:
    queue.work(batch.runner(), on_change)


def _work_in_processes(batch: Batch, queue: WorkQueue, on_change: Callable[[], object]) -> None:
    """Start workers and wait until all is answered, even if some of them die, but not all."""
    context = multiprocessing.get_context("spawn")
    errors: SimpleQueue[str] = context.SimpleQueue()
    threads = batch.runtime.threads or max(1, (os.cpu_count() or 1) // batch.workers)
    share = replace(batch, runtime=replace(batch.runtime, threads=threads))
    workers: list[BaseProcess] = [
        context.Process(target=_worker, args=(share, errors), daemon=True) for _ in range(batch.workers)
    ]
    for worker in workers:
        worker.start()
    try:
        wait_for(queue, on_change, errors, lambda: any(worker.is_alive() for worker in workers))
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def wait_for(
    queue: WorkQueue, on_change: Callable[[], object], errors: Errors, anybody_there: Callable[[], bool]
) -> None:
    """Wait until others have answered all jobs. Raises `OutputError` for what they report, or if none is left."""
    while True:
        there = anybody_there()  # before the look at what there is: the last may finish and go in between
        queue.refresh()
        on_change()
        if queue.complete:
            break
        if not errors.empty():
            raise OutputError(errors.get())
        if not there:
            raise OutputError("all workers died; nothing is lost, run the same command again to go on")
        sleep(_POLL_S)


def _worker(batch: Batch, errors: SimpleQueue[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends its workers
    try:
        jobs = batch.read()
        WorkQueue(batch.output, jobs).work(batch.runner(), partial(_end_with, multiprocessing.parent_process()))
    except EdgeVLMError as error:
        errors.put(str(error))


def _end_with(parent: Any) -> None:
    """End this process if its parent was killed: nobody would know of it."""
    if parent is not None and not parent.is_alive():
        os._exit(1)
