"""What is read of a checkpoint's files, as transformers reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from edgevlm import VLM, GenerationConfig
from edgevlm.errors import SourceError
from edgevlm_export import ExportOptions, export
from edgevlm_export.families import family_config
from edgevlm_export.families.text_models import DEFAULTS
from edgevlm_export.source.checkpoint import open_checkpoint
from tests.conftest import F32, make_checkpoint, photograph

QUICK = ExportOptions("fp32", verify=False, via="native")


@pytest.fixture
def checkpoint(idefics3: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to change."""
    return Path(shutil.copytree(idefics3, tmp_path / "checkpoint"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def reference(folder: Path) -> Any:
    """The checkpoint in transformers."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def tokens(folder: Path, out: Path) -> tuple[int, ...]:
    """What an export of the checkpoint answers about a picture."""
    vlm = VLM(export(folder, out, QUICK).folder, F32)
    return vlm.generate(photograph("china.jpg"), "What?", GenerationConfig(max_new_tokens=16)).token_ids


def logits(folder: Path, out: Path) -> np.ndarray:
    """The logits of an export of the checkpoint at a fixed text's end."""
    session = VLM(export(folder, out, QUICK).folder, F32).language_model.session()
    return session.prefill(session.embed(range(60, 90)))[-1]


def reference_logits(folder: Path) -> np.ndarray:
    """The same of transformers."""
    with torch.inference_mode():
        return reference(folder)(input_ids=torch.arange(60, 90)[None]).logits[0, -1].numpy()


def assumed(config: Any, name: str) -> Any:
    """Return what a config class assumes for what transformers 4 calls so."""
    layers = {"rope_theta": "full_attention", "rope_local_base_freq": "sliding_attention"}
    if name in layers:
        return config.rope_parameters.get(layers[name], config.rope_parameters)["rope_theta"]
    return config.rope_parameters[name] if name == "partial_rotary_factor" else getattr(config, name)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_what_a_config_is_silent_about_is_what_the_class_has(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    config.allow_global_per_layer_attribute_access = True  # Gemma 4's heads differ by layer
    found = {name: assumed(config, name) for name in DEFAULTS[kind]}
    if kind in ("qwen2", "qwen3"):
        found.pop("sliding_window", None)
    assert found == DEFAULTS[kind]


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    "theta beside it": {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}},
    "linear": {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_parameters": {"rope_theta": 500.0, "rope_type": "llama3", **LLAMA3}},
    "llama3, its first length left out": {
        "rope_parameters": {
            "rope_theta": 500.0,
            "rope_type": "llama3",
            **{key: LLAMA3[key] for key in list(LLAMA3)[:3]},
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_theta": 500.0,
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "old name": {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "null": {"rope_theta": 500.0, "rope_scaling": None},
    "neither": {},
}


@pytest.mark.parametrize("form", ROPES)
def test_rope_parameters_in_all_forms(form: str, checkpoint: Path, tmp_path: Path) -> None:
    """Logits show the base and the stretch: in the nominal sizes a wrong one is off by more than 1."""
    for name in ("rope_parameters", "rope_theta", "rope_scaling"):
        edit(checkpoint / "config.json", lambda config, name=name: config["text_config"].pop(name, None))
    edit(checkpoint / "config.json", lambda config: config["text_config"].update(ROPES[form]))
    np.testing.assert_allclose(logits(checkpoint, tmp_path / "out"), reference_logits(checkpoint), atol=1e-4)


@pytest.mark.parametrize(
    ("rope", "line"),
    [
        (
            {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}},
            "does not build RoPE with text_config.rope_parameters.full_attention",
        ),
        ({"rope_type": "default", "mrope_section": [2, 3, 3]}, "RoPE with text_config.rope_parameters.mrope_section"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "does not build RoPE over a part of each head"),
        ({"rope_type": "longrope", "factor": 2.0}, "does not build RoPE of type longrope"),
        ({"rope_type": "yarn", "factor": "four"}, "text_config.rope_parameters is incomplete: "),
        ([10000], "text_config.rope_parameters is not a JSON object"),
    ],
)
def test_rope_that_is_not_built_is_refused(rope: Any, line: str, checkpoint: Path, tmp_path: Path) -> None:
    edit(checkpoint / "config.json", lambda config: config["text_config"].update(rope_parameters=rope))
    with pytest.raises(SourceError) as caught:
        export(checkpoint, tmp_path / "out", QUICK)
    assert line in str(caught.value)


def test_old_shards_and_their_index_beside_a_newer_file_are_overlooked(checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    wanted = tokens(checkpoint, tmp_path / "wanted")
    old = {name: weight * 0.5 for name, weight in weights.items()}
    save_file(old, checkpoint / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    assert tokens(checkpoint, tmp_path / "with-shards") == wanted
    (checkpoint / "model-00001-of-00001.safetensors").unlink()
    assert tokens(checkpoint, tmp_path / "stale") == wanted  # an index alone, which save_pretrained leaves behind


def test_an_index_may_not_lead_out_of_the_checkpoint(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "model.safetensors")
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(SourceError, match=r"names '\.\./model\.safetensors', which is no file of the checkpoint"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("image_seq_len", [{"image_seq_len": 4}, {}])
def test_an_image_processor_within_processor_config(image_seq_len: dict[str, int], checkpoint: Path) -> None:
    wanted, _ = family_config(open_checkpoint(checkpoint))
    settings = json.loads((checkpoint / "preprocessor_config.json").read_text(encoding="utf-8"))
    nested = {"image_processor": settings, "processor_class": "Idefics3Processor", **image_seq_len}
    (checkpoint / "processor_config.json").write_text(json.dumps(nested), encoding="utf-8")
    edit(checkpoint / "preprocessor_config.json", lambda file: file.update(size={"longest_edge": 64}))
    assert family_config(open_checkpoint(checkpoint))[0] == wanted  # the nested one goes first
    (checkpoint / "preprocessor_config.json").unlink()
    assert family_config(open_checkpoint(checkpoint))[0] == wanted


def preprocessor(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit(folder / "preprocessor_config.json", lambda file: file.update(changes))


def text_config(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: edit(folder / "config.json", lambda config: config["text_config"].update(changes))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no image processor": (
        lambda folder: (folder / "preprocessor_config.json").unlink(),
        "has no preprocessor_config.json, and no image_processor in processor_config.json",
    ),
    "scale factor null": (
        lambda folder: edit(folder / "config.json", lambda config: config.update(scale_factor=None)),
        "modality_projection.proj.weight has shape (64, 512), its config asks for (64, 128)",
    ),
    "scale factor 0": (
        lambda folder: edit(folder / "config.json", lambda config: config.update(scale_factor=0)),
        "config.json: scale_factor must be a positive whole number, not 0",
    ),
    "image token of no number": (
        lambda folder: edit(folder / "config.json", lambda config: config.update(image_token_id="<image>")),
        "config.json: image_token_id must be a whole number, not '<image>'",
    ),
    "two shuffles": (
        lambda folder: edit(
            folder / "config.json", lambda config: config["text_config"].update(pixel_shuffle_factor=2)
        ),
        "scale_factor and text_config.pixel_shuffle_factor differ",
    ),
    "a template of other letters": (
        lambda folder: (folder / "chat_template.jinja").write_bytes(b"{# \xfc #}"),
        "chat_template.jinja cannot be read: ",
    ),
    "a size of two": (preprocessor(size=[64, 64]), "preprocessor_config.json: size is not a JSON object"),
    "no tile": (preprocessor(max_image_size={}), "preprocessor_config.json states no max_image_size.longest_edge"),
    "a mean of text": (preprocessor(image_mean="0.5"), "image_mean must be a number or three, not '0.5'"),
    "a filter of no name": (preprocessor(resample=9), "resample must be one of Pillow's filters, 0 to 5, not 9"),
    "weights of another name": (
        lambda folder: edit(folder / "config.json", lambda config: config.update(transformers_weights="x.safetensors")),
        "edgevlm does not know transformers_weights ('x.safetensors')",
    ),
    "a crop": (preprocessor(do_center_crop=True), "edgevlm does not know do_center_crop (True)"),
    "an end of text that is text": (
        lambda folder: edit(folder / "generation_config.json", lambda file: file.update(eos_token_id="end")),
        "generation_config.json: eos_token_id must be a token id or several, not ['end']",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_refused_in_a_line(case: str, checkpoint: Path, tmp_path: Path) -> None:
    damage, line = BROKEN[case]
    damage(checkpoint)
    with pytest.raises(SourceError) as caught:
        export(checkpoint, tmp_path / "out", QUICK)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_null_for_quantization_is_none(checkpoint: Path, tmp_path: Path) -> None:
    edit(checkpoint / "config.json", lambda config: config.update(quantization_config=None))
    assert export(checkpoint, tmp_path / "out", QUICK).folder.is_dir()


@pytest.mark.parametrize("flags", [{"tie_word_embeddings": True}, {}])
def test_a_checkpoint_without_a_head_is_tied_wherever_the_flag_stands(flags: dict[str, bool], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", "smolvlm")
    assert "lm_head.weight" not in load_file(checkpoint / "model.safetensors")
    wanted = logits(checkpoint, tmp_path / "wanted")
    edit(checkpoint / "config.json", lambda config: config["text_config"].pop("tie_word_embeddings", None))
    edit(checkpoint / "config.json", lambda config: config.pop("tie_word_embeddings", None))
    edit(checkpoint / "config.json", lambda config: config.update(flags))
    report = export(checkpoint, tmp_path / "out", QUICK)
    session = VLM(report.folder, F32).language_model.session()
    assert np.array_equal(session.prefill(session.embed(range(60, 90)))[-1], wanted)
    assert report.manifest.overlooked == {}


def test_a_head_left_out_against_the_flags_is_told(checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    told = export(checkpoint, tmp_path / "out", QUICK).manifest.overlooked
    assert told == {
        "config.json: tie_word_embeddings": "false, but there is no lm_head.weight: the embeddings are the head"
    }


def test_special_tokens_are_named_as_transformers_names_them(checkpoint: Path) -> None:
    """special_tokens_map.json counts only where tokenizer_config.json does not describe its added tokens."""
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (checkpoint / "special_tokens_map.json").write_text(json.dumps(names), encoding="utf-8")
    for described in ({}, {"46": {"content": "<end_of_utterance>", "special": True}}):
        if described:
            edit(checkpoint / "tokenizer_config.json", lambda file: file.update(added_tokens_decoder=described))  # noqa: B023
        found = open_checkpoint(checkpoint).named_tokens
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        assert found["eos_token"] == tokenizer.eos_token == ("<end_of_utterance>" if described else "<|im_end|>")


def test_the_end_token_of_a_checkpoint_that_states_none_is_the_tokenizers(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").unlink()
    edit(checkpoint / "config.json", lambda config: config["text_config"].pop("eos_token_id"))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert open_checkpoint(checkpoint).eos_token_ids == (tokenizer.eos_token_id,)


def test_templates_by_name(checkpoint: Path, tmp_path: Path) -> None:
    template = (checkpoint / "chat_template.jinja").read_text(encoding="utf-8")
    (checkpoint / "chat_template.jinja").unlink()
    pairs = [{"name": "default", "template": template}, {"name": "short", "template": "<|im_start|>{{ messages }}"}]
    edit(checkpoint / "tokenizer_config.json", lambda file: file.update(chat_template=pairs))
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "long.jinja").write_text("{# long #}" + template, encoding="utf-8")
    found = open_checkpoint(checkpoint)
    assert found.chat_template() == template
    assert found.chat_template("short") == "<|im_start|>{{ messages }}"
    assert found.chat_template("long") == "{# long #}" + template
    line = r"has no chat template 'other'; --chat-template takes one of: default, long, short"
    with pytest.raises(SourceError, match=line):
        found.chat_template("other")
    folder = export(checkpoint, tmp_path / "out", ExportOptions("fp32", verify=False, chat_template="long")).folder
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == "{# long #}" + template
