"""The results as a page with plots: `docs/performance.md` from the files under `benchmarks/results/`.

    python -m benchmarks.page

A file's name up to its first hyphen says what it is: `scaling.json` and `scaling-qwen3-vl-2b.json` are both of
`benchmarks.scaling`. Machines with VNNI and machines with AVX2 alone have chapters of their own, because INT8 runs
other kernels there. A test compares the page with what this makes of the results.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeAlias

from benchmarks import arithmetic, rounds
from benchmarks.child import START
from edgevlm.bench.conditions import Conditions, machine_line
from edgevlm.jobs.jsonl import read_rows

RESULTS, DOCS = Path("benchmarks/results"), Path("docs")
Json: TypeAlias = dict[str, Any]
NOT_RECORDED = "not recorded"
CHAPTERS = {
    "vnni": "CPUs with VNNI",
    "avx2": "CPUs with AVX2 and without VNNI",
    "other": "CPUs without AVX2",
    NOT_RECORDED: "CPUs whose instruction sets are not recorded",
}
VNNI = {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"}
INTRO = """\
Made by `python -m benchmarks.page` from `benchmarks/results/`. What was measured on one kind of CPU says nothing about
another, so machines with VNNI and machines without it have chapters of their own. Absolute times drift from run to run:
compare within a table.

How to read it. Systems beside each other alternate in one run, each in a process of its own. Figures are medians. In
brackets is the median of the ratios taken within each round, with its quartiles (25-75 %); where the rounds of a run
were not kept, it is the ratio of the medians. "Cores used" is the CPU time of the process over the wall time of what
was measured, "by others" that of all other processes. Where several threads were asked for and one of them starved
because another process used its core, no ratio of times is told.

The models are seeded, with the shapes of published ones: SmolVLM-256M (`python -m benchmarks.make_checkpoint`), and
those of `python -m benchmarks.make_seeded_checkpoint`. Time and memory are the model's, answers mean little."""
TITLES = {
    "side_by_side": "Beside its peers",
    "detail": "Detail auto: as many tiles as the picture has pixels for",
    "one_tile": "Detail low: one view",
    "image_tokens": "Beside its peers as the image tokens grow",
    "pages": "Seconds a page",
    "guide": "Four ways to run it",
    "reuse": "Caching",
    "scaling": "How it grows",
    "roofline": "Against the machine's limits",
    "arithmetic": "OpenVINO's settings, against those that edgevlm leaves or chooses",
}
"""The sections of a chapter in their order, by kind of result."""
NOTES = {
    "image_tokens": """\
The second question is about the same picture. edgevlm and llama.cpp keep the prompt's beginning in their KV cache, but
llama.cpp keeps a recurrent state (LFM2, Qwen3.5) only at checkpoints, none of which lies between picture and question:
it reads the picture again. optimum-intel and PyTorch keep nothing between two calls; OpenVINO GenAI is asked in a chat,
its own way to go on. `optimum` is its own INT4 export with INT8 weights in the vision encoder, `genai` runs that,
`int4-int8` is the like of edgevlm's, `int4-w8a8` what `edgevlm export --int4` makes, `gguf` is Q4_0 with a Q8_0 head
and an F16 vision encoder, `torch-bf16` is transformers on the checkpoint itself.""",
    "image_tokens-lfm2.5-vl-450m": """\
A picture of 512x512 pixels is one view, one of 1024x1024 four tiles and a thumbnail. PyTorch computes the short
convolutions with transformers' reference implementation, because `causal_conv1d` needs a GPU. optimum-intel does not
export LFM2-VL, so it and OpenVINO GenAI are not here.""",
    "image_tokens-qwen3-vl-2b": """\
The second question took OpenVINO GenAI as long as the first, or twice as long: why was not found out.""",
    "image_tokens-qwen3.5-0.8b": """\
PyTorch computes the linear attention with transformers' reference implementation, because `flash-linear-attention` and
`causal_conv1d` need a GPU. optimum-intel 2.1.0 exports Qwen3.5 with transformers 5.2.""",
    "pages": """\
A page of A4 as `edgevlm convert` rasterizes it at so many dpi (its own choice is 144), and 500 tokens of answer after
the first. All systems read it with the same image tokens but `edgevlm-convert`, which has the defaults of `edgevlm
convert`: no more views than the page has pixels for, and drafts. `edgevlm-drafts` has the drafts alone. Seeded weights
soon repeat a token, so nearly every draft comes true, which on a page of a real model it does not. `int4` and `int8`
are what `edgevlm export` makes, `gguf` is Q4_0 with a Q8_0 head and an F16 vision encoder, `torch-bf16` is transformers
on the checkpoint itself.""",
}
"""What tables need to be read: by the kind of result for all of it, by its name for one result."""
GUIDE_ROWS = {
    "PyTorch": "PyTorch FP32",
    "OpenVINO": "edgevlm FP32",
    "8-bit weights": "edgevlm INT8",
    "static quantization of the vision tower": "edgevlm INT8 + W8A8",
}
ONE_TILE = ", one tile"


