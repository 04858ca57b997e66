"""The engine: one model, one thread that answers, and a bounded queue that is fair among callers.

Under paged attention the thread makes several answers at once: between two steps of the decoder, which it makes for all
of them in one inference, at most one more answer is begun, so that nobody waits for longer than one prefill. While the
language model is at work, a second thread preprocesses and encodes the pictures of the next job.
"""

from __future__ import annotations

import logging
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Condition, Thread
from threading import Event as Flag
from time import monotonic, time
from typing import TypeAlias, TypeGuard

import numpy as np

from edgevlm.answer import Event, Piece, Progress, result_of
from edgevlm.decoding.config import GenerationConfig
from edgevlm.decoding.scoring import AnyScores
from edgevlm.decoding.stream import Step, make_together
from edgevlm.errors import EdgeVLMError
from edgevlm.families.base import ImageBudget
from edgevlm.inputs.image import ImageInput
from edgevlm.inputs.messages import Message
from edgevlm.inputs.video import Video
from edgevlm.inputs.vision_cache import PreprocessedImage
from edgevlm.interrupt import Interrupted, interruptible
from edgevlm.server.errors import AbandonedError, FailedError, QueueFullError, StoppingError
from edgevlm.vlm import VLM

logger = logging.getLogger(__name__)
Told: TypeAlias = Piece | AnyScores | BaseException
"""What a job's caller is told: pieces, of which the last carries the answer, or the scores, or what went wrong."""
Deliver: TypeAlias = Callable[[Told], None]


@dataclass(frozen=True)
class ScoreTask:
    """Answers to a conversation that are scored, where none is generated."""

    choices: Sequence[str]
    are_labels: bool = False
    """Whether each is judged on its own."""
    calibration_temperature: float | None = None
    """None: the model's."""


@dataclass(eq=False)
class Job:
    """One conversation to be answered, or to which answers are to be scored."""

    messages: Sequence[Message]
    images: Sequence[ImageInput | Video | PreprocessedImage]
    config: GenerationConfig
    image_budget: ImageBudget
    caller: str
    """Who asks: callers take turns, and share no cache."""
    deliver: Deliver
    """Called in a thread of the worker's with each piece or the scores, or with the error that came instead."""
    scored: ScoreTask | None = None
    submitted: float = field(default_factory=monotonic)
    started: float | None = None
    abandoned: Flag = field(default_factory=Flag)
    encoded: bool = field(init=False)
    """Whether its pictures need the vision encoder no more."""
    failure: BaseException | None = None
    """What ended it while its pictures were encoded ahead."""

    def __post_init__(self) -> None:
        self.encoded = not self.images

    @property
    def waited_s(self) -> float:
        """Seconds between being submitted and being begun."""
        return (self.started or monotonic()) - self.submitted

    def begin(self, vlm: VLM) -> Generator[Event | Step | AnyScores, None, None]:
        """Return what the model makes of it; the last event is the whole answer's piece, or the scores."""
        how = self.config, self.image_budget, self.caller
        if self.scored:
            score = vlm.score_labels_steps if self.scored.are_labels else vlm.score_steps
            return score(self.messages, self.images, self.scored.choices, *how, self.scored.calibration_temperature)
        return vlm.steps(self.messages, self.images, *how)


def is_end(event: object) -> TypeGuard[Piece | AnyScores]:
    """Whether a job ends with this event."""
    return isinstance(event, AnyScores) or (isinstance(event, Piece) and event.answer is not None)


