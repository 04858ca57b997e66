"""The start: pictures are encoded while the language model still loads, and only what an answer needs is imported."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

import pytest
from filelock import FileLock

from edgevlm import VLM, DamagedModelError, GenerationConfig, Piece, Progress
from edgevlm.inputs.messages import user_message
from edgevlm.manifest import LANGUAGE, load_manifest
from edgevlm.metrics import Stopwatch
from tests.conftest import F32, heed_interrupts
from tests.helpers.damage import copy_export, reseal, truncate

QUESTION = "What is in this picture?"
SHORT = GenerationConfig(max_new_tokens=16)
CACHED = replace(F32, cache=True)
WITHOUT_TERMINAL = {"llguidance", "numpy.ma", "openvino.tools.ovc", "pydantic", "rich"}
"""Modules that an answer to a free question about a picture needs nothing of, where stderr is no terminal."""

MODULES_AFTER_RUN = """
import json, sys
from edgevlm.cli.main import main

try:
    main(sys.argv[1:])
finally:
    print(json.dumps(sorted(name for name, module in sys.modules.items() if module is not None)))
"""
CONVERTER = """
import json
from edgevlm.runtime.core import import_openvino

openvino = import_openvino()
from openvino import convert_model
from openvino.tools import ovc

try:
    openvino.nonesuch
except AttributeError as error:
    print(json.dumps([openvino.convert_model is convert_model is ovc.convert_model, str(error)]))
"""


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, without compiled models."""
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def held(exported: Path, own_home: Path) -> Iterator[FileLock]:
    """The lock of the language model's compile cache, held: until it is released the model cannot be loaded."""
    compiled = own_home / "cache" / "compiled"
    compiled.mkdir(parents=True)
    lock = FileLock(compiled / f".{load_manifest(exported).fingerprint}-{LANGUAGE}.lock", thread_local=False)
    with lock:
        yield lock


def loading_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name.startswith("edgevlm-load")]


def nothing_loads() -> bool:
    """Tell whether the threads that load submodels end, and without being told to."""
    for thread in loading_threads():
        thread.join(60)
    return not loading_threads()


def test_pictures_are_encoded_before_the_language_model_is_loaded(
    exported: Path, vlm: VLM, china: Path, held: FileLock
) -> None:
    wanted = vlm.generate(china, QUESTION, SHORT)
    early = VLM(exported, CACHED, wait=False)
    events = early.events([user_message(QUESTION, 1)], [china], SHORT)
    seen = []
    while not seen or seen[-1].done < seen[-1].total:
        seen.append(next(events))
    assert {each.stage for each in seen} == {"vision"}
    assert seen[-1].total == wanted.views
    assert loading_threads()
    held.release()
    rest = list(events)
    assert isinstance(rest[0], Progress) and rest[0].stage == "decode"
    assert isinstance(rest[-1], Piece) and rest[-1].answer is not None
    assert rest[-1].answer.token_ids == wanted.token_ids
    assert nothing_loads()


def test_waiting_for_the_language_model_is_loading(exported: Path, china: Path, held: FileLock) -> None:
    early = VLM(exported, CACHED, wait=False)
    started = monotonic()
    events = early.events([user_message(QUESTION, 1)], [china], SHORT)
    while (event := next(events)) and isinstance(event, Progress) and event.done < event.total:
        pass
    threading.Timer(0.2, held.release).start()
    *_, last = events
    total = monotonic() - started
    assert isinstance(last, Piece) and last.answer is not None
    timings = last.answer.timings
    assert timings.load_s > early.load_s
    assert timings.preprocess_s + timings.vision_s + timings.prefill_s <= timings.ttft_s <= timings.total_s
    assert timings.load_s - early.load_s + timings.total_s <= total


def test_a_stopwatch_keeps_loading_apart() -> None:
    watch = Stopwatch(started=perf_counter() - 10, stages={"load": 4.0, "vision": 3.0})
    watch.first_token = watch.started + 9
    timings = watch.timings(1.0, 1)
    assert timings.load_s == 5
    assert timings.ttft_s == pytest.approx(5)
    assert timings.total_s >= 6