class Result(NamedTuple):
    """A file of results: an object, or the rows of `benchmarks.rounds`."""

    name: str
    machine: Json
    content: Json
    rows: list[Json]

    @property
    def kind(self) -> str:
        """What it is a result of."""
        return self.name.partition("-")[0]

    @property
    def model(self) -> str:
        """The model that it is of, where its name tells."""
        return self.name.partition("-")[2]

    @property
    def is_comparison(self) -> bool:
        """Whether it is a run of `benchmarks.rounds`: systems beside each other."""
        return bool(self.rows) and "options" in self.content

    @property
    def chapter(self) -> str:
        """The key of the chapter that it stands in."""
        if "isa" not in self.machine:
            return NOT_RECORDED
        if VNNI & {*self.machine["isa"]}:
            return "vnni"
        return "avx2" if "avx2" in self.machine["isa"] else "other"


def read_results(folder: Path) -> list[Result]:
    """Return the results that have a section, in its order."""
    found = []
    for path in sorted(folder.glob("*.json*")):
        if path.suffix == ".jsonl":
            rows = [row for row, _ in read_rows(path)]
            found.append(Result(path.stem, rows[0]["machine"], rows[0], rows))
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
            found.append(Result(path.stem, content["machine"], content, []))
    order = list(TITLES)
    return sorted((each for each in found if each.kind in TITLES), key=lambda each: order.index(each.kind))


def page(results: Sequence[Result]) -> str:
    """Return the page."""
    parts = ["# Performance", INTRO]
    for key, title in CHAPTERS.items():
        own = [each for each in results if each.chapter == key]
        if own:
            parts += [f"## {title}", "\n".join(overview(own))]
            for each in own:
                parts.append(f"### {TITLES[each.kind]}" + (f": {each.model}" if each.model else ""))
                parts += [NOTES[key] for key in (each.kind, each.name) if key in NOTES and NOTES[key] not in parts]
                parts.append("\n".join(section(each)))
    return "\n\n".join(parts) + "\n"


def section(result: Result) -> list[str]:
    """Return the lines of a result's section, without its heading."""
    if not result.is_comparison:
        return [*SECTIONS[result.kind](result), "", f"Machine: {machine_line(result.machine)}."]
    base = rounds.reference(result.rows, "optimum INT4")
    count = max((row.get("round", 0) for row in result.rows), default=0)
    told = f"{count} rounds (`{' '.join(result.content['options'])}`), ratios to {base}."
    left_out = [f"- left out: {name}, because {why}" for name, why in result.content.get("left_out", {}).items()]
    plot = ["", f"![Time to the first token]({result.name}.png)"] if result.kind == "side_by_side" else []
    return [told, "", *rounds.table(result.rows, base), *left_out, *plot]


