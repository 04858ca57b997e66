"""`edgevlm eval`: suites are proven by oracles and guessers, results by hand, and a run goes on after a kill."""

from __future__ import annotations

import base64
import csv
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import product
from pathlib import Path
from threading import Thread
from typing import Any, get_args

import jsonschema_rs
import numpy as np
import pytest
from PIL import Image

from edgevlm import VLM, GenerationConfig, ImageBudget, ModelError, OptionError, OutputError
from edgevlm.cli.evaluation import Evaluation
from edgevlm.decoding.fidelity import Fidelity, fidelity
from edgevlm.evals import flow, texts
from edgevlm.evals.ask import LocalModel
from edgevlm.evals.items import Item, Suite, spread
from edgevlm.evals.model import Scored
from edgevlm.evals.pair import Pair
from edgevlm.evals.remote import RemoteModel
from edgevlm.evals.results import compare, compare_cells, summarize
from edgevlm.evals.run import Selection, ask, evaluate
from edgevlm.evals.statistics import auroc, cluster_bootstrap, mcnemar, wilson
from edgevlm.evals.suites import SUITES, anomaly, flowchart, make_suite, tempglitch
from edgevlm.families.base import Detail
from edgevlm.model_store import default_model
from edgevlm.server.run import Server
from tests.conftest import F32, noise
from tests.helpers.command import cli
from tests.helpers.evaluating import Guesser, Oracle, picture_digest
from tests.helpers.serving import request, serving

GENERATED = [name for name in SUITES if name not in ("fidelity", "mcq", "wikivqa")]
WORDS = ("dark", "pale", "round", "a square")
FAST = ["--device", "CPU", "--no-cache", "--kv-cache", "stateful"]


@pytest.fixture(params=GENERATED)
def suite(request: pytest.FixtureRequest) -> Suite:
    if request.param == "real":
        pytest.importorskip("skimage", reason="scikit-image is not installed: pip install 'edgevlm[eval]'")
    return make_suite(request.param)


def test_an_oracle_is_right_and_a_guesser_at_chance(suite: Suite) -> None:
    items = suite.items(120, 3)
    told = summarize(suite, [ask(suite, Oracle(suite, [item]), item, blind=False) for item in items])
    assert told.total.accuracy == 1 and told.total.robust in (1, None)
    guessed = summarize(suite, evaluate(suite, Guesser(), Selection(120, 3, blind=False)))
    assert guessed.total.is_chance, guessed.total


def test_the_same_seed_makes_the_same_items(suite: Suite) -> None:
    assert picture_digest(suite.items(24, 5)) == picture_digest(make_suite(suite.name).items(24, 5))
    assert picture_digest(suite.items(24, 5)) != picture_digest(suite.items(24, 6))
    ids = [item.id for item in suite.items(None, 5)]
    assert len(set(ids)) == len(ids) >= suite.quick
    assert [item.id for item in suite.items(24, 5)] == ids[:24][: len(suite.items(24, 5))]


