"""The examples run on any model; what they make of an answer is checked with answers that are known."""

from __future__ import annotations

import csv
import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edgevlm import VLM
from examples import anomalies, flowchart, meter


def test_a_meter_becomes_a_row(vlm: VLM, exported: Path, china: Path, tmp_path: Path) -> None:
    found = meter.read_meter(vlm, china)
    assert found["instrument"] in {"gauge", "display", "counter", "thermometer"}
    assert -999 <= found["reading"] <= 99999
    table = tmp_path / "readings.csv"
    arguments = [str(china), str(tmp_path / "nonesuch.png"), str(china), "-m", str(exported), "-o", str(table)]
    result = CliRunner().invoke(meter.main, arguments)
    assert result.exit_code == 0
    assert "no such image file" in result.stderr
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["picture"] for row in rows] == ["china.png", "china.png"]
    assert json.loads(Path(meter.__file__).with_suffix(".json").read_text(encoding="utf-8")) == meter.SCHEMA


def test_a_series_is_plotted_and_judged(vlm: VLM, exported: Path, tmp_path: Path) -> None:
    table = tmp_path / "series.csv"
    series = anomalies.made_up()
    table.write_text("time,bar\n" + "".join(f"{n},{x}\n" for n, x in enumerate(series)), encoding="utf-8")
    np.testing.assert_array_equal(anomalies.read_series(table), series)
    with_spike, without = (anomalies.plot(anomalies.made_up(spike)) for spike in (True, False))
    assert Image.open(BytesIO(with_spike)).size == (512, 512)
    assert with_spike != without
    found = anomalies.judge(vlm, with_spike)
    assert set(found) == {"anomaly", "kind", "where", "probability"}
    assert 0 <= found["probability"] <= 1
    result = CliRunner().invoke(anomalies.main, [str(table), "-m", str(exported), "--picture", str(tmp_path / "a.png")])
    assert json.loads(result.stdout)["kind"] in anomalies.SCHEMA["properties"]["kind"]["enum"]  # type: ignore[index]
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def walk(graph: flowchart.Graph, decisions: list[str]) -> list[str]:
    """Run the program of a graph; return the steps it takes."""
    found: dict[str, object] = {}
    exec(flowchart.to_python(graph), found)  # noqa: S102
    steps: list[str] = []
    answers = iter(decisions)
    found["flow"](steps.append, lambda _: next(answers, ""))  # type: ignore[operator]
    return steps


def test_a_flowchart_becomes_a_program() -> None:
    assert flowchart.complaints(flowchart.SAMPLE) == []
    assert walk(flowchart.SAMPLE, ["no", "no", "yes"]) == ["open valve"] * 3 + ["close valve"]
    assert walk(flowchart.SAMPLE, []) == ["open valve"]  # an arrow that is not there ends the walk
    picture = flowchart.draw(flowchart.SAMPLE)
    assert (np.asarray(picture) < 128).mean() > 0.01


def test_text_in_a_picture_never_becomes_code() -> None:
    hostile = "'); import os; os.abort() #"
    nodes = [{"id": "n1", "kind": "start", "text": hostile}, {"id": "n2", "kind": "end", "text": hostile}]
    assert walk({"nodes": nodes, "edges": [{"from": "n1", "to": "n2", "label": ""}]}, []) == [hostile]


def test_what_a_schema_cannot_forbid_is_told() -> None:
    nodes = [{"id": "n1", "kind": "step", "text": ""}, {"id": "n1", "kind": "end", "text": ""}]
    graph = {"nodes": nodes, "edges": [{"from": "n1", "to": "n7", "label": ""}]}
    assert flowchart.complaints(graph) == [
        "n1 is there twice", "an arrow touches n7, which is not there", "there are 0 starts"
    ]  # fmt: skip


@pytest.mark.parametrize("most", [1, 3])
def test_any_model_writes_a_graph(vlm: VLM, most: int) -> None:
    buffer = BytesIO()
    flowchart.draw(flowchart.SAMPLE).resize((128, 128)).save(buffer, "png")
    graph = flowchart.read_graph(vlm, buffer.getvalue(), flowchart.schema(most, longest_text=8))
    assert 1 <= len(graph["nodes"]) <= most
    assert all(set(edge) == {"from", "to", "label"} for edge in graph["edges"])
    assert isinstance(flowchart.complaints(graph), list)
