"""One checkpoint from two of the same line: the mean of their weights.

A run whose rates rise again leaves what it had learned and comes back to another place nearby; between the two it is
often better than at either (Wortsman et al., Model soups, 2022).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.model import load_model, save_checkpoint
from training.settings import GUIDE


def average(one: Path, other: Path, output: Path, share: float = 0.5) -> None:
    """Write weights that lie `share` of the way from one checkpoint's to the other's, and of the guides beside them."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    model = load_model(one)
    model.load_state_dict(_between(model.state_dict(), load_model(other).state_dict(), share))
    save_checkpoint(model.eval(), AutoTokenizer.from_pretrained(other), output)
    guides = [load_file(each.parent / GUIDE) for each in (one, other) if (each.parent / GUIDE).is_file()]
    if guides:
        mean = _between(guides[0], guides[-1], share)
        save_file({name: weight.to(torch.bfloat16) for name, weight in mean.items()}, output.parent / GUIDE)


def _between(one: dict[str, Any], other: dict[str, Any], share: float) -> dict[str, Any]:
    """Return what lies `share` of the way from one to the other where both have it, and what one alone has."""
    means = {name: one[name].float().lerp(other[name].float(), share) for name in one.keys() & other.keys()}
    return one | other | means
