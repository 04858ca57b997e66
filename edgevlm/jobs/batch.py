"""Batch: a JSON Lines file of jobs to one of answers, in this process or in several."""

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
    """A queue of workers' error messages, one line each."""

    def empty(self) -> bool: ...
    def get(self) -> str: ...


OnProgress = Callable[[int, int], object]
"""Called with the jobs answered and the jobs in all."""
_POLL_S = 0.3


@dataclass(frozen=True)
class Batch:
    """A batch: jobs, model, defaults, and where the answers go."""

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
    """Counts of a batch."""

    jobs: int
    resumed: int = 0
    """Answered by an earlier run."""
    failed: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return what `edgevlm batch --json` prints."""
        return {"jobs": self.jobs, "answered": self.jobs - self.failed, "failed": self.failed, "resumed": self.resumed}


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
    summary = BatchSummary(len(jobs))

    def count(row: Row) -> None:
        summary.failed += "error" in row

    def report(row: Row) -> None:
        count(row)
        on_row(row)

    queue = WorkQueue(batch.output, jobs, count)
    queue.refresh()  # rows of earlier runs are counted and not reported
    queue.on_row, summary.resumed = report, queue.answered()
    if not queue.complete:
        on_progress(summary.resumed, len(jobs))
        execute = executor or (_work_here if batch.workers == 1 else _work_in_processes)
        execute(batch, queue, lambda: on_progress(queue.answered(), len(jobs)))
        queue.clean()
    return summary


def _work_here(batch: Batch, queue: WorkQueue, on_change: Callable[[], object]) -> None:
    queue.work(batch.runner(), on_change)


def _work_in_processes(batch: Batch, queue: WorkQueue, on_change: Callable[[], object]) -> None:
    """Start workers and wait until all jobs are answered; some of the workers may die, but not all."""
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
    """Wait until workers have answered all jobs. Raises `OutputError` for their errors, or if none is alive."""
    while True:
        there = anybody_there()  # before the refresh: the last worker may finish and exit in between
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and terminates its workers
    try:
        jobs = batch.read()
        check_parent = partial(exit_when_orphaned, multiprocessing.parent_process())
        WorkQueue(batch.output, jobs).work(batch.runner(), check_parent)
    except EdgeVLMError as error:
        errors.put(str(error))


def exit_when_orphaned(parent: Any) -> None:
    """Exit if the parent process was killed, so that no orphan keeps running."""
    if parent is not None and not parent.is_alive():
        os._exit(1)
