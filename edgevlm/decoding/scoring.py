"""Scoring: log-likelihoods of given answers, without generating."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgevlm.decoding.sampling import Logits, log_softmax
from edgevlm.decoding.stream import Step
from edgevlm.errors import DeviceError, OptionError
from edgevlm.inputs.prompt import Prompt
from edgevlm.metrics import Stopwatch, Timings
from edgevlm.runtime.kv_session import Session, common_length

YES_NO = ("yes", "no")
"""The choices of a label judged on its own, or of a bool, what is true first."""
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 20.0
"""Bounds of a calibration temperature."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What scoring took, whatever it returns."""

    prompt_tokens: int
    image_tokens: int
    views: int
    cached_tokens: int
    cached_views: int
    timings: Timings
    temperature: float = 1.0
    """The calibration temperature by which log-likelihoods are divided before the softmax; 1: as the model has them."""

    def _counts(self) -> dict[str, Any]:
        counts = ("prompt_tokens", "image_tokens", "views", "cached_tokens", "cached_views")
        return {
            "temperature": self.temperature,
            **{name: getattr(self, name) for name in counts},
            "timings": {name: round(getattr(self.timings, name), 6) for name in _TIMINGS},
        }


@dataclass(frozen=True)
class Scores(Scoring):
    """Choices and how likely the model is to answer with each.

    A choice's log-likelihood is the sum of its tokens' log-probabilities and that of the answer's end after them,

        log p(c) = sum_i log p(c_i | prompt, c_1 ... c_(i-1)) + log p(end | prompt, c),

    so that `yes` is not preferred to `yes, two` for being its beginning. The probabilities are their softmax: the
    model's own, given that it answers with one of the choices. Nothing is divided by the length, which would no longer
    be a probability. It is the rule by which GPT-3 was scored on multiple choice (Brown et al. 2020, section 2.4), with
    the end added; they are as well calibrated as the model is.

    With a calibration temperature T they are softmax(log p / T), temperature scaling (Guo et al. 2017, equation 9).
    T moves all of them towards or away from 1/n and leaves their order as it is.
    """

    log_likelihoods: Mapping[str, float]

    @property
    def probabilities(self) -> dict[str, float]:
        """Each choice's probability; together they are 1."""
        return scaled_softmax(self.log_likelihoods, self.temperature)

    @property
    def best(self) -> str:
        """The likeliest choice, the first among equals."""
        return max(self.log_likelihoods, key=lambda choice: self.log_likelihoods[choice])

    @property
    def total_probability(self) -> float:
        """The model's own probability of any of the choices; near 0, it would answer something else."""
        return _total(self.log_likelihoods)

    def to_dict(self) -> dict[str, Any]:
        """Return what `edgevlm run --choices --json` prints."""
        return {
            "answer": self.best,
            "probabilities": {choice: round(p, 6) for choice, p in self.probabilities.items()},
            "total_probability": round(self.total_probability, 6),
            **self._counts(),
        }


@dataclass(frozen=True)
class LabelScores(Scoring):
    """Labels that do not exclude each other, each with how likely the model is to say that it applies.

    Each is a yes-or-no question of its own, so that the probabilities do not sum to 1. Tokens are those of all
    questions together; views are encoded once.
    """

    log_likelihoods: Mapping[str, Mapping[str, float]]
    """Of the two answers to each label's question, the one that affirms it first."""

    @property
    def probabilities(self) -> dict[str, float]:
        """Each label's probability that it applies, given one of the two answers."""
        return {
            label: next(iter(scaled_softmax(both, self.temperature).values()))
            for label, both in self.log_likelihoods.items()
        }

    @property
    def total_probabilities(self) -> dict[str, float]:
        """The model's own probability of either answer to each label's question; near 0, it would say another."""
        return {label: _total(both) for label, both in self.log_likelihoods.items()}

    def above(self, threshold: float = 0.5) -> list[str]:
        """Return the labels whose probability is at least `threshold`, in the order asked."""
        return [label for label, probability in self.probabilities.items() if probability >= threshold]

    def to_dict(self) -> dict[str, Any]:
        """Return the labels of at least 0.5, the probabilities of all, and the figures."""
        return {
            "labels": self.above(),
            "probabilities": {label: round(p, 6) for label, p in self.probabilities.items()},
            "total_probabilities": {label: round(p, 6) for label, p in self.total_probabilities.items()},
            **self._counts(),
        }


