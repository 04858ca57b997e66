"""`edgevlm eval`: generated answers beside scores, flowcharts edge by edge, places of anomalies, busy servers."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm import VLM, ModelError, OptionError, OutputError
from edgevlm.cli.evaluation import Evaluation
from edgevlm.evals import series
from edgevlm.evals.ask import said_option
from edgevlm.evals.edge_by_edge import NODES
from edgevlm.evals.items import Suite
from edgevlm.evals.model import Scored
from edgevlm.evals.remote import RemoteModel
from edgevlm.evals.results import summarize
from edgevlm.evals.run import Selection, ask, evaluate, keep_pictures
from edgevlm.evals.series_files import pieces, read_series
from edgevlm.evals.statistics import auroc
from edgevlm.evals.suites import SUITES, anomaly, make_suite
from edgevlm_export import ExportOptions, export
from tests.conftest import F32
from tests.helpers.adapters import train
from tests.helpers.command import cli
from tests.helpers.evaluating import Guesser, Oracle
from tests.helpers.serving import serving
from tests.test_eval import FAST, square

PLACE = "where it is"
DRAWN = {"carrier", "charts-cf", "spacenum", "tempglitch", "tasks", "anomaly", "flowchart", "pages", "fidelity"}


def test_events_and_overlap_by_hand() -> None:
    true = [(10, 20), (30, 40), (50, 60)]
    found = [(19, 22), (15, 16), (35, 55), (80, 90)]  # one match each: the second on 10-20 is wrong
    assert series.match(true, found) == (2, 2, 1) and series.f1(series.match(true, found)) == pytest.approx(4 / 7)
    assert series.f1(series.match([], [])) == 1 and series.f1(series.match([], [(1, 2)])) == 0
    assert series.overlap([(0, 9)], [(5, 14), (8, 14)]) == pytest.approx(5 / 15) and series.overlap([], []) is None
    assert series.spans_of(np.array([3, 4, 9, 40]), near=5) == [(3, 9), (40, 40)]
    assert series.read('{"anomaly": true, "intervals": [[9, 4]]}') == ("", [(4, 9)])
    assert series.read('{"anomaly": false, "intervals": [[4, 9]]}') == ("", [])
    assert series.read('{"anomaly": true, "intervals": [[9') is series.read("[]") is None
    with_ties = np.random.default_rng(0).integers(0, 5, (2, 30)).astype(float)
    pairs = np.sign(np.subtract.outer(*with_ties))
    assert auroc(*with_ties.tolist()) == pytest.approx(np.mean(pairs) / 2 + 0.5)


def places(suite: Suite, count: int) -> list[Any]:
    return [item for item in suite.items(None, 4) if item.cell == PLACE][:count]


def test_an_anomaly_s_place_is_where_its_twin_differs() -> None:
    for item in places(make_suite("anomaly"), 30):
        truth, facts = json.loads(item.truth), item.facts
        clean, shown = (anomaly.make_series(facts["seed"], kind) for kind in (None, facts["kind"]))
        inside = np.zeros(len(shown), bool)
        for start, end in truth["intervals"]:
            inside[start : end + 1] = True
        assert not (clean != shown)[~inside].any() and truth["anomaly"] == bool((clean != shown).any())
        assert truth["kind"] == (facts["kind"] or "none") and (item.variant == "clean") != truth["anomaly"]


def test_places_are_counted_as_events_beside_the_detectors() -> None:
    suite = make_suite("anomaly")
    items = places(suite, 12)
    seen = summarize(suite, [ask(suite, Oracle(suite, [item]), item, blind=False) for item in items])
    told = ("events, precision", "events, recall", "events, F1", "overlap", "kind right")
    assert [seen.figures[name] for name in told] == [1] * 5
    assert [seen.intervals[name] for name in told] == [(1, 1)] * 5
    assert 0.3 < seen.figures["events, F1 of a rolling z-score"] < 1 > seen.figures["overlap of IsolationForest"] > 0
    low, high = seen.intervals["events, F1 of a rolling z-score"]
    assert low < seen.figures["events, F1 of a rolling z-score"] < high

    class Shy(Guesser):
        def generate(self, pictures: Any, question: str, max_new_tokens: int, schema: Any = None) -> str:
            return '{"anomaly": false, "kind": "none", "intervals": []}'

    none = summarize(suite, [ask(suite, Shy(), item, blind=True) for item in items])
    assert none.total.accuracy == none.total.blind == 0.5  # right about clean ones, and blind just as much
    assert none.figures["events, F1"] == none.figures["overlap"] == none.figures["kind right"] == 0
    assert "a rolling z-score of the numbers finds more (events, F1" in none.verdict


def write_csv(path: Path, labels: Sequence[int], delimiter: str = ",", heading: str = "Data,Label") -> None:
    values = np.sin(np.arange(len(labels)) / 9) + np.array(labels) * 3
    lines = [f"{value:.6f},{label}" for value, label in zip(values, labels, strict=True)]
    path.write_text("\n".join([heading, *lines, ""]).replace(",", delimiter), encoding="utf-8")


def test_own_series_of_both_forms(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [0] * 100 + [1] * 20 + [0] * 80, ";")
    write_csv(tmp_path / "b.csv", [0] * 60 + [1, 1] + [0] * 38 + [1] + [0] * 29, "\t", "Value,label")
    values = np.random.default_rng(0).normal(size=10_000)
    (tmp_path / "001_UCR_Anomaly_x_4000_8991_9010.txt").write_text(" ".join(map(str, values)), encoding="utf-8")
    ucr, first, second = read_series(tmp_path)
    assert ucr.spans == ((8990, 9009),) and (ucr.values == values).all()
    assert first.spans == ((100, 119),) and second.spans == ((60, 61), (100, 100))
    cut = list(pieces(ucr))
    assert np.array_equal(np.concatenate([piece.values for piece in cut]), values) and len(cut) == 10
    assert {piece.start: piece.spans for piece in cut if piece.spans} == {8000: ((990, 999),), 9000: ((0, 9),)}
    suite = make_suite("anomaly", tmp_path)
    items = suite.items(None, 0)
    assert [item.truth for item in items if item.options].count("yes") == 4 and len(items) == 16
    rows = [ask(suite, Oracle(suite, [item]), item, blind=False) for item in items]
    found = summarize(suite, rows)
    assert found.total.accuracy == found.figures["AUROC"] == found.figures["events, F1"] == 1
    assert "kind right" not in found.figures and found.figures["AUROC of a rolling z-score"] > 0.5
    assert summarize(suite, evaluate(suite, Guesser(), Selection(6))).total.asked == 6


def test_own_series_are_plotted_over_their_whole_range(tmp_path: Path) -> None:
    for name, scale in (("large", 1e6), ("small", 1e-6), ("flat", 0.0)):
        lines = [f"{scale * np.sin(place / 5)},{int(place == 70)}" for place in range(140)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["Data,Label", *lines]), encoding="utf-8")
    for item in make_suite("anomaly", tmp_path).items(None, 0):
        dark = (item.pictures()[0][20:440, 60:480] < 60).all(-1)
        rows = np.flatnonzero(dark[:, 5:].any(1))
        assert np.ptp(rows) > 250 or item.id.startswith("flat")


BAD_SERIES = {
    "no label": ("a.csv", "Data,Anomaly\n1,0\n", "no column Label, or several; it has Data, Anomaly"),
    "two values": ("a.csv", "x,y,Label\n1,2,0\n", "one column of values can be plotted, but it has x, y"),
    "a gap": ("a.csv", "Data,Label\n1,0\n,0\n", "line 3: '' is no number"),
    "NaN": ("a.csv", "Data,Label\nNaN,0\n", "line 2: 'NaN' is no number; leave such rows out"),
    "a comma": ("a.csv", "Data;Label\n1,5;0\n", "line 2: '1,5' is no number"),
    "a torn line": ("a.csv", "Data,Label\n1,0\n1\n", "line 3 has 1 columns, but its heading 2"),
    "another label": ("a.csv", "Data,Label\n1,2\n", "Label must be 0 or 1, not 2"),
    "too short": ("a.csv", "Data,Label\n1,0\n", "has 1 points; a series needs 48 at least"),
    "empty": ("a.csv", "", "it has no columns"),
    "nothing odd": ("a.csv", "Data,Label\n" + "1,0\n" * 60, "none of its series has an anomaly"),
    "an unknown name": ("a.txt", "1 2 3", "the name of a text does not say where its anomaly is"),
    "a wrong name": ("a_5_90_95.txt", "1 " * 60, "its name says points 90 to 95, but it has 60"),
    "bytes": ("a.csv", b"\xff\xfe\x00", "cannot be read"),
    "other files": ("a.parquet", "x", "holds no series: CSV with a column Label"),
}


@pytest.mark.parametrize("case", BAD_SERIES)
def test_bad_series_are_told_in_a_line(case: str, tmp_path: Path) -> None:
    name, content, told = BAD_SERIES[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for suite in (make_suite("anomaly", tmp_path), make_suite("anomaly", tmp_path / name)):
        if name == "a.parquet" and suite.data != tmp_path:
            continue
        with pytest.raises(OptionError, match=re.escape(told)) as raised:
            suite.items(None, 0)
        assert "\n" not in str(raised.value) and name.partition(".")[0] in str(raised.value) + "a"
    with pytest.raises(OptionError, match="does not exist; --data takes a folder of series"):
        make_suite("anomaly", tmp_path / "none").items(None, 0)


class Reader(Guesser):
    """Writes a graph without its last edge, and knows of each pair whether an arrow joins it."""

    def __init__(self, truth: str, likes: float = 0.0) -> None:
        super().__init__()
        self._graph, self._likes = json.loads(truth), likes
        texts = {node["id"]: node["text"] for node in self._graph["nodes"]}
        self._arrows = {(texts[edge["from"]], texts[edge["to"]]): edge["label"] for edge in self._graph["edges"]}

    def generate(self, pictures: Any, question: str, max_new_tokens: int, schema: Any = None) -> str:
        edges = {} if question == NODES else {"edges": self._graph["edges"][:-1]}
        return json.dumps({"nodes": self._graph["nodes"], **edges})

    def score(self, pictures: Any, question: str, options: Sequence[str]) -> Scored:
        pair = re.findall('"(.*?)"', question)
        label = self._arrows.get((pair[0], pair[1]))
        yes = label == "yes" if question.startswith("What is written") else label is not None
        share = self._likes + (1 - self._likes) * (0.7 if yes else 0.2)  # never below what it likes to say
        return Scored({"yes": share, "no": 1 - share}, 1.0)


def test_a_flowchart_is_read_edge_by_edge() -> None:
    suite = make_suite("flowchart")
    suite.strategy = "edges"
    items = suite.items(9, 1)
    rows = [ask(suite, Reader(item.truth, 0.6 * (place % 2)), item, blind=False) for place, item in enumerate(items)]
    found = summarize(suite, rows)
    assert found.figures["edges, F1, edge by edge"] == found.figures["behaves alike on 50 inputs, edge by edge"] == 1
    gained = found.figures["edges, F1, gained edge by edge"]
    assert gained == pytest.approx(1 - found.figures["edges, F1"]) and gained > 0.03
    low, high = found.intervals["edges, F1, gained edge by edge"]
    assert 0 < low < gained < high
    suite.strategy = ""
    assert "by_edges" not in ask(suite, Reader(items[0].truth), items[0], blind=False)


def test_a_strategy_is_for_flowcharts_alone() -> None:
    refused = cli("eval", "-m", "panel", "--suite", "carrier", "--strategy", "edges", *FAST)
    assert refused.exit_code == 1 and "no chosen suite has the strategy edges" in refused.stderr


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("B", "green"),
        (" b. ", ""),
        ("B.", "green"),
        ("(B) green", "green"),
        ("C, for the sky is", "blue"),
        ("The answer is C", "blue"),
        ("Answer: A", "red"),
        ("A red one", "red"),
        ("It is Blue.", "blue"),
        ("red or green", ""),
        ("greenish", ""),
        ("", ""),
        ("D.", ""),
    ],
)
def test_what_a_free_answer_says(text: str, option: str) -> None:
    assert said_option(text, ("A", "B", "C"), ("red", "green", "blue")) == option


def test_a_yes_is_no_letter() -> None:
    assert said_option("Yes, there is.", ("yes", "no"), ("yes", "no")) == "yes"
    assert said_option("No.", ("yes", "no"), ("yes", "no")) == "no"
    assert said_option("Yes or no?", ("yes", "no"), ("yes", "no")) == ""


class Silent(Oracle):
    """Knows the truth, and does not say it."""

    def choose(self, pictures: Any, question: str, options: Sequence[str]) -> str:
        return next(option for option in options if option != super(Silent, self).choose(pictures, question, options))

    def generate(self, pictures: Any, question: str, max_new_tokens: int, schema: Any = None) -> str:
        return "I would rather not say."


class Squares(Suite):
    """Three squares under letters, and three without."""

    name, asks = "squares", "names colours"

    def items(self, count: int | None, seed: int) -> Sequence[Any]:
        return [square(f"{cell}/{n}", cell, n) for cell in ("plain", "other") for n in range(3)]


def test_what_a_model_knows_and_does_not_say_is_told() -> None:
    suite = Squares()
    items = suite.items(None, 0)
    for mode, none in (("generate", 0), ("free", 1)):
        rows = evaluate(suite, Silent(suite, items), Selection(mode=mode))
        found = summarize(suite, rows)
        assert found.total.accuracy == 1 and found.total.said == 0
        assert found.figures == {
            "knows and does not say": 1,
            "says and does not know": 0,
            "says none of the options": none,
        }
        said = summarize(suite, evaluate(suite, Oracle(suite, items), Selection(mode="generate"))).total.said
        assert said == 1
    assert summarize(suite, evaluate(suite, Silent(suite, items), Selection())).total.said is None


def test_pictures_are_kept(tmp_path: Path) -> None:
    suite = Squares()
    evaluate(suite, Oracle(suite, suite.items(None, 0)), Selection(), pictures=tmp_path / "kept")
    names = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert names == sorted(f"{cell}%2F{n}-1.png" for cell in ("plain", "other") for n in range(3))
    for item in suite.items(None, 0):
        kept = Image.open(tmp_path / "kept" / f"{item.id.replace('/', '%2F')}-1.png")
        assert np.array_equal(np.asarray(kept), item.pictures()[0])
    keep_pictures(tmp_path / "kept", square("../../up", "plain", 0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]
    refused = cli("eval", "-m", "panel", "--suite", "carrier", "--keep-pictures", *FAST)
    assert refused.exit_code == 1 and "--keep-pictures needs a folder; add -o" in refused.stderr


def test_every_suite_is_for_the_shape_of_smolvlm(exported_smolvlm: Path, tmp_path: Path) -> None:
    """All that it can take; the others are left out in one line, and two runs are the same."""
    runs = []
    for run in ("first", "second"):
        command = ["-m", exported_smolvlm, "--against", exported_smolvlm, "--items", 2, "--detail", "low", "--no-blind"]
        told = ["--mode", "generate", "--strategy", "edges", "-o", tmp_path / run, "--keep-pictures", "--json"]
        found = cli("eval", *command, *told, *FAST)
        assert found.exit_code == 0, found.output
        result = json.loads(found.stdout)
        left_out = result["left_out"]
        assert {"mcq", "wikivqa"} <= set(left_out) and "\n" not in "".join(left_out.values())
        assert {*result["suites"], *left_out} == set(SUITES) and set(result["suites"]) >= DRAWN
        assert all(each["difference"] == 0 for each in result["differences"].values())
        rows = {
            path.name: re.sub(rb', ?"seconds": ?[\d.e-]+', b"", path.read_bytes())
            for path in (tmp_path / run).glob("*.jsonl")
        }
        runs.append(rows)
    assert runs[0] == runs[1] and len(runs[0]) == len(result["suites"])
    rows = [json.loads(line) for line in runs[0][f"{exported_smolvlm.name}-carrier.jsonl"].splitlines()]
    assert rows[0]["mode"] == "generate" and all(row["said"] in row["options"] for row in rows[1:])
    assert b'"by_edges"' in runs[0][f"{exported_smolvlm.name}-flowchart.jsonl"]
    assert len(list((tmp_path / "first" / "pictures" / "tempglitch").iterdir())) == 2


@contextmanager
def busy(times: int, retry_after: str | None = "0") -> Iterator[tuple[str, list[str]]]:
    """Run a server that refuses as many requests before it answers; give its address and the paths asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(self.path)
            is_busy = len(asked) <= times
            reply = {"error": {"message": "the queue is full"}} if is_busy else SCORED
            body = json.dumps(reply).encode()
            self.send_response(503 if is_busy else 200)
            if retry_after is not None:
                self.send_header("Retry-After", retry_after)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


