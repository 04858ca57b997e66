"""PEFT adapters merged at export, against peft's own `merge_and_unload`."""

from __future__ import annotations

import hashlib
import json
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from edgevlm import VLM, ImageBudget, OptionError
from edgevlm.errors import SourceError
from edgevlm.manifest import load_manifest
from edgevlm_export import ExportOptions, export
from edgevlm_export.families import exporter
from edgevlm_export.pipeline import default_name, describe
from edgevlm_export.routes import optimum
from edgevlm_export.source.adapter import HEAD, open_adapter, plain_name
from edgevlm_export.source.changes import BLOCK, Change, LowRank, merge
from edgevlm_export.source.checkpoint import open_checkpoint
from edgevlm_export.source.merged_weights import MergedWeights
from edgevlm_export.source.safetensors_reader import RawTensor, Weights
from tests.conftest import F32, image_processor, make_checkpoint, make_tokenizer, photograph
from tests.families import BUILDERS, qwen_vl
from tests.families.idefics3 import reference_processor
from tests.helpers.adapters import (
    edit_config,
    edit_tensors,
    load,
    merged_by_peft,
    move,
    quietly,
    tensors_of,
    train,
)
from tests.helpers.command import cli
from tests.helpers.json_files import read_json, write_json
from tests.test_native import stored_as
from tests.test_package import run_python, top_level
from tests.test_parity import check_parity

QUICK = ExportOptions("fp32", via="native", verify=False)
TABLE = "embed_tokens.weight"
CONVOLUTIONS = ["patch_embedding", "patch_embed.proj"]
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "DoRA and rsLoRA": {"use_dora": True, "use_rslora": True},
    "every linear layer": {"target_modules": "all-linear", "init_lora_weights": "gaussian"},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 6},
        "alpha_pattern": {"down_proj": 3, "layers.0.self_attn.q_proj": 7},
    },
    "convolution": {"target_modules": CONVOLUTIONS},
    "convolution, DoRA": {"target_modules": CONVOLUTIONS, "use_dora": True},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "embeddings, DoRA": {"target_modules": ["embed_tokens"], "use_dora": True},
    "tokens": {"trainable_token_indices": [3, 70, 71]},
    "modules": {"modules_to_save": ["modality_projection", "merger", "input_layernorm"]},
    "table": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "biases of LoRA": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "added bias": {"target_modules": ["fc1", "qkv"], "lora_bias": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "MiCA": {"init_lora_weights": "mica"},
}
UNTIED = {
    "LoRA on the head": {"target_modules": ["lm_head", "q_proj"]},
    "tokens and head": {"trainable_token_indices": {"embed_tokens": [3, 70], "lm_head": [5]}},
}
TIED = {"table with its head": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}}
CASES = [
    *(("idefics3", kind) for kind in KINDS | UNTIED),
    *(("smolvlm", kind) for kind in KINDS | TIED),
    *(("qwen2_5_vl", kind) for kind in ("LoRA", "DoRA", "convolution, DoRA", "tokens", "modules", "all biases")),
]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL checkpoint as published."""
    folder = tmp_path_factory.mktemp("qwen")
    return qwen_vl.as_published(qwen_vl.make_checkpoint(folder / "saved", "qwen2_5_vl"), folder / "tiny-qwen")


@pytest.fixture(scope="module")
def bases(idefics3: Path, smolvlm: Path, qwen: Path) -> dict[str, Path]:
    return {"idefics3": idefics3, "smolvlm": smolvlm, "qwen2_5_vl": qwen}


@pytest.fixture(scope="module")
def lora(idefics3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain adapter of the tiny Idefics3. Tests must not change it."""
    folder = tmp_path_factory.mktemp("lora") / "my-sft"
    train(idefics3, folder)
    return folder


@pytest.fixture
def adapter(lora: Path, tmp_path: Path) -> Path:
    """A copy of the adapter, to change."""
    return Path(shutil.copytree(lora, tmp_path / "my-sft"))


def merged(checkpoint: Path, *adapters: Path, weights: tuple[float, ...] = ()) -> MergedWeights:
    pairs = zip(adapters, weights or [1.0] * len(adapters), strict=True)
    opened = open_checkpoint(checkpoint)
    return MergedWeights(opened, [open_adapter(*pair) for pair in pairs], exporter(opened).renamed)


