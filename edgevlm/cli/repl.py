"""The loop of `edgevlm chat`: a line in, an answer out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module

import click

from edgevlm.answer import Piece
from edgevlm.chat import Chat
from edgevlm.cli.output import print_stats
from edgevlm.cli.progress import AnswerPrinter, Progress, print_cut
from edgevlm.errors import EdgeVLMError
from edgevlm.inputs.image import ImageFile, probed_image

HELP = """\
/image FILE...  show pictures; they go with the next question
/reset          begin anew, without pictures
/stats          print timings after each answer, or no longer
/history        print the conversation so far
/exit           end (so does Ctrl-D); Ctrl-C breaks an answer off"""


class Repl:
    """The state of one talk: the conversation, pictures that wait for a question, whether figures are wanted."""

    def __init__(self, chat: Chat, images: Sequence[ImageFile]) -> None:
        self._chat = chat
        self._images = list(images)
        self._stats = False
        self._commands: dict[str, Callable[[list[str]], None]] = {
            "/image": self._show,
            "/reset": self._reset,
            "/stats": self._toggle_stats,
            "/history": self._history,
            "/help": lambda _: click.echo(HELP),
        }

    def take(self, line: str) -> bool:
        """Do what a line says; return False at the end."""
        if not line.startswith("/"):
            self._ask(line)
            return True
        name, *words = _split(line)
        if name in {"/exit", "/quit"}:
            return False
        command = self._commands.get(name)
        if command:
            command(words)
        else:
            click.echo(f"no command {name}; /help lists them", err=True)
        return True

    def _ask(self, question: str) -> None:
        answer, printer = None, AnswerPrinter()
        with Progress() as progress:
            progress.stage("reading the question")
            for event in self._chat.events(question, self._images):
                progress.show(event)
                if isinstance(event, Piece):
                    self._images = []  # part of the conversation from here on, even if the answer is broken off
                    printer.show(event)
                    answer = event.answer
        click.echo()
        if answer:
            print_cut(answer)
            if self._stats:
                print_stats(answer)

    def _show(self, names: list[str]) -> None:
        if not names:
            click.echo("which file? /image FILE", err=True)
        self._images += [probed_image(name) for name in names]

    def _reset(self, _: list[str]) -> None:
        self._chat.reset()
        self._images = []

    def _toggle_stats(self, _: list[str]) -> None:
        self._stats = not self._stats
        click.echo(f"timings are {'on' if self._stats else 'off'}", err=True)

    def _history(self, _: list[str]) -> None:
        for turn in self._chat.turns:
            pictures = f" [{len(turn.images)} picture{'s' * (len(turn.images) > 1)}]" if turn.images else ""
            click.echo(f"> {turn.question}{pictures}\n{turn.answer}")


def talk(chat: Chat, images: Sequence[ImageFile]) -> None:
    """Read lines until the end, each a question or a command; an error is one line, and the talk goes on."""
    repl = Repl(chat, images)
    person = sys.stdin.isatty()
    if person:
        with suppress(ImportError):  # arrow keys and history, where the platform has them
            import_module("readline")
        click.echo("Ask away; /help lists the commands.", err=True)
    while True:
        try:
            line = input("> " if person else "").strip()
        except EOFError:
            break
        try:
            if line and not repl.take(line):
                break
        except EdgeVLMError as error:
            click.echo(f"Error: {error}", err=True)
        except KeyboardInterrupt:
            if not person:
                raise
            click.echo("\n(stopped)", err=True)


def _split(line: str) -> list[str]:
    """Return a command's words; quotes hold a file name with spaces together, and backslashes stay what they are."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    try:
        return list(lexer)
    except ValueError:
        return line.split()
