"""The command line; its commands are in `edgevlm.commands`."""

from __future__ import annotations

import errno
import sys
from typing import Any

import click

from edgevlm import __version__
from edgevlm.commands.batch import batch
from edgevlm.commands.bench import bench
from edgevlm.commands.chat import chat
from edgevlm.commands.export import export
from edgevlm.commands.inventory import doctor, models
from edgevlm.commands.run import run
from edgevlm.commands.serve import serve
from edgevlm.commands.watch import watch
from edgevlm.errors import EdgeVLMError


class Commands(click.Group):
    """Turns the errors a user can cause into one line and an exit code: 1, or 130 after Ctrl-C."""

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


for command in (run, chat, serve, batch, watch, bench, export, models, doctor):
    main.add_command(command)


if __name__ == "__main__":
    main()
