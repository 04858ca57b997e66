"""glibc's malloc in a process that lives for months."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

_M_MMAP_THRESHOLD = -3
"""Of malloc.h."""
_THRESHOLD_BYTES = 128 * 2**10
"""glibc's own before it moves it."""


def return_large_blocks() -> None:
    """Let every block of 128 KiB or more go back to the system as soon as it is freed; for programs, not the library.

    Otherwise glibc raises that threshold to the size of the first large block that is freed, up to 32 MiB. From then on
    pictures and embeddings lie between blocks that stay, and what they leave free is not given back. What the
    environment says of malloc wins. Nothing happens without glibc: on Windows, macOS and musl.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
