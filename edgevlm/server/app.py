"""The application: its paths, and one question's way through them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, ParamSpec, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive

from edgevlm import __version__
from edgevlm.answer import Answer, Piece
from edgevlm.decoding.scoring import AnyScores
from edgevlm.server import ollama
from edgevlm.server.completion import Completion
from edgevlm.server.convert import Converter
from edgevlm.server.deltas import End, Pieces, Reply, read_deltas
from edgevlm.server.engine import Job, Told, is_end
from edgevlm.server.errors import (
    CALLERS_ERRORS,
    FORM_PATH,
    SOURCE_PATH,
    ApiError,
    ClientGoneError,
    QueueFullError,
    placing,
    to_api_error,
)
from edgevlm.server.locate import PLACES, LocatePlan
from edgevlm.server.metrics import Metrics
from edgevlm.server.middleware import Guard
from edgevlm.server.models import Models, ServedModel, Use, until_gone
from edgevlm.server.ollama_reply import OllamaReply, rfc3339
from edgevlm.server.page import make_page
from edgevlm.server.plan import Plan, make_plan
from edgevlm.server.refusals import explain
from edgevlm.server.responses import ResponsesRequest
from edgevlm.server.responses_reply import ResponseReply
from edgevlm.server.schemas import (
    Asked,
    ChatRequest,
    ErrorBody,
    LocateAnswer,
    LocateRequest,
    ScoreAnswer,
    ScoreRequest,
)
from edgevlm.server.scoring import make_score_plan, scores_body
from edgevlm.server.settings import ServeConfig
from edgevlm.server.tasks import Tasks, TaskStatus
from edgevlm.server.uploads import ConvertAnswer, ConvertRequest, Upload, form_schema, read_form, read_source
from edgevlm.server.wire import EventStream, Json
from edgevlm.vlm import VLM

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")
_PLANS_AT_ONCE = 4
"""Requests that are understood at the same time, each in a thread."""
_WRONG = {
    400: "The request cannot be understood or honoured.",
    401: "No API key, or a wrong one.",
    403: "The Host or the Origin is not this server's.",
    404: "No such path, or no such model.",
    405: "The path is not called by that method.",
    408: "The request took too long to arrive.",
    413: "More bytes, values, pictures, pixels or characters than the server takes.",
    415: "The request is no JSON, or no form where one is taken.",
    500: "The server failed.",
    501: "A library that the document needs is not installed.",
    503: "The queue is full, or the model is not ready; Retry-After says when to try again.",
    504: "The answer took too long.",
}
_NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""FastAPI would hand exceptions and request bodies to whatever OpenTelemetry it finds, or the environment names."""
_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _WRONG.items()
}
_WRONG_AT_OLLAMA: dict[int | str, dict[str, Any]] = {
    status: {"model": ollama.OllamaError, "description": text} for status, text in _WRONG.items()
}


def _streams(media_type: str, text: str = "The answer.") -> dict[int | str, dict[str, Any]]:
    return {200: {"description": text, "content": {media_type: {}, "application/json": {}}}}


def create_app(models: Models, metrics: Metrics, config: ServeConfig) -> ASGIApp:
    """Return the application that `models` answer for."""
    app = FastAPI(
        title="edgevlm",
        version=__version__,
        description="Answers questions about pictures with models on this machine.",
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
        telemetry=_NO_TELEMETRY,
        responses=_RESPONSES,
    )
    server = _Server(models, config)
    _add_probes(app, server, metrics)
    _add_openai(app, server)
    _add_docling(app, server)
    _add_ollama(app, server)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    for kind in (*CALLERS_ERRORS, Exception):
        app.add_exception_handler(kind, _handle_error)
    guarded = Guard(app, config, lambda: server.full, metrics.count_request)
    if not config.allowed_origins:
        return guarded
    return CORSMiddleware(
        guarded,
        allow_origins=config.allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # OpenAI's client for browsers sends a dozen of its own
        allow_private_network=True,
        expose_headers=["retry-after"],
    )


