"""What a timing depends on besides the model: the machine, and who used its cores meanwhile.

At import this needs psutil and the standard library alone, so that a benchmark can use it in an environment of another
runtime.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, NamedTuple

import psutil

from edgevlm import __version__

BUSY_CORES = 0.25
"""Other processes that use more of the cores than this make a machine busy."""
RESOLUTION_S = 0.1
"""Less CPU time of others than this is not counted: the system counts in ticks of 10 ms for each core."""
STARVED_SHARE = 0.75
"""A process that used less than this share of its threads' time lacked a core, or did not use it."""
UNEVEN_SHARE = 0.5
"""So did its last thread, if it computed for less than this share of the busiest one's time."""


@dataclass(frozen=True)
class Conditions:
    """Who used the cores while something was measured; the times of all measured parts added up."""

    threads: int
    """Threads that were asked for."""
    cores: int
    wall_s: float
    cpu_s: float
    """CPU time of the process that was measured."""
    thread_cpu_s: tuple[float, ...]
    """CPU time of its busiest threads, as many as were asked for, the busiest first; empty where it is not told."""
    others_cpu_s: float
    """CPU time of all other processes, and what the hypervisor gave to other machines (steal)."""
    load_before: float | None
    """1-minute load average before the first part; None on a system that has none, such as Windows."""
    load_after: float | None

    @property
    def cores_used(self) -> float:
        """CPU time over wall time: how many cores the process used on average."""
        return self.cpu_s / self.wall_s if self.wall_s else 0.0

    @property
    def cores_of_others(self) -> float:
        """How many cores other processes used on average."""
        return self.others_cpu_s / self.wall_s if self.wall_s and self.others_cpu_s >= RESOLUTION_S else 0.0

    @property
    def busy(self) -> bool:
        """Tell whether other processes used more than `BUSY_CORES`."""
        return self.cores_of_others > BUSY_CORES

    @property
    def starved(self) -> bool:
        """Tell whether a thread, of several, waited for a core that another process used. All of this must hold:

        - At least two threads were asked for, and there are two cores. n is the smaller of both numbers.
        - Other processes used more than the cores that n threads leave free, by more than `BUSY_CORES`.
        - The process used less than `STARVED_SHARE` of n cores, or its n-th busiest thread computed for less than
          `UNEVEN_SHARE` of the busiest thread's time.

        A process that computes with one thread on its own account is not starved: the other cores idle meanwhile.
        """
        needed = min(self.threads, self.cores)
        if needed < 2 or self.cores_of_others <= self.cores - needed + BUSY_CORES:
            return False
        busiest = self.thread_cpu_s[:needed]
        uneven = len(busiest) == needed and busiest[-1] < UNEVEN_SHARE * busiest[0]
        return uneven or self.cores_used < STARVED_SHARE * needed

    @property
    def line(self) -> str:
        """All of it in a line of text."""
        parts = [
            f"{self.cores_used:.2f} cores used by {self.threads} thread{'s' * (self.threads > 1)} of {self.cores} cores"
            f" (CPU {self.cpu_s:.2f} s, wall {self.wall_s:.2f} s)",
            f"{self.cores_of_others:.2f} by others",
            f"load {_load(self.load_before)} before, {_load(self.load_after)} after",
        ]
        if self.busy:
            parts.append("busy machine")
        if self.starved:
            each = " + ".join(f"{seconds:.2f}" for seconds in self.thread_cpu_s)
            parts.append(f"a thread starved ({each} s)" if each else "a thread starved")
        return ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Conditions:
        """Return what `to_dict` gave."""
        return cls(**{**found, "thread_cpu_s": tuple(found["thread_cpu_s"])})

    @classmethod
    def together(cls, each: Sequence[Conditions]) -> Conditions:
        """Add up several measurements of one system, the load being the lowest before and the highest after."""
        before = [one.load_before for one in each if one.load_before is not None]
        after = [one.load_after for one in each if one.load_after is not None]
        return cls(
            each[0].threads,
            each[0].cores,
            sum(one.wall_s for one in each),
            sum(one.cpu_s for one in each),
            tuple(map(sum, zip(*(one.thread_cpu_s for one in each), strict=False))),
            sum(one.others_cpu_s for one in each),
            min(before, default=None),
            max(after, default=None),
        )


def _load(value: float | None) -> str:
    return "not known" if value is None else f"{value:.1f}"


def load_average() -> float | None:
    """Return the 1-minute load average, None where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


_BUSY_TIMES = ("user", "nice", "system", "irq", "softirq", "steal")
"""Those of psutil's CPU times that are not idle and not part of another; each system has some of them."""


class _Reading(NamedTuple):
    """Clocks at one moment, in seconds."""

    wall: float
    cpu: float
    machine: float
    """CPU time of all processes and of the hypervisor's other machines."""
    threads: Mapping[int, float]

    @classmethod
    def now(cls) -> _Reading:
        times = psutil.cpu_times()
        machine = sum(getattr(times, name, 0.0) for name in _BUSY_TIMES)
        return cls(time.perf_counter(), time.process_time(), machine, _thread_times())


def _thread_times() -> dict[int, float]:
    """Return the CPU time of each thread of this process, nothing where the system does not tell."""
    try:
        return {each.id: each.user_time + each.system_time for each in psutil.Process().threads()}
    except psutil.Error:
        return {}


class Meter:
    """Takes the conditions of measured parts of this process, one after another."""

    def __init__(self, threads: int | None) -> None:
        self.threads = threads or psutil.cpu_count(logical=False) or os.cpu_count() or 1
        self._load_before = load_average()
        self._wall = self._cpu = self._others = 0.0
        self._thread_times: dict[int, float] = {}

    @contextmanager
    def part(self) -> Iterator[None]:
        """Count the time of the block."""
        before = _Reading.now()
        yield
        after = _Reading.now()
        cpu = after.cpu - before.cpu
        self._wall += after.wall - before.wall
        self._cpu += cpu
        self._others += after.machine - before.machine - cpu
        for thread, seconds in after.threads.items():
            taken = seconds - before.threads.get(thread, 0.0)
            self._thread_times[thread] = self._thread_times.get(thread, 0.0) + taken

    @property
    def conditions(self) -> Conditions:
        """The conditions of all parts so far."""
        busiest = sorted(self._thread_times.values(), reverse=True)[: self.threads]
        return Conditions(
            self.threads,
            os.cpu_count() or 1,
            self._wall,
            self._cpu,
            tuple(round(seconds, 2) for seconds in busiest),
            max(0.0, self._others),
            self._load_before,
            load_average(),
        )


def describe_machine() -> dict[str, Any]:
    """Return the machine and the versions that figures depend on besides the model."""
    from edgevlm.runtime.core import core
    from edgevlm.runtime.cpu import cpu_features

    return {
        "cpu": core().get_property("CPU", "FULL_DEVICE_NAME").strip(),
        "isa": list(cpu_features()),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "edgevlm": __version__,
        "openvino": version("openvino"),
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """Return `describe_machine` in a line of text."""
    isa = " ".join(machine["isa"]) or "none of the known ones" if "isa" in machine else "not recorded"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("edgevlm", "openvino", "python"))
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.1f} GB, instruction sets: {isa};"
        f" {machine['system']}, {versions}"
    )
