"""What Qwen3.5 has alone: gated delta nets, whose state cannot be truncated, and gated attention."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgevlm import VLM, RuntimeConfig
from edgevlm.errors import SourceError
from edgevlm.inputs.chat_template import ChatTemplate, user_message
from edgevlm.runtime import kv_session
from edgevlm_export import ExportOptions, export
from edgevlm_export.families import family_config
from edgevlm_export.source.checkpoint import Checkpoint
from tests.conftest import F32, make_tokenizer, noise
from tests.families.qwen_vl import BOX_TOKENS, TEXT, TOKENS, QwenReference, make_checkpoint
from tests.helpers.graphs import runtime_kinds
from tests.helpers.json_files import read_json
from tests.helpers.published import published_folder

PARTIAL = TEXT["qwen3_5"]["rope_parameters"]
VARIANTS: dict[str, dict[str, Any]] = {
    "a key head for each value head": {"linear_num_key_heads": 4, "linear_value_head_dim": 16},
    "a kernel of two": {"linear_conv_kernel_dim": 2},
    "biases": {"attention_bias": True},
    "whole heads rotated": {"rope_parameters": {**PARTIAL, "partial_rotary_factor": 1.0, "mrope_section": [6, 5, 5]}},
}
PIECES = (0, 2, 3, 90, 91, 140)
"""Where a prompt is cut: pieces shorter than the kernel, of one token, and longer than transformers' chunks of 64."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qwen3_5")


@lru_cache
def checkpoint(folder: Path) -> Path:
    """A checkpoint with the tokens around boxes. Tests must not change it."""
    return make_checkpoint(folder / "saved", "qwen3_5", tokens=[*TOKENS, *BOX_TOKENS])


@lru_cache
def exported(folder: Path, precision: Any) -> VLM:
    """Its export, loaded."""
    options = ExportOptions(precision, via="native", verify=False)
    return VLM(export(checkpoint(folder), folder / precision, options).folder, F32)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prompt_in_pieces_has_the_logits_of_transformers(variant: str, tmp_path: Path) -> None:
    """transformers reads it at once, in chunks; here the states of both kinds go from piece to piece."""
    import torch

    source = make_checkpoint(tmp_path / "saved", "qwen3_5", text_config=VARIANTS[variant])
    vlm = VLM(export(source, tmp_path / "out", ExportOptions("fp32", via="native", verify=False)).folder, F32)
    ids = np.random.default_rng(3).integers(10, 250, PIECES[-1])
    with torch.inference_mode():
        reference = QwenReference(source)
        wanted = reference.model(input_ids=torch.from_numpy(ids)[None]).logits[0].numpy()
    session = vlm.language_model.session()
    found = [session.step(ids[start:stop].tolist()) for start, stop in pairwise(PIECES)]
    assert np.ptp(wanted) > 5
    np.testing.assert_allclose(np.concatenate(found), wanted, atol=reference.logits_atol)
    assert runtime_kinds(vlm.language_model._compiled)["GatedDeltaNet"] == 3


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_delta_net_runs_as_one_operation(precision: Any, folder: Path) -> None:
    """Compressed or not: a Loop over the tokens would take many times as long."""
    kinds = runtime_kinds(exported(folder, precision).language_model._compiled)
    assert kinds["GatedDeltaNet"] == 3
    assert kinds["Loop"] == kinds["TensorIterator"] == kinds["Softmax"] == 0
    assert kinds["ScaledDotProductAttention"] == 1
    assert kinds["RoPE"] == 2
    assert kinds["MemoryInput"] == kinds["MemoryOutput"] == 3 * 2 + 2
    assert kinds["FullyConnected"] == 3 * (3 + 2) + (2 + 2) + 1


