"""The latency benchmark: TTFT by stage, TPOT, throughput, memory.

Every figure is taken from the one generator. A cold figure comes from a model that keeps no embeddings and no KV cache,
and is refused if it reused anything all the same; figures with reuse stand apart, under their own names.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from edgevlm.bench.conditions import Conditions, Meter, describe_machine
from edgevlm.decoding.config import GenerationConfig
from edgevlm.decoding.prompt_lookup import PromptLookup
from edgevlm.decoding.sampling import TokenSelector, greedy
from edgevlm.decoding.stream import Step, stream_tokens
from edgevlm.errors import BenchmarkError, OptionError
from edgevlm.families import Detail, ImageBudget
from edgevlm.families.base import RGB
from edgevlm.inputs.image import ImageInput
from edgevlm.inputs.messages import user_message
from edgevlm.inputs.prompt import Prompt
from edgevlm.metrics import Stopwatch, Timings, peak_memory, reset_peak_memory
from edgevlm.runtime.arithmetic import ChosenArithmetic
from edgevlm.runtime.config import InferencePrecision, RuntimeConfig, VisionArithmetic
from edgevlm.vlm import VLM

Announce: TypeAlias = Callable[[str], None]
QUESTION = "Describe this picture in detail."
FILLER = "The quick brown fox jumps over the lazy dog. "


@dataclass(frozen=True)
class Sweep:
    """The parameters of a sweep; every combination is a point."""

    devices: tuple[str, ...] = ("AUTO",)
    threads: tuple[int | None, ...] = (None,)
    inference_precisions: tuple[InferencePrecision, ...] = ("auto",)
    vision_arithmetics: tuple[VisionArithmetic, ...] = ("auto",)
    details: tuple[Detail, ...] = ("auto",)
    max_image_tokens: tuple[int | None, ...] = (None,)
    prompt_tokens: tuple[int | None, ...] = (None,)
    """Least length of the prompt, filled up with text; None leaves the question as it is."""
    new_tokens: int = 32
    repetitions: int = 5
    warm_ups: int = 1

    def __post_init__(self) -> None:
        for name in ("new_tokens", "repetitions"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Figure:
    """One quantity over all repetitions."""

    median: float
    p90: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        """Summarise one value for each repetition."""
        p90 = quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]
        return cls(median(values), p90, min(values), max(values))


@dataclass(frozen=True)
class Point:
    """The figures of one combination, in seconds unless the name says otherwise."""

    device: str
    threads: int | None
    inference_precision: str
    vision: ChosenArithmetic
    """What the vision encoder computed with, and why."""
    detail: str
    views: int
    image_tokens: int
    prompt_tokens: int
    new_tokens: int
    repetitions: int
    figures: dict[str, Figure]
    conditions: Conditions
    """Of the answers to pictures never seen before."""
    peak_memory_bytes: int
    """With one model loaded, which keeps nothing; on Linux of this point alone, elsewhere of the process so far."""

    def to_dict(self) -> dict[str, Any]:
        """Return one line of `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Report:
    """One run of the benchmark."""

    model: str
    precisions: dict[str, str]
    machine: dict[str, Any]
    load: dict[str, float]
    """Seconds to load the model: `compile`, without compiled models on disk; `cached`, with them; `process`, from the
    start of a new process to its first token about the picture, with them."""
    points: list[Point] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the points, each of which is a line of its own."""
        return {"model": self.model, "precisions": self.precisions, "machine": self.machine, "load": self.load}


def bench(model: Path, image: RGB, picture: Path, sweep: Sweep, announce: Announce = lambda _: None) -> Report:
    """Measure `model` on `image`, which is also the file `picture`. Raises `EdgeVLMError`."""
    announce("loading")
    load = measure_load(model, picture)
    vlm = VLM(model)
    precisions = {name: part.precision for name, part in vlm.manifest.submodels.items()}
    report = Report(model.name, precisions, describe_machine(), load)
    del vlm
    settings = product(sweep.devices, sweep.threads, sweep.inference_precisions, sweep.vision_arithmetics)
    for device, threads, precision, vision in settings:
        config = RuntimeConfig(device=device, threads=threads, inference_precision=precision, vision_arithmetic=vision)
        vlm = VLM(model, replace(config, image_cache_bytes=0, kept_sessions=0))
        how = f"{vlm.device}, {threads or 'all'} threads, {precision}, vision {vlm.vision_arithmetic.name}"
        asked: list[tuple[ImageBudget, str]] = []
        points: list[Point] = []
        for detail, limit, length in product(sweep.details, sweep.max_image_tokens, sweep.prompt_tokens):
            budget = ImageBudget(detail, limit)
            announce(f"{how}, {detail}, image tokens {limit or 'any'}")
            asked.append((budget, pad_prompt(vlm, image, budget, length, sweep.new_tokens)))
            points.append(measure(vlm, image, *asked[-1], sweep))
        del vlm
        gc.collect()  # so that one model is loaded at a time
        vlm = VLM(model, config)
        for point, each in zip(points, asked, strict=True):
            announce(f"{how}, {point.detail}, next question")
            following = {"next_question_ttft_s": measure_next(vlm, image, *each, sweep)}
            report.points.append(replace(point, figures=point.figures | following))
    return report


def measure(cold: VLM, image: RGB, budget: ImageBudget, question: str, sweep: Sweep) -> Point:
    """Return the figures of one point, but for the next question; `cold` keeps neither embeddings nor KV cache."""
    reset_peak_memory()
    samples: list[Sample] = []
    meter = Meter(cold.config.threads)
    for repetition in range(sweep.warm_ups + sweep.repetitions):
        picture, measured = perturb(image, repetition), repetition >= sweep.warm_ups
        with meter.part() if measured else nullcontext():
            sample = ask(cold, picture, question, budget, sweep.new_tokens)
        if sample.cached_tokens or sample.cached_views:
            raise BenchmarkError("a cold figure reused what was known before; please report this")
        if measured:
            samples.append(sample)
    prompt = samples[0].prompt
    return Point(
        cold.device,
        cold.config.threads,
        cold.config.inference_precision,
        cold.vision_arithmetic,
        budget.detail,
        prompt.views,
        prompt.image_tokens,
        len(prompt),
        sweep.new_tokens,
        sweep.repetitions,
        {name: Figure.of([each.figures[name] for each in samples]) for name in samples[0].figures},
        meter.conditions,
        peak_memory(),
    )


def measure_next(warm: VLM, image: RGB, budget: ImageBudget, question: str, sweep: Sweep) -> Figure:
    """Return the seconds to the first token of a second question about a picture; `warm` keeps what it computed."""
    seconds = []
    for repetition in range(sweep.warm_ups + sweep.repetitions):
        picture = perturb(image, repetition)
        ask(warm, picture, question, budget, 1)
        again = ask(warm, picture, f"{question} Be brief.", budget, 1)
        seconds.append(again.timings.ttft_s)
    return Figure.of(seconds[sweep.warm_ups :])


@dataclass(frozen=True)
class Sample:
    """One answer of a fixed number of tokens."""

    prompt: Prompt
    timings: Timings
    token_ids: tuple[int, ...]
    cached_tokens: int
    cached_views: int

    @property
    def figures(self) -> dict[str, float]:
        """The figures that a cold answer gives."""
        timings = self.timings
        found = {
            "preprocess_s": timings.preprocess_s,
            "vision_s_per_view": timings.vision_s / max(self.prompt.views, 1),
            "prefill_tokens_per_s": len(self.prompt) / timings.prefill_s,
            "ttft_s": timings.ttft_s,
            "total_s": timings.total_s,
        }
        if timings.tpot_s:
            found |= {"tpot_s": timings.tpot_s, "tokens_per_s": 1 / timings.tpot_s}
        return found


def ask(
    vlm: VLM, image: ImageInput, question: str, budget: ImageBudget, new_tokens: int, draft_tokens: int = 0
) -> Sample:
    """Generate exactly `new_tokens` tokens, end tokens ignored, with drafts of `draft_tokens` at most."""
    watch = Stopwatch()
    prompt = vlm.prepare([user_message(question, 1)], [image], GenerationConfig(), watch, budget)
    with vlm.session(prompt) as session:
        drafter = PromptLookup(prompt.ids, draft_tokens, vlm.processor.tokenizer.shape)
        made = stream_tokens(session, prompt, TokenSelector(greedy), new_tokens, watch, drafter)
        ids = tuple(each[0] for each in made if not isinstance(each, Step))
    cached = watch.counts.get("cached_tokens", 0)
    return Sample(prompt, watch.timings(vlm.load_s, len(ids)), ids, cached, prompt.cached_views)


def sample_picture(folder: Path) -> Path:
    """Write a picture of 1600x1200 with detail in every tile, and return its path."""
    rows, columns = np.mgrid[0:1200, 0:1600]
    waves = [128 + 90 * np.sin(columns / (9 + 7 * c)) * np.cos(rows / (11 + 5 * c)) for c in range(3)]
    path = folder / "picture.png"
    Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8)).save(path, compress_level=1)
    return path


def perturb(image: RGB, repetition: int) -> RGB:
    """Return the picture with a level added everywhere, so that none of its views has been encoded before."""
    return np.where(image < 128, image + np.uint8(repetition % 100), image - np.uint8(repetition % 100))


def pad_prompt(vlm: VLM, image: RGB, budget: ImageBudget, length: int | None, new_tokens: int) -> str:
    """Return a question that makes the prompt at least `length` tokens long."""
    count = partial(vlm.count_tokens, images=vlm.preprocess([image], budget))
    if length is None:
        return QUESTION
    if length >= vlm.manifest.context_length - new_tokens:
        raise BenchmarkError(
            f"a prompt of {length} tokens leaves no room in a context of {vlm.manifest.context_length}"
        )
    empty = count([user_message(QUESTION, 1)])
    each = count([user_message(FILLER * 10 + QUESTION, 1)]) - empty
    return FILLER * max(0, -(-10 * (length - empty) // each)) + QUESTION


def measure_load(model: Path, picture: Path) -> dict[str, float]:
    """Return the seconds of loading: compiling, from the cache, and from the start of a process to its first token."""
    compiled = VLM(model, RuntimeConfig(cache=False)).load_s
    VLM(model)
    cached = VLM(model).load_s
    command = [sys.executable, "-m", "edgevlm", "run", str(picture), QUESTION, "-m", str(model)]
    command += ["--max-new-tokens", "1", "--detail", "low"]
    started = perf_counter()
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"a new process could not answer: {done.stderr.decode(errors='replace').strip()}")
    return {"compile": compiled, "cached": cached, "process": perf_counter() - started}


def lines(report: Report) -> Iterator[dict[str, Any]]:
    """Yield the objects that `--json` prints, one a line: the run, then its points."""
    yield report.to_dict()
    for point in report.points:
        yield point.to_dict()
