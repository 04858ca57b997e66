"""The two places of a KV cache, blocks under paged attention and OpenVINO's state, give the same answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from edgevlm import VLM, GenerationConfig, OptionError, RuntimeConfig
from edgevlm.cli.options import runtime_config
from edgevlm.cli.run import run
from edgevlm.cli.serve import serve
from edgevlm.cli.watch import watch
from edgevlm.runtime.core import import_openvino, read_ir
from edgevlm.runtime.kv_paged import PagedSession, with_paged_attention
from edgevlm.runtime.kv_session import Session
from edgevlm.runtime.kv_stateful import StatefulSession
from tests.conftest import F32, photograph


def sessions(folder: Path, **options: Any) -> tuple[Session, Session]:
    """Return a paged and a stateful session of one export."""
    config = replace(F32, **options)
    paged, stateful = (
        VLM(folder, replace(config, kv_cache=kind)).language_model.session() for kind in ("paged", "stateful")
    )
    assert isinstance(paged, PagedSession) and isinstance(stateful, StatefulSession)
    return paged, stateful


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(50, 150, count).tolist()


def test_logits_are_the_same_in_pieces_of_any_length(exported: Path) -> None:
    """Pieces end before, at and after the end of a block, and the cache grows twice."""
    paged, stateful = sessions(exported)
    for number, count in enumerate((1, 31, 32, 33, 5, 400, 1, 1, 300)):
        piece = tokens(count, number)
        np.testing.assert_allclose(paged.step(piece), stateful.step(piece), atol=1e-4)
    assert paged.prefix_keys == stateful.prefix_keys


def test_going_back_and_on(exported: Path) -> None:
    paged, stateful = sessions(exported)
    for length in (90, 64, 63, 33, 1, 0):
        for each in (paged, stateful):
            each.step(tokens(100, length))
            each.rewind(length)
            assert each.length == length
        piece = tokens(7, length)
        np.testing.assert_allclose(paged.step(piece), stateful.step(piece), atol=1e-4)
    for each in (paged, stateful):
        each.reset()
    np.testing.assert_allclose(paged.step([60]), stateful.step([60]), atol=1e-4)


def test_only_the_asked_logits_come_back(exported: Path) -> None:
    paged, stateful = sessions(exported)
    embeds = paged.embed(tokens(40))
    logits, wanted = paged.prefill(embeds, 3), stateful.prefill(embeds, 3)
    assert len(logits) == len(wanted) == 3
    np.testing.assert_allclose(logits, wanted, atol=1e-4)


@pytest.mark.parametrize("precision", ["f16", "u8"])
def test_smaller_caches_in_blocks(exported: Path, precision: str) -> None:
    exact = sessions(exported)[0]
    paged = sessions(exported, kv_cache_precision=precision)[0]
    piece = tokens(150)
    drift = np.abs(exact.step(piece) - paged.step(piece)).max()
    assert 0 < drift < 0.5


def test_the_same_greedy_answer(exported: Path) -> None:
    config = GenerationConfig(max_new_tokens=100)
    picture = photograph("china.jpg")
    paged, stateful = (
        VLM(exported, replace(F32, kv_cache=kind)).generate(picture, "What is this?", config)
        for kind in ("paged", "stateful")
    )
    assert paged.token_ids == stateful.token_ids


def test_a_graph_without_fused_attention_keeps_its_state(caplog: pytest.LogCaptureFixture) -> None:
    openvino = import_openvino()
    opset = openvino.opset13
    embeds = opset.parameter([-1, -1, 8], np.float32, name="inputs_embeds")
    embeds.output(0).set_names({"inputs_embeds"})
    logits = opset.matmul(embeds, np.ones((1, 8, 4), np.float32), False, False)
    logits.output(0).set_names({"logits"})
    with caplog.at_level("INFO"):
        assert with_paged_attention(openvino.Model([logits], [embeds], "language")) is None
    assert caplog.messages[-1].startswith("no paged attention: ")


def test_the_hidden_size_stays_known(exported: Path) -> None:
    path = exported / "openvino_language_model.xml"
    hidden = read_ir(path).input("inputs_embeds").get_partial_shape()[-1]
    model = with_paged_attention(read_ir(path))
    assert model is not None
    assert model.input("inputs_embeds").get_partial_shape()[-1] == hidden


@pytest.mark.parametrize(
    ("command", "words", "kind"),
    [
        (run, ["a.png", "Why?"], "stateful"),
        (serve, [], "paged"),
        (watch, [".", "--question", "Why?"], "paged"),
        (watch, [".", "--question", "Why?", "--kv-cache", "stateful"], "stateful"),
    ],
)
def test_commands_that_stay_keep_the_cache_in_blocks(command: click.Command, words: list[str], kind: str) -> None:
    with command.make_context(str(command.name), words) as context:
        assert runtime_config(context.params).kv_cache == kind


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(OptionError, match="KV cache must be one of paged, stateful"):
        RuntimeConfig(kv_cache="elsewhere")  # type: ignore[arg-type]
