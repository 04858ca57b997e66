"""A flowchart asked edge by edge: the nodes are generated, and whether an arrow joins two of them is scored.

A step has one way on and a decision two, under `yes` and `no`: the likeliest are taken, so that a liking for yes costs
nothing. The picture and the words before a question's names stay in the KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from edgevlm.evals.flow import Graph, node_schema, read_graph
from edgevlm.evals.model import Model
from edgevlm.families.base import RGB

NODES = "Read the flowchart's nodes from top to bottom in JSON: named n1, n2 and so on, with their kinds and texts."
_TOKENS_OF_A_NODE = 60
Node: TypeAlias = Mapping[str, str]


def read_edge_by_edge(model: Model, pictures: Sequence[RGB], most_nodes: int) -> Graph:
    """Return a flowchart's graph. Raises what the model raises."""
    answer = model.generate(pictures, NODES, _TOKENS_OF_A_NODE * most_nodes, node_schema(most_nodes))
    nodes = list({node["id"]: node for node in reversed(read_graph(answer)["nodes"])}.values())[::-1]
    edges = [edge for node in nodes if node["kind"] != "end" for edge in _edges_from(model, pictures, node, nodes)]
    return {"nodes": nodes, "edges": edges}


def arrow_question(node: Node, other: Node) -> str:
    """Return the question whether an arrow goes from one node to another."""
    return f'Is there an arrow that goes from "{node["text"]}" to "{other["text"]}"?'


def label_question(node: Node, other: Node) -> str:
    """Return the question for the label of an arrow that leaves a decision."""
    return f'What is written at the arrow from "{node["text"]}" to "{other["text"]}"?'


def _edges_from(model: Model, pictures: Sequence[RGB], node: Node, nodes: Sequence[Node]) -> list[dict[str, str]]:
    """Return the likeliest edges that leave a node."""
    others = [other for other in nodes if other is not node and other["kind"] != "start"]
    arrow = {other["id"]: _yes(model, pictures, arrow_question(node, other)) for other in others}
    ends = sorted(others, key=lambda other: -arrow[other["id"]])
    if node["kind"] != "decision":
        return [_edge(node, end, "") for end in ends[:1]]
    yes = {end["id"]: _yes(model, pictures, label_question(node, end)) for end in ends[:2]}
    ends = sorted(ends[:2], key=lambda end: -yes[end["id"]])
    return [_edge(node, end, label) for end, label in zip(ends, ("yes", "no"), strict=False)]


def _edge(node: Node, end: Node, label: str) -> dict[str, str]:
    return {"from": node["id"], "to": end["id"], "label": label}


def _yes(model: Model, pictures: Sequence[RGB], question: str) -> float:
    return model.score(pictures, question, ("yes", "no")).probabilities["yes"]
