"""`edgevlm carrier rewrite`: text questions come out partly as pictures, nothing of them lost, the same for a seed."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm import OptionError, OutputError
from edgevlm.evals.rewrite import Rewriting, rewrite, thirds
from edgevlm.evals.suites import make_suite
from edgevlm.evals.typeset import CHUNK, Typesetter, distorted
from tests.conftest import CHAT_TEMPLATE, make_tokenizer
from tests.families import idefics3
from tests.helpers.command import cli

QUESTIONS = [item.question for item in make_suite("carrier").items(600, 0) if item.variant == "text"]
"""A hundred and twenty of them, of 15 to 40 words."""


def written(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [{"question": question, "answer": number} for number, question in enumerate(QUESTIONS)]
    return written(tmp_path / "train.jsonl", rows)


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def files(output: Path) -> dict[str, bytes]:
    folder = output.with_name(f"{output.stem}-pictures")
    return {"rows": output.read_bytes(), **{path.name: path.read_bytes() for path in folder.iterdir()}}


def said(message: dict[str, Any], carried: str) -> str:
    """Return what a message says, its picture read out."""
    return "".join(part["text"] if part["type"] == "text" else carried for part in message["content"])


def test_questions_lose_nothing_and_answers_stay(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.jsonl"
    summary = rewrite(source, output, Rewriting(0.5))
    rows = read(output)
    assert summary.rows == len(rows) == len(QUESTIONS) and not summary.kept and not summary.resumed
    carriers = Counter(row["carrier"] for row in rows)
    assert set(carriers) == {"text", "half"} and carriers["half"] == summary.rewritten
    assert 0.35 < summary.rewritten / len(rows) < 0.65
    for number, row in enumerate(rows):
        asked, answer = row["messages"]
        assert said(asked, row["carried"]) == QUESTIONS[number]
        assert answer == {"role": "assistant", "content": [{"type": "text", "text": str(number)}]}
        assert (
            len(row["images"])
            == (row["carrier"] == "half")
            == sum(part["type"] == "image" for part in asked["content"])
        )
        for image in row["images"]:
            with Image.open(output.parent / image) as picture:
                assert picture.mode == "RGB" and picture.width >= 512
    assert len(files(output)) == 1 + summary.rewritten


def test_a_seed_makes_the_same_files(source: Path, tmp_path: Path) -> None:
    written(source, [{"question": question, "answer": 0} for question in QUESTIONS[:30]])
    made = {}
    for name, how in {"a": Rewriting(), "b": Rewriting(), "c": Rewriting(seed=1), "d": Rewriting(clean=True)}.items():
        (tmp_path / name).mkdir()
        rewrite(source, tmp_path / name / "out.jsonl", how)
        made[name] = files(tmp_path / name / "out.jsonl")
    assert made["a"] == made["b"]
    assert made["a"]["rows"] != made["c"]["rows"] and not set(made["a"]) & set(made["c"]) - {"rows"}
    distorted_ones = set(made["a"].values()) - set(made["d"].values())
    assert len(made["d"]) == len(made["a"]) and len(distorted_ones) > 0.7 * len(made["a"])


def test_it_goes_on_where_it_was(source: Path, tmp_path: Path) -> None:
    whole, output = tmp_path / "whole" / "out.jsonl", tmp_path / "out.jsonl"
    rewrite(source, whole, Rewriting())

    def interrupt(done: int, total: int) -> None:
        if done == 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewrite(source, output, Rewriting(), interrupt)
    lines = output.read_bytes().splitlines(keepends=True)
    assert len(lines) == 64 and whole.read_bytes().startswith(output.read_bytes())
    output.write_bytes(b"".join(lines[:40]) + lines[40][:30])  # torn in its 41st row
    summary = rewrite(source, output, Rewriting())
    assert summary.resumed == 40 and files(output) == files(whole)
    assert rewrite(source, output, Rewriting()).resumed == len(QUESTIONS) and files(output) == files(whole)


@pytest.mark.parametrize("how", [Rewriting(seed=1), Rewriting(0.25), Rewriting(clean=True)])
def test_rows_of_other_options_are_not_mixed(source: Path, tmp_path: Path, how: Rewriting) -> None:
    rewrite(source, tmp_path / "out.jsonl", Rewriting())
    before = files(tmp_path / "out.jsonl")
    with pytest.raises(OutputError, match="holds other rows, or of other options; choose another -o, or delete it"):
        rewrite(source, tmp_path / "out.jsonl", how)
    assert files(tmp_path / "out.jsonl") == before
    written(source, [{"question": QUESTIONS[0], "answer": 0}])
    with pytest.raises(OutputError, match="holds more rows than"):
        rewrite(source, tmp_path / "out.jsonl", Rewriting())


def test_conversations_are_passed_on(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": [{"type": "text", "text": "Blue"}]},
        {"role": "user", "content": [{"type": "text", "text": "And a "}, {"type": "text", "text": "warmer one?"}]},
        {"role": "assistant", "content": "Red"},
    ]
    cat = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A cat"}]
    shown = {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "image"}]}
    rows = [
        {"messages": turns, "id": 7},
        {"messages": cat, "images": ["cats/a.png", "cats/b.png"]},
        {"messages": [shown, cat[1]], "image": "cats/a.png"},
        {"question": "What is this?", "answer": {"animal": "cat"}, "image": "cats/a.png", "tolerance": 1},
    ]
    source, output = written(tmp_path / "train.jsonl", rows), tmp_path / "made" / "out.jsonl"
    rewrite(source, output, Rewriting(1))
    short, pair, part, plain = read(output)
    assert (short["id"], short["carrier"], short["carried"]) == (7, "picture", "And a warmer one?")
    assert [message["role"] for message in short["messages"]] == [turn["role"] for turn in turns]
    assert short["messages"][1]["content"] == [{"type": "text", "text": "Name a colour."}]
    assert short["messages"][3]["content"] == [{"type": "image"}]
    assert pair["images"] == ["../cats/a.png", "../cats/b.png"] and pair["carrier"] == "text"
    assert [part["type"] for part in pair["messages"][0]["content"]] == ["image", "image", "text"]
    assert part["messages"][0] == shown and part["images"] == ["../cats/a.png"]
    assert said(plain["messages"][1], "") == '{"animal": "cat"}' and plain["images"] == ["../cats/a.png"]


def test_the_reference_s_processor_reads_the_rows(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    rewrite(source, output, Rewriting(0.5))
    words = make_tokenizer()
    processor = idefics3.reference_processor(words, idefics3.sized(256, 64), None)
    processor.chat_template = CHAT_TEMPLATE
    rows = read(output)
    both = [next(row for row in rows if row["carrier"] == carrier) for carrier in ("half", "text")]
    prompts = [processor.apply_chat_template(row["messages"]) for row in both]
    images = [[str(output.parent / image) for image in row["images"]] for row in both]  # TRL gives them on as they are
    batch = processor(text=prompts, images=images, padding=True, return_tensors="np")
    counts = (batch["input_ids"] == words.convert_tokens_to_ids("<image>")).sum(1)
    assert batch["pixel_values"].shape[0] == 2 and counts[0] > 0 == counts[1]


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "not JSON that can be read"),
    "no object": ([1], 'a row has "messages", or a "question" and an "answer"'),
    "no answer": ({"question": "What?"}, 'a row has "messages", or a "question" and an "answer"'),
    "an empty question": ({"question": " ", "answer": "x"}, "the question must be a text"),
    "a crop": (
        {"question": "What?", "answer": "x", "image": "a.png", "crop": [0, 0, 9, 9]},
        "a crop cannot be passed on",
    ),
    "no turns": ({"messages": []}, '"messages" must be a list of turns'),
    "a role": ({"messages": [{"role": "human", "content": "What?"}]}, "each message has a role"),
    "a content": ({"messages": [{"role": "user", "content": None}]}, "a content is a text, or a list of"),
    "a part": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a content is a text, or a list of"),
    "an image too few": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "show 1 images, and the row has 0",
    ),
    "an image of bytes": ({"question": "What?", "answer": "x", "images": [{"bytes": "x"}]}, "images must be paths"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_told_and_nothing_is_written(source: Path, tmp_path: Path, name: str) -> None:
    row, told = BAD[name]
    lines = source.read_text(encoding="utf-8").splitlines()
    lines[99:99] = ["", row if isinstance(row, str) else json.dumps(row)]
    source.write_text("\n".join(lines), encoding="utf-8")
    output = tmp_path / "made" / "out.jsonl"
    result = cli("carrier", "rewrite", source, "-o", output)
    assert result.exit_code == 1 and not output.parent.exists()
    assert result.stderr.startswith(f"Error: {source}, line 101: ") and told in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_bad_files_are_told(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no such file of rows"):
        rewrite(tmp_path / "none.jsonl", tmp_path / "out.jsonl", Rewriting())
    with pytest.raises(OptionError, match="has no rows"):
        rewrite(written(tmp_path / "empty.jsonl", []), tmp_path / "out.jsonl", Rewriting())
    with pytest.raises(OptionError, match="is the file of rows itself"):
        rewrite(source, source, Rewriting())
    with pytest.raises(OptionError, match="cannot be read as a font"):
        rewrite(source, tmp_path / "out.jsonl", Rewriting(font=source))
    with pytest.raises(OptionError, match="ratio must be between 0 and 1"):
        Rewriting(1.5)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot (write|read)"):
        rewrite(source, tmp_path / "file" / "out.jsonl", Rewriting())


KEPT = {
    "日本の首都はどこですか": "a character that no font here has",
    r"What is $\begin{matrix}a\end{matrix}$?": "a formula that matplotlib's mathtext cannot draw",
    "word " * 3000: "more than 3000 characters",
}


def test_what_cannot_be_drawn_stays_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'edgevlm[report]'")
    source = written(tmp_path / "train.jsonl", [{"question": text, "answer": "x"} for text in KEPT])
    result = cli("carrier", "rewrite", source, "-o", tmp_path / "out.jsonl", "--ratio", 1, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["rows"], summary["rewritten"]) == (3, 0) and not (tmp_path / "out-pictures").exists()
    assert all(any(why.startswith(told) for why in summary["kept"]) for told in KEPT.values())
    assert [said(row["messages"][0], "") for row in read(tmp_path / "out.jsonl")] == list(KEPT)
    monkeypatch.setitem(sys.modules, "matplotlib.mathtext", None)
    source = written(tmp_path / "formula.jsonl", [{"question": "What is $x^2$ of 3?", "answer": "9"}])
    told = rewrite(source, tmp_path / "without.jsonl", Rewriting(1)).kept
    assert told == {"formulas need matplotlib: pip install 'edgevlm[report]'": 1}


def test_formulas_stay_whole_and_prices_are_none() -> None:
    chunks = ["Let", r"$f(x) = \frac{x}{2}$,", r"(\(a + b\))", "cost", "$5", "or", "$6", r"\[x y\]", "$$a b$$."]
    assert CHUNK.findall(" ".join(chunks)) == chunks
    text = " ".join(chunks * 3) + "\nEnd."
    before, carried, after = thirds(text)
    assert before + carried + after == text
    assert [len(CHUNK.findall(part)) for part in (before, carried, after)] == [9, 10, 9]
    assert thirds("Eleven words " * 5) == ("", "Eleven words " * 5, "") and thirds(" ") == ("", "", " ")


def test_a_sheet_holds_the_whole_text() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'edgevlm[report]'")
    typesetter = Typesetter()
    for seed, text in enumerate(
        [QUESTIONS[0], "https://" + "a" * 200, r"$" + "+".join("abcdefgh" * 12) + "$", "a\n\nb"]
    ):
        for _ in range(3):
            ink = np.asarray(typesetter.sheet(text, np.random.default_rng(seed))) < 128
            assert (
                ink.any()
                and not ink[:, :8].any()
                and not ink[:, -8:].any()
                and not ink[:8].any()
                and not ink[-8:].any()
            )
    sheets = {text: typesetter.sheet(text, np.random.default_rng(0)) for text in ("a", "a b", "a\nb", "$a$")}
    assert len({sheet.tobytes() for sheet in sheets.values()}) == 4
    assert sheets["a\nb"].height > sheets["a b"].height
    inks = {
        letter: (255 - np.asarray(typesetter.sheet(letter, np.random.default_rng(0)), int)).sum() for letter in "abc"
    }
    whole = (255 - np.asarray(typesetter.sheet("a b c", np.random.default_rng(0)), int)).sum()
    assert whole == sum(inks.values())  # no letter is lost or drawn twice
    changed = [distorted(sheets["a b"], np.random.default_rng(seed)).tobytes() for seed in range(40)]
    assert len(set(changed)) > 30


def test_memory_holds_a_few_rows_at_a_time(tmp_path: Path) -> None:
    source = tmp_path / "train.jsonl"
    with source.open("w", encoding="utf-8") as file:
        for number in range(10_000):
            file.write(json.dumps({"question": f"{QUESTIONS[number % 100]} {number}", "answer": number}) + "\n")
    rewrite(written(tmp_path / "warm.jsonl", [{"question": "a", "answer": 1}]), tmp_path / "w.jsonl", Rewriting(1))
    tracemalloc.start()
    try:
        summary = rewrite(source, tmp_path / "out.jsonl", Rewriting(0.001))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert summary.rows == 10_000 and peak < 2.5 * 2**20 < (tmp_path / "out.jsonl").stat().st_size


def test_letters_beyond_ascii_are_drawn_in_a_font_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'edgevlm[report]'")
    both = Typesetter()
    assert both.why_not("Größe: ½ · π ≤ €5 — Привет") is None
    inks = {letter: both.sheet(letter, np.random.default_rng(0)).tobytes() for letter in "éüαЖ€"}
    assert len(set(inks.values())) == len(inks)  # no two of them are the box of a missing character
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    alone = Typesetter()
    assert "pip install 'edgevlm[report]'" in str(alone.why_not("é")) and alone.why_not("e") is None
    assert alone.sheet("e", np.random.default_rng(0)) == both.sheet("e", np.random.default_rng(0))
