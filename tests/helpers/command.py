"""The command line, in this process or in one of its own."""

from __future__ import annotations

import sys

import pytest
from click.testing import CliRunner, Result

from edgevlm.cli.main import main

COMMAND = [sys.executable, "-m", "edgevlm"]
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="signals and pipes of POSIX")


def cli(*arguments: object, stdin: bytes | None = None) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
