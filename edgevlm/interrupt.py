"""Breaking an answer off: long work asks between its steps whether it is still wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
_unwanted: ContextVar[Callable[[], bool] | None] = ContextVar("unwanted", default=None)


class Interrupted(BaseException):
    """The answer is not wanted any more: no error, which `except Exception` would take for that of a picture."""


@contextmanager
def interruptible(unwanted: Callable[[], bool]) -> Iterator[None]:
    """Break off what this thread computes within the block, with `Interrupted`, once `unwanted()` is true."""
    token = _unwanted.set(unwanted)
    try:
        yield
    finally:
        _unwanted.reset(token)


def is_interruptible() -> bool:
    """Whether this thread computes something that may be broken off."""
    return _unwanted.get() is not None


def check() -> None:
    """Raise `Interrupted` if what this thread computes is not wanted any more."""
    unwanted = _unwanted.get()
    if unwanted and unwanted():
        raise Interrupted


def checked(steps: Iterable[T]) -> Iterator[T]:
    """Yield `steps`, with a check before each."""
    for step in steps:
        check()
        yield step
