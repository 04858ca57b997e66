"""The exporter: what a folder holds, and that it holds true."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgevlm import VLM, OptionError, VerificationError
from edgevlm.families.base import ImageBudget
from edgevlm.inputs.chat_template import user_message
from edgevlm.inputs.processor import Processor
from edgevlm.manifest import LANGUAGE, TEXT_EMBEDDINGS, VISION, check_files, hash_file, load_manifest
from edgevlm.model_store import default_model
from edgevlm.runtime.core import read_ir
from edgevlm_export import ExportOptions, export
from edgevlm_export.calibration import load_pairs, verification_pairs, with_questions
from edgevlm_export.options import Int4Recipe
from edgevlm_export.routes import native as native_route
from edgevlm_export.routes.optimum_worker import greedy
from edgevlm_export.samples import pixel_values, vision_samples
from edgevlm_export.verify import check, scales, verify
from tests.conftest import F32, photograph
from tests.helpers.command import POSIX
from tests.helpers.exports import says_the_same_with_optimum_intel


def test_the_manifest_tells_what_was_exported(exported: Path, idefics3: Path) -> None:
    manifest = load_manifest(exported)
    data = json.loads((exported / "edgevlm.json").read_text(encoding="utf-8"))
    assert data["schema_version"] == 2
    assert (manifest.source, manifest.revision, manifest.family) == ("tiny-idefics3", None, "idefics3")
    assert {name: part.precision for name, part in manifest.submodels.items()} == {
        VISION: "fp32",
        TEXT_EMBEDDINGS: "fp32",
        LANGUAGE: "fp32",
    }
    assert set(manifest.tool_versions) == {"edgevlm", "openvino", "nncf"}
    assert manifest.verification is not None
    assert manifest.verification["greedy_agreement"] == 1.0
    assert manifest.context_length == 512
    assert manifest.eos_token_ids == (json.loads((idefics3 / "config.json").read_text())["image_token_id"] + 1,)


def test_an_export_of_the_first_schema_version_still_loads(exported: Path, tmp_path: Path) -> None:
    """The bundled model is one, too."""
    data = json.loads((exported / "edgevlm.json").read_text(encoding="utf-8"))
    old = {"family_config": "family_facts", "submodels": "parts"}
    first = {old.get(name, name): value for name, value in data.items()} | {"schema_version": 1}
    (tmp_path / "edgevlm.json").write_text(json.dumps(first), encoding="utf-8")
    assert load_manifest(tmp_path) == load_manifest(exported)


def test_the_manifest_names_every_file_and_its_hash(exported: Path) -> None:
    manifest = load_manifest(exported)
    assert set(manifest.files) | {"edgevlm.json"} == {path.name for path in exported.iterdir()}
    for name, file in manifest.files.items():
        assert file.sha256 == hash_file(exported / name)
    check_files(exported, manifest, full=True)


def test_nothing_of_this_machine_is_in_the_folder(exported: Path, idefics3: Path) -> None:
    for path in exported.iterdir():
        assert str(idefics3.parent).encode() not in path.read_bytes(), path.name


@pytest.mark.optimum
def test_the_optimum_route_names_its_tools(exported_via_optimum: Path) -> None:
    tools = set(load_manifest(exported_via_optimum).tool_versions)
    assert tools == {"edgevlm", "openvino", "optimum-intel", "transformers", "torch", "nncf"}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (ExportOptions("fp32"), ("fp32", "fp32", "fp32")),
        (ExportOptions("fp16"), ("fp16", "fp16", "fp16")),
        (ExportOptions("int8"), ("w8a8", "int8", "int8")),
        (ExportOptions("int4"), ("w8a8", "int8", "int4")),
        (ExportOptions("int4", int4=Int4Recipe(all_layers=True)), ("w8a8", "int4", "int4")),
        (ExportOptions("int4", vision_precision="int8"), ("int8", "int8", "int4")),
        (ExportOptions("int8", vision_precision="fp16"), ("fp16", "int8", "int8")),
        (ExportOptions("fp32", lm_precision="int4"), ("fp32", "int8", "int4")),
    ],
)
def test_precision_of_each_part(options: ExportOptions, wanted: tuple[str, str, str]) -> None:
    assert tuple(options.part_precision(part) for part in (VISION, TEXT_EMBEDDINGS, LANGUAGE)) == wanted


@pytest.mark.parametrize("recipe", [{"group_size": 0}, {"group_size": -2}, {"ratio": 1.5}, {"ratio": -0.1}])
def test_a_recipe_out_of_range_is_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Int4Recipe(**recipe)


def weight_types(folder: Path) -> set[str]:
    """Return the element types of the language part's large constants."""
    model = read_ir(folder / load_manifest(folder).submodels[LANGUAGE].file)
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    return {node.get_element_type().get_type_name() for node in constants if np.prod(list(node.shape)) >= 4096}


