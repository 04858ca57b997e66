"""`edgevlm bench`: real figures of the tiny export, and no cache hit called a first token."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from edgevlm import VLM, BenchmarkError, OptionError
from edgevlm.bench.measure import Figure, Sweep, ask, bench, measure, pad_prompt, perturb, sample_picture
from edgevlm.bench.report import check_target
from edgevlm.cli.main import main
from edgevlm.families.base import ImageBudget
from edgevlm.metrics import peak_memory, reset_peak_memory
from tests.conftest import F32, photograph

QUICK = Sweep(repetitions=2, new_tokens=4)
AUTO = ImageBudget()


def test_every_combination_is_a_point(exported: Path, china: Path) -> None:
    sweep = Sweep(repetitions=2, new_tokens=4, threads=(1, 2), details=("low", "auto"), prompt_tokens=(None, 120))
    told: list[str] = []
    report = bench(exported, photograph("china.jpg"), china, sweep, told.append)
    assert len(report.points) == 8
    assert {(point.threads, point.detail, point.views) for point in report.points} == {
        (threads, detail, tiles) for threads in (1, 2) for detail, tiles in (("low", 1), ("auto", 13))
    }
    assert all(point.prompt_tokens >= 120 for point in report.points[1::2])
    assert len(told) == 17
    assert set(report.load) == {"compile", "cached", "process"}
    for point in report.points:
        figures = {name: figure.median for name, figure in point.figures.items()}
        assert all(value > 0 for value in figures.values())
        assert figures["ttft_s"] < figures["total_s"]
        assert point.figures["ttft_s"].low <= figures["ttft_s"] <= point.figures["ttft_s"].p90
        assert point.peak_memory_bytes > 50e6
        assert point.conditions.threads == point.threads
        assert point.conditions.wall_s >= 2 * point.figures["total_s"].low
        assert point.conditions.cpu_s > 0


def test_an_answer_has_just_as_many_tokens_as_asked_for(vlm: VLM) -> None:
    for tokens in (1, 3, 9):
        once = ask(vlm, photograph("china.jpg"), "What?", AUTO, tokens)
        assert len(once.token_ids) == tokens
        assert (once.timings.tpot_s is None) == (tokens == 1)


def test_a_cache_hit_is_not_called_a_first_token(exported: Path) -> None:
    known, image = VLM(exported, F32), photograph("china.jpg")
    known.generate(perturb(image, 0), "What?", max_new_tokens=4)
    with pytest.raises(BenchmarkError, match="reused what was known"):
        measure(known, image, AUTO, "What?", QUICK)


def test_a_touched_picture_has_no_tile_in_common_with_any_other(vlm: VLM) -> None:
    image = photograph("china.jpg")
    tiles = [vlm.processor.preprocess([perturb(image, number)], AUTO)[0].views for number in range(5)]
    seen = {view.pixels.tobytes() for picture in tiles for view in picture}
    assert len(seen) == sum(map(len, tiles))
    assert np.abs(perturb(image, 4).astype(int) - image).max() == 4


def test_the_drawn_picture_is_large_and_each_tile_its_own(vlm: VLM, tmp_path: Path) -> None:
    picture = sample_picture(tmp_path)
    with Image.open(picture) as opened:
        assert opened.size == (1600, 1200)
    [tiles] = vlm.processor.preprocess([picture], ImageBudget("high"))
    assert len({view.pixels.tobytes() for view in tiles.views}) == len(tiles)


def test_a_prompt_is_filled_up_or_refused(vlm: VLM) -> None:
    image = photograph("china.jpg")
    question = pad_prompt(vlm, image, AUTO, 300, 4)
    assert 300 <= len(ask(vlm, image, question, AUTO, 4).prompt) < 330
    with pytest.raises(BenchmarkError, match="a prompt of 600 tokens leaves no room in a context of 512"):
        pad_prompt(vlm, image, AUTO, 600, 4)


def test_a_figure_is_median_p90_and_range() -> None:
    assert Figure.of([3.0, 1.0, 2.0, 4.0, 10.0]) == Figure(3.0, pytest.approx(7.6), 1.0, 10.0)
    assert Figure.of([2.0]) == Figure(2.0, 2.0, 2.0, 2.0)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system cannot reset a peak")
def test_the_peak_of_a_point_does_not_count_what_was_before() -> None:
    block = np.ones(2**25)
    high = peak_memory()
    del block
    reset_peak_memory()
    assert peak_memory() < high - 200e6


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["bench", *map(str, arguments), "-n", "1", "--new-tokens", "2"])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_prints_json_lines_and_writes_a_page(exported: Path, china: Path, tmp_path: Path) -> None:
    page = tmp_path / "bench.html"
    printed = run(exported, "--image", china, "--detail", "low", "--detail", "auto", "--json", "--report", page)
    head, *points = (json.loads(line) for line in printed.splitlines())
    assert head["model"] == exported.name
    assert head["machine"]["cores"] >= 1
    assert [(point["detail"], point["views"]) for point in points] == [("low", 1), ("auto", 13)]
    assert set(points[0]["conditions"]) >= {"cpu_s", "wall_s", "others_cpu_s", "load_before", "load_after"}
    assert {tuple(point["vision"].values()) for point in points} == {("exported", "FP32 weights", "as exported")}
    assert set(points[0]["figures"]["ttft_s"]) == {"median", "p90", "low", "high"}
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text
    assert "vision: FP32 weights (as exported)" in text
    assert text.count("<tr>") >= 2 + len(head["machine"])
    assert "http" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")


def test_the_command_prints_a_table_and_a_picture(exported: Path, tmp_path: Path) -> None:
    picture = tmp_path / "bench.png"
    printed = run(exported, "--detail", "low", "--report", picture)
    assert "TTFT" in printed
    assert "\nvision: FP32 weights (as exported)\n" in printed
    assert "a new process needs" in printed
    assert "instruction sets: " in printed
    assert re.search(r"1: [\d.]+ cores used by \d+ threads? of \d+ cores", printed)
    with Image.open(picture) as opened:
        assert opened.format == "PNG"


def test_a_report_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"a report is \.html or \.png, not bench\.pdf"):
        check_target(tmp_path / "bench.pdf")
    with pytest.raises(OptionError, match="no folder"):
        check_target(tmp_path / "nonesuch" / "bench.png")
    for options in ({"repetitions": 0}, {"new_tokens": 0}):
        with pytest.raises(OptionError, match="must be at least 1"):
            Sweep(**options)  # type: ignore[arg-type]
