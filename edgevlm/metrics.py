"""What a run cost: wall times and peak memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter


@dataclass(frozen=True)
class Timings:
    """Wall times of one answer, in seconds."""

    load_s: float
    """Waiting for the model to be read and compiled: in the constructor and, with `wait=False`, in the first answer.

    Not part of `ttft_s` and `total_s`.
    """
    preprocess_s: float
    vision_s: float
    prefill_s: float
    ttft_s: float
    """From the call to the first token: decoding the pictures, preprocessing, vision, prefill."""
    tpot_s: float | None
    """Mean time of each token after the first; None when there was at most one."""
    total_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Decoding speed after the first token."""
        return 1 / self.tpot_s if self.tpot_s else None


@dataclass
class Stopwatch:
    """Collects the stages of one answer."""

    started: float = field(default_factory=perf_counter)
    stages: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    first_token: float | None = None

    def count(self, name: str, number: int) -> None:
        """Add to the count called `name`."""
        self.counts[name] = self.counts.get(name, 0) + number

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to the stage `name`."""
        start = perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + perf_counter() - start

    def timings(self, load_s: float, tokens: int) -> Timings:
        """Return the figures after `tokens` tokens."""
        now = perf_counter()
        first = self.first_token or now
        loading = self.stages.get("load", 0.0)
        started = self.started + loading
        return Timings(
            load_s=load_s + loading,
            preprocess_s=self.stages.get("preprocess", 0.0),
            vision_s=self.stages.get("vision", 0.0),
            prefill_s=self.stages.get("prefill", 0.0),
            ttft_s=first - started,
            tpot_s=(now - first) / (tokens - 1) if tokens > 1 else None,
            total_s=now - started,
        )


def reset_peak_memory() -> None:
    """Let `peak_memory` count from now on. Linux alone can; elsewhere it goes on from the start of the process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """Return the largest resident set of this process so far, in bytes.

    Linux is read from `VmHWM`, which, unlike `ru_maxrss`, does not count what the parent held before the fork.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
