"""Prometheus metrics; no label and no value comes from a caller's text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from edgevlm.answer import Answer, Piece
from edgevlm.decoding.scoring import AnyScores
from edgevlm.metrics import peak_memory
from edgevlm.server.engine import Job, Told
from edgevlm.server.errors import AbandonedError, FailedError
from edgevlm.server.models import Models, ServedModel

M = TypeVar("M", Counter, Gauge, Histogram)
_TTFT = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_TPOT = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
_WAIT = (0.01, 0.1, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """Counters of one server; those of answers are told apart by their model."""

    def __init__(self, models: Models) -> None:
        # What is left out is a second line for each figure, with the time at which it was zero.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry, self._models = CollectorRegistry(), models
        self._requests = self._counter("requests", "HTTP requests by path and status", ["path", "status"])
        self._answers = self._counter("answers", "Answers by how they ended", ["model", "end"])
        self._prompt_tokens = self._of_models(Counter, "prompt_tokens", "Tokens of prompts, those of pictures included")
        self._image_tokens = self._of_models(Counter, "image_tokens", "Tokens of prompts that stand for pictures")
        self._cached_tokens = self._of_models(Counter, "cached_tokens", "Tokens of prompts that were in a KV cache")
        self._generated_tokens = self._of_models(Counter, "generated_tokens", "Tokens of answers")
        self._views = self._of_models(Counter, "views", "Views of pictures: tiles, global views, thumbnails")
        self._cached_views = self._of_models(Counter, "cached_views", "Views that had been encoded before")
        self._ttft = self._histogram("time_to_first_token_seconds", "From a request to its first token", _TTFT)
        self._tpot = self._histogram("time_per_output_token_seconds", "Mean of an answer after its first token", _TPOT)
        self._wait = self._histogram("queue_wait_seconds", "From a request to the beginning of its answer", _WAIT)
        process = psutil.Process()
        self._model_gauge("queue_waiting", "Requests that wait", lambda model: model.queued)
        self._model_gauge("queue_running", "Requests being answered", lambda model: model.running)
        self._model_gauge("model_loaded", "1 when the model is loaded and warm", lambda model: model.ready)
        self._gauge("ready", "1 when the server takes questions", lambda: models.ready)
        self._gauge("resident_memory_bytes", "Memory of the process", lambda: process.memory_info().rss)
        self._gauge("peak_memory_bytes", "Largest memory of the process so far", peak_memory)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(f"edgevlm_{name}", text, labels, registry=self._registry)

    def _of_models(self, kind: type[M], name: str, text: str, **options: Any) -> M:
        """Return a metric with a series for each model, from the start on."""
        metric = kind(f"edgevlm_{name}", text, ["model"], registry=self._registry, **options)
        for model in self._models:
            metric.labels(model.name)
        return metric

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return self._of_models(Histogram, name, text, buckets=buckets)

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(f"edgevlm_{name}", text, registry=self._registry).set_function(value)

    def _model_gauge(self, name: str, text: str, value: Callable[[ServedModel], float]) -> None:
        gauge = self._of_models(Gauge, name, text)
        for model in self._models:
            gauge.labels(model.name).set_function(partial(value, model))

    def count_request(self, path: str, status: int) -> None:
        """Count a request; status 0 is one whose caller went away."""
        self._requests.labels(path, str(status)).inc()

    def count_answer(self, model: str, job: Job, end: Told) -> None:
        """Count the end of a job."""
        self._wait.labels(model).observe(job.waited_s)
        if isinstance(end, Piece):
            assert end.answer is not None
            self._answers.labels(model, end.answer.finish_reason).inc()
            self._count_prompt(model, end.answer)
            self._count_tokens(model, end.answer, job.waited_s)
        elif isinstance(end, AnyScores):
            self._answers.labels(model, "scored").inc()
            self._count_prompt(model, end)
        else:
            kinds: dict[type[BaseException], str] = {AbandonedError: "abandoned", FailedError: "failed"}
            self._answers.labels(model, kinds.get(type(end), "refused")).inc()

    def _count_prompt(self, model: str, answer: Answer | AnyScores) -> None:
        self._prompt_tokens.labels(model).inc(answer.prompt_tokens)
        self._image_tokens.labels(model).inc(answer.image_tokens)
        self._cached_tokens.labels(model).inc(answer.cached_tokens)
        self._views.labels(model).inc(answer.views)
        self._cached_views.labels(model).inc(answer.cached_views)

    def _count_tokens(self, model: str, answer: Answer, waited_s: float) -> None:
        self._generated_tokens.labels(model).inc(answer.generated_tokens)
        self._ttft.labels(model).observe(waited_s + answer.timings.ttft_s)
        if answer.timings.tpot_s is not None:
            self._tpot.labels(model).observe(answer.timings.tpot_s)

    def render(self) -> bytes:
        """Return all figures in Prometheus's text format."""
        return generate_latest(self._registry)
