"""`edgevlm`: the group of commands, and what becomes of their errors."""

from __future__ import annotations

import errno
import sys
from importlib import import_module
from typing import Any

import click

from edgevlm import __version__
from edgevlm.errors import EdgeVLMError

_GROUPS = {
    "Ask": {
        "run": ("edgevlm.cli.run", "Answer one question about pictures."),
        "locate": ("edgevlm.cli.locate", "Find something in a picture: boxes and points in pixels."),
        "chat": ("edgevlm.cli.chat", "Ask question after question about pictures."),
    },
    "Serve and automate": {
        "serve": ("edgevlm.cli.serve", "Serve OpenAI's and Ollama's APIs and a web page."),
        "batch": ("edgevlm.cli.batch", "Answer a JSON Lines file of questions, resumably."),
        "watch": ("edgevlm.cli.watch", "Answer each new picture of a folder."),
        "convert": ("edgevlm.cli.convert", "Convert PDFs and pictures of pages to documents, resumably."),
    },
    "Models": {
        "export": ("edgevlm_export.cli", "Convert a checkpoint to OpenVINO IR."),
        "tune": ("edgevlm_export.tune.cli", "Teach a small model your own labelled pictures."),
        "carrier": ("edgevlm.cli.carrier", "Rewrite training data: questions partly as pictures of text."),
        "models": ("edgevlm.cli.models", "List bundled and exported models."),
    },
    "Measure and diagnose": {
        "eval": ("edgevlm.cli.eval", "Find out what a model can see, and what compression cost it."),
        "calibrate": ("edgevlm.cli.calibrate", "Make probabilities of choices as sure as they are right."),
        "bench": ("edgevlm.cli.bench", "Measure a model on this machine."),
        "doctor": ("edgevlm.cli.doctor", "Print what a bug report needs."),
    },
}
"""The commands by heading, in the order of use: each one's module, imported when the command is used, and summary."""
_COMMANDS = {name: module for commands in _GROUPS.values() for name, (module, _) in commands.items()}


class Commands(click.Group):
    """Turns the errors a user can cause into one line and an exit code: 1, or 130 after Ctrl-C."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(_COMMANDS[cmd_name])
        command: click.Command = getattr(module, "evaluate" if cmd_name == "eval" else cmd_name)  # `eval` is Python's
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        for title, commands in _GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name, summary) for name, (_, summary) in commands.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgeVLMError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)
        except OSError as error:  # what no module foresaw; a module's own error says more
            if error.errno == errno.EPIPE:
                raise  # the reader of a pipe has gone: click ends without a word
            click.echo(f"Error: {_describe(error)}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(130)


def _describe(error: OSError) -> str:
    """Return what the system refused, and where, as one line."""
    where = f"{error.filename}: " if error.filename else ""
    return " ".join(f"{where}{error.strerror or error}".split())


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, package_name="edgevlm")
def main() -> None:
    """Ask a vision-language model about a picture, on a machine with no GPU.

    \b
    edgevlm run examples/gauge.png "What does the gauge show?"
    edgevlm export HuggingFaceTB/SmolVLM-256M-Instruct --int4
    edgevlm run photo.jpg "What is in this picture?" -m SmolVLM-256M-Instruct-int4
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
