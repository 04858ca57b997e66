"""The route from a checkpoint's own ONNX files, against ONNX Runtime on the same files and against the native route."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgevlm import VLM, GenerationConfig
from edgevlm.errors import SourceError
from edgevlm.families.base import IMAGE_EMBEDS, ImageBudget
from edgevlm.inputs.chat_template import user_message
from edgevlm.manifest import LANGUAGE, TEXT_EMBEDDINGS, VISION, load_manifest
from edgevlm.metrics import Stopwatch
from edgevlm.runtime.core import import_openvino
from edgevlm_export import ExportOptions, export
from edgevlm_export.routes.onnx import Reference
from edgevlm_export.routes.onnx_stateful import fuse_attention
from edgevlm_export.samples import pixel_values
from edgevlm_export.source.checkpoint import open_checkpoint
from tests.conftest import F32, photograph
from tests.helpers.exports import language_outputs, says_the_same_with_optimum_intel
from tests.helpers.graphs import check_fused, runtime_kinds
from tests.helpers.onnx_files import merge_decoders, write_onnx


@pytest.fixture(scope="session")
def onnx_checkpoint(smolvlm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SmolVLM as ONNX files alone."""
    return write_onnx(smolvlm, tmp_path_factory.mktemp("onnx") / "tiny-onnx")


@pytest.fixture(scope="session")
def from_onnx(onnx_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its export without compression. Tests must not change it."""
    return export(onnx_checkpoint, tmp_path_factory.mktemp("exports") / "onnx-fp32", ExportOptions("fp32")).folder


def test_onnx_files_are_the_source_where_there_are_no_safetensors(from_onnx: Path) -> None:
    manifest = load_manifest(from_onnx)
    assert manifest.export_options["via"] == "onnx"
    assert {"onnx", "onnxruntime"} < set(manifest.tool_versions)
    assert manifest.verification is not None
    assert manifest.verification["reference"] == "onnxruntime"
    assert manifest.verification["greedy_agreement"] == 1
    assert manifest.verification["positions"] == 64
    assert max(part["max_abs_error"] for part in manifest.verification["parts"].values()) < 1e-4


@pytest.mark.optimum
def test_the_folder_loads_with_optimum_intel(from_onnx: Path) -> None:
    says_the_same_with_optimum_intel(from_onnx, VLM(from_onnx, F32))


@pytest.mark.parametrize("known", [True, False])
def test_attention_of_an_unknown_form_is_told(known: bool, caplog: pytest.LogCaptureFixture) -> None:
    opset = import_openvino().opset13
    q, k, v = (opset.parameter([1, 2, -1, 8], np.float32, name=name) for name in "qkv")
    weights = opset.softmax(opset.matmul(q, k, False, True), -1)
    mixed = opset.matmul(weights if known else opset.sqrt(weights), v, False, False)
    model = import_openvino().Model([mixed], [q, k, v], "language")
    with caplog.at_level("WARNING"):
        assert fuse_attention(model) == known
    told = (
        "1 of 1 attentions of language are of a form that is not known here; they stay several operations, and slower"
    )
    assert caplog.messages == ([] if known else [told])


def test_the_parts_run_fused(from_onnx: Path) -> None:
    """As those of the other routes: see tests/test_graph.py."""
    vlm = VLM(from_onnx, F32)
    check_fused(from_onnx)
    kinds = runtime_kinds(vlm.vision._compiled)
    assert kinds["FullyConnected"] == 2 * 4 + 1
    assert kinds["MVN"] == 2 * 2 + 1
    assert kinds["Softmax"] == kinds["MatMul"] == 0


def test_the_same_greedy_text_as_onnxruntime_and_the_native_route(
    from_onnx: Path, onnx_checkpoint: Path, exported_smolvlm: Path
) -> None:
    config = GenerationConfig(max_new_tokens=64)
    budget = ImageBudget("high")
    vlm = VLM(from_onnx, F32)
    image = photograph("china.jpg")
    answer = vlm.generate(image, "What?", config, budget)
    assert answer.token_ids == VLM(exported_smolvlm, F32).generate(image, "What?", config, budget).token_ids
    tiles = vlm.processor.preprocess([image], budget)
    prompt = vlm.prepare([user_message("What?", 1)], [image], config, Stopwatch(), budget)
    reference = Reference(open_checkpoint(onnx_checkpoint).onnx_files())
    tokens, _ = reference.greedy(prompt.inputs_embeds, len(answer.token_ids))
    assert list(tokens) == list(answer.token_ids)
    views = [view for each in tiles for view in each.views]
    found = np.stack([each[IMAGE_EMBEDS] for each in vlm.vision.encode(views)])
    np.testing.assert_allclose(found, reference.encode(pixel_values(views)), atol=1e-4)


def test_masked_entries_and_swapped_beams(from_onnx: Path, exported_smolvlm: Path) -> None:
    """The rest of `language_outputs` follows from positions that are masked themselves, where routes may differ."""
    (ours, swapped, _), (theirs, wanted, _) = (language_outputs(folder) for folder in (from_onnx, exported_smolvlm))
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-4)
    np.testing.assert_allclose(ours[1, 3:], theirs[1, 3:], atol=1e-4)
    np.testing.assert_allclose(swapped[1], wanted[1], atol=1e-4)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_compression(precision: str, onnx_checkpoint: Path, tmp_path: Path) -> None:
    report = export(onnx_checkpoint, tmp_path / "out", ExportOptions(precision, via="onnx"))  # type: ignore[arg-type]
    assert report.verification is not None
    assert report.verification.parts[LANGUAGE].cosine > {"int8": 0.999, "int4": 0.9}[precision]
    assert [report.manifest.submodels[part].precision for part in (VISION, TEXT_EMBEDDINGS, LANGUAGE)] == [
        "w8a8",
        "int8",
        precision,
    ]
    kinds = runtime_kinds(VLM(report.folder, F32).language_model._compiled)
    assert (kinds["ScaledDotProductAttention"], kinds["FullyConnected"]) == (2, 9)


def test_files_beside_the_config_and_safetensors_ignored_on_demand(
    onnx_checkpoint: Path, smolvlm: Path, from_onnx: Path, tmp_path: Path
) -> None:
    flat = Path(shutil.copytree(smolvlm, tmp_path / "flat"))
    for path in (onnx_checkpoint / "onnx").iterdir():
        shutil.copyfile(path, flat / path.name)
    options = ExportOptions("fp32", via="onnx", verify=False)
    report = export(flat, tmp_path / "out", options)
    assert report.manifest.export_options["via"] == "onnx"
    assert {path.name for path in report.folder.iterdir()} == {path.name for path in from_onnx.iterdir()}


def test_a_decoder_merged_of_two(onnx_checkpoint: Path, smolvlm: Path, from_onnx: Path, tmp_path: Path) -> None:
    """Optimum's form: a decoder for the first call and one that reads past key values, behind a switch."""
    folder = Path(shutil.copytree(onnx_checkpoint, tmp_path / "merged"))
    merge_decoders(smolvlm, folder / DECODER, folder / "onnx" / "decoder_model_merged.onnx")
    (folder / DECODER).unlink()
    report = export(folder, tmp_path / "out", ExportOptions("fp32"))
    assert report.verification is not None
    assert report.verification.greedy_agreement == 1
    assert report.verification.parts[LANGUAGE].max_abs_error < 1e-4
    assert {path.name for path in report.folder.iterdir()} == {path.name for path in from_onnx.iterdir()}
    for found, wanted in zip(language_outputs(report.folder), language_outputs(from_onnx), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def refused(onnx_checkpoint: Path, folder: Path, edit: Callable[[Path], None]) -> str:
    """Return the line with which an edited copy is refused, nothing written."""
    shutil.copytree(onnx_checkpoint, folder / "copy")
    edit(folder / "copy")
    with pytest.raises(SourceError) as caught:
        export(folder / "copy", folder / "out", ExportOptions("fp32", via="onnx"))
    assert not (folder / "out").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def add_node(path: Path, kind: str, domain: str = "") -> None:
    """Put one more node into an ONNX file."""
    model = onnx.load(path)
    model.graph.node.append(onnx.helper.make_node(kind, ["x"], ["y"], domain=domain))
    onnx.save(model, path)


def add_input(path: Path, name: str) -> None:
    """Give an ONNX file one more input."""
    model = onnx.load(path)
    model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, [1]))
    onnx.save(model, path)


