"""Which of OpenVINO's settings suits this machine: prefill, decode and vision under each, taking turns.

    python -m benchmarks.arithmetic FILE.jsonl EXPORT [--rounds 9] [--minutes 5] [--only f32 bf16 ...] [--part language]
    python -m benchmarks.arithmetic FILE.jsonl --table

Each candidate runs in a process of its own that stays and waits for its turn; the order turns round every other round.
The same command goes on until each candidate has its rounds in FILE.jsonl. The table has medians and quartiles of the
times, and of each round's ratio to `default`, what edgevlm does today. Drift is the distance of the outputs from those
of `f32`, which computes all in float32: of the language model's logits along a text (cosine, mean KL divergence in
nats, share of positions with the same likeliest token), of the vision encoder's image embeddings (cosine; its `f32`
leaves activations unquantized, too).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from time import monotonic, perf_counter
from typing import Any, TypeAlias

import numpy as np

from benchmarks.prompts import TEXT
from edgevlm import RuntimeConfig
from edgevlm.bench.conditions import describe_machine
from edgevlm.bench.measure import sample_picture
from edgevlm.decoding.fidelity import kl
from edgevlm.families.base import IMAGE_EMBEDS, ImageBudget
from edgevlm.inputs.image import load_image
from edgevlm.inputs.processor import Processor
from edgevlm.jobs.jsonl import append_rows, read_rows
from edgevlm.manifest import LANGUAGE, VISION, load_manifest
from edgevlm.runtime.kv_paged import PagedSession
from edgevlm.runtime.loader import ModelLoader

Row: TypeAlias = dict[str, Any]
DEFAULT, REFERENCE = "default", "f32"


class UnsupportedError(Exception):
    """A candidate that the export does not allow."""


@dataclass(frozen=True)
class Candidate(RuntimeConfig):
    """A runtime configuration with properties of OpenVINO that it does not know."""

    device: str = "CPU"
    cache: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)

    def properties(self, device: str) -> dict[str, Any]:
        """Return OpenVINO's properties, the candidate's own above those that edgevlm sets."""
        return super().properties(device) | self.extra


def with_properties(**extra: Any) -> Candidate:
    """Return the default with these properties of OpenVINO."""
    return Candidate(extra=extra)


def float32(group_size: int) -> Candidate:
    """Return float32 whose activations are quantized in groups of this size before a product; 0: they are not."""
    return with_properties(INFERENCE_PRECISION_HINT="f32", DYNAMIC_QUANTIZATION_GROUP_SIZE=group_size)


BOTH = {
    DEFAULT: Candidate(),
    REFERENCE: Candidate(inference_precision="f32"),
    "bf16": Candidate(inference_precision="bf16"),
    "pinned": with_properties(ENABLE_CPU_PINNING=True),
}
PARTS: dict[str, dict[str, Candidate]] = {
    LANGUAGE: BOTH
    | {
        "bf16, dynamic 0": replace(BOTH["bf16"], extra={"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}),
        **{f"f32, dynamic {size}": float32(size) for size in (0, 32, 64, 128)},
        "KV u8": Candidate(kv_cache_precision="u8"),
        "KV f32": Candidate(kv_cache_precision="f32"),
        "paged": Candidate(kv_cache="paged"),
        "paged, f32, dynamic 32": replace(float32(32), kv_cache="paged"),
    },
    VISION: BOTH
    | {REFERENCE: Candidate(inference_precision="f32", vision_arithmetic="compressed")}
    | {
        f"{graph}, {precision}": Candidate(inference_precision=precision, vision_arithmetic=graph)
        for graph in ("exported", "compressed", "float32")
        for precision in ("f32", "bf16")
        if (graph, precision) not in {("compressed", "f32"), ("exported", "bf16")}  # the reference; what `bf16` is
    },
}
"""The candidates for each submodel."""


@dataclass(frozen=True)
class Job:
    """What is measured under each candidate."""

    folder: Path
    part: str
    prefill: tuple[int, ...]
    """Tokens of each prompt."""
    decode: tuple[int, ...]
    """Tokens in the KV cache when the next ones are decoded."""
    tokens: int
    """Tokens decoded for each."""


class LanguageTimes:
    """The language model of an export under one candidate."""

    def __init__(self, job: Job, candidate: Candidate) -> None:
        manifest = load_manifest(job.folder)
        self._session = ModelLoader(job.folder, manifest, candidate, "CPU").language_model().session()
        if candidate.kv_cache == "paged" and not isinstance(self._session, PagedSession):
            raise UnsupportedError("this export has no paged attention")
        self._ids = Processor(job.folder, manifest).tokenizer.encode(" ".join(TEXT))
        self._job = job

    def times(self) -> dict[str, float]:
        """Return the milliseconds of each prefill, and of a token after each length of context."""
        found = {}
        for length in sorted({*self._job.prefill, *self._job.decode}):
            prefill = self._prefill(length)
            if length in self._job.prefill:
                found[f"prefill {length}"] = prefill
            if length in self._job.decode:
                found[f"decode at {length}"] = self._decode()
        return found

    def _prefill(self, length: int) -> float:
        self._session.reset()
        embeds = self._session.embed(np.resize(self._ids, length))
        started = perf_counter()
        self._session.prefill(embeds)
        return 1000 * (perf_counter() - started)

    def _decode(self) -> float:
        started = perf_counter()
        for number in range(self._job.tokens):
            self._session.step([self._ids[number % len(self._ids)]])
        return 1000 * (perf_counter() - started) / self._job.tokens

    def outputs(self) -> np.ndarray:
        """Return logits `(n, V)`: of all positions of a prompt, and of steps after it."""
        ids, steps = self._ids[:64], self._ids[64:80]
        self._session.reset()
        prompt = self._session.prefill(self._session.embed(ids), len(ids))
        return np.concatenate([prompt, *(self._session.step([each]) for each in steps)])


class VisionTimes:
    """The vision encoder of an export under one candidate."""

    def __init__(self, job: Job, candidate: Candidate) -> None:
        manifest = load_manifest(job.folder)
        family = Processor(job.folder, manifest).family
        self._encoder = ModelLoader(job.folder, manifest, candidate, "CPU").vision(family)
        with tempfile.TemporaryDirectory() as scratch:
            image = load_image(sample_picture(Path(scratch)))
        self._views = family.preprocess(image, family.budget_for(ImageBudget("low"), 1)).views[:1]

    def times(self) -> dict[str, float]:
        """Return the milliseconds of one view."""
        started = perf_counter()
        self.outputs()
        return {"view": 1000 * (perf_counter() - started)}

    def outputs(self) -> np.ndarray:
        """Return the image embeddings `(tokens, hidden)`."""
        return next(iter(self._encoder.encode(self._views)))[IMAGE_EMBEDS]


_MEASURED = {LANGUAGE: LanguageTimes, VISION: VisionTimes}
_loaded: list[LanguageTimes | VisionTimes] = []
"""What this process measures, one at most."""


def load(job: Job, candidate: Candidate) -> None:
    """Load what this process measures, and warm it up."""
    _loaded.append(_MEASURED[job.part](job, candidate))
    times()


def times() -> dict[str, float]:
    """Return the milliseconds of one turn."""
    return _loaded[0].times()


def outputs() -> np.ndarray:
    """Return what drift is told by."""
    return _loaded[0].outputs()


@contextmanager
def worker(job: Job, candidate: Candidate) -> Iterator[Callable[..., Any]]:
    """Give what calls a function in a process that has the candidate loaded. Raises `UnsupportedError`."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:

        def call(function: Callable[..., Any], *arguments: Any) -> Any:
            return pool.submit(function, *arguments).result()

        call(load, job, candidate)
        yield call