def check_merged(
    checkpoint: Path, weights: MergedWeights, expected: dict[str, np.ndarray], limit: float = 1e-6
) -> None:
    """Compare every tensor with peft's, and see that some differ from the checkpoint's.

    The limit is one of the value where that is above 1: peft computes in float32.
    """
    opened, changed = open_checkpoint(checkpoint), 0
    base, renamed = Weights(opened), exporter(opened).renamed
    for name in weights:
        found, plain = weights.get(name).float32(), plain_name(name, renamed)
        if plain not in expected:  # such as a file's layers for multi-token prediction, which no model has
            np.testing.assert_array_equal(found, base.get(name).float32())
            continue
        wanted = expected[plain]
        assert (np.abs(found - wanted) <= limit * np.maximum(1, np.abs(wanted))).all(), name
        changed += name not in base or np.abs(found - base.get(name).float32()).max() > 0.01
    assert changed > 0
    missing = expected.keys() - {plain_name(name, renamed) for name in weights}
    assert missing <= {HEAD}
    if missing:  # tied still
        table = next(array for name, array in expected.items() if name.endswith(TABLE))
        np.testing.assert_array_equal(expected[HEAD], table)


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_merged_tensors_equal_those_of_merge_and_unload(
    family: str, kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    train(bases[family], tmp_path / "adapter", **(KINDS | UNTIED | TIED)[kind])
    expected = tensors_of(merged_by_peft(bases[family], tmp_path / "adapter"))
    check_merged(bases[family], merged(bases[family], tmp_path / "adapter"), expected)


@pytest.mark.parametrize("family", BUILDERS)
def test_names_of_every_layout_are_found(family: str, tmp_path: Path) -> None:
    """Adapters have the names of transformers' modules, files those that this or an older version saved."""
    variants = BUILDERS[family].variants
    layouts = [each for each in ("saved", "held", "published", "old") if each in variants] or [*variants][:1]
    for layout in layouts:  # of each its own, for configs that state less have larger sizes
        folder, adapter = variants[layout](tmp_path / layout), tmp_path / f"adapter-{layout}"
        train(folder, adapter, target_modules="all-linear", modules_to_save=["lm_head"])
        check_merged(folder, merged(folder, adapter), tensors_of(merged_by_peft(folder, adapter)))


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (
            "llava",
            {
                "model.language_model.": "language_model.model.",
                "model.vision_tower.": "vision_tower.vision_model.",
                "model.multi_modal_projector.": "multi_modal_projector.",
                "lm_head.": "language_model.lm_head.",
            },
        ),
        ("lfm2_vl", {"model.vision_tower.": "model.vision_tower.vision_model."}),
        ("qwen2_vl", {"model.language_model.": "model.", "model.visual.": "visual."}),
    ],
)
def test_adapters_with_the_names_of_transformers_4(family: str, names: dict[str, str], tmp_path: Path) -> None:
    variants = BUILDERS[family].variants
    checkpoint = variants.get("saved", variants["held"])(tmp_path)
    train(checkpoint, tmp_path / "new", target_modules="all-linear", modules_to_save=["lm_head"])
    shutil.copytree(tmp_path / "new", tmp_path / "old")

    def old(name: str) -> str:
        inner = name.removeprefix("base_model.model.")
        start = next((each for each in names if inner.startswith(each)), None)
        return f"base_model.model.{inner.replace(start, names[start], 1)}" if start else name

    edit_tensors(tmp_path / "old", lambda tensors: {old(name): array for name, array in tensors.items()})
    assert load_file(tmp_path / "old/adapter_model.safetensors").keys() != load_file(
        tmp_path / "new/adapter_model.safetensors"
    )
    found, expected = (merged(checkpoint, tmp_path / each) for each in ("old", "new"))
    for name in expected:
        np.testing.assert_array_equal(found.get(name).array, expected.get(name).array)
    edit_tensors(tmp_path / "old", lambda tensors: tensors | load_file(tmp_path / "new/adapter_model.safetensors"))
    with pytest.raises(SourceError, match="which are the same weight"):
        merged(checkpoint, tmp_path / "old")


