"""Small random programs drawn as flowcharts: is the graph read right, and does it compute the same?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from edgevlm.evals.drawing import as_picture, font
from edgevlm.evals.edge_by_edge import read_edge_by_edge
from edgevlm.evals.flow import Graph, behaves_alike, edge_f1, node_f1, read_graph, run, schema
from edgevlm.evals.items import Item, Suite, spread
from edgevlm.evals.model import Model
from edgevlm.evals.statistics import Interval, cluster_bootstrap
from edgevlm.families.base import RGB

SIZES = {"3 to 5 nodes": (3, 5), "6 to 8 nodes": (6, 8), "9 to 12 nodes": (9, 12)}
_PER_SIZE, _WIDTH, _ROW, _CENTRE, _LANE = 60, 640, 104, 300, 26
_INPUTS, _SPARE = 50, 2
_QUESTION = (
    "Read the flowchart as a graph in JSON: nodes, named n1, n2 and so on, with their kinds and texts, and edges with"
    " the labels of the arrows."
)
Random = np.random.Generator


class Flowchart(Suite):
    """JSON of nodes and edges, under a schema; as a second strategy its edges one by one."""

    name = "flowchart"
    asks = "reads a flowchart's edges"
    quick = 9
    needs_general_model = True
    asks_blind = False
    strategies = ("edges",)

    def items(self, count: int | None, seed: int) -> Sequence[Item]:
        """Return charts of three sizes in turn."""
        cells = [
            [_item(size, np.random.default_rng([seed, number, index]), index) for index in range(_PER_SIZE)]
            for number, size in enumerate(SIZES)
        ]
        return spread(cells, count)

    def grade(self, item: Item, answer: str) -> float:
        """Return the F1 of the edges."""
        return edge_f1(json.loads(item.truth), read_graph(answer))

    def ask_further(self, model: Model, item: Item, pictures: Sequence[RGB]) -> dict[str, Any]:
        """Return the graph read edge by edge, too, where that is the strategy."""
        if not self.strategy:
            return {}
        return {"by_edges": json.dumps(read_edge_by_edge(model, pictures, SIZES[item.cell][1] + _SPARE))}

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return how right the graphs are as graphs and as programs, and what asking edge by edge gains."""
        found = _measured(rows, "answer")
        if self.strategy:
            found |= {f"{name}, edge by edge": values for name, values in _measured(rows, "by_edges").items()}
        return {name: float(np.mean(values)) for name, values in (found | self._gains(rows)).items()}

    def intervals(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Interval]:
        """Return those of what asking edge by edge gains, in pairs."""
        families = [row["family"] for row in rows]
        gains = self._gains(rows) if len(set(families)) > 1 else {}
        return {name: cluster_bootstrap(values, families) for name, values in gains.items()}

    def _gains(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
        if not self.strategy:
            return {}
        before, after = (_measured(rows, name) for name in ("answer", "by_edges"))
        return {f"{name}, gained edge by edge": np.subtract(after[name], before[name]).tolist() for name in before}


def inputs() -> list[tuple[int, int]]:
    """Return values of x and y to start from."""
    x, y = np.random.default_rng(0).integers(-5, 30, (2, _INPUTS)).tolist()
    return list(zip(x, y, strict=True))


_MEASURES: dict[str, Callable[[Graph, Graph], float]] = {
    "nodes, F1": node_f1,
    "edges, F1": edge_f1,
    "exact": lambda expected, found: node_f1(expected, found) == edge_f1(expected, found) == 1,
    f"behaves alike on {_INPUTS} inputs": lambda expected, found: behaves_alike(expected, found, inputs()),
}


def _measured(rows: Sequence[Mapping[str, Any]], answer: str) -> dict[str, list[float]]:
    """Return each measure of each row's graph."""
    pairs = [(json.loads(row["truth"]), read_graph(row[answer])) for row in rows]
    return {name: [float(measure(*pair)) for pair in pairs] for name, measure in _MEASURES.items()}


def _item(size: str, random: Random, index: int) -> Item:
    graph = program(random, *SIZES[size])
    most = SIZES[size][1]
    pictures = partial(_drawn, graph, int(random.integers(2**31)))
    truth = json.dumps(graph)
    name = f"{size.partition(' nodes')[0].replace(' ', '-')}-{index}"
    return Item(name, size, _QUESTION, pictures, truth, max_new_tokens=120 * most, schema=schema(most + _SPARE))


@dataclass
class _Chart:
    """A chart as it grows; its nodes all have different texts, so that each is known by its text."""

    random: Random
    nodes: list[dict[str, str]] = field(default_factory=list)
    edges: list[dict[str, str]] = field(default_factory=list)

    def add(self, kind: str, text: str, after: Sequence[tuple[str, str]]) -> str:
        """Add a node that arrows lead to, each from a node under a label; return its id."""
        name = f"n{len(self.nodes) + 1}"
        self.nodes.append({"id": name, "kind": kind, "text": text})
        self.edges += [{"from": each, "to": name, "label": label} for each, label in after]
        return name

    def step(self, target: str | None = None) -> str:
        """Return the text of a step that is not there yet."""
        return self.new(lambda: self._step(target))

    def decision(self, name: str) -> str:
        """Return the text of a decision that is not there yet."""
        return self.new(lambda: f"{name} {self.random.choice(['<', '>'])} {self.random.integers(2, 25)}?")

    def bound(self) -> str:
        """Return the text of a loop's decision that is not there yet."""
        return self.new(lambda: f"x < {self.random.integers(8, 40)}?")

    def _step(self, target: str | None) -> str:
        name = target or str(self.random.choice(["x", "y"]))
        other = self.random.choice(["x", "y", str(self.random.integers(1, 10))])
        return f"{name} = {name} {self.random.choice(['+', '-'])} {other}"

    def new(self, make: Callable[[], str]) -> str:
        """Return the first text made that is not there yet."""
        known = {node["text"] for node in self.nodes}
        text = make()
        while text in known:
            text = make()
        return text


def program(random: Random, fewest: int, most: int) -> Graph:
    """Return a graph of a program that ends on all inputs, of so many nodes."""
    while True:
        chart = _Chart(random)
        last = [(chart.add("start", "start", []), "")]
        while len(chart.nodes) < fewest - 1:
            last = _block(chart, last, most - len(chart.nodes) - 1)
        chart.add("end", "end", last)
        graph: Graph = {"nodes": chart.nodes, "edges": chart.edges}
        if fewest <= len(chart.nodes) <= most and all(run(graph, *each) is not None for each in inputs()):
            return graph


def _block(chart: _Chart, last: list[tuple[str, str]], room: int, target: str | None = None) -> list[tuple[str, str]]:
    """Add a step, a branch, or a loop, nested while there is room for it; return where arrows go on from.

    Within a loop steps change y alone, its `target`, since x counts.
    """
    kinds = ["step", "branch", "both"] + ([] if target else ["loop"])
    kind = chart.random.choice(kinds)
    if kind == "step" or room < 3:
        return [(chart.add("step", chart.step(target), last), "")]
    if kind == "loop":
        again = chart.add("decision", chart.bound(), last)
        body = _block(chart, [(again, "yes")], room - 2, "y")
        grown = chart.add("step", chart.new(lambda: f"x = x + {chart.random.integers(2, 10)}"), body)
        chart.edges.append({"from": grown, "to": again, "label": ""})
        return [(again, "no")]
    fork = chart.add("decision", chart.decision(str(chart.random.choice(["x", "y"]))), last)
    side = _block(chart, [(fork, "yes")], room - 2, target)
    if kind == "branch":
        return [*side, (fork, "no")]
    return [*side, (chart.add("step", chart.step(target), [(fork, "no")]), "")]


def _drawn(graph: Graph, seed: int) -> list[RGB]:
    """Draw nodes one below the other with an unsteady hand: arrows to the next one go down, others around."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (_WIDTH, _ROW * len(graph["nodes"]) + 20), "#fdfbf5")
    pen = ImageDraw.Draw(image)
    rows = {node["id"]: place for place, node in enumerate(graph["nodes"])}

    def stroke(points: Sequence[tuple[float, float]]) -> None:
        for (x1, y1), (x2, y2) in pairwise(points):
            steps = np.linspace(0, 1, 12)[:, None]
            path = np.array([x1, y1]) + steps * np.array([x2 - x1, y2 - y1]) + random.normal(0, 0.7, (12, 2))
            pen.line([tuple(point) for point in path.tolist()], fill="black", width=2)

    for node in graph["nodes"]:
        middle = _middle(rows[node["id"]])
        stroke(_outline(node["kind"], middle))
        pen.text((_CENTRE, middle), node["text"], fill="black", font=font(20), anchor="mm")
    for edge, points in zip(graph["edges"], _routes(graph["edges"], rows), strict=True):
        stroke(points)
        (x1, y1), (x2, y2) = points[-2:]
        along = (np.sign(x2 - x1), np.sign(y2 - y1))
        for side in (-1, 1):
            back = (x2 - 10 * along[0] + 6 * side * along[1], y2 - 10 * along[1] + 6 * side * along[0])
            stroke([back, (x2, y2)])
        beside = (points[0][0] + 8, points[0][1] + 3) if along[0] == 0 else (points[0][0] + 6, points[0][1] + 2)
        pen.text(beside, edge["label"], fill="#1030a0", font=font(18))
    return [as_picture(image)]


def _middle(row: int) -> float:
    return 10 + _ROW * (row + 0.5)


def _outline(kind: str, middle: float) -> list[tuple[float, float]]:
    left, right, above, below = _CENTRE - 110, _CENTRE + 110, middle - 28, middle + 28
    if kind == "decision":
        return [(_CENTRE, above - 8), (right, middle), (_CENTRE, below + 8), (left, middle), (_CENTRE, above - 8)]
    if kind == "step":
        return [(left, above), (right, above), (right, below), (left, below), (left, above)]
    turns = np.linspace(0, 2 * np.pi, 13)
    return [(_CENTRE + 110 * float(np.cos(turn)), middle + 30 * float(np.sin(turn))) for turn in turns]


def _routes(edges: Sequence[Mapping[str, str]], rows: Mapping[str, int]) -> Iterator[list[tuple[float, float]]]:
    """Yield each arrow's corners: forward ones on the right, backward ones on the left, each in a lane of its own."""
    lanes = {1: 0, -1: 0}
    for edge in edges:
        one, other = rows[edge["from"]], rows[edge["to"]]
        start, end = _middle(one), _middle(other)
        if other == one + 1:
            yield [(_CENTRE, start + 36), (_CENTRE, end - 38)]
            continue
        side = 1 if other > one else -1
        lanes[side] += 1
        far, height = _CENTRE + side * (120 + _LANE * lanes[side]), end - 12 if other > one else end
        yield [(_CENTRE + side * 112, start), (far, start), (far, height), (_CENTRE + side * 112, height)]
