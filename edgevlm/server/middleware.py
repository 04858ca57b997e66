"""Middleware before parsing: Host, Origin, API key, body size and time limits.

A web page opened on the kiosk must not be able to use its server: a request that names a host which is not this
machine (DNS rebinding) or comes from another page's origin is refused before anything else is looked at.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections.abc import Callable, Sequence
from hashlib import sha256
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgevlm.server.engine import log_failure
from edgevlm.server.errors import (
    CALLERS_ERRORS,
    FORM_PATH,
    PASSED_ON,
    ApiError,
    ClientGoneError,
    QueueFullError,
    to_api_error,
    to_json,
)
from edgevlm.server.settings import ANY_ORIGIN, ServeConfig

OPEN_PATHS = ("/", "/healthz", "/readyz")
"""These tell a stranger nothing but that edgevlm runs here; all others ask for the key, if there is one."""
_UPLOADS_AT_ONCE = 8
"""Bodies read at the same time: with the queue's length this bounds the memory that requests take."""
_MOST_VALUES = 500_000
"""Values of a request's JSON, told from its commas and brackets before it is read: a body of nothing but `[]` would
take thirty times its size, and all of the server's attention. Texts and schemas of the largest size have fewer."""
_GRACE_S = 30.0
"""How long a client may take to read an answer beyond the time to make it."""
_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, config: ServeConfig, is_full: Callable[[], bool], count: Callable[..., None]):
        """`is_full` tells whether a question would be refused; `count` is given each answer's path and status."""
        self._app, self._config, self._is_full, self._count = app, config, is_full, count
        self._uploads = asyncio.Semaphore(_UPLOADS_AT_ONCE)
        self._limit_s = 2 * config.body_timeout_s + config.time_limit_s + _GRACE_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            async with asyncio.timeout(self._limit_s):
                await self._forward(scope, receive, send_on)
        except PASSED_ON:
            raise
        except BaseException as error:
            if not status:  # else it is too late to say so, or has been said
                await error_response(to_api_error(error), send_on, scope["path"])
        finally:
            self._count(getattr(scope.get("route"), "path", "other"), status)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        check_host(headers, self._config)
        check_origin(headers, scope, self._config.allowed_origins)
        client = scope.get("client")
        scope["state"]["caller"] = client[0] if client else "local"
        if self._config.api_keys and scope["path"] not in OPEN_PATHS:
            scope["state"]["caller"] = check_key(headers, self._config.api_keys)
        if scope["method"] == "POST":
            receive = await self._read(headers, receive, scope["path"])
        try:
            await self._app(scope, receive, send)
        except BaseException as error:
            if not isinstance(error, (*CALLERS_ERRORS, *PASSED_ON)):
                log_failure(error)
            raise

    async def _read(self, headers: Headers, receive: Receive, path: str) -> Receive:
        """Read the whole body and return what gives it to the application."""
        is_form = path.removesuffix("/async") == FORM_PATH
        expected, name = ("multipart/form-data", "a form") if is_form else ("application/json", "JSON")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != expected:
            code = "not_a_form" if is_form else "not_json"
            raise ApiError(415, code, f"send {name}, with the header Content-Type: {expected}")
        limit = self._config.max_body_bytes
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            raise _too_large(limit)
        if self._is_full():
            raise QueueFullError
        within = self._config.body_timeout_s
        try:
            async with asyncio.timeout(within):
                await self._uploads.acquire()
        except TimeoutError:
            raise QueueFullError from None
        try:
            async with asyncio.timeout(within):
                body = await _collect(receive, limit)
        except TimeoutError:
            raise ApiError(408, "body_too_slow", f"the request took longer than {within:g} s to arrive") from None
        finally:
            self._uploads.release()
        if body and not is_form and sum(map(body.count, b",[{")) > _MOST_VALUES:
            raise ApiError(413, "body_too_complex", f"the request holds more than {_MOST_VALUES:,} JSON values")

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            whole, body = body, None  # let go of, for the answer may have to wait
            return {"type": "http.request", "body": whole, "more_body": False}

        return replay


async def _collect(receive: Receive, limit: int) -> bytes | None:
    """Return a request's whole body. Raises `ClientGoneError`, and `ApiError` when it has more bytes than `limit`."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> ApiError:
    message = f"the request is larger than {limit:,} bytes; send fewer or smaller pictures"
    return ApiError(413, "body_too_large", message)


async def error_response(error: ApiError, send: Send, path: str) -> None:
    """Send an error as JSON, in the shape of the API that `path` belongs to."""
    body = to_json(error.body_at(path))
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def check_host(headers: Headers, config: ServeConfig) -> None:
    """Raise `ApiError` unless the request names this machine.

    An address is no name that a stranger's DNS could point here, so any address will do.
    """
    host = _host_name(headers.get("host", ""))
    known = {"localhost", *(name.lower() for name in config.allowed_hosts)}
    if not config.is_local:
        known.add(socket.gethostname().lower())
    if host not in known and not _is_address(host):
        raise ApiError(403, "host_not_allowed", "this server is not called by that Host; allow it with --allow-host")


def _host_name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def check_origin(headers: Headers, scope: Scope, allowed: Sequence[str]) -> None:
    """Raise `ApiError` for a request that a browser sends on behalf of a page which is not the server's own."""
    origin = headers.get("origin")
    if origin is not None:
        own = origin.partition("://")[2].lower() == headers.get("host", "").lower()
    else:
        follows_link = scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"
        own = follows_link or headers.get("sec-fetch-site", "none") in ("none", "same-origin")
    if own or origin in allowed or (origin is not None and ANY_ORIGIN in allowed):
        return
    raise ApiError(403, "origin_not_allowed", "pages of that origin may not use this server; see --allow-origin")


def check_key(headers: Headers, keys: Sequence[str]) -> str:
    """Return a name for the caller whose key was sent, as docling's clients do or as all others. Raises `ApiError`.

    Digests of one length are compared, all of them each time, so that timing tells nothing about a key.
    """
    scheme, _, sent = headers.get("authorization", f"Bearer {headers.get('x-api-key', '')}").partition(" ")
    digest = sha256(sent.strip().encode("utf-8", "surrogateescape")).digest()
    matches = [hmac.compare_digest(digest, sha256(key.encode()).digest()) for key in keys]
    if scheme.lower() != "bearer" or not any(matches):
        message = "an API key is needed: send the header Authorization: Bearer KEY"
        raise ApiError(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})
    return f"key-{matches.index(True)}"