def test_int4_is_smaller_and_still_answers(exported: Path, exported_int4: Path) -> None:
    full, small = load_manifest(exported), load_manifest(exported_int4)
    assert small.submodels[LANGUAGE].precision == "int4"
    assert small.submodels[LANGUAGE].size_bytes < full.submodels[LANGUAGE].size_bytes / 2
    assert {"u4", "i4"} & weight_types(exported_int4)
    assert small.verification is not None
    assert 0 < small.verification["greedy_agreement"] <= 1
    answer = VLM(exported_int4, F32).generate(photograph("china.jpg"), "What?", max_new_tokens=24)
    assert answer.generated_tokens == 24 or answer.finish_reason == "stop"


@pytest.mark.parametrize(
    "recipe",
    [
        Int4Recipe(group_size=128, sym=True),  # divides no channel here, so it falls back
        Int4Recipe(all_layers=True, ratio=0.7),
        Int4Recipe(awq=True, scale_estimation=True, group_size=32),
        Int4Recipe(gptq=True, group_size=32),
    ],
)
@pytest.mark.parametrize("piece_weights", [native_route.PARTITION_WEIGHTS, 1000])
def test_every_recipe_exports(
    idefics3: Path, tmp_path: Path, recipe: Int4Recipe, piece_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece, and with every layer a piece of its own."""
    monkeypatch.setattr(native_route, "PARTITION_WEIGHTS", piece_weights)
    report = export(idefics3, tmp_path / "out", ExportOptions("int4", int4=recipe, via="native"))
    assert report.manifest.export_options["int4"]["group_size"] == recipe.group_size
    assert report.verification is not None
    assert report.verification.parts[LANGUAGE].cosine > 0.9
    assert report.peak_memory_bytes > 0
    assert report.seconds >= sum(report.stages.values()) * 0.99
    head = {"i8", "u8"} if not recipe.all_layers else {"i8", "u8", "i4", "u4"}
    assert head_type(tmp_path / "out") in head


def head_type(folder: Path) -> str:
    """Return the element type that the LM head's weights are stored in."""
    model = read_ir(folder / load_manifest(folder).submodels[LANGUAGE].file)
    node = next(node for node in model.get_ops() if node.get_friendly_name() == "lm_head").input_value(1).get_node()
    while node.get_type_name() != "Constant":
        node = node.input_value(0).get_node()
    return str(node.get_element_type().get_type_name())


@pytest.mark.optimum
def test_the_optimum_route_compresses_too(idefics3: Path, tmp_path: Path) -> None:
    report = export(idefics3, tmp_path / "out", ExportOptions("int4", via="optimum"))
    assert report.verification is not None
    assert report.verification.parts[LANGUAGE].cosine > 0.9


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_fp16_and_int8_stay_near_the_reference(idefics3: Path, tmp_path: Path, precision: Any) -> None:
    report = export(idefics3, tmp_path / precision, ExportOptions(precision))
    assert report.verification is not None
    assert report.verification.parts[LANGUAGE].cosine > 0.999
    assert report.verification.greedy_agreement > 0.9


def test_w8a8_computes_the_vision_part_in_integers(idefics3: Path, exported: Path, tmp_path: Path) -> None:
    report = export(idefics3, tmp_path / "out", ExportOptions("int8", vision_precision="w8a8"))
    model = read_ir(tmp_path / "out" / report.manifest.submodels[VISION].file)
    assert sum(node.get_type_name() == "FakeQuantize" for node in model.get_ops()) > 10
    assert report.manifest.submodels[VISION].precision == "w8a8"
    assert report.verification is not None
    assert report.verification.parts[VISION].cosine > 0.98
    assert VLM(tmp_path / "out").generate(photograph("china.jpg"), "What?").views == 13


def test_a_narrow_model_is_calibrated_on_every_picture_and_a_wide_one_on_some() -> None:
    panel = default_model()
    processor = Processor(panel, load_manifest(panel))
    pictures = [pair.image for pair in load_pairs() if pair.image]
    assert len(vision_samples(processor, load_pairs(), 192)) == len(pictures)
    assert len(vision_samples(processor, load_pairs(), 576)) == len(pictures) / 3


def test_a_calibration_set_without_pictures_leaves_the_vision_part_the_shipped_ones(
    idefics3: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.jsonl").write_text('{"question": "What is red?"}\n', encoding="utf-8")
    report = export(idefics3, tmp_path / "out", ExportOptions("int8", calibration=tmp_path / "text.jsonl"))
    assert report.manifest.submodels[VISION].precision == "w8a8"
    again = export(idefics3, tmp_path / "shipped", ExportOptions("int8"))
    assert again.verification is not None
    assert again.verification.parts[VISION].cosine > 0.98
    name = again.manifest.submodels[VISION].file.replace(".xml", ".bin")
    assert hash_file(report.folder / name) == hash_file(again.folder / name)


def test_pictures_without_questions_are_for_the_vision_part(idefics3: Path, china: Path, tmp_path: Path) -> None:
    rows = [{"image": str(china)}, {"question": "What is red?"}]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs = load_pairs(tmp_path / "set.jsonl")
    assert [pair.question for pair in with_questions(pairs)] == ["What is red?"]
    assert set(verification_pairs(pairs)) == {"text"}
    report = export(idefics3, tmp_path / "out", ExportOptions("int4", calibration=tmp_path / "set.jsonl"))
    assert report.manifest.submodels[VISION].precision == "w8a8"


@pytest.mark.parametrize("options", [{"precision": "w8a8"}, {"lm_precision": "w8a8"}])
def test_w8a8_is_for_the_vision_part(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="w8a8 is for the vision part alone"):
        ExportOptions(**options)


def test_without_verification_the_manifest_says_so(exported: Path, idefics3: Path, tmp_path: Path) -> None:
    report = export(idefics3, tmp_path / "out", ExportOptions("fp32", verify=False))
    assert report.verification is None
    assert load_manifest(tmp_path / "out").verification is None
    same = [path.name for path in exported.glob("openvino_*.bin")]
    assert [hash_file(tmp_path / "out" / name) for name in same] == [hash_file(exported / name) for name in same]


@pytest.mark.optimum
def test_another_models_outputs_fail_the_verification(idefics3: Path, exported_smolvlm: Path) -> None:
    from transformers import AutoModelForImageTextToText

    vlm = VLM(exported_smolvlm, F32)
    tiles = vlm.processor.preprocess([photograph("china.jpg")], ImageBudget("low"))
    ids = np.asarray(vlm.processor.prompt_ids([user_message("What?", 1)], tiles), np.int64)
    cases = {"picture.input_ids": ids, "picture.pixel_values": pixel_values(tiles[0].views)}
    model = AutoModelForImageTextToText.from_pretrained(idefics3, dtype=torch.float32).eval()
    with torch.inference_mode():
        embeds = model.model.get_image_features(torch.from_numpy(pixel_values(tiles[0].views))[None])
        tokens, logits = greedy(model, torch.from_numpy(ids)[None], {"image_hidden_states": embeds}, 8)
        text_embeds = model.get_input_embeddings()(torch.from_numpy(np.concatenate([ids, tokens[:-1]])))
    reference = {
        "picture.image_embeds": embeds.numpy(),
        "picture.token_ids": tokens,
        "picture.logits": logits,
        "picture.text_embeds": text_embeds.numpy(),
    }
    figures = verify(vlm, cases, reference)
    assert figures.kl_divergence > 0.01
    with pytest.raises(VerificationError, match=r"differs from the reference by .*; nothing was written"):
        check(figures, scales(reference))


@pytest.mark.optimum
def test_the_folder_loads_with_optimum_intel(exported: Path, vlm: VLM) -> None:
    says_the_same_with_optimum_intel(exported, vlm)


def test_a_hub_id_is_taken_from_the_local_cache(idefics3: Path, home: Path, tmp_path: Path) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    repo = home / "hf" / "hub" / "models--someone--tiny"
    shutil.copytree(idefics3, repo / "snapshots" / revision)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision, encoding="utf-8")
    report = export("someone/tiny", tmp_path / "out", ExportOptions("int8", verify=False))
    assert (report.manifest.source, report.manifest.revision) == ("someone/tiny", revision)


_INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from edgevlm_export import ExportOptions, export

signal.signal(signal.SIGINT, signal.default_int_handler)
export(Path(sys.argv[1]), Path(sys.argv[2]), ExportOptions("int4", via="native"))
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@POSIX
def test_a_signal_after_an_export_is_handled(idefics3: Path, tmp_path: Path) -> None:
    """NNCF's many cores must not leave the thread without the stack that it handles signals on."""
    arguments = [sys.executable, "-c", _INTERRUPTED, str(idefics3), str(tmp_path / "out")]
    ended = subprocess.run(arguments, capture_output=True, encoding="utf-8", check=False)
    assert (ended.returncode, ended.stdout) == (0, "interrupted\n"), ended.stderr
