"""`edgevlm tune` from rows to an exported folder that is better on pictures that were kept apart."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from edgevlm import VLM, GenerationConfig, RuntimeConfig
from edgevlm.errors import TuningError
from edgevlm.jobs.jsonl import append_rows
from edgevlm.manifest import load_manifest
from edgevlm.model_store import default_model
from edgevlm_export.atomic_folder import atomic_folder, check_target
from edgevlm_export.options import ExportOptions
from edgevlm_export.pipeline import export
from edgevlm_export.source.checkpoint import Checkpoint, open_checkpoint
from edgevlm_export.source.safetensors_reader import Weights
from edgevlm_export.tune.augment import augmented
from edgevlm_export.tune.learner import Encoded, Learner
from edgevlm_export.tune.replay import replayed
from edgevlm_export.tune.rows import Example, read_examples, split
from edgevlm_export.tune.scores import Scored

PANEL = Path(__file__).parent.parent / "panel"
"""The checkpoint of the bundled model."""
BATCH = 8
REPLAYED = 0.375
"""Share of a batch that the model knows already."""
COOLING = 0.15
"""Share of the time over which the rate falls where all pictures kept apart are right early: a state of a high rate has
forgotten more than it has to."""
LARGEST = 600_000_000
"""Weights of a checkpoint that is tuned at most: more would take a CPU hours."""
LORA_BATCH, DAYS = 4, 4
"""Rows of a batch where LoRA learns, and how many days' pictures of each row are encoded and kept."""
SHARES = 0.7, 0.85
"""Shares of what was learned that are tried in the end, beside all of it: a smaller one forgets less."""
EVALUATIONS, ASKING = 10, 0.1
"""How often the pictures kept apart are asked about while it learns, and at most which share of the time that takes."""


@dataclass(frozen=True)
class TuneOptions:
    """What a user can choose about tuning."""

    minutes: float = 10.0
    """How long it learns, without exports and checks."""
    question: str | None = None
    """Asked where a row has none."""
    keep_anyway: bool = False
    """Save what is no better, too."""
    force: bool = False
    """Replace an earlier export."""
    save_checkpoint: Path | None = None
    """Where the checkpoint goes, in BF16, if it is to be tuned further."""
    seed: int = 0


@dataclass(frozen=True)
class TuneProgress:
    """How far tuning has come."""

    stage: str
    seconds_left: float | None = None
    now: Scored | None = None
    best: Scored | None = None


@dataclass(frozen=True)
class TuneReport:
    """What tuning made."""

    folder: Path
    learned: int
    """Rows that were learned from."""
    before: Scored
    after: Scored
    known_before: Scored
    """The model's own pictures, before and after: what it forgot."""
    known_after: Scored
    steps: int
    seconds: float
    interrupted: bool

    def to_dict(self) -> dict[str, Any]:
        """Return what `edgevlm tune --json` prints."""
        scores = ("before", "after", "known_before", "known_after")
        told = {name: {**asdict(each), "interval": each.interval} for name in scores if (each := getattr(self, name))}
        return {**asdict(self), **told, "folder": str(self.folder), "seconds": round(self.seconds, 1)}


OnProgress: TypeAlias = Callable[[TuneProgress], None]


def tune(
    rows: Path,
    output: Path,
    checkpoint: Path | None = None,
    options: TuneOptions | None = None,
    on_progress: OnProgress | None = None,
) -> TuneReport:
    """Tune `checkpoint` (None: the bundled model's) on `rows` and export it in INT8 to `output`.

    Ctrl-C while it learns keeps the best so far. Raises `TuningError` and `ExportError`; then nothing was written.
    """
    options, tell = options or TuneOptions(), on_progress or (lambda _: None)
    started = monotonic()
    source = checkpoint or PANEL
    check_target(output, source, force=options.force)
    if options.save_checkpoint:
        check_target(options.save_checkpoint, source, force=False)
    files = checked(source)
    tell(TuneProgress("reading the rows"))
    learned, held = split(read_examples(rows, options.question), options.seed)
    known, known_held = replayed() if checkpoint is None else ([], [])
    with tempfile.TemporaryDirectory(dir=_parent(output), prefix=f".{output.name}.tune-") as scratch:
        work = Path(scratch)
        first = default_model() if checkpoint is None else _exported(source, work / "before", None, tell)
        tell(TuneProgress("asking the model as it is"))
        before, known_before = _scored(first, held), _scored(first, known_held)
        learner = Learner(source, first, load_manifest(first))
        session = _Session(learner, learned, known, held, options)
        best, interrupted = session.run(tell)
        learner.load(best)
        tuned = _checkpoint(learner, files, work / "checkpoint")
        made = _exported(tuned, work / "after", _calibration(learned, work), tell)
        tell(TuneProgress("asking the tuned model"))
        after, known_after = _scored(made, held), _scored(made, known_held)
        if after.right <= before.right and not options.keep_anyway:
            raise TuningError(
                f"the tuned model is no better: {after.right} of {after.asked} right, {before.right} before; "
                "nothing was saved (give more or clearer rows, more --minutes, or --keep-anyway)"
            )
        if options.save_checkpoint:
            _put(tuned, options.save_checkpoint, source, force=False)
        _put(made, output, source, force=options.force)
    seconds = monotonic() - started
    return TuneReport(
        output, len(learned), before, after, known_before, known_after, session.steps, seconds, interrupted
    )