SCORED = {"probabilities": {"A": 0.75, "B": 0.25}, "total_probability": 0.5}


def test_a_busy_server_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    with busy(3) as (url, asked), caplog.at_level(logging.WARNING):
        found = RemoteModel(url, "some").score([], "Which?", ("A", "B"))
    assert found.probabilities["A"] == 0.75 and len(asked) == 4
    assert [record.getMessage().partition("answered ")[2] for record in caplog.records] == [
        f"503: the queue is full; asked again in 0 s ({tries} of 9)" for tries in (1, 2, 3)
    ]
    with busy(99) as (url, asked), pytest.raises(ModelError, match="answered 503: the queue is full") as raised:
        RemoteModel(url, "some").score([], "Which?", ("A", "B"))
    assert len(asked) == 10 and "\n" not in str(raised.value)


def test_a_server_s_model_chooses(exported_smolvlm: Path) -> None:
    with serving(VLM(exported_smolvlm, F32)) as server:
        answer = RemoteModel(f"{server.url}/v1").choose([np.zeros((40, 40, 3), np.uint8)], "Which?", ("a cat", "a dog"))
    assert answer in ("a cat", "a dog")


def test_how_long_a_busy_server_is_waited_for() -> None:
    from edgevlm.evals.remote import _wait_s

    assert [_wait_s(told, 3) for told in ("2", "0", "3600", "-1", None, "Sun, 29 Nov 2026 08:00:00 GMT", "nan")] == [
        2,
        0,
        30,
        0,
        8,
        8,
        8,
    ]
    assert _wait_s(None, 9) == 30


