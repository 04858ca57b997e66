"""How near an export is to a reference, such as INT4 to FP32, where no right answer is known: token by token.

The reference answers a drawn picture greedily; along its answer both models' next-token distributions are compared.
It is what `edgevlm export` prints after its verification, on more pictures and by task.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgevlm.evals.items import Item, Suite, spread
from edgevlm.evals.suites.tasks import Tasks

_DESCRIBE = "Describe the picture."


class FidelityToReference(Suite):
    """The questions of `tasks`, and as many descriptions, whose longer answers leave more room to diverge."""

    name = "fidelity"
    asks = "takes the reference's next token for the likeliest"
    needs_reference = True
    asks_blind = False

    def items(self, count: int | None, seed: int) -> Sequence[Item]:
        """Return questions by task, without their right answers, and a description of every other picture."""
        cells: dict[str, list[Item]] = defaultdict(list)
        for index, item in enumerate(Tasks().items(None, seed)):
            asked = replace(item, truth="", options=(), family=item.id, facts={})
            if index % 2:
                asked = replace(asked, id=f"{item.id}-description", cell="description", question=_DESCRIBE)
            cells[asked.cell].append(asked)
        return spread(list(cells.values()), count)

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the divergence in nats, over all and by task, and where answers part."""
        by_cell: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for row in rows:
            by_cell[row["cell"]].append(row)
        parted = [row["first_divergence"] for row in rows if row["first_divergence"] is not None]
        found = {
            "positions that agree": _over_positions(rows, "right"),
            "KL divergence, nats": _over_positions(rows, "kl"),
            "answers that are the same to the end": 1 - len(parted) / len(rows),
        }
        if parted:
            found["first other token, median"] = float(np.median(parted)) + 1
        return found | {f"KL divergence, {cell}": _over_positions(some, "kl") for cell, some in by_cell.items()}

    def verdict(self, accuracy: float, low: float, high: float, chance: float, blind: float | None) -> str:  # noqa: ARG002
        """Return the mean over answers: there is no chance to compare with."""
        return f"{self.asks}: {accuracy:.1%} [{low:.1%}, {high:.1%}] of an answer's positions"


def _over_positions(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(np.average([row[name] for row in rows], weights=[row["positions"] for row in rows]))
