"""Changing copies of an export, for the tests of what happens then."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgevlm.manifest import hash_file
from edgevlm.model_store import MANIFEST


def copy_export(exported: Path, folder: Path) -> Path:
    """Copy an export to `folder`, which tests may then change."""
    return Path(shutil.copytree(exported, folder))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Let `edit` change the manifest's data in place."""
    data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    edit(data)
    (folder / MANIFEST).write_text(json.dumps(data), encoding="utf-8")


def reseal(folder: Path) -> None:
    """Write the sizes and hashes that the files have now into the manifest, so that the damage gets past them."""

    def measure(data: dict[str, Any]) -> None:
        for name in data["files"]:
            path = folder / name
            data["files"][name] = {"sha256": hash_file(path), "size_bytes": path.stat().st_size}

    edit_manifest(folder, measure)


def truncate(path: Path) -> None:
    """Cut a file in half."""
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Invert one byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
