"""How often exported models answer right, by task, with 95 % intervals: photographs and three renderers' pictures."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeAlias

import numpy as np
from rich.progress import Progress

from edgevlm import VLM, GenerationConfig, RuntimeConfig
from edgevlm_export.tune.scores import Scored, is_right
from training import real, second, third
from training.degrade import photographed
from training.scene import QA, Random, Scene
from training.scenes import SCENES

HELD_OUT_SEED = 20_001
"""No training run may use it."""
TARGETS = {
    "display": 0.97,
    "gauge": 0.95,
    "light": 0.99,
    "count": 0.95,
    "missing": 0.95,
    "label": 0.90,
    "chart": 0.92,
    "shape": 0.98,
    "point": 0.98,
    "presence": 0.97,
    "refusal": 0.90,
}
"""What the model is meant to reach, by task; descriptions have no target and are not part of the whole."""
OVERALL = "overall"


@dataclass(frozen=True)
class Score:
    """Right answers of one task."""

    task: str
    right: int
    asked: int
    false_yes: int = 0
    """Presence questions answered "yes" where "no" is true."""
    truly_no: int = 0

    @property
    def share(self) -> float:
        """Share of right answers."""
        return self.right / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        return Scored(self.right, self.asked).interval


def judge(pair: QA, answer: str) -> bool:
    """Tell whether `answer` is right: the exact text, or the text with its numbers within the tolerance."""
    return is_right(answer, pair.answer, pair.tolerance)


def held_out(name: str, index: int) -> Scene:
    """Return held-out picture `index` of one kind, as a camera saw it."""
    return photographed(SCENES[name], np.random.default_rng((HELD_OUT_SEED, list(SCENES).index(name), index)))


def other_style(scenes: Mapping[str, Callable[[Random], Scene]], first: int, name: str, index: int) -> Scene:
    """Return another renderer's picture `index` of one kind, as it draws it; `first` tells its seeds from others'."""
    return scenes[name](np.random.default_rng((HELD_OUT_SEED, first + list(scenes).index(name), index)))


@dataclass(frozen=True)
class Style:
    """Where pictures come from."""

    draw: Callable[[str, int], Scene]
    """Returns picture `index` of a kind."""
    kinds: tuple[str, ...]
    most: int | None = None
    """How many pictures of a kind there are; None for as many as are asked for."""


STYLES = {
    "real photographs": Style(real.scene, real.names(), most=1),
    "third renderer, over photographs": Style(partial(other_style, third.SCENES, 200), tuple(third.SCENES)),
    "held-out": Style(held_out, tuple(SCENES)),
    "second renderer": Style(partial(other_style, second.SCENES, 100), tuple(second.SCENES)),
}
"""The hardest first."""


Outcome: TypeAlias = tuple[QA, str]


def ask(exports: list[Path], style: str, name: str, pictures: int) -> list[list[Outcome]]:
    """Ask every export about the same `pictures` pictures of one kind, on one thread."""
    models = [VLM(export, RuntimeConfig(threads=1)) for export in exports]
    config = GenerationConfig(max_new_tokens=64)
    outcomes: list[list[Outcome]] = [[] for _ in exports]
    chosen = STYLES[style]
    for index in range(min(pictures, chosen.most or pictures)):
        scene = chosen.draw(name, index)
        image = np.asarray(scene.image)
        for vlm, found in zip(models, outcomes, strict=True):
            found += [(pair, vlm.generate(image, pair.question, config).text.strip()) for pair in scene.pairs]
    return outcomes


def evaluate(exports: list[Path], pictures: int, processes: int) -> dict[tuple[str, str], list[Score]]:
    """Return the scores of every export in every style, by task, the last one over all."""
    jobs = [(style, name) for style, each in STYLES.items() for name in each.kinds]
    outcomes: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    with get_context("spawn").Pool(processes) as pool, Progress() as progress:
        step = progress.add_task("asking", total=len(jobs))
        running = [(style, pool.apply_async(ask, (exports, style, name, pictures))) for style, name in jobs]
        for style, result in running:
            for export, found in zip(exports, result.get(), strict=True):
                outcomes[export.name, style] += found
            progress.advance(step)
    return {column: scores(each) for column, each in outcomes.items()}


def scores(outcomes: list[Outcome]) -> list[Score]:
    """Return each task's score in the order of `TARGETS`, other tasks after them, then all of `TARGETS` together."""
    by_task: dict[str, list[Outcome]] = {task: [] for task in TARGETS}
    for pair, answer in outcomes:
        by_task.setdefault(pair.task, []).append((pair, answer))
    every = [outcome for outcome in outcomes if outcome[0].task in TARGETS]
    return [_score(task, each) for task, each in [*by_task.items(), (OVERALL, every)] if each]


def _score(task: str, outcomes: list[Outcome]) -> Score:
    truly_no = [answer for pair, answer in outcomes if task == "presence" and pair.answer == "no"]
    right = sum(judge(pair, answer) for pair, answer in outcomes)
    return Score(task, right, len(outcomes), sum(answer == "yes" for answer in truly_no), len(truly_no))


def table(style: str, results: dict[str, list[Score]]) -> str:
    """Return one style's Markdown table: a row for each task, a column for each export."""
    tasks = list(dict.fromkeys(score.task for each in results.values() for score in each))
    lines = [f"| {style} | target | " + " | ".join(results) + " |", "|---" * (len(results) + 2) + "|"]
    for task in tasks:
        cells = [_cell(next((score for score in each if score.task == task), None)) for each in results.values()]
        target = f"{TARGETS[task]:.0%}" if task in TARGETS else ""
        lines.append(f"| {task} | {target} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    low, high = score.interval
    text = f"{score.share:.1%} ({low:.1%} to {high:.1%}, n={score.asked:,})"
    return text + (f", false yes {score.false_yes / score.truly_no:.1%}" if score.truly_no else "")


def run(exports: list[Path], pictures: int, processes: int, output: Path | None) -> None:
    """Evaluate every export in every style, print the tables, and write the figures as JSON lines."""
    results = evaluate(exports, pictures, processes)
    for style in dict.fromkeys(style for _, style in results):
        print(table(style, {export: each for (export, other), each in results.items() if other == style}), end="\n\n")
    if output:
        rows = [{"export": e, "style": s, **asdict(score)} for (e, s), each in results.items() for score in each]
        output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