DECODER = "onnx/decoder_with_past_model.onnx"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "quantized weights": (
        lambda f: add_node(f / DECODER, "MatMulNBits", "com.microsoft"),
        "decoder_with_past_model.onnx is quantized already (MatMulNBits); take the float32 file",
    ),
    "quantized activations": (
        lambda f: add_node(f / "onnx/vision_encoder.onnx", "DynamicQuantizeLinear"),
        "vision_encoder.onnx is quantized already (DynamicQuantizeLinear); take the float32 file",
    ),
    "quantize and dequantize": (
        lambda f: add_node(f / "onnx/embed_tokens.onnx", "DequantizeLinear"),
        "embed_tokens.onnx is quantized already (DequantizeLinear); take the float32 file",
    ),
    "a switch that switches nothing": (
        lambda f: add_input(f / DECODER, "use_cache_branch"),
        "has an input use_cache_branch that does not choose between two decoders in one place",
    ),
    "unknown input": (
        lambda f: add_input(f / DECODER, "pixel_values"),
        "asks for an input pixel_values, which edgevlm does not have",
    ),
    "no past key values": (
        lambda f: shutil.copyfile(f / "onnx/embed_tokens.onnx", f / DECODER),
        "decoder_with_past_model.onnx has no input attention_mask, so it is not the language part",
    ),
    "a part missing": (
        lambda f: (f / "onnx/embed_tokens.onnx").unlink(),
        "lacks embed_tokens.onnx, without which the other ONNX files are of no use",
    ),
    "truncated": (
        lambda f: (f / DECODER).write_bytes((f / DECODER).read_bytes()[:5000]),
        "is no ONNX file, or a damaged one",
    ),
    "no files": (lambda f: shutil.rmtree(f / "onnx"), "has no ONNX files, neither in onnx/ nor beside config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_read_is_refused(damage: str, onnx_checkpoint: Path, tmp_path: Path) -> None:
    edit, line = DAMAGES[damage]
    assert line in refused(onnx_checkpoint, tmp_path, edit)
