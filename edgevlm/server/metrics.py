"""Prometheus metrics; no label and no value comes from a caller's text."""

from __future__ import annotations

from collections.abc import Callable

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from edgevlm.answer import Answer, Piece
from edgevlm.metrics import peak_memory
from edgevlm.server.engine import Job
from edgevlm.server.errors import AbandonedError, FailedError

_TTFT = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_TPOT = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_WAIT = (0.01, 0.1, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """Counters of one server."""

    def __init__(self, waiting: Callable[[], int], running: Callable[[], int], ready: Callable[[], bool]) -> None:
        # What is left out is a second line for each figure, with the time at which it was zero.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "HTTP requests by path and status", ["path", "status"])
        self._answers = self._counter("answers", "Answers by how they ended", ["end"])
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, those of pictures included")
        self._image_tokens = self._counter("image_tokens", "Tokens of prompts that stand for pictures")
        self._cached_tokens = self._counter("cached_tokens", "Tokens of prompts that were in a KV cache")
        self._generated_tokens = self._counter("generated_tokens", "Tokens of answers")
        self._views = self._counter("views", "Views of pictures: tiles, global views, thumbnails")
        self._cached_views = self._counter("cached_views", "Views that had been encoded before")
        self._ttft = self._histogram("time_to_first_token_seconds", "From a request to its first token", _TTFT)
        self._tpot = self._histogram("time_per_output_token_seconds", "Mean of an answer after its first token", _TPOT)
        self._wait = self._histogram("queue_wait_seconds", "From a request to the beginning of its answer", _WAIT)
        process = psutil.Process()
        self._gauge("queue_waiting", "Requests that wait", waiting)
        self._gauge("queue_running", "Requests being answered", running)
        self._gauge("ready", "1 when the model is loaded and warm", ready)
        self._gauge("resident_memory_bytes", "Memory of the process", lambda: process.memory_info().rss)
        self._gauge("peak_memory_bytes", "Largest memory of the process so far", peak_memory)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] | list[str] = ()) -> Counter:
        return Counter(f"edgevlm_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"edgevlm_{name}", text, buckets=buckets, registry=self._registry)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(f"edgevlm_{name}", text, registry=self._registry).set_function(value)

    def count_request(self, path: str, status: int) -> None:
        """Count a request; status 0 is one whose caller went away."""
        self._requests.labels(path, str(status)).inc()

    def count_answer(self, job: Job, end: Piece | BaseException) -> None:
        """Count the end of a job."""
        self._wait.observe(job.waited_s)
        if isinstance(end, Piece):
            assert end.answer is not None
            self._answers.labels(end.answer.finish_reason).inc()
            self._count_tokens(end.answer, job.waited_s)
        else:
            kinds: dict[type[BaseException], str] = {AbandonedError: "abandoned", FailedError: "failed"}
            self._answers.labels(kinds.get(type(end), "refused")).inc()

    def _count_tokens(self, answer: Answer, waited_s: float) -> None:
        self._prompt_tokens.inc(answer.prompt_tokens)
        self._image_tokens.inc(answer.image_tokens)
        self._cached_tokens.inc(answer.cached_tokens)
        self._generated_tokens.inc(answer.generated_tokens)
        self._views.inc(answer.views)
        self._cached_views.inc(answer.cached_views)
        self._ttft.observe(waited_s + answer.timings.ttft_s)
        if answer.timings.tpot_s is not None:
            self._tpot.observe(answer.timings.tpot_s)

    def render(self) -> bytes:
        """Return all figures in Prometheus's text format."""
        return generate_latest(self._registry)