class FairQueue:
    """Jobs that wait: callers take turns, each one's own jobs in their order."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._taken: list[Job] = []
        self._encoding: Job | None = None
        self._changed = Condition()
        self._closed = False

    @property
    def waiting(self) -> int:
        """Jobs that nobody has taken yet."""
        with self._changed:
            return self._count()

    @property
    def held(self) -> int:
        """Jobs that wait, and those in the making."""
        with self._changed:
            return self._count() + len(self._taken)

    @property
    def taken(self) -> Sequence[Job]:
        """Jobs in the making."""
        with self._changed:
            return tuple(self._taken)

    @property
    def closed(self) -> bool:
        """Whether nothing comes any more."""
        return self._closed

    def _count(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _is_full(self) -> bool:
        """One job may be in the making beside those that wait."""
        return self._count() + len(self._taken) > self._limit

    def _next(self) -> Job | None:
        return next(iter(self._waiting.values()))[0] if self._waiting else None

    def _notify(self) -> None:
        if self._waiting:  # else nobody would find anything to do
            self._changed.notify_all()

    def put(self, job: Job, *, has_place: bool = False) -> None:
        """Add a job; one that `has_place` is let in for another before it. Raises `QueueFullError`, `StoppingError`."""
        with self._changed:
            if self._closed:
                raise StoppingError
            if not has_place and self._is_full():
                raise QueueFullError
            self._waiting.setdefault(job.caller, deque()).append(job)
            self._notify()

    def take(self, *, wait: bool = True) -> Job | None:
        """Wait for the next job and take it, to be followed by `done`; None when the queue was closed.

        One whose pictures are being encoded ahead is taken when they are. Without `wait` a job is only taken if it is
        there and needs the vision encoder no more.
        """
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._closed or self._next() not in (None, self._encoding))
            elif not ((job := self._next()) and job.encoded):
                return None
            return self._pop() if self._waiting else None

    def _pop(self) -> Job:
        caller, jobs = self._waiting.popitem(last=False)
        job = jobs.popleft()
        if jobs:
            self._waiting[caller] = jobs  # at the end: the others come first now
        self._taken.append(job)
        self._notify()
        return job

    def done(self, job: Job) -> None:
        """Tell that a job taken is no longer in the making."""
        with self._changed:
            self._taken.remove(job)
            self._notify()

    def begin_encoding(self) -> Job | None:
        """Wait until the next job's pictures can be encoded ahead, and return it; None when the queue was closed.

        That is while the jobs in the making need the language model alone. To be followed by `encoded`.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._may_encode())
            self._encoding = None if self._closed else self._next()
            return self._encoding

    def _may_encode(self) -> bool:
        job = self._next()
        return bool(job and not job.encoded and self._taken and all(each.encoded for each in self._taken))

    def encoded(self, job: Job) -> None:
        """Tell that a job's pictures, waiting or taken, need the vision encoder no more."""
        with self._changed:
            job.encoded = True
            if job is self._encoding:
                self._encoding = None
            self._notify()

    def remove(self, job: Job) -> None:
        """Take out a job that nobody waits for any more, if it is still there."""
        with self._changed:
            jobs = self._waiting.get(job.caller)
            if jobs and job in jobs:
                jobs.remove(job)
                if not jobs:
                    del self._waiting[job.caller]
                self._notify()

    def close(self) -> list[Job]:
        """Let nothing more in and return what was waiting."""
        with self._changed:
            self._closed = True
            left = [job for jobs in self._waiting.values() for job in jobs]
            self._waiting.clear()
            self._changed.notify_all()
            return left


@dataclass(eq=False)
class _Answer:
    """An answer in the making, or scores."""

    job: Job
    events: Generator[Event | Step | AnyScores, None, None] | None = None
    step: Step | None = None
    """Where it has come to, once it has been prefilled."""


