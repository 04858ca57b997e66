"""Documents that are converted while their callers do something else, as docling's own clients ask for them."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from math import inf
from time import monotonic
from typing import Any

from pydantic import BaseModel

from edgevlm.server.engine import log_failure
from edgevlm.server.errors import CALLERS_ERRORS, PASSED_ON, ApiError, to_api_error

_KEPT, _KEPT_S = 16, 300.0
"""Documents that wait for one caller, and for how long."""
_WAIT_S = 20.0
"""How long a status is waited for at most."""


class TaskStatus(BaseModel):
    """How far a document is."""

    task_id: str
    task_type: str
    task_status: str
    """`started`, and at its end the document's own status."""
    error_message: str | None = None


@dataclass(eq=False)
class _Task:
    caller: str
    work: asyncio.Task[dict[str, Any]]
    ended: float | None = None


class Tasks:
    """The tasks of one server, each its caller's alone. Of those that have ended the last 16 are kept, five minutes."""

    def __init__(self) -> None:
        self._tasks: dict[str, _Task] = {}

    def start(self, caller: str, work: Coroutine[Any, Any, dict[str, Any]]) -> TaskStatus:
        """Begin a document."""
        name = secrets.token_hex(16)
        self._tasks[name] = task = _Task(caller, asyncio.create_task(work))
        task.work.add_done_callback(lambda _: self._end(task))
        return _status(name, task)

    async def status(self, name: str, caller: str, wait_s: float) -> TaskStatus:
        """Return how far a task is, at its end or after `wait_s` at the latest. Raises `ApiError`."""
        task = self._find(name, caller)
        await asyncio.wait({task.work}, timeout=min(wait_s, _WAIT_S) if wait_s > 0 else 0)  # it may be NaN
        return _status(name, task)

    def result(self, name: str, caller: str) -> dict[str, Any]:
        """Return a task's document. Raises `ApiError`."""
        task = self._find(name, caller)
        if not task.work.done() or _failure(task.work):
            raise ApiError(404, "no_result", "Task result not found. Please wait for a completion status.")
        return task.work.result()

    def _find(self, name: str, caller: str) -> _Task:
        self._forget()
        task = self._tasks.get(name)
        if task is None or task.caller != caller:
            raise ApiError(404, "task_not_found", "Task not found.")  # these words are what docling's client looks for
        return task

    def _end(self, task: _Task) -> None:
        task.ended = monotonic()
        error = _failure(task.work)
        if error and not isinstance(error, (*CALLERS_ERRORS, *PASSED_ON)):
            log_failure(error)
        self._forget()

    def _forget(self) -> None:
        """Forget tasks that ended long ago, and all but a caller's last."""
        later: Counter[str] = Counter()
        for name, task in sorted(self._tasks.items(), key=lambda each: -(each[1].ended or inf)):
            if task.ended is not None:
                later[task.caller] += 1
                if later[task.caller] > _KEPT or monotonic() - task.ended > _KEPT_S:
                    del self._tasks[name]


def _failure(work: asyncio.Task[dict[str, Any]]) -> BaseException | None:
    if work.cancelled():
        return asyncio.CancelledError()
    return work.exception()


def _status(name: str, task: _Task) -> TaskStatus:
    status, message = "started", None
    if task.work.done():
        error = _failure(task.work)
        status = "failure" if error else task.work.result()["status"]
        message = to_api_error(error).message if error else None
    return TaskStatus(task_id=name, task_type="convert", task_status=status, error_message=message)
