"""The kinds of pictures, by the task that each is mainly for."""

from __future__ import annotations

from collections.abc import Callable

from training.scene import Random, Scene
from training.scenes import charts, counting, displays, gauges, grids, labels, lights, shapes

SCENES: dict[str, Callable[[Random], Scene]] = {
    "display": displays.scene,
    "gauge": gauges.scene,
    "light": lights.scene,
    "count": counting.scene,
    "missing": grids.scene,
    "label": labels.scene,
    "chart": charts.scene,
    "shape": shapes.scene,
}
