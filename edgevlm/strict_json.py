"""JSON as every reader takes it (RFC 8259): Python's own writes and reads `Infinity` and `NaN`, which are none."""

from __future__ import annotations

import json
from math import isinf
from typing import Any, NoReturn


def write_json(value: object, *, indent: int | None = None, compact: bool = False) -> str:
    """Return `value` as JSON that UTF-8 can hold: half of a surrogate pair is escaped.

    Raises `ValueError` for a number that is not finite: whoever computes one says what it means.
    """
    separators = (",", ":") if compact else None
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent, separators=separators)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False, indent=indent, separators=separators)
    return text


def read_json(text: str | bytes) -> Any:
    """Return what JSON says. Raises `ValueError`, also for a number that would be read as another or as infinite."""
    try:
        return json.loads(text, parse_float=_float, parse_int=_int, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _float(text: str) -> float:
    number = float(text)
    if isinf(number):
        raise _too_large(text)
    return number


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python reads no more than some thousand digits
        raise _too_large(text) from None


def _too_large(text: str) -> ValueError:
    shown = text if len(text) <= 24 else f"{text[:20]}…"
    return ValueError(f"{shown} is a larger number than readers of JSON can hold")


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
