"""Two exports of one checkpoint: how near a model is to its reference, without a right answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgevlm.decoding.fidelity import fidelity
from edgevlm.errors import OptionError
from edgevlm.evals.ask import LocalModel, same_tokens
from edgevlm.evals.model import Model
from edgevlm.families.base import RGB
from edgevlm.jobs.jsonl import Row


def paired(model: Model, reference: Model | None) -> Pair:
    """Return both for a suite that needs a reference. Raises `OptionError` where there is none in this process."""
    if not isinstance(model, LocalModel) or not isinstance(reference, LocalModel):
        raise OptionError(
            "without a reference there is nothing to agree with; add --against with an export of the same checkpoint,"
            " such as its FP32 one (not with --url)"
        )
    return Pair(model, reference)


class Pair:
    """A model and its reference, both loaded in this process. Raises `OptionError` where their tokens differ."""

    def __init__(self, model: LocalModel, reference: LocalModel) -> None:
        if not same_tokens(model.manifest, reference.manifest):
            raise OptionError(
                f"{model.name} and {reference.name} have different tokenizers; compare exports of one checkpoint"
            )
        self.name, self.is_general = f"{model.name}-against-{reference.name}", model.is_general
        self._model, self._reference = model, reference

    def describe(self) -> dict[str, Any]:
        """Return what tells both from others."""
        return self._model.describe() | {"reference": self._reference.describe()}

    def follow(self, pictures: Sequence[RGB], question: str, max_new_tokens: int) -> Row:
        """Return how the model's next-token distributions compare along the reference's greedy answer.

        `truth` is that answer, and `answer` what the model would have said up to the first other token.
        """
        ids = self._reference.token_ids(pictures, question, max_new_tokens)
        expected, logits = (each.logits(pictures, question, ids) for each in (self._reference, self._model))
        found = fidelity(expected, logits)
        said = ids if found.first_divergence is None else ids[: found.first_divergence]
        other = [] if found.first_divergence is None else [int(logits[found.first_divergence].argmax())]
        return {
            "truth": self._reference.text(ids),
            "answer": self._model.text([*said, *other]),
            "right": found.greedy_agreement,
            "kl": found.kl_divergence,
            "positions": found.positions,
            "first_divergence": found.first_divergence,
        }
