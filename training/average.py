"""One checkpoint from two of the same line: the mean of their weights.

A run whose rates rise again leaves what it had learned and comes back to another place nearby; between the two it is
often better than at either (Wortsman et al., Model soups, 2022).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.model import load_model, save_checkpoint
from training.train import GUIDE


def average(one: Path, other: Path, output: Path) -> None:
    """Write the mean of two checkpoints' weights, and of the guides beside them, if there are any."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    model = load_model(one)
    model.load_state_dict(_mean(model.state_dict(), load_model(other).state_dict()))
    save_checkpoint(model.eval(), AutoTokenizer.from_pretrained(other), output)
    guides = [load_file(each.parent / GUIDE) for each in (one, other) if (each.parent / GUIDE).is_file()]
    if guides:
        mean = _mean(guides[0], guides[-1])
        save_file({name: weight.to(torch.bfloat16) for name, weight in mean.items()}, output.parent / GUIDE)


def _mean(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the means of what both have, and what one alone has."""
    means = {name: (one[name].float() + other[name].float()) / 2 for name in one.keys() & other.keys()}
    return one | other | means
