"""docs/performance.md is what `benchmarks.page` makes of the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.page import page, plot, read_results
from edgevlm.jobs.jsonl import append_rows
from tests.test_conditions import QUIET
from tests.test_rounds import MACHINE, pair

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def write_rounds(path: Path, isa: list[str]) -> None:
    """Write a run of edgevlm beside optimum-intel on a machine with these instruction sets."""
    head = {"machine": {**MACHINE["machine"], "isa": isa}, "options": ["--tokens", "4", "--threads", "2"]}
    names = {"A": "optimum INT4", "B": "edgevlm INT4"}
    rows = [{**row, "system": names[row["system"]], "prompt_tokens": 82, "tpot_s": 0.012} for row in pair(0.5, 0.7)]
    append_rows(path, [head, *rows])


def write_scaling(path: Path, isa: list[str]) -> None:
    """Write a sweep over tiles with a point of `edgevlm bench`."""
    names = ("ttft_s", "prefill_tokens_per_s", "tokens_per_s", "tpot_s")
    point = {"views": 13, "image_tokens": 832, "prompt_tokens": 877, "threads": 2, "peak_memory_bytes": 700_000_000}
    point |= {"figures": {name: {"median": 0.5} for name in names}, "conditions": QUIET.to_dict()}
    content: dict[str, Any] = {"machine": {**MACHINE["machine"], "isa": isa}, "model": "internvl3-1b"}
    content |= {"tiles": [point], "context": [point], "threads": [], "questions": []}
    path.write_text(json.dumps(content), encoding="utf-8")


def test_the_page_is_what_the_command_makes_of_the_results() -> None:
    shown = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert shown == page(read_results(RESULTS)), "run python -m benchmarks.page"


def test_results_without_conditions_say_so() -> None:
    old = [result for result in read_results(RESULTS) if "isa" not in result.machine]
    text = page(old)
    assert "## CPUs whose instruction sets are not recorded" in text
    assert "instruction sets: not recorded" in text
    assert "## CPUs with" not in text


def test_machines_with_vnni_and_with_avx2_alone_are_kept_apart(tmp_path: Path) -> None:
    write_rounds(tmp_path / "side_by_side-old_cpu.jsonl", ["avx2"])
    write_rounds(tmp_path / "side_by_side-new_cpu.jsonl", ["avx2", "avx512_vnni"])
    write_scaling(tmp_path / "scaling-internvl3-1b.json", ["avx2"])
    text = page(read_results(tmp_path))
    vnni, avx2 = text.split("## CPUs with VNNI")[1].split("## CPUs with AVX2 and without VNNI")
    assert "side_by_side-new_cpu.png" in vnni
    assert "internvl3-1b" not in vnni
    assert "side_by_side-old_cpu.png" in avx2
    assert avx2.count("### Beside its peers") == vnni.count("### Beside its peers") == 1


def test_memory_tiles_tokens_latency_and_machine_stand_together(tmp_path: Path) -> None:
    write_rounds(tmp_path / "side_by_side.jsonl", ["avx2"])
    write_scaling(tmp_path / "scaling-internvl3-1b.json", ["avx2"])
    text = page(read_results(tmp_path))
    place = "| 13 | 832 | 877 | 2 | 0.50 | 500.0 | 700 | 1.98, 0.00 | A CPU, 2 cores |"
    assert f"| internvl3-1b, tiles {place}" in text
    beside = "| not recorded | not recorded | 82 | 2 | 0.95 | 12.0 | 950 | 1.98, 0.00 | A CPU, 2 cores |"
    assert f"| edgevlm INT4, picture {beside}" in text
    assert "| picture | edgevlm INT4 | 82 | 0.95 (0.60x, 0.55-0.65) |" in text
    assert "1.98 cores used by 2 threads of 2 cores" in text


def test_every_plot_that_the_page_shows_is_drawn(tmp_path: Path) -> None:
    write_rounds(tmp_path / "side_by_side.jsonl", ["avx2"])
    write_scaling(tmp_path / "scaling-internvl3-1b.json", ["avx2"])
    results = read_results(tmp_path)
    for result in results:
        plot(result, tmp_path)
    for name in ("side_by_side.png", "scaling-internvl3-1b.png"):
        assert f"]({name})" in page(results)
        with Image.open(tmp_path / name) as opened:
            assert opened.format == "PNG"
