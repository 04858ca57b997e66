"""glibc's malloc in a process that lives for months."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def return_freed_memory() -> None:
    """Give back to the system what is free within glibc's heaps; a few milliseconds, for once a minute.

    glibc does not by itself: the first large block that is freed raises its threshold for blocks with a mapping of
    their own, and from then on pictures and embeddings lie between blocks that stay. Holding the threshold down instead
    (`M_MMAP_THRESHOLD`) takes an eighth more CPU time for each answer about a new picture, in page faults. Nothing
    happens without glibc: on Windows, macOS and musl.
    """
    with suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
