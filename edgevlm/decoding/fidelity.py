"""How near a model's next-token distributions are to those of a reference, along the reference's own text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgevlm.decoding.sampling import Logits, log_softmax


@dataclass(frozen=True)
class Fidelity:
    """What the logits of a text's positions tell."""

    greedy_agreement: float
    """Share of positions where the model's likeliest next token is the reference's."""
    kl_divergence: float
    """Mean over the positions of KL(reference || model), in nats."""
    positions: int
    first_divergence: int | None
    """First position where the likeliest token is another; None where there is none."""


def fidelity(reference: Logits, model: Logits) -> Fidelity:
    """Compare the logits `(n, V)` of the same `n` positions."""
    agrees = reference.argmax(-1) == model.argmax(-1)
    first = None if agrees.all() else int(np.argmin(agrees))
    return Fidelity(float(agrees.mean()), float(kl(reference, model).mean()), len(agrees), first)


def kl(reference: Logits, model: Logits) -> npt.NDArray[np.float64]:
    """Return KL(softmax(reference) || softmax(model)) of each row, in nats."""
    log_p, log_q = log_softmax(reference), log_softmax(model)
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(-1))
