"""A loop is ended and said to be one; a true table, a line of dots and ordinary text never are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from edgevlm import VLM, GenerationConfig, IncompleteAnswerError, OptionError, RepetitionDetection
from edgevlm.decoding.repetition import RepetitionGuard
from edgevlm.decoding.structured import Constraint
from edgevlm.inputs.tokenizer import Tokenizer
from tests.conftest import F32

REPEATING = "one two three four five six seven. " * 3
EAGER = RepetitionDetection(max_pattern_size=16, min_count=4, min_row_count=8, min_tokens=24)


@pytest.fixture(scope="module")
def vlm(exported: Path) -> VLM:
    """A model of chance, which falls into a loop soon."""
    return VLM(exported, F32)


def test_a_loop_is_ended_and_told(vlm: VLM) -> None:
    config = GenerationConfig(max_new_tokens=300)
    endless = vlm.generate(None, REPEATING, config)
    assert endless.finish_reason in ("length", "context")
    cut = vlm.generate(None, REPEATING, replace(config, repetition_detection=EAGER))
    assert cut.finish_reason == "repetition"
    assert cut.token_ids == endless.token_ids[: cut.generated_tokens]
    assert 24 <= cut.generated_tokens < endless.generated_tokens
    unbounded = replace(config, repetition_detection=None)
    assert vlm.generate(None, REPEATING, unbounded).token_ids == endless.token_ids


def test_a_loop_under_a_constraint_is_an_incomplete_answer(vlm: VLM) -> None:
    constraint = Constraint.regex("[ab]{200}!")
    with pytest.raises(IncompleteAnswerError, match="a loop"):
        vlm.generate(None, REPEATING, max_new_tokens=300, constraint=constraint, repetition_detection=EAGER)


def cut_at(vlm: VLM, text: str, detection: RepetitionDetection | None = None) -> int | None:
    """Return after how many tokens of a text the guard ends it, None if it does not."""
    tokenizer: Tokenizer = vlm.processor.tokenizer
    guard = RepetitionGuard(detection or RepetitionDetection(), vlm.grammar_tokenizer.token_bytes)
    ids: Iterable[int] = tokenizer.encode(text, add_special_tokens=False)
    return next((count for count, token in enumerate(ids, 1) if guard.add(token)), None)


LOOPS = {
    "a word": "the the" + " the" * 5000,
    "a sentence": "I cannot read this page. " * 400,
    "a cell": "0.00 | " * 2000,
    "empty cells without end": "<ecel>" * 3000,
    "a row without end": "| 0 | 0 | 0 |\n" * 400,
}
TABLES = {
    "Markdown, equal rows": "| a | b |\n|---|---|\n" + "| 0.00 | 0.00 | |\n" * 100,
    "OTSL, empty rows": "<otsl>" + ("<ecel>" * 12 + "<nl>") * 60 + "</otsl>",
    "HTML": "<table>" + "<tr><td>0</td><td></td><td>n/a</td></tr>" * 100 + "</table>",
    "numbered rows": "".join(f"| {row} | {row * row} |\n" for row in range(400)),
    "a line of dots": "Contents" + "." * 400 + "7",
    "prose": " ".join(f"Sentence {number} says that {number} follows {number - 1}." for number in range(400)),
}


@pytest.mark.parametrize("text", LOOPS.values(), ids=LOOPS)
def test_loops_are_ended_soon(vlm: VLM, text: str) -> None:
    count = cut_at(vlm, text)
    assert count and 512 <= count < 4000


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
def test_tables_and_text_are_never_cut(vlm: VLM, text: str) -> None:
    assert cut_at(vlm, text) is None


def test_a_pattern_begun_anew_counts_anew(vlm: VLM) -> None:
    assert cut_at(vlm, "ab" * 20 + "." + "ab" * 20, RepetitionDetection(4, 30, 30, 1)) is None
    assert cut_at(vlm, "ab" * 60, RepetitionDetection(4, 30, 30, 1))


def test_values_are_checked() -> None:
    with pytest.raises(OptionError, match="min_count must be at least 1, not 0"):
        RepetitionDetection(min_count=0)
    with pytest.raises(OptionError, match="repetition_detection must be"):
        GenerationConfig(repetition_detection=True)  # type: ignore[arg-type]
