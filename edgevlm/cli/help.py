"""Help pages with grouped options; click's own list is flat, and rich-click would slow every start down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import click

Decorator: TypeAlias = Callable[[Any], Any]
_GROUPS = ("Model", "Image", "Video", "Generation", "Output", "Access", "Limits", "INT4", "Advanced")
"""In this order, after the options that have no group."""


def group(title: str, *options: Decorator) -> Decorator:
    """Return a decorator that adds options, in this order, under one heading of the help page."""
    assert title in _GROUPS, title

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
            command.__click_params__[-1].group = title
        return command

    return add


class Command(click.Command):
    """A command whose help page shows the groups of its options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Options", *_GROUPS)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record:
                records[getattr(parameter, "group", "Options")].append(record)
        for title, rows in records.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
