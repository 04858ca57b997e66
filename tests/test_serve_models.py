"""Several models in one server: loaded at their first use, unloaded when idle or to make room, and told truthfully."""

from __future__ import annotations

import json
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edgevlm import VLM, GenerationConfig
from edgevlm.errors import OptionError
from edgevlm.manifest import LANGUAGE, load_manifest
from edgevlm.server.models import ServedModel, Source
from edgevlm.server.run import Server, make_source
from edgevlm.strict_json import read_json
from tests.conftest import F32
from tests.helpers.command import cli
from tests.helpers.damage import copy_export, flip
from tests.helpers.serving import QUESTION, Braked, ask, raw, request, serving, wait_until
from tests.test_serve import metrics
from tests.test_serve_failures import panic

USER = [{"role": "user", "content": QUESTION}]


class Loads:
    """A model to be served from a folder, which counts its loads, keeps nothing alive, and can be held back."""

    def __init__(self, name: str, folder: Path) -> None:
        self.source = Source(name, self._load, load_manifest(folder))
        self.count = 0
        self.loaded: Callable[[], VLM | None] = lambda: None
        """The model that was loaded last, while anything holds it."""
        self._folder = folder
        self._go = threading.Event()
        self._go.set()

    def _load(self) -> VLM:
        assert self._go.wait(30)
        self.count += 1
        vlm = VLM(self._folder, F32)
        self.loaded = weakref.ref(vlm)
        return vlm

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Let no load get on within the block."""
        self._go.clear()
        try:
            yield
        finally:
            self._go.set()


@pytest.fixture
def other(exported_smolvlm: Path) -> Loads:
    return Loads("other", exported_smolvlm)


@pytest.fixture
def third(exported: Path) -> Loads:
    return Loads("third", exported)


@pytest.fixture(scope="module")
def expected(vlm: VLM, exported_smolvlm: Path) -> dict[str, str]:
    """What each model answers."""
    config = GenerationConfig(max_new_tokens=8)
    answers = {
        "tiny": vlm.generate(None, QUESTION, config).text,
        "other": VLM(exported_smolvlm, F32).generate(None, QUESTION, config).text,
    }
    assert answers["tiny"] != answers["other"]
    return {**answers, "third": answers["tiny"]}


def answered(server: Server, **fields: Any) -> str:
    """Ask a model, and return its answer's text."""
    status, answer = ask(server, **fields)
    assert status == 200, answer
    assert answer["model"] == fields.get("model", "tiny")
    return str(answer["choices"][0]["message"]["content"])


def get(server: Server, path: str) -> Any:
    status, _, body = request(server, "GET", path)
    assert status == 200, body
    return read_json(body)


def post(server: Server, path: str, **body: Any) -> tuple[int, Any]:
    status, _, answer = request(server, "POST", path, body)
    return status, read_json(answer)


def states(server: Server) -> dict[str, str]:
    """Return what each model is said to be, which every list of them agrees on."""
    found = {card["id"]: card["status"]["value"] for card in get(server, "/v1/models")["data"]}
    told = metrics(server)
    assert {f"edgevlm_model_loaded,model={name}" for name in found} <= told.keys()
    return found


def model(server: Server, name: str) -> ServedModel:
    return next(model for model in server.models if model.name == name)


def submit(pool: ThreadPoolExecutor, server: Server, name: str) -> Future[tuple[int, Any]]:
    """Ask a model in a thread, and wait until the request waits for it to be loaded."""
    waiting = model(server, name).waiting
    asked = pool.submit(ask, server, model=name)
    wait_until(lambda: model(server, name).waiting > waiting)
    return asked


# Which model answers


def test_another_model_is_loaded_at_its_first_use(vlm: VLM, other: Loads, expected: dict[str, str]) -> None:
    with serving(vlm, other.source) as server:
        assert states(server) == {"tiny": "loaded", "other": "unloaded"}
        assert [each["model"] for each in get(server, "/api/ps")["models"]] == ["tiny:latest"]
        assert (answered(server), answered(server, model="tiny")) == (expected["tiny"],) * 2
        assert other.count == 0
        assert answered(server, model="other") == expected["other"]
        assert answered(server, model="other") == expected["other"]
        assert other.count == 1
        assert states(server) == {"tiny": "loaded", "other": "loaded"}
        first, second = get(server, "/api/ps")["models"]
        assert (first["model"], "expires_at" in first) == ("tiny:latest", False)
        assert second["model"] == "other:latest"
        assert second["expires_at"] > "2026"
        assert answered(server) == expected["tiny"]


