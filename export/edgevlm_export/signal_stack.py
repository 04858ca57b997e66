"""The stack that a thread handles signals on, kept as it was while NNCF compiles and drops models.

OpenVINO's CPU plugin gives the thread a stack of its own with each `Core` and takes it away with the core's last model,
right only if the newest goes first. NNCF makes a core for each model that it compiles and drops the oldest first: the
thread is left with a stack that is unmapped, and the next Ctrl-C is a segmentation fault.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _SignalStack(ctypes.Structure):
    """`stack_t` of sigaltstack(2), as Linux has it."""

    _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Give the thread back the signal stack that it had; other systems than Linux have none to lose."""
    if sys.platform != "linux":
        yield
        return
    sigaltstack = ctypes.CDLL(None).sigaltstack
    before = _SignalStack()
    sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        sigaltstack(ctypes.byref(before), None)
