"""OpenVINO's core and devices; its telemetry is cut off here."""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm.errors import DamagedModelError, DeviceError

if TYPE_CHECKING:
    import openvino as ov

_CONVERTER = "openvino.tools.ovc"


ONEDNN_PRIMITIVE_CACHE = "64"
"""Primitives that oneDNN keeps for the whole process beside OpenVINO's own caches, some for each length of prompt. With
its default of 1,024, prompts of 300 lengths add 161 MiB to the bundled model's process, with this one and
`CPU_KERNEL_CACHE` 29; a length never met takes 11.5 ms of CPU time instead of 11.2."""


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which would otherwise try the network at every import.

    OpenVINO and NNCF take a missing `openvino_telemetry` for "none installed". OpenVINO's model converter, more than
    half of the import, is imported when somebody asks for `openvino.convert_model`. oneDNN reads its environment at its
    first primitive; what the user has set there wins.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", ONEDNN_PRIMITIVE_CACHE)
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    if "openvino" not in sys.modules and _CONVERTER not in sys.modules:
        sys.modules[_CONVERTER] = None  # type: ignore[assignment]
        try:
            import openvino
        finally:
            sys.modules.pop(_CONVERTER, None)
        if not hasattr(openvino, "convert_model"):
            openvino.__getattr__ = _convert_model
    import openvino

    return openvino


def _convert_model(name: str) -> Any:
    """Return what OpenVINO's package has only from now on, as the `__getattr__` of the package."""
    if name != "convert_model":
        raise AttributeError(f"module 'openvino' has no attribute {name!r}")
    import openvino

    openvino.convert_model = import_module(_CONVERTER).convert_model
    return openvino.convert_model


@cache
def core() -> ov.Core:
    """Return the process's OpenVINO core."""
    return import_openvino().Core()


def resolve_device(name: str) -> str:
    """Return the OpenVINO device that `name` means on this machine. Raises `DeviceError`."""
    available = list(core().available_devices)
    wanted = name.upper()
    if wanted == "AUTO":
        return next((device for device in available if device.startswith("GPU")), "CPU")
    if wanted in available or any(device.split(".")[0] == wanted for device in available):
        return wanted
    raise DeviceError(f"no device {name} here; OpenVINO sees {', '.join(available) or 'none'}")


def read_ir(path: Path) -> ov.Model:
    """Read an OpenVINO IR, its weights mapped from the file. Raises `DamagedModelError`."""
    try:
        return core().read_model(path)
    except RuntimeError as error:
        raise DamagedModelError(f"{path} cannot be read by OpenVINO: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """Return the telling line of an OpenVINO error, which come as a stack of source locations."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Exception from", "Check '"))]
    return (telling or lines or [type(error).__name__])[-1].replace(os.linesep, " ")
