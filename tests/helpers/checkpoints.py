"""What the tests of several families ask of a checkpoint and of transformers' classes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgevlm.errors import SourceError
from edgevlm_export import ExportOptions, export
from tests.helpers.json_files import read_json, write_json

QUICK = ExportOptions("fp32", via="native", verify=False)


def check_refused(
    checkpoint: Path, tmp_path: Path, file: str, section: str, changes: Mapping[str, Any], line: str
) -> None:
    """See that a checkpoint is refused with a line and nothing is written, once a section of a file is changed."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    content = read_json(folder / file)
    (content[section] if section else content).update(changes)
    write_json(folder / file, content)
    with pytest.raises(SourceError, match=re.escape(line)):
        export(folder, tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def check_class_defaults(classes: Sequence[tuple[Any, Mapping[str, Any]]]) -> None:
    """Compare what the exporter assumes where a file is silent with what an instance of the class has."""
    for made, defaults in classes:
        found = {name: getattr(made, name) for name in defaults}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
        assert plain | ({"size": dict(plain["size"])} if "size" in plain else {}) == defaults
