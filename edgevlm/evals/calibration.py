"""Temperature scaling: one number that makes a model's probabilities of choices as sure as they are right.

Log-likelihoods are divided by T before the softmax, T being the one of least negative log-likelihood of the right
choices (Guo et al. 2017, "On Calibration of Modern Neural Networks", section 4.2). What the figures after it are worth
is told by cross-validation: each picture's decisions are scaled by a temperature fitted to the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import edgevlm
from edgevlm.calibration import Calibration, save_calibration
from edgevlm.decoding.sampling import log_softmax
from edgevlm.decoding.scoring import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from edgevlm.errors import OptionError
from edgevlm.evals.statistics import Interval
from edgevlm.jobs.batch import OnProgress, run_batch
from edgevlm.jobs.jsonl import Row, read_rows
from edgevlm.jobs.labelled import LabelledBatch
from edgevlm.jobs.work_queue import noop
from edgevlm.manifest import load_manifest

Floats = npt.NDArray[np.float64]
FEWEST_DECISIONS, FEWEST_GROUPS = 50, 10
BINS, FOLDS = 10, 5
_RESAMPLES, _GRID = 1000, 400
_LOW_MASS = 0.05
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Decisions:
    """Labelled decisions: a row, or each label of a row that has several."""

    logits: Floats
    """Log-likelihoods `(N, K)` of the choices; -inf where a decision has fewer than K."""
    right: npt.NDArray[np.intp]
    """Index `(N,)` of the right choice."""
    groups: npt.NDArray[np.intp]
    """Number `(N,)` of the pictures that a decision is about; decisions of one number are held out together."""
    labels: tuple[str, ...]
    """The right choice's text."""
    failed: int = 0
    """Rows that could not be scored."""

    def __len__(self) -> int:
        return len(self.right)

    @property
    def group_count(self) -> int:
        """How many groups there are."""
        return int(self.groups.max(initial=-1)) + 1

    def take(self, index: npt.NDArray[Any]) -> Decisions:
        """Return some of the decisions, by a mask or by their numbers."""
        return replace(self, logits=self.logits[index], right=self.right[index], groups=self.groups[index])

    def log_probabilities(self, temperature: float | Floats = 1.0) -> Floats:
        """Return the log-probabilities `(N, K)` under a temperature, or under one for each decision."""
        return log_softmax(self.logits / np.reshape(temperature, (-1, 1)))

    def losses(self, temperature: float | Floats = 1.0) -> Floats:
        """Return the negative log-likelihood `(N,)` of each right choice."""
        return -self.log_probabilities(temperature)[np.arange(len(self)), self.right]


def read_decisions(rows: Sequence[Row]) -> Decisions:
    """Return the decisions of the rows that could be scored."""
    found: list[tuple[list[float], int, str]] = []
    numbers: dict[object, int] = {}
    groups = []
    for row in rows:
        if "error" in row:
            continue
        about = tuple(row["sha256"]) or row["line"]
        made = _decisions(row["log_likelihoods"], row["label"])
        found += made
        groups += [numbers.setdefault(about, len(numbers))] * len(made)
    logits = np.full((len(found), max((len(each) for each, _, _ in found), default=0)), -np.inf)
    for line, (each, _, _) in zip(logits, found, strict=True):
        line[: len(each)] = each
    right = np.array([index for _, index, _ in found], np.intp)
    failed = sum("error" in row for row in rows)
    return Decisions(logits, right, np.array(groups, np.intp), tuple(label for _, _, label in found), failed)


def _decisions(log_likelihoods: Mapping[str, Any], label: bool | str | list[str]) -> list[tuple[list[float], int, str]]:
    """Return a row's decisions: logits, index of the right one and its text."""
    if isinstance(label, list):
        return [made for name, both in log_likelihoods.items() for made in _decisions(both, name in label)]
    choices = list(log_likelihoods)
    right = choices[not label] if isinstance(label, bool) else label
    return [(list(log_likelihoods.values()), choices.index(right), right)]


@dataclass(frozen=True)
class Bin:
    """Decisions whose likeliest choice has about the same probability."""

    low: float
    high: float
    decisions: int
    confidence: float
    """Mean probability of the likeliest choice."""
    accuracy: float