def test_statistics() -> None:
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    assert mcnemar(0, 0) == 1 and mcnemar(1, 9) == pytest.approx(0.021484, abs=1e-6)
    values = np.random.default_rng(1).integers(0, 2, 400).astype(float).tolist()
    alone = cluster_bootstrap(values, list(map(str, range(400))))
    assert alone == pytest.approx(wilson(sum(values), 400), abs=0.01)
    four = cluster_bootstrap([each for each in values[:100] for _ in range(4)], [str(n // 4) for n in range(400)])
    assert four[1] - four[0] > 1.8 * (alone[1] - alone[0])  # as wide as of a hundred
    assert cluster_bootstrap([1.0], ["a"]) == (0.0, 1.0)


def test_no_single_frame_of_a_glitch_tells_it() -> None:
    clean = {state for start in range(-30, 30) for phase in range(4) for state in tempglitch.clean(start, phase)}
    for make in tempglitch.GLITCHES.values():
        for start, phase, at in product(range(1, 4), range(4), range(5, 9)):
            glitch = make(start, phase, at)
            assert set(glitch) <= clean and glitch != tempglitch.clean(start, phase)
            assert glitch[:at] == tempglitch.clean(start, phase)[:at]


def test_followers_of_the_data_and_parrots_are_told_apart() -> None:
    suite = make_suite("charts-cf")
    items = suite.items(44, 0)
    rows = [ask(suite, Oracle(suite, [item]), item, blind=False) for item in items]
    told = suite.figures(rows)
    assert told == {"generalization": 1, "sensitivity": 1, "copying": 0, "family-robust": 1}
    truths = {row["family"]: row["truth"] for row in rows if row["variant"] == "original"}
    parrot = [
        row | {"answer": truths[row["family"]], "right": float(truths[row["family"]] == row["truth"])} for row in rows
    ]
    told = suite.figures(parrot)
    assert (told["sensitivity"], told["copying"]) == (0, 1) and told["generalization"] < 0.6


class Colours(Suite):
    """Six squares of a colour."""

    name, asks = "colours", "names colours"

    def items(self, count: int | None, seed: int) -> Sequence[Item]:
        cells = [[square(f"{cell}-{n}", cell, n) for n in range(3)] for cell in ("plain", "other")]
        return spread(cells, count)


def square(name: str, cell: str, index: int) -> Item:
    colours = ("red", "green", "blue")
    picture = np.zeros((40, 40, 3), np.uint8)
    picture[..., index] = 255 if cell == "plain" else 200
    return Item(name, cell, "Which colour?", lambda: [picture], colours[index], colours, cell == "other")


def test_a_run_goes_on_after_a_kill(tmp_path: Path) -> None:
    suite = Colours()
    oracle = Oracle(suite, suite.items(None, 0))
    rows = evaluate(suite, oracle, Selection(), tmp_path / "a.jsonl")
    assert [row["cell"] for row in rows] == ["plain", "other"] * 3
    whole = (tmp_path / "a.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 7 and json.loads(lines[0])["model"] == "oracle"
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:20])  # torn in its third row
    again = evaluate(suite, oracle, Selection(), tmp_path / "a.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes().startswith(b"".join(lines[:3]))
    assert [_timeless(row) for row in again] == [_timeless(row) for row in rows]
    with pytest.raises(OutputError, match="another model, suite or selection"):
        evaluate(suite, oracle, Selection(seed=1), tmp_path / "a.jsonl")


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "seconds"}


def test_results_of_two_models_are_paired(tmp_path: Path) -> None:
    suite = Colours()
    first = evaluate(suite, Oracle(suite, suite.items(None, 0)), Selection())
    total = summarize(suite, first).total
    assert (total.accuracy, total.asked, total.majority, total.unwilling) == (1.0, 6, pytest.approx(1 / 3), 0.0)
    assert total.blind == pytest.approx(1 / 3)  # it names the first of what is offered
    second = [row | {"right": 0.0} if index < 2 else row for index, row in enumerate(first)]
    found = compare(first, second)
    assert (found.difference, found.only_first, found.only_second) == (pytest.approx(-1 / 3), 2, 0)
    assert found.p == 0.5 and found.interval[0] < -1 / 3 < found.interval[1]
    by_cell = compare_cells(first, second)
    assert {cell: each.only_first for cell, each in by_cell.items()} == {"plain": 1, "other": 1}


def test_items_that_do_not_fit_the_context_are_told_and_do_not_count(exported: Path) -> None:
    local = LocalModel(VLM(exported, F32), GenerationConfig(), ImageBudget("low"))
    suite = Colours()
    rows = evaluate(suite, local, Selection(3, blind=False))
    long = square("long", "plain", 0)
    rows.append(ask(suite, local, replace(long, question="Which colour? " * 400), blind=False))
    result = summarize(suite, rows)
    ((why, count),) = result.unanswered.items()
    assert result.total.asked == 3 and count == 1 and "the model's context holds 512" in why
    with pytest.raises(OptionError, match="no item of the suite colours can be asked: the prompt has"):
        summarize(suite, rows[3:])
    assert compare(rows, rows).difference == 0


class Alphabetical:
    """Always takes the first letter."""

    name, is_general = "first", True
    prompts: Mapping[str, str] = {}

    def describe(self) -> dict[str, Any]:
        return {}

    def score(self, pictures: Any, question: str, options: Sequence[str]) -> Scored:
        return Scored({option: float(option == options[0]) for option in options}, 0.01)

    def generate(self, pictures: Any, question: str, max_new_tokens: int, schema: Any = None) -> str:
        return ""


def test_a_liking_for_a_letter_is_chance_and_never_robust() -> None:
    rows = [row for row in evaluate(Colours(), Alphabetical(), Selection()) if row["cell"] == "other"]
    assert all(row["right"] == pytest.approx(1 / 3) and not row["robust"] for row in rows)
    assert summarize(Colours(), rows).total.unwilling == 1


def test_the_bundled_model_is_asked_alike_twice() -> None:
    local = LocalModel(VLM("panel", F32), GenerationConfig(), ImageBudget())
    suite, selection = make_suite("carrier"), Selection(10)
    rows = evaluate(suite, local, selection)
    assert [_timeless(row) for row in evaluate(suite, local, selection)] == [_timeless(row) for row in rows]


def test_the_command_and_its_page(tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    result = cli(
        "eval", "-m", "panel", "--suite", "carrier", "--items", 5, "--report", page, "-o", tmp_path, "--json", *FAST
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["suites"]["carrier"]["total"]["asked"] == 5
    text = page.read_text(encoding="utf-8")
    assert "<figure>" in text and "http" not in text.replace("http-equiv", "")
    again = cli("eval", "-m", "panel", "--suite", "carrier", "--items", 5, "--against", "panel", "-o", tmp_path, *FAST)
    assert "+0.0 points" in again.stdout and "chance 25%" in again.stdout
    everything = cli("eval", "-m", "panel", "--items", 1, "--no-blind", "--json", *FAST)
    assert everything.exit_code == 0, everything.output
    left_out = {"mcq", "wikivqa", "fidelity", "flowchart", "pages", "real"}
    assert set(json.loads(everything.stdout)["left_out"]) == left_out
    for bad, told in (("none", "there is no suite 'none'"), ("wikivqa", "needs --data"), ("mcq", "needs --data")):
        failed = cli("eval", "-m", "panel", "--suite", bad)
        assert failed.exit_code == 1 and told in failed.stderr and "Traceback" not in failed.stderr


def test_an_export_agrees_with_itself_and_less_with_fewer_bits(exported: Path, exported_int4: Path) -> None:
    suite, selection = make_suite("fidelity"), Selection(12)
    assert {item.cell for item in suite.items(24, 0)} > {"description", "gauge"}
    models = {path: LocalModel(VLM(path, F32), GenerationConfig(), ImageBudget()) for path in (exported, exported_int4)}
    same = evaluate(suite, Pair(models[exported], models[exported]), selection)
    assert all((row["right"], row["first_divergence"]) == (1, None) and abs(row["kl"]) < 1e-9 for row in same)
    assert all(row["answer"] == row["truth"] and row["positions"] >= 1 for row in same)
    rows = evaluate(suite, Pair(models[exported_int4], models[exported]), selection)
    result = summarize(suite, rows)
    assert result.figures["KL divergence, nats"] > 1e-4 and "chance" not in result.verdict
    for row in rows:  # the first other token is where the export's own greedy answer leaves the reference's
        own = models[exported_int4].token_ids(make_picture(suite, row), row["question"], 64)
        reference = models[exported].token_ids(make_picture(suite, row), row["question"], 64)
        apart = next((at for at, pair in enumerate(zip(own, reference, strict=False)) if len(set(pair)) > 1), None)
        assert apart == row["first_divergence"]


def make_picture(suite: Suite, row: Mapping[str, Any]) -> Sequence[Any]:
    return next(item for item in suite.items(None, 0) if item.id == row["item"]).pictures()


def test_fidelity_of_logits_by_hand() -> None:
    reference = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32))
    model = np.log(np.array([[0.5, 0.25, 0.25], [0.7, 0.2, 0.1]], np.float32))
    found = fidelity(reference, model)
    assert (found.greedy_agreement, found.positions, found.first_divergence) == (0.5, 2, 1)
    expected = 0.1 * np.log(0.1 / 0.7) + 0.8 * np.log(0.8 / 0.2)  # of the reference's distribution
    assert found.kl_divergence == pytest.approx(expected / 2, rel=1e-5)
    assert fidelity(reference, reference) == Fidelity(1.0, 0.0, 2, None)


def test_fidelity_needs_two_exports_of_one_checkpoint(exported: Path) -> None:
    alone = cli("eval", "-m", exported, "--suite", "fidelity", *FAST)
    assert alone.exit_code == 1 and "add --against" in alone.stderr
    other = cli("eval", "-m", exported, "--against", "panel", "--suite", "fidelity", "--items", 1, *FAST)
    assert other.exit_code == 1 and "different tokenizers" in other.stderr


def test_a_gauge_s_reading_may_be_a_little_off() -> None:
    suite = make_suite("tasks")
    item = next(item for item in suite.items(None, 0) if item.cell == "gauge")
    near, far = (float(item.truth) + step * item.facts["tolerance"] for step in (0.9, 1.1))
    assert [suite.grade(item, text) for text in (f"{near:.4f} bar", f"{far:.4f} bar", "", "none")] == [1, 0, 0, 0]


def test_series_differ_in_their_anomaly_alone_and_detectors_find_it() -> None:
    suite = make_suite("anomaly")
    for index, kind in product(range(3), anomaly.KINDS):
        clean, odd = (anomaly.make_series([7, index], each) for each in (None, kind))
        changed = np.flatnonzero(clean != odd)
        assert 60 <= changed[0] < 170 and not np.array_equal(clean, odd)
        assert kind == "a lasting shift of level" or changed[-1] < 240 - 10
    items = suite.items(60, 2)
    blind = suite.figures([ask(suite, Guesser(), item, blind=False) for item in items])
    assert blind["AUROC of a rolling z-score"] > 0.7 > blind["AUROC"]
    assert suite.remark(blind).startswith("; a rolling z-score of the numbers finds more")
    seen = suite.figures([ask(suite, Oracle(suite, [item]), item, blind=False) for item in items])
    assert (seen["AUROC"], seen["twins told apart"], suite.remark(seen)) == (1, 1, "")


def test_ranks() -> None:
    assert auroc([3, 2], [1, 0]) == 1 and auroc([0.5], [0.5]) == 0.5 and auroc([0, 2], [1]) == 0.5
    assert np.isnan(auroc([], [1.0]))


def test_flowcharts_are_graded_as_graphs_and_as_programs() -> None:
    expected = flowchart.program(np.random.default_rng(3), 9, 12)
    inputs = flowchart.inputs()
    letters = {node["id"]: f"n{number}" for number, node in enumerate(reversed(expected["nodes"]), 1)}
    renamed = {
        "nodes": [node | {"id": letters[node["id"]]} for node in expected["nodes"]],
        "edges": [edge | {"from": letters[edge["from"]], "to": letters[edge["to"]]} for edge in expected["edges"]],
    }
    assert flow.node_f1(expected, renamed) == flow.edge_f1(expected, renamed) == 1
    assert flow.behaves_alike(expected, renamed, inputs)
    cut = {"nodes": expected["nodes"], "edges": expected["edges"][:-1]}
    assert flow.node_f1(expected, cut) == 1 > flow.edge_f1(expected, cut)
    assert not flow.behaves_alike(expected, cut, inputs)
    turned = [
        edge | {"label": {"yes": "no", "no": "yes"}.get(edge["label"], edge["label"])} for edge in expected["edges"]
    ]
    assert flow.edge_f1(expected, {"nodes": expected["nodes"], "edges": turned}) < 1
    assert flow.node_f1(expected, flow.read_graph("no graph")) == 0
    jsonschema_rs.validator_for(flow.schema(12)).validate(expected)


def test_flowcharts_run_nothing_but_their_steps() -> None:
    def chart(text: str, kind: str = "step") -> flow.Graph:
        nodes = [{"id": "n1", "kind": "start", "text": "start"}, {"id": "n2", "kind": kind, "text": text}]
        labels = ("yes", "no") if kind == "decision" else ("",)
        edges = [
            {"from": "n1", "to": "n2", "label": ""},
            *({"from": "n2", "to": "n3", "label": each} for each in labels),
        ]
        return {"nodes": [*nodes, {"id": "n3", "kind": "end", "text": "end"}], "edges": edges}

    assert flow.run(chart("x = x * 3"), 2, 5) == (6, 5) and flow.run(chart("y = x"), 2, 5) == (2, 2)
    assert flow.run(chart("x < 3?", "decision"), 2, 5) == (2, 5)
    for text in ("__import__('os')", "x = x ** 9", "x = z", "x = x + 1; y = 2", ""):
        assert flow.run(chart(text), 1, 1) is None
    endless = {"nodes": chart("x = x * x")["nodes"], "edges": [{"from": "n1", "to": "n2", "label": ""}]}
    endless["edges"].append({"from": "n2", "to": "n2", "label": ""})
    assert flow.run(endless, 7, 1) is None


PAGE = {
    "markdown": "# Pump 12\n\nThe *pressure* is 4 &lt; 5 bar.\n\n| gauge | bar |\n|---|:--|\n| left | 42.7 |",
    "html": "<h1>Pump 12</h1><p>The pressure is 4 &lt; 5 bar.</p>"
    "<table><thead><tr><th>gauge</th><th>bar</th></tr></thead><tr><td>left</td><td>42.7</td></tr></table>",
    "doctags": "<doctag><section_header_level_1><loc_1><loc_2><loc_3><loc_4>Pump 12</section_header_level_1>"
    "<text>The pressure is 4 &lt; 5 bar.</text><otsl><loc_1><ched>gauge<ched>bar<nl><fcel>left<fcel>42.7<nl></otsl>",
}


@pytest.mark.parametrize("form", PAGE)
def test_a_page_says_the_same_in_any_markup(form: str) -> None:
    assert texts.plain(PAGE[form]) == "Pump 12 The pressure is 4 < 5 bar. gauge bar left 42.7"
    assert texts.table(PAGE[form]) == [["gauge", "bar"], ["left", "42.7"]]


def test_errors_of_characters_and_cells_are_counted() -> None:
    distances = {("kitten", "sitting"): 3, ("", "abc"): 3, ("abc", ""): 3, ("flaw", "lawn"): 2, ("same", "same"): 0}
    assert {pair: texts.edit_distance(*pair) for pair in distances} == distances
    assert texts.error_rate("abcd", "abxd") == 0.25
    assert texts.cell_accuracy([["a", "b"], ["c", "d"]], [["a", "x"], ["c"]]) == 0.5
    suite = make_suite("pages")
    item = next(item for item in suite.items(None, 0) if item.cell == "stamp")
    assert suite.grade(item, item.truth.replace("\n\n", "\nCHECKED\n", 1)) == 1
    assert 0.9 < suite.grade(item, item.truth[:-3]) < 1 and suite.grade(item, "") == 0


def test_the_bundled_model_reads_no_pages(tmp_path: Path) -> None:
    copy = shutil.copytree(default_model(), tmp_path / "mine")
    assert not LocalModel(VLM(copy, F32), GenerationConfig(), ImageBudget()).is_general
    refused = cli("eval", "-m", "panel", "--suite", "pages", *FAST)
    assert refused.exit_code == 1 and "the suite pages needs a general model" in refused.stderr


class Taught:
    """Knows one prompt for pages, and writes JSON where a schema is given."""

    name, is_general = "taught", True
    prompts: Mapping[str, str] = {"page": "Convert this page to docling."}

    def describe(self) -> dict[str, Any]:
        return {}

    def score(self, pictures: Any, question: str, options: Sequence[str]) -> Scored:
        raise AssertionError

    def generate(self, pictures: Any, question: str, max_new_tokens: int, schema: Any = None) -> str:
        return question if schema is None else json.dumps({"nodes": [], "edges": []})


def test_a_model_is_asked_with_its_own_prompt_and_the_item_s_schema(docling: Path) -> None:
    row = evaluate(make_suite("pages"), Taught(), Selection(1))[0]
    assert row["question"] == row["answer"] == "Convert this page to docling." and "blind" not in row
    row = evaluate(make_suite("flowchart"), Taught(), Selection(1))[0]
    assert row["right"] == 0 and row["answer"].startswith("{")
    reader = LocalModel(VLM(docling, F32), GenerationConfig(), ImageBudget())
    assert reader.prompts["page"] == "Convert this page to docling."


def test_an_export_answers_a_flowchart_under_its_schema(exported: Path) -> None:
    model = LocalModel(VLM(exported, F32), GenerationConfig(), ImageBudget("low"))
    (row,) = evaluate(make_suite("flowchart"), model, Selection(1))  # cut short by the tiny model's context
    assert row["answer"].replace(" ", "").startswith('{"nodes":[{"id":"n') and row["right"] < 1
    picture = np.full((64, 64, 3), 255, np.uint8)
    tight = {"type": "object", "properties": {"kind": {"enum": ["step"]}}, "required": ["kind"]}
    assert json.loads(model.generate([picture], "?", 60, tight | {"additionalProperties": False})) == {"kind": "step"}


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Any]:
    def write(rows: Sequence[dict[str, str]]) -> Path:
        path = tmp_path / "set.tsv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
        return path

    yield write


def tsv_row(index: str, image: str | None = None, **fields: str) -> dict[str, str]:
    with BytesIO() as png:
        Image.new("RGB", (30, 20), "red").save(png, format="PNG")
        picture = base64.b64encode(png.getvalue()).decode()
    row = {"index": index, "image": image or picture, "question": f"Which, {index}?", "hint": "", "category": "colour"}
    return row | {"A": "red", "B": "green", "C": "blue", "D": "", "answer": "A"} | fields


def test_a_set_of_vlmevalkit_s_form(table: Any) -> None:
    suite = make_suite("mcq", table([tsv_row("1"), tsv_row("2", "1", answer="C", hint="Look.")]))
    items = sorted(suite.items(None, 0), key=lambda item: item.id)
    assert [(item.truth, item.options, item.cell) for item in items] == [
        ("red", ("red", "green", "blue"), "colour"),
        ("blue", ("red", "green", "blue"), "colour"),
    ]
    assert items[1].question == "Hint: Look.\nQuestion: Which, 2?"
    assert items[1].pictures()[0].shape == (20, 30, 3)
    assert suite.lettered("Q", ("x", "y")).startswith("Q\nOptions:\nA. x\nB. y\nPlease select")


BAD = {
    "an empty option": ({"B": " ", "C": ""}, "two options or more"),
    "an option twice": ({"B": "red"}, "no two alike"),
    "an answer without its option": ({"answer": "D"}, "is none of its options' letters"),
    "an answer that is a text": ({"answer": "red"}, "is none of its options' letters"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_told(table: Any, name: str) -> None:
    fields, told = BAD[name]
    with pytest.raises(OptionError, match=f"row 7: .*{told}"):
        make_suite("mcq", table([tsv_row("7", **fields)])).items(None, 0)


def test_bad_files_are_told(table: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="row 1: its image cannot be decoded"):
        make_suite("mcq", table([tsv_row("1", "x" * 100)])).items(None, 0)[0].pictures()
    with pytest.raises(OptionError, match="two rows with the same index"):
        make_suite("mcq", table([tsv_row("1"), tsv_row("1")])).items(None, 0)
    (tmp_path / "set.tsv").write_text("index\tquestion\n1\tx\n", encoding="utf-8")
    with pytest.raises(OptionError, match="has no column 'image'; it has index, question"):
        make_suite("mcq", tmp_path / "set.tsv").items(None, 0)
    (tmp_path / "set.tsv").write_bytes(b"\xff\xfe\x00")
    for missing in ("set.tsv", "none.tsv"):
        with pytest.raises(OptionError, match="cannot be read as a TSV"):
            make_suite("mcq", tmp_path / missing).items(None, 0)


def test_data_are_for_the_suites_that_take_them(table: Any) -> None:
    data = table([tsv_row("1"), tsv_row("2")])
    told = "--data is for the suites anomaly, mcq, wikivqa; choose of these, or leave it out"
    refused = cli("eval", "-m", "panel", "--suite", "carrier,tasks", "--data", data)
    assert (refused.exit_code, refused.stdout, refused.stderr) == (1, "", f"Error: {told}\n")
    with pytest.raises(OptionError, match=told):
        make_suite("carrier", data)
    assert "for anomaly, mcq and wikivqa" in cli("eval", "--help").stdout

    def run(suites: str, data: Path | None) -> Any:
        return Evaluation(suites, 4, False, 0, data, blind=False, output=None)(Alphabetical(), None)

    both, drawn, own = run("carrier,mcq", data), run("carrier", None), run("mcq", data)
    (_, _, carrier, _), (_, mcq, _, _) = both.results
    assert [row["question"] for row in carrier] == [row["question"] for row in drawn.results[0][2]]
    assert mcq.total.asked == 2
    line = "--data is for mcq; the other suites ask items of their own"
    assert line in both.lines() and both.to_dict()["data_for"] == ["mcq"]
    assert not any("--data" in line for line in drawn.lines() + own.lines())


def test_many_rows_are_read(table: Any) -> None:
    suite = make_suite("mcq", table([tsv_row("0")] + [tsv_row(str(n), "0") for n in range(1, 10_000)]))
    assert len(suite.items(None, 0)) == 10_000 and len(suite.items(100, 0)) == 100


@contextmanager
def answering(reply: bytes) -> Iterator[str]:
    """Run a web server that answers everything with the same bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("reply", [b"{}", b"[]", b'{"data": 3, "choices": [{}]}', b'"text"', b'{"probabilities": 1}'])
def test_a_server_of_another_kind_is_told_in_a_line(reply: bytes) -> None:
    with answering(reply) as url:
        model = RemoteModel(url, "some")
        for ask_it in (
            lambda: RemoteModel(url),
            lambda: model.score([], "Which?", ("A", "B")),
            lambda: model.generate([], "Which?", 5),
        ):
            with pytest.raises(ModelError, match="answers in another form than OpenAI's API") as raised:
                ask_it()
            assert "\n" not in str(raised.value)
    with answering(b"not JSON") as url, pytest.raises(ModelError, match="cannot be asked"):
        RemoteModel(url)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "localhost:8000", "ftp://localhost", ""])
def test_only_web_addresses_are_asked(url: str) -> None:
    with pytest.raises(OptionError, match="--url takes an address such as http"):
        RemoteModel(url, "some")


def test_a_served_name_stays_in_the_folder_of_rows(tmp_path: Path) -> None:
    class Named(Alphabetical):
        name = "../../org/name"

    run = Evaluation("carrier", 5, False, 0, None, blind=False, output=tmp_path / "rows")
    run(Named(), None)
    assert [path.name for path in (tmp_path / "rows").iterdir()] == [".._.._org_name-carrier.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows"]


def test_a_server_is_told_how_closely_pictures_are_looked_at(exported: Path) -> None:
    vlm, picture = VLM(exported, F32), noise(90, 160)
    found = {}
    with serving(vlm) as server:
        for detail in get_args(Detail):
            found[detail] = RemoteModel(f"{server.url}/v1", detail=detail).score([picture], "Which?", WORDS)
            expected = LocalModel(vlm, GenerationConfig(), ImageBudget(detail)).score([picture], "Which?", WORDS)
            assert found[detail].probabilities == pytest.approx(expected.probabilities, abs=1e-4)
    assert abs(found["low"].probabilities["pale"] - found["high"].probabilities["pale"]) > 1e-2


def test_options_of_this_process_are_refused_beside_a_url() -> None:
    result = cli("eval", "--url", "http://127.0.0.1:9/v1", "--suite", "carrier", "--threads", "2")
    assert result.exit_code == 1
    assert result.stderr == "Error: --threads is for models in this process; leave it out with --url\n"


def test_other_servers_are_asked_for_a_letter(exported: Path) -> None:
    server: Server
    with serving(VLM(exported, F32)) as server:
        model = RemoteModel(f"{server.url}/v1")
        model._scores = False  # as of a server that has no /score
        found = model.score([np.zeros((40, 40, 3), np.uint8)], "Which?\nA. x\nB. y", ("A", "B"))
        assert sum(found.probabilities.values()) == pytest.approx(1)
        with pytest.raises(OptionError, match="only options under letters"):
            model.score([], "Which?", ("yes", "no"))
        tight = {"type": "object", "properties": {"kind": {"enum": ["step"]}}, "required": ["kind"]}
        answer = model.generate([], "Which?", 60, tight | {"additionalProperties": False})
        assert json.loads(answer) == {"kind": "step"}


def test_the_bundled_model_is_asked_alike_over_http() -> None:
    suite, selection = make_suite("carrier"), Selection(5)
    vlm = VLM("panel", F32)
    expected = evaluate(suite, LocalModel(vlm, GenerationConfig(), ImageBudget()), selection)
    with serving(vlm, model_name="panel") as server:
        rows = evaluate(suite, RemoteModel(f"{server.url}/v1", "panel"), selection)
        figures = request(server, "GET", "/metrics")[2].decode()
    assert 'path="/v1/score",status="200"' in figures and "/v1/chat" not in figures
    for row, local in zip(rows, expected, strict=True):
        assert row["scores"] == pytest.approx(local["scores"], abs=1e-3)
        assert row["mass"] == pytest.approx(local["mass"], abs=1e-3)
        told = ("item", "answer", "right", "robust", "blind")
        assert [row[name] for name in told] == [local[name] for name in told]
