"""The format of an answer: free text, text under a constraint, or choices to be scored."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm.decoding.structured import Constraint, check_choices
from edgevlm.errors import OptionError


@dataclass(frozen=True)
class OutputFormat:
    """A constraint on the generated text, or choices to be scored, or neither."""

    constraint: Constraint | None = None
    choices: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        schema: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        choices: Sequence[str] | None = None,
        regex: str | None = None,
    ) -> OutputFormat:
        """Return the format of the one argument given; a schema is a mapping or a file. Raises `OptionError`."""
        if sum(each is not None for each in (schema, choices, regex)) > 1:
            raise OptionError("schema, choices and regex exclude each other")
        if choices is not None:
            check_choices(choices)
            return cls(choices=tuple(choices))
        if regex is not None:
            return cls(Constraint.regex(regex))
        if schema is None:
            return cls()
        return cls(Constraint.json_schema(schema if isinstance(schema, Mapping) else _read(Path(schema))))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise OptionError(f"no such schema file: {path}") from None
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot read the schema {path}: {getattr(error, 'strerror', None) or error}") from None
