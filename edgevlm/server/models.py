"""The models of one server: which are loaded, which requests use them, and which is unloaded to make room for another.

The first is loaded at the start and stays; the others are loaded at their first use. The registry belongs to the event
loop's thread: only loading and unloading happen in others.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from math import inf
from time import monotonic, time

from starlette.types import Receive

from edgevlm.errors import EdgeVLMError, OptionError
from edgevlm.families import Family, make_family
from edgevlm.malloc import return_freed_memory
from edgevlm.manifest import Manifest
from edgevlm.runtime.cpu import available_memory
from edgevlm.server.engine import Job, Told, Worker, log_failure
from edgevlm.server.errors import ApiError, ClientGoneError, StoppingError, to_api_error
from edgevlm.server.settings import ServeConfig
from edgevlm.vlm import VLM

logger = logging.getLogger(__name__)
_POLL_S = 0.02
_END_S = 10.0
"""How long an idle worker's thread may take to end."""


@dataclass(frozen=True)
class Source:
    """A model to be served: what callers call it, how it is loaded, and what is known of it before."""

    name: str
    load: Callable[[], VLM]
    manifest: Manifest | None = None


class ServedModel:
    """One model of the server, loaded or not. Raises `DamagedModelError` for a manifest of an unknown family."""

    def __init__(self, source: Source, unload_after_s: float, *, stays: bool) -> None:
        self.name, self.load = source.name, source.load
        self.stays = stays
        """Whether no idle time unloads it, whatever a request says."""
        self.worker: Worker | None = None
        self.loading: asyncio.Task[BaseException | None] | None = None
        self.waiting = 0
        """Requests that wait for it to be loaded."""
        self.using = 0
        """Requests that keep it loaded, beside the worker's jobs."""
        self.leaving = False
        """Whether it is unloaded as soon as nobody uses it, to make room: until then it takes no new request."""
        self.last_used = monotonic()
        self.keep_s = inf if stays else unload_after_s
        """How long it stays loaded after its last use."""
        self._unload_after_s = unload_after_s
        self._manifest = source.manifest
        self._family = make_family(source.manifest.family, source.manifest.family_config) if source.manifest else None

    @property
    def vlm(self) -> VLM | None:
        """The model, while it is loaded."""
        return self.worker.vlm if self.worker else None

    @property
    def manifest(self) -> Manifest | None:
        """What is known of the export; of one that had no manifest, only while it is loaded."""
        return self.vlm.manifest if self.vlm else self._manifest

    @property
    def family(self) -> Family | None:
        """Its family, where that is known."""
        return self.vlm.processor.family if self.vlm else self._family

    @property
    def in_memory(self) -> bool:
        """Whether it is loaded, or being loaded."""
        return self.worker is not None and self.worker.failure is None

    @property
    def ready(self) -> bool:
        """Whether it is loaded and has answered once."""
        return self.worker is not None and self.worker.ready

    @property
    def is_open(self) -> bool:
        """Whether it takes a request now."""
        return self.ready and not self.leaving

    @property
    def state(self) -> str:
        """`loaded`, `loading` or `unloaded`."""
        if self.ready:
            return "loaded"
        return "loading" if self.in_memory or self.loading else "unloaded"

    @property
    def busy(self) -> bool:
        """Whether a request keeps it loaded."""
        return bool(self.using or (self.worker and self.worker.held))

    @property
    def queued(self) -> int:
        """Requests that wait for it to be loaded, or for their turn."""
        return self.waiting + (self.worker.waiting if self.worker else 0)

    @property
    def running(self) -> int:
        """Requests being answered."""
        return self.worker.running if self.worker else 0

    @property
    def idle_s(self) -> float:
        """Seconds since it was used last."""
        return 0.0 if self.busy else monotonic() - self.last_used

    @property
    def expires_at(self) -> float | None:
        """When it will be unloaded unless it is used, in seconds after 1970; None when it stays."""
        return None if self.keep_s == inf else time() + max(0.0, self.keep_s - self.idle_s)

    def keep(self, seconds: float | None) -> None:
        """Keep it loaded for so long after its last use; None is what the server was started with."""
        if not self.stays:
            self.keep_s = self._unload_after_s if seconds is None else seconds


@dataclass(frozen=True)
class Use:
    """A loaded model, as one request uses it."""

    model: str
    worker: Worker
    began: float
    """When the request began to wait for it, on the monotonic clock."""
    loading_s: float
    """How long the request waited for it to be loaded."""

    @property
    def vlm(self) -> VLM:
        """The model itself."""
        assert self.worker.vlm is not None
        return self.worker.vlm


