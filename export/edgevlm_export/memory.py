"""Peak memory of this process and its children together."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

_INTERVAL_S = 0.2


class PeakMemory:
    """Samples the resident memory of the process tree while the block runs; shared pages count in each process."""

    def __init__(self, *, include_self: bool = True) -> None:
        self.bytes = 0
        self._include_self = include_self
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            children = process.children(recursive=True)
            self.bytes = max(self.bytes, _resident([process, *children] if self._include_self else children))
            if self._done.wait(_INTERVAL_S):
                return


def _resident(processes: list[psutil.Process]) -> int:
    total = 0
    for each in processes:
        try:
            total += each.memory_info().rss
        except psutil.Error:  # it ended meanwhile
            continue
    return int(total)
