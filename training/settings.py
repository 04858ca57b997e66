"""What one training run is told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from training.model import TEXT_LAYERS, VISION_LAYERS

PANEL = Path(__file__).parent.parent / "export" / "edgevlm_export" / "panel"
"""The checkpoint of the shipped weights."""
GUIDE = "guide.safetensors"
"""The file of a run's guide, beside its checkpoint's folder."""


@dataclass(frozen=True)
class Settings:
    """One training run."""

    folder: Path
    pictures: int
    batch: int = 48
    rate: float = 4e-3
    muon_rate: float = 0.05
    warmup: int = 4000
    """Pictures over which the rates rise."""
    ramp: int = 60_000
    """Pictures over which the camera's damage grows to its full strength, all of it with `start`."""
    guide: float = 1.0
    """Weight of the guide's loss, which falls with the rates down to `GUIDE_LEFT`."""
    gaze: float = 0.3
    """Weight of the gaze's loss, which does not fall."""
    decay: float = 0.3
    """The last share of the run, over which the rates fall to zero."""
    seed: int = 1
    workers: int = 1
    save_minutes: float = 5.0
    width: int = 192
    vision_layers: int = VISION_LAYERS
    text_layers: int = TEXT_LAYERS
    minutes: float = math.inf
    """The run's length in time, if that is over before its pictures are: the rates fall by the clock."""
    stop_minutes: float = math.inf
    """Save and end after this time; the same command goes on from there."""
    start: Path | None = None
    """A checkpoint to begin with, instead of chance, and the guide that lies beside it, if one does."""
    float32: bool = False
    """Multiply in float32: faster on CPUs that have AVX512-BF16 at half the rate of float32, as Intel's without AMX."""

    @property
    def guide_file(self) -> Path | None:
        """The guide of the checkpoint to begin with: beside its folder, or this package's for the shipped weights."""
        if self.start is None:
            return None
        shipped = self.start.resolve() == PANEL.resolve()
        path = (Path(__file__).parent if shipped else self.start.parent) / GUIDE
        return path if path.is_file() else None
