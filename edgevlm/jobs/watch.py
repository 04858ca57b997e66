"""Watch: a folder whose pictures and videos are answered once each, as they arrive."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from time import monotonic
from typing import TYPE_CHECKING

from edgevlm.errors import ImageError, OptionError, VideoError
from edgevlm.families.base import Family, FrameSampling
from edgevlm.inputs.image import image_suffixes, printable, read_image
from edgevlm.inputs.video import check_takes_video, names_video
from edgevlm.jobs.jsonl import Row
from edgevlm.jobs.sinks import AnswerSink
from edgevlm.jobs.spec import ROW_ERRORS, Defaults, JobVisual, ask, job_key
from edgevlm.jobs.work_queue import noop
from edgevlm.malloc import return_freed_memory
from edgevlm.manifest import hash_file

if TYPE_CHECKING:
    from edgevlm.vlm import VLM

_SCAN_S = 10.0
"""Interval of full scans: the file system reports no events for what another machine writes to a share."""
_MOST_KINDS = 20
"""Suffixes that are reported at most: they may be numbers without end."""
_TEMPORARY = (".tmp", ".temp", ".part", ".partial", ".filepart", ".crdownload", ".download", ".swp", ".lock", "~")


@dataclass(frozen=True)
class Watch:
    """The folder to watch, and the question about each picture and video."""

    folder: Path
    defaults: Defaults
    recursive: bool = False
    stable_for_s: float = 1.0
    """Seconds that a file must be unchanged before it is read."""
    give_up_after_s: float = 30.0
    """Seconds unchanged after which a file that does not decode is reported as broken."""

    def __post_init__(self) -> None:
        _check_folder(self.folder, f"no such folder: {self.folder}")
        if not self.defaults.question:
            raise OptionError("watching needs a question")
        if not 0 < self.stable_for_s <= self.give_up_after_s:
            raise OptionError("the time to settle must be above 0 and not above the patience")
        if find_spec("watchfiles") is None:
            raise OptionError("watching needs watchfiles; install it with: pip install 'edgevlm[watch]'")


@dataclass
class _Waiting:
    """A file that may still be written to."""

    size: int
    mtime_ns: int
    since: float
    broken: bool = False


class Watcher:
    """Answers a folder's pictures into a sink, existing ones first.

    A picture is identified by its name, its bytes and what is asked: one that is rewritten is answered again, one that
    was answered before a restart is not. `on_row` gets each row, `on_passed` a line for the first file of each suffix
    that edgevlm does not read. `clock` gives seconds, monotonically.
    """

    def __init__(
        self,
        watch: Watch,
        vlm: VLM,
        sink: AnswerSink,
        on_row: Callable[[Row], object] = noop,
        on_passed: Callable[[str], object] = noop,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._watch, self._vlm, self._sink, self._on_row, self._on_passed = watch, vlm, sink, on_row, on_passed
        self._clock, self._scanned = clock, float("-inf")
        self._question = watch.defaults.question or ""
        self._job = job_key(watch.defaults.config_digest(str(vlm.folder)), self._question.encode())
        self._folder = watch.folder.resolve()
        self._waiting: dict[Path, _Waiting] = {}
        self._done: dict[Path, tuple[int, int]] = {}
        self._own = sink.path.resolve()
        self._sampled = watch.defaults.sampling != FrameSampling()
        self._no_video = _no_video(vlm.processor.family)
        if self._no_video and self._sampled:
            raise VideoError(self._no_video)
        self._passed: set[str] = set()

    def run(self, stop: Event) -> None:
        """Watch until `stop` is set; a running answer is finished. Raises `OptionError`, `OutputError`."""
        from watchfiles import watch

        step_ms = max(10, int(1000 * self._watch.stable_for_s / 4))
        for changes in watch(
            self._folder,
            watch_filter=None,
            stop_event=stop,
            rust_timeout=step_ms,
            debounce=step_ms,
            yield_on_timeout=True,
            raise_interrupt=False,
            recursive=self._watch.recursive,
        ):
            self.step([Path(name) for _, name in changes], stop)

    def step(self, changed: Iterable[Path] = (), stop: Event | None = None) -> None:
        """Register changed files, scan the folder if that is due, and answer the files that are stable.

        Raises `OptionError` where the folder is gone, and `OutputError`.
        """
        for path in changed:
            self._on_event(path)
        if self._clock() - self._scanned > _SCAN_S:  # the first scan follows the start of the watch: nothing is missed
            for path in self._scan():
                self._on_event(path)
            self._scanned = self._clock()
            return_freed_memory()
        for path in list(self._waiting):
            if stop and stop.is_set():
                return
            self._process_if_stable(path)

    def _scan(self) -> Iterator[Path]:
        """Yield the folder's files, the oldest first."""
        pattern = "**/*" if self._watch.recursive else "*"
        _check_folder(self._folder, f"the folder {self._folder} is gone")
        found = []
        for path in self._folder.glob(pattern):
            if not self._is_read(path):
                self._pass_over(path)
            elif stat := _stat(path):
                found.append((stat.st_mtime_ns, path))
        yield from (path for _, path in sorted(found))

    def _on_event(self, path: Path) -> None:
        """Start or restart a file's stability timer, unless this version of it has been answered."""
        if not self._is_read(path):
            self._pass_over(path)
            return
        stat = _stat(path)
        if stat is None:
            self._waiting.pop(path, None)
            self._done.pop(path, None)  # otherwise `_done` would grow without bound
            return
        waiting, facts = self._waiting.get(path), (stat.st_size, stat.st_mtime_ns)
        if facts == self._done.get(path) or (waiting and facts == (waiting.size, waiting.mtime_ns)):
            return
        if self._sink.seen_file(self._job, self._name(path), *facts):
            self._mark_done(path, *facts)
        else:
            self._waiting[path] = _Waiting(*facts, self._clock())

    def _pass_over(self, path: Path) -> None:
        """Report the first file of each suffix that edgevlm does not read, except hidden, temporary and own files."""
        kind = path.suffix.lower()
        if kind in self._passed or len(self._passed) == _MOST_KINDS or self._is_nobodys(path) or _stat(path) is None:
            return
        self._passed.add(kind)
        why = f"{kind} is no format that edgevlm reads" if kind else "it has no suffix"
        if self._no_video and names_video(path):
            why = self._no_video
        others = "such files" if len(self._passed) < _MOST_KINDS else "such files, and of more kinds,"
        self._on_passed(f"passed over: {printable(self._name(path))}, {why}; further {others} are not told")

    def _is_read(self, path: Path) -> bool:
        """Tell whether a file is called like a picture, or like a video and the model takes videos."""
        if path.name.startswith("."):
            return False
        return path.suffix.lower() in image_suffixes() or (self._no_video is None and names_video(path))

    def _is_video(self, path: Path) -> bool:
        """Tell whether a file is looked at as a video: with `fps` or `frames` a GIF is, too."""
        return names_video(path) or (self._sampled and path.suffix.lower() == ".gif")

    def _is_nobodys(self, path: Path) -> bool:
        """Tell whether a file is hidden, temporary, or the sink's own."""
        own = path.parent == self._own.parent and path.name.startswith(self._own.name)
        hidden = any(part.startswith((".", "~")) for part in path.relative_to(self._folder).parts)
        return own or hidden or path.name.lower().endswith(_TEMPORARY)

    def _mark_done(self, path: Path, size: int, mtime_ns: int) -> None:
        """Record that this version of a file needs no more work."""
        self._done[path] = size, mtime_ns
        self._waiting.pop(path, None)

    def _process_if_stable(self, path: Path) -> None:
        """Answer a file that is stable and decodes, or report one that is stable and never will."""
        self._on_event(path)
        waiting = self._waiting.get(path)
        if waiting is None:
            return
        age = self._clock() - waiting.since
        if age < (self._watch.give_up_after_s if waiting.broken else self._watch.stable_for_s):
            return
        try:
            visual = self._read(path, waiting.size)
            if visual is not None:
                self._answer(path, waiting, visual)
        except ImageError as error:
            if waiting.broken:
                self._add(path, waiting, {"sha256": _hashes_of(path), "question": self._question, "error": str(error)})
            waiting.broken = True

    def _read(self, path: Path, size: int) -> JobVisual | None:
        """Return a file's picture or video, None for one that is no longer of `size`. Raises `ImageError`."""
        if self._is_video(path):
            video = JobVisual.of_video(path, self._watch.defaults.sampling, self._vlm.processor.family)
            stat = _stat(path)
            return video if stat and stat.st_size == size else None
        data = read_image(path)
        picture = JobVisual.decoded(data)
        return picture if len(data) == size else None

    def _answer(self, path: Path, waiting: _Waiting, visual: JobVisual) -> None:
        """Answer a file, unless these bytes have been. Raises `VideoError` for frames that cannot be decoded."""
        [sha256] = visual.sha256
        if self._sink.seen_content(self._job, self._name(path), sha256):
            self._mark_done(path, waiting.size, waiting.mtime_ns)
            return
        defaults = self._watch.defaults
        try:
            row = ask(
                self._vlm, [visual], self._question, defaults.config, defaults.image_budget, defaults.output_format
            )
        except VideoError:  # it may still be written to, which its header does not show
            raise
        except ROW_ERRORS as error:
            row = {"sha256": [sha256], "question": self._question, "error": str(error)}
        self._add(path, waiting, row)

    def _add(self, path: Path, waiting: _Waiting, row: Row) -> None:
        head = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "path": self._name(path),
            "sha256": row["sha256"],
            "size": waiting.size,
            "mtime_ns": waiting.mtime_ns,
            "job": self._job,
        }
        self._sink.add(head | row)
        self._mark_done(path, waiting.size, waiting.mtime_ns)
        self._on_row(head | row)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def _no_video(family: Family) -> str | None:
    """Return why videos cannot be answered, None if they can."""
    try:
        check_takes_video(family)
    except VideoError as error:
        return str(error)
    return None


def _check_folder(folder: Path, gone: str) -> None:
    """Raise `OptionError` for a folder that is missing or unreadable: `glob` would find it empty."""
    try:
        with os.scandir(folder):
            pass
    except (FileNotFoundError, NotADirectoryError):
        raise OptionError(gone) from None
    except OSError as error:
        raise OptionError(f"cannot read the folder {folder}: {error.strerror or error}") from None


def _stat(path: Path) -> os.stat_result | None:
    """Return a file's stat result, or None if it is gone or no regular file."""
    try:
        return path.stat() if path.is_file() else None
    except OSError:
        return None


def _hashes_of(path: Path) -> list[str]:
    """Return the SHA-256 of a file that is no picture or video, none where it cannot be read either."""
    try:
        return [hash_file(path)]
    except OSError:
        return []
