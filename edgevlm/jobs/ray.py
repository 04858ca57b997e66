"""A batch on a Ray cluster: models in actors on its machines, the answers written by this process alone."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.util import find_spec
from queue import SimpleQueue
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from edgevlm.errors import EdgeVLMError, OptionError, one_line
from edgevlm.jobs.batch import Batch, wait_for
from edgevlm.jobs.jsonl import Row
from edgevlm.jobs.spec import Job
from edgevlm.jobs.work_queue import WorkQueue
from edgevlm.model_store import find_model


class RayWorker:
    """A model in an actor; Ray restarts it when it dies, and retries its task."""

    def __init__(self, batch: Batch) -> None:
        self._ask = batch.runner()

    def ask(self, job: Job) -> Row:
        """Return the answer's row."""
        return self._ask(job)


def work_on_ray(address: str, batch: Batch, queue: WorkQueue, on_change: Callable[[], object]) -> None:
    """Answer a batch's jobs with `batch.workers` models on the cluster at `address`; `local` starts one here.

    The machines need edgevlm, and the model, pictures and videos at the same paths as here. Raises `OptionError` where
    there is no Ray or no such cluster, else as `run_batch`.
    """
    if find_spec("ray") is None:
        raise OptionError("a Ray cluster needs ray; install it with: pip install 'edgevlm[ray]'")
    with redirect_stdout(sys.stderr):  # Ray reports dead workers on stdout
        _work(_connect(address), batch, queue, on_change)


def _work(ray: Any, batch: Batch, queue: WorkQueue, on_change: Callable[[], object]) -> None:
    try:
        threads = batch.runtime.threads or max(1, int(ray.cluster_resources().get("CPU", 1)) // batch.workers)
        there = replace(
            batch,
            jobs=batch.jobs.resolve(),
            model=str(find_model(batch.model).resolve()),
            runtime=replace(batch.runtime, threads=threads),
        )
        actor = ray.remote(num_cpus=threads, max_restarts=-1, max_task_retries=-1)(RayWorker)
        errors: SimpleQueue[str] = SimpleQueue()
        drivers = [
            Thread(target=_drive, args=(ray, actor.remote(there), batch, errors), daemon=True)
            for _ in range(batch.workers)
        ]
        for driver in drivers:
            driver.start()
        wait_for(queue, on_change, errors, lambda: any(driver.is_alive() for driver in drivers))
        for driver in drivers:
            driver.join(timeout=10)
    finally:
        ray.shutdown()


def _connect(address: str) -> Any:
    """Connect without telemetry and log output; return the `ray` module."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    try:
        if address not in {"local", "auto"}:
            _check_reachable(address)
        ray.init(
            address,
            include_dashboard=False if address == "local" else None,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise OptionError(f"no Ray cluster at {address}: {one_line(error)[:200]}") from None
    return ray


def _check_reachable(address: str) -> None:
    """Raise `OSError` or `ValueError` if nothing listens there: Ray itself would retry for minutes."""
    parts = urlsplit(address if "//" in address else f"//{address}")
    if not parts.hostname or not parts.port:
        raise ValueError("an address is HOST:PORT, ray://HOST:PORT, auto or local")
    socket.create_connection((parts.hostname, parts.port), timeout=10).close()


def _drive(ray: Any, worker: Any, batch: Batch, errors: SimpleQueue[str]) -> None:
    """Let one actor answer the jobs that no other has claimed."""
    try:
        WorkQueue(batch.output, batch.read()).work(lambda job: dict(ray.get(worker.ask.remote(job))))
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        errors.put(f"a worker on the Ray cluster cannot go on: {one_line(cause or error)[:300]}")
    except EdgeVLMError as error:
        errors.put(str(error))
