"""What fails in one answer is that answer's end; a server that can answer no more is no server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NoReturn

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from edgevlm import VLM
from edgevlm.answer import Piece
from tests.helpers.serving import PATIENCE_S, QUESTION, Braked, ask, ask_error, raw, request, serving

FAIL = [{"role": "user", "content": "fail"}]
FAIL_LATER = [{"role": "user", "content": "fail after a piece"}]


def panic() -> NoReturn:
    """Let a library in Rust panic: its tokens are cut at a stride that is too long."""
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).encode(["a", "a"], is_pretokenized=True).truncate(1, stride=1)
    raise AssertionError("it did not panic")


def system_exit() -> NoReturn:
    raise SystemExit(3)


def out_of_memory() -> NoReturn:
    raise MemoryError


class Failing(Braked):
    """A model that fails where it is asked to, in the thread that answers."""

    def __init__(self, vlm: VLM, fail: Any) -> None:
        super().__init__(vlm)
        self._fail = fail

    def steps(self, messages: Any, *rest: Any) -> Any:
        text = messages[0]["content"][0]["text"]
        if text == "fail":
            self._fail()
        for event in self._vlm.steps(messages, *rest):
            yield event
            if isinstance(event, Piece) and text.startswith("fail"):
                self._fail()


def test_a_panic_is_no_exception() -> None:
    with pytest.raises(BaseException, match="stride") as raised:
        panic()
    assert not isinstance(raised.value, Exception)


@pytest.mark.parametrize("fail", [panic, system_exit, out_of_memory])
def test_whatever_an_answer_raises_ends_that_answer_alone(vlm: VLM, fail: Any) -> None:
    with serving(Failing(vlm, fail)) as server:
        for messages in (FAIL, FAIL_LATER):
            assert ask_error(server, messages=messages) == (500, "internal_error")
        assert ask_error(server, messages=FAIL, stream=True) == (500, "internal_error")
        with raw(server, {"messages": FAIL_LATER, "stream": True}) as stream, stream.makefile("rb") as answer:
            text = answer.read()
        assert text.startswith(b"HTTP/1.1 200")
        assert b"internal_error" in text
        assert b"[DONE]" not in text
        assert request(server, "GET", "/readyz")[0] == 200
        assert ask(server)[0] == 200


@pytest.mark.parametrize("place", ["make_plan", "to_api_error"])
def test_whatever_a_request_raises_outside_the_model_ends_that_request_alone(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    with serving(vlm) as server:
        with monkeypatch.context() as broken:
            broken.setattr(f"edgevlm.server.app.{place}", lambda *_: panic())
            assert ask_error(server, messages=[])[0] in (400, 500)
            assert ask_error(server, messages=[{"role": "user", "content": []}]) == (500, "internal_error")
        assert ask(server)[0] == 200


def test_a_figure_that_cannot_be_counted_costs_no_answer(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(vlm) as server:
        monkeypatch.setattr(server.metrics, "count_answer", lambda *_: out_of_memory())
        assert ask(server)[0] == ask(server)[0] == 200


KILL = """
import ctypes, sys, threading, time
from pathlib import Path

def kill():
    while not Path(sys.argv[1]).exists():
        time.sleep(0.05)
    [worker] = [each for each in threading.enumerate() if each.name == "edgevlm-worker"]
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident), ctypes.py_object(SystemExit))
    Path(sys.argv[1]).with_name("killed").touch()

threading.Thread(target=kill, daemon=True).start()
from edgevlm.cli.main import main
main(sys.argv[2:])
"""
"""A server whose thread that answers is ended from outside, as soon as it does anything."""


def test_a_server_whose_thread_dies_is_not_ready_and_ends(exported: Path, tmp_path: Path) -> None:
    flag = tmp_path / "kill"
    command = [sys.executable, "-c", KILL, str(flag), "serve", str(exported)]
    command += ["--port", "0", "--device", "CPU", "--no-cache"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=dict(os.environ))
    try:
        assert process.stderr
        lines = [process.stderr.readline()]
        while "the model is ready" not in lines[-1]:
            assert lines[-1], lines
            lines.append(process.stderr.readline())
        url = next(line.split()[-1] for line in lines if "listening on" in line)
        assert status_of(f"{url}/readyz") == 200
        flag.touch()
        while not flag.with_name("killed").exists():
            time.sleep(0.05)
        body = json.dumps({"messages": [{"role": "user", "content": QUESTION}]}).encode()
        assert status_of(f"{url}/v1/chat/completions", body) in (500, 503)
        assert status_of(f"{url}/readyz") in (503, None)
        assert process.wait(PATIENCE_S) == 1
        told = process.stderr.read().splitlines()
        assert [line for line in told if line.startswith("Error")] == [told[-1]]
        assert told[-1].startswith("Error: the model's thread died of SystemExit (")
        assert "Traceback" not in "".join(told)
    finally:
        process.kill()
        process.communicate()


def status_of(url: str, body: bytes | None = None) -> int | None:
    """Return the status of a request, None where nobody listens any more."""
    asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    except OSError:
        return None
