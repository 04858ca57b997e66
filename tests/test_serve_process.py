"""`edgevlm serve` as a process: how it starts, what systemd is told, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep

import pytest

from edgevlm.errors import ServerError
from edgevlm.manifest import LANGUAGE, load_manifest
from edgevlm.server.notify import notify, watchdog_interval_s
from edgevlm.server.unit import render_unit
from tests.helpers.command import COMMAND, POSIX, cli
from tests.helpers.damage import copy_export, flip
from tests.helpers.network import NETWORK_CLIENTS
from tests.helpers.serving import PATIENCE_S, QUESTION

MODULES_AFTER_SERVING = """
import json, sys
from edgevlm.cli.main import main

try:
    main(sys.argv[1:])
finally:
    print(json.dumps(sorted(name for name, module in sys.modules.items() if module is not None)))
"""


@contextmanager
def process(*arguments: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Start `edgevlm serve` on a free port."""
    command = [*COMMAND, "serve", *map(str, arguments), "--port", "0", "--device", "CPU", "--no-cache"]
    started = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, encoding="utf-8", env={**os.environ, **environment}
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


@POSIX
def test_systemd_is_told_when_it_is_ready_alive_and_stopping(exported: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(PATIENCE_S)
        with process(exported, NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="200000") as server:
            assert systemd.recv(100) == b"READY=1"
            for _ in range(3):
                assert systemd.recv(100) == b"WATCHDOG=1"
            line = next(line for line in server.stderr or () if "listening on" in line)
            with urllib.request.urlopen(f"{line.split()[-1]}/readyz", timeout=PATIENCE_S) as answer:  # noqa: S310
                assert answer.status == 200
            server.send_signal(signal.SIGTERM)
            while (told := systemd.recv(100)) != b"STOPPING=1":
                assert told == b"WATCHDOG=1"
            assert server.wait(PATIENCE_S) == 0


def test_a_process_serves_several_models(exported: Path, exported_smolvlm: Path) -> None:
    arguments = (exported, exported_smolvlm, "--model-name", "first", "--unload-after", "0.2")
    with process(*arguments) as server:
        url = next(line for line in server.stderr or () if "listening on" in line).split()[-1]
        next(line for line in server.stderr or () if "the model is ready" in line)
        question = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4}
        for name in (exported_smolvlm.name, "first"):
            body = json.dumps({**question, "model": name}).encode()
            asked = urllib.request.Request(f"{url}/v1/chat/completions", body, {"content-type": "application/json"})  # noqa: S310
            with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:  # noqa: S310
                assert json.load(answer)["model"] == name
        assert next(line for line in server.stderr or () if f"unloading {exported_smolvlm.name}" in line)


@POSIX
def test_a_server_that_has_answered_imported_no_network_client(exported: Path) -> None:
    command = [sys.executable, "-c", MODULES_AFTER_SERVING, "serve", str(exported), "--port", "0", "--device", "CPU"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, encoding="utf-8") as server:
        assert server.stderr is not None
        url = next(line for line in server.stderr if "listening on" in line).split()[-1]
        question = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4}
        headers = {"content-type": "application/json"}
        asked = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(question).encode(), headers)  # noqa: S310
        while True:
            try:
                with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:  # noqa: S310
                    assert json.load(answer)["usage"]["completion_tokens"] == 4
                    break
            except urllib.error.HTTPError as error:  # the model is being loaded
                assert error.code == 503
                sleep(0.1)
        server.send_signal(signal.SIGTERM)
        modules, _ = server.communicate(timeout=PATIENCE_S)
    loaded = {name.split(".")[0] for name in json.loads(modules)}
    assert {"fastapi", "tokenizers", "openvino"} <= loaded
    assert not loaded & (NETWORK_CLIENTS | {"openvino_telemetry"})


def test_nobody_is_told_where_no_systemd_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nonesuch"))
    notify("READY=1")
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    assert watchdog_interval_s() == 30
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert watchdog_interval_s() is None


def test_one_flipped_byte_is_refused(exported: Path, tmp_path: Path) -> None:
    folder = copy_export(exported, tmp_path / "tiny")
    weights = (folder / load_manifest(folder).submodels[LANGUAGE].file).with_suffix(".bin")
    flip(weights)
    result = cli("serve", folder, "--port", 0)
    assert result.exit_code == 1
    assert result.stderr == f"Error: {weights} is not what was exported (SHA-256 differs); export the model again\n"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--host", "0.0.0.0"], "listening on 0.0.0.0 lets other machines in: set an API key"),  # noqa: S104
        (["--api-key", "short"], "an API key must have at least 16 characters"),
        (["--api-key-file", "nonesuch"], "API key file nonesuch cannot be read"),
        (["--image-folder", "nonesuch"], "image folder nonesuch is no folder"),
        (["--max-queue", "0"], "max_queue must be above 0, not 0"),
        (["--allow-origin", "*"], "--allow-origin * lets any web page use the server: set an API key"),
        (["--allow-origin", "null"], "--allow-origin null lets any web page use the server: set an API key"),
        (["--time-limit", "nan"], "time_limit_s must be above 0, not nan"),
        (["--stop-timeout", "inf"], "stop_timeout_s must be finite"),
        (["--max-body-mb", "inf"], "--max-body-mb must be finite, not inf"),
        (["--port", "70000"], "port must be between 0 and 65535, not 70000"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(exported: Path, options: list[str], line: str) -> None:
    result = cli("serve", exported, *options)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {line}")
    assert result.stderr.count("\n") == 1


def test_without_the_extra_one_line_names_it(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgevlm.cli.serve.find_spec", lambda name: None if name == "uvicorn" else object())
    result = cli("serve", exported)
    assert result.exit_code == 1
    assert result.stderr == "Error: serving needs uvicorn; install it with: pip install 'edgevlm[serve]'\n"


def test_the_unit_is_printed_with_the_server_s_own_options(exported: Path, tmp_path: Path) -> None:
    result = cli("serve", exported, "--port", 9000, "--model-name", "50% of $it", "--log-content", "--print-unit")
    [line] = [line for line in result.stdout.splitlines() if line.startswith("ExecStart=")]
    program = Path(sys.executable).with_name("edgevlm")
    wanted = f'{program} serve {exported.resolve()} --port 9000 --model-name "50%% of $$it" --log-content'
    assert line == f"ExecStart={wanted}"
    secret = cli("serve", exported, "--api-key", "a-key-of-some-length", "--print-unit").stdout
    assert "a-key-of-some-length" not in secret
    with pytest.raises(ServerError, match="in a home folder, which the service cannot read"):
        render_unit([Path("/home/me/model")], [])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd on this machine")
def test_systemd_accepts_the_unit(exported: Path, tmp_path: Path) -> None:
    unit = tmp_path / "edgevlm.service"
    unit.write_text(render_unit([exported], []), encoding="utf-8")
    command = ["systemd-analyze", "verify", "--man=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", str(unit)]  # 2.0 of 10
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout
