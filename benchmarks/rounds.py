"""Systems by turns, each in a process of its own: the rows of a run, and what they say when they are taken in pairs.

A run alternates: the order of the systems is turned every other round (A B, B A, A B, ...). A child process prints a
JSON line for its start and one for each case that it measures (`benchmarks.child`); they go to a file of JSON Lines as
soon as it ends, so that a run can be continued, and a system that fails leaves a row that says why and is not started
again. A ratio is taken within a round, so that both of its figures are of the same minutes, and what is told is the
median of these ratios with their quartiles.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple, TypeAlias

from benchmarks.child import START
from edgevlm.bench.conditions import Conditions, describe_machine, machine_line
from edgevlm.jobs.jsonl import append_rows, read_rows

Row: TypeAlias = dict[str, Any]
COLUMNS = {
    "ttft_s": "TTFT s",
    "second_ttft_s": "second question s",
    "tokens_per_s": "tokens/s",
    "total_s": "end to end s",
    "start_to_first_token_s": "start s",
    "peak_memory_bytes": "peak MB",
    "anonymous_bytes": "allocated MB",
}
"""Figures and their headings; what ends in `_bytes` is no timing."""


class System(NamedTuple):
    """What is measured: its name in the tables, and the command of its child process."""

    name: str
    command: Sequence[str]


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise one value of each round."""
        low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return cls(middle, low, high)


class Paired(NamedTuple):
    """The ratios of two systems' figures, round by round."""

    spread: Spread | None
    """None where there is no ratio."""
    starved: int
    """Rounds left out because a thread of one of the two starved."""
    rounds: int
    """Rounds that both have."""


