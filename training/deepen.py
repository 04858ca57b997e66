"""From a checkpoint to one with more layers that gives the same answers, to go on training from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.model import TEXT_LAYERS, VISION_LAYERS, load_model, save_grown
from training.settings import GUIDE

BRANCHES = ("o_proj", "down_proj", "out_proj", "fc2")
"""What ends a layer's two branches, in the text part and in the tower."""


def deepen(old: Path, new: Path, text_layers: int = TEXT_LAYERS, vision_layers: int = VISION_LAYERS) -> None:
    """Write the checkpoint `old` to `new` with that many layers, the guide beside it as it is.

    Each of the last layers is followed by a copy of itself whose branches add nothing yet (Wu et al., LLaMA Pro, 2024).
    """
    model = load_model(old)
    config = model.config
    weights = _deepened(model.state_dict(), "text_model.layers", config.text_config.num_hidden_layers, text_layers)
    weights = _deepened(weights, "encoder.layers", config.vision_config.num_hidden_layers, vision_layers)
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = text_layers, vision_layers
    save_grown(config, weights, old, new)
    if (old.parent / GUIDE).is_file():
        (new.parent / GUIDE).write_bytes((old.parent / GUIDE).read_bytes())  # which may be one folder


def _deepened(weights: dict[str, Any], stack: str, old: int, new: int) -> dict[str, Any]:
    """Return the weights with `new` layers in `stack`, which had `old`, at least half as many."""
    if not old <= new <= 2 * old:
        raise SystemExit(f"{old} layers of {stack} cannot become {new}: only as many, up to twice as many")
    found: dict[str, Any] = {name: weight for name, weight in weights.items() if f".{stack}." not in name}
    places = [(layer, copied) for layer in range(old) for copied in range(1 + (layer >= 2 * old - new))]
    for index, (layer, copied) in enumerate(places):
        begin = f".{stack}.{layer}."
        for name, weight in weights.items():
            if begin in name:
                silent = copied and any(f".{end}." in name for end in BRANCHES)
                found[name.replace(begin, f".{stack}.{index}.")] = weight * 0 if silent else weight
    return found