def _add_probes(app: FastAPI, server: _Server, metrics: Metrics) -> None:
    """Add what monitoring asks for, and the page; each answers HEAD, too."""
    page = make_page()
    app.get("/", include_in_schema=False)(page)
    app.get("/healthz", summary="Whether the process lives")(server.healthz)
    app.get("/readyz", summary="Whether the first model has been loaded and is warm")(server.readyz)
    for path, handler in (("/", page), ("/healthz", server.healthz), ("/readyz", server.readyz)):
        app.head(path, include_in_schema=False)(handler)

    @app.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    def prometheus() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_openai(app: FastAPI, server: _Server) -> None:
    """Add OpenAI's APIs, and what is written like them."""
    app.get("/v1/models", summary="The models")(server.list_models)
    app.get("/v1/models/{name:path}", summary="The model that is called that")(server.model)
    sse = _streams("text/event-stream")
    app.post("/v1/chat/completions", summary="Continue a conversation", responses=sse)(server.chat)
    app.post("/v1/responses", summary="Continue a conversation, as a response", responses=sse)(server.respond)
    located: dict[int | str, dict[str, Any]] = {200: {"description": "The places.", "model": LocateAnswer}}
    app.post("/v1/locate", summary="Find something in a picture", responses=located)(server.locate)
    scored: dict[int | str, dict[str, Any]] = {200: {"description": "The scores.", "model": ScoreAnswer}}
    app.post("/v1/score", summary="Tell how likely given answers are", responses=scored)(server.score)


def _add_docling(app: FastAPI, server: _Server) -> None:
    """Add what docling-serve has of converting documents."""
    made: dict[int | str, dict[str, Any]] = {200: {"description": "The document.", "model": ConvertAnswer}}
    form = app.post(FORM_PATH, summary="Convert a document", responses=made, openapi_extra=form_schema())
    form(server.convert_file)
    app.post(SOURCE_PATH, summary="Convert a document that JSON holds", responses=made)(server.convert_source)
    task: dict[int | str, dict[str, Any]] = {200: {"description": "The task.", "model": TaskStatus}}
    begun = app.post(f"{FORM_PATH}/async", summary="Begin a task of it", responses=task, openapi_extra=form_schema())
    begun(server.begin_file)
    app.post(f"{SOURCE_PATH}/async", summary="Begin a task of one in JSON", responses=task)(server.begin_source)
    app.get("/v1/status/poll/{task_id}", summary="How far a document is", responses=task)(server.task_status)
    app.get("/v1/result/{task_id}", summary="The document of a task", responses=made)(server.task_result)


def _add_ollama(app: FastAPI, server: _Server) -> None:
    """Add Ollama's API."""
    wrong, lines = _WRONG_AT_OLLAMA, _WRONG_AT_OLLAMA | _streams("application/x-ndjson")
    app.get("/api/version", summary="edgevlm's version", responses=wrong)(server.ollama_version)
    app.get("/api/tags", summary="The models, as Ollama lists them", responses=wrong)(server.ollama_tags)
    app.get("/api/ps", summary="The models that are loaded", responses=wrong)(server.ollama_ps)
    app.post("/api/show", summary="A model, as Ollama shows it", responses=wrong)(server.ollama_show)
    app.post("/api/chat", summary="Continue a conversation, as Ollama does", responses=lines)(server.ollama_chat)
    app.post("/api/generate", summary="Answer a question, as Ollama does", responses=lines)(server.ollama_generate)


