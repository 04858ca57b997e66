"""`edgevlm`: the group of commands, and what becomes of their errors."""

from __future__ import annotations

import errno
import sys
from importlib import import_module
from typing import Any

import click

from edgevlm import __version__
from edgevlm.errors import EdgeVLMError

_COMMANDS = {
    "run": "edgevlm.cli.run",
    "chat": "edgevlm.cli.chat",
    "serve": "edgevlm.cli.serve",
    "batch": "edgevlm.cli.batch",
    "watch": "edgevlm.cli.watch",
    "export": "edgevlm_export.cli",
    "models": "edgevlm.cli.models",
    "bench": "edgevlm.cli.bench",
    "doctor": "edgevlm.cli.doctor",
}
"""The commands in the order of use, and the module of each, which is imported when the command is."""


class Commands(click.Group):
    """Turns the errors a user can cause into one line and an exit code: 1, or 130 after Ctrl-C."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(import_module(_COMMANDS[cmd_name]), cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgeVLMError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)
        except OSError as error:  # what no module foresaw; a module's own error says more
            if error.errno == errno.EPIPE:
                raise  # the reader of a pipe has gone: click ends without a word
            click.echo(f"Error: {_told(error)}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(130)


def _told(error: OSError) -> str:
    """Return what the system refused, and where, as one line."""
    where = f"{error.filename}: " if error.filename else ""
    return " ".join(f"{where}{error.strerror or error}".split())


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, package_name="edgevlm")
def main() -> None:
    """Ask a small vision-language model about a picture, on a machine with no GPU.

    \b
    edgevlm export HuggingFaceTB/SmolVLM-256M-Instruct --int4
    edgevlm run photo.jpg "What is in this picture?"
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
