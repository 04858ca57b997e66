"""Systems beside each other: turned order, paired ratios, refused ratios, real children."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import image_tokens, pages, rounds, side_by_side
from benchmarks.rounds import Spread, System, cell, in_order, paired, reference, table
from edgevlm import OutputError
from edgevlm.jobs.jsonl import read_rows
from edgevlm.model_store import default_model
from tests.test_conditions import QUIET, STARVED

ROOT = Path(__file__).parents[1]
MACHINE = {"machine": {"cpu": "A CPU", "isa": ["avx2"], "cores": 2, "memory_bytes": 8e9, "system": "Linux 6"}}
MACHINE["machine"] |= {"python": "3.11", "edgevlm": "0.1.0", "openvino": "2026.4.1"}


def row(number: int, system: str, seconds: float, **more: Any) -> dict[str, Any]:
    """Return a row as a run writes it."""
    given = {"ttft_s": seconds, "peak_memory_bytes": 1e9 * seconds, "conditions": QUIET.to_dict()}
    return {"round": number, "system": system, "case": "picture", **given, "versions": {"openvino": "2026.4.1"}, **more}


def pair(*ratios: float, **of_round: dict[str, Any]) -> list[dict[str, Any]]:
    """Return rounds in which B takes as many times as long as A; the machine drifts. `r1=` changes a row of B."""
    rows = []
    for number, ratio in enumerate(ratios, 1):
        rows.append(row(number, "A", number))
        rows.append(row(number, "B", number * ratio, **of_round.get(f"r{number}", {})))
    return rows


def by_round(rows: list[dict[str, Any]], system: str) -> dict[int, dict[str, Any]]:
    return rounds.cases(rows)["picture"][system]


def test_the_order_is_turned_every_other_round() -> None:
    systems = [System("A", []), System("B", [])]
    order = "".join(system.name for number in (1, 2, 3, 4) for system in in_order(systems, number))
    assert order == "ABBAABBA"


def test_ratios_are_paired_so_that_drift_cancels() -> None:
    rows = pair(2.0, 2.0, 1.0, 2.0, 3.0)
    found = paired(by_round(rows, "B"), by_round(rows, "A"), "ttft_s")
    assert found == (Spread(2.0, 2.0, 2.0), 0, 5)
    assert Spread.of([1.0, 2.0, 3.0, 4.0]) == (2.5, 1.75, 3.25)
    assert Spread.of([2.0]) == (2.0, 2.0, 2.0)


def test_a_round_in_which_a_thread_starved_gives_no_ratio_of_times() -> None:
    rows = pair(2.0, 2.0, 9.0, r3={"conditions": STARVED.to_dict()})
    own, base = by_round(rows, "B"), by_round(rows, "A")
    assert paired(own, base, "ttft_s") == (Spread(2.0, 2.0, 2.0), 1, 3)
    assert paired(base, own, "ttft_s").starved == 1
    assert paired(own, base, "peak_memory_bytes").rounds == 3
    assert paired(own, base, "peak_memory_bytes").starved == 0


def test_ratios_are_refused_where_most_rounds_starved_and_a_line_says_why() -> None:
    starved = {"conditions": STARVED.to_dict()}
    rows = [MACHINE, *pair(2.0, 9.0, 9.0, r2=starved, r3=starved)]
    own, base = by_round(rows, "B"), by_round(rows, "A")
    assert paired(own, base, "ttft_s").spread is None
    assert cell(own, base, "ttft_s") == "18"
    assert cell(own, base, "peak_memory_bytes") == "18,000 (9.00x, 5.50-9.00)"
    text = "\n".join(table(rows, "A"))
    assert "a thread starved in 2 of 3 rounds, so there is no ratio of times; measure again while nothing else" in text


def test_ratios_of_one_thread_stay_on_a_busy_machine() -> None:
    one = {"conditions": {**STARVED.to_dict(), "threads": 1, "thread_cpu_s": [1.16]}}
    rows = [MACHINE, *pair(2.0, 2.0, r1=one, r2=one)]
    assert paired(by_round(rows, "B"), by_round(rows, "A"), "ttft_s").spread == Spread(2.0, 2.0, 2.0)
    text = "\n".join(table(rows, "A"))
    assert "busy machine" in text
    assert "no ratio" not in text


def test_a_table_tells_ratios_conditions_versions_and_failures() -> None:
    rows = [MACHINE, *pair(2.0, 4.0), {"round": 1, "system": "C", "failed": "no such model"}]
    text = "\n".join(table(rows, reference(rows)))
    assert "| picture | B |  | 5 (3.00x, 2.50-3.50) | 5,000 (3.00x, 2.50-3.50) |" in text
    assert "| picture | A |  | 1.5 | 1,500 |" in text
    assert "- round 1, C failed: no such model" in text
    assert "- machine: A CPU, 2 cores, 8.0 GB, instruction sets: avx2; Linux 6, edgevlm 0.1.0" in text
    assert "- B (openvino 2026.4.1): 1.98 cores used by 2 threads" in text


def test_rows_without_conditions_say_so() -> None:
    rows = [MACHINE, *({**each, "conditions": None, "versions": None} for each in pair(2.0))]
    text = "\n".join(table(rows, "A"))
    assert "- B (versions not recorded): not recorded" in text
    assert "2 (2.00x)" in text


def test_the_reference_is_the_one_wanted_or_the_first() -> None:
    rows = pair(2.0)
    assert reference(rows, "B") == "B"
    assert reference(rows, "C") == reference(rows) == "A"
    assert reference([], "B") == "B"


def test_real_systems_alternate_and_a_run_is_continued(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    output = tmp_path / "rows.jsonl"
    asked: list[object] = ["image_tokens", output, "--image-tokens", 64, "--unit", 8, "--tokens", 4, "--threads", 2]
    for model in (default_model(), exported, tmp_path / "nowhere"):
        asked += ["--system", "edgevlm", model, sys.executable]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", [*map(str, asked), "--rounds", "1"])
        image_tokens.main()
    head, *rows = (found for found, _ in read_rows(output))
    assert head["machine"]["cores"] >= 1
    assert head["options"] == ["--tokens", "4", "--threads", "2"]
    names = [f"edgevlm {name}" for name in (default_model().name, exported.name)]
    measured = [(each["round"], each["system"]) for each in rows if each.get("case") == "64 image tokens"]
    assert measured == [(1, names[0]), (1, names[1]), (2, names[1]), (2, names[0])]
    assert [each["system"] for each in rows if "failed" in each] == ["edgevlm nowhere"] * 2
    for each in (each for each in rows if "case" in each):
        found = rounds.conditions_of(each)
        assert found is not None
        assert found.threads == 2
        assert found.cpu_s > 0
        assert {"edgevlm", "openvino", "python"} <= set(each["versions"])
        assert each["peak_memory_bytes"] > 50e6
    assert all(each["ttft_s"] > 0 for each in rows if each.get("case") == "64 image tokens")
    assert all(each["start_to_first_token_s"] > 0 for each in rows if each.get("case") == "start")
    printed = capsys.readouterr().out
    assert f"| 64 image tokens | {names[1]} |" in printed
    assert "edgevlm nowhere failed" in printed


def test_a_page_is_read_once_and_not_enlarged_for_conversion(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    output, tokens = tmp_path / "rows.jsonl", 4
    asked: list[object] = ["pages", "granite-docling-258m", output, "--tokens", tokens, "--dpi", 18, "--rounds", 1]
    for name in ("edgevlm", "edgevlm-convert"):
        asked += ["--system", name, exported, sys.executable]
    monkeypatch.setattr(sys, "argv", [*map(str, asked), "--threads", "2"])
    pages.main()
    read = [found for found, _ in read_rows(output) if found.get("case") == "granite-docling-258m, 18 dpi"]
    assert [each["system"] for each in read] == [f"{name} {exported.name}" for name in ("edgevlm", "edgevlm-convert")]
    for each in read:
        assert each["total_s"] == pytest.approx(each["ttft_s"] + (tokens - 1) / each["tokens_per_s"])
        assert "second_ttft_s" not in each
    high, auto = read
    assert high["image_tokens"] > auto["image_tokens"] > 0
    assert "| end to end s |" in capsys.readouterr().out


def test_pictures_of_a_case_are_two_squares_of_the_side_asked_for(tmp_path: Path) -> None:
    (found,) = image_tokens.pictures(tmp_path, {"96x96 pixels": 96})
    case, pair = found.split("=", 1)
    with Image.open(pair.split(",")[0]) as warm_up, Image.open(pair.split(",")[1]) as picture:
        assert (case, warm_up.size, picture.size) == ("96x96 pixels", (96, 96), (96, 96))
        assert warm_up.tobytes() != picture.tobytes()


def test_exports_of_one_checkpoint_stand_beside_each_other(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("edgevlm-fp32", "edgevlm-int8"):
        shutil.copytree(exported, tmp_path / "exports" / name)
    output = tmp_path / "rows.jsonl"
    asked = ["side_by_side", exported, "--exports", tmp_path / "exports", "-o", output, "--rounds", 2, "--tokens", 4]
    for name in ("edgevlm FP32", "edgevlm INT8"):
        asked += ["--only", name]
    monkeypatch.setattr(sys, "argv", [*map(str, asked), "--threads", "1"])
    side_by_side.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--tiles", "5", "--context", "400", "--rounds", "1"])
    side_by_side.main()
    _, *rows = (found for found, _ in read_rows(output))
    answers = [each for each in rows if each.get("case") == "picture"]
    assert [each["system"] for each in answers] == ["edgevlm FP32", "edgevlm INT8", "edgevlm INT8", "edgevlm FP32"]
    assert len({each["text"] for each in answers}) == 1
    assert {each["vision_arithmetic"] for each in answers} == {"FP32 weights"}
    assert {(each["views"], each["conditions"]["threads"]) for each in answers} == {(13, 1)}
    longer = [each for each in rows if each.get("case") == "picture, 5 tiles, context 400"]
    assert [each["round"] for each in longer] == [3, 3]
    assert all(each["views"] == 5 for each in longer)
    assert all(each["prompt_tokens"] > answers[0]["prompt_tokens"] for each in longer)
    line, *_ = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| picture | edgevlm INT8 |")]
    assert re.search(r"\d \(\d+\.\d\dx, \d+\.\d\d-\d+\.\d\d\)", line)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps([1]) + "\n", encoding="utf-8")
    with pytest.raises(OutputError, match="holds something other"):
        rounds.run([], 1, other, {}, 1)