def test_a_state_that_is_made_of_itself_is_kept_in_float32(folder: Path) -> None:
    """Also where OpenVINO would take BF16, in which a state that decays slowly does not decay at all."""
    vlm = VLM(exported(folder, "int8").folder, RuntimeConfig(device="CPU", cache=False))
    nodes = vlm.language_model._compiled.get_runtime_model().get_ops()
    found = [each.get_rt_info() for each in nodes]
    nets = [each for each in found if each["layerType"].astype(str) == "GatedDeltaNet"]
    assert [each["runtimePrecision"].astype(str) for each in nets] == ["f32"] * 3


def test_a_prompt_that_goes_on_goes_on_from_the_states(folder: Path) -> None:
    """And one that differs begins anew: a state of a fixed size cannot be truncated."""
    vlm = exported(folder, "fp32")
    session, fresh = vlm.language_model.session(), vlm.language_model.session()
    first, second = [40, 51, 62, 73, 84], [40, 51, 62, 73, 84, 95, 106]
    session.step(first)
    assert session.reuse_prefix(second) == len(first)
    going_on = session.step(second[len(first) :])
    np.testing.assert_allclose(going_on, fresh.step(second)[len(first) :], atol=1e-4)
    changed = [40, 51, 63, 73, 84]
    assert session.reuse_prefix(changed) == 0
    fresh.reset()
    np.testing.assert_allclose(session.step(changed), fresh.step(changed), atol=1e-4)


def test_boxes_are_asked_for_and_read_as_qwen3_vl_has_them(folder: Path) -> None:
    found = exported(folder, "fp32").locate(noise(64, 96), "the red valve", max_locations=2)
    assert all(place.box is not None for place in found.locations)
    assert found.size == (96, 64)


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": True}, {"enable_thinking": False}], ids=str)
@pytest.mark.parametrize("name", ["chat_template.qwen3_5_nothink", "chat_template.qwen3_5_think", "Qwen3.5-4B"])
def test_the_published_templates_render_as_transformers_renders_them(name: str, variables: dict[str, Any]) -> None:
    found = published_folder("Qwen__Qwen3.5-0.8B")
    if found is None:
        pytest.skip("EDGEVLM_PUBLISHED_CONFIGS names no folder with Qwen3.5's chat templates")
    [path] = found.glob(f"{name}*.jinja")
    source = path.read_text(encoding="utf-8")
    answer = {"role": "assistant", "content": "<think>\nA gauge.\n</think>\n\nIt shows 42.7."}
    messages = [user_message("What is shown?", 1), answer, user_message("And now?", 0)]
    wanted = make_tokenizer(TOKENS).apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=True, **variables
    )
    assert ChatTemplate(source, {}).render(messages, variables) == wanted
    assert "It shows 42.7." in wanted and "A gauge." not in wanted


def test_a_published_text_model_is_refused() -> None:
    """Its `model_type` is that of the models with a vision encoder."""
    found = published_folder("lawrence3699__Jev-Style-Qwen3.5-2B-Decision-v2")
    if found is None:
        pytest.skip("EDGEVLM_PUBLISHED_CONFIGS names no folder with a text model of Qwen3.5")
    checkpoint = Checkpoint(found, found.name, None, read_json(found / "config.json"))
    with pytest.raises(SourceError, match=r"is a text model of Qwen3\.5, without a vision encoder"):
        family_config(checkpoint)


def test_a_long_prompt_is_read_in_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which bounds its memory; a step also ends at a mark, and the logits are those of one step."""
    one, two = (exported(folder, "fp32").language_model.session() for _ in range(2))
    ids, counts, read = list(range(60, 200)), [], two._read
    wanted = one.prefill(one.embed(ids), 15, ids)
    monkeypatch.setattr(kv_session, "LONGEST_STEP", 32)
    monkeypatch.setattr(two, "_read", lambda embeds, *others: counts.append(embeds.shape[1]) or read(embeds, *others))
    found = two.prefill(two.embed(ids), 15, ids, marks=[100, 140])
    assert counts == [32, 32, 32, 4, 28, 12]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
