"""`edgevlm doctor`: what a bug report needs."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from edgevlm import __version__
from edgevlm.cli.help import Command
from edgevlm.errors import ModelError
from edgevlm.model_store import cache_dir, list_models, models_dir
from edgevlm.strict_json import write_json

_RUNTIME = ("openvino", "numpy", "pillow", "tokenizers", "llguidance", "jinja2", "click")
_EXPORT = ("nncf", "safetensors", "huggingface-hub", "torch", "transformers", "optimum-intel", "onnx", "onnxruntime")


@click.command(cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Print what a bug report needs: versions, CPU, devices, folders, memory.

    \b
    edgevlm doctor
    edgevlm doctor --json
    """
    from edgevlm.cli.output import print_facts

    facts = diagnose()
    if as_json:
        click.echo(write_json(facts))
    else:
        print_facts(facts)


def diagnose() -> dict[str, Any]:
    """Return the facts for `edgevlm doctor`."""
    import psutil

    from edgevlm.runtime.core import core
    from edgevlm.runtime.cpu import available_memory, cpu_features

    return {
        "edgevlm": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "cpu": core().get_property("CPU", "FULL_DEVICE_NAME").strip(),
        "cores": f"{psutil.cpu_count(logical=False)} physical, {psutil.cpu_count()} logical",
        "isa": list(cpu_features()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB, {available_memory() / 2**30:.1f} GiB available",
        "devices": {
            name: f"{core().get_property(name, 'FULL_DEVICE_NAME').strip()}"
            f" ({', '.join(core().get_property(name, 'OPTIMIZATION_CAPABILITIES'))})"
            for name in core().available_devices
        },
        "vision arithmetic": _vision_arithmetics(),
        "models folder": _folder_facts(models_dir(), size=False),
        "cache folder": _folder_facts(cache_dir(), size=True),
        "runtime": _versions(_RUNTIME),
        "export extra": _versions(_EXPORT),
    }


def _vision_arithmetics() -> dict[str, str]:
    """Return what the vision encoder of each model with a short name computes with here, and why."""
    from edgevlm.manifest import VISION, load_manifest
    from edgevlm.runtime.arithmetic import choose_arithmetic
    from edgevlm.runtime.config import RuntimeConfig
    from edgevlm.runtime.core import resolve_device

    found, device = {}, resolve_device("AUTO")
    with suppress(ModelError):  # the models folder cannot be read, which is told below
        for folder in list_models():
            with suppress(ModelError):  # a damaged one, which `edgevlm models` tells
                submodel = load_manifest(folder).submodels[VISION]
                found[folder.name] = str(choose_arithmetic(RuntimeConfig(), submodel, device))
    return found


def _folder_facts(folder: Path, *, size: bool) -> str:
    """Return a folder's path with what is in it, or why that cannot be seen."""
    from edgevlm.runtime.compile_cache import folder_size

    try:
        with os.scandir(folder):
            pass
    except FileNotFoundError:
        return str(folder)
    except OSError as error:
        return f"{folder} (cannot be read: {error.strerror or error})"
    return f"{folder} ({folder_size(folder) / 1e6:.0f} MB)" if size else str(folder)


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    return {package: _version(package) for package in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