def test_every_list_knows_a_model_before_it_is_loaded(vlm: VLM, other: Loads, exported_smolvlm: Path) -> None:
    manifest = load_manifest(exported_smolvlm)
    with serving(vlm, other.source) as server:
        _, entry = get(server, "/api/tags")["models"]
        assert (entry["name"], entry["size"], entry["digest"]) == (
            "other:latest", manifest.size_bytes, manifest.fingerprint,
        )  # fmt: skip
        assert entry["details"]["family"] == "smolvlm"
        card = get(server, "/v1/models/other")
        assert card["capabilities"] == {"locate": False, "video": False}
        assert post(server, "/api/show", model="other")[1]["model_info"]["smolvlm.context_length"] == 512
        assert metrics(server)["edgevlm_model_loaded,model=other"] == 0
        assert other.count == 0
        answered(server, model="other")
        assert get(server, "/api/tags")["models"][1] == entry
        told = card["capabilities"] | {"thinking": False}  # its tokenizer says so
        assert get(server, "/v1/models/other") == {**card, "capabilities": told, "status": {"value": "loaded"}}
        assert metrics(server)["edgevlm_model_loaded,model=other"] == 1


def test_every_api_chooses_by_the_name(vlm: VLM, other: Loads, expected: dict[str, str]) -> None:
    with serving(vlm, other.source) as server:
        _, response = post(server, "/v1/responses", input=QUESTION, model="other", max_output_tokens=8)
        assert response["model"] == "other"
        assert response["output"][0]["content"][0]["text"] == expected["other"]
        short = {"options": {"num_predict": 8}, "stream": False}
        for name, wanted in (("other", "other"), ("other:latest", "other"), ("tiny", "tiny"), (None, "tiny")):
            _, generated = post(server, "/api/generate", prompt=QUESTION, model=name, **short)
            _, chatted = post(server, "/api/chat", messages=USER, model=name, **short)
            assert generated["response"] == chatted["message"]["content"] == expected[wanted]
        image = {"type": "image_url", "image_url": {"url": "data:,"}}
        _, located = post(server, "/v1/locate", image=image, phrase="a valve", model="other")
        assert located["error"]["param"] == "model"  # this family writes no places
        figures = metrics(server)
        assert figures["edgevlm_answers_total,end=length,model=other"] == 5
        assert figures["edgevlm_answers_total,end=length,model=tiny"] == 4


def test_an_unknown_name_is_a_404_that_names_them_all(vlm: VLM, other: Loads) -> None:
    message = "this server's models are called tiny, other"
    with serving(vlm, other.source) as server:
        for path, body in (
            ("/v1/chat/completions", {"messages": USER}),
            ("/v1/responses", {"input": QUESTION}),
            ("/v1/locate", {"image": {"type": "image_url", "image_url": {"url": "data:,"}}, "phrase": "a valve"}),
        ):
            status, answer = post(server, path, model="nonesuch", **body)
            assert (status, answer["error"]["code"], answer["error"]["param"]) == (404, "model_not_found", "model")
            assert answer["error"]["message"] == message
        for path in ("/api/chat", "/api/generate", "/api/show"):
            assert post(server, path, model="nonesuch") == (404, {"error": message})
        assert request(server, "GET", "/v1/models/nonesuch")[0] == 404
        assert other.count == 0


def test_both_answer_at_once(vlm: VLM, other: Loads, expected: dict[str, str]) -> None:
    names = ["tiny", "other"] * 6
    with serving(vlm, other.source) as server, ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda name: answered(server, model=name), names))
        assert found == [expected[name] for name in names]
        assert other.count == 1


# What goes when it is idle


def test_an_idle_model_is_unloaded_and_its_memory_let_go(vlm: VLM, other: Loads, expected: dict[str, str]) -> None:
    with serving(vlm, other.source, unload_after_s=0.2) as server:
        for loads in (1, 2):
            assert answered(server, model="other") == expected["other"]
            assert other.count == loads
            wait_until(lambda: states(server) == {"tiny": "loaded", "other": "unloaded"})
            wait_until(lambda: other.loaded() is None)
        assert [each["model"] for each in get(server, "/api/ps")["models"]] == ["tiny:latest"]
        assert not [thread for thread in threading.enumerate() if thread.name == "edgevlm-worker"][1:]
        assert answered(server) == expected["tiny"]