def overview(results: Sequence[Result]) -> list[str]:
    """Return edgevlm's memory, tiles, tokens, TTFT and TPOT with machine and conditions, a line for each point."""
    headings = ["model", *_PLACES, "TTFT s", "TPOT ms", "peak MB", "cores used, by others", "machine"]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for result in results:
        machine = f"{result.machine['cpu']}, {result.machine['cores']} cores"
        rows = _row_figures(result) if result.is_comparison else OVERVIEWS.get(result.kind, lambda _: [])(result)
        lines += ["| " + " | ".join([*row, machine]) + " |" for row in rows]
    return lines


def _row_figures(result: Result) -> list[list[str]]:
    """Return the overview's rows of a run of `benchmarks.rounds`: edgevlm's, each process of which had one model."""
    found = []
    for case, systems in rounds.cases(result.rows).items():
        for name, own in systems.items():
            if case == START or not name.startswith("edgevlm"):
                continue
            spreads = {figure: rounds.spread(own, figure) for figure in ("ttft_s", "tpot_s", "peak_memory_bytes")}
            medians = {figure: each.median for figure, each in spreads.items() if each}
            conditions = [each for row in own.values() if (each := rounds.conditions_of(row))]
            together = Conditions.together(conditions) if conditions else None
            model = f"{result.model}, " if result.model else ""
            found.append(_overview_row(f"{model}{name}, {case}", next(iter(own.values())), medians, together))
    return found


def _scaling_figures(result: Result) -> list[list[str]]:
    found = []
    for sweep in ("tiles", "context"):
        for point in result.content[sweep]:
            medians = {name: each["median"] for name, each in point["figures"].items()}
            conditions = Conditions.from_dict(point["conditions"]) if "conditions" in point else None
            if conditions:  # an earlier peak was that of two models
                medians["peak_memory_bytes"] = point["peak_memory_bytes"]
            place = {**point, "threads": point["threads"] or "all"}
            found.append(_overview_row(f"{result.content['model']}, {sweep}", place, medians, conditions))
    return found


def _summary_figures(result: Result) -> list[list[str]]:
    options, tokens = result.content["options"], result.content["prompt_tokens"]
    found = []
    for name, each in result.content["figures"].items():
        if name.startswith("edgevlm"):
            place = {"prompt tokens": tokens[name], "threads": options[options.index("--threads") + 1]}
            found.append(_overview_row(name, place, {figure: value["median"] for figure, value in each.items()}, None))
    return found


OVERVIEWS: dict[str, Callable[[Result], list[list[str]]]] = {
    "side_by_side": _summary_figures,
    "detail": _summary_figures,
    "one_tile": _summary_figures,
    "scaling": _scaling_figures,
}
_PLACES = ("views", "image tokens", "prompt tokens", "threads")


def _overview_row(
    name: str, place: Mapping[str, Any], medians: Mapping[str, float], conditions: Conditions | None
) -> list[str]:
    """Return the cells of a row, but for the machine; `place` is what was asked, under the headings or as in a row."""
    asked = {heading: place.get(heading, place.get(heading.replace(" ", "_"))) for heading in _PLACES}
    if conditions:
        asked["threads"] = conditions.threads
    used = f"{conditions.cores_used:.2f}, {conditions.cores_of_others:.2f}" if conditions else NOT_RECORDED
    if conditions and conditions.starved:
        used += ", a thread starved"
    memory, tpot_s = medians.get("peak_memory_bytes"), medians.get("tpot_s")
    return [
        name,
        *(NOT_RECORDED if value is None else str(value) for value in asked.values()),
        f"{medians['ttft_s']:.2f}",
        f"{tpot_s * 1000:.1f}" if tpot_s else "",
        f"{memory / 1e6:,.0f}" if memory else NOT_RECORDED,
        used,
    ]


def side_by_side(result: Result) -> list[str]:
    """Return the section of the peers, the whole picture being looked at."""
    names = [name for name in result.content["figures"] if not name.endswith(ONE_TILE)]
    return [*_peers(result.content, names), "", f"![Time to the first token]({result.name}.png)"]