class _Session:
    """One training: batches, the clock, and the best weights by the pictures kept apart."""

    def __init__(
        self,
        learner: Learner,
        learned: Sequence[Example],
        known: Sequence[Example],
        held: Sequence[Example],
        options: TuneOptions,
    ) -> None:
        self._learner, self._learned, self._known, self._held = learner, learned, known, held
        self._random = np.random.default_rng(options.seed)
        self._seconds = options.minutes * 60
        self._batch = LORA_BATCH if learner.has_lora else BATCH
        self._encoded: dict[tuple[int, int], Encoded] = {}
        self.steps = 0

    def run(self, tell: OnProgress) -> tuple[dict[str, Any], bool]:
        """Return the best weights, and whether Ctrl-C ended it. Raises `KeyboardInterrupt` before there are any."""
        first = self._learner.state()
        batches = self._batches()
        seconds = self._learner.choose_arithmetic(next(batches)[:4])
        each = seconds / min(4, self._batch)
        tell(TuneProgress(f"a pass over the rows takes about {each * len(self._learned):,.0f} s"))
        started, due, losses = monotonic(), 1 / EVALUATIONS, [math.inf]
        best: tuple[Scored, float, dict[str, Any]] | None = None
        now: Scored | None = None
        cooled: float | None = None
        try:
            while (done := _done(share := (monotonic() - started) / self._seconds, cooled)) < 1:
                losses.append(self._learner.step(next(batches), done))
                self.steps += 1
                end = 1 if cooled is None else cooled + COOLING
                tell(TuneProgress("learning", (end - share) * self._seconds, now, best and best[0]))
                if share < due or cooled is not None:
                    continue
                perfect, now = bool(now and now.right == now.asked), self._score()
                asked = (monotonic() - started) / self._seconds
                due = asked + max(1 / EVALUATIONS, (asked - share) / ASKING)
                best = self._better(best, now, float(np.mean(losses[-20:])))
                if perfect and now.right == now.asked:  # twice in a row: they tell no more
                    cooled = min(asked, 1 - COOLING)
            best = self._better(best, self._score(), 0.0)
            tell(TuneProgress("choosing how much of it to take", None, now, best[0]))
            return self._least_change(first, best[2], best[0].right), False
        except KeyboardInterrupt:
            if best is None:
                raise
            return best[2], True

    def _least_change(self, first: dict[str, Any], learned: dict[str, Any], right: int) -> dict[str, Any]:
        """Return the weights nearest to the first ones that have as many kept-apart pictures right as the learned ones.

        They lie on the line between both (Wortsman et al. 2021, https://arxiv.org/abs/2109.01903).
        """
        for share in SHARES:
            between = {name: first[name] + share * (weight - first[name]) for name, weight in learned.items()}
            self._learner.load(between)
            if self._score().right >= right:
                return between
        return learned

    def _better(
        self, best: tuple[Scored, float, dict[str, Any]] | None, now: Scored, loss: float
    ) -> tuple[Scored, float, dict[str, Any]]:
        """Return the better of two states: more right answers, then the lower loss."""
        if best is None or (now.right, -loss) > (best[0].right, -best[1]):
            return now, loss, self._learner.state()
        return best

    def _score(self) -> Scored:
        answers = self._learner.answers(self._held)
        pairs = zip(self._held, answers, strict=True)
        return Scored(sum(example.is_right(answer) for example, answer in pairs), len(self._held))

    def _batches(self) -> Iterator[list[Encoded]]:
        """Yield batches: every row in turn, each time as another day's picture, and some of what is known."""
        again = round(self._batch * REPLAYED) if self._known else 0
        own = self._batch - again
        while True:
            order = self._random.permutation(len(self._learned))
            for first in range(0, len(order), own):
                some = [self._learned[i] for i in order[first : first + own]]
                some += [self._known[i] for i in self._random.integers(0, len(self._known) or 1, again)]
                yield [self._another_day(each) for each in some]

    def _another_day(self, example: Example) -> Encoded:
        """Return an example as it may be met another day: always new, or one of `DAYS` where encoding costs most."""
        if not self._learner.has_lora:
            return self._learner.encode(example, augmented(example.picture.pixels, self._random))
        key = id(example), int(self._random.integers(DAYS))
        if key not in self._encoded:
            self._encoded[key] = self._learner.encode(example, augmented(example.picture.pixels, self._random))
        return self._encoded[key]