def test_an_answer_closed_early_leaves_nothing_behind(exported: Path, vlm: VLM, china: Path, held: FileLock) -> None:
    early = VLM(exported, CACHED, wait=False)
    events = early.events([user_message(QUESTION, 1)], [china], SHORT)
    next(events)
    events.close()
    held.release()
    assert nothing_loads()
    assert early.generate(china, QUESTION, SHORT).token_ids == vlm.generate(china, QUESTION, SHORT).token_ids


@pytest.mark.parametrize("kv_cache", ["stateful", "paged"])
def test_every_kind_of_answer_waits_for_what_it_needs(exported: Path, vlm: VLM, china: Path, kv_cache: Any) -> None:
    def early() -> VLM:
        return VLM(exported, replace(F32, kv_cache=kv_cache), wait=False)

    assert early().generate(None, QUESTION, SHORT).token_ids == vlm.generate(None, QUESTION, SHORT).token_ids
    wanted = vlm.score(china, QUESTION, ["yes", "no"]).probabilities
    assert early().score(china, QUESTION, ["yes", "no"]).probabilities == pytest.approx(wanted, abs=1e-4)
    assert early().language_model.session().step([60]).shape == (1, vlm.manifest.vocab_size)
    assert nothing_loads()


@pytest.mark.parametrize("submodel", ["vision_embeddings", "text_embeddings", "language"])
def test_what_keeps_a_submodel_from_loading_is_the_same_error(
    exported: Path, china: Path, tmp_path: Path, submodel: str
) -> None:
    folder = copy_export(exported, tmp_path / "broken")
    path = folder / f"openvino_{submodel}_model.xml"
    path.write_text("<net", encoding="utf-8")
    reseal(folder)
    with pytest.raises(DamagedModelError) as at_once:
        VLM(folder, F32)
    assert nothing_loads()
    early = VLM(folder, F32, wait=False)
    with pytest.raises(DamagedModelError) as later:
        early.generate(china, QUESTION, SHORT)
    assert str(at_once.value) == str(later.value)
    assert str(later.value).startswith(f"{path} cannot be read by OpenVINO: ")
    with pytest.raises(DamagedModelError):  # and so for every later question
        early.generate(china, QUESTION, SHORT)
    assert nothing_loads()


def test_an_error_beside_the_submodels_waits_for_them(exported: Path, tmp_path: Path) -> None:
    folder = copy_export(exported, tmp_path / "broken")
    truncate(folder / "tokenizer.json")
    reseal(folder)
    with pytest.raises(DamagedModelError, match="cannot be read as a tokenizer"):
        VLM(folder, F32, wait=False)
    assert nothing_loads()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_while_the_language_model_loads(exported: Path, china: Path, held: FileLock, own_home: Path) -> None:
    command = [sys.executable, "-m", "edgevlm", "run", str(china), QUESTION, "-m", str(exported)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, preexec_fn=heed_interrupts) as process:  # noqa: PLW1509
        until, compiled = monotonic() + 60, own_home / "cache" / "compiled"
        while not list(compiled.glob("*-vision_embeddings-*/sums.json")) and monotonic() < until:
            sleep(0.05)  # the vision submodel is being loaded or loaded, the language model cannot be
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        told = process.stderr.readline() + process.stderr.readline()
        held.release()  # the process ends when its threads have ended
        output, rest = process.communicate(timeout=60)
    assert (process.returncode, output, told + rest) == (130, b"", b"\nInterrupted.\n")


def test_run_imports_only_what_it_needs(exported: Path, china: Path) -> None:
    arguments = ["run", str(china), QUESTION, "-m", str(exported), "--max-new-tokens", "4", "--json", "--no-cache"]
    command = [sys.executable, "-c", MODULES_AFTER_RUN, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    answer, modules = map(json.loads, done.stdout.splitlines())
    assert answer["generated_tokens"] == 4
    assert {"openvino", "tokenizers", "jinja2"} <= set(modules)
    assert not WITHOUT_TERMINAL & set(modules)


def test_openvino_s_converter_is_still_there() -> None:
    """Imported by whoever asks for it, by either name."""
    done = subprocess.run(
        [sys.executable, "-c", CONVERTER], capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert json.loads(done.stdout) == [True, "module 'openvino' has no attribute 'nonesuch'"]