@pytest.mark.parametrize("family", ["idefics3", "smolvlm", "qwen2_5_vl"])
def test_an_export_answers_as_the_merged_model_does(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Token for token, and the same image embeddings and logits: the graphs read what was merged."""
    kind = {"use_dora": True, "target_modules": "all-linear", "trainable_token_indices": [70, 71]}
    train(bases[family], tmp_path / "adapter", **kind)
    report = export(bases[family], tmp_path / "out", replace(QUICK, adapters=(tmp_path / "adapter",)))
    reference = BUILDERS[family].reference(bases[family])
    plain = reference.run([photograph("china.jpg")], "What?")[0]
    reference.model = merged_by_peft(bases[family], tmp_path / "adapter")
    reference.model.generation_config.eos_token_id = None
    assert np.abs(reference.run([photograph("china.jpg")], "What?")[0] - plain).max() > 1
    for images in ([photograph("china.jpg")], []):
        check_parity(reference, VLM(report.folder, F32), images)


@pytest.mark.parametrize(
    "kind",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    ],
)
def test_an_adapter_of_a_tied_head_is_what_it_was_in_training(
    kind: dict[str, Any], smolvlm: Path, tmp_path: Path
) -> None:
    """`merge_and_unload` changes the one tensor for each of the two, of which peft warns."""
    model = train(smolvlm, tmp_path / "adapter", **kind)
    folder = export(smolvlm, tmp_path / "out", replace(QUICK, adapters=(tmp_path / "adapter",))).folder
    session = VLM(folder, F32).language_model.session()
    ids = np.arange(60, 90)
    with torch.inference_mode():
        expected = model(input_ids=torch.from_numpy(ids)[None]).logits[0].numpy()
    np.testing.assert_allclose(session.prefill(session.embed(ids), len(ids)), expected, atol=1e-4)


def test_lora_on_a_tied_table_is_told(smolvlm: Path, idefics3: Path, tmp_path: Path) -> None:
    notes = []
    for number, (base, kind) in enumerate([(smolvlm, "embeddings"), (smolvlm, "tokens"), (idefics3, "embeddings")]):
        train(base, tmp_path / str(number), **KINDS[kind])
        checkpoint = open_checkpoint(base)
        (record,) = describe(merged(base, tmp_path / str(number)), checkpoint)
        notes.append(record.notes)
    told = "its LoRA on the embedding table changes the LM head, which is the same tensor, as merge_and_unload does,"
    assert notes == [(f"{told} though not in training",), (), ()]


def test_a_stored_copy_of_a_tied_head_changes_with_the_table(smolvlm: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(smolvlm, tmp_path / "copied"))
    tensors = load_torch(smolvlm / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.text_model.embed_tokens.weight"].clone()
    save_torch(tensors, copied / "model.safetensors", {"format": "pt"})
    train(smolvlm, tmp_path / "adapter", **KINDS["tokens"])
    weights = merged(copied, tmp_path / "adapter")
    head, table = (weights.get(name).array for name in ("lm_head.weight", "model.text_model.embed_tokens.weight"))
    np.testing.assert_array_equal(head, table)
    assert not np.array_equal(head, tensors["lm_head.weight"].numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_16_bits_stays_in_16_bits(dtype: torch.dtype, idefics3: Path, tmp_path: Path) -> None:
    base = stored_as(idefics3, tmp_path / "base", dtype)
    train(base, tmp_path / "adapter", target_modules="all-linear")
    expected = tensors_of(merged_by_peft(base, tmp_path / "adapter", dtype))
    weights = merged(base, tmp_path / "adapter")
    for name in weights:
        found, wanted = weights.get(name), expected[plain_name(name, {})]
        assert found.dtype == {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
        assert (found.float32() == wanted).mean() > 0.99  # a sum in float64 and one in float32 may round apart
        np.testing.assert_allclose(found.float32(), wanted, rtol=2**-7, atol=1e-6)


def test_an_adapter_in_16_bits(idefics3: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_torch({name: each.to(torch.bfloat16) for name, each in load_torch(path).items()}, path, {"format": "pt"})
    check_merged(idefics3, merged(idefics3, adapter), tensors_of(merged_by_peft(idefics3, adapter)))


def test_weighted_adapters_are_peft_s_cat(idefics3: Path, tmp_path: Path) -> None:
    """Their products added, each times its weight; `linear` mixes the halves of different products."""
    for seed, name in enumerate(("first", "second")):
        train(idefics3, tmp_path / name, seed, use_rslora=bool(seed), lora_alpha=6 + seed)
    weights, found = (0.7, -0.4), {}
    for kind in ("cat", "linear"):
        model = quietly(PeftModel.from_pretrained, load(idefics3), tmp_path / "first", adapter_name="first")
        quietly(model.load_adapter, tmp_path / "second", adapter_name="second")
        quietly(model.add_weighted_adapter, ["first", "second"], list(weights), "both", combination_type=kind)
        model.set_adapter("both")
        found[kind] = tensors_of(quietly(model.merge_and_unload))
    ours = merged(idefics3, tmp_path / "first", tmp_path / "second", weights=weights)
    check_merged(idefics3, ours, found["cat"])
    assert max(np.abs(found["cat"][name] - found["linear"][name]).max() for name in found["cat"]) > 0.01


@pytest.mark.parametrize("kind", ["DoRA", "embeddings", "tokens", "modules"])
def test_a_weight_scales_the_difference(kind: str, idefics3: Path, tmp_path: Path) -> None:
    train(idefics3, tmp_path / "adapter", **KINDS[kind])
    base, whole = Weights(open_checkpoint(idefics3)), merged(idefics3, tmp_path / "adapter")
    half = merged(idefics3, tmp_path / "adapter", weights=(0.5,))
    for name in base:
        middle = (base.get(name).float32() + whole.get(name).float32()) / 2
        np.testing.assert_allclose(half.get(name).float32(), middle, atol=1e-6)


def test_pissa_is_refused_until_it_is_saved_as_lora(idefics3: Path, tmp_path: Path) -> None:
    model = train(idefics3, tmp_path / "pissa", init_lora_weights="pissa", target_modules=["q_proj"])
    with pytest.raises(SourceError, match="PiSSA changed the model's own weights when training began, so the adapter"):
        open_adapter(tmp_path / "pissa")
    torch.manual_seed(0)
    model = quietly_trained_pissa(idefics3, tmp_path)
    expected = tensors_of(quietly(model.merge_and_unload))
    check_merged(idefics3, merged(idefics3, tmp_path / "converted"), expected, limit=1e-5)


def quietly_trained_pissa(checkpoint: Path, folder: Path) -> Any:
    """Return a model trained from PiSSA's start, saved into `folder / "converted"` as LoRA."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=["q_proj"])
    model = quietly(get_peft_model, load(checkpoint), config)
    model.peft_config["default"].init_lora_weights = True
    quietly(model.save_pretrained, folder / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    move(model, 3)
    quietly(model.save_pretrained, folder / "converted", path_initial_model_for_weight_conversion=folder / "start")
    return model


def from_trl(folder: Path, **options: Any) -> Path:
    """Add the files of a processor to an adapter's folder, as TRL's trainers save them beside transformers 5."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "<|im_start|>User:<image>{{ messages[0]['content'][-1]['text'] }}<end_of_utterance>\n"
    reference_processor(tokenizer, image_processor("idefics3", **options), None).save_pretrained(folder)
    (folder / "README.md").write_text("# my-sft", encoding="utf-8")
    return folder


def test_tokenizer_template_and_processor_come_from_the_adapter(idefics3: Path, adapter: Path, tmp_path: Path) -> None:
    """A DPO example of TRL trains without image splitting: then there is one view at every detail, and it is said."""
    from_trl(adapter, do_image_splitting=False)
    report = export(idefics3, tmp_path / "out", replace(QUICK, adapters=(adapter,)))
    for name, origin in (("tokenizer.json", adapter), ("chat_template.jinja", adapter), ("config.json", idefics3)):
        assert (report.folder / name).read_bytes() == (origin / name).read_bytes()
    assert not {"README.md", "adapter_config.json", "preprocessor_config.json"} & {
        path.name for path in report.folder.iterdir()
    }
    assert report.manifest.family_config["preprocessing"]["do_image_splitting"] is False
    vlm, plain = VLM(report.folder, F32), VLM(export(idefics3, tmp_path / "plain", QUICK).folder, F32)
    views = [len(each.processor.preprocess([photograph("china.jpg")], ImageBudget("high"))[0]) for each in (vlm, plain)]
    assert views[0] == 1 < views[1]
    (record,) = report.manifest.adapters
    assert [note for note in record.notes if "trained without image splitting" in note]


def test_the_settings_of_the_adapter_s_pictures_are_told(idefics3: Path, adapter: Path, tmp_path: Path) -> None:
    settings = from_trl(adapter) / "processor_config.json"
    stated = read_json(settings)
    stated["image_processor"]["size"] = {"longest_edge": 128}
    write_json(settings, stated)
    (record,) = export(idefics3, tmp_path / "out", replace(QUICK, adapters=(adapter,))).manifest.adapters
    assert record.notes == (
        "pictures are seen with its size, {'longest_edge': 128}, not the checkpoint's {'longest_edge': 256}",
    )


def test_an_adapter_without_files_of_its_own_takes_the_checkpoint_s(idefics3: Path, lora: Path, tmp_path: Path) -> None:
    report = export(idefics3, tmp_path / "out", replace(QUICK, adapters=(lora,)))
    plain = export(idefics3, tmp_path / "plain", QUICK)
    assert report.manifest.family_config == plain.manifest.family_config
    assert {path.name for path in report.folder.iterdir()} == {path.name for path in plain.folder.iterdir()}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (report.folder / name).read_bytes() == (plain.folder / name).read_bytes()


def test_the_manifest_says_which_adapters_with_what_weight(idefics3: Path, lora: Path, tmp_path: Path) -> None:
    options = replace(QUICK, adapters=(lora,), adapter_weights=(0.5,))
    manifest = load_manifest(export(idefics3, tmp_path / "out", options).folder)
    (record,) = manifest.adapters
    assert (record.name, record.base, record.weight, record.notes) == ("my-sft", "tiny-idefics3", 0.5, ())
    assert record.files == {
        name: hashlib.sha256((lora / name).read_bytes()).hexdigest()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert record.config.items() >= {"r": 4, "lora_alpha": 10, "peft_type": "LORA"}.items()
    assert record.tensors == len(load_file(lora / "adapter_model.safetensors")) // 2
    for path in (tmp_path / "out").iterdir():
        assert str(lora.parent).encode() not in path.read_bytes(), path.name


def test_the_default_name_has_the_adapters(idefics3: Path, lora: Path) -> None:
    name = default_name(open_checkpoint(idefics3), replace(QUICK, adapters=(lora,)))
    assert name == "tiny-idefics3-my-sft-fp32"


def test_another_base_is_told(idefics3: Path, adapter: Path, tmp_path: Path) -> None:
    edit_config(adapter, base_model_name_or_path="/home/someone/SmolVLM-9B")
    (record,) = export(idefics3, tmp_path / "out", replace(QUICK, adapters=(adapter,))).manifest.adapters
    assert record.notes == ("it was trained on SmolVLM-9B, and its shapes fit tiny-idefics3, too",)


@pytest.mark.parametrize("name", ["someone/tiny-idefics3", "C:\\models\\tiny-idefics3", "x/models--a--tiny-idefics3/y"])
def test_the_same_base_under_another_path(name: str, idefics3: Path, adapter: Path, tmp_path: Path) -> None:
    edit_config(adapter, base_model_name_or_path=name)
    (record,) = export(idefics3, tmp_path / "out", replace(QUICK, adapters=(adapter,))).manifest.adapters
    assert record.notes == ()


def test_the_command_tells_what_it_merged(idefics3: Path, lora: Path, tmp_path: Path) -> None:
    arguments = ("export", idefics3, "--fp32", "--no-verify", "--adapter", lora, "--weight", "0.5", "--force")
    result = cli(*arguments, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    digest = hashlib.sha256((lora / "adapter_model.safetensors").read_bytes()).hexdigest()[:12]
    assert f"adapter my-sft merged with weight 0.5: 12 tensors changed (SHA-256 {digest}…)" in result.output
    found = json.loads(cli(*arguments, "-o", tmp_path / "out", "--json").stdout)
    assert [(each["name"], each["weight"]) for each in found["adapters"]] == [("my-sft", 0.5)]


def no_folder(adapter: Path) -> None:
    shutil.rmtree(adapter)


def inside(adapter: Path) -> None:
    """TRL's output folder of a run that saved no last state."""
    shutil.move(adapter, adapter.with_name("moved"))
    shutil.move(adapter.with_name("moved"), adapter / "checkpoint-500")


def in_bin(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return lambda adapter: edit_tensors(
        adapter, lambda tensors: {name.replace(old, new): array for name, array in tensors.items()}
    )


def changed(end: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda adapter: edit_tensors(
        adapter,
        lambda tensors: {
            name: np.ascontiguousarray(change(array)) if name.endswith(end) else array
            for name, array in tensors.items()
        },
    )


def stated(**changes: object) -> Callable[[Path], None]:
    return lambda adapter: edit_config(adapter, **changes)


Q_PROJ = "model.text_model.layers.0.self_attn.q_proj"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "not there": (no_folder, "my-sft: there is no such folder"),
    "no adapter": (
        lambda adapter: (adapter / "adapter_config.json").unlink(),
        "my-sft has no adapter_config.json, so it is no PEFT adapter",
    ),
    "in a folder below": (inside, "so it is no PEFT adapter; checkpoint-500 in it is one"),
    "a checkpoint": (
        lambda adapter: (adapter / "adapter_config.json").rename(adapter / "config.json"),
        "so it is no PEFT adapter; it is a whole checkpoint, which is exported as SOURCE",
    ),
    "pickled": (
        in_bin,
        "has adapter_model.bin and no adapter_model.safetensors; save the adapter anew with safetensors",
    ),
    "no weights": (
        lambda adapter: (adapter / "adapter_model.safetensors").unlink(),
        "has no weights and no adapter_model.safetensors; save the adapter anew",
    ),
    "bad config": (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "adapter_config.json cannot be"),
    "truncated": (
        lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b"abc"),
        "adapter_model.safetensors is damaged or truncated",
    ),
    "another method": (
        stated(peft_type="IA3"),
        "edgevlm merges adapters of peft_type LORA, DoRA among them, not 'IA3'",
    ),
    "no method": (stated(peft_type=None), "adapters of peft_type LORA, DoRA among them, not None"),
    "QALoRA": (stated(use_qalora=True), "use_qalora is QALoRA, which edgevlm does not merge; merge it with peft's"),
    "BD-LoRA": (stated(use_bdlora={"nblocks": 2}), "use_bdlora is BD-LoRA, which edgevlm does not merge"),
    "Arrow": (stated(arrow_config={"top_k": 2}), "arrow_config is Arrow, which chooses among adapters for each token"),
    "aLoRA": (
        stated(alora_invocation_tokens=[3]),
        "alora_invocation_tokens is activated LoRA, which acts from certain",
    ),
    "KaSA": (stated(kasa_config={"beta": 1.0}), "kasa_config is KaSA, which edgevlm does not merge"),
    "MonteCLoRA": (stated(monteclora_config={"a": 1}), "monteclora_config is MonteCLoRA, which edgevlm does not merge"),
    "repeated layers": (stated(layer_replication=[[0, 2]]), "layer_replication is repeated layers, which edgevlm does"),
    "parameters": (stated(target_parameters=["a"]), "target_parameters is LoRA on parameters instead of modules"),
    "OLoRA": (stated(init_lora_weights="olora"), "OLoRA changed the model's own weights when training began"),
    "CorDA": (stated(init_lora_weights="corda"), "CorDA changed the model's own weights when training began"),
    "LoftQ": (stated(init_lora_weights="loftq"), "LoftQ changed the model's own weights when training began"),
    "LoRA-GA": (stated(init_lora_weights="lora_ga"), "LoRA-GA changed the model's own weights when training began"),
    "PiSSA by iterations": (stated(init_lora_weights="pissa_niter_4"), "PiSSA changed the model's own weights when"),
    "another start": (stated(init_lora_weights="new"), "edgevlm does not know init_lora_weights 'new'; merge it with"),
    "a new key": (
        stated(use_future=True),
        "edgevlm does not know use_future, which may change what the adapter does; --ignore-config-key use_future",
    ),
    "no rank": (stated(r=0), "adapter_config.json: r must be a positive whole number, not 0"),
    "another rank": (stated(r=8), "are not of rank 8, as adapter_config.json says; save the adapter anew"),
    "bad pattern": (stated(rank_pattern={"(": 2}), "rank_pattern is not numbers by names of modules"),
    "bad number": (stated(alpha_pattern={"q_proj": "a"}), "alpha_pattern must hold numbers above 0"),
    "unknown tensor": (
        renamed("q_proj", "query"),
        "which matches no weight of the checkpoint; it was trained on another architecture",
    ),
    "half a product": (
        lambda adapter: edit_tensors(adapter, lambda each: {n: a for n, a in each.items() if "lora_B" not in n}),
        "without its other half; the adapter was not saved whole",
    ),
    "another width": (
        changed(f"{Q_PROJ}.lora_A.weight", lambda array: array[:, :48]),
        f"{Q_PROJ}.lora_A.weight (4, 48)",
    ),
    "sharded": (
        changed(f"{Q_PROJ}.lora_A.weight", lambda array: array[:0]),
        "not weights of F32, F16, BF16; save the adapter anew, gathered where training was sharded",
    ),
    "integers": (
        changed("lora_A.weight", lambda array: array.astype(np.int8)),
        "is I8 of shape (4, 160), not weights of",
    ),
    "nothing": (lambda adapter: edit_tensors(adapter, lambda _: {}), "holds no tensors; the adapter was saved without"),
    "damaged": (
        changed("lora_B.weight", lambda array: array * np.float32(np.nan)),
        "holds infinite values or NaN once",
    ),
    "tokens without ids": (
        lambda adapter: edit_tensors(
            adapter,
            lambda each: (
                each
                | {
                    "base_model.model.model.text_model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones(
                        (2, 64), np.float32
                    )
                }
            ),
        ),
        "trainable_token_indices does not say which rows",
    ),
    "added tokens": (
        lambda adapter: edit_tensors(
            adapter,
            lambda each: (
                each
                | {"base_model.model.model.text_model.embed_tokens.base_layer.weight": np.ones((999, 64), np.float32)}
            ),
        ),
        "tokens were added in training; merge it with peft's merge_and_unload, where that can, and export what",
    ),
    "a bias where there is none": (
        lambda adapter: edit_tensors(
            adapter, lambda each: each | {f"base_model.model.{Q_PROJ}.lora_B.bias": np.ones(64, np.float32)}
        ),
        "q_proj.lora_B.bias, a bias that the checkpoint has no place for",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_refused(case: str, idefics3: Path, adapter: Path, tmp_path: Path) -> None:
    damage, line = BROKEN[case]
    damage(adapter)
    with pytest.raises(SourceError) as caught:
        export(idefics3, tmp_path / "out", replace(QUICK, adapters=(adapter,)))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_key_may_be_ignored(idefics3: Path, adapter: Path, tmp_path: Path) -> None:
    edit_config(adapter, use_future=True)
    options = replace(QUICK, adapters=(adapter,), ignore_config_keys=("use_future",))
    assert len(export(idefics3, tmp_path / "out", options).manifest.adapters) == 1


def test_an_adapter_of_another_size(lora: Path, tmp_path: Path) -> None:
    wide = make_checkpoint(tmp_path / "wide", "idefics3", hidden_size=96)
    with pytest.raises(SourceError, match=r"of the checkpoint is \(96, 160\); it was trained on another model"):
        export(wide, tmp_path / "out", replace(QUICK, adapters=(lora,)))


def test_an_adapter_of_another_family(qwen: Path, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="matches no weight of the checkpoint; it was trained on another architectu"):
        export(qwen, tmp_path / "out", replace(QUICK, adapters=(lora,)))


def test_an_adapter_is_no_source(lora: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"is a PEFT adapter of .*tiny-idefics3; export the model that .* --adapter"):
        export(lora, tmp_path / "out", QUICK)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"adapter_weights": (0.5,)}, "--weight is given 1 times and --adapter 0 times; give one weight for each"),
        ({"adapters": (Path("a"), Path("b")), "adapter_weights": (0.5,)}, "given 1 times and --adapter 2 times"),
        ({"adapters": (Path("a"),), "adapter_weights": (float("nan"),)}, "--weight must be a finite number"),
        ({"adapters": (Path("a"),), "via": "optimum"}, "--via optimum merges no adapters; leave out --adapter, or use"),
        ({"adapters": (Path("a"),), "via": "onnx"}, "--via onnx merges no adapters; leave out --adapter, or use"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], line: str) -> None:
    with pytest.raises(OptionError) as caught:
        ExportOptions(**options)
    assert line in str(caught.value)


