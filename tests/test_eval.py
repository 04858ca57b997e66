"""`edgevlm eval`: suites are proven by oracles and guessers, results by hand, and a run goes on after a kill."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edgevlm import VLM, GenerationConfig, ImageBudget, OptionError, OutputError
from edgevlm.evals.ask import LocalModel, Scored
from edgevlm.evals.items import Item, Suite, spread
from edgevlm.evals.remote import RemoteModel
from edgevlm.evals.results import compare, summarize
from edgevlm.evals.run import Selection, ask, evaluate
from edgevlm.evals.statistics import cluster_bootstrap, mcnemar, wilson
from edgevlm.evals.suites import SUITES, make_suite, tempglitch
from edgevlm.server.run import Server
from tests.conftest import F32
from tests.helpers.command import cli
from tests.helpers.evaluating import Guesser, Oracle, picture_digest
from tests.helpers.serving import request, serving

GENERATED = [name for name in SUITES if name not in ("mcq", "wikivqa")]
FAST = ["--device", "CPU", "--no-cache", "--kv-cache", "stateful"]


@pytest.fixture(params=GENERATED)
def suite(request: pytest.FixtureRequest) -> Suite:
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


class Alphabetical:
    """Always takes the first letter."""

    name, is_general = "first", True

    def describe(self) -> dict[str, Any]:
        return {}

    def score(self, pictures: Any, question: str, options: Sequence[str]) -> Scored:
        return Scored({option: float(option == options[0]) for option in options}, 0.01)

    def generate(self, pictures: Any, question: str, max_new_tokens: int) -> str:
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
    assert set(json.loads(everything.stdout)["left_out"]) == {"mcq", "wikivqa"}
    for bad, told in (("none", "there is no suite 'none'"), ("wikivqa", "needs --data"), ("mcq", "needs --data")):
        failed = cli("eval", "-m", "panel", "--suite", bad)
        assert failed.exit_code == 1 and told in failed.stderr and "Traceback" not in failed.stderr


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


def test_many_rows_are_read(table: Any) -> None:
    suite = make_suite("mcq", table([tsv_row("0")] + [tsv_row(str(n), "0") for n in range(1, 10_000)]))
    assert len(suite.items(None, 0)) == 10_000 and len(suite.items(100, 0)) == 100


def test_other_servers_are_asked_for_a_letter(exported: Path) -> None:
    server: Server
    with serving(VLM(exported, F32)) as server:
        model = RemoteModel(f"{server.url}/v1")
        model._scores = False  # as of a server that has no /score
        found = model.score([np.zeros((40, 40, 3), np.uint8)], "Which?\nA. x\nB. y", ("A", "B"))
        assert sum(found.probabilities.values()) == pytest.approx(1)
        with pytest.raises(OptionError, match="only options under letters"):
            model.score([], "Which?", ("yes", "no"))


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
