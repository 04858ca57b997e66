"""The latency benchmark: TTFT by stage, TPOT, throughput, memory.

Every figure is taken from the one generator. A cold figure comes from a model that keeps no embeddings and no KV cache,
and is refused if it reused anything all the same; figures with reuse stand apart, under their own names.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from edgevlm import __version__
from edgevlm.decoding.config import GenerationConfig
from edgevlm.decoding.prompt_lookup import PromptLookup
from edgevlm.decoding.sampling import TokenSelector, greedy
from edgevlm.decoding.stream import stream_tokens
from edgevlm.errors import BenchmarkError, OptionError
from edgevlm.families import Detail, ImageBudget
from edgevlm.families.base import RGB
from edgevlm.inputs.image import ImageInput
from edgevlm.inputs.messages import user_message
from edgevlm.inputs.prompt import Prompt
from edgevlm.metrics import Stopwatch, Timings, peak_memory
from edgevlm.runtime.arithmetic import ChosenArithmetic
from edgevlm.runtime.config import InferencePrecision, RuntimeConfig, VisionArithmetic
from edgevlm.runtime.core import core
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
    peak_memory_bytes: int

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
        cold = VLM(model, replace(config, image_cache_bytes=0, kept_sessions=0))
        warm = VLM(model, config)
        for detail, limit, length in product(sweep.details, sweep.max_image_tokens, sweep.prompt_tokens):
            budget = ImageBudget(detail, limit)
            how = f"{threads or 'all'} threads, {precision}, vision {cold.vision_arithmetic.name}"
            announce(f"{cold.device}, {how}, {detail}, image tokens {limit or 'any'}")
            question = pad_prompt(cold, image, budget, length, sweep.new_tokens)
            report.points.append(measure(cold, warm, image, budget, question, sweep))
    return report


def measure(cold: VLM, warm: VLM, image: RGB, budget: ImageBudget, question: str, sweep: Sweep) -> Point:
    """Return the figures of one point; `cold` keeps nothing, `warm` keeps embeddings and KV cache."""
    first: list[Sample] = []
    again: list[Sample] = []
    for repetition in range(sweep.warm_ups + sweep.repetitions):
        picture = perturb(image, repetition)
        one = ask(cold, picture, question, budget, sweep.new_tokens)
        if one.cached_tokens or one.cached_views:
            raise BenchmarkError("a cold figure reused what was known before; please report this")
        ask(warm, picture, question, budget, sweep.new_tokens)
        two = ask(warm, picture, f"{question} Be brief.", budget, sweep.new_tokens)
        if repetition >= sweep.warm_ups:
            first.append(one)
            again.append(two)
    figures = {name: Figure.of([each.figures[name] for each in first]) for name in first[0].figures}
    figures["next_question_ttft_s"] = Figure.of([each.timings.ttft_s for each in again])
    prompt = first[0].prompt
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
        figures,
        peak_memory(),
    )


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


def ask(vlm: VLM, image: ImageInput, question: str, budget: ImageBudget, new_tokens: int) -> Sample:
    """Generate exactly `new_tokens` tokens, end tokens ignored, without drafts."""
    watch = Stopwatch()
    prompt = vlm.prepare([user_message(question, 1)], [image], GenerationConfig(), watch, budget)
    with vlm.session(prompt) as session:
        drafter = PromptLookup(prompt.ids, 0)
        tokens = stream_tokens(session, prompt, TokenSelector(greedy), new_tokens, watch, drafter)
        ids = tuple(token for token, _ in tokens)
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


def describe_machine() -> dict[str, Any]:
    """Return what the figures depend on besides the model."""
    import psutil

    return {
        "cpu": core().get_property("CPU", "FULL_DEVICE_NAME").strip(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "edgevlm": __version__,
        "openvino": version("openvino"),
    }


def lines(report: Report) -> Iterator[dict[str, Any]]:
    """Yield the objects that `--json` prints, one a line: the run, then its points."""
    yield report.to_dict()
    for point in report.points:
        yield point.to_dict()
