"""Ask a suite's items of a model, a row for each, resumably."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal
from urllib.parse import quote

from PIL import Image

import edgevlm
from edgevlm.errors import ContextLengthError, OptionError, OutputError
from edgevlm.evals.ask import blinded, judge, speak
from edgevlm.evals.items import Item, Suite
from edgevlm.evals.model import Model
from edgevlm.evals.pair import Pair
from edgevlm.families.base import RGB
from edgevlm.jobs.jsonl import Row, append_rows, read_rows, writing
from edgevlm.jobs.work_queue import noop

OnProgress = Callable[[int, int], object]
Mode = Literal["score", "generate", "free"]
"""Options are scored; generated under a constraint, too; or without one, and parsed."""


@dataclass(frozen=True)
class Selection:
    """Which items of a suite are asked, and how."""

    count: int | None = None
    seed: int = 0
    blind: bool = True
    """Ask each item about grey pictures, too."""
    mode: Mode = "score"

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise OptionError(f"items must be at least 1, not {self.count}")


def evaluate(
    suite: Suite,
    model: Model | Pair,
    selection: Selection,
    output: Path | None = None,
    on_progress: OnProgress = noop,
    pictures: Path | None = None,
) -> list[Row]:
    """Return the row of each item, in order; rows that `output` has already are not asked again.

    Each item's pictures are also written to the folder `pictures`.

    Raises `OutputError` for an output of another suite, model or selection, and what the model raises.
    """
    items = suite.items(selection.count, selection.seed)
    head = _head(suite, model, selection)
    known = _known(output, head) if output else {}
    rows = []
    for number, item in enumerate(items):
        on_progress(number, len(items))
        if pictures:
            keep_pictures(pictures, item)
        if (row := known.get(item.id)) is None:
            row = ask(suite, model, item, blind=selection.blind, mode=selection.mode)
            if output:
                with writing(output):
                    append_rows(output, [row])
        rows.append(row)
    on_progress(len(items), len(items))
    return rows


def check_knowledge(suite: Suite, model: Model | Pair) -> None:
    """Raise `OptionError` for a suite that asks for more than the model was made for."""
    if suite.needs_general_model and not model.is_general:
        raise OptionError(f"the suite {suite.name} needs a general model; {model.name} knows displays and gauges alone")


def keep_pictures(folder: Path, item: Item) -> None:
    """Write an item's pictures as PNG, named by its id, unless they are there. Raises `OutputError`."""
    name = quote(item.id, safe=" ()")  # an id of the user's own file may be a path
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(item.pictures(), 1):
            if not (path := folder / f"{name}-{number}.png").exists():
                Image.fromarray(picture).save(path)


def ask(suite: Suite, model: Model | Pair, item: Item, *, blind: bool, mode: Mode = "score") -> Row:
    """Return the row of one item, which has an `error` where its pictures do not fit the model's context."""
    started, pictures = perf_counter(), item.pictures()
    row: Row = {
        "suite": suite.name,
        "item": item.id,
        "family": item.cluster,
        "variant": item.variant,
        "cell": item.cell,
        "question": item.question,
        "options": list(item.options),
        "truth": item.truth,
        **({"facts": dict(item.facts)} if item.facts else {}),
    }
    try:
        row |= _answered(suite, model, item, pictures, blind=blind, mode=mode)
    except ContextLengthError as error:
        row["error"] = str(error)
    return row | {"seconds": round(perf_counter() - started, 3)}


def _answered(
    suite: Suite, model: Model | Pair, item: Item, pictures: Sequence[RGB], *, blind: bool, mode: Mode
) -> Row:
    if isinstance(model, Pair):
        return model.follow(pictures, item.question, item.max_new_tokens)
    if item.options:
        seen = judge(suite, model, item, pictures)
        row: Row = {"answer": seen.answer, "right": seen.right, "mass": round(seen.mass, 6)}
        if item.is_lettered:
            row["robust"] = seen.robust
        row["scores"] = {option: round(p, 6) for option, p in seen.scores.items()}
        if mode != "score":
            said = speak(suite, model, item, pictures, free=mode == "free")
            row |= {"said": said.answer, "said_text": said.text, "said_right": said.right}
        if blind:
            row["blind"] = judge(suite, model, item, blinded(pictures)).right if pictures else seen.right
        return row
    answer = _generated(model, item, pictures)
    row = {"question": _wording(model, item), "answer": answer, "right": suite.grade(item, answer)}
    row |= suite.ask_further(model, item, pictures)
    if blind and suite.asks_blind:
        row["blind"] = suite.grade(item, _generated(model, item, blinded(pictures)))
    return row


def _generated(model: Model, item: Item, pictures: Sequence[RGB]) -> str:
    return model.generate(pictures, _wording(model, item), item.max_new_tokens, item.schema)


def _wording(model: Model, item: Item) -> str:
    return model.prompts.get(item.task, item.question)


def _head(suite: Suite, model: Model | Pair, selection: Selection) -> Row:
    return {
        "suite": suite.name,
        "version": suite.version,
        "items": selection.count,
        "seed": selection.seed,
        "blind": selection.blind,
        **({"mode": selection.mode} if selection.mode != "score" else {}),
        **({"strategy": suite.strategy} if suite.strategy else {}),
        "edgevlm": edgevlm.__version__,
        **model.describe(),
    }


def _known(output: Path, head: Row) -> dict[str, Row]:
    """Return the rows of an earlier run by item; begin a file that is not there yet with `head`."""
    rows = [row for row, _ in read_rows(output)]
    if not rows:
        with writing(output):
            output.parent.mkdir(parents=True, exist_ok=True)
            append_rows(output, [head])
        return {}
    if rows[0] != head:
        raise OutputError(
            f"{output} holds the answers of another model, suite or selection; choose another -o, or delete it"
        )
    return {row["item"]: row for row in rows[1:]}