def lines(system: System, limit_s: float) -> Iterator[Row]:
    """Run a system once; yield its start, then a row for each case.

    Raises `RuntimeError` with its last line of error, `TimeoutExpired` after `limit_s`.
    """
    started = time.time()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        child = subprocess.Popen(system.command, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8")
        try:
            out, _ = child.communicate(timeout=limit_s)
        finally:
            child.kill()
        for line in out.splitlines():
            if line.startswith('{"case"'):
                row = json.loads(line)
                if row["case"] == START:
                    row["start_to_first_token_s"] = row.pop("first_token_at") - started
                yield row
        if child.returncode:
            errors.seek(0)
            raise RuntimeError((errors.read().strip() or f"exit code {child.returncode}").splitlines()[-1])


def measure(system: System, number: int, limit_s: float) -> list[Row]:
    """Return the rows of a system in a round, the failure last if it failed."""
    name = {"round": number, "system": system.name}
    rows: list[Row] = []
    try:
        rows += ({**name, **row} for row in lines(system, limit_s))
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        rows.append({**name, "failed": str(error)[:300]})
    return rows


def in_order(systems: Sequence[System], number: int) -> list[System]:
    """Return the systems in the order of round `number`, the first of which is 1."""
    return list(systems) if number % 2 else list(reversed(systems))


def run(systems: Sequence[System], rounds: int, output: Path, head: Row, limit_s: float) -> list[Row]:
    """Add as many rounds to those in `output` and return all rows; `head` is written with the machine if it is new.

    Raises `OutputError` for a file that holds something else.
    """
    rows = [row for row, _ in read_rows(output)]
    if not rows:
        output.parent.mkdir(parents=True, exist_ok=True)
        rows.append({"machine": describe_machine(), **head})
        append_rows(output, rows)
    done = max((row.get("round", 0) for row in rows), default=0)
    failed: set[str] = set()
    for number in range(done + 1, done + rounds + 1):
        for system in in_order(systems, number):
            if system.name in failed:
                continue
            for row in measure(system, number, limit_s):
                failed |= {system.name} if "failed" in row else set()
                rows.append(row)
                append_rows(output, [row])
                print(json.dumps(row, ensure_ascii=False), file=sys.stderr, flush=True)
    return rows


def cases(rows: Iterable[Row]) -> dict[str, dict[str, dict[int, Row]]]:
    """Return the measured rows by case, system and round, in the order of the first round."""
    found: dict[str, dict[str, dict[int, Row]]] = {}
    measured = sorted((row for row in rows if "case" in row), key=lambda row: int(row["round"]))
    for row in measured:
        found.setdefault(row["case"], {}).setdefault(row["system"], {})[row["round"]] = row
    return found


def conditions_of(row: Row) -> Conditions | None:
    """Return the conditions that a row was measured under, None where they are not recorded."""
    return Conditions.from_dict(row["conditions"]) if row.get("conditions") else None


def spread(rows: Mapping[int, Row], figure: str) -> Spread | None:
    """Return a figure of one system and case over its rounds, None where it has none."""
    values = [row[figure] for row in rows.values() if row.get(figure) is not None]
    return Spread.of(values) if values else None


def paired(own: Mapping[int, Row], base: Mapping[int, Row], figure: str) -> Paired:
    """Return the ratios of a figure to that of another system, round by round.

    A round in which a thread of either system starved (`Conditions.starved`) gives no ratio of times, and where these
    are more than half of the rounds no ratio is told at all. Runs of one thread do not starve, and memory does not.
    """
    both = [number for number in own if number in base and own[number].get(figure) and base[number].get(figure)]
    fair = [n for n in both if figure.endswith("_bytes") or not (_starved(own[n]) or _starved(base[n]))]
    enough = bool(fair) and 2 * len(fair) >= len(both)
    ratios = [own[number][figure] / base[number][figure] for number in fair]
    return Paired(Spread.of(ratios) if enough else None, len(both) - len(fair), len(both))


def _starved(row: Row) -> bool:
    found = conditions_of(row)
    return found is not None and found.starved


def reference(rows: Sequence[Row], wanted: str = "") -> str:
    """Return the system that ratios are taken to: the one wanted, or else the first one named."""
    names = list(dict.fromkeys(row["system"] for row in rows if "case" in row))
    return wanted if wanted in names or not names else names[0]


def table(rows: Sequence[Row], base: str) -> list[str]:
    """Return Markdown: medians, in brackets median and quartiles of the ratios to `base`, and then the conditions."""
    by_case = cases(rows)
    figures = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    text = ["| case | system | prompt tokens | " + " | ".join(COLUMNS[name] for name in figures) + " |"]
    text.append("|" + "---|" * (3 + len(figures)))
    told: list[str] = []
    for case, systems in by_case.items():
        for name, own in systems.items():
            against = systems.get(base, {}) if name != base else {}
            cells = [cell(own, against, figure) for figure in figures]
            prompt = next(iter(own.values())).get("prompt_tokens") or ""
            text.append(f"| {case} | {name} | {prompt} | " + " | ".join(cells) + " |")
            told += refusals(case, name, own, base, against)
    told += [f"- round {row['round']}, {row['system']} failed: {row['failed']}" for row in rows if "failed" in row]
    return [*text, "", *told, *([""] if told else []), *conditions_lines(rows)]


def cell(own: Mapping[int, Row], base: Mapping[int, Row], figure: str) -> str:
    """Return a figure's median, and its ratios where there is something to compare it with."""
    value = spread(own, figure)
    if value is None:
        return ""
    scaled = value.median / (1e6 if figure.endswith("_bytes") else 1)
    shown = f"{scaled:,.0f}" if scaled >= 100 else f"{scaled:.3g}"
    ratio = paired(own, base, figure).spread
    if ratio is None:
        return shown
    quartiles = f", {ratio.low:.2f}-{ratio.high:.2f}" if ratio.low < ratio.high else ""
    return f"{shown} ({ratio.median:.2f}x{quartiles})"


def refusals(case: str, name: str, own: Mapping[int, Row], base_name: str, base: Mapping[int, Row]) -> list[str]:
    """Return a line if ratios of times were left out or refused because a thread starved."""
    timings = [paired(own, base, figure) for figure in COLUMNS if not figure.endswith("_bytes")]
    worst = max(timings, key=lambda each: each.starved, default=None)
    if worst is None or not worst.starved:
        return []
    what = "left out of the ratios" if worst.spread else "so there is no ratio of times"
    return [
        f"- case {case}, {name} to {base_name}: a thread starved in {worst.starved} of {worst.rounds} rounds, {what};"
        " measure again while nothing else runs, or with `--threads 1`"
    ]


def conditions_lines(rows: Sequence[Row]) -> list[str]:
    """Return a line for the machine and one for each system: versions, and who used the cores, but for the start."""
    machines = [machine_line(row["machine"]) for row in rows if "machine" in row]
    text = [f"- machine: {line}" for line in dict.fromkeys(machines)]
    for name in dict.fromkeys(row["system"] for row in rows if "case" in row):
        own = [row for row in rows if row.get("system") == name and "case" in row]
        each = [found for row in own if row["case"] != START and (found := conditions_of(row))]
        used = Conditions.together(each).line if each else "not recorded"
        starved = sum(found.starved for found in each)
        noted = f"; a thread starved in {starved} of {len(each)} rows" if starved else ""
        text.append(f"- {name} ({versions_line(own)}): {used}{noted}")
    return text


def versions_line(rows: Sequence[Row]) -> str:
    """Return the versions that a system's rows name, all of them where rounds differ, and its vision arithmetic."""
    found = dict.fromkeys(f"{name} {number}" for row in rows for name, number in (row.get("versions") or {}).items())
    vision = dict.fromkeys(f"vision {row['vision_arithmetic']}" for row in rows if row.get("vision_arithmetic"))
    return ", ".join({**found, **vision}) or "versions not recorded"
