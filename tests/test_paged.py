"""The two places of a KV cache, blocks under paged attention and OpenVINO's state, give the same answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
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
from edgevlm.runtime.kv_paged import PagedSession, step_together, with_paged_attention
from edgevlm.runtime.kv_session import Session
from edgevlm.runtime.kv_stateful import StatefulSession
from tests.conftest import F32, noise, photograph


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


def test_steps_of_several_sequences_in_one_inference(exported: Path) -> None:
    """Of one token and of several, at, before and after the end of a block, while the blocks grow."""
    vlm, state = VLM(exported, replace(F32, kv_cache="paged")), VLM(exported, F32)
    paged = [vlm.language_model.session() for _ in range(3)]
    stateful = [state.language_model.session() for _ in paged]
    for number, (one, other) in enumerate(zip(paged, stateful, strict=True)):
        one.step(tokens(31 + 30 * number, number))
        other.step(tokens(31 + 30 * number, number))
    for counts in ((1, 1, 1), (3, 1, 8), (1, 5, 1), (8, 8, 8)):
        pieces = [tokens(count, seed) for seed, count in enumerate(counts)]
        together = step_together([each for each in paged if isinstance(each, PagedSession)], pieces)
        for logits, other, piece in zip(together, stateful, pieces, strict=True):
            np.testing.assert_allclose(logits, other.step(piece), atol=1e-4)
        for one, other in zip(paged[:2], stateful[:2], strict=True):
            one.rewind(one.length - 1)
            other.rewind(other.length - 1)
    assert [each.prefix_keys for each in paged] == [each.prefix_keys for each in stateful]


def test_a_copied_prefix_is_its_own(exported: Path) -> None:
    vlm = VLM(exported, replace(F32, kv_cache="paged"))
    first, second = vlm.language_model.session(), vlm.language_model.session()
    first.step(tokens(70))
    second.step(tokens(5, 1))
    assert second.copy_prefix(first, 70) == 70
    assert second.prefix_keys == first.prefix_keys
    first.rewind(40)
    first.step(tokens(40, 2))  # over what was copied
    fresh = vlm.language_model.session()
    fresh.step(tokens(70))
    piece = tokens(7, 3)
    np.testing.assert_allclose(second.step(piece), fresh.step(piece), atol=1e-4)


def test_blocks_are_given_back(exported: Path) -> None:
    """By a sequence that is rewound and by one that is dropped: the tensors grow by what is in use at once alone."""
    vlm = VLM(exported, replace(F32, kv_cache="paged"))
    pool = vlm.language_model._pool
    assert pool
    vlm.language_model.session().step(tokens(200))
    blocks = len(pool._buffers["value_cache.0"])
    for number in range(3 * blocks):
        session = vlm.language_model.session()
        session.step(tokens(200, number))
        session.rewind(33)
        other = vlm.language_model.session()
        other.step(tokens(90, number))
        del session, other
    assert len(pool._buffers["value_cache.0"]) == blocks


def test_a_prompt_that_comes_while_another_is_answered_copies_what_they_share(exported: Path) -> None:
    picture = photograph("china.jpg")
    config = GenerationConfig(max_new_tokens=12)
    wanted = VLM(exported, F32).generate(picture, "And what is this?", config)
    vlm = VLM(exported, replace(F32, kv_cache="paged", kept_sessions=0))
    with closing(vlm.stream(picture, "What is this?", max_new_tokens=50)) as running:
        next(running)
        found = vlm.generate(picture, "And what is this?", config)
        assert found.token_ids == wanted.token_ids
        assert found.cached_tokens >= found.prompt_tokens // 2
        assert vlm.generate(picture, "And what is this?", config, cache_salt="another").cached_tokens == 0
        rest = "".join(map(str, running))
    assert vlm.generate(picture, "What is this?", max_new_tokens=50).text.endswith(rest)


def test_threads_share_the_blocks(exported: Path) -> None:
    """While they grow, are given back, copied and read, each answer is the one of a model that answers nothing else."""
    vlm = VLM(exported, replace(F32, kv_cache="paged"))
    config = GenerationConfig(max_new_tokens=16)
    asked = [(noise(40, 40 + 20 * (number % 3)), "What is it? " * (1 + 5 * number)) for number in range(6)]
    alone = VLM(exported, F32)
    wanted = [alone.generate(*each, config).token_ids for each in asked]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: vlm.generate(*each, config).token_ids, asked * 3))
    assert found == wanted * 3
