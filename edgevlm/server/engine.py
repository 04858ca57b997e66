"""The engine: one model, one thread that answers, and a bounded queue that is fair among callers."""

from __future__ import annotations

import logging
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from threading import Condition, Event, Thread
from time import monotonic, time

import numpy as np

from edgevlm.answer import Piece
from edgevlm.decoding.config import GenerationConfig
from edgevlm.errors import EdgeVLMError
from edgevlm.families.base import ImageBudget
from edgevlm.inputs.image import ImageInput
from edgevlm.inputs.messages import Message
from edgevlm.inputs.video import Video
from edgevlm.interrupt import Interrupted, interruptible
from edgevlm.server.errors import AbandonedError, FailedError, QueueFullError, StoppingError
from edgevlm.vlm import VLM

logger = logging.getLogger(__name__)
Deliver = Callable[[Piece | BaseException], None]


@dataclass(eq=False)
class Job:
    """One conversation to be answered."""

    messages: Sequence[Message]
    images: Sequence[ImageInput | Video]
    config: GenerationConfig
    image_budget: ImageBudget
    caller: str
    """Who asks: callers take turns, and share no cache."""
    deliver: Deliver
    """Called in the worker's thread with each piece, or with the error that ended the answer."""
    submitted: float = field(default_factory=monotonic)
    started: float | None = None
    abandoned: Event = field(default_factory=Event)

    @property
    def waited_s(self) -> float:
        """Seconds between being submitted and being begun."""
        return (self.started or monotonic()) - self.submitted


class FairQueue:
    """Jobs that wait: callers take turns, each one's own jobs in their order."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._taken = 0
        self._changed = Condition()
        self._closed = False

    @property
    def waiting(self) -> int:
        """Jobs that nobody has taken yet."""
        with self._changed:
            return self._count()

    @property
    def held(self) -> int:
        """Jobs that wait, and one in the making."""
        with self._changed:
            return self._count() + self._taken

    def _count(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _is_full(self) -> bool:
        """One job may be in the making beside those that wait."""
        return self._count() + self._taken > self._limit

    def put(self, job: Job) -> None:
        """Add a job. Raises `QueueFullError` and `StoppingError`."""
        with self._changed:
            if self._closed:
                raise StoppingError
            if self._is_full():
                raise QueueFullError
            self._waiting.setdefault(job.caller, deque()).append(job)
            self._changed.notify()

    def take(self) -> Job | None:
        """Wait for the next job and take it, to be followed by `done`; None when the queue was closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if not self._waiting:
                return None
            caller, jobs = self._waiting.popitem(last=False)
            job = jobs.popleft()
            if jobs:
                self._waiting[caller] = jobs  # at the end: the others come first now
            self._taken += 1
            return job

    def done(self) -> None:
        """Tell that a job taken is no longer in the making."""
        with self._changed:
            self._taken -= 1

    def remove(self, job: Job) -> None:
        """Take out a job that nobody waits for any more, if it is still there."""
        with self._changed:
            jobs = self._waiting.get(job.caller)
            if jobs and job in jobs:
                jobs.remove(job)
                if not jobs:
                    del self._waiting[job.caller]

    def close(self) -> list[Job]:
        """Let nothing more in and return what was waiting."""
        with self._changed:
            self._closed = True
            left = [job for jobs in self._waiting.values() for job in jobs]
            self._waiting.clear()
            self._changed.notify_all()
            return left