def one_tile(result: Result) -> list[str]:
    """Return the section of the peers, the global view alone being looked at."""
    return _peers(result.content, [name for name in result.content["figures"] if name.endswith(ONE_TILE)])


def detail(result: Result) -> list[str]:
    """Return the section of `--detail high`, the checkpoint's own tiles, beside `auto`."""
    return _peers(result.content, list(result.content["figures"]))


def _peers(content: Json, names: Sequence[str]) -> list[str]:
    """Return the table of a run whose rounds were not kept, from its medians."""
    figures = content["figures"]
    peers = [name for name in names if name.startswith("optimum")]
    best = min(peers, key=lambda name: figures[name]["ttft_s"]["median"])
    lines = [
        f"One picture of 1600x1200, {content['rounds']} rounds, every system once in each round"
        f" (`{' '.join(content['options'])}`), ratios of medians to {best}, optimum-intel's best TTFT."
        " Start is from the start of the process to its first token, compile caches warm from the second round on."
        f" Conditions and versions of the peers: {NOT_RECORDED}.",
        "",
        "| system | prompt tokens | TTFT s | tokens/s | end to end s | peak MB | start s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        cells = [_cell(figures[name], figures[best], *column) for column in _COLUMNS]
        lines.append(f"| {name} | {content['prompt_tokens'][name] or ''} | " + " | ".join(cells) + " |")
    left_out = [f"Left out: {name}, because {why}." for name, why in content["left_out"].items()]
    return [*lines, "", *left_out] if left_out else lines


_COLUMNS = (
    ("ttft_s", 1.0),
    ("tokens_per_s", 1.0),
    ("total_s", 1.0),
    ("peak_memory_bytes", 1e-6),
    ("start_to_first_token_s", 1.0),
)
"""Figures of the peers' tables, and what they are multiplied by."""


def _cell(each: Json, base: Json, figure: str, scale: float) -> str:
    if figure not in each:
        return ""
    value = each[figure]["median"] * scale
    shown = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{shown} ({value / scale / base[figure]['median']:.2f}x)"


def guide(result: Result) -> list[str]:
    """Return the four rows in which guides to small models compare these ways of running one."""
    lines = [f"16 new tokens, medians of {result.content['rounds']} round(s). Conditions: {NOT_RECORDED}.", ""]
    lines += ["| | TTFT s | TPOT ms | end to end s | tokens/s |", "|---|---|---|---|---|"]
    for title, name in GUIDE_ROWS.items():
        each = {figure: value["median"] for figure, value in result.content["figures"][name].items()}
        lines.append(
            f"| {title} ({name}) | {each['ttft_s']:.2f} | {each['tpot_s'] * 1000:.1f} | {each['total_s']:.2f}"
            f" | {each['tokens_per_s']:.1f} |"
        )
    return lines


def reuse(result: Result) -> list[str]:
    """Return the section of vision cache, prefix reuse and prompt-lookup decoding."""
    content = result.content
    told = f"`{content['model']}`, KV cache {content['kv_cache']}; medians, and the range where there is one."
    rounding = "In BF16 several tokens in one inference round differently than one, and a near tie may go another way"
    told += f" {rounding} (*same tokens*); in float32 they are the same."
    lines = [told, "", "| | median | range |", "|---|---|---|"]
    for name, values in content["figures"].items():
        if name == "new picture, ratio":  # to itself
            continue
        low, high = min(values), max(values)
        spread = f"{low:.3g} to {high:.3g}" if low < high else ""
        lines.append(f"| {name} | {median(values):.3g} | {spread} |")
    return lines


def scaling(result: Result) -> list[str]:
    """Return the section of how the figures grow."""
    content = result.content
    lines = [f"`{content['model']}`; medians.", ""]
    lines += ["| sweep | views | prompt tokens | threads | TTFT s | prefill tokens/s | tokens/s | conditions |"]
    lines += ["|---" * 8 + "|"]
    for sweep in ("tiles", "context", "threads"):
        for point in content[sweep]:
            figures = point["figures"]
            known = Conditions.from_dict(point["conditions"]).line if "conditions" in point else NOT_RECORDED
            known = f"vision {point['vision']['name']}, {known}" if "vision" in point else known
            lines.append(
                f"| {sweep} | {point['views']} | {point['prompt_tokens']} | {point['threads'] or 'all'}"
                f" | {figures['ttft_s']['median']:.2f} | {figures['prefill_tokens_per_s']['median']:,.0f}"
                f" | {figures['tokens_per_s']['median']:.1f} | {known} |"
            )
    if content["questions"]:
        lines += ["", "Questions about one new picture, eight tokens each:", "", "| questions | seconds |", "|---|---|"]
    for count in sorted({row["questions"] for row in content["questions"]}):
        seconds = [row["seconds"] for row in content["questions"] if row["questions"] == count]
        lines.append(f"| {count} | {median(seconds):.2f} |")
    return [*lines, "", f"![How the figures grow]({result.name}.png)"]


def roofline(result: Result) -> list[str]:
    """Return the section of what the machine could do at most."""
    found = result.content.get("conditions")
    conditions = Conditions.from_dict(found).line if found else NOT_RECORDED
    lines = [f"`{result.content['model']}`; conditions: {conditions}.", "", "| | |", "|---|---|"]
    return [*lines, *(f"| {name} | {value:,.3g} |" for name, value in result.content["figures"].items())]


SECTIONS: dict[str, Callable[[Result], list[str]]] = {
    "side_by_side": side_by_side,
    "detail": detail,
    "one_tile": one_tile,
    "guide": guide,
    "reuse": reuse,
    "scaling": scaling,
    "roofline": roofline,
    "arithmetic": lambda result: arithmetic.table(result.rows).splitlines(),
}


def plot(result: Result, folder: Path) -> None:
    """Draw a result's plot, if it has one."""
    if result.kind == "side_by_side":
        _plot_first_tokens(result, folder)
    elif result.kind == "scaling":
        _plot_scaling(result, folder)


def _plot_first_tokens(result: Result, folder: Path) -> None:
    if result.rows:
        systems = next(systems for case, systems in rounds.cases(result.rows).items() if case != START)
        found = {name: rounds.spread(own, "ttft_s") for name, own in systems.items()}
        spreads = {name: each for name, each in found.items() if each}
        told = "median, quartiles"
    else:
        spreads = {name: rounds.Spread(**each["ttft_s"]) for name, each in result.content["figures"].items()}
        told = "median, range"
    names = [name for name in spreads if not name.endswith(("alone", ONE_TILE))]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.4 * len(names) + 1), layout="constrained")
    axes, values = figure.subplots(), [spreads[name] for name in names]
    errors = [[each.median - each.low for each in values], [each.high - each.median for each in values]]
    colours = ["C1" if name.startswith("edgevlm") else "C7" for name in names]
    axes.barh(names, [each.median for each in values], xerr=errors, color=colours)
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds to the first token ({told})")
    _finish(figure, folder / f"{result.name}.png")


def _plot_scaling(result: Result, folder: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    first, second = figure.subplots(1, 2)
    tiles, context = result.content["tiles"], result.content["context"]
    first.plot([p["views"] for p in tiles], [p["figures"]["ttft_s"]["median"] for p in tiles], "o-")
    first.set(xlabel="views", ylabel="seconds to the first token", ylim=(0, None))
    lengths = [p["prompt_tokens"] for p in context]
    second.plot(lengths, [p["figures"]["tokens_per_s"]["median"] for p in context], "o-", color="C2")
    second.set(xlabel="context, tokens", ylabel="tokens a second", ylim=(0, None))
    _finish(figure, folder / f"{result.name}.png")


def _finish(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    results = read_results(RESULTS)
    (DOCS / "performance.md").write_text(page(results), encoding="utf-8")
    for result in results:
        plot(result, DOCS)


if __name__ == "__main__":
    main()
