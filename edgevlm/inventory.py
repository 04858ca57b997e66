"""What is on this machine: exported models, and the facts that a bug report needs."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgevlm import __version__
from edgevlm.cache import folder_size
from edgevlm.device import core
from edgevlm.errors import ModelError
from edgevlm.families import make_family
from edgevlm.manifest import check_files, load_manifest
from edgevlm.paths import cache_dir, list_models, models_dir

_ISA = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
_RUNTIME = ("openvino", "numpy", "pillow", "tokenizers", "llguidance", "jinja2", "click")
_EXPORT = ("nncf", "safetensors", "huggingface-hub", "torch", "transformers", "optimum-intel", "onnx", "onnxruntime")


def describe_models(*, full_check: bool = False) -> list[dict[str, Any]]:
    """Return name, family, precision, size and state of every model with a short name, damaged ones included."""
    return [_describe(folder, full_check) for folder in list_models()]


def _describe(folder: Path, full_check: bool) -> dict[str, Any]:
    known: dict[str, Any] = {"name": folder.name, "path": str(folder)}
    try:
        manifest = load_manifest(folder)
        known |= {
            "source": manifest.source,
            "family": manifest.family,
            "precision": ", ".join(f"{name} {part.precision}" for name, part in manifest.parts.items()),
            "size_bytes": manifest.size_bytes,
        }
        make_family(manifest.family, manifest.family_facts)
        check_files(folder, manifest, full=full_check)
    except ModelError as error:
        return known | {"state": f"damaged: {error}"}
    return known | {"state": "checked" if full_check else "ok"}


def diagnose() -> dict[str, Any]:
    """Return the facts for `edgevlm doctor`."""
    import psutil

    memory = psutil.virtual_memory()
    return {
        "edgevlm": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "cpu": core().get_property("CPU", "FULL_DEVICE_NAME").strip(),
        "cores": f"{psutil.cpu_count(logical=False)} physical, {psutil.cpu_count()} logical",
        "isa": cpu_features(),
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available",
        "devices": {
            name: f"{core().get_property(name, 'FULL_DEVICE_NAME').strip()}"
            f" ({', '.join(core().get_property(name, 'OPTIMIZATION_CAPABILITIES'))})"
            for name in core().available_devices
        },
        "models folder": _folder_facts(models_dir(), size=False),
        "cache folder": _folder_facts(cache_dir(), size=True),
        "runtime": _versions(_RUNTIME),
        "export extra": _versions(_EXPORT),
    }


def _folder_facts(folder: Path, *, size: bool) -> str:
    """Return a folder's path with what is in it, or why that cannot be seen."""
    try:
        with os.scandir(folder):
            pass
    except FileNotFoundError:
        return str(folder)
    except OSError as error:
        return f"{folder} (cannot be read: {error.strerror or error})"
    return f"{folder} ({folder_size(folder) / 1e6:.0f} MB)" if size else str(folder)


def cpu_features() -> list[str]:
    """Return those of the instruction sets that matter here which this CPU has."""
    from archspec.cpu.detect import detected_info

    features = detected_info().features
    return [name for name in _ISA if name in features]


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