def test_what_tuning_changed_is_paired(idefics3: Path, exported: Path, tmp_path: Path) -> None:
    train(idefics3, tmp_path / "my-sft")
    aligned = export(
        idefics3,
        tmp_path / "aligned",
        ExportOptions("fp32", via="native", verify=False, adapters=(tmp_path / "my-sft",)),
    ).folder
    found = cli(
        "eval", "-m", exported, "--against", aligned, "--suite", "carrier,tempglitch", "--items", 5, "--no-blind",
        "--json", "-o", tmp_path / "rows", *FAST,
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert set(result["differences"]) == {"carrier", "tempglitch"} and result["against"] == "aligned"
    before, after = ((tmp_path / "rows" / f"{name}-carrier.jsonl").read_bytes() for name in (exported.name, "aligned"))
    scores = [[json.loads(line)["scores"] for line in rows.splitlines()[1:]] for rows in (before, after)]
    assert scores[0] != scores[1] and [set(each) for each in scores[0]] == [set(each) for each in scores[1]]


def test_the_mode_and_strategy_stand_in_the_rows(tmp_path: Path) -> None:
    run = Evaluation("carrier", 5, False, 0, None, blind=False, output=tmp_path, mode="free")
    run(Guesser(), None)
    again = Evaluation("carrier", 5, False, 0, None, blind=False, output=tmp_path)
    with pytest.raises(OutputError, match="another model, suite or selection"):
        again(Guesser(), None)