def test_no_other_route_merges(lora: Path, idefics3: Path, tmp_path: Path) -> None:
    """Where the native route does not cover the decoder, or there are ONNX files alone."""
    sliding = Path(shutil.copytree(idefics3, tmp_path / "sliding"))
    config = read_json(sliding / "config.json")
    config["text_config"] |= {"use_sliding_window": True, "sliding_window": 64}
    write_json(sliding / "config.json", config)
    with pytest.raises(OptionError, match="and no other route covers --adapter; leave it out"):
        export(sliding, tmp_path / "out", ExportOptions(adapters=(lora,)))
    for name in ("vision_encoder", "embed_tokens", "decoder_model_merged"):
        (sliding / f"{name}.onnx").touch()
    (sliding / "model.safetensors").unlink()
    with pytest.raises(OptionError, match="--adapter needs safetensors, which the checkpoint lacks; leave it out"):
        export(sliding, tmp_path / "out", ExportOptions(adapters=(lora,)))
    assert optimum.LIBRARIES  # which the error comes before


EXPORT_WITHOUT_PEFT = """
import json, sys

for name in ("torch", "transformers", "peft", "accelerate"):
    sys.modules[name] = None  # importing it fails, as where it is not installed
from pathlib import Path
from edgevlm_export import ExportOptions, export

if __name__ == "__main__":
    options = ExportOptions("int8", vision_precision="int8", adapters=(Path(sys.argv[2]),))
    report = export(sys.argv[1], Path(sys.argv[3]), options)
    loaded = sorted(name for name, module in sys.modules.items() if module is not None)
    print(json.dumps({"modules": loaded, **report.to_dict()}))
"""


