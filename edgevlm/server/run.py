"""`edgevlm serve`: socket, model, uvicorn, systemd, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import traceback
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgevlm.errors import EdgeVLMError, OptionError, ServerError
from edgevlm.malloc import return_freed_memory
from edgevlm.manifest import check_files, load_manifest
from edgevlm.model_store import find_model
from edgevlm.runtime.config import RuntimeConfig
from edgevlm.server.app import create_app
from edgevlm.server.engine import Worker
from edgevlm.server.metrics import Metrics
from edgevlm.server.models import Models, Source
from edgevlm.server.notify import notify, watchdog_interval_s
from edgevlm.server.settings import ServeConfig
from edgevlm.vlm import VLM

_HEADER_TIMEOUT_S = 10.0
_MOST_CONNECTIONS = 512
_TIDY_S = 60.0
logger = logging.getLogger(__name__)


def serve(models: Sequence[str | None], runtime: RuntimeConfig, config: ServeConfig) -> None:
    """Serve `models`, the first of which is loaded now, until SIGTERM or Ctrl-C.

    Every file of the first model is compared with its SHA-256 first, those of another before it is loaded. Raises
    `ModelError`, `DeviceError`, `OptionError` and `ServerError`.
    """
    if len(config.model_names) > len(models):
        names, count = len(config.model_names), len(models)
        raise OptionError(f"--model-name is given {names} times for {count} models; give it once for each, in order")
    folders = [find_model(model) for model in models]
    named = zip_longest(folders, config.model_names)
    sources = [make_source(folder, name, runtime, checked=folder is folders[0]) for folder, name in named]
    check_files(folders[0], load_manifest(folders[0]), full=True)
    Server(sources, config).run()


def make_source(folder: Path, name: str | None, runtime: RuntimeConfig, *, checked: bool) -> Source:
    """Return how a folder is served, its every file checked at its first load unless it is. Raises `ModelError`."""

    def load() -> VLM:
        nonlocal checked
        if not checked:
            check_files(folder, load_manifest(folder), full=True)
            checked = True
        return VLM(folder, runtime)

    return Source(name or folder.absolute().name, load, load_manifest(folder))


class Server:
    """One server: its socket is open when it has been made. Raises `ServerError`, and what `Models` raises."""

    def __init__(self, sources: Sequence[Source], config: ServeConfig) -> None:
        self.models = Models(sources, config, self._count, self._failed)
        self.socket = _listen(config.host, config.port)
        self.metrics = Metrics(self.models)
        self._config = config
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                create_app(self.models, self.metrics, config),
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,  # or any caller could say that it is another
                server_header=False,
                limit_concurrency=_MOST_CONNECTIONS,
                timeout_graceful_shutdown=round(config.stop_timeout_s) + 2,
            ),
            self._stop_answering,
        )

    @property
    def url(self) -> str:
        """Where the server listens."""
        host, port = self.socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @property
    def worker(self) -> Worker | None:
        """What answers for the first model, while that is in memory."""
        return self.models.first.worker

    def run(self) -> None:
        """Serve until told to stop. Raises what kept the first model from loading; `ServerError` if its thread dies."""
        asyncio.run(self._run())
        failure = self.models.failure
        if isinstance(failure, EdgeVLMError):
            raise failure
        if failure:
            raise ServerError(f"the model's thread died of {_describe(failure)}; start the server again") from failure

    def stop(self) -> None:
        """Ask the server, from any thread, to stop as SIGTERM does."""
        self._uvicorn.should_exit = True

    async def _run(self) -> None:
        self.models.start()
        logger.info("listening on %s", self.url)
        tasks = [asyncio.create_task(each) for each in (self._report(), self.models.unload_idle(), _tidy())]
        try:
            await self._uvicorn.serve([self.socket])
        finally:
            for task in tasks:
                task.cancel()
            notify("STOPPING=1")
            self.socket.close()
            if not await asyncio.to_thread(self.models.stop, self._config.stop_timeout_s):
                logger.warning("a model is still at work; it ends with the process")

    async def _report(self) -> None:
        """Tell systemd when the first model is ready, and from then on that it has not got stuck."""
        interval = watchdog_interval_s()
        while not self.models.ready:
            await asyncio.sleep(0.05)
        logger.info("the model is ready")
        notify("READY=1")
        while interval:
            if self.models.stalled_s() < self._config.time_limit_s:
                notify("WATCHDOG=1")
            await asyncio.sleep(interval)

    def _stop_answering(self) -> None:
        self.models.stop_accepting()
        asyncio.get_running_loop().call_later(self._config.stop_timeout_s, self.models.end_current)

    def _count(self, *end: Any) -> None:
        self.metrics.count_answer(*end)

    def _failed(self) -> None:
        self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """uvicorn that ends with exit status 0 when it is asked to, and lets go of waiting requests at once."""

    def __init__(self, config: uvicorn.Config, stop_answering: Callable[[], None]) -> None:
        super().__init__(config)
        self._stop_answering = stop_answering

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stop_answering()
        await super().shutdown(sockets)


class _Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 with an end to its patience: for a header that never comes, or an answer never fetched."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio leaves this out for a socket that it did not make: each token would wait for the last one's ACK.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._look(object(), False)

    def _look(self, before: object, was_closing: bool) -> None:
        """Cut the connection when it is found waiting for the same header twice in a row, or closing."""
        closing = self.transport.is_closing()
        answered = self.cycle is not None and self.cycle.response_complete
        now = self.cycle if answered or self.conn.their_state is h11.IDLE else object()
        if now is before or (closing and was_closing):
            self.transport.abort()
        elif self in self.connections:
            self.loop.call_later(_HEADER_TIMEOUT_S, self._look, now, closing)


async def _tidy() -> None:
    """Give freed memory back, again and again."""
    while True:
        await asyncio.sleep(_TIDY_S)
        await asyncio.to_thread(return_freed_memory)


def _describe(error: BaseException) -> str:
    """Return in a few words what was raised, and where."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__} ({Path(last.filename).name}, line {last.lineno})"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_MOST_CONNECTIONS)
    except (OSError, OverflowError, UnicodeError) as error:  # the last: a label of a name that is too long
        reason = getattr(error, "strerror", None) or error
        raise ServerError(f"cannot listen on {host} port {port}: {reason}; choose another with --port") from None
