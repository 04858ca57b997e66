"""The results as a page with plots: `docs/performance.md` from the JSON files under `benchmarks/results/`.

python -m benchmarks.page
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS, DOCS = Path("benchmarks/results"), Path("docs")
Result: TypeAlias = dict[str, Any]
GUIDE_ROWS = {
    "PyTorch": "PyTorch FP32",
    "OpenVINO": "edgevlm FP32",
    "8-bit weights": "edgevlm INT8",
    "static quantization of the vision tower": "edgevlm INT8 + W8A8",
}
ONE_TILE = ", one tile"


def side_by_side(result: Result) -> str:
    """Return the section of the peers, the whole picture being looked at."""
    names = [name for name in result["figures"] if not name.endswith(ONE_TILE)]
    whole = [name for name in names if not name.endswith("alone")]
    _plot("side_by_side.png", lambda axes: _bars(axes, result["figures"], whole), height=0.4 * len(whole) + 1)
    return "\n".join(
        ["## Beside its peers", "", *_peers(result, names), "", "![Time to the first token](side_by_side.png)"]
    )


def one_tile(result: Result) -> str:
    """Return the section of the peers, the global view alone being looked at."""
    names = [name for name in result["figures"] if name.endswith(ONE_TILE)]
    return "\n".join(["## Detail low: one view", "", *_peers(result, names)])


def detail(result: Result) -> str:
    """Return the section of `--detail high`, the checkpoint's own tiles, beside `auto`."""
    return "\n".join(
        ["## Detail auto: as many tiles as the picture has pixels for", "", *_peers(result, list(result["figures"]))]
    )


