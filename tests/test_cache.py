"""Compiled models on disk: used, bounded, and never trusted when damaged."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest

from edgevlm import VLM, GenerationConfig, RuntimeConfig
from edgevlm.manifest import SUBMODELS
from edgevlm.runtime.compile_cache import SUMS, compile_cached, folder_size, prune
from edgevlm.runtime.core import read_ir
from tests.conftest import F32
from tests.helpers.damage import copy_export, edit_manifest, truncate

QUESTION = "What is in this picture?"
LIMIT = 2**30


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, without compiled models."""
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    """A cache entry to be made."""
    return tmp_path / "compiled" / "entry"


@pytest.fixture
def load(exported: Path, entry: Path) -> Callable[[], ov.CompiledModel]:
    """What compiles the embedding table with the entry as its cache."""
    path = exported / "openvino_text_embeddings_model.xml"
    return lambda: compile_cached(lambda: read_ir(path), "CPU", {}, entry, LIMIT)


def embedding(compiled: ov.CompiledModel) -> np.ndarray:
    return np.array(compiled(np.array([[50, 60, 70]]))[0])


def from_cache(compiled: ov.CompiledModel) -> bool:
    return bool(compiled.get_property("LOADED_FROM_CACHE"))


def the_blob(entry: Path) -> Path:
    [blob] = entry.glob("*.blob")
    return blob


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return when each file under `folder` was written, and its bytes."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def replace(path: Path, data: bytes) -> None:
    """Give a file new bytes, leaving the old ones to whoever has them mapped."""
    path.unlink()
    path.write_bytes(data)


def test_the_second_load_reads_what_the_first_wrote(load: Callable[[], ov.CompiledModel], entry: Path) -> None:
    first = load()
    written = state(entry)
    second = load()
    assert (from_cache(first), from_cache(second)) == (False, True)
    assert state(entry) == written
    assert json.loads((entry / SUMS).read_text()).keys() == {the_blob(entry).name}
    np.testing.assert_array_equal(embedding(first), embedding(second))


def test_a_warm_load_reads_no_model(load: Callable[[], ov.CompiledModel], entry: Path) -> None:
    wanted = embedding(load())

    def refuse() -> ov.Model:
        raise AssertionError("read")

    found = compile_cached(refuse, "CPU", {}, entry, LIMIT)
    assert from_cache(found)
    np.testing.assert_array_equal(embedding(found), wanted)
    with pytest.raises(AssertionError, match="read"):
        compile_cached(refuse, "CPU", {}, entry, LIMIT, "another graph")


def test_what_a_blob_was_made_of_is_compared(exported: Path, entry: Path) -> None:
    """A blob of another graph is rebuilt in its place, and is then the other graph's."""
    path = exported / "openvino_text_embeddings_model.xml"

    def doubled() -> ov.Model:
        model = read_ir(path)
        result = model.get_results()[0]
        twice = ov.opset13.multiply(result.input_value(0), np.float32(2))
        result.input(0).replace_source_output(twice.output(0))
        return model

    def load(made_of: str) -> ov.CompiledModel:
        return compile_cached(doubled if made_of else lambda: read_ir(path), "CPU", {}, entry, LIMIT, made_of)

    single, double = embedding(load("")), load("doubled")
    assert not from_cache(double)
    np.testing.assert_allclose(embedding(double), 2 * single, rtol=1e-2)
    again = load("doubled")
    assert from_cache(again)
    np.testing.assert_array_equal(embedding(again), embedding(double))
    the_blob(entry)
    assert not from_cache(load(""))


def test_what_the_family_puts_into_the_graph_is_compared(exported: Path, own_home: Path, tmp_path: Path) -> None:
    folder = copy_export(exported, tmp_path / "tiny")
    config = RuntimeConfig(device="CPU")

    def load() -> list[bool]:
        vlm = VLM(folder, config)
        return [from_cache(each._compiled) for each in (vlm.vision, vlm.language_model)]

    assert load() == [False, False]
    assert load() == [True, True]
    edit_manifest(
        folder, lambda data: data["family_config"].update(position_grid=data["family_config"]["position_grid"] - 1)
    )
    assert load() == [False, True]


def test_options_have_blobs_of_their_own(exported: Path, entry: Path) -> None:
    path = exported / "openvino_text_embeddings_model.xml"
    options: list[dict[str, Any]] = [{}, {"INFERENCE_PRECISION_HINT": "f32"}, {"INFERENCE_NUM_THREADS": 1}]

    def load() -> list[bool]:
        return [from_cache(compile_cached(lambda: read_ir(path), "CPU", each, entry, LIMIT)) for each in options]

    assert load() == [False] * 3
    assert load() == [True] * 3
    blobs = sorted(entry.glob("*.blob"))
    assert len(blobs) == 3
    cut(blobs[0])
    assert sorted(load()) == [False, True, True]
    assert load() == [True] * 3