def drift(part: str, exact: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Return the distance of a candidate's outputs from the reference's."""
    want, got = exact.ravel().astype(np.float64), found.ravel().astype(np.float64)
    figures = {"cosine": float(want @ got / (np.linalg.norm(want) * np.linalg.norm(got)))}
    if part == LANGUAGE:
        figures["kl"] = float(kl(exact, found).mean())
        figures["same_token"] = float((exact.argmax(-1) == found.argmax(-1)).mean())
    return figures


def measure(job: Job, candidates: Mapping[str, Candidate], rounds: range, seconds: float) -> Iterator[Row]:
    """Yield each candidate's drift, then its times in each round; no turn begins after so many seconds."""
    began, name = monotonic(), {"model": job.folder.name, "part": job.part}
    with worker(job, replace(PARTS[job.part][REFERENCE], threads=candidates[DEFAULT].threads)) as call:
        exact = call(outputs)
    with ExitStack() as stack:
        calls = {}
        for each, candidate in candidates.items():  # one after another: loading takes memory that running does not
            try:
                calls[each] = stack.enter_context(worker(job, candidate))
            except UnsupportedError as error:
                print(f"{each} is left out: {error}", file=sys.stderr)
            else:
                yield {**name, "candidate": each, "drift": drift(job.part, exact, calls[each](outputs))}
        for number in rounds:
            for each in calls if number % 2 else reversed(calls):
                if monotonic() - began > seconds:
                    return
                yield {**name, "candidate": each, "round": number, "ms": calls[each](times)}


def table(rows: Sequence[Row]) -> str:
    """Return medians, quartiles, ratios to the default and drift as Markdown, a table for each model and submodel."""
    text = []
    for model, part in dict.fromkeys((row["model"], row["part"]) for row in rows if "part" in row):
        own = [row for row in rows if (row.get("model"), row.get("part")) == (model, part)]
        timed = [row for row in own if "round" in row]
        drifts = {row["candidate"]: row["drift"] for row in own if "drift" in row}
        figures = list(timed[0]["ms"]) if timed else []
        columns = [f"{figure}, ms | ratio" for figure in figures]
        text += [f"{model}, {part}", "", f"| candidate | rounds | {' | '.join([*columns, 'drift'])} |"]
        text.append("|---" * (3 + 2 * len(figures)) + "|")
        for name in dict.fromkeys(row["candidate"] for row in timed):
            mine, base = (
                {row["round"]: row["ms"] for row in timed if row["candidate"] == each} for each in (name, DEFAULT)
            )
            cells = [_cell(mine, base, figure) for figure in figures]
            told = ", ".join(f"{figure} {value:.3g}" for figure, value in drifts.get(name, {}).items())
            text.append(f"| {name} | {len(mine)} | {' | '.join([*cells, told])} |")
        text.append("")
    return "\n".join(text)


def _cell(mine: Mapping[int, Any], base: Mapping[int, Any], figure: str) -> str:
    ratios = [ms[figure] / base[number][figure] for number, ms in mine.items() if number in base]
    return f"{_spread([ms[figure] for ms in mine.values()])} | {_spread(ratios) if ratios else ''}"


def _spread(values: Sequence[float]) -> str:
    """Return median and quartiles."""
    low, _, high = quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    middle, low, high = (f"{each:,.0f}" if each >= 100 else f"{each:.3g}" for each in (median(values), low, high))
    return f"{middle} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("output", type=Path, help="JSON Lines, added to")
    parser.add_argument("export", type=Path, nargs="?")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="CANDIDATE", help="beside the default; such as 'f32, dynamic 32'"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=60.0, help="for each part; no turn begins later")
    parser.add_argument("--prefill", type=int, nargs="+", default=[64, 900])
    parser.add_argument("--decode", type=int, nargs="+", default=[100, 900], help="tokens in the KV cache")
    parser.add_argument("--tokens", type=int, default=24, help="decoded for each")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--table", action="store_true", help="print what the file has; measure nothing")
    arguments = parser.parse_args()
    known = list(dict.fromkeys(name for candidates in PARTS.values() for name in candidates))
    if wrong := [name for name in arguments.only if name not in known]:
        parser.error(f"--only {wrong[0]!r}: there are {', '.join(map(repr, known))}")
    if not arguments.table:
        if arguments.export is None:
            parser.error("name an EXPORT, or --table")
        run(arguments)
    print(table([row for row, _ in read_rows(arguments.output)]))


def run(arguments: argparse.Namespace) -> None:
    """Measure the parts that were asked for; every row goes to the file at once."""
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    rows = [row for row, _ in read_rows(arguments.output)]
    if not rows:
        append_rows(arguments.output, [{"machine": describe_machine(), "threads": arguments.threads}])
    for part in arguments.part:
        job = Job(arguments.export, part, tuple(arguments.prefill), tuple(arguments.decode), arguments.tokens)
        candidates = {
            name: replace(candidate, threads=arguments.threads)
            for name, candidate in PARTS[part].items()
            if not arguments.only or name in {DEFAULT, *arguments.only}
        }
        own = [row for row in rows if (row.get("model"), row.get("part")) == (arguments.export.name, part)]
        last = max((row.get("round", 0) for row in own), default=0)
        had = Counter(row["candidate"] for row in own if "round" in row)
        missing = arguments.rounds - min(had[name] for name in candidates)
        if missing > 0:
            for row in measure(job, candidates, range(last + 1, last + 1 + missing), 60 * arguments.minutes):
                append_rows(arguments.output, [row])
                print(json.dumps(row), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
