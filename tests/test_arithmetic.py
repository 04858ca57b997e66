"""The vision encoder's arithmetic: what is chosen for a machine, what that does to the graph, and that it is told."""

from __future__ import annotations

import json
import platform
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from archspec.cpu import TARGETS

from edgevlm import VLM, RuntimeConfig
from edgevlm.families.base import IMAGE_EMBEDS, ImageBudget
from edgevlm.manifest import VISION, Submodel
from edgevlm.runtime.arithmetic import FACTOR, ChosenArithmetic, choose_arithmetic
from edgevlm.runtime.config import VisionArithmetic
from edgevlm.runtime.core import core, import_openvino, read_ir
from edgevlm.runtime.cpu import available_memory, cgroup_rooms, cpu_features
from edgevlm.runtime.graph_passes import decompress_weights, drop_activation_quantization
from edgevlm_export.output_folder import FILE_NAMES
from tests.conftest import F32, export_tiny, photograph
from tests.helpers.command import cli

MIB = 2**20
VNNI, AVX2 = ("avx2", "avx512f", "avx512_vnni", "avx_vnni"), ("avx2",)
COMPRESSED = {"i8", "u8", "i4", "u4"}


@pytest.fixture(scope="module")
def w8a8(idefics3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Idefics3 checkpoint exported to INT8, its vision part to W8A8. Tests must not change it."""
    return export_tiny(idefics3, tmp_path_factory.mktemp("exports") / "tiny-w8a8", "int8")


def chosen(
    precision: str, device: str = "CPU", features: tuple[str, ...] = AVX2, memory: int = 2**40, **options: Any
) -> ChosenArithmetic:
    """Return what is chosen for a submodel of 100 MiB."""
    submodel, config = Submodel("x.xml", precision, 100 * MIB), RuntimeConfig(**options)
    return choose_arithmetic(config, submodel, device, lambda: features, lambda: memory)


def test_w8a8_runs_as_exported_where_the_cpu_has_int8_products() -> None:
    assert chosen("w8a8", features=VNNI) == ChosenArithmetic("exported", "W8A8", "avx512_vnni")
    assert str(chosen("w8a8", features=VNNI)) == "W8A8 (avx512_vnni)"
    for feature in ("avx_vnni", "avx512_vnni", "avx_vnni_int8", "amx_int8"):
        assert str(chosen("w8a8", features=("avx2", feature))) == f"W8A8 ({feature})"
    assert str(chosen("int8", features=VNNI)) == "INT8 weights (as exported)"


@pytest.mark.parametrize("features", [AVX2, ("avx2", "avx512f"), ()])
def test_without_them_activations_are_not_quantized(features: tuple[str, ...]) -> None:
    """No feature known, as of an ARM, counts as none of them there."""
    plenty, little = (chosen("w8a8", features=features, memory=size) for size in (2**40, 2**20))
    assert plenty == ChosenArithmetic("float32", "FP32 weights", "no VNNI: decompressed at load")
    assert (little.graph, little.name) == ("compressed", "INT8 weights")
    assert little.reason.startswith("no VNNI: activations are not quantized")


@pytest.mark.parametrize(("precision", "bytes_each"), [("w8a8", 4), ("int8", 4), ("int4", 8)])
def test_weights_are_decompressed_where_memory_is_plentiful(precision: str, bytes_each: int) -> None:
    """And where the compile cache does not lose other models to them."""
    limit = FACTOR * bytes_each * 100 * MIB
    for size, expected in ((limit, "compressed"), (limit + 1, "float32")):
        assert chosen(precision, memory=size, cache=False).graph == expected
        assert chosen(precision, cache_limit_bytes=size).graph == expected


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_graph_that_is_not_compressed_stays_as_it_is(precision: str) -> None:
    for asked in ("auto", "compressed", "float32"):
        assert str(chosen(precision, vision_arithmetic=asked)) == f"{precision.upper()} weights (as exported)"


def test_other_devices_run_what_was_exported_and_the_caller_is_obeyed() -> None:
    assert str(chosen("w8a8", device="GPU.0", features=())) == "W8A8 (as exported, on GPU.0)"
    for features in (VNNI, AVX2):
        assert str(chosen("w8a8", features=features, vision_arithmetic="exported")) == "W8A8 (as asked for)"
        assert str(chosen("w8a8", features=features, vision_arithmetic="compressed")) == "INT8 weights (as asked for)"
        assert str(chosen("w8a8", features=features, vision_arithmetic="float32")) == "FP32 weights (as asked for)"


def test_memory_is_what_the_machine_and_its_cgroups_leave(tmp_path: Path) -> None:
    service = tmp_path / "system.slice" / "edgevlm.service"
    service.mkdir(parents=True)
    for folder, limit, used in ((service, "4000", "1500"), (service.parent, "max", "7000"), (tmp_path, "9000", "8000")):
        (folder / "memory.max").write_text(f"{limit}\n", encoding="utf-8")
        (folder / "memory.current").write_text(f"{used}\n", encoding="utf-8")
    membership = tmp_path / "cgroup"
    membership.write_text("1:cpu:/elsewhere\n0::/system.slice/edgevlm.service\n", encoding="utf-8")
    assert list(cgroup_rooms(membership, tmp_path)) == [2500, 1000]
    assert not list(cgroup_rooms(tmp_path / "none", tmp_path))
    assert 0 < available_memory() < 2**50


def vision(folder: Path) -> Any:
    return read_ir(folder / FILE_NAMES[VISION])


def kinds(model: Any) -> Counter[str]:
    """Return how many constants of integers of a byte, and how many FakeQuantize, a graph has."""
    found = Counter(node.get_type_name() for node in model.get_ops())
    found["i8"] = sum(str(node.get_element_type()) == "<Type: 'int8_t'>" for node in constants(model))
    return found


def constants(model: Any) -> list[Any]:
    return [node for node in model.get_ops() if node.get_type_name() == "Constant"]


def test_activations_alone_lose_their_quantization(w8a8: Path) -> None:
    before, after = kinds(vision(w8a8)), kinds(drop_activation_quantization(vision(w8a8)))
    assert before["FakeQuantize"] > 10
    assert after["FakeQuantize"] == 0
    assert before["i8"] == after["i8"] > 10
    assert {name: count for name, count in before.items() if name not in {"FakeQuantize", "Constant"}} == {
        name: count for name, count in after.items() if name != "Constant"
    }


def test_the_quantization_of_weights_stays() -> None:
    """Whether their FakeQuantize reads a constant, or what is computed of constants alone."""
    opset = import_openvino().opset13
    x = opset.parameter([2, 4], np.float32, name="x")
    low, high = np.float32(-1), np.float32(1)
    plain = opset.constant(np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4))
    halves = opset.convert(opset.constant(np.eye(3, 4, dtype=np.float16)), np.float32)
    weights = [opset.fake_quantize(each, low, high, low, high, 255) for each in (plain, halves)]
    activations = opset.fake_quantize(x, low, high, low, high, 4)
    outputs = [opset.matmul(activations, each, False, True) for each in weights]
    model = import_openvino().Model(outputs, [x])
    names = {each.get_friendly_name() for each in weights}
    drop_activation_quantization(model)
    left = {node.get_friendly_name() for node in model.get_ops() if node.get_type_name() == "FakeQuantize"}
    assert left == names
    given = np.linspace(-0.9, 0.8, 8, dtype=np.float32).reshape(2, 4)
    [found, _] = core().compile_model(model, "CPU", F32.properties("CPU"))([given]).values()
    np.testing.assert_allclose(found, given @ plain.get_data().T, atol=0.01)


def embeddings(folder: Path, arithmetic: VisionArithmetic, config: RuntimeConfig = F32) -> np.ndarray:
    """Return the image embeddings of a photograph's views, `(views, tokens, hidden)`."""
    vlm = VLM(folder, replace(config, vision_arithmetic=arithmetic))
    assert vlm.vision_arithmetic.graph == arithmetic
    [shown] = vlm.processor.preprocess([photograph("china.jpg")], ImageBudget("high"))
    return np.stack([each[IMAGE_EMBEDS] for each in vlm.vision.encode(shown.views)])


def cosine(one: np.ndarray, two: np.ndarray) -> float:
    one, two = one.ravel().astype(np.float64), two.ravel().astype(np.float64)
    return float(one @ two / (np.linalg.norm(one) * np.linalg.norm(two)))


def test_without_quantized_activations_the_embeddings_are_nearer_to_float32(w8a8: Path, exported: Path) -> None:
    wanted = embeddings(exported, "exported")
    quantized, plain = (cosine(embeddings(w8a8, kind), wanted) for kind in ("exported", "compressed"))
    assert quantized < plain
    assert plain > 0.999


def test_decompressed_weights_are_the_same_weights(w8a8: Path) -> None:
    compressed, decompressed = (embeddings(w8a8, kind) for kind in ("compressed", "float32"))
    assert np.abs(decompressed - compressed).max() < 1e-3 * np.abs(compressed).max()
    model = decompress_weights(drop_activation_quantization(vision(w8a8)))
    assert kinds(model)["i8"] == 0


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_other_compressed_weights_are_decompressed_too(idefics3: Path, tmp_path: Path, precision: Any) -> None:
    from edgevlm_export import ExportOptions, export

    folder = export(idefics3, tmp_path / "out", ExportOptions("int8", vision_precision=precision)).folder
    compressed, decompressed = (embeddings(folder, kind) for kind in ("exported", "float32"))
    assert np.abs(decompressed - compressed).max() < 1e-3 * np.abs(compressed).max()
    assert not COMPRESSED & runtime_constants(VLM(folder, replace(F32, vision_arithmetic="float32")))


def runtime_constants(vlm: VLM) -> set[str]:
    """Return the precisions of the constants, weights among them, that the plugin runs with."""
    nodes = vlm.vision._compiled.get_runtime_model().get_ops()
    infos = [node.get_rt_info() for node in nodes]
    return {info["outputPrecisions"].astype(str).lower() for info in infos if info["layerType"].astype(str) == "Const"}


def test_the_plugin_runs_float32_weights_where_it_ran_compressed_ones(w8a8: Path) -> None:
    compressed, decompressed = (
        runtime_constants(VLM(w8a8, replace(F32, vision_arithmetic=kind))) for kind in ("compressed", "float32")
    )
    assert "i8" in compressed
    assert not COMPRESSED & decompressed


def test_the_compile_cache_keeps_them_apart(w8a8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    config, wanted = replace(F32, cache=True), {}
    for kind in ("exported", "compressed", "float32"):
        wanted[kind] = embeddings(w8a8, kind)
        fresh = VLM(w8a8, replace(config, vision_arithmetic=kind))
        assert not fresh.vision._compiled.get_property("LOADED_FROM_CACHE")
    for kind, each in wanted.items():
        again = VLM(w8a8, replace(config, vision_arithmetic=kind))
        assert again.vision._compiled.get_property("LOADED_FROM_CACHE")
        np.testing.assert_allclose(embeddings(w8a8, kind, config), each, atol=1e-5)
    assert np.abs(wanted["exported"] - wanted["compressed"]).max() > 1e-3


@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="for x86")
def test_on_a_cpu_without_vnni_the_sums_of_w8a8_saturate(
    w8a8: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes whose oneDNN, the library of OpenVINO's products, takes the CPU for one with AVX2 alone."""
    wanted, here = embeddings(exported, "exported"), embeddings(w8a8, "exported")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        kinds = ("exported", "compressed", "float32")
        quantized, *others = (pool.submit(embeddings, w8a8, kind).result() for kind in kinds)
    assert cosine(quantized, wanted) <= cosine(here, wanted)
    for each in others:
        assert cosine(each, wanted) > max(0.999, cosine(quantized, wanted))


WITHOUT, WITH = ("haswell", "zen3", "skylake_avx512"), ("cascadelake", "icelake", "alderlake", "sapphirerapids", "zen4")


@pytest.mark.parametrize("cpu", [*WITHOUT, *WITH])
def test_the_features_of_a_cpu_decide(cpu: str, w8a8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is loaded as if archspec had found another CPU, as its tables describe that."""
    monkeypatch.setattr("archspec.cpu.detect.detected_info", lambda: TARGETS[cpu])
    cpu_features.cache_clear()
    try:
        vlm = VLM(w8a8, F32)
    finally:
        cpu_features.cache_clear()
    assert vlm.vision_arithmetic.graph == ("float32" if cpu in WITHOUT else "exported")
    assert ("i8" in runtime_constants(vlm)) == (cpu in WITH)


def test_doctor_tells_it_of_each_model(w8a8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVLM_HOME", str(tmp_path))
    told = str(VLM().vision_arithmetic)
    assert json.loads(cli("doctor", "--json").stdout)["vision arithmetic"] == {"panel": told}
    lines = [line.split("  ") for line in cli("doctor").stdout.splitlines()]
    assert any((line[0], line[-1].strip()) == ("vision arithmetic: panel", told) for line in lines)


def test_bench_tells_it_of_each_point(w8a8: Path, china: Path) -> None:
    options = ["--vision-arithmetic", "exported", "--vision-arithmetic", "compressed"]
    options += ["--image", china, "--detail", "low", "-n", 1, "--new-tokens", 2]
    points = [json.loads(line) for line in cli("bench", w8a8, *options, "--json").stdout.splitlines()[1:]]
    assert [each["vision"] for each in points] == [
        {"graph": "exported", "name": "W8A8", "reason": "as asked for"},
        {"graph": "compressed", "name": "INT8 weights", "reason": "as asked for"},
    ]
    shown = cli("bench", w8a8, *options).stdout
    assert "vision W8A8, low" in shown
    assert "\nvision: W8A8 (as asked for), INT8 weights (as asked for)\n" in shown