class Worker:
    """Loads the model in a thread of its own, and answers the jobs there; a second one encodes pictures ahead."""

    def __init__(
        self,
        load: Callable[[], VLM],
        max_queue: int,
        on_done: Callable[[Job, Told], None] | None = None,
        on_failure: Callable[[], None] | None = None,
        max_running: int = 1,
    ) -> None:
        """`on_done` is told of each job's end, `on_failure` when the model cannot be loaded or a thread dies; both in
        the thread. At most `max_running` answers are made at once."""
        self._load, self._on_done, self._on_failure = load, on_done, on_failure
        self._queue, self._max_running = FairQueue(max_queue), max_running
        self._worker, self._encoder = (
            Thread(target=self._guard, args=(work,), name=f"edgevlm-{name}", daemon=True)
            for name, work in (("worker", self._run), ("encoder", self._encode_ahead))
        )
        self._last_progress = monotonic()
        self.started_at = int(time())
        self.vlm: VLM | None = None
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Begin to load the model."""
        for thread in (self._worker, self._encoder):
            thread.start()

    @property
    def ready(self) -> bool:
        """Whether the model is loaded, has answered once, and the thread that answers lives."""
        return self.vlm is not None and self._is_alive()

    def _is_alive(self) -> bool:
        return self.failure is None and self._worker.is_alive()

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return self._queue.waiting

    @property
    def running(self) -> int:
        """Number of jobs being answered."""
        return len(self.current)

    @property
    def current(self) -> Sequence[Job]:
        """Jobs being answered."""
        return self._queue.taken

    @property
    def held(self) -> int:
        """Jobs that wait or are being answered."""
        return self._queue.held

    def stalled_s(self) -> float:
        """Return for how many seconds nothing has moved while jobs are held; infinite when a thread has died."""
        if not self._is_alive():
            return float("inf")
        return monotonic() - self._last_progress if self._queue.held else 0.0

    def submit(self, job: Job, *, has_place: bool = False) -> None:
        """Queue a job; see `FairQueue.put`. Raises `QueueFullError` and `StoppingError`."""
        if not self._queue.held:
            self._last_progress = monotonic()
        self._queue.put(job, has_place=has_place)

    def abandon(self, job: Job) -> None:
        """Forget a job: out of the queue, or its answer ended before the next token."""
        job.abandoned.set()
        self._queue.remove(job)

    def stop_accepting(self) -> None:
        """Refuse all jobs that wait or come; those being answered go on."""
        for job in self._queue.close():
            job.abandoned.set()
            job.deliver(StoppingError())

    def end_current(self) -> None:
        """End the answers being made before their next token."""
        for job in self._queue.taken:
            job.abandoned.set()
            job.deliver(StoppingError())

    def stop(self, timeout_s: float) -> bool:
        """End everything and wait for the threads; return whether they ended in time."""
        self.stop_accepting()
        self.end_current()
        deadline = monotonic() + timeout_s
        for thread in (self._worker, self._encoder):
            thread.join(max(0.0, deadline - monotonic()))
        return not (self._worker.is_alive() or self._encoder.is_alive())

    def _guard(self, work: Callable[[], None]) -> None:
        """Do a thread's work; an error that comes here is no answer's own, and ends the other thread as well."""
        try:
            work()
        except BaseException as error:
            self.failure = self.failure or error
            for job in (*self._queue.close(), *self._queue.taken):
                job.deliver(FailedError())
            if self._on_failure:
                self._on_failure()

    def _run(self) -> None:
        vlm = self._load()
        warm_up(vlm)
        self.vlm = vlm
        at_once = self._max_running if vlm.language_model.is_paged else 1
        answers: list[_Answer] = []
        while self._go_on(vlm, answers, at_once):
            pass

    def _go_on(self, vlm: VLM, answers: list[_Answer], at_once: int) -> bool:
        """Begin one more answer where there is room, and let each go on by a step; return whether any is left to make.

        A frame of its own: nothing is held between two jobs.
        """
        if len(answers) < at_once and (job := self._queue.take(wait=not answers)):
            job.started = self._last_progress = monotonic()
            answers.append(_Answer(job))
        _make_steps(answers)
        for answer in list(answers):
            end = self._advance(vlm, answer)
            if end is not None:
                answers.remove(answer)
                self._end(answer.job, end)
        return bool(answers) or not self._queue.closed

    def _end(self, job: Job, end: Told) -> None:
        self._queue.done(job)
        try:
            if self._on_done:
                self._on_done(job, end)
        except Exception as error:  # no figure is worth an answer
            log_failure(error)
        job.deliver(end)

    def _advance(self, vlm: VLM, answer: _Answer) -> Told | None:
        """Make the step that an answer has come to, and go on to the next one; return the end if it comes before."""
        job, answer.step = answer.job, None
        if job.failure:
            failure, job.failure = job.failure, None  # else the error, whose frames will hold the job, would be held
            return failure
        try:
            with interruptible(job.abandoned.is_set):
                if answer.events is None:
                    answer.events = job.begin(vlm)
                event = self._follow(job, answer.events)
                if isinstance(event, Step):
                    answer.step = event
                    return None
                answer.events.close()
                return event
        except BaseException as error:  # the panic of a library in Rust is no Exception
            return as_end(error)

    def _follow(self, job: Job, events: Iterator[Event | Step | AnyScores]) -> Step | Told:
        """Deliver the pieces before the next step, and return that step, or what ends the answer."""
        while not job.abandoned.is_set():
            event = next(events)
            self._last_progress = monotonic()
            if not job.encoded and not is_encoding(event):
                self._queue.encoded(job)
            if isinstance(event, Step) or is_end(event):
                return event
            if isinstance(event, Piece):
                job.deliver(event)
        return AbandonedError()

    def _encode_ahead(self) -> None:
        while self._encode_next():
            pass

    def _encode_next(self) -> bool:
        """Encode the next job's pictures while others are answered; return whether there was one."""
        job = self._queue.begin_encoding()
        if job is None:
            return False
        assert self.vlm
        try:
            with interruptible(job.abandoned.is_set):
                job.images = result_of(
                    self.vlm.encode_events(job.messages, job.images, job.config, job.image_budget, job.caller)
                )
        except BaseException as error:
            job.failure = as_end(error)
        finally:
            self._last_progress = monotonic()
            self._queue.encoded(job)
        return True


def _make_steps(answers: Iterable[_Answer]) -> None:
    """Make the steps that answers have come to, in one inference where that is possible."""
    try:
        make_together([each.step for each in answers if each.step and not each.job.abandoned.is_set()])
    except Exception as error:  # each is then made alone, and fails or does not
        log_failure(error)


def is_encoding(event: Event | Step | AnyScores) -> bool:
    """Whether the vision encoder goes on after this event."""
    return isinstance(event, Progress) and event.stage == "vision" and event.done < event.total


def as_end(error: BaseException) -> BaseException:
    """Return what ends an answer that raised this, without the frames, which hold the KV cache and the pictures."""
    if isinstance(error, Interrupted):
        return AbandonedError()
    if isinstance(error, EdgeVLMError):
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)
    log_failure(error)
    return FailedError()


def warm_up(vlm: VLM) -> None:
    """Answer once, so that the first caller does not pay for what OpenVINO puts off until then."""
    grey = np.full((*(vlm.processor.family.view_size or (256, 256)), 3), 128, np.uint8)
    vlm.generate(grey, "What is this?", max_new_tokens=1, detail="low")


def log_failure(error: BaseException) -> None:
    """Log where an unexpected error came from, but not its text, which may quote what a caller sent."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("unexpected %s (its text is not logged)\n%s", type(error).__name__, where)