def _done(share: float, cooled: float | None) -> float:
    """Return how far the rate's course is, by the share of the time that is over and the one at which cooling began."""
    return share if cooled is None else cooled + (1 - cooled) * (share - cooled) / COOLING


def _scored(folder: Path, examples: Sequence[Example]) -> Scored:
    """Return how many of the examples an exported model answers right."""
    if not examples:
        return Scored(0, 0)
    vlm, config = VLM(folder, RuntimeConfig(cache=False)), GenerationConfig(max_new_tokens=64)
    answers = (vlm.generate(each.picture.pixels, each.question, config).text for each in examples)
    return Scored(sum(each.is_right(text) for each, text in zip(examples, answers, strict=True)), len(examples))


def _exported(source: Path, target: Path, calibration: Path | None, tell: OnProgress) -> Path:
    chosen = ExportOptions(precision="int8", calibration=calibration, via="native", verify=False)
    return export(source, target, chosen, lambda stage: tell(TuneProgress(f"exporting: {stage}"))).folder


def _calibration(examples: Sequence[Example], work: Path) -> Path:
    """Write the pictures that activations are calibrated on: the user's own."""
    path = work / "calibration.jsonl"
    chosen = examples[:: max(1, len(examples) // 24)]
    rows = []
    for index, each in enumerate(chosen):
        image = each.path.resolve()
        if each.is_cropped:
            image = work.resolve() / f"calibration-{index}.png"
            Image.fromarray(each.picture.pixels).save(image)
        rows.append({"image": str(image), "question": each.question, "answer": each.answer})
    append_rows(path, rows)
    return path


def _checkpoint(learner: Learner, source: Checkpoint, folder: Path) -> Path:
    """Write a checkpoint: the weights that were learned, all other files as they were."""
    from safetensors import SafetensorError

    try:
        folder.mkdir()
        for path in source.small_files():
            if path.suffix != ".md":  # the model card tells of other weights
                shutil.copyfile(path, folder / path.name)
        learner.save(folder)
    except (OSError, SafetensorError) as error:
        raise TuningError(
            f"the tuned checkpoint cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from None
    return folder


def _put(made: Path, target: Path, source: Path, *, force: bool) -> None:
    with atomic_folder(target, source, force=force) as staging:
        shutil.copytree(made, staging, dirs_exist_ok=True)


def _parent(output: Path) -> Path:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TuningError(f"cannot write to {output.parent}: {error.strerror or error}") from None
    return output.parent


def checked(folder: Path) -> Checkpoint:
    """Return the checkpoint in `folder`. Raises `TuningError` for one that cannot be tuned, before it is loaded."""
    checkpoint = open_checkpoint(folder)
    kind = checkpoint.model_type
    if kind not in {"idefics3", "smolvlm"}:
        raise TuningError(f"{folder} is of family {kind!r}; Idefics3 and SmolVLM are tuned")
    weights = Weights(checkpoint).count
    if weights > LARGEST:
        raise TuningError(
            f"the checkpoint has {weights / 1e6:,.0f} million weights; {LARGEST / 1e6:,.0f} million are tuned at most"
        )
    return checkpoint
