"""What the server refuses, and what it survives: strangers, floods, clients that go away, slow and broken bodies."""

from __future__ import annotations

import json
import logging
import random
import re
import socket
import struct
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import openai
import pytest
from PIL import Image

from edgevlm import VLM, OptionError
from edgevlm.decoding.config import GenerationConfig
from edgevlm.errors import ServerError
from edgevlm.families.base import ImageBudget
from edgevlm.server.engine import FairQueue, Job
from edgevlm.server.errors import QueueFullError
from edgevlm.server.middleware import OPEN_PATHS
from edgevlm.server.models import Source
from edgevlm.server.run import Server
from edgevlm.server.settings import ServeConfig, read_keys
from tests.conftest import F32
from tests.helpers.serving import QUESTION, Braked, ask, ask_error, data_url, request, serving, shown, wait_until

KEY, OTHER_KEY = "a-key-of-some-length", "another-key-of-some-length"
RED = data_url(Image.new("RGB", (64, 48), (200, 30, 30)))


@pytest.fixture(scope="module", params=["tiny", "bundled"])
def vlm(request: pytest.FixtureRequest, exported: Path) -> VLM:
    """The tests' own model, and the one that ships."""
    return VLM(exported, F32) if request.param == "tiny" else VLM("panel")


@pytest.fixture(scope="module")
def server(vlm: VLM) -> Iterator[Server]:
    with serving(vlm, max_images=2, max_pixels=1_000_000, max_prompt_chars=5000, max_body_bytes=2**20) as server:
        yield server


@pytest.fixture
def braked(vlm: VLM) -> Iterator[Braked]:
    model = Braked(vlm)
    yield model
    model.release()


def raw(server: Server, text: bytes) -> socket.socket:
    """Open a connection and send bytes of one's own."""
    connection = socket.create_connection(server.socket.getsockname()[:2], timeout=30)
    connection.sendall(text)
    return connection


def read_until(connection: socket.socket, end: bytes) -> bytes:
    """Read what the server sends up to some text."""
    text = b""
    while end not in text and (more := connection.recv(65536)):
        text += more
    return text


def question(body: bytes, length: int | None = None) -> bytes:
    """Return a chat request's bytes, with a Content-Length that need not be true."""
    head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {length or len(body)}\r\n\r\n"
    return b"POST /v1/chat/completions HTTP/1.1\r\n" + head.encode() + body


def body(**fields: Any) -> bytes:
    """Return a chat request's JSON."""
    return json.dumps({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 200, **fields}).encode()


# Who may speak


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.7.7", "::"])  # noqa: S104
def test_other_machines_need_a_key_or_a_word(host: str) -> None:
    with pytest.raises(OptionError, match="set an API key"):
        ServeConfig(host=host)
    assert ServeConfig(host=host, api_keys=(KEY,)).api_keys
    assert ServeConfig(host=host, allow_anyone=True).allow_anyone


def test_keys_are_not_trifles(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="at least 16 characters"):
        ServeConfig(api_keys=("secret",))
    with pytest.raises(OptionError, match="printable ASCII"):
        ServeConfig(api_keys=("a key with several spaces",))
    (tmp_path / "keys").write_text(f"# of the kiosk\n{KEY}\n\n{OTHER_KEY}\n", encoding="utf-8")
    assert read_keys(tmp_path / "keys") == (KEY, OTHER_KEY)
    (tmp_path / "none").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(OptionError, match="holds no key"):
        read_keys(tmp_path / "none")
    with pytest.raises(OptionError, match="cannot be read: No such file"):
        read_keys(tmp_path / "nonesuch")


def test_a_key_opens_everything_but_the_page_and_the_probes(vlm: VLM) -> None:
    with serving(vlm, api_keys=(KEY, OTHER_KEY)) as server:
        for path in ("/", "/healthz", "/readyz"):
            assert request(server, "GET", path)[0] == 200
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nonesuch"):
            status, headers, _ = request(server, "GET", path)
            assert (status, headers["www-authenticate"]) == (401, "Bearer")
        for sent in (None, KEY, f"Basic {KEY}", f"Bearer {KEY}x", "Bearer", "Bearer \xff"):
            assert ask_error(server, {"Authorization": sent} if sent else None) == (401, "invalid_api_key")
        for sent in (f"Bearer {KEY}", f"bearer {OTHER_KEY}"):
            assert ask(server, {"Authorization": sent})[0] == 200