@dataclass(frozen=True)
class Figures:
    """How well probabilities agree with what is right."""

    nll: float
    """Mean negative log-likelihood of the right choices, in nats."""
    ece: float
    """Expected calibration error of the likeliest choice, in 10 bins of equal width (Naeini et al. 2015)."""
    brier: float
    """Mean squared distance of the probabilities from 1 for the right choice, 0 for the others (Brier 1950): 0 to 2."""
    accuracy: float
    confidence: float
    """Mean probability of the likeliest choice."""
    bins: tuple[Bin, ...]


def figures_of(decisions: Decisions, temperature: float | Floats = 1.0) -> Figures:
    """Return the figures of decisions under a temperature, or under one for each."""
    shares = np.exp(decisions.log_probabilities(temperature))
    truth = np.zeros_like(shares)
    truth[np.arange(len(decisions)), decisions.right] = 1
    confidence, is_right = shares.max(axis=1), decisions.logits.argmax(axis=1) == decisions.right
    bins = _bins(confidence, is_right)
    gaps = [each.decisions * abs(each.confidence - each.accuracy) for each in bins]
    return Figures(
        float(decisions.losses(temperature).mean()),
        sum(gaps) / len(decisions),
        float(((shares - truth) ** 2).sum(axis=1).mean()),
        float(is_right.mean()),
        float(confidence.mean()),
        bins,
    )


def _bins(confidence: Floats, is_right: npt.NDArray[np.bool_]) -> tuple[Bin, ...]:
    number = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)  # (low, high], as Guo et al. have them
    return tuple(
        Bin(
            each / BINS,
            (each + 1) / BINS,
            int(mine.sum()),
            float(confidence[mine].mean()),
            float(is_right[mine].mean()),
        )
        for each in range(BINS)
        if (mine := number == each).any()
    )


def fit_temperature(decisions: Decisions) -> float:
    """Return the temperature of least negative log-likelihood.

    That is convex in 1/T, so that a search in a bracket finds it.
    """
    low, high = math.log(LOWEST_TEMPERATURE), math.log(HIGHEST_TEMPERATURE)
    return math.exp(_golden_section(lambda at: float(decisions.losses(math.exp(at)).mean()), low, high))


def _golden_section(function: Callable[[float], float], low: float, high: float, tolerance: float = 1e-6) -> float:
    """Return where a function with one minimum in a bracket has it (Kiefer 1953)."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > tolerance:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = function(right)
    return (low + high) / 2


def cross_validate(decisions: Decisions, folds: int = FOLDS, seed: int = 0) -> Floats:
    """Return for each decision the temperature `(N,)` that was fitted to the other folds; a group is in one fold."""
    order = np.random.default_rng(seed).permutation(decisions.group_count)
    fold = (np.argsort(order) % folds)[decisions.groups]
    found = np.ones(len(decisions))
    for each in range(folds):
        found[fold == each] = fit_temperature(decisions.take(fold != each))
    return found


class Bootstrap:
    """Groups of decisions, resampled whole (Efron 1979)."""

    def __init__(self, decisions: Decisions, seed: int = 0) -> None:
        self._decisions = decisions
        count = decisions.group_count
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), _RESAMPLES)
        self._draws = draws.astype(np.float64)

    def _sums(self, values: Sequence[Floats]) -> Floats:
        """Return the sums `(resamples, n)` of `n` values of each decision in each resample."""
        count = self._decisions.group_count
        return self._draws @ np.stack([np.bincount(self._decisions.groups, each, count) for each in values], axis=1)

    def mean(self, values: Floats) -> Interval:
        """Return the 95 % interval of the mean of the decisions' values."""
        sums, counts = self._sums([values, np.ones(len(values))]).T
        return _interval(sums / counts)

    def temperature(self) -> Interval:
        """Return the 95 % interval of the fitted temperature, on a grid of steps of 1.5 %."""
        grid = np.geomspace(LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE, _GRID)
        losses = self._sums([self._decisions.losses(at) for at in grid])
        return _interval(grid[losses.argmin(axis=1)])