AnyScores: TypeAlias = Scores | LabelScores


def scaled_softmax(log_likelihoods: Mapping[str, float], temperature: float) -> dict[str, float]:
    """Return the softmax of log-likelihoods divided by a temperature, by choice."""
    shares = np.exp(log_softmax(np.array(list(log_likelihoods.values())) / temperature))
    return dict(zip(log_likelihoods, shares.tolist(), strict=True))


def _total(log_likelihoods: Mapping[str, float]) -> float:
    """Return the probability of any of the choices."""
    return float(np.exp(list(log_likelihoods.values())).sum())


def check_temperature(temperature: float) -> None:
    """Raise `OptionError` for a calibration temperature out of its bounds."""
    low, high = LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE
    if not (isinstance(temperature, int | float) and math.isfinite(temperature) and low <= temperature <= high):
        raise OptionError(f"calibration_temperature must be between {low:g} and {high:g}, not {temperature}")


_TIMINGS = ("load_s", "preprocess_s", "vision_s", "prefill_s", "total_s")


def log_likelihoods(
    session: Session, prompt: Prompt, answers: Sequence[Sequence[int]], eos_token_ids: Sequence[int], watch: Stopwatch
) -> Generator[Step, None, list[float]]:
    """Return the log-likelihood of each answer's token ids and the end after them; yield each step before it is made.

    The prompt is prefilled once. Answers run in sorted order, each after its common prefix with the one before. Raises
    `DeviceError` where the logits overflow.
    """
    with watch.stage("prefill"):
        start = session.reuse_prefix(prompt.prefix_keys, prompt.inputs, prompt.images)
        rows = _read(session, prompt, start)
    watch.count("cached_tokens", start)
    found: dict[tuple[int, ...], float] = {}
    before: tuple[int, ...] = ()
    for ids in sorted(map(tuple, answers)):
        session.rewind(len(prompt) + common_length(before, ids))
        if session.length < len(prompt):  # its states cannot be cut there
            rows = _read(session, prompt, session.length)
        begun = session.length - len(prompt)
        if begun < len(ids):
            step = Step(session, ids[begun:])
            yield step
            rows = np.concatenate([rows[: begun + 1], _log_probabilities(step.make())])
        found[ids] = _sum(rows, ids, eos_token_ids)
        before = ids
    return [found[tuple(ids)] for ids in answers]


def _read(session: Session, prompt: Prompt, start: int) -> npt.NDArray[np.float64]:
    """Prefill the prompt after its first `start` tokens; return the next token's log-probabilities `(1, V)`."""
    embeds, inputs = prompt.inputs_embeds[:, start:], prompt.inputs.after(start)
    keys, marks = prompt.prefix_keys[start:], prompt.marks_after(start)
    return _log_probabilities(session.prefill(embeds, 1, keys, inputs, marks))


def _log_probabilities(logits: Logits) -> npt.NDArray[np.float64]:
    if not np.isfinite(logits.max()):
        raise DeviceError("the model's logits are no numbers on this device; try --inference-precision f32")
    return log_softmax(logits)


def _sum(rows: npt.NDArray[np.float64], ids: Sequence[int], eos_token_ids: Sequence[int]) -> float:
    end = np.logaddexp.reduce(rows[len(ids), list(eos_token_ids)])
    return float(rows[np.arange(len(ids)), list(ids)].sum() + end)