def routes(server: Server) -> list[tuple[str, str]]:
    """Return every method and path that the application knows."""
    app: Any = server._uvicorn.config.app
    return sorted((method, route.path) for route in app._app.routes for method in route.methods)


def test_without_the_key_every_path_but_the_open_ones_is_refused(vlm: VLM) -> None:
    with serving(vlm, api_keys=(KEY,)) as server:
        known = routes(server)
        paths = {path for _, path in known}
        assert {"/v1/chat/completions", "/v1/responses", "/v1/locate", "/v1/score"} <= paths
        assert {"/api/chat", "/api/generate"} <= paths
        assert {"/v1/models", "/api/tags", "/api/ps", "/api/show", "/api/version", "/metrics", *OPEN_PATHS} <= paths
        for method, path in known:
            body = {} if method == "POST" else None
            status, headers, _ = request(server, method, path, body)
            if path in OPEN_PATHS:
                assert status == 200
            else:
                assert (status, headers["www-authenticate"]) == (401, "Bearer"), (method, path)
            assert request(server, method, path, body, {"Authorization": f"Bearer {KEY}"})[0] in (200, 400, 404, 415)
        figures = request(server, "GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})[2].decode()
        labels = set(re.findall(r'edgevlm_requests_total\{path="([^"]+)"', figures))
        assert {"/api/chat", "/v1/responses"} <= labels <= {*paths, "other"}


@pytest.mark.parametrize("path", OPEN_PATHS)
def test_probes_may_ask_for_the_head_alone(server: Server, path: str) -> None:
    status, headers, body = request(server, "HEAD", path)
    told, beside, whole = request(server, "GET", path)
    assert (status, body) == (told, b"") == (200, b"")
    assert headers["content-length"] == beside["content-length"] == str(len(whole))


def test_keys_are_compared_in_constant_time(vlm: VLM) -> None:
    import hmac

    spy = mock.patch("edgevlm.server.middleware.hmac.compare_digest", wraps=hmac.compare_digest)
    with spy as compare, serving(vlm, api_keys=(KEY, OTHER_KEY)) as server:
        ask(server, {"Authorization": f"Bearer {KEY}"})
    assert compare.call_count == 2  # the second key too, though the first one fits
    assert all(len(each) == 32 for call in compare.call_args_list for each in call.args)


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "", "127.0.0.1.evil.example:80", "[", "a b"]
)
def test_dns_rebinding_is_refused(server: Server, host: str) -> None:
    assert ask_error(server, {"Host": host}) == (403, "host_not_allowed")
    assert request(server, "GET", "/", headers={"Host": host})[0] == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1:8000", "[::1]:8000", "192.168.1.5"])
def test_this_machine_s_names_are_taken(server: Server, host: str) -> None:
    assert request(server, "GET", "/healthz", headers={"Host": host})[0] == 200


def test_a_name_can_be_allowed(vlm: VLM) -> None:
    with serving(vlm, allowed_hosts=("Kiosk.example",)) as server:
        assert request(server, "GET", "/healthz", headers={"Host": "kiosk.example:8000"})[0] == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:3000", "http://127.0.0.1"])