def test_an_export_with_an_adapter_needs_neither_torch_nor_peft(idefics3: Path, lora: Path, tmp_path: Path) -> None:
    found: Any = run_python(EXPORT_WITHOUT_PEFT, str(idefics3), str(lora), str(tmp_path / "out"))
    assert not top_level(found["modules"]) & {"torch", "transformers", "peft", "accelerate"}
    assert [each["name"] for each in found["adapters"]] == ["my-sft"]
    assert found["verification"]["parts"]["language"]["cosine"] > 0.99


@pytest.mark.parametrize("of_columns", [False, True])
def test_merging_holds_a_tensor_and_some_blocks_of_it(of_columns: bool) -> None:
    """In float64 the whole would be four times the tensor."""
    shape, rank = (8192, 2048), 4
    random = np.random.default_rng(5)
    tensor = RawTensor(random.integers(0x3F00, 0x3F80, shape).astype(np.uint16), "bf16")
    left, right = random.normal(size=(shape[0], rank)), random.normal(size=(rank, shape[1]))
    magnitude = np.ones(shape[1] if of_columns else shape[0])
    change = Change(low_rank=LowRank(0.1 * left, right, magnitude, of_columns))
    tracemalloc.start()
    found = merge(tensor, [(1.0, change)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.array.shape == shape
    assert peak < tensor.array.nbytes + 10 * 8 * BLOCK


@pytest.mark.parametrize("kind", ["convolution, DoRA", "embeddings, DoRA", "tokens"])
def test_blocks_of_rows_make_the_same_tensors(
    kind: str, idefics3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With blocks of a row each, rows of a product, lengths of columns and single tokens come where they belong."""
    train(idefics3, tmp_path / "adapter", **KINDS[kind])
    expected = merged(idefics3, tmp_path / "adapter")
    arrays = {name: expected.get(name).array for name in expected}
    monkeypatch.setattr("edgevlm_export.source.changes.BLOCK", 1)
    for name, array in arrays.items():
        np.testing.assert_allclose(expected.get(name).array, array, atol=1e-6)