class _Server:
    """What the paths do."""

    def __init__(self, models: Models, config: ServeConfig) -> None:
        self._models, self._config = models, config
        self._planners = ThreadPoolExecutor(_PLANS_AT_ONCE, "edgevlm-plan")
        self._plans: set[Future[Any]] = set()
        self._converter, self._tasks = Converter(config), Tasks()
        self._places = 0
        """Documents between two of their pages, which keep their place in the queue."""

    @property
    def full(self) -> bool:
        """Whether another question would be refused: those that are still being understood count as waiting."""
        return self._models.held + len(self._plans) + self._places > self._config.max_queue

    async def healthz(self) -> Json:
        return Json({"status": "ok"})

    async def readyz(self) -> Json:
        self._models.check_ready()
        return Json({"status": "ready"})

    async def list_models(self) -> Json:
        return Json({"object": "list", "data": [self._card(model) for model in self._models]})

    async def model(self, name: str) -> Json:
        return Json(self._card(self._find(name)))

    async def chat(self, request: ChatRequest, http: Request) -> Response:
        async with self._use(request.model, http.receive) as use:
            completion = Completion(
                use.model,
                use.vlm.manifest.fingerprint,
                logprobs=bool(request.logprobs),
                include_usage=bool(request.stream_options and request.stream_options.include_usage),
            )
            return await self._answer(request.asked(), completion, http, use)

    async def respond(self, request: ResponsesRequest, http: Request) -> Response:
        async with self._use(request.model, http.receive) as use:
            return await self._answer(request.asked(), ResponseReply(request, use.model), http, use)

    async def ollama_chat(self, request: ollama.OllamaChat, http: Request) -> Response:
        return await self._answer_ollama(request, http)

    async def ollama_generate(self, request: ollama.OllamaGenerate, http: Request) -> Response:
        return await self._answer_ollama(request, http)

    async def ollama_version(self) -> Json:
        return Json({"version": __version__})

    async def ollama_tags(self) -> Json:
        since = rfc3339(self._models.started_at)
        return Json({"models": [ollama.list_entry(model.manifest, model.name, since) for model in self._models]})

    async def ollama_ps(self) -> Json:
        return Json({"models": [self._process(model, vlm) for model in self._models if (vlm := model.vlm) is not None]})

    async def ollama_show(self, request: ollama.OllamaShow) -> Json:
        model = self._find(request.model or request.name, ollama.tagged)
        self._models.check_ready()
        assert model.manifest is not None
        return Json(ollama.show(model.manifest, rfc3339(self._models.started_at), can_think=_can_think(model)))

    async def locate(self, request: LocateRequest, http: Request) -> Response:
        async with self._use(request.model, http.receive) as use:
            located = await self._plan(LocatePlan, request, use.vlm, self._config)
            plan = Plan(located.conversation, located.config, located.image_budget, None, http.state.caller)
            with placing(PLACES):
                async with aclosing(self._pieces(plan, http.receive, use)) as pieces:
                    async for piece, waited_s in pieces:
                        if piece.answer:
                            found = await asyncio.to_thread(located.read, piece.answer, waited_s)
                            return Json({"object": "locations", "model": use.model, **found})
        raise AssertionError("an answer's last piece carries it")

    async def score(self, request: ScoreRequest, http: Request) -> Response:
        async with self._use(request.model, http.receive) as use:
            plan = await self._plan(make_score_plan, request, self._config, http.state.caller)
            async with aclosing(self._follow(plan, http.receive, use)) as events:
                async for event, waited_s in events:
                    if isinstance(event, AnyScores):
                        return Json({"object": "scores", "model": use.model, **scores_body(request, event, waited_s)})
        raise AssertionError("the scores come last")

    async def convert_file(self, http: Request) -> Response:
        self._models.check_ready()
        return Json(await self._convert(await read_form(http), http.state.caller, http.receive))

    async def convert_source(self, request: ConvertRequest, http: Request) -> Response:
        self._models.check_ready()
        upload = await self._plan(read_source, request)
        return Json(await self._convert(upload, http.state.caller, http.receive))

    async def begin_file(self, http: Request) -> Response:
        self._models.check_ready()
        return self._begin(await read_form(http), http)

    async def begin_source(self, request: ConvertRequest, http: Request) -> Response:
        self._models.check_ready()
        return self._begin(await self._plan(read_source, request), http)

    async def task_status(self, task_id: str, http: Request, wait: float = 0.0) -> Response:
        return Json((await self._tasks.status(task_id, http.state.caller, wait)).model_dump())

    async def task_result(self, task_id: str, http: Request) -> Response:
        return Json(self._tasks.result(task_id, http.state.caller))

    def _begin(self, upload: Upload, http: Request) -> Response:
        """Begin to convert a document, whose caller asks for it later."""
        self._find(upload.options.model)
        if self.full:
            raise QueueFullError
        caller = http.state.caller
        return Json(self._tasks.start(caller, self._convert(upload, caller, _never)).model_dump())

    async def _convert(self, upload: Upload, caller: str, receive: Receive) -> dict[str, Any]:
        """Convert a document, a page at a time: between two pages other callers have their turn."""
        async with self._use(upload.options.model, receive) as use:
            conversion = self._converter.plan(upload, use.vlm, caller)
            if self.full:
                raise QueueFullError
            within_s = self._config.time_limit_s - (time.monotonic() - use.began)
            self._places += 1
            try:
                return await _unless_gone(conversion.run(lambda plan: self._read_page(plan, use), within_s), receive)
            finally:
                self._places -= 1

    async def _read_page(self, plan: Plan, use: Use) -> Answer:
        """Return the answer about a page of a document, whose place the page takes in the queue."""
        self._places -= 1
        try:
            async with aclosing(self._pieces(plan, _never, use)) as pieces:
                async for piece, _ in pieces:
                    if piece.answer:
                        return piece.answer
        finally:
            self._places += 1
        raise AssertionError("an answer's last piece carries it")

    async def _answer_ollama(self, request: ollama.OllamaChat | ollama.OllamaGenerate, http: Request) -> Response:
        self._models.check_ready()
        model = self._find(request.model, ollama.tagged)
        reply = OllamaReply(request, model.name)
        if request.is_empty and request.keep_alive == 0 and not model.stays:
            model.keep(0.0)
            return Json(reply.nothing("unload"))
        async with self._use(model.name, http.receive, request.keep_alive) as use:
            if request.is_empty:
                return Json(reply.nothing("load"))
            return await self._answer(request.asked(), reply, http, use)

    async def _answer(self, asked: Asked, reply: Reply, http: Request, use: Use) -> Response:
        """Answer what was asked through any API, in that API's form."""
        with placing(asked.places):
            plan = await self._plan(make_plan, asked.chat, self._config, http.state.caller)
            tools = plan.tools is not None
            pieces = self._pieces(plan, http.receive, use)
            if asked.chat.stream:
                first = await anext(pieces)  # an error before the first piece has a status of its own
                deltas = read_deltas(_chain(first, pieces), tools=tools)
                return EventStream(reply.events(deltas), reply.media_type)
            async with aclosing(pieces):
                async for piece, waited_s in pieces:
                    if piece.answer:
                        return Json(reply.whole(End.of(piece.answer, waited_s, tools=tools)))
        raise AssertionError("an answer's last piece carries it")

    @asynccontextmanager
    async def _use(self, name: str | None, receive: Receive, keep_s: float | None = None) -> AsyncIterator[Use]:
        """Lend the model that is called `name`, loaded. Raises `QueueFullError`, `ApiError` and others of `Models`."""
        self._models.check_ready()
        model = self._find(name)
        if not model.is_open and self.full:
            raise QueueFullError
        async with self._models.use(model, receive, keep_s) as use:
            yield use

    def _find(self, name: str | None, spell: Callable[[str], str] = str) -> ServedModel:
        """Return the model of that name, or of its name as `spell` writes it; the first for None. Raises `ApiError`."""
        for model in self._models:
            if name in (None, model.name, spell(model.name)):
                return model
        names = ", ".join(model.name for model in self._models)
        message = f"this server's model{' is' if len(self._models) == 1 else 's are'} called {names}"
        raise ApiError(404, "model_not_found", message, param="model")

    def _process(self, model: ServedModel, vlm: VLM) -> dict[str, Any]:
        expires_at = model.expires_at
        return ollama.process_entry(vlm.manifest, model.name, None if expires_at is None else rfc3339(expires_at))

    def _card(self, model: ServedModel) -> dict[str, Any]:
        card = {"id": model.name, "object": "model", "created": self._models.started_at, "owned_by": "edgevlm"}
        if model.family is not None:
            card["capabilities"] = {
                "locate": model.family.grounding is not None,
                "video": model.family.video_placeholder is not None,
                **({"thinking": _can_think(model)} if model.vlm else {}),
            }
        return {**card, "status": {"value": model.state}}

    async def _plan(self, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return `make(...)`, a request understood in a thread. Raises `QueueFullError`, `ApiError` and its errors."""
        if self.full:
            raise QueueFullError
        loop = asyncio.get_running_loop()
        plan = self._planners.submit(make, *args, **kwargs)
        self._plans.add(plan)
        plan.add_done_callback(lambda done: _call_soon(loop, self._plans.discard, done))
        try:
            async with asyncio.timeout(self._config.time_limit_s):
                return await asyncio.wrap_future(plan)
        except TimeoutError:
            raise self._too_late() from None
        finally:
            del plan  # else this frame, which its error holds, would hold the error

    def _too_late(self) -> ApiError:
        limit = self._config.time_limit_s
        return ApiError(504, "time_limit", f"the answer was not ready within {limit:g} s, waiting included")

    async def _pieces(self, plan: Plan, receive: Receive, use: Use) -> Pieces:
        """Yield the answer's pieces, each with the seconds that the job had waited, for its model included."""
        async with aclosing(self._follow(plan, receive, use)) as events:
            async for event, waited_s in events:
                assert isinstance(event, Piece)
                yield event, waited_s

    async def _follow(
        self, plan: Plan, receive: Receive, use: Use
    ) -> AsyncGenerator[tuple[Piece | AnyScores, float], None]:
        """Yield the pieces, or the scores, each with the seconds that the job had waited, for its model included.

        The time limit counts from the beginning of `use`. Whatever ends this (the client goes away, the time is up, the
        server stops) ends the generation too.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Told] = asyncio.Queue()

        def deliver(event: Told) -> None:
            _call_soon(loop, events.put_nowait, event)

        conversation = plan.conversation
        job = Job(
            conversation.messages,
            conversation.images,
            plan.config,
            plan.image_budget,
            plan.caller,
            deliver,
            plan.scored,
            submitted=time.monotonic() - use.loading_s,
        )
        use.worker.submit(job, has_place=plan.has_place)
        left = self._config.time_limit_s - (time.monotonic() - use.began)
        timer = loop.call_later(left, lambda: events.put_nowait(self._too_late()))
        watcher = asyncio.create_task(_tell_when_gone(receive, events))
        try:
            while True:
                event = await events.get()
                if isinstance(event, BaseException):
                    try:
                        raise event
                    finally:
                        del event  # else this frame, which the error holds, would hold the error
                if is_end(event):
                    self._log(job, event)
                yield event, job.waited_s
                if is_end(event):
                    return
        finally:
            timer.cancel()
            watcher.cancel()
            use.worker.abandon(job)

    def _log(self, job: Job, end: Piece | AnyScores) -> None:
        found = end.answer if isinstance(end, Piece) else end
        assert found is not None
        made = f"{found.generated_tokens} generated ({found.finish_reason})" if isinstance(found, Answer) else "scored"
        logger.info(
            "answered %s: %d prompt tokens (%d of pictures), %s, waited %.2f s, first token %.2f s",
            job.caller,
            found.prompt_tokens,
            found.image_tokens,
            made,
            job.waited_s,
            found.timings.ttft_s,
        )
        if self._config.log_content:
            texts = [part["text"] for message in job.messages for part in message["content"] if part["type"] == "text"]
            told = found.text if isinstance(found, Answer) else dict(found.log_likelihoods)
            logger.info("asked %r, answered %r", texts, told)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[T], object], argument: T) -> None:
    """Let the loop call a function, from any thread."""
    with suppress(RuntimeError):  # the loop is closed: nobody listens
        loop.call_soon_threadsafe(function, argument)


async def _chain(first: tuple[Piece, float], rest: Pieces) -> Pieces:
    async with aclosing(rest):
        yield first
        async for each in rest:
            yield each


async def _never() -> Message:
    """Receive nothing: somebody else listens whether the client is there."""
    await asyncio.Event().wait()
    raise AssertionError("nothing sets this event")


async def _unless_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Return what `work` returns; it is cancelled when the client goes away. Raises `ClientGoneError`."""
    task, gone = asyncio.create_task(work), asyncio.create_task(until_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _tell_when_gone(receive: Receive, events: asyncio.Queue[Told]) -> None:
    await until_gone(receive)
    events.put_nowait(ClientGoneError())


async def _handle_error(request: Request, error: Exception) -> Json:
    """Answer with what the caller may know of an error."""
    return _error(request, to_api_error(error))


async def _invalid(request: Request, error: Exception) -> Json:
    """Answer a request of another shape as the API that it is for does."""
    assert isinstance(error, RequestValidationError)
    return _error(request, explain(error.errors()[0], error.body, request.scope["path"]))


async def _http_error(request: Request, error: Exception) -> Json:
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    code = codes.get(error.status_code, "invalid_request")
    return _error(request, ApiError(error.status_code, code, str(error.detail), headers=error.headers))


def _error(request: Request, error: ApiError) -> Json:
    return Json(error.body_at(request.scope["path"]), error.status, error.headers)


def _can_think(model: ServedModel) -> bool:
    """Tell whether a model writes thoughts; False for one that is not loaded, whose tokenizer tells it."""
    return model.vlm is not None and model.vlm.processor.thinking.supported
