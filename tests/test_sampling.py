"""Sampling against transformers' own logits warpers, and its options."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from edgevlm import GenerationConfig, OptionError
from edgevlm.decoding.sampling import make_sampler

DRAWS = 4000
LOGITS = np.array([2.0, -1.0, 0.5, 3.0, 0.0, 2.5, -4.0, 1.0, 1.5, -0.5], np.float32)


def reference(logits: np.ndarray, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """Return the probabilities that transformers would sample from."""
    scores = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits[None]))
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return torch.softmax(scores[0].double(), 0).numpy()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.7, 0), (1.0, 3), (0.8, 4), (0.05, 0), (1.0, 1), (1.0, 99)])
def test_draws_follow_the_reference(temperature: float, top_p: float, top_k: int) -> None:
    probabilities = reference(LOGITS, temperature, top_p, top_k)
    sampler = make_sampler(temperature, top_p, top_k, seed=11)
    counts = Counter(sampler(LOGITS) for _ in range(DRAWS))
    for token, probability in enumerate(probabilities):
        spread = math.sqrt(DRAWS * probability * (1 - probability))
        assert abs(counts[token] - DRAWS * probability) <= 5 * spread, (token, counts, probabilities)


def test_top_k_then_top_p_leaves_exactly_these() -> None:
    # Of the three likeliest, 3.0, 2.5 and 2.0 hold 0.51, 0.31 and 0.19: two reach 0.6.
    sampler = make_sampler(1.0, top_p=0.6, top_k=3, seed=0)
    assert {sampler(LOGITS) for _ in range(200)} == {3, 5}


def test_greedy_is_the_likeliest_and_the_lowest_among_equals() -> None:
    assert make_sampler()(LOGITS) == 3
    assert make_sampler()(np.array([0, 1, 1, 0], np.float32)) == 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-320])
def test_the_coldest_sampling_is_greedy(temperature: float) -> None:
    sampler = make_sampler(temperature, seed=0)
    assert {sampler(LOGITS) for _ in range(50)} == {3}
    assert sampler(np.array([-3e38, 3e38], np.float32)) == 1


def test_a_seed_repeats_and_none_does_not() -> None:
    def draws(seed: int | None) -> list[int]:
        sampler = make_sampler(2.0, seed=seed)
        return [sampler(LOGITS) for _ in range(60)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(None) != draws(None)


def test_the_logits_are_left_as_they_were() -> None:
    logits = LOGITS.copy()
    make_sampler(0.5, 0.5, 2, 0)(logits)
    assert (logits == LOGITS).all()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more, not -1.0"),
        ({"temperature": math.nan}, "temperature must be 0 or more, not nan"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1, not 1.01"),
        ({"top_p": math.nan}, "top_p must be above 0 and at most 1, not nan"),
        ({"top_k": -1}, "top_k must be 0 (all) or more, not -1"),
        ({"seed": -1}, "seed must be 0 or more, not -1"),
        ({"seed": -1, "temperature": 1.0}, "seed must be 0 or more, not -1"),
    ],
)
def test_options_out_of_range(options: dict[str, float], line: str) -> None:
    with pytest.raises(OptionError) as caught:
        GenerationConfig(**options)
    assert str(caught.value) == line
