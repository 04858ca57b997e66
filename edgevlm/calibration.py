"""A model's calibration temperature: `calibration.json` in its exported folder, which `edgevlm calibrate` writes.

It is no file of the export: the manifest does not list it, and it may be deleted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from edgevlm.decoding.scoring import check_temperature
from edgevlm.errors import DamagedModelError, OptionError, OutputError
from edgevlm.strict_json import read_json, write_json

CALIBRATION = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it was fitted to."""

    temperature: float
    interval: Sequence[float]
    """95 %, by bootstrap."""
    decisions: int
    """How many labelled decisions it was fitted to."""
    fingerprint: str
    """Of the export whose scores they are."""
    edgevlm: str
    """The version that fitted it."""


def load_calibration(folder: Path, fingerprint: str) -> Calibration | None:
    """Return the calibration of the export in `folder`, None where there is none. Raises `DamagedModelError`."""
    path = folder / CALIBRATION
    wrong = "delete it, and run `edgevlm calibrate` again"
    try:
        found = msgspec.convert(read_json(path.read_bytes()), Calibration)
        check_temperature(found.temperature)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedModelError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, OptionError) as error:  # msgspec's are ValueErrors, too
        raise DamagedModelError(f"{path} is damaged ({error}); {wrong}") from None
    if found.fingerprint != fingerprint:
        raise DamagedModelError(f"{path} was fitted to another export; {wrong}")
    return found


def save_calibration(folder: Path, calibration: Calibration) -> Path:
    """Write the file whole or not at all; return its path. Raises `OutputError`."""
    path = folder / CALIBRATION
    made = path.with_name(f".{CALIBRATION}.part")
    try:
        try:
            made.write_text(write_json(asdict(calibration), indent=2) + "\n", encoding="utf-8")
            made.replace(path)
        finally:
            made.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; copy the model to a folder of your own, or give"
            f" calibration_temperature={calibration.temperature:.4g} with each question"
        ) from None
    return path
