"""Stages of an export: timings and progress."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TypeAlias

OnStage: TypeAlias = Callable[[str], None]


class StageClock:
    """Times the stages and announces each one."""

    def __init__(self, on_stage: OnStage | None) -> None:
        self._on_stage = on_stage
        self._started = self._stage_started = perf_counter()
        self._stage: str | None = None
        self.stages: dict[str, float] = {}

    def begin(self, stage: str) -> None:
        """End the stage before and begin `stage`."""
        self.end()
        self._stage, self._stage_started = stage, perf_counter()
        if self._on_stage:
            self._on_stage(stage)

    def end(self) -> float:
        """End the stage and return the seconds since the beginning."""
        if self._stage is not None:
            self.stages[self._stage] = self.stages.get(self._stage, 0.0) + perf_counter() - self._stage_started
            self._stage = None
        return perf_counter() - self._started
