"""What a caller is told when something is wrong: OpenAI's error object or Ollama's, and a table of edgevlm's errors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from edgevlm.errors import (
    ContextLengthError,
    DeviceError,
    EdgeVLMError,
    ImageError,
    ImageTooLargeError,
    ModelError,
    OptionError,
    PromptError,
    ThinkingError,
    VideoError,
)
from edgevlm.strict_json import write_json

OLLAMA_PATHS = "/api/"
"""What Ollama's paths begin with; all others are OpenAI's, or like them."""
DOCLING_PATHS = ("/v1/convert/", "/v1/status/", "/v1/result/")
"""What docling-serve's paths begin with."""
FORM_PATH, SOURCE_PATH = "/v1/convert/file", "/v1/convert/source"
"""A document in a form, where all other paths take JSON, and in JSON; `/async` behind either makes a task of it."""


class QueueFullError(Exception):
    """The queue is full."""


class StoppingError(Exception):
    """The server is stopping."""


class FailedError(Exception):
    """The answer failed with an unexpected error, which is in the log."""


class AbandonedError(Exception):
    """The caller is gone; the answer was ended."""


class ApiError(Exception):
    """An answer with an error status; `code` is what a program goes by, `param` names the request's field."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}
        return {"error": error}

    def body_at(self, path: str) -> dict[str, Any]:
        """Return the body as the API that `path` belongs to has it: Ollama's error is a text, docling's a `detail`."""
        if path.startswith(OLLAMA_PATHS):
            return {"error": self.message}
        return {"detail": self.message, **self.body} if path.startswith(DOCLING_PATHS) else self.body

    def renamed(self, places: Mapping[str, str]) -> ApiError:
        """Return the error with its place as the caller's request has it: `places` are those, by chat completions'."""
        steps = (self.param or "").split(".")
        for end in range(len(steps), 0, -1):
            own = places.get(".".join(steps[:end]))
            if own is not None:
                param = ".".join([own, *steps[end:]])
                rest = self.message.removeprefix(f"{self.param}:")
                message = self.message if rest == self.message else f"{param}:{rest}"
                return ApiError(self.status, self.code, message, param=param, headers=self.headers)
        return self


class ClientGoneError(Exception):
    """The client closed the connection; nobody reads what it is told."""


CALLERS_ERRORS = (ApiError, ClientGoneError, EdgeVLMError, FailedError, QueueFullError, StoppingError)
"""All that is raised on purpose while a request is answered."""


PASSED_ON = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)
"""What ends a task or the process. Whatever else is raised is a failure of one request, the panic of a library in Rust
included, which is a `BaseException`, too."""


def _type(status: int) -> str:
    names = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
    return names.get(status, "server_error" if status >= 500 else "invalid_request_error")


_STATUS: tuple[tuple[type[EdgeVLMError], int, str, str | None], ...] = (
    (ImageTooLargeError, 413, "image_too_large", "messages"),
    (VideoError, 400, "invalid_video", "messages"),
    (ImageError, 400, "invalid_image", "messages"),
    (ContextLengthError, 400, "context_length_exceeded", "messages"),
    (PromptError, 400, "invalid_prompt", "messages"),
    (ThinkingError, 400, "unsupported_parameter", "think"),
    (OptionError, 400, "invalid_value", None),
    (ModelError, 500, "model_error", None),
    (DeviceError, 500, "device_error", None),
)
"""The first line whose error it is decides."""


def to_api_error(error: BaseException) -> ApiError:
    """Return what a caller is told of `error`; of one that edgevlm did not raise on purpose, nothing but that."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientGoneError):
        return ApiError(499, "client_gone", "the client closed the connection")
    if isinstance(error, QueueFullError):
        message = "too many requests are waiting; try again in a few seconds"
        return ApiError(503, "queue_full", message, headers={"retry-after": "2"})
    if isinstance(error, StoppingError):
        return ApiError(503, "stopping", "the server is stopping", headers={"retry-after": "10"})
    for kind, status, code, param in _STATUS:
        if isinstance(error, kind):
            message = f"{param}: {error}" if kind is ThinkingError else str(error)  # that field is all that is wrong
            return ApiError(status, code, message, param=param)
    return ApiError(500, "internal_error", "the server failed on this request; its log says where")


@contextmanager
def blaming(param: str, what: str = "") -> Iterator[None]:
    """Let what is raised on purpose name the request's field that is wrong, or `what` in it."""
    try:
        yield
    except (ApiError, EdgeVLMError) as error:
        raise _blamed(to_api_error(error), param, what) from None


def _blamed(told: ApiError, param: str, what: str) -> ApiError:
    return ApiError(told.status, told.code, f"{what or param}: {told.message}", param=param)


@contextmanager
def placing(places: Mapping[str, str]) -> Iterator[None]:
    """Let what is raised on purpose name its place as the caller's request has it (see `ApiError.renamed`)."""
    try:
        yield
    except (ApiError, EdgeVLMError) as error:
        raise to_api_error(error).renamed(places) from None


def to_json(content: Any) -> bytes:
    """Return `content` as JSON in UTF-8."""
    return write_json(content, compact=True).encode()
