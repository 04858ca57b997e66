"""The suites by name."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from edgevlm.errors import OptionError
from edgevlm.evals.items import Suite

SUITES: dict[str, str] = {
    "carrier": "carrier:Carrier",
    "charts-cf": "charts:Charts",
    "spacenum": "spacenum:SpaceNum",
    "tempglitch": "tempglitch:TempGlitch",
    "real": "real:Real",
    "tasks": "tasks:Tasks",
    "anomaly": "anomaly:Anomaly",
    "flowchart": "flowchart:Flowchart",
    "pages": "pages:Pages",
    "fidelity": "fidelity:FidelityToReference",
    "mcq": "mcq:MultipleChoice",
    "wikivqa": "wikivqa:WikiVQA",
}
"""Each suite's class, as `module:class`, imported when it is asked for."""


def make_suite(name: str, data: Path | None = None) -> Suite:
    """Return the suite of that name, with the user's `data`. Raises `OptionError`, also where it takes none."""
    if data:
        suites_for_data([name])
    return _suite_class(name)(data)


def suites_for_data(names: Iterable[str]) -> list[str]:
    """Return those of the suites that take the user's own items (`--data`). Raises `OptionError` where none does."""
    if found := _taking_data(names):
        return found
    raise OptionError(f"--data is for the suites {', '.join(_taking_data(SUITES))}; choose of these, or leave it out")


def _taking_data(names: Iterable[str]) -> list[str]:
    return [name for name in names if _suite_class(name).takes_data]


def _suite_class(name: str) -> type[Suite]:
    """Return the suite's class. Raises `OptionError` for an unknown one."""
    if name not in SUITES:
        raise OptionError(f"there is no suite {name!r}; there are {', '.join(SUITES)}")
    module, _, kind = SUITES[name].partition(":")
    found: type[Suite] = getattr(import_module(f"edgevlm.evals.suites.{module}"), kind)
    return found