def test_a_model_that_answers_is_not_idle(vlm: VLM, exported_smolvlm: Path) -> None:
    slow = Braked(VLM(exported_smolvlm, F32))
    source = Source("other", lambda: slow, load_manifest(exported_smolvlm))  # type: ignore[arg-type, return-value]
    quick = Loads("third", exported_smolvlm)
    with serving(vlm, source, quick.source, unload_after_s=0.1) as server, ThreadPoolExecutor() as pool:
        held = pool.submit(ask, server, model="other")
        wait_until(lambda: slow.holding)
        answered(server, model="third")
        wait_until(lambda: states(server)["third"] == "unloaded")  # its time passes, and passes again
        assert states(server)["other"] == "loaded"
        slow.release()
        assert held.result()[0] == 200
        wait_until(lambda: states(server)["other"] == "unloaded")


def test_keep_alive_says_how_long_a_model_stays(vlm: VLM, other: Loads) -> None:
    def generate(name: str, **fields: Any) -> Any:
        short = {"stream": False, "options": {"num_predict": 1}}
        status, answer = post(server, "/api/generate", model=name, **short, **fields)
        assert status == 200, answer
        return answer

    def expires_at(name: str) -> str | None:
        loaded = {entry["model"]: entry for entry in get(server, "/api/ps")["models"]}
        return loaded[f"{name}:latest"].get("expires_at")

    with serving(vlm, other.source) as server:
        assert generate("other", keep_alive="5m")["done_reason"] == "load"
        usual = expires_at("other")
        assert generate("other", prompt=QUESTION, keep_alive="2h45m")["done_reason"] == "length"
        assert usual is not None
        assert (expires_at("other") or "") > usual
        generate("other", prompt=QUESTION, keep_alive=-1)
        assert expires_at("other") is None
        answered(server, model="other")  # who does not say means the server's own time
        assert usual < (expires_at("other") or "") < "9"
        generate("other", prompt=QUESTION, keep_alive=0)
        wait_until(lambda: states(server)["other"] == "unloaded")
        assert generate("other", keep_alive="0")["done_reason"] == "unload"
        assert other.count == 1  # not loaded to be unloaded
        generate("other")
        assert generate("other", keep_alive=0)["done_reason"] == "unload"
        wait_until(lambda: states(server)["other"] == "unloaded")
        assert generate("tiny", keep_alive=0)["done_reason"] == "load"  # the first stays
        assert generate("tiny", keep_alive="1ms", prompt=QUESTION)["response"]
        assert expires_at("tiny") is None


@pytest.mark.parametrize("value", ["soon", "", "5", "5 m", "-", "1h-2m", True, [], "1" * 100_000])
def test_a_keep_alive_that_is_no_time_is_refused(vlm: VLM, value: object) -> None:
    with serving(vlm) as server:
        status, answer = post(server, "/api/generate", prompt=QUESTION, keep_alive=value)
        message = 'keep_alive: must be a number of seconds, or a duration such as "5m"'
        assert (status, answer["error"]) == (400, message)


# What goes to make room


def test_the_least_recently_used_model_makes_room(
    vlm: VLM, other: Loads, third: Loads, expected: dict[str, str]
) -> None:
    with serving(vlm, other.source, third.source, max_loaded_models=2) as server:
        for name, gone in (("other", "third"), ("tiny", "third"), ("third", "other"), ("other", "tiny")):
            assert answered(server, model=name) == expected[name]
            assert [each for each, state in states(server).items() if state == "unloaded"] == [gone]
        assert request(server, "GET", "/readyz")[0] == 200
        assert answered(server) == expected["tiny"]  # the first comes back as any other
        assert states(server) == {"tiny": "loaded", "other": "loaded", "third": "unloaded"}
        wait_until(lambda: third.loaded() is None)


def test_a_model_that_answers_goes_only_afterwards(vlm: VLM, other: Loads, expected: dict[str, str]) -> None:
    slow = Braked(vlm)
    with serving(slow, other.source, max_loaded_models=1) as server, ThreadPoolExecutor() as pool:
        try:
            held = pool.submit(ask, server)
            wait_until(lambda: slow.holding)
            waiting = submit(pool, server, "other")
            wait_until(lambda: server.models.first.leaving)
            late = submit(pool, server, "tiny")  # behind the one that waits, or that would wait for ever
            assert (states(server)["tiny"], other.count) == ("loaded", 0)
            assert metrics(server)["edgevlm_queue_waiting,model=other"] == 1
        finally:
            slow.release()
        for name, asked in (("tiny", held), ("other", waiting), ("tiny", late)):
            status, answer = asked.result()
            assert status == 200
            assert answer["choices"][0]["message"]["content"] == expected[name]
        assert states(server) == {"tiny": "loaded", "other": "unloaded"}