def cut(blob: Path) -> None:
    data = blob.read_bytes()
    replace(blob, data)
    truncate(blob)


def zero(blob: Path) -> None:
    replace(blob, bytes(blob.stat().st_size))


def empty(blob: Path) -> None:
    replace(blob, b"")


def flip_the_middle(blob: Path) -> None:
    data = bytearray(blob.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 16] = bytes(255 - byte for byte in data[middle : middle + 16])
    replace(blob, bytes(data))


def garble_the_sums(blob: Path) -> None:
    replace(blob.with_name(SUMS), b"\xff{")


def swap_the_sums(blob: Path) -> None:
    replace(blob.with_name(SUMS), json.dumps({blob.name: [1, 2]}).encode())


def list_the_sums(blob: Path) -> None:
    replace(blob.with_name(SUMS), b"[1]")


def lose_the_sums(blob: Path) -> None:
    blob.with_name(SUMS).unlink()


def lose_the_blob(blob: Path) -> None:
    blob.unlink()


DAMAGES = [
    cut,
    zero,
    empty,
    flip_the_middle,
    garble_the_sums,
    swap_the_sums,
    list_the_sums,
    lose_the_sums,
    lose_the_blob,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_rebuilt_once(
    load: Callable[[], ov.CompiledModel], entry: Path, damage: Callable[[Path], None]
) -> None:
    wanted = embedding(load())
    damage(the_blob(entry))
    rebuilt = load()
    assert not from_cache(rebuilt)
    again = load()
    assert from_cache(again)
    for compiled in (rebuilt, again):
        np.testing.assert_array_equal(embedding(compiled), wanted)


def test_a_blob_of_another_openvino_is_rebuilt_once(load: Callable[[], ov.CompiledModel], entry: Path) -> None:
    wanted = embedding(load())
    blob = the_blob(entry)
    data = blob.read_bytes()
    version = ov.get_version().encode()
    older = b"1" + version[1:]
    assert version in data
    replace(blob, data.replace(version, older))
    (entry / SUMS).unlink()
    sums = {blob.name: [len(data), zlib.crc32(blob.read_bytes()), ""]}
    (entry / SUMS).write_text(json.dumps(sums), encoding="utf-8")
    rebuilt = load()
    assert not from_cache(rebuilt)
    assert from_cache(load())
    np.testing.assert_array_equal(embedding(rebuilt), wanted)


def test_an_answer_from_the_cache_is_the_answer(exported: Path, china: Path, own_home: Path) -> None:
    config = RuntimeConfig(device="CPU")
    wanted = VLM(exported, RuntimeConfig(device="CPU", cache=False)).generate(china, QUESTION)
    assert not own_home.exists()
    first = VLM(exported, config).generate(china, QUESTION)
    written = state(own_home / "cache")
    assert sum(name.endswith(".blob") for name in written) == 3
    second = VLM(exported, config).generate(china, QUESTION)
    assert state(own_home / "cache") == written
    assert first.token_ids == second.token_ids == wanted.token_ids


def test_damage_to_every_part_leaves_the_answer_right(exported: Path, china: Path, own_home: Path) -> None:
    config = GenerationConfig(max_new_tokens=24)
    wanted = VLM(exported, RuntimeConfig(device="CPU")).generate(china, QUESTION, config)
    for damage in (cut, zero, flip_the_middle):
        blobs = list((own_home / "cache").rglob("*.blob"))
        assert len(blobs) == 3
        for blob in blobs:
            damage(blob)
        found = VLM(exported, RuntimeConfig(device="CPU")).generate(china, QUESTION, config)
        assert found.token_ids == wanted.token_ids
        rebuilt = state(own_home / "cache")
        VLM(exported, RuntimeConfig(device="CPU"))
        assert state(own_home / "cache") == rebuilt


def test_the_cache_of_one_precision_does_not_leak_into_another(exported: Path, vlm: VLM, own_home: Path) -> None:
    VLM(exported, RuntimeConfig(device="CPU", inference_precision="bf16"))
    found = VLM(exported, RuntimeConfig(device="CPU", inference_precision="f32"))
    assert list(own_home.rglob("*.blob"))

    def logits(model: VLM) -> np.ndarray:
        session = model.language_model.session()
        return session.prefill(session.embed(range(50, 90)), logits_to_keep=40)

    np.testing.assert_allclose(logits(found), logits(vlm), atol=1e-5)


def make_entry(folder: Path, name: str, size: int, age: int) -> None:
    """Make an entry of `size` bytes that was last used `age` seconds ago."""
    (folder / name).mkdir(parents=True)
    (folder / name / "model.blob").write_bytes(bytes(size))
    used = 1_700_000_000 - age
    os.utime(folder / name, (used, used))


def test_prune_deletes_the_longest_unused_until_it_fits(tmp_path: Path) -> None:
    for name, age in (("new", 1), ("oldest", 4), ("middle", 2), ("old", 3)):
        make_entry(tmp_path, name, 1000, age)
    (tmp_path / "stray.txt").touch()

    def names() -> set[str]:
        return {path.name for path in tmp_path.iterdir() if path.is_dir()}

    prune(tmp_path, 4000)
    assert names() == {"new", "middle", "old", "oldest"}
    prune(tmp_path, 2999)
    assert names() == {"new", "middle"}
    prune(tmp_path, 0, keep=tmp_path / "middle")
    assert names() == {"middle"}
    assert folder_size(tmp_path) == 1000


def test_a_load_marks_its_entry_as_used_and_prunes_the_rest(
    load: Callable[[], ov.CompiledModel], exported: Path, entry: Path
) -> None:
    load()
    make_entry(entry.parent, "unused", 10, 100)
    os.utime(entry, (1_600_000_000, 1_600_000_000))
    path = exported / "openvino_text_embeddings_model.xml"
    compiled = compile_cached(lambda: read_ir(path), "CPU", {}, entry, folder_size(entry))
    assert from_cache(compiled)
    assert [path.name for path in entry.parent.iterdir() if path.is_dir()] == ["entry"]
    assert entry.stat().st_mtime > 1_700_000_000


def test_a_model_larger_than_the_limit_stays_whole(exported: Path, vlm: VLM, own_home: Path) -> None:
    config = RuntimeConfig(device="CPU", inference_precision="f32", cache_limit_bytes=0)
    compiled = own_home / "cache" / "compiled"
    make_entry(compiled, "other-language_model", 10, 100)
    VLM(exported, config)
    assert sum(path.is_dir() for path in compiled.iterdir()) == len(SUBMODELS)
    assert not (compiled / "other-language_model").exists()
    again = VLM(exported, config)
    for submodel in (again.vision, again.language_model):
        assert from_cache(submodel._compiled)
    answer = again.generate(None, QUESTION, GenerationConfig(max_new_tokens=8))
    assert answer.token_ids == vlm.generate(None, QUESTION, GenerationConfig(max_new_tokens=8)).token_ids


def test_a_folder_that_cannot_be_written_is_no_error(
    exported: Path, vlm: VLM, own_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own_home.mkdir()
    (own_home / "cache").write_text("a file where the cache folder would be", encoding="utf-8")
    config = RuntimeConfig(device="CPU", inference_precision="f32")
    with caplog.at_level(logging.WARNING):
        answer = VLM(exported, config).generate(None, QUESTION, GenerationConfig(max_new_tokens=8))
    assert answer.token_ids == vlm.generate(None, QUESTION, GenerationConfig(max_new_tokens=8)).token_ids
    assert "compiled models are not cached: " in caplog.text


def test_what_openvino_cannot_write_is_no_error(load: Callable[[], ov.CompiledModel], entry: Path) -> None:
    wanted = embedding(load())
    blob = the_blob(entry)
    blob.unlink()
    blob.mkdir()
    np.testing.assert_array_equal(embedding(load()), wanted)
    assert blob.is_dir()


def test_threads_may_share_an_entry(load: Callable[[], ov.CompiledModel], entry: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        compiled = list(pool.map(lambda _: load(), range(8)))
    assert sum(from_cache(each) for each in compiled) == 7
    for each in compiled[1:]:
        np.testing.assert_array_equal(embedding(each), embedding(compiled[0]))


def test_processes_may_share_a_cold_cache(exported: Path, own_home: Path) -> None:
    command = [sys.executable, "-m", "edgevlm", "run", QUESTION, "-m", str(exported), "--max-new-tokens", "8"]
    for _ in range(2):
        shutil.rmtree(own_home, ignore_errors=True)
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(4)]
        found = {(*process.communicate(timeout=120), process.returncode) for process in processes}
        assert len(found) == 1
        [(answer, errors, code)] = found
        assert (errors.splitlines(), code) == ([b"(cut: --max-new-tokens was reached)"], 0)
        assert len(answer) > 1


def test_a_write_protected_entry_is_no_error(load: Callable[[], ov.CompiledModel], entry: Path) -> None:
    entry.mkdir(parents=True)
    entry.chmod(0o500)
    if os.access(entry, os.W_OK):
        pytest.skip("this user may write anywhere")
    assert embedding(load()).shape == (1, 3, 64)
    assert not list(entry.iterdir())


def test_no_cache_writes_nothing(exported: Path, own_home: Path) -> None:
    VLM(exported, F32)
    assert not own_home.exists()