def test_other_pages_may_not_use_the_server(server: Server, origin: str) -> None:
    assert ask_error(server, {"Origin": origin, "Host": "localhost:8000"}) == (403, "origin_not_allowed")


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_nor_may_they_load_from_it(server: Server, site: str) -> None:
    """A browser names no origin for what an <img> or <script> loads."""
    assert request(server, "GET", "/v1/models", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"})[0] == 403
    assert request(server, "GET", "/", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"})[0] == 200


def test_the_own_page_may(server: Server) -> None:
    own = {"Origin": "http://localhost:8000", "Host": "localhost:8000", "Sec-Fetch-Site": "same-origin"}
    assert ask(server, own)[0] == 200


def test_an_allowed_page_may(vlm: VLM) -> None:
    page = "https://kiosk.example"
    with serving(vlm, allowed_origins=(page,)) as server:
        status, headers = preflight(server, page, "authorization", "content-type")
        assert (status, headers["access-control-allow-origin"]) == (200, page)
        status, headers, _ = request(server, "GET", "/v1/models", headers={"Origin": page})
        assert (status, headers["access-control-allow-origin"]) == (200, page)
        assert ask_error(server, {"Origin": "https://evil.example"}) == (403, "origin_not_allowed")


def preflight(server: Server, origin: str, *names: str, **more: str) -> tuple[int, dict[str, str]]:
    """Ask, as a browser does, whether a page may send a request with these headers."""
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    asked |= {"Access-Control-Request-Headers": ",".join(sorted(name.lower() for name in names))}
    more = {name.replace("_", "-"): value for name, value in more.items()}
    return request(server, "OPTIONS", "/v1/chat/completions", headers=asked | more)[:2]


def headers_of_openai_s_client() -> set[str]:
    """Return the names that a browser asks about: those of its own client for browsers are the same, and a few more."""
    with openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key=KEY) as client:
        named = {name for name in client.default_headers if name.lower() not in {"accept", "user-agent"}}
    return named | {"Authorization", "x-stainless-timeout", "x-stainless-retry-count", "x-stainless-helper-method"}


def test_an_allowed_page_may_send_any_header(vlm: VLM) -> None:
    page, names = "https://kiosk.example", headers_of_openai_s_client()
    assert {"Content-Type", "X-Stainless-OS"} <= names
    with serving(vlm, allowed_origins=(page,)) as server:
        status, headers = preflight(server, page, *names)
        assert (status, headers["access-control-allow-origin"]) == (200, page)
        assert {name.lower() for name in names} == set(headers["access-control-allow-headers"].split(","))
        status, headers = preflight(server, page, Access_Control_Request_Private_Network="true")
        assert (status, headers["access-control-allow-private-network"]) == (200, "true")
        status, headers = preflight(server, "https://evil.example", *names)
        assert status == 400
        assert "access-control-allow-origin" not in headers
        sent = dict.fromkeys(names - {"Authorization", "Content-Type"}, "x") | {"Origin": page}
        assert ask(server, sent)[0] == 200


@pytest.mark.parametrize("origin", ["*", "null"])
def test_every_page_may_be_allowed_where_a_key_is_asked_for(vlm: VLM, origin: str) -> None:
    page = "https://any.example" if origin == "*" else "null"
    with pytest.raises(OptionError, match="lets any web page use the server: set an API key"):
        ServeConfig(allowed_origins=(origin,), allow_anyone=True)
    with serving(vlm, allowed_origins=(origin,), api_keys=(KEY,)) as server:
        assert preflight(server, page, "authorization", "x-stainless-os")[0] == 200
        assert ask_error(server, {"Origin": page}) == (401, "invalid_api_key")
        status, headers, _ = request(
            server, "POST", "/v1/chat/completions", body(max_tokens=1),
            {"Origin": page, "Sec-Fetch-Site": "cross-site", "Authorization": f"Bearer {KEY}"},
        )  # fmt: skip
        assert (status, headers["access-control-allow-origin"]) == (200, origin)
        assert request(server, "GET", "/v1/models", headers={"Sec-Fetch-Site": "cross-site"})[0] == 403


@pytest.mark.parametrize(
    ("origin", "written"),
    [
        ("https://Kiosk.example", "https://kiosk.example"),
        ("https://kiosk.example/", "https://kiosk.example"),
        ("https://kiosk.example:443", "https://kiosk.example"),
        ("http://kiosk.example:80/app", "http://kiosk.example"),
        ("kiosk.example", "https://shop.example"),
        ("https://*.example", "https://shop.example"),
        ("https://größe.example", "https://shop.example"),
        ("", "https://shop.example"),
    ],
)
def test_an_origin_that_no_browser_names_is_refused(origin: str, written: str) -> None:
    with pytest.raises(OptionError, match=f"is no origin as a browser writes it, such as {written}$"):
        ServeConfig(allowed_origins=(origin,), api_keys=(KEY,))
    for right in ("http://localhost:3000", "https://shop.example", "chrome-extension://abcdef", "http://[::1]:8080"):
        assert ServeConfig(allowed_origins=(right,))


def test_a_form_cannot_post(server: Server) -> None:
    status, _, answer = request(server, "POST", "/v1/chat/completions", body(), {"Content-Type": "text/plain"})
    assert (status, json.loads(answer)["error"]["code"]) == (415, "not_json")


# What may be sent


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"messages": []}, 400, "invalid_request"),
        ({"messages": "hello"}, 400, "invalid_request"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, 400, "invalid_request"),
        ({"messages": [{"role": "user"}]}, 400, "empty_message"),
        ({"messages": [{"role": "user", "content": []}]}, 400, "empty_message"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "invalid_prompt"),
        ({"messages": [{"role": "user", "content": "word " * 999}]}, 400, "context_length_exceeded"),
        ({"messages": [{"role": "user", "content": "word " * 1001}]}, 413, "prompt_too_long"),
        ({"messages": shown(RED, RED, RED)}, 413, "too_many_images"),
        ({"messages": shown("https://evil.example/a.png")}, 400, "remote_image_refused"),
        ({"messages": shown("HTTP://127.0.0.1/a.png")}, 400, "remote_image_refused"),
        ({"messages": shown("file:///etc/passwd")}, 400, "file_refused"),
        ({"messages": shown("/etc/passwd")}, 400, "file_refused"),
        ({"messages": shown("")}, 400, "file_refused"),
        ({"messages": shown("data:image/png;base64")}, 400, "invalid_image"),
        ({"messages": shown("data:image/png;base64,!!!!")}, 400, "invalid_image"),
        ({"messages": shown("data:image/png;base64,aGVsbG8=")}, 400, "invalid_image"),
        ({"messages": shown("data:,hello")}, 400, "invalid_image"),
        ({"messages": [*shown(RED, detail="low"), *shown(RED, detail="high")]}, 400, "mixed_detail"),
        ({"model": "gpt-9"}, 404, "model_not_found"),
        ({"max_tokens": 0}, 400, "invalid_request"),
        ({"max_tokens": "8"}, 400, "invalid_request"),
        ({"temperature": -1}, 400, "invalid_request"),
        ({"top_p": 0}, 400, "invalid_request"),
        ({"n": 2}, 400, "invalid_request"),
        ({"stop": [""]}, 400, "invalid_value"),
        ({"top_logprobs": 2}, 400, "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "invalid_request"),
        ({"response_format": {"type": "poem"}}, 400, "invalid_request"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, 400, "invalid_value"),
        ({"tool_choice": "required"}, 400, "no_tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, 400, "invalid_request"),
        ({"tools": [{"type": "function", "function": {"name": "a"}}] * 2}, 400, "invalid_tools"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "a"}}],
                "tool_choice": {"type": "function", "function": {"name": "b"}},
            },
            400,
            "unknown_tool",
        ),
    ],
    ids=lambda value: None if isinstance(value, int) else str(value)[:40],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_has_its_own_answer(
    server: Server, fields: dict[str, Any], status: int, code: str, stream: bool
) -> None:
    assert ask_error(server, stream=stream, **fields) == (status, code)
    assert not server.worker.running


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"messages": [',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"n": NaN}',
        b"1" * 9999,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_malformed_json(server: Server, text: bytes) -> None:
    status, headers, answer = request(server, "POST", "/v1/chat/completions", text)
    assert (status, headers["content-type"]) == (400, "application/json")
    assert json.loads(answer)["error"]["code"] == "invalid_request"


def test_a_body_beyond_the_bound_is_refused_whether_it_says_so_or_not(server: Server) -> None:
    assert ask_error(server, messages=shown("data:," + "x" * 2**20)) == (413, "body_too_large")
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with raw(server, head + b"Content-Length: 99999999999\r\n\r\n") as connection:  # before a byte of it was sent
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")
    with raw(server, head + b"Transfer-Encoding: chunked\r\n\r\n") as connection:
        chunk = b"%x\r\n%s\r\n" % (2**16, b" " * 2**16)
        for _ in range(17):
            connection.sendall(chunk)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few kilobytes that claims many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 10_000_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(1001, 1000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_header(server: Server, size: tuple[int, int]) -> None:
    assert ask_error(server, messages=shown(data_url(bomb(*size)))) == (413, "image_too_large")


def test_files_are_read_only_below_the_named_folder(vlm: VLM, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "sub dir").mkdir(parents=True)
    Image.new("RGB", (50, 40), (9, 99, 9)).save(folder / "sub dir" / "a.png")
    Image.new("RGB", (50, 40), (9, 99, 9)).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    inside = ["sub dir/a.png", str(folder / "sub dir" / "a.png"), (folder / "sub dir" / "a.png").as_uri()]
    outside = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "nonesuch.png", ".", "a\0b", "x" * 5000]
    outside += [(tmp_path / "secret.png").as_uri(), "file://otherhost/etc/passwd", "sub dir/../../secret.png"]
    with serving(vlm, image_folder=folder) as server:
        for url in inside:
            assert ask(server, messages=shown(url))[0] == 200
        for url in outside:
            assert ask_error(server, messages=shown(url)) == (400, "file_refused")
        assert ask_error(server, messages=shown("http://localhost/a.png")) == (400, "remote_image_refused")


def test_a_few_hundred_mutated_pictures(server: Server) -> None:
    """None of them may cost more than an answer or a refusal."""
    randomly = random.Random(3)
    picture = Image.effect_noise((60, 45), 80).convert("RGB")
    encoded = []
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO"):
        picture.save(buffer := BytesIO(), kind)
        encoded.append(buffer.getvalue())
    found = Counter()
    for number in range(320):
        data = bytearray(encoded[number % len(encoded)])
        for _ in range(randomly.randint(1, 12)):
            data[randomly.randrange(len(data) if number % 3 else 64)] = randomly.randrange(256)
        if number % 5 == 0:
            del data[randomly.randrange(len(data)) :]
        status, answer = ask(server, messages=shown(data_url(bytes(data))), max_tokens=1)
        assert status in (200, 400, 413), answer
        found[status] += 1
    assert min(found[200], found[400]) > 20
    assert ask(server)[0] == 200


# How much at once, and for how long


def test_a_client_that_goes_away_ends_its_answer_before_the_next_token(braked: Braked) -> None:
    for stream in (True, False):
        with serving(braked) as server:
            connection = raw(server, question(body(stream=stream)))
            wait_until(lambda: braked.holding)
            [job] = server.worker.current
            connection.close()
            wait_until(job.abandoned.is_set)
            braked.release()
            wait_until(lambda: not server.worker.running)
            assert braked.tokens[-1] == braked.stop_at
            assert ask(server)[0] == 200
        braked._go.clear()


def test_a_client_that_goes_away_leaves_the_queue(braked: Braked) -> None:
    with serving(braked, max_queue=1) as server, ThreadPoolExecutor() as pool:
        first = pool.submit(ask, server)
        wait_until(lambda: braked.holding)
        connection = raw(server, question(body()))
        wait_until(lambda: server.worker.waiting == 1)
        assert ask_error(server) == (503, "queue_full")
        connection.close()
        wait_until(lambda: server.worker.waiting == 0)
        third = pool.submit(ask, server)
        braked.release()
        assert first.result()[0] == third.result()[0] == 200
        assert len(braked.tokens) == 2


def test_two_hundred_requests_at_once_against_a_queue_of_sixteen(braked: Braked) -> None:
    with serving(braked, max_queue=16) as server, ThreadPoolExecutor(200) as pool:
        asked = [pool.submit(request, server, "POST", "/v1/chat/completions", body(max_tokens=4)) for _ in range(200)]
        wait_until(lambda: sum(each.done() for each in asked) == 200 - 17)
        assert (server.worker.waiting, server.worker.running) == (16, 1)
        assert request(server, "GET", "/healthz")[0] == 200
        braked.release()
        answers = [each.result() for each in asked]
        assert Counter(status for status, _, _ in answers) == {200: 17, 503: 183}
        for status, headers, answer in answers:
            if status == 503:
                assert headers["retry-after"] == "2"
                assert json.loads(answer)["error"]["code"] == "queue_full"
        assert ask(server)[0] == 200


def test_callers_take_turns() -> None:
    def job(caller: str) -> Job:
        return Job([], [], GenerationConfig(), ImageBudget(), caller, print)

    queue = FairQueue(5)
    greedy, modest = [job("greedy") for _ in range(4)], [job("modest") for _ in range(2)]
    for each in (*greedy, *modest):
        queue.put(each)
    with pytest.raises(QueueFullError):
        queue.put(job("late"))
    order = [queue.take() for _ in range(6)]
    assert order == [greedy[0], modest[0], greedy[1], modest[1], greedy[2], greedy[3]]


def test_a_caller_with_another_key_is_not_kept_waiting_by_the_first_one_s_many(braked: Braked) -> None:
    with serving(braked, api_keys=(KEY, OTHER_KEY)) as server, ThreadPoolExecutor() as pool:

        def run(key: str) -> None:
            assert ask(server, {"Authorization": f"Bearer {key}"})[0] == 200

        many = [pool.submit(run, KEY) for _ in range(4)]
        wait_until(lambda: server.worker.waiting == 3)
        one = pool.submit(run, OTHER_KEY)
        wait_until(lambda: server.worker.waiting == 4)
        braked.release()
        for each in (*many, one):
            each.result()
        first, *_ = braked.callers
        other = next(caller for caller in braked.callers if caller != first)
        assert len(braked.callers) == 5
        assert braked.callers.index(other) <= 2


def test_nothing_computed_for_one_key_is_seen_with_another(exported: Path) -> None:
    picture = shown(data_url(Image.effect_noise((70, 60), 90).convert("RGB")), text="A question of its own?")
    with serving(VLM(exported, F32), api_keys=(KEY, OTHER_KEY)) as server:

        def cached(key: str) -> tuple[int, int]:
            status, answer = ask(server, {"Authorization": f"Bearer {key}"}, messages=picture)
            assert status == 200
            return answer["usage"]["prompt_tokens_details"]["cached_tokens"], answer["timings"]["cached_views"]

        assert cached(KEY) == (0, 0)
        assert min(cached(KEY)) > 0
        assert cached(OTHER_KEY) == (0, 0)


def test_an_answer_that_takes_too_long(braked: Braked) -> None:
    with serving(braked, time_limit_s=0.3) as server:
        assert ask_error(server) == (504, "time_limit")
        with raw(server, question(body(stream=True, max_tokens=9))) as connection:  # it waits, and gets no piece
            assert connection.recv(65536).startswith(b"HTTP/1.1 504")
        braked.release()
        wait_until(lambda: not server.worker.running)
        assert braked.tokens[0] == braked.stop_at
        assert ask(server)[0] == 200


def test_a_stream_that_takes_too_long_ends_with_an_error(vlm: VLM) -> None:
    model = Braked(vlm)
    model.stop_at = 4
    with serving(model, time_limit_s=0.5) as server, raw(server, question(body(stream=True))) as connection:
        text = read_until(connection, b"time_limit")
        assert text.startswith(b"HTTP/1.1 200")
        assert b'"content"' in text
        assert b"[DONE]" not in text
        model.release()


@pytest.mark.parametrize("sent", [b"", b'{"messages": ['], ids=["no byte", "some bytes"])
def test_a_slow_body_is_cut(vlm: VLM, sent: bytes) -> None:
    with serving(vlm, body_timeout_s=0.3) as server, raw(server, question(sent, length=100)) as connection:
        assert ask(server)[0] == 200  # others are served meanwhile
        answer = read_until(connection, b"}}")
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"body_too_slow" in answer


def test_many_slow_bodies_do_not_keep_others_out(vlm: VLM) -> None:
    """They take all the places for bodies, but only until their time is up."""
    with serving(vlm, body_timeout_s=1.5) as server:
        slow = [raw(server, question(b"{", length=100)) for _ in range(40)]
        trickle = threading.Thread(target=drip, args=(slow,))
        trickle.start()
        assert request(server, "GET", "/healthz")[0] == 200
        while ask(server)[0] != 200:
            time.sleep(0.1)
        trickle.join()
        for connection in slow:
            connection.close()


def drip(connections: list[socket.socket]) -> None:
    """Send a byte now and then on each connection."""
    for _ in range(20):
        for connection in connections:
            try:
                connection.sendall(b" ")
            except OSError:
                return
        time.sleep(0.1)


def test_a_header_that_never_ends_is_cut(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgevlm.server.run._HEADER_TIMEOUT_S", 0.2)
    with serving(vlm) as server:
        silent, slow = raw(server, b""), raw(server, b"GET /healthz HTTP/1.1\r\n")
        again = raw(server, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_until(again, b"}").startswith(b"HTTP/1.1 200")
        again.sendall(b"GET /healthz HTTP/1.1\r\nX-Slow: ")
        for connection in (silent, slow, again):
            with connection:
                connection.settimeout(10)
                assert closed(connection)


def closed(connection: socket.socket) -> bool:
    """Wait for the server to cut the connection."""
    try:
        return connection.recv(65536) == b""
    except ConnectionResetError:
        return True


def test_no_piece_of_an_answer_waits_for_the_acknowledgement_of_the_one_before(server: Server) -> None:
    with raw(server, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        read_until(connection, b"}")
        [served] = server._uvicorn.server_state.connections
        sock = served.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_long_answer_is_not_taken_for_a_slow_header(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgevlm.server.run._HEADER_TIMEOUT_S", 0.1)
    model = Braked(vlm)
    with serving(model) as server, ThreadPoolExecutor() as pool:
        answer = pool.submit(ask, server)
        wait_until(lambda: model.holding)
        time.sleep(0.5)
        model.release()
        assert answer.result()[0] == 200


# How it fails, and how it ends


def test_a_stop_lets_the_running_answer_end_and_sends_the_others_away(braked: Braked) -> None:
    with serving(braked) as server, ThreadPoolExecutor() as pool:
        running = pool.submit(ask, server)
        wait_until(lambda: braked.holding)
        waiting = pool.submit(ask, server)
        wait_until(lambda: server.worker.waiting == 1)
        server.stop()
        status, answer = waiting.result()
        assert (status, answer["error"]["code"]) == (503, "stopping")
        braked.release()
        assert running.result()[0] == 200


def test_a_stop_waits_only_so_long(braked: Braked) -> None:
    with serving(braked, stop_timeout_s=0.3) as server, ThreadPoolExecutor() as pool:
        running = pool.submit(ask, server)
        wait_until(lambda: braked.holding)
        server.stop()
        status, answer = running.result()
        assert (status, answer["error"]["code"]) == (503, "stopping")
        braked.release()


def test_a_model_that_fails_in_one_answer_gives_the_next(vlm: VLM, caplog: pytest.LogCaptureFixture) -> None:
    told = "what the caller sent"

    class Failing(Braked):
        def steps(self, messages: Any, *rest: Any) -> Any:
            if messages[0]["content"][0]["text"] == "fail":
                raise ZeroDivisionError(told)
            return self._vlm.steps(messages, *rest)

    with serving(Failing(vlm)) as server, caplog.at_level(logging.INFO):
        for stream in (False, True):
            messages = [{"role": "user", "content": "fail"}]
            assert ask_error(server, messages=messages, stream=stream) == (500, "internal_error")
        assert ask(server)[0] == 200
    assert "ZeroDivisionError" in caplog.text
    assert caplog.text.count("unexpected") == 2
    assert "test_serve_safety.py" in caplog.text
    assert told not in caplog.text


@pytest.mark.parametrize("log_content", [False, True])
def test_logs_hold_no_content_unless_asked(vlm: VLM, caplog: pytest.LogCaptureFixture, log_content: bool) -> None:
    with caplog.at_level(logging.DEBUG), serving(vlm, log_content=log_content) as server:
        _, answer = ask(server, messages=shown(RED, text="Where is the secret?"))
        ask(server, messages=[{"role": "user", "content": "secret <image>"}])
        ask(server, messages=shown("/secret.png"))
    assert ("secret" in caplog.text) == log_content
    assert (repr(answer["choices"][0]["message"]["content"]) in caplog.text) == log_content
    assert RED[:60] not in caplog.text


def test_a_taken_port_is_told(server: Server, vlm: VLM) -> None:
    port = server.socket.getsockname()[1]
    with pytest.raises(ServerError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
        Server([Source("tiny", lambda: vlm)], ServeConfig(port=port))


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def load() -> VLM:
        raise OptionError("no such thing")

    with pytest.raises(OptionError, match="no such thing"):
        Server([Source("tiny", load)], ServeConfig(port=0)).run()


def test_before_the_model_is_there_only_health_answers(vlm: VLM) -> None:
    go = threading.Event()

    def load() -> VLM:
        assert go.wait(30)
        return vlm

    server = Server([Source("tiny", load)], ServeConfig(port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: request(server, "GET", "/healthz")[0] == 200)
    assert request(server, "GET", "/readyz")[0] == 503
    assert ask_error(server) == (503, "model_loading")
    go.set()
    wait_until(lambda: request(server, "GET", "/readyz")[0] == 200)
    server.stop()
    thread.join(30)


def test_the_wall_clock_may_jump(braked: Braked) -> None:
    """Waiting, bounds and histograms go by the monotonic clock."""
    with serving(braked, time_limit_s=20) as server, ThreadPoolExecutor() as pool:
        answer = pool.submit(ask, server)
        wait_until(lambda: braked.holding)
        for jump in (-(10**8), 10**8):
            with mock.patch("time.time", lambda jump=jump: 1.7e9 + jump):
                time.sleep(0.3)
                assert request(server, "GET", "/healthz")[0] == 200
        braked.release()
        assert answer.result()[0] == 200
        assert answer.result()[1]["timings"]["total_s"] < 20
