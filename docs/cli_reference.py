"""Writes docs/cli.md from the commands' own --help: `python docs/cli_reference.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgevlm.cli.main import main

_SETTINGS: dict[str, Any] = {"terminal_width": 100, "max_content_width": 100, "help_option_names": ["-h", "--help"]}
TARGET = Path(__file__).with_name("cli.md")


def reference() -> str:
    """Return the page: every command's help, as a terminal of 100 columns shows it."""
    with click.Context(main, info_name="edgevlm", **_SETTINGS) as context:
        parts = ["# Command line", _block(main.get_help(context))]
        for name in main.list_commands(context):
            command = main.get_command(context, name)
            assert command is not None
            with click.Context(command, context, name, **_SETTINGS) as inner:
                parts += [f"## edgevlm {name}", _block(command.get_help(inner))]
                for under, each in (command.commands if isinstance(command, click.Group) else {}).items():
                    with click.Context(each, inner, under, **_SETTINGS) as innermost:
                        parts += [f"### edgevlm {name} {under}", _block(each.get_help(innermost))]
    return "\n\n".join(parts) + "\n"


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
