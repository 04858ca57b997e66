"""`edgevlm calibrate`: known temperatures are found, rows are scored resumably, and scores use what is saved."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import minimize_scalar

from edgevlm import VLM, DamagedModelError, GenerationConfig, ImageBudget, OptionError
from edgevlm.calibration import CALIBRATION, Calibration, load_calibration, save_calibration
from edgevlm.evals.ask import LocalModel
from edgevlm.evals.calibration import (
    FEWEST_DECISIONS,
    FOLDS,
    Decisions,
    cross_validate,
    figures_of,
    fit,
    fit_temperature,
    read_decisions,
)
from edgevlm.evals.suites import make_suite
from edgevlm.manifest import check_files
from tests.conftest import F32, noise
from tests.helpers.batches import lines, read, wait_for, write
from tests.helpers.command import COMMAND, POSIX, cli
from tests.helpers.serving import request, serving

CHOICES = ["yes", "no", "a red circle", "a gauge"]
PICTURES, PER_PICTURE = 15, 6
OPTIONS = ["--device", "CPU", "--inference-precision", "f32", "--no-cache", "--kv-cache", "stateful", "--detail", "low"]
TRUE_TEMPERATURE = 2.5


def drawn(temperature: float, count: int = 3000, seed: int = 1) -> Decisions:
    """Return decisions of a model whose log-likelihoods are `temperature` times those that labels are drawn by."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 1.5, (count, 4))
    logits[::2, 3] = -np.inf  # half of them have three choices
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    right = np.array([random.choice(4, p=each) for each in shares])
    return Decisions(logits * temperature, right, np.arange(count) // 2, tuple(map(str, right)))


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.3, 6.0])
def test_a_known_temperature_is_found(temperature: float) -> None:
    decisions = drawn(temperature)
    fitted = fit(decisions)
    assert fitted.temperature == pytest.approx(temperature, rel=0.06)
    assert fitted.interval[0] < temperature < fitted.interval[1]
    assert 0.05 < math.log(fitted.interval[1] / fitted.interval[0]) < 0.25
    assert fitted.after.accuracy == fitted.before.accuracy
    assert fitted.after.ece < 0.03
    if temperature == 1:
        assert "though not for certain" in fitted.verdict
    else:
        assert fitted.is_better and fitted.nll_difference[1] < 0
        assert fitted.after.ece < fitted.before.ece / 2 and fitted.after.brier < fitted.before.brier
        word = "overconfident" if temperature > 1 else "underconfident"
        assert fitted.verdict.startswith(f"the model is {word}: T = {fitted.temperature:.2f} [")


def test_the_search_finds_what_scipy_finds() -> None:
    for seed in range(5):
        decisions = drawn(1.7, 80, seed)

        def loss(at: float, decisions: Decisions = decisions) -> float:
            return float(decisions.losses(math.exp(at)).mean())

        expected = minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-8})
        assert fit_temperature(decisions) == pytest.approx(math.exp(expected.x), rel=1e-4)


def test_figures_are_those_worked_out_by_hand() -> None:
    likely = np.log([[0.8, 0.2], [0.75, 0.25], [0.6, 0.4], [0.3, 0.7]])
    decisions = Decisions(likely, np.array([0, 1, 0, 1]), np.arange(4), ("a", "b", "a", "b"))
    figures = figures_of(decisions)
    assert figures.nll == pytest.approx(-(math.log(0.8) + math.log(0.25) + math.log(0.6) + math.log(0.7)) / 4)
    assert figures.brier == pytest.approx(2 * (0.2**2 + 0.75**2 + 0.4**2 + 0.3**2) / 4)
    # Bins (0.5, 0.6], (0.6, 0.7] and (0.7, 0.8]; of the last one of two is right.
    assert figures.ece == pytest.approx((0.4 + 0.3 + 2 * abs(0.775 - 0.5)) / 4)
    assert [(each.decisions, each.accuracy) for each in figures.bins] == [(1, 1.0), (1, 1.0), (2, 0.5)]
    halved = figures_of(decisions, 2.0)
    root = np.sqrt(np.exp(likely))
    assert halved.confidence == pytest.approx((root.max(axis=1) / root.sum(axis=1)).mean())


