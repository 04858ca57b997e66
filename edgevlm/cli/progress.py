"""What stderr tells of an answer while it comes. Rich is imported for a terminal alone: it takes as long as Click."""

from __future__ import annotations

import sys
from collections.abc import Generator
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import click

from edgevlm.answer import Answer, Event, Piece
from edgevlm.answer import Progress as ProgressEvent

if TYPE_CHECKING:
    from rich.status import Status

T = TypeVar("T")


class Progress:
    """A status line on stderr; silent when stderr is no terminal."""

    def __init__(self) -> None:
        self._status: Status | None = None
        if sys.stderr and sys.stderr.isatty():
            from rich.console import Console
            from rich.status import Status

            console = Console(stderr=True)
            self._status = Status("", console=console) if console.is_terminal else None

    def __enter__(self) -> Progress:
        if self._status:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def stage(self, name: str) -> None:
        """Show what is being done now."""
        if self._status:
            self._status.update(f"{name} …")

    def show(self, event: Event) -> None:
        """Show the progress of an answer; its first text removes the line."""
        if isinstance(event, Piece):
            self.clear()
        elif event.stage == "decode":
            self.stage(f"generated {event.done} of {event.total} tokens")
        elif event.done < event.total:
            self.stage(f"encoding view {event.done + 1} of {event.total}")
        else:
            self.stage("reading the prompt")

    def follow(self, steps: Generator[ProgressEvent, None, T]) -> T:
        """Show the steps of a generator; return what it returns."""
        while True:
            try:
                self.show(next(steps))
            except StopIteration as stop:
                result: T = stop.value
                return result

    def clear(self) -> None:
        """Remove the line."""
        if self._status:
            self._status.stop()
            self._status = None


_WHY_CUT = {
    "length": "--max-new-tokens was reached",
    "context": "the context is full",
    "repetition": "it had become a loop",
}


class AnswerPrinter:
    """Prints an answer as it comes: its text on stdout, the thought before it on stderr, dim in a terminal."""

    def __init__(self) -> None:
        self._thinking = False

    def show(self, piece: Piece) -> None:
        """Print a piece."""
        if piece.reasoning_content:
            self._thinking = True
            click.secho(piece.reasoning_content, dim=True, nl=False, err=True)
        if self._thinking and (piece.text or piece.answer):
            self._thinking = False
            click.echo(err=True)
        click.echo(piece.text, nl=False)


def print_cut(answer: Answer) -> None:
    """Say on stderr why an answer ended before the model did."""
    if answer.finish_reason != "stop":
        where = " while the model was thinking" if answer.reasoning_content and not answer.text else ""
        click.echo(f"(cut: {_WHY_CUT[answer.finish_reason]}{where})", err=True)
