"""A crash-safe work queue on file locks: any number of processes that share a folder write answers in the jobs' order.

Processes claim chunks of jobs. The holder of a chunk's lock appends its answers to the chunk's own file; the holder of
the output's lock moves answers from those files to the end of the output, in order. Locks are the operating system's
and end with the process that holds them. Each row is synced to disk before the next is begun, and an incomplete row is
truncated when the file is next written, so a kill costs at most the answers in progress.

File locks rather than a database: the folder may be shared by machines over NFS or SMB, where SQLite is not safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import ENOENT
from pathlib import Path
from time import sleep

from filelock import FileLock, Timeout

from edgevlm.errors import OutputError
from edgevlm.jobs.jsonl import Row, append_rows, beside, read_rows, writing
from edgevlm.jobs.spec import Job

CHUNK = 8
"""Jobs that a process claims at a time."""
_PAUSE_S = 0.5
_ATTEMPTS = 100


def noop(*_: object) -> None:
    """Do nothing; the default callback."""


class WorkQueue:
    """The output file, and the folder beside it where answers wait for earlier ones.

    Raises `OutputError` where the output cannot be written or answers other jobs.
    """

    def __init__(self, output: Path, jobs: Sequence[Job], on_row: Callable[[Row], object] = noop) -> None:
        self._output, self._jobs, self.on_row = output, jobs, on_row
        self._parts = beside(output, ".parts")
        self._published = self._offset = 0

    @property
    def complete(self) -> bool:
        """Whether all answers are in the output."""
        return self._published == len(self._jobs)

    def answered(self) -> int:
        """Return the number of jobs answered, in the output or waiting."""
        waiting = [line for path in self._parts.glob("*.jsonl") for line in self._rows(int(path.stem))]
        last = self._jobs[self._published - 1].line if self._published else 0
        return self._published + sum(line > last for line in waiting)

    def refresh(self) -> None:
        """Read the rows that were added to the output since the last call, and call `on_row` with each."""
        for row, size in read_rows(self._output, self._offset):
            job = self._jobs[self._published] if self._published < len(self._jobs) else None
            if job is None or row.get("job") != job.key:
                raise OutputError(
                    f"{self._output} answers other jobs, or the same with another model or other options;"
                    " choose another -o, or delete it"
                )
            self._published += 1
            self._offset += size
            self.on_row(row)

    def work(self, answer: Callable[[Job], Row], on_rows: Callable[[], object] = noop) -> None:
        """Answer jobs until all are answered, taking over from processes that die.

        `on_rows` is called after each answer, and now and then while others are at what is left.
        """
        while True:
            for number in range(self._published // CHUNK, -(-len(self._jobs) // CHUNK)):
                if len(self._rows(number)) < len(self._chunk(number)):
                    with self._lock(f"{number:06}") as mine:
                        if mine:
                            self._answer(number, answer, on_rows)
            self.flush()
            on_rows()
            if self.complete:
                break
            sleep(_PAUSE_S)
        self.clean()

    def flush(self) -> None:
        """Move the answers that are next in order to the output, unless another process is doing so."""
        with writing(self._output), self._lock("output") as mine:
            if not mine:
                return
            self.refresh()
            first = self._published // CHUNK
            ready = self._next_in_order()
            if ready:
                append_rows(self._output, ready)
                self.refresh()
            for number in range(first, self._published // CHUNK):
                for path in (self._part(number), self._lock_file(f"{number:06}")):
                    with suppress(OSError):  # Windows keeps a file that is open elsewhere; `clean` removes it
                        path.unlink()

    def _next_in_order(self) -> list[Row]:
        """Return the answers that follow the output's last."""
        ready: list[Row] = []
        number = self._published // CHUNK
        while True:
            rows = self._rows(number)
            for job in self._chunk(number)[self._published + len(ready) - number * CHUNK :]:
                if job.line not in rows:
                    return ready
                ready.append(rows[job.line])
            number += 1
            if number * CHUNK >= len(self._jobs):
                return ready

    def _answer(self, number: int, answer: Callable[[Job], Row], on_rows: Callable[[], object]) -> None:
        # In this order: a row leaves the chunk's file only when it is in the output.
        known = self._rows(number)
        self.refresh()
        done = self._published - number * CHUNK
        for job in self._chunk(number)[max(0, done) :]:
            if job.line not in known:
                row = answer(job)
                with writing(self._part(number)):
                    append_rows(self._part(number), [row])
                self.flush()
                on_rows()

    def _chunk(self, number: int) -> Sequence[Job]:
        return self._jobs[number * CHUNK : (number + 1) * CHUNK]

    def _part(self, number: int) -> Path:
        return self._parts / f"{number:06}.jsonl"

    def _rows(self, number: int) -> dict[int, Row]:
        """Return a chunk's answers by their jobs' lines."""
        keys = {job.line: job.key for job in self._chunk(number)}
        rows = [row for row, _ in read_rows(self._part(number))]
        return {row["line"]: row for row in rows if row["job"] == keys.get(row["line"])}

    @contextmanager
    def _lock(self, name: str) -> Iterator[bool]:
        """Hold a lock if it is free; yield whether it is held."""
        lock = FileLock(self._lock_file(name))
        with writing(self._output), suppress(Timeout):
            self._acquire(lock)
        try:
            yield lock.is_locked
        finally:
            lock.release()

    def _acquire(self, lock: FileLock) -> None:
        """Take a lock, or raise `Timeout`; a process that has seen all answers may remove the folder meanwhile."""
        for _ in range(_ATTEMPTS):
            self._parts.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                lock.acquire(timeout=0)
                return
        raise FileNotFoundError(ENOENT, "its folder is removed again and again")

    def _lock_file(self, name: str) -> Path:
        return self._parts / f"{name}.lock"

    def clean(self) -> None:
        """Remove the folder, unless another process is flushing; Windows keeps files that are open elsewhere."""
        with self._lock("output") as mine:
            for path in self._parts.glob("*") if mine else ():
                with suppress(OSError):
                    path.unlink()
        with suppress(OSError):
            self._parts.rmdir()
