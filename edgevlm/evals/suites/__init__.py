"""The suites by name."""

from __future__ import annotations

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
    """Return the suite of that name, of the user's `data` where it takes some. Raises `OptionError`."""
    if name not in SUITES:
        raise OptionError(f"there is no suite {name!r}; there are {', '.join(SUITES)}")
    module, _, kind = SUITES[name].partition(":")
    suite: Suite = getattr(import_module(f"edgevlm.evals.suites.{module}"), kind)(data)
    return suite
