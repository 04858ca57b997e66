"""Flowcharts as graphs: how near one is to another, and what it computes."""

from __future__ import annotations

import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, TypeAlias

Graph: TypeAlias = Mapping[str, Sequence[Mapping[str, str]]]
"""`nodes` with id, kind and text; `edges` with from, to and label."""
KINDS, LABELS = ("start", "step", "decision", "end"), ("", "yes", "no")
_ALIKE = 0.8
"""Texts of the same node; one letter of six may be misread."""
_MOST_STEPS = 500
_STEP = re.compile(r"([xy]) = ([xy]|\d+)(?: ([-+*]) ([xy]|\d+))?")
_DECISION = re.compile(r"([xy]) ([<>]) ([xy]|\d+)\?")
_OPERATORS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def schema(most_nodes: int, longest_text: int = 24) -> dict[str, Any]:
    """Return the JSON Schema of a graph; its bounds keep the answer within the context."""
    name = _names(most_nodes)
    edge = {"from": name, "to": name, "label": {"enum": list(LABELS)}}
    edges = {"type": "array", "items": _object(**edge), "maxItems": 2 * most_nodes}
    return _object(nodes=_nodes(most_nodes, longest_text), edges=edges)


def node_schema(most_nodes: int, longest_text: int = 24) -> dict[str, Any]:
    """Return the JSON Schema of a graph's nodes alone."""
    return _object(nodes=_nodes(most_nodes, longest_text))


def _nodes(most: int, longest_text: int) -> dict[str, Any]:
    text = {"type": "string", "maxLength": longest_text}
    node = _object(id=_names(most), kind={"enum": list(KINDS)}, text=text)
    return {"type": "array", "items": node, "minItems": 1, "maxItems": most}


def _names(most: int) -> dict[str, Any]:
    return {"enum": [f"n{number}" for number in range(1, most + 1)]}


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def read_graph(answer: str) -> Graph:
    """Return an answer's graph; what is no graph has no nodes."""
    try:
        found = json.loads(answer)
        nodes = [{name: str(node[name]) for name in ("id", "kind", "text")} for node in found["nodes"]]
        edges = [{name: str(edge[name]) for name in ("from", "to", "label")} for edge in found.get("edges", [])]
    except (ValueError, KeyError, TypeError, AttributeError):
        return {"nodes": [], "edges": []}
    return {"nodes": nodes, "edges": edges}


def node_pairs(expected: Graph, found: Graph) -> dict[str, str]:
    """Return ids of `found` by those of `expected`: nodes of a kind and nearly the same text, the nearest first."""
    candidates = [
        (_similarity(one["text"], other["text"]), one["id"], other["id"])
        for one in expected["nodes"]
        for other in found["nodes"]
        if one["kind"] == other["kind"]
    ]
    pairs: dict[str, str] = {}
    for similarity, one, other in sorted(candidates, key=lambda each: -each[0]):
        if similarity >= _ALIKE and one not in pairs and other not in pairs.values():
            pairs[one] = other
    return pairs


def _similarity(one: str, other: str) -> float:
    return SequenceMatcher(None, one.casefold(), other.casefold(), autojunk=False).ratio()


def node_f1(expected: Graph, found: Graph) -> float:
    """Return the F1 of nodes."""
    return _f1(len(node_pairs(expected, found)), len(expected["nodes"]), len(found["nodes"]))


def edge_f1(expected: Graph, found: Graph) -> float:
    """Return the F1 of edges: both ends are paired, and the label is the same."""
    pairs = node_pairs(expected, found)
    wanted: Counter[Any] = Counter(
        (pairs.get(each["from"]), pairs.get(each["to"]), each["label"]) for each in expected["edges"]
    )
    there: Counter[Any] = Counter((each["from"], each["to"], each["label"]) for each in found["edges"])
    return _f1((wanted & there).total(), len(expected["edges"]), len(found["edges"]))


def _f1(right: int, expected: int, found: int) -> float:
    return 2 * right / (expected + found) if expected + found else 1.0


def run(graph: Graph, x: int, y: int) -> tuple[int, int] | None:
    """Return x and y at the chart's end; None where it never comes there or says what is no step.

    Steps are `x = y + 3` and decisions `x < 5?`: nothing of the answer is ever executed but these.
    """
    nodes = {node["id"]: node for node in graph["nodes"]}
    arrows = {(edge["from"], edge["label"]): edge["to"] for edge in graph["edges"]}
    values = {"x": x, "y": y}
    at = next((node["id"] for node in graph["nodes"] if node["kind"] == "start"), None)
    for _ in range(_MOST_STEPS):
        node = nodes.get(at or "")
        if node is None:
            return None
        if node["kind"] == "end":
            return values["x"], values["y"]
        label = ""
        if node["kind"] == "decision":
            if not (question := _DECISION.fullmatch(node["text"].strip())):
                return None
            one, other = _value(question[1], values), _value(question[3], values)
            label = "yes" if (one < other if question[2] == "<" else one > other) else "no"
        elif node["kind"] == "step" and not _take(node["text"].strip(), values):
            return None
        at = arrows.get((node["id"], label))
    return None


def _take(text: str, values: dict[str, int]) -> bool:
    """Take a step; return whether it is one."""
    if not (step := _STEP.fullmatch(text)):
        return False
    result = _value(step[2], values)
    if step[3]:
        result = _OPERATORS[step[3]](result, _value(step[4], values))
    values[step[1]] = max(-(10**9), min(10**9, result))
    return True


def _value(name: str, values: Mapping[str, int]) -> int:
    return values[name] if name in values else int(name)


def behaves_alike(expected: Graph, found: Graph, inputs: Sequence[tuple[int, int]]) -> bool:
    """Tell whether both compute the same of all inputs."""
    return all(run(expected, *each) == run(found, *each) for each in inputs)