class Worker:
    """Loads the model in a thread of its own, and answers one job after another there."""

    def __init__(
        self,
        load: Callable[[], VLM],
        max_queue: int,
        on_done: Callable[[Job, Piece | BaseException], None] | None = None,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        """`on_done` is told of each job's end, `on_failure` when the model cannot be loaded or the thread dies; both in
        the thread."""
        self._load, self._on_done, self._on_failure = load, on_done, on_failure
        self._queue = FairQueue(max_queue)
        self._thread = Thread(target=self._run, name="edgevlm-worker", daemon=True)
        self._current: Job | None = None
        self._last_progress = monotonic()
        self.started_at = int(time())
        self.vlm: VLM | None = None
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Begin to load the model."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether the model is loaded, has answered once, and the thread that answers lives."""
        return self.vlm is not None and self.failure is None and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return self._queue.waiting

    @property
    def running(self) -> int:
        """Jobs being answered: 0 or 1."""
        return int(self._current is not None)

    @property
    def held(self) -> int:
        """Jobs that wait or are being answered."""
        return self._queue.held

    def stalled_s(self) -> float:
        """Return for how many seconds the answer being made has not moved; infinite when the thread has died."""
        if not self._thread.is_alive():
            return float("inf")
        return monotonic() - self._last_progress if self._current else 0.0

    def submit(self, job: Job) -> None:
        """Queue a job. Raises `QueueFullError` and `StoppingError`."""
        self._queue.put(job)

    def abandon(self, job: Job) -> None:
        """Forget a job: out of the queue, or its answer ended before the next token."""
        job.abandoned.set()
        self._queue.remove(job)

    def stop_accepting(self) -> None:
        """Refuse all jobs that wait or come; the one being answered goes on."""
        for job in self._queue.close():
            job.deliver(StoppingError())

    def end_current(self) -> None:
        """End the answer being made before its next token."""
        if job := self._current:
            job.abandoned.set()
            job.deliver(StoppingError())

    def stop(self, timeout_s: float) -> bool:
        """End everything and wait for the thread; return whether it ended in time."""
        self.stop_accepting()
        self.end_current()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            vlm = self._load()
            warm_up(vlm)
            self.vlm = vlm
            while self._answer_next(vlm):
                pass
        except BaseException as error:  # no answer's own error comes here: the thread ends
            self.failure = error
            for job in self._queue.close():
                job.deliver(FailedError())
            if self._on_failure:
                self._on_failure()

    def _answer_next(self, vlm: VLM) -> bool:
        """Answer the next job; return whether there was one. A frame of its own: nothing is held between two jobs."""
        job = self._queue.take()
        if job is None:
            return False
        self._current = job
        end: Piece | BaseException = FailedError()
        try:
            end = self._answer(vlm, job)
        finally:  # whatever happens, somebody waits
            self._current = None
            self._queue.done()
            self._count(job, end)
            job.deliver(end)
        return True

    def _count(self, job: Job, end: Piece | BaseException) -> None:
        try:
            if self._on_done:
                self._on_done(job, end)
        except Exception as error:  # no figure is worth an answer
            log_failure(error)

    def _answer(self, vlm: VLM, job: Job) -> Piece | BaseException:
        """Deliver all pieces but the last, and return that, or the error that came instead."""
        job.started = self._last_progress = monotonic()
        try:
            stream = vlm.events(job.messages, job.images, job.config, job.image_budget, job.caller)
            with interruptible(job.abandoned.is_set), closing(stream) as events:
                for event in events:
                    self._last_progress = monotonic()
                    if job.abandoned.is_set():
                        return AbandonedError()
                    if isinstance(event, Piece):
                        if event.answer is not None:
                            return event
                        job.deliver(event)
            raise AssertionError("an answer's last piece carries it")
        except Interrupted:
            return AbandonedError()
        except EdgeVLMError as error:
            return without_frames(error)
        except BaseException as error:  # the panic of a library in Rust is no Exception
            log_failure(error)
            return FailedError()


def without_frames(error: EdgeVLMError) -> EdgeVLMError:
    """Return an error without what raised it: those frames hold the KV cache and the pictures."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def warm_up(vlm: VLM) -> None:
    """Answer once, so that the first caller does not pay for what OpenVINO puts off until then."""
    grey = np.full((*(vlm.processor.family.view_size or (256, 256)), 3), 128, np.uint8)
    vlm.generate(grey, "What is this?", max_new_tokens=1, detail="low")


def log_failure(error: BaseException) -> None:
    """Log where an unexpected error came from, but not its text, which may quote what a caller sent."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("unexpected %s (its text is not logged)\n%s", type(error).__name__, where)