def test_requests_to_more_models_than_there_is_room_for_are_all_answered(
    vlm: VLM, other: Loads, third: Loads, expected: dict[str, str]
) -> None:
    names = ["tiny", "other", "third"] * 3
    sources = (other.source, third.source)
    with serving(vlm, *sources, max_loaded_models=1) as server, ThreadPoolExecutor(9) as pool:
        found = list(pool.map(lambda name: answered(server, model=name), names))
        assert found == [expected[name] for name in names]
        assert sorted(states(server).values()) == ["loaded", "unloaded", "unloaded"]


def test_a_model_makes_room_where_memory_is_short(
    vlm: VLM, other: Loads, monkeypatch: pytest.MonkeyPatch, expected: dict[str, str]
) -> None:
    size = other.source.manifest.size_bytes if other.source.manifest else 0
    with serving(vlm, other.source) as server:
        monkeypatch.setattr("edgevlm.server.models.available_memory", lambda: size - 1)
        assert answered(server, model="other") == expected["other"]
        assert states(server) == {"tiny": "unloaded", "other": "loaded"}
        monkeypatch.setattr("edgevlm.server.models.available_memory", lambda: size)
        assert answered(server) == expected["tiny"]
        assert states(server) == {"tiny": "loaded", "other": "loaded"}


# What goes wrong


