"""A run of several suites on one model or two, and its tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgevlm.cli.output import Bar
from edgevlm.errors import OptionError
from edgevlm.evals.items import Item, Suite
from edgevlm.evals.model import Model
from edgevlm.evals.pair import Pair, paired
from edgevlm.evals.report import difference_line, figure_lines, table, write_report
from edgevlm.evals.results import Difference, SuiteResult, compare, compare_cells, summarize
from edgevlm.evals.run import Mode, Selection, check_knowledge, evaluate
from edgevlm.evals.suites import SUITES, make_suite, suites_for_data
from edgevlm.jobs.jsonl import Row


@dataclass
class Findings:
    """What a run found."""

    model: str
    results: list[tuple[Suite, SuiteResult, Sequence[Row], dict[str, Item]]] = field(default_factory=list)
    differences: dict[str, Difference] = field(default_factory=dict)
    by_cell: dict[str, dict[str, Difference]] = field(default_factory=dict)
    """Of each suite."""
    left_out: dict[str, str] = field(default_factory=dict)
    other: str | None = None
    data_for: Sequence[str] = ()
    """The suites that `--data` was for, where others were asked, too."""

    def to_dict(self) -> dict[str, Any]:
        """Return what `edgevlm eval --json` prints."""
        return {
            "model": self.model,
            "suites": {result.suite: result.to_dict() for _, result, _, _ in self.results},
            "against": self.other,
            "differences": {name: asdict(each) for name, each in self.differences.items()},
            "differences_by_cell": {
                name: {cell: asdict(each) for cell, each in cells.items()} for name, cells in self.by_cell.items()
            },
            "data_for": list(self.data_for),
            "left_out": self.left_out,
        }

    def lines(self) -> list[str]:
        """Return a line for each verdict, difference and suite that was left out."""
        found = []
        for _, result, _, _ in self.results:
            found.append(f"{result.suite}: {result.verdict}")
            found += [f"{result.suite}: {line}" for line in figure_lines(result)]
            found += [f"{result.suite}: {count} items not asked: {why}" for why, count in result.unanswered.items()]
        for name, difference in self.differences.items():
            found.append(difference_line(f"{self.other}, {name}", difference))
            cells = self.by_cell[name].items()
            found += [difference_line(f"{self.other}, {name}, {cell}", each) for cell, each in cells]
        if self.data_for:
            found.append(f"--data is for {', '.join(self.data_for)}; the other suites ask items of their own")
        return found + [f"left out: {name}: {why}" for name, why in self.left_out.items()]

    def show(self) -> None:
        """Print the tables and the lines."""
        console = Console()
        for _, result, _, _ in self.results:
            headings, *rows = table(result)
            shown = Table(*headings, title=f"{self.model}: {result.suite}")
            for row in rows:
                shown.add_row(*map(Text, row))
            console.print(shown)
        for line in self.lines():
            console.print(Text(line), soft_wrap=True)

    def write_page(self, path: Path) -> None:
        """Write the HTML report. Raises `OutputError`."""
        write_report(path, self.model, self.results, self.lines())


class Evaluation:
    """Which suites, and how many of their items."""

    def __init__(
        self,
        suites: str,
        items: int | None,
        quick: bool,
        seed: int,
        data: Path | None,
        *,
        blind: bool,
        output: Path | None,
        mode: Mode = "score",
        strategy: str = "",
        keep_pictures: bool = False,
    ) -> None:
        if keep_pictures and not output:
            raise OptionError("--keep-pictures needs a folder; add -o")
        self._all = suites == "all"
        names = list(SUITES) if self._all else [name.strip() for name in suites.split(",")]
        taking_data = suites_for_data(names) if data else []
        self._data_for = taking_data if len(taking_data) < len(names) else []
        self._suites: list[Suite] = []
        self._left_out: dict[str, str] = {}
        for name in names:
            try:
                self._suites.append(make_suite(name, data if name in taking_data else None))
            except OptionError as error:
                if not self._all:
                    raise
                self._left_out[name] = str(error)
        self._items, self._quick, self._output = items, quick, output
        self._selection, self._keeps_pictures = Selection(items, seed, blind, mode), keep_pictures
        choose_strategy(self._suites, strategy)

    def __call__(self, model: Model, other: Model | None) -> Findings:
        """Ask every suite's items of a model, and of another on the same items."""
        found = Findings(
            model.name, left_out=dict(self._left_out), other=other.name if other else None, data_for=self._data_for
        )
        for suite in self._suites:
            count = min(filter(None, (self._items, suite.quick if self._quick else None)), default=None)
            selection = replace(self._selection, count=count)
            try:
                asked = paired(model, other) if suite.needs_reference else model
                check_knowledge(suite, asked)
                rows = self._rows(suite, asked, selection)
                result = summarize(suite, rows)
            except OptionError as error:
                if not self._all:
                    raise
                found.left_out[suite.name] = str(error)
                continue
            items = {item.id: item for item in suite.items(count, selection.seed)}
            found.results.append((suite, result, rows, items))
            if other and not suite.needs_reference:
                others = self._rows(suite, other, selection)
                found.differences[suite.name] = compare(rows, others)
                found.by_cell[suite.name] = compare_cells(rows, others)
        return found

    def _rows(self, suite: Suite, model: Model | Pair, selection: Selection) -> list[Row]:
        name = re.sub(r"[^\w.-]+", "_", model.name)  # a server may call its model org/name
        output = self._output / f"{name}-{suite.name}.jsonl" if self._output else None
        pictures = self._output / "pictures" / suite.name if self._output and self._keeps_pictures else None
        with Bar() as bar:
            return evaluate(suite, model, selection, output, bar.progress, pictures)


def choose_strategy(suites: Sequence[Suite], strategy: str) -> None:
    """Set the strategy of the suites that have it. Raises `OptionError` where none has."""
    having = [suite for suite in suites if strategy in suite.strategies]
    if strategy and not having:
        raise OptionError(f"no chosen suite has the strategy {strategy}; flowchart has edges")
    for suite in having:
        suite.strategy = strategy
