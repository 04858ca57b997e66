"""The systemd unit that comes with the package, with the paths and options of a server to be started."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from edgevlm.errors import ServerError

_HOMES = (Path("/home"), Path("/root"))


def render_unit(models: Sequence[Path], options: Sequence[str]) -> str:
    """Return the unit that serves `models` with these command-line options. Raises `ServerError`."""
    program = Path(sys.executable).with_name("edgevlm")
    for path in (program, *models):
        if any(path.is_relative_to(home) for home in _HOMES):
            raise ServerError(f"{path} is in a home folder, which the service cannot read; put it under /opt")
    command = " ".join(_quote(each) for each in (str(program), "serve", *map(str, models), *options))
    text = (files("edgevlm.server") / "edgevlm.service").read_text(encoding="utf-8")
    return re.sub(r"^ExecStart=.*$", lambda _: f"ExecStart={command}", text, flags=re.MULTILINE)


def _quote(text: str) -> str:
    """Return a word as systemd.service(5) reads it: `%` and `$` doubled, quoted where it must be."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return escaped if re.fullmatch(r"[\w@%+=:,./$-]+", escaped) else f'"{escaped}"'