def _peers(result: Result, names: Sequence[str]) -> list[str]:
    figures = result["figures"]
    peers = [name for name in names if name.startswith("optimum")]
    best = min(peers, key=lambda name: figures[name]["ttft_s"]["median"])
    lines = [
        f"One picture of 1600x1200, {result['rounds']} rounds, every system once in each round, in a process of its own"
        f" (`{' '.join(result['options'])}`). Medians, and in brackets how many times that of {best}, optimum-intel's"
        " quickest to the first token. Start is from the start of the process to its first token, compile caches warm"
        " from the second round on.",
        "",
        "| system | prompt tokens | TTFT s | tokens/s | end to end s | peak MB | start s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        cells = [_cell(figures[name], figures[best], *column) for column in _COLUMNS]
        lines.append(f"| {name} | {result['prompt_tokens'][name] or ''} | " + " | ".join(cells) + " |")
    left_out = [f"Left out: {name}, because {why}." for name, why in result["left_out"].items()]
    return [*lines, "", *left_out] if left_out else lines


_COLUMNS = (
    ("ttft_s", 1.0),
    ("tokens_per_s", 1.0),
    ("total_s", 1.0),
    ("peak_memory_bytes", 1e-6),
    ("start_to_first_token_s", 1.0),
)
"""Figures of the peers' tables, and what they are multiplied by."""


def _cell(each: Result, base: Result, figure: str, scale: float) -> str:
    if figure not in each:
        return ""
    value = each[figure]["median"] * scale
    shown = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{shown} ({value / scale / base[figure]['median']:.2f}x)"


def _bars(axes: Axes, figures: Result, names: Sequence[str]) -> None:
    values = [figures[name]["ttft_s"] for name in names]
    errors = [[v["median"] - v["low"] for v in values], [v["high"] - v["median"] for v in values]]
    colours = ["C1" if name.startswith("edgevlm") else "C7" for name in names]
    axes.barh(names, [v["median"] for v in values], xerr=errors, color=colours)
    axes.invert_yaxis()
    axes.set_xlabel("seconds to the first token (median, range)")


def guide(result: Result) -> str:
    """Return the four rows in which guides to small models compare these ways of running one."""
    lines = ["## Four ways to run it", "", f"16 new tokens, medians of {result['rounds']} round(s).", ""]
    lines += ["| | TTFT s | TPOT ms | end to end s | tokens/s |", "|---|---|---|---|---|"]
    for title, name in GUIDE_ROWS.items():
        each = {figure: value["median"] for figure, value in result["figures"][name].items()}
        lines.append(
            f"| {title} ({name}) | {each['ttft_s']:.2f} | {each['tpot_s'] * 1000:.1f} | {each['total_s']:.2f}"
            f" | {each['tokens_per_s']:.1f} |"
        )
    return "\n".join(lines)


def reuse(result: Result) -> str:
    """Return the section of vision cache, prefix reuse and prompt-lookup decoding."""
    told = f"`{result['model']}`, KV cache {result['kv_cache']}; medians, and the range where there is one."
    lines = ["## Caching", "", told, "", "| | median | range |", "|---|---|---|"]
    for name, values in result["figures"].items():
        if name == "new picture, ratio":  # to itself
            continue
        low, high = min(values), max(values)
        spread = f"{low:.3g} to {high:.3g}" if low < high else ""
        lines.append(f"| {name} | {median(values):.3g} | {spread} |")
    return "\n".join(lines)


def scaling(result: Result) -> str:
    """Return the section of how the figures grow."""
    lines = ["## How it grows", "", f"`{result['model']}`; medians.", ""]
    lines += ["| sweep | views | prompt tokens | threads | TTFT s | prefill tokens/s | tokens/s |", "|---" * 7 + "|"]
    for sweep in ("tiles", "context", "threads"):
        for point in result[sweep]:
            figures = point["figures"]
            lines.append(
                f"| {sweep} | {point['views']} | {point['prompt_tokens']} | {point['threads'] or 'all'}"
                f" | {figures['ttft_s']['median']:.2f} | {figures['prefill_tokens_per_s']['median']:,.0f}"
                f" | {figures['tokens_per_s']['median']:.1f} |"
            )
    lines += ["", "Questions about one new picture, eight tokens each:", "", "| questions | seconds |", "|---|---|"]
    counts = sorted({row["questions"] for row in result["questions"]})
    for count in counts:
        seconds = [row["seconds"] for row in result["questions"] if row["questions"] == count]
        lines.append(f"| {count} | {median(seconds):.2f} |")
    lines += ["", "![How the figures grow](scaling.png)"]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    first, second = figure.subplots(1, 2)
    tiles, context = result["tiles"], result["context"]
    first.plot([p["views"] for p in tiles], [p["figures"]["ttft_s"]["median"] for p in tiles], "o-")
    first.set(xlabel="views", ylabel="seconds to the first token", ylim=(0, None))
    lengths = [p["prompt_tokens"] for p in context]
    second.plot(lengths, [p["figures"]["tokens_per_s"]["median"] for p in context], "o-", color="C2")
    second.set(xlabel="context, tokens", ylabel="tokens a second", ylim=(0, None))
    _finish(figure, "scaling.png")
    return "\n".join(lines)


def roofline(result: Result) -> str:
    """Return the section of what the machine could do at most."""
    lines = ["## Against the machine's limits", "", f"`{result['model']}`", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value:,.3g} |" for name, value in result["figures"].items())])


def _plot(name: str, draw: Callable[[Axes], None], height: float) -> None:
    figure = Figure(figsize=(9, height), layout="constrained")
    draw(figure.subplots())
    _finish(figure, name)


def _finish(figure: Figure, name: str) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / name, dpi=110, metadata={"Software": None})


SECTIONS: dict[str, Callable[[Result], str]] = {
    "side_by_side": side_by_side,
    "detail": detail,
    "one_tile": one_tile,
    "guide": guide,
    "reuse": reuse,
    "scaling": scaling,
    "roofline": roofline,
}


def main() -> None:
    parts, machine = ["# Performance"], {}
    for name, section in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if path.is_file():
            result = json.loads(path.read_text(encoding="utf-8"))
            machine = result["machine"]
            parts.append(section(result))
    described = ", ".join(f"{key} {value}" for key, value in machine.items())
    parts.insert(
        1,
        f"Made by `python -m benchmarks.page` from `benchmarks/results/`. The model has SmolVLM-256M's shape"
        f" (`python -m benchmarks.make_checkpoint`). Machine: {described}. Absolute times drift from run to run:"
        f" compare within a table.",
    )
    (DOCS / "performance.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
