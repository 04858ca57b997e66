"""A picture of a flowchart to a graph in JSON, and on to a Python program.

python -m examples.flowchart sketch.png -m MODEL      (without a picture, one is drawn as if by hand)
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from edgevlm import VLM, Constraint

QUESTION = "Read the flowchart: list its nodes with their texts, and the arrows between them."
Graph = dict[str, Any]
SAMPLE: Graph = {
    "nodes": [
        {"id": "n1", "kind": "start", "text": "start"},
        {"id": "n2", "kind": "step", "text": "open valve"},
        {"id": "n3", "kind": "decision", "text": "tank full?"},
        {"id": "n4", "kind": "end", "text": "close valve"},
    ],
    "edges": [
        {"from": "n1", "to": "n2", "label": ""},
        {"from": "n2", "to": "n3", "label": ""},
        {"from": "n3", "to": "n4", "label": "yes"},
        {"from": "n3", "to": "n2", "label": "no"},
    ],
}


def schema(most_nodes: int = 9, longest_text: int = 30) -> dict[str, Any]:
    """Return the graph's JSON Schema; its bounds keep the answer within the context."""
    name = {"type": "string", "pattern": f"^n[1-{most_nodes}]$"}
    node = {"id": name, "kind": {"enum": ["start", "step", "decision", "end"]}}
    node |= {"text": {"type": "string", "maxLength": longest_text}}
    edge = {"from": name, "to": name, "label": {"enum": ["", "yes", "no"]}}
    return _object(
        nodes={"type": "array", "items": _object(**node), "minItems": 1, "maxItems": most_nodes},
        edges={"type": "array", "items": _object(**edge), "maxItems": 2 * most_nodes},
    )


def _object(**properties: Any) -> dict[str, Any]:
    fixed = {"required": list(properties), "additionalProperties": False}
    return {"type": "object", "properties": properties} | fixed


def read_graph(vlm: VLM, picture: Path | bytes, form: dict[str, Any] | None = None) -> Graph:
    """Return the graph that the model sees. Raises `EdgeVLMError`."""
    constraint = Constraint.json_schema(form or schema())
    return dict(json.loads(vlm.generate(picture, QUESTION, max_new_tokens=1500, constraint=constraint).text))


def complaints(graph: Graph) -> list[str]:
    """Return what a schema cannot forbid: arrows from or to nothing, names used twice, not just one start."""
    names = [node["id"] for node in graph["nodes"]]
    found = [f"{name} is there twice" for name in sorted(set(names)) if names.count(name) > 1]
    ends = {edge[end] for edge in graph["edges"] for end in ("from", "to")}
    found += [f"an arrow touches {name}, which is not there" for name in sorted(ends - set(names))]
    starts = sum(node["kind"] == "start" for node in graph["nodes"])
    return found if starts == 1 else [*found, f"there are {starts} starts"]


def to_python(graph: Graph) -> str:
    """Return a program that walks the chart: `do` is called with each step's text, `decide` answers each question."""
    start = next(node["id"] for node in graph["nodes"] if node["kind"] == "start")
    lines = ["def flow(do, decide):", f"    at = {start!r}", "    while at:", "        match at:"]
    for node in graph["nodes"]:
        after = {edge["label"]: edge["to"] for edge in graph["edges"] if edge["from"] == node["id"]}
        lines.append(f"            case {node['id']!r}:")
        if node["kind"] == "decision":
            lines.append(f"                at = {after!r}.get(decide({node['text']!r}))")
            continue
        if node["kind"] != "start":
            lines.append(f"                do({node['text']!r})")
        following = None if node["kind"] == "end" else next(iter(after.values()), None)
        lines.append(f"                at = {following!r}")
    return "\n".join([*lines, "            case _:", "                return", ""])


def draw(graph: Graph, seed: int = 0) -> Image.Image:
    """Return a picture of a chart, its nodes one below the other, drawn with an unsteady hand."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (512, 130 * len(graph["nodes"])), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(22)
    centres = {node["id"]: (220, 65 + 130 * place) for place, node in enumerate(graph["nodes"])}

    def stroke(*points: tuple[float, float]) -> None:
        for (x1, y1), (x2, y2) in pairwise(points):
            steps = np.linspace(0, 1, 12)[:, None]
            path = np.array([x1, y1]) + steps * np.array([x2 - x1, y2 - y1]) + random.normal(0, 0.9, (12, 2))
            pen.line([tuple(point) for point in path.tolist()], fill="black", width=3)

    for node in graph["nodes"]:
        x, y = centres[node["id"]]
        corners = [(x - 110, y - 32), (x + 110, y - 32), (x + 110, y + 32), (x - 110, y + 32)]
        if node["kind"] == "decision":
            corners = [(x, y - 44), (x + 130, y), (x, y + 44), (x - 130, y)]
        if node["kind"] in {"start", "end"}:
            corners = [(x + 110 * np.cos(turn), y + 36 * np.sin(turn)) for turn in np.linspace(0, 2 * np.pi, 13)[:-1]]
        stroke(*corners, corners[0])
        pen.text((x, y), node["text"], fill="black", font=font, anchor="mm")
    for edge in graph["edges"]:
        (x1, y1), (x2, y2) = centres[edge["from"]], centres[edge["to"]]
        down = y2 - y1 == 130
        side = (x1 + 120, y1), (400, y1), (400, y2), (x2 + 115, y2)
        points = ((x1, y1 + 45), (x2, y2 - 45)) if down else side
        stroke(*points)
        tip, back = points[-1], (-12 if down else 0, -12) if down else (12, -12)
        stroke((tip[0] + back[0], tip[1] + back[1]), tip)
        stroke((tip[0] + 12, tip[1] + (-12 if down else 12)), tip)
        pen.text((points[0][0] + 12, points[0][1] + 8), edge["label"], fill="black", font=font)
    return image


@click.command()
@click.argument("picture", required=False, type=click.Path(path_type=Path))
@click.option("-m", "--model")
def main(picture: Path | None, model: str | None) -> None:
    """Turn the flowchart in PICTURE into a program."""
    if picture is None:
        picture = Path("flowchart.png")
        draw(SAMPLE).save(picture)
        click.echo(f"drew {picture}", err=True)
    graph = read_graph(VLM(model), picture)
    click.echo(json.dumps(graph, indent=1))
    wrong = complaints(graph)
    if wrong:
        raise click.ClickException(f"that is no program: {'; '.join(wrong)}")
    click.echo(to_python(graph))


if __name__ == "__main__":
    main()