def test_a_broken_model_is_the_end_of_the_requests_for_it_alone(
    vlm: VLM, exported_smolvlm: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    folder = copy_export(exported_smolvlm, tmp_path / "other")
    weights = (folder / load_manifest(folder).submodels[LANGUAGE].file).with_suffix(".bin")
    sound = shutil.copy(weights, tmp_path)
    with serving(vlm, make_source(folder, None, F32, checked=False)) as server:
        flip(weights)
        told = f"other cannot be loaded: {weights} is not what was exported (SHA-256 differs); export the model again"
        for _ in range(2):
            status, answer = ask(server, model="other")
            assert (status, answer["error"]["code"], answer["error"]["param"]) == (500, "model_error", "model")
            assert answer["error"]["message"] == told
        assert post(server, "/api/generate", model="other", prompt=QUESTION) == (500, {"error": told})
        assert ask(server, model="other", stream=True)[0] == 500
        assert states(server) == {"tiny": "loaded", "other": "unloaded"}
        assert request(server, "GET", "/readyz")[0] == 200
        assert answered(server) == expected["tiny"]
        shutil.copy(sound, weights)
        assert answered(server, model="other") == expected["other"]


def out_of_memory() -> VLM:
    raise MemoryError


@pytest.mark.parametrize("fail", [panic, out_of_memory])
def test_whatever_keeps_a_model_from_being_loaded_ends_no_server(
    vlm: VLM, exported_smolvlm: Path, fail: Callable[[], VLM], caplog: pytest.LogCaptureFixture
) -> None:
    with serving(vlm, Source("other", fail, load_manifest(exported_smolvlm))) as server:
        for _ in range(2):
            status, answer = ask(server, model="other")
            assert (status, answer["error"]["code"]) == (500, "internal_error")
            assert answer["error"]["message"].startswith("other cannot be loaded: the server failed on this request")
        assert states(server)["other"] == "unloaded"
        assert answered(server)
    assert caplog.text.count("unexpected") == 2


def test_all_who_wait_for_a_broken_model_are_told(vlm: VLM, exported_smolvlm: Path) -> None:
    go = threading.Event()

    def load() -> VLM:
        assert go.wait(30)
        raise OptionError("no such thing")

    source = Source("other", load, load_manifest(exported_smolvlm))
    with serving(vlm, source) as server, ThreadPoolExecutor() as pool:
        asked = [submit(pool, server, "other") for _ in range(3)]
        go.set()
        for each in asked:
            status, answer = each.result()
            assert (status, answer["error"]["message"]) == (400, "other cannot be loaded: no such thing")
        assert (model(server, "other").waiting, model(server, "other").using) == (0, 0)


def test_a_client_that_goes_away_while_a_model_is_loaded(vlm: VLM, other: Loads) -> None:
    with serving(vlm, other.source) as server:
        with other.held_back():
            connection = raw(server, {"model": "other", "messages": USER})
            wait_until(lambda: model(server, "other").waiting)
            assert states(server)["other"] == "loading"
            connection.close()
            wait_until(lambda: not model(server, "other").waiting)
        wait_until(lambda: states(server)["other"] == "loaded")
        assert not model(server, "other").busy
        assert answered(server, model="other")
        assert other.count == 1


def test_nothing_is_unloaded_for_clients_that_have_gone_away(vlm: VLM, other: Loads) -> None:
    slow = Braked(vlm)
    with serving(slow, other.source, max_loaded_models=1) as server, ThreadPoolExecutor() as pool:
        try:
            held = pool.submit(ask, server)
            wait_until(lambda: slow.holding)
            connection = raw(server, {"model": "other", "messages": USER})
            wait_until(lambda: server.models.first.leaving)
            connection.close()
            wait_until(lambda: not server.models.first.leaving)
        finally:
            slow.release()
        assert held.result()[0] == 200
        assert (states(server), other.count) == ({"tiny": "loaded", "other": "unloaded"}, 0)


def test_waiting_for_a_model_is_bounded(vlm: VLM, other: Loads) -> None:
    body = json.dumps({"model": "other", "messages": USER}).encode()
    with serving(vlm, other.source, time_limit_s=0.3) as server, other.held_back():
        status, headers, answer = request(server, "POST", "/v1/chat/completions", body)
        assert (status, headers["retry-after"]) == (503, "2")
        error = read_json(answer)["error"]
        assert (error["code"], error["message"]) == (
            "model_loading", "other is being loaded; try again in a few seconds",
        )  # fmt: skip


def test_those_who_wait_for_a_model_wait_in_the_queue(vlm: VLM, other: Loads) -> None:
    with serving(vlm, other.source, max_queue=1) as server, ThreadPoolExecutor() as pool:
        with other.held_back():
            asked = [submit(pool, server, "other") for _ in range(2)]
            for name in ("tiny", "other"):
                status, answer = ask(server, model=name)
                assert (status, answer["error"]["code"]) == (503, "queue_full")
        assert [each.result()[0] for each in asked] == [200, 200]


def test_a_stop_sends_those_away_who_wait_for_a_model(vlm: VLM, other: Loads) -> None:
    with serving(vlm, other.source, stop_timeout_s=0.3) as server, ThreadPoolExecutor() as pool, other.held_back():
        asked = submit(pool, server, "other")
        server.stop()
        status, answer = asked.result()
        assert (status, answer["error"]["code"]) == (503, "stopping")
    wait_until(lambda: "edgevlm-worker" not in {thread.name for thread in threading.enumerate()})  # it still loads


# How it is started


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ([], "2 models are called tiny-fp32; give each a name of its own with --model-name, in order"),
        (["--model-name", "a", "--model-name", "a:latest"], "2 models are called a; give each a name of its own"),
        (["--model-name", "a"] * 3, "--model-name is given 3 times for 2 models; give it once for each, in order"),
        (["--max-loaded-models", "0"], "max_loaded_models must be above 0, not 0"),
        (["--unload-after", "nan"], "unload_after_s must be above 0, not nan"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(exported: Path, options: list[str], line: str) -> None:
    result = cli("serve", exported, exported, *options)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {line}")
    assert result.stderr.count("\n") == 1


def test_a_second_folder_that_is_none_is_told_at_the_start(exported: Path, tmp_path: Path) -> None:
    for folder, line in (("nonesuch", "no model 'nonesuch': "), (tmp_path, f"{tmp_path} has no edgevlm.json")):
        result = cli("serve", exported, folder)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"Error: {line}")
        assert result.stderr.count("\n") == 1


def test_the_unit_names_all_models(exported: Path, exported_smolvlm: Path) -> None:
    names = ("--model-name", "a", "--model-name", "b")
    result = cli("serve", exported, exported_smolvlm, *names, "--unload-after", 60, "--print-unit")
    [line] = [line for line in result.stdout.splitlines() if line.startswith("ExecStart=")]
    wanted = f"serve {exported.resolve()} {exported_smolvlm.resolve()} {' '.join(names)} --unload-after 60.0"
    assert line.endswith(wanted)
