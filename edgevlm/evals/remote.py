"""A model behind OpenAI's API. Options need log-probabilities: `POST /v1/score`, or the first token's of a letter."""

from __future__ import annotations

import base64
import json
import logging
import math
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from io import BytesIO
from typing import Any

from PIL import Image

from edgevlm.errors import ModelError, OptionError, one_line
from edgevlm.evals.items import LETTERS
from edgevlm.evals.model import Schema, Scored
from edgevlm.families.base import RGB, Detail

logger = logging.getLogger(__name__)
_TOP = 20
_TIMEOUT_S = 600
_BUSY = (429, 503)
_TRIES, _LONGEST_WAIT_S = 10, 30
_CHOICE_TOKENS = 64


class RemoteModel:
    """A server's model; edgevlm's own is asked for exact scores, any other for a letter's log-probabilities."""

    is_general = True
    prompts: Mapping[str, str] = {}

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None, detail: Detail = "auto") -> None:
        if not url.startswith(("http://", "https://")):
            raise OptionError(f"--url takes an address such as http://localhost:8000/v1, not {url!r}")
        self._url, self._key, self._detail = url.rstrip("/"), api_key, detail
        self.name = model or self._first_model()
        self._scores = True

    def describe(self) -> dict[str, Any]:
        """Return the server's address, the model's name, and the detail of its pictures."""
        return {"model": self.name, "url": self._url, "detail": self._detail}

    def score(self, pictures: Sequence[RGB], question: str, options: Sequence[str]) -> Scored:
        """As `Model.score`. Raises `OptionError` where the server gives no log-probabilities."""
        if self._scores:
            body = {"model": self.name, "messages": self._messages(pictures, question), "choices": list(options)}
            try:
                found = self._post("/score", body | {"calibration_temperature": 1.0})
            except _StatusError as error:
                if error.code not in (404, 405):
                    raise
                self._scores = False
            else:
                with self._reading():
                    return Scored(found["probabilities"], float(found["total_probability"]))
        return self._by_first_token(pictures, question, options)

    def generate(
        self, pictures: Sequence[RGB], question: str, max_new_tokens: int, schema: Schema | None = None
    ) -> str:
        """As `Model.generate`."""
        body = {"model": self.name, "messages": self._messages(pictures, question), "max_tokens": max_new_tokens}
        if schema:
            form = {"name": "answer", "schema": schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        found = self._post("/chat/completions", body | {"temperature": 0})
        with self._reading():
            return str(found["choices"][0]["message"]["content"] or "")

    def choose(self, pictures: Sequence[RGB], question: str, options: Sequence[str]) -> str:
        """As `Model.choose`, as a text in JSON: an enum of a schema is how OpenAI's API tells choices."""
        answer = self.generate(pictures, question, _CHOICE_TOKENS, {"enum": list(options)})
        try:
            return str(json.loads(answer))
        except ValueError:
            return answer

    def _by_first_token(self, pictures: Sequence[RGB], question: str, options: Sequence[str]) -> Scored:
        if any(option not in LETTERS for option in options):
            raise OptionError(
                f"{self._url} has no /score, so that only options under letters can be scored; leave this suite out"
            )
        body = {"model": self.name, "messages": self._messages(pictures, question), "max_tokens": 1, "temperature": 0}
        found = self._post("/chat/completions", body | {"logprobs": True, "top_logprobs": _TOP})
        likely = dict.fromkeys(options, 0.0)
        with self._reading():
            content = (found["choices"][0].get("logprobs") or {}).get("content")
            if not content:
                raise OptionError(f"{self._url} gives no log-probabilities, which scored suites need")
            for each in content[0]["top_logprobs"]:
                if (letter := each["token"].strip()) in likely:
                    likely[letter] += math.exp(each["logprob"])
        mass = sum(likely.values())
        return Scored({letter: p / mass if mass else 1 / len(likely) for letter, p in likely.items()}, mass)

    def _messages(self, pictures: Sequence[RGB], question: str) -> list[dict[str, Any]]:
        urls = ({"url": _data_url(picture), "detail": self._detail} for picture in pictures)
        shown = [{"type": "image_url", "image_url": each} for each in urls]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]

    def _first_model(self) -> str:
        found = self._request("/models", None)
        with self._reading():
            if not found["data"]:
                raise ModelError(f"{self._url} serves no model")
            return str(found["data"][0]["id"])

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turn what reading a reply of another form raises into a `ModelError`."""
        try:
            yield
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            raise ModelError(f"{self._url} answers in another form than OpenAI's API") from None

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._request(path, json.dumps(body).encode())

    def _request(self, path: str, data: bytes | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url + path, data, headers)  # noqa: S310
        for tries in range(1, _TRIES + 1):
            try:
                with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:  # noqa: S310
                    return json.load(reply)
            except urllib.error.HTTPError as error:
                failed = _StatusError(self._url + path, error)
                if error.code not in _BUSY or tries == _TRIES:
                    raise failed from None
                wait = _wait_s(error.headers.get("Retry-After"), tries)
                logger.warning("%s; asked again in %d s (%d of %d)", failed, wait, tries, _TRIES - 1)
                time.sleep(wait)
            except (OSError, ValueError, HTTPException) as error:
                raise ModelError(f"{self._url} cannot be asked: {one_line(error)}") from None
        raise AssertionError  # the last try returns or raises


def _wait_s(retry_after: str | None, tries: int) -> int:
    """Return how long to wait for a busy server: what it says in seconds, or ever longer; half a minute at most."""
    try:
        asked = int(retry_after or "")
    except ValueError:  # none, or a date
        asked = 2**tries
    return min(max(asked, 0), _LONGEST_WAIT_S)


class _StatusError(ModelError):
    """The server refused a request."""

    def __init__(self, url: str, error: urllib.error.HTTPError) -> None:
        self.code = error.code
        try:
            told = json.load(error)["error"]["message"]
        except (OSError, ValueError, KeyError, TypeError):
            told = error.reason
        super().__init__(f"{url} answered {error.code}: {' '.join(str(told).split())}")


def _data_url(picture: RGB) -> str:
    with BytesIO() as png:
        Image.fromarray(picture).save(png, format="PNG")
        return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