def test_no_decision_is_judged_by_a_temperature_fitted_to_its_own_picture() -> None:
    decisions = drawn(2.0, 200)
    temperatures = cross_validate(decisions)
    assert len(set(temperatures)) == FOLDS
    for each in set(temperatures):
        held_out = temperatures == each
        assert not set(decisions.groups[held_out]) & set(decisions.groups[~held_out])
        assert fit_temperature(decisions.take(~held_out)) == each


def test_what_cannot_be_fitted_is_told() -> None:
    few = drawn(2.0, FEWEST_DECISIONS - 1)
    with pytest.raises(OptionError, match="needs 50 labelled decisions about 10 pictures, better 200; here are 49"):
        fit(few)
    alike = replace(drawn(2.0, 200), groups=np.arange(200) % 9)
    with pytest.raises(OptionError, match="here are 200 about 9"):
        fit(alike)
    with pytest.raises(OptionError, match="the right choice is 'yes' everywhere"):
        fit(replace(drawn(2.0, 200), labels=("yes",) * 200))
    blind = drawn(2.0, 200)
    chance = fit(replace(blind, right=np.random.default_rng(3).integers(0, 3, 200), logits=-(blind.logits[:, :3] ** 2)))
    assert not chance.is_better or chance.temperature > 3
    right = fit(replace(blind, right=blind.logits.argmax(axis=1)))
    assert not right.is_better and "right about nearly all rows" in right.verdict
    wrong = fit(replace(blind, right=blind.logits[:, :3].argmin(axis=1)))
    assert not wrong.is_better and "tell nothing" in wrong.verdict


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, vlm: VLM) -> Path:
    """Rows of all three types about drawn pictures, labelled as the model at a known temperature would answer."""
    folder, random = tmp_path_factory.mktemp("rows"), np.random.default_rng(5)
    made: list[dict[str, Any]] = []

    def says(question: str, choices: list[str]) -> str:
        scores = vlm.score(picture, question, choices, detail="low", calibration_temperature=TRUE_TEMPERATURE)
        return str(random.choice(choices, p=list(scores.probabilities.values())))

    for number in range(PICTURES):
        picture = folder / f"{number}.png"
        Image.fromarray(noise(40 + number, 60)).save(picture)
        for turn in range(PER_PICTURE - 2):
            question = f"What is in this picture? Number {turn}."
            asked = {"image": picture.name, "question": question, "choices": CHOICES}
            made.append({**asked, "label": says(question, CHOICES)})
        label = says("Is it red?", ["yes", "no"]) == "yes"
        made.append({"image": [picture.name], "question": "Is it red?", "label": label})
        applies = [each for each in CHOICES[2:] if says(f"Is there {each}?", ["yes", "no"]) == "yes"]
        made.append({"image": picture.name, "question": "Is there {label}?", "choices": CHOICES[2:], "label": applies})
    return write(folder / "rows.jsonl", made)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, exported: Path) -> Path:
    """A copy of the export, to be calibrated."""
    return Path(shutil.copytree(exported, tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def calibrated(rows: Path, model: Path) -> dict[str, Any]:
    done = cli("calibrate", rows, "-m", model, *OPTIONS, "--json", "--report", rows.with_name("report.html"))
    assert (done.exit_code, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_command_finds_the_temperature_that_rows_were_labelled_at(
    calibrated: dict[str, Any], rows: Path, model: Path, vlm: VLM
) -> None:
    assert calibrated["decisions"] == PICTURES * (PER_PICTURE + 1) and calibrated["pictures"] == PICTURES
    low, high = calibrated["interval"]
    assert low < TRUE_TEMPERATURE < high and low > 1
    assert calibrated["after"]["nll"] < calibrated["before"]["nll"]
    assert calibrated["saved"] == str(model / CALIBRATION)
    scored = read(rows.with_name("rows.tiny.scores.jsonl"))
    assert [row["line"] for row in scored] == list(range(1, PICTURES * PER_PICTURE + 1))
    expected = vlm.score(rows.parent / "0.png", scored[0]["question"], CHOICES, detail="low")
    assert scored[0]["log_likelihoods"] == pytest.approx(dict(expected.log_likelihoods), abs=2e-3)
    labels = vlm.score_labels(rows.parent / "0.png", "Is there {label}?", CHOICES[2:], detail="low")
    assert scored[5]["log_likelihoods"]["a gauge"] == pytest.approx(dict(labels.log_likelihoods["a gauge"]), abs=2e-3)
    first, whole = read_decisions(scored[4:5]), read_decisions(scored)
    assert first.labels == ("yes" if scored[4]["label"] else "no",)
    assert len(whole) == calibrated["decisions"] and whole.group_count == PICTURES


def test_scores_use_what_is_saved(calibrated: dict[str, Any], model: Path, vlm: VLM) -> None:
    temperature = calibrated["temperature"]
    scaled = VLM(model, F32)
    check_files(model, scaled.manifest, full=True)
    assert scaled.manifest.fingerprint == vlm.manifest.fingerprint
    own, found = vlm.score(None, "What is it?", CHOICES), scaled.score(None, "What is it?", CHOICES)
    assert (own.temperature, found.temperature) == (1.0, temperature)
    logits = np.array(list(own.log_likelihoods.values())) / temperature
    assert list(found.probabilities.values()) == pytest.approx(
        (np.exp(logits) / np.exp(logits).sum()).tolist(), abs=1e-3
    )
    assert found.best == own.best and found.probabilities[found.best] < own.probabilities[own.best]
    assert scaled.score(None, "What is it?", CHOICES, calibration_temperature=1).probabilities == pytest.approx(
        own.probabilities, abs=1e-3
    )
    assert scaled.score_labels(None, "What is it?", CHOICES).temperature == temperature
    suites = LocalModel(scaled, GenerationConfig(), ImageBudget())
    assert suites.score([], "What is it?", CHOICES).probabilities == pytest.approx(own.probabilities, abs=1e-3)
    with serving(scaled) as server:
        body = {"messages": [{"role": "user", "content": "What is it?"}], "choices": CHOICES}
        answer = json.loads(request(server, "POST", "/v1/score", body)[2])
        assert answer["temperature"] == temperature
        assert answer["probabilities"] == pytest.approx(found.probabilities, abs=1e-3)
        answer = json.loads(request(server, "POST", "/v1/score", {**body, "calibration_temperature": 1})[2])
        assert answer["probabilities"] == pytest.approx(own.probabilities, abs=1e-3)


def test_the_commands_use_what_is_saved(calibrated: dict[str, Any], model: Path, tmp_path: Path) -> None:
    arguments = ["-m", model, *OPTIONS, "--choices", "yes,no"]
    answer = json.loads(cli("run", "What is it?", *arguments, "--json").stdout)
    assert answer["temperature"] == calibrated["temperature"]
    jobs = write(tmp_path / "jobs.jsonl", [{"question": "What is it?"}])
    assert cli("batch", jobs, "-o", tmp_path / "out.jsonl", *arguments).exit_code == 0
    [row] = read(tmp_path / "out.jsonl")
    assert row["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-3)
    assert row["temperature"] == calibrated["temperature"]
    other = Path(shutil.copytree(model, tmp_path / "tiny"))
    (other / CALIBRATION).unlink()
    done = cli("batch", jobs, "-o", tmp_path / "out.jsonl", "-m", other, *OPTIONS, "--choices", "yes,no")
    assert done.exit_code == 1 and "answers other jobs" in done.stderr  # whose probabilities are others


def test_run_again_nothing_is_scored_and_the_result_is_the_same(
    calibrated: dict[str, Any], rows: Path, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(VLM, "__init__", None)
    before = (model / CALIBRATION).read_bytes()
    done = cli("calibrate", rows, "-m", model, *OPTIONS, "--json", "--no-save")
    assert json.loads(done.stdout) == {**calibrated, "saved": None}
    table = cli("calibrate", rows, "-m", model, *OPTIONS, "--dry-run").stdout
    assert calibrated["verdict"] in table and f"not saved; {model / CALIBRATION} stays as it is" in table
    assert f"{calibrated['before']['ece']:.4f}" in table and f"{calibrated['after']['ece']:.4f}" in table
    assert (model / CALIBRATION).read_bytes() == before


class _Svg(HTMLParser):
    """Collects what an HTML page loads from elsewhere."""

    loaded: list[str]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_reports_show_both_diagrams(calibrated: dict[str, Any], rows: Path, model: Path, tmp_path: Path) -> None:
    page = rows.with_name("report.html").read_text(encoding="utf-8")
    parser = _Svg()
    parser.loaded = []
    parser.feed(page)
    assert not parser.loaded
    assert calibrated["verdict"].replace(">", "&gt;") in page and "saved: " in page
    svg = page[page.index("<svg") : page.index("</svg>") + 6]
    cli("calibrate", rows, "-m", model, *OPTIONS, "--no-save", "--report", tmp_path / "report.svg")
    assert (tmp_path / "report.svg").read_text(encoding="utf-8").strip() == svg
    titles = [each.text for each in ElementTree.fromstring(svg).iterfind(".//{*}g/{*}g/{*}title")]  # noqa: S314
    bins = calibrated["before"]["bins"] + calibrated["after"]["bins"]
    assert [int(title.split()[3]) for title in titles if title] == [each["decisions"] for each in bins]
    for name, told in (("report.png", "a report is .html or .svg"), ("nonesuch/report.html", "no folder")):
        done = cli("calibrate", rows, "-m", model, "--report", tmp_path / name)
        assert done.exit_code == 1 and told in done.stderr


GOOD = {"image": "0.png", "question": "Q?", "choices": ["a", "b"], "label": "a"}
WRONG: list[tuple[dict[str, Any] | bytes, str]] = [
    (b"{", "the row is not JSON that can be read"),
    ({**GOOD, "label": "c"}, "the label 'c' is none of the choices: a, b"),
    ({**GOOD, "label": ["a", "c"]}, "the label 'c' is none of the choices: a, b"),
    ({**GOOD, "label": ["a", "a"]}, "the labels must differ"),
    ({**GOOD, "label": 3}, "the row cannot be used: Expected `bool | str | array`, got `int`"),
    ({**GOOD, "label": True, "choices": ["a", "b", "c"]}, "a label of true or false needs two choices"),
    ({**GOOD, "choices": ["a", "a"]}, "choices must differ"),
    ({**GOOD, "image": "nonesuch.png"}, "no such image file: nonesuch.png"),
    ({**GOOD, "max_new_tokens": 3}, "the row cannot be used: Object contains unknown field `max_new_tokens`"),
    ({"question": "Q?", "choices": ["a", "b"]}, "the row cannot be used: Object missing required field `label`"),
    ({"question": "Q?", "label": "a"}, 'the row has no "choices", and --choices gives none'),
    ({"choices": ["a", "b"], "label": "a"}, 'the row has no "question", and --question gives none'),
]


@pytest.mark.parametrize(("wrong", "told"), WRONG)
def test_wrong_rows_are_told_by_their_lines(
    wrong: dict[str, Any] | bytes, told: str, rows: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VLM, "__init__", None)  # nothing is loaded for them
    path = write(rows.with_name("wrong.jsonl"), [GOOD, GOOD, b"", wrong, GOOD, wrong, wrong])
    done = cli("calibrate", path, "-m", model)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"Error: {path}, line 4: {told}"), done.stderr
    assert done.stderr.endswith("; 2 more cannot be used: lines 6, 7\n")
    assert not rows.with_name("wrong.tiny.scores.jsonl").exists()


def test_too_few_rows_and_one_class_are_told_before_the_model_is_loaded(
    rows: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VLM, "__init__", None)
    text = {"question": "Q?", "choices": ["a", "b"], "label": "a"}
    for made, told in (
        ([text] * 49, "here are 49 about 49 ("),
        ([GOOD] * 60, "here are 60 about 1 ("),
        ([text] * 60, "the right choice is 'a' everywhere"),
    ):
        done = cli("calibrate", write(rows.with_name("few.jsonl"), made), "-m", model)
        assert done.exit_code == 1 and told in done.stderr and done.stderr.count("\n") == 1
    done = cli("calibrate", rows.with_name("nonesuch.jsonl"), "-m", model)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)


def test_a_row_that_cannot_be_scored_does_not_count(
    calibrated: dict[str, Any], rows: Path, model: Path, tmp_path: Path
) -> None:
    broken = rows.with_name("broken.png")
    broken.write_bytes((rows.parent / "0.png").read_bytes()[:60])
    made = [*read(rows), {**GOOD, "image": "broken.png"}]
    path = write(rows.with_name("more.jsonl"), made)
    shutil.copy(rows.with_name("rows.tiny.scores.jsonl"), tmp_path / "out.jsonl")  # so that the last row alone is left
    done = cli("calibrate", path, "-m", model, *OPTIONS, "--no-save", "--json", "-o", tmp_path / "out.jsonl")
    assert done.exit_code == 0 and f"line {len(made)}: " in done.stderr
    found = json.loads(done.stdout)
    assert (found["failed"], found["decisions"]) == (1, PICTURES * (PER_PICTURE + 1))


@POSIX
def test_killed_and_run_again_no_row_is_lost_or_scored_twice(rows: Path, exported: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    command = ["calibrate", str(rows), "-m", str(exported), *OPTIONS, "--no-save", "--json", "-o", str(output)]
    process = subprocess.Popen([*COMMAND, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: lines(output) > 10, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = output.read_bytes()
    assert 10 < kept.count(b"\n") < PICTURES * PER_PICTURE
    done = cli(*command)
    assert done.exit_code == 0, done.stderr
    assert output.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    assert [row["line"] for row in read(output)] == list(range(1, PICTURES * PER_PICTURE + 1))
    assert not output.with_name("out.jsonl.parts").exists()


def test_a_calibration_that_cannot_be_is_told(model: Path, calibrated: dict[str, Any], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "tiny"))
    path = copy / CALIBRATION
    good = json.loads(path.read_text(encoding="utf-8"))
    for wrong, told in (
        (b"{", "is damaged"),
        (b"[]", "is damaged"),
        (json.dumps({**good, "temperature": 0}).encode(), r"is damaged \(calibration_temperature must be between"),
        (json.dumps({**good, "fingerprint": "f" * 16}).encode(), "was fitted to another export; delete it"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(DamagedModelError, match=told):
            VLM(copy, F32)
    saved = Calibration(1.5, (1.2, 1.8), 60, good["fingerprint"], "0.1.0")
    assert save_calibration(copy, saved) == path
    found = load_calibration(copy, good["fingerprint"])
    assert found is not None and (found.temperature, tuple(found.interval)) == (1.5, (1.2, 1.8))
    assert sorted(each.name for each in copy.iterdir()) == sorted(each.name for each in model.iterdir())


def test_of_pictures_out_of_focus_the_bundled_model_is_better_calibrated_after(panel: VLM) -> None:
    """Bars of charts that can hardly be made out, of which it is far too sure; the figures are of those held out."""
    scored = []
    for line, item in enumerate(item for item in make_suite("tasks").items(None, 7) if item.cell == "chart"):
        blurred = Image.fromarray(item.pictures()[0]).resize((48, 48))
        scores = panel.score(blurred, item.question, item.options, calibration_temperature=1)
        likely = dict(scores.log_likelihoods)
        scored.append({"line": line, "sha256": [item.id], "log_likelihoods": likely, "label": item.truth})
    fitted = fit(read_decisions(scored))
    assert fitted.is_better and fitted.interval[0] > 1, fitted.verdict
    assert fitted.after.ece < fitted.before.ece and fitted.after.accuracy == fitted.before.accuracy