class Models:
    """The registry. Raises `OptionError` where two models have one name, and `DamagedModelError`."""

    def __init__(
        self,
        sources: Sequence[Source],
        config: ServeConfig,
        on_done: Callable[[str, Job, Told], None],
        on_failure: Callable[[], None],
    ) -> None:
        """`on_done` is told of each job's end and its model; `on_failure` when the first model cannot be loaded at the
        start, or the thread that answers for it dies. Both are called in a worker's thread."""
        check_names([source.name for source in sources])
        self._models = [
            ServedModel(source, config.unload_after_s, stays=not number) for number, source in enumerate(sources)
        ]
        self._config, self._on_done = config, on_done
        self._room = asyncio.Lock()
        """Held while a model is loaded or unloaded: one at a time."""
        self._closed = False
        self._initial: Worker | None = self._make_worker(self.first, on_failure)
        """The first model's worker from the start on; None once it was unloaded."""
        self.started_at = int(time())

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    @property
    def first(self) -> ServedModel:
        """The model that is loaded at the start, and answers where none is named."""
        return self._models[0]

    @property
    def ready(self) -> bool:
        """Whether the server takes questions: see `check_ready`."""
        return self._initial is None or self._initial.ready

    @property
    def held(self) -> int:
        """Requests that wait, for a model or their turn, and those being answered."""
        return sum(model.waiting + (model.worker.held if model.worker else 0) for model in self)

    @property
    def failure(self) -> BaseException | None:
        """What kept the first model from being loaded at the start, or ended the thread that answers for it."""
        return self._initial.failure if self._initial else None

    def start(self) -> None:
        """Begin to load the first model."""
        assert self._initial is not None
        self._initial.start()

    def check_ready(self) -> None:
        """Raise `ApiError` while the first model is being loaded at the start, and when the server is about to end."""
        if self._initial is not None and self._initial.vlm is None:
            raise _loading("the model")
        if not self.ready:
            raise ApiError(503, "model_failed", "the model's thread has died, and the server ends; its log says why")

    def stalled_s(self) -> float:
        """Return for how many seconds the answer that moved least recently has not moved."""
        return max((model.worker.stalled_s() for model in self if model.worker and model.in_memory), default=0.0)

    @asynccontextmanager
    async def use(self, model: ServedModel, receive: Receive, keep_s: float | None = None) -> AsyncIterator[Use]:
        """Lend a model, loaded first where it is not; it stays so within the block, and while its worker holds a job.

        `keep_s` is what the request says of the time after that. Raises `ApiError` where the model cannot be loaded in
        time or at all, `ClientGoneError` and `StoppingError`.
        """
        began = monotonic()
        if model.is_open:
            model.using += 1
        else:
            await self._wait_for(model, receive)
        try:
            assert model.worker is not None
            model.keep(keep_s)
            yield Use(model.name, model.worker, began, monotonic() - began)
        finally:
            model.using -= 1
            model.last_used = monotonic()

    async def unload_idle(self) -> None:
        """Unload, again and again, the models that nobody has used for their time; the first stays."""
        while len(self) > 1:
            await asyncio.sleep(min(1.0, self._config.unload_after_s))
            for model in self:
                if model.busy:
                    model.last_used = monotonic()
                elif _is_over(model):
                    async with self._room:
                        if _is_over(model):  # still, for this had to wait
                            await self._unload(model)

    def stop_accepting(self) -> None:
        """Refuse all requests that wait or come; those being answered go on."""
        self._closed = True
        for model in self:
            if model.loading:
                model.loading.cancel()
            if model.worker:
                model.worker.stop_accepting()

    def end_current(self) -> None:
        """End the answers being made before their next tokens."""
        for model in self:
            if model.worker:
                model.worker.end_current()

    def stop(self, timeout_s: float) -> bool:
        """End everything and wait for the threads; return whether they ended in time."""
        workers = [model.worker for model in self if model.worker]
        for worker in workers:
            worker.stop_accepting()
            worker.end_current()
        deadline = monotonic() + timeout_s
        ended = [worker.stop(max(0.0, deadline - monotonic())) for worker in workers]
        return all(ended)

    def _make_worker(self, model: ServedModel, on_failure: Callable[[], None] | None = None) -> Worker:
        on_done = partial(self._on_done, model.name)
        model.worker = Worker(model.load, self._config.max_queue, on_done, on_failure, self._config.max_running)
        return model.worker

    async def _wait_for(self, model: ServedModel, receive: Receive) -> None:
        """Wait until a model is loaded, and count the request among those that use it. Errors as in `use`."""
        if self._closed:
            raise StoppingError
        model.loading = loading = model.loading or asyncio.create_task(self._load(model))
        model.waiting += 1
        gone = asyncio.create_task(until_gone(receive))
        try:
            limit = self._config.time_limit_s
            await asyncio.wait({loading, gone}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if loading.cancelled():
                raise StoppingError
            if not loading.done():
                raise ClientGoneError if gone.done() else _loading(model.name)
            if (error := loading.result()) is not None:
                told = to_api_error(error)
                raise ApiError(told.status, told.code, f"{model.name} cannot be loaded: {told.message}", param="model")
        except BaseException:
            if _succeeded(loading):
                model.using -= 1  # `_load` has counted it there
            else:
                model.waiting -= 1
            raise
        finally:
            gone.cancel()

    async def _load(self, model: ServedModel) -> BaseException | None:
        """Load a model as soon as there is room, unless nobody waits any more; return what kept it from being loaded.

        The requests that wait for it use it from then on, before anything could unload it.
        """
        try:
            async with self._room:
                if not model.ready:
                    await self._make_room(model)
                    if not model.waiting:
                        return None
                    if (error := await self._run_worker(model)) is not None:
                        return error
                model.using += model.waiting
                model.waiting = 0
                return None
        finally:
            model.loading = None

    async def _run_worker(self, model: ServedModel) -> BaseException | None:
        """Start a worker; return None once it is ready, or what kept it from that."""
        logger.info("loading %s", model.name)
        worker = self._make_worker(model)
        try:
            worker.start()
            while not worker.ready and worker.failure is None:
                await asyncio.sleep(_POLL_S)
            error: BaseException | None = worker.failure
        except RuntimeError as no_thread:
            error = no_thread
        if error is None:
            return None
        model.worker = None
        return _logged(model.name, error)

    async def _make_room(self, model: ServedModel) -> None:
        """Unload other models, the least recently used first and those that answer only once they are idle.

        Nothing more is unloaded once nobody waits for `model`.
        """
        try:
            while model.waiting and not self._has_room(model):
                others = [each for each in self if each.in_memory]
                chosen = min(others, key=lambda each: (each.busy, not each.leaving, each.last_used))
                chosen.leaving = True
                if chosen.busy:
                    await asyncio.sleep(_POLL_S)
                else:
                    await self._unload(chosen)
        finally:
            for each in self:
                each.leaving = False

    def _has_room(self, model: ServedModel) -> bool:
        """Whether a model may be loaded beside the others: into nothing it always may."""
        others = sum(each.in_memory for each in self)
        if not others:
            return True
        needed = model.manifest.size_bytes if model.manifest else 0
        return others < self._config.max_loaded_models and available_memory() >= needed

    async def _unload(self, model: ServedModel) -> None:
        """Unload an idle model, and give its memory back to the system."""
        logger.info("unloading %s", model.name)
        worker, model.worker = model.worker, None
        if worker is self._initial:
            self._initial = None
        if worker:
            await asyncio.to_thread(_end, worker)


def check_names(names: Sequence[str]) -> None:
    """Raise `OptionError` unless callers can tell the models apart; Ollama's clients may add `:latest` to a name."""
    counts = Counter(name.removesuffix(":latest") for name in names)
    [(name, count)] = counts.most_common(1)
    if count > 1:
        raise OptionError(f"{count} models are called {name}; give each a name of its own with --model-name, in order")


async def until_gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _loading(name: str) -> ApiError:
    message = f"{name} is being loaded; try again in a few seconds"
    return ApiError(503, "model_loading", message, headers={"retry-after": "2"})


def _succeeded(loading: asyncio.Task[BaseException | None]) -> bool:
    """Whether a model has been loaded."""
    return loading.done() and not loading.cancelled() and not loading.exception() and loading.result() is None


def _is_over(model: ServedModel) -> bool:
    """Whether nobody has used a loaded model for as long as it is kept."""
    return model.ready and not model.busy and model.idle_s >= model.keep_s


def _end(worker: Worker) -> None:
    """End an idle worker's thread and free its model."""
    worker.stop(_END_S)
    worker.vlm = None
    return_freed_memory()


def _logged(name: str, error: BaseException) -> BaseException:
    """Log why a model could not be loaded, and return that without the frames, which hold what had been loaded."""
    if isinstance(error, EdgeVLMError):
        logger.error("%s cannot be loaded: %s", name, error)
    else:
        log_failure(error)
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
