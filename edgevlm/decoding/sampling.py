"""Sampling: the next token from its logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgevlm.answer import TokenLogprob
from edgevlm.errors import OptionError

Logits: TypeAlias = npt.NDArray[np.float32]
Sampler: TypeAlias = Callable[[Logits], int]


def make_sampler(temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int | None = None) -> Sampler:
    """Return a function from logits `(V,)` to a token id; greedy at temperature 0.

    Order as in transformers: temperature, then top-k (0 keeps all), then top-p. Raises `OptionError`.
    """
    if not temperature >= 0:
        raise OptionError(f"temperature must be 0 or more, not {temperature}")
    if not 0 < top_p <= 1:
        raise OptionError(f"top_p must be above 0 and at most 1, not {top_p}")
    if top_k < 0:
        raise OptionError(f"top_k must be 0 (all) or more, not {top_k}")
    if seed is not None and seed < 0:
        raise OptionError(f"seed must be 0 or more, not {seed}")
    if temperature == 0:
        return greedy
    random = np.random.default_rng(seed)

    def sample(logits: Logits) -> int:
        probabilities = _top_p(_softmax(_top_k(_apply_temperature(logits, temperature), top_k)), top_p)
        return int(random.choice(len(probabilities), p=probabilities))

    return sample


class TokenSelector:
    """Selects the tokens of one answer with a sampler; subclasses restrict the choice."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self.fast_forward_tokens = 0
        """Tokens selected without their logits, because the grammar allowed no other."""

    @property
    def fast_forward(self) -> list[int]:
        """The next tokens that the grammar leaves no choice of."""
        return []

    @property
    def finished(self) -> bool:
        """No further token is allowed."""
        return False

    @property
    def satisfied(self) -> bool | None:
        """Whether the selected tokens satisfy the constraint; None without one."""
        return None

    def select(self, logits: Logits) -> int:
        """Return the next token id, from the logits `(V,)` after all tokens before it."""
        return self._sampler(logits)

    def filter_draft(self, draft: Sequence[int]) -> list[int]:
        """Return the longest prefix of a draft that is allowed."""
        return list(draft)


def token_logprob(token: int, logits: Logits, top: int, token_bytes: Callable[[int], bytes]) -> TokenLogprob:
    """Return a token's log-probability and the `top` likeliest in its place."""
    logprobs = log_softmax(logits)
    best = np.argsort(-logprobs, kind="stable")[:top] if top else ()
    named = [TokenLogprob(int(each), token_bytes(int(each)), float(logprobs[each])) for each in best]
    return TokenLogprob(token, token_bytes(token), float(logprobs[token]), tuple(named))


def log_softmax(logits: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    """Return the log-probabilities of logits `(..., V)`, in float64."""
    below = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(below - np.log(np.exp(below).sum(axis=-1, keepdims=True)))


def greedy(logits: Logits) -> int:
    """Return the likeliest token, the lowest id among equals."""
    return int(np.argmax(logits))


def _apply_temperature(logits: Logits, temperature: float) -> npt.NDArray[Any]:
    """Return (logits - max) / temperature, which stays finite at the maximum however low the temperature is."""
    with np.errstate(over="ignore"):
        return np.asarray((logits.astype(np.float64) - logits.max()) / temperature)


def _softmax(logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    exponentials = np.exp(logits - logits.max())
    return np.asarray(exponentials / exponentials.sum())


def _top_k(logits: npt.NDArray[Any], k: int) -> npt.NDArray[Any]:
    if k in (0, len(logits)) or k > len(logits):
        return logits
    threshold = np.partition(logits, -k)[-k]
    return np.where(logits < threshold, -np.inf, logits)


def _top_p(probabilities: npt.NDArray[Any], p: float) -> npt.NDArray[Any]:
    """Keep the smallest set of likeliest tokens whose cumulative probability reaches `p`."""
    if p >= 1:
        return probabilities
    order = np.argsort(-probabilities, kind="stable")
    mass_before = np.cumsum(probabilities[order]) - probabilities[order]
    kept = np.zeros_like(probabilities)
    chosen = order[mass_before < p]
    kept[chosen] = probabilities[chosen]
    return np.asarray(kept / kept.sum())