def _interval(values: Floats) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Fitted:
    """A fitted temperature, and what it does."""

    temperature: float
    interval: Interval
    """95 %, by bootstrap over pictures."""
    fold_temperatures: tuple[float, ...]
    before: Figures
    after: Figures
    """Of each decision under the temperature that was fitted without its fold."""
    nll_difference: Interval
    """95 % interval of the mean negative log-likelihood after, less that before."""
    decisions: int
    pictures: int
    """How many groups of decisions there are: those about the same pictures are held out together."""
    unwilling: float
    """Share of decisions where the model put less than 5 % on all choices together."""
    failed: int
    """Rows that could not be scored and do not count."""

    @property
    def is_better(self) -> bool:
        """Whether there is a temperature, and it lowers the negative log-likelihood of held-out rows."""
        return not self._bound and self.after.nll < self.before.nll

    @property
    def _bound(self) -> str:
        if self.temperature > HIGHEST_TEMPERATURE * 0.999:
            return "the model's scores tell nothing about what is right, so that no temperature helps"
        if self.temperature < LOWEST_TEMPERATURE * 1.001:
            return "the model is right about nearly all rows, so that no temperature can be told; give harder ones"
        return ""

    @property
    def verdict(self) -> str:
        """The result in a line."""
        if self._bound:
            return self._bound
        (low, high), before, after = self.interval, self.before, self.after
        found = f"the model is {'overconfident' if self.temperature > 1 else 'underconfident'}"
        if low <= 1 <= high:
            found += ", though not for certain"
        better = "" if self.is_better else "; that is no better on rows held out"
        return (
            f"{found}: T = {self.temperature:.2f} [{low:.2f}, {high:.2f}];"
            f" ECE {before.ece:.3f} -> {after.ece:.3f}, NLL {before.nll:.3f} -> {after.nll:.3f}{better}"
        )

    @property
    def lines(self) -> list[str]:
        """The verdict, and a line for what else should be known."""
        found = [self.verdict]
        if self.unwilling > 0.5:
            found.append(
                f"in {self.unwilling:.0%} of the decisions all choices together have less than 5 %: the model would say"
                " something else; give choices in its words"
            )
        if self.failed:
            found.append(f"{self.failed} row{'s' * (self.failed > 1)} could not be scored, and do not count")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return what `edgevlm calibrate --json` prints of it."""
        return {**asdict(self), "is_better": self.is_better, "verdict": self.verdict, "folds": FOLDS, "bins": BINS}


def save(folder: Path, fitted: Fitted) -> Path:
    """Save the temperature with the model in `folder`; return the file. Raises `OutputError` and `ModelError`."""
    fingerprint = load_manifest(folder).fingerprint
    return save_calibration(
        folder, Calibration(fitted.temperature, fitted.interval, fitted.decisions, fingerprint, edgevlm.__version__)
    )


def score_rows(
    batch: LabelledBatch, on_row: Callable[[Row], object] = noop, on_progress: OnProgress = noop
) -> Decisions:
    """Score labelled rows, but those that the output has already; return the decisions.

    Raises `OptionError` for rows that cannot be used, for too few and for those of one class, before the model is
    loaded, and what `run_batch` raises. A row that cannot be scored does not count.
    """
    questions = batch.questions()
    groups = {each.about or number for number, each in enumerate(questions)}
    check_labels([label for each in questions for label in each.right], len(groups))
    run_batch(batch, on_row, on_progress)
    return read_decisions([row for row, _ in read_rows(batch.output)])


def check_labels(labels: Sequence[str], groups: int) -> None:
    """Raise `OptionError` for too few right choices, about too few pictures, or one alone."""
    if len(labels) < FEWEST_DECISIONS or groups < FEWEST_GROUPS:
        raise OptionError(
            f"a temperature needs {FEWEST_DECISIONS} labelled decisions about {FEWEST_GROUPS} pictures, better 200;"
            f" here are {len(labels)} about {groups} (a row is one, and each choice of a row whose label is a list)"
        )
    if len(set(labels)) < 2:
        raise OptionError(f"the right choice is {labels[0]!r} everywhere; give rows where it is another, too")


def fit(decisions: Decisions) -> Fitted:
    """Fit the temperature and tell what it is worth. Raises `OptionError` for too few decisions, or of one class."""
    check_labels(decisions.labels, decisions.group_count)
    held_out, bootstrap = cross_validate(decisions), Bootstrap(decisions)
    mass = np.exp(decisions.logits).sum(axis=1)
    return Fitted(
        fit_temperature(decisions),
        bootstrap.temperature(),
        tuple(sorted(set(held_out.tolist()))),
        figures_of(decisions),
        figures_of(decisions, held_out),
        bootstrap.mean(decisions.losses(held_out) - decisions.losses()),
        len(decisions),
        decisions.group_count,
        float((mass < _LOW_MASS).mean()),
        decisions.failed,
    )
