"""How often exported models answer right, by task, with 95 % intervals: held-out pictures and the second renderer."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from edgevlm import VLM, GenerationConfig
from training import second
from training.degrade import degrade
from training.scene import QA, Scene
from training.scenes import SCENES

HELD_OUT_SEED = 20_001
"""No training run may use it."""
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


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
        """The 95 % interval (Wilson's score interval)."""
        n, p, z = self.asked, self.share, 1.959964
        centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def judge(pair: QA, answer: str) -> bool:
    """Tell whether `answer` is right: the exact text, or numbers within the tolerance."""
    answer = answer.strip()
    if pair.tolerance is None:
        return answer == pair.answer
    wanted, found = _NUMBER.findall(pair.answer), _NUMBER.findall(answer)
    if len(wanted) != len(found):
        return False
    return all(abs(float(w) - float(f)) <= pair.tolerance + 1e-9 for w, f in zip(wanted, found, strict=True))


def held_out(name: str, index: int) -> Scene:
    """Return held-out picture `index` of one kind, as a camera saw it."""
    random = np.random.default_rng((HELD_OUT_SEED, list(SCENES).index(name), index))
    scene = SCENES[name](random)
    scene.image = degrade(scene.image, random)
    return scene


def second_style(name: str, index: int) -> Scene:
    """Return the second renderer's picture `index` of one kind, undamaged."""
    return second.SCENES[name](np.random.default_rng((HELD_OUT_SEED, 100 + list(SCENES).index(name), index)))


STYLES: dict[str, Callable[[str, int], Scene]] = {"held-out": held_out, "second renderer": second_style}


def evaluate(folder: Path, style: str, pictures: int) -> list[Score]:
    """Ask the export in `folder` about `pictures` pictures of every kind."""
    vlm = VLM(folder)
    config = GenerationConfig(max_new_tokens=32)
    outcomes: dict[str, list[tuple[QA, bool, str]]] = defaultdict(list)
    for name in SCENES:
        for index in range(pictures):
            scene = STYLES[style](name, index)
            image = np.asarray(scene.image)
            for pair in scene.pairs:
                answer = vlm.generate(image, pair.question, config).text
                outcomes[pair.task].append((pair, judge(pair, answer), answer.strip()))
    return [_score(task, each) for task, each in outcomes.items()]


def _score(task: str, outcomes: list[tuple[QA, bool, str]]) -> Score:
    truly_no = [answer for pair, _, answer in outcomes if task == "presence" and pair.answer == "no"]
    right = sum(is_right for _, is_right, _ in outcomes)
    return Score(task, right, len(outcomes), sum(answer == "yes" for answer in truly_no), len(truly_no))


def table(results: dict[tuple[str, str], list[Score]]) -> str:
    """Return a Markdown table: a row for each task, a column for each export and renderer."""
    columns = list(results)
    tasks = list(dict.fromkeys(score.task for scores in results.values() for score in scores))
    lines = ["| task | " + " | ".join(f"{export}, {style}" for export, style in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for task in tasks:
        cells = [_cell(next((s for s in results[column] if s.task == task), None)) for column in columns]
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    low, high = score.interval
    text = f"{score.share:.1%} ({low:.1%} to {high:.1%}, n={score.asked})"
    return text + (f", false yes {score.false_yes / score.truly_no:.1%}" if score.truly_no else "")


def run(folders: list[Path], pictures: int, output: Path | None) -> None:
    """Evaluate every export in both styles, print the table, and write the figures as JSON lines."""
    results = {(folder.name, style): evaluate(folder, style, pictures) for folder in folders for style in STYLES}
    print(table(results))
    if output:
        rows = [{"export": e, "style": s, **asdict(score)} for (e, s), scores in results.items() for score in scores]
        output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
