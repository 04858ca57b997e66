"""Scoring: log-likelihoods of given answers, without generating."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgevlm.decoding.sampling import Logits, log_softmax
from edgevlm.decoding.stream import Step
from edgevlm.errors import DeviceError
from edgevlm.inputs.prompt import Prompt
from edgevlm.metrics import Stopwatch, Timings
from edgevlm.runtime.kv_session import Session, common_length


@dataclass(frozen=True)
class Scores:
    """Choices and how likely the model is to answer with each.

    A choice's log-likelihood is the sum of its tokens' log-probabilities and that of the answer's end after them,

        log p(c) = sum_i log p(c_i | prompt, c_1 ... c_(i-1)) + log p(end | prompt, c),

    so that `yes` is not preferred to `yes, two` for being its beginning. The probabilities are their softmax: the
    model's own, given that it answers with one of the choices. Nothing is divided by the length, which would no longer
    be a probability. It is the rule by which GPT-3 was scored on multiple choice (Brown et al. 2020, section 2.4), with
    the end added; they are as well calibrated as the model is.
    """

    log_likelihoods: Mapping[str, float]
    prompt_tokens: int
    image_tokens: int
    views: int
    cached_tokens: int
    cached_views: int
    timings: Timings

    @property
    def probabilities(self) -> dict[str, float]:
        """Each choice's probability; together they are 1."""
        shares = np.exp(log_softmax(np.array(list(self.log_likelihoods.values()))))
        return dict(zip(self.log_likelihoods, shares.tolist(), strict=True))

    @property
    def best(self) -> str:
        """The likeliest choice, the first among equals."""
        return max(self.log_likelihoods, key=lambda choice: self.log_likelihoods[choice])

    @property
    def total_probability(self) -> float:
        """Probability of any of the choices; near 0, the model would answer something else."""
        return float(np.exp(list(self.log_likelihoods.values())).sum())

    def to_dict(self) -> dict[str, Any]:
        """Return what `edgevlm run --choices --json` prints."""
        return {
            "answer": self.best,
            "probabilities": {choice: round(p, 6) for choice, p in self.probabilities.items()},
            "total_probability": round(self.total_probability, 6),
            "prompt_tokens": self.prompt_tokens,
            "image_tokens": self.image_tokens,
            "views": self.views,
            "cached_tokens": self.cached_tokens,
            "cached_views": self.cached_views,
            "timings": {name: round(getattr(self.timings, name), 6) for name in _TIMINGS},
        }


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
