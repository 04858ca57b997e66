"""Videos: which inputs are one, and their frames, decoded as a stream by PyAV, an optional dependency.

A file is read twice. The first pass counts frames without decoding them, the second decodes those that the family
samples, and keeps them at the size of its views. Whole stretches in between are skipped from key frame to key frame.
The reference is transformers' `load_video` with `backend="pyav"`: RGB of each frame, and times from the average rate.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from edgevlm.errors import ImageTooLargeError, OptionError, VideoError, one_line
from edgevlm.families.base import MAX_PIXELS, RGB, Family, Frames, FrameSampling, ImageBudget
from edgevlm.inputs.image import ImageFile, ImageInput, Images, as_list, image_suffixes, load_image, printable
from edgevlm.inputs.vision_cache import PreprocessedImage
from edgevlm.interrupt import checked

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video import VideoFrame, VideoStream

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv", ".ogv"}
    | {".3gp"}
)
"""Files that are videos without being called so. A GIF is a picture unless it is called a video."""
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,mpegvideo,h264,hevc,flv,asf,ogg,apng"
"""Containers of frames only: FFmpeg would also take playlists, and fetch what they name."""
FOLDER_FPS = 2.0
"""Frames for each second of a folder or a list of frames, where nothing else is said."""
MAX_FRAMES = 768
"""A longer list or folder is refused unless `frames` says how many of it are looked at."""
NO_AV = "videos need PyAV; install it with: pip install 'edgevlm[video]'"
_TIMELESS = "the times of a video's frames must rise, in seconds, one for each frame"


@dataclass(frozen=True, eq=False)
class Video:
    """A video, and which of its frames are looked at.

    `fps` and `frames` exclude each other. Of a file, `fps` frames are sampled for each second (the family's own rate
    if it is None), or `frames` altogether. Of a list or a folder all are taken, or `frames` altogether; `fps` says how
    many there are for each second, 2 unless `times_s` has the time of each. Raises `OptionError`.
    """

    source: str | os.PathLike[str] | bytes | ImageFile | Sequence[ImageInput]
    """A video file, its bytes, a folder of pictures, which are taken in the order of their names, or the frames."""
    fps: float | None = None
    frames: int | None = None
    times_s: Sequence[float] | None = None
    """When each frame of a list is shown."""

    def __post_init__(self) -> None:
        sampled = self.sampling  # its own check
        if self.times_s is None:
            return
        if sampled.fps is not None:
            raise OptionError("fps and times_s exclude each other; give one of them")
        if isinstance(self.source, str | os.PathLike | bytes | ImageFile):
            raise OptionError("times_s are for a list of frames; a file has its own")
        rising = all(a < b for a, b in zip(self.times_s, self.times_s[1:], strict=False))
        if len(self.times_s) != len(self.source) or not rising or not np.isfinite(self.times_s).all():
            raise OptionError(_TIMELESS)

    @property
    def sampling(self) -> FrameSampling:
        """Which frames are looked at."""
        return FrameSampling(self.fps, self.frames)

    @property
    def name(self) -> str:
        """What errors call it."""
        if isinstance(self.source, ImageFile):
            return self.source.name
        return printable(os.fspath(self.source)) if isinstance(self.source, str | os.PathLike) else "the video"


VisualInput: TypeAlias = "ImageInput | Video | PreprocessedImage"
Visuals: TypeAlias = "Images | Video | Sequence[ImageInput | Video]"


def as_visuals(images: Visuals) -> list[ImageInput | Video]:
    """Return one picture or video, several or none as a list; a path named like a video, or a folder, is one."""
    listed = [images] if isinstance(images, Video) else as_list(images)  # type: ignore[arg-type]
    return [_as_video(each) for each in listed]


def _as_video(image: ImageInput | Video) -> ImageInput | Video:
    if isinstance(image, str | os.PathLike) and (names_video(image) or is_folder(image)):
        return Video(image)
    return image


def names_video(path: str | os.PathLike[str]) -> bool:
    """Tell whether a path is called like a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Tell whether there is a folder; what cannot be a path is none."""
    return os.path.isdir(path)  # noqa: PTH112 - unlike Path's, False for a NUL or an empty name


def kinds_of(images: Sequence[VisualInput]) -> list[str]:
    """Return `video` or `image` for each, as the parts of a message are called."""
    return ["video" if isinstance(each, Video) or getattr(each, "is_video", False) else "image" for each in images]


def probe_video(video: Video, max_pixels: int = MAX_PIXELS) -> None:
    """Raise the `ImageError` or `VideoError` that a video calls for before a model is loaded; no frame is decoded."""
    if isinstance(video.source, str | os.PathLike | bytes | ImageFile):
        if (folder := _folder(video)) is not None:
            _names(folder, video.name)
        else:
            with _opened(video) as (_, stream):
                _check_size(stream, video.name, max_pixels)


def video_files(video: Video) -> list[Path]:
    """Return the file of a video, or those of a folder's frames in order. Raises `VideoError` for a folder of none."""
    assert isinstance(video.source, str | os.PathLike)
    folder = _folder(video)
    return [Path(video.source)] if folder is None else _names(folder, video.name)


def check_takes_video(family: Family) -> None:
    """Raise `VideoError` for a family that takes pictures alone, and where there is no PyAV."""
    _check_family(family)
    _import_av()


def load_frames(video: Video, family: Family, budget: ImageBudget) -> Frames:
    """Return the frames of a video that the family samples, at the size of its views.

    Raises `ImageError`, `VideoError` and `OptionError`.
    """
    _check_family(family)
    if isinstance(video.source, str | os.PathLike | bytes | ImageFile):
        folder = _folder(video)
        if folder is None:
            return _sampled(video, family, budget)
        return _listed(video, _names(folder, video.name), family, budget)
    return _listed(video, video.source, family, budget)


def _check_family(family: Family) -> None:
    if family.video_placeholder is None:
        raise VideoError("this model takes pictures, not video; give it single frames as pictures")


def _folder(video: Video) -> Path | None:
    source = video.source
    return Path(source) if isinstance(source, str | os.PathLike) and is_folder(source) else None


def _names(folder: Path, name: str) -> list[Path]:
    """Return the pictures of a folder in the order of their names, 2 before 10."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in image_suffixes() and path.is_file()]
    if not found:
        raise VideoError(f"{name} is a folder without pictures; a video is a file, or a folder of its frames")
    return sorted(found, key=lambda path: [int(each) if each.isdigit() else each for each in _parts(path.name)])


def _parts(name: str) -> list[str]:
    """Return a name's texts and numbers by turns, a text first."""
    return re.split(r"([0-9]+)", name)


def _listed(video: Video, sources: Sequence[ImageInput], family: Family, budget: ImageBudget) -> Frames:
    """Return the frames of a list of pictures."""
    total = len(sources)
    if total == 0:
        raise VideoError("the video has no frames")
    rate = video.fps or FOLDER_FPS
    times = list(video.times_s) if video.times_s is not None else [index / rate for index in range(total)]
    if video.times_s is not None and total > 1:
        rate = (total - 1) / (times[-1] - times[0])
    places: Sequence[int] = range(total)
    if video.frames is not None and video.frames < total:
        places = family.sample_frames(total, rate, video.sampling, budget)
    if len(places) > MAX_FRAMES:
        raise VideoError(f"{video.name} has {total:,} frames, more than {MAX_FRAMES}; say how many with frames")
    shown = (load_image(sources[place]) for place in places)
    pixels = _resized(shown, len(places), family, budget)
    return Frames(pixels, [times[place] for place in places], len(places) / total * rate, times[-1])


def _resized(shown: Iterator[RGB], count: int, family: Family, budget: ImageBudget) -> list[RGB]:
    """Return the frames at the size of views, which is that of the first: only one is held as it was decoded."""
    pixels: list[RGB] = []
    size: tuple[int, int] | None = None
    for frame in checked(shown):
        size = size or family.frame_size(frame.shape[0], frame.shape[1], count, budget)
        pixels.append(family.resize_frame(frame, size))
    return pixels


def _sampled(video: Video, family: Family, budget: ImageBudget) -> Frames:
    """Return frames of a file."""
    with _opened(video) as (container, stream):
        _check_size(stream, video.name)
        index = _Index.of(container, stream)
        rate = index.rate(stream)
    if index.total == 0:
        raise VideoError(f"{video.name} has no frames")
    places = family.sample_frames(index.total, rate, video.sampling, budget)
    with _opened(video) as (container, stream):
        shown = _decoded(container, stream, index, places, video.name)
        pixels = _resized(shown, len(places), family, budget)
    times = [place / rate for place in places]
    return Frames(pixels, times, len(places) / index.total * rate, index.total / rate)


@dataclass(frozen=True)
class _Index:
    """What a pass over a file's packets tells, without decoding."""

    total: int
    times: npt.NDArray[np.int64] | None
    """Each frame's time in the order of display, in units of the stream; None where packets do not tell."""
    keys: npt.NDArray[np.int64]
    """`(k, 2)`: the times of display and of decoding of each key frame, rising."""
    seconds: float
    """From the first frame to the last."""

    @classmethod
    def of(cls, container: InputContainer, stream: VideoStream) -> _Index:
        """Read all packets of the stream."""
        times: list[int | None] = []
        keys: list[tuple[int, int]] = []
        for packet in checked(container.demux(stream)):
            if not packet.size or packet.is_discard:
                continue
            times.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None and packet.dts is not None:
                keys.append((packet.pts, min(packet.pts, packet.dts)))
        known = sorted(each for each in times if each is not None)
        whole = len(set(known)) == len(times)
        unit = float(stream.time_base or 0)
        seconds = (known[-1] - known[0]) * unit if known else 0.0
        places = np.asarray(known, np.int64) if whole else None
        return cls(len(times), places, np.asarray(sorted(keys), np.int64).reshape(-1, 2), seconds)

    def seek_target(self, place: int, before: int) -> int | None:
        """Return the time of decoding of the last key frame up to `place`, None unless it is after `before`."""
        assert self.times is not None
        key = int(np.searchsorted(self.keys[:, 0], self.times[place], "right")) - 1
        if key < 0 or before + 1 >= place or self.keys[key, 0] <= self.times[max(before, 0)]:
            return None
        return int(self.keys[key, 1])

    def rate(self, stream: VideoStream) -> float:
        """Return the average frames for each second."""
        stated = stream.average_rate or stream.guessed_rate
        if stated:
            return float(stated)
        return (self.total - 1) / self.seconds if self.seconds > 0 else 1.0


def _decoded(
    container: InputContainer, stream: VideoStream, index: _Index, places: Sequence[int], name: str
) -> Iterator[RGB]:
    """Yield the frames at `places`, which rise; one at a time is held."""
    frames, before = checked(container.decode(stream)), -1
    for place in places:
        if index.times is None:
            frame = next(islice(frames, place - before - 1, None), None)
        else:
            time, start = int(index.times[place]), index.seek_target(place, before)
            if start is not None:
                frames = _from(container, stream, start)
            frame = _shown_at(frames, time)
            if start is not None and (frame is None or frame.pts != time):  # the container's seek overshot
                frames = _from(container, stream, int(index.times[0]))
                frame = _shown_at(frames, time)
        yield _pixels(frame, place, index.total, name)
        before = place


def _from(container: InputContainer, stream: VideoStream, time: int) -> Iterator[VideoFrame]:
    """Return the frames from the key frame at `time`, or before it."""
    container.seek(time, stream=stream)
    return checked(container.decode(stream))


def _shown_at(frames: Iterator[VideoFrame], time: int) -> VideoFrame | None:
    """Return the first frame shown at `time` or later."""
    return next((frame for frame in frames if frame.pts is not None and frame.pts >= time), None)


def _pixels(frame: VideoFrame | None, place: int, total: int, name: str) -> RGB:
    """Return a frame as RGB `(H, W, 3)`, turned as the file asks."""
    if frame is None:
        raise VideoError(f"{name} is damaged: frame {place + 1} of {total} cannot be decoded")
    pixels: RGB = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _check_size(stream: VideoStream, name: str, max_pixels: int = MAX_PIXELS) -> None:
    if stream.width * stream.height > max_pixels:
        raise ImageTooLargeError(
            f"{name} has {stream.width}x{stream.height} pixels, more than the limit of {max_pixels:,}; shrink it first"
        )


@contextmanager
def _opened(video: Video) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video file; whatever FFmpeg refuses is a `VideoError`."""
    av, name = _import_av(), video.name
    with _source(video) as source:
        try:
            with av.open(source, metadata_errors="replace", options={"format_whitelist": DEMUXERS}) as container:
                cover = av.stream.Disposition.attached_pic
                streams = [each for each in container.streams.video if not each.disposition & cover]
                if not streams:
                    raise VideoError(f"{name} holds no video, only sound or text")
                if streams[0].codec_context is None:
                    raise VideoError(f"{name} has video of a codec that PyAV does not decode here")
                yield container, streams[0]
        except (av.FFmpegError, EOFError, UnicodeError, IndexError) as error:  # IndexError: PyAV, of broken packets
            raise VideoError(f"{name} cannot be read as a video, it may be damaged: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or one_line(error))


@contextmanager
def _source(video: Video) -> Iterator[BinaryIO]:
    """Open a video's bytes: a path is not given to FFmpeg, which would take it for a URL."""
    source = video.source
    if isinstance(source, bytes | ImageFile):
        data = source if isinstance(source, bytes) else source.data
        if not data:
            raise VideoError(f"{video.name} is empty, not a video")
        yield BytesIO(data)
        return
    assert isinstance(source, str | os.PathLike)
    path = Path(source)
    try:
        if path.exists() and not path.is_file():
            raise VideoError(f"{video.name} is a device or a pipe, not a video file")
        if path.is_file() and not path.stat().st_size:
            raise VideoError(f"{video.name} is empty, not a video")
        file = path.open("rb")
    except FileNotFoundError:
        raise VideoError(f"no such video file: {video.name}") from None
    except (OSError, ValueError) as error:
        raise VideoError(f"cannot read {video.name}: {getattr(error, 'strerror', None) or error}") from None
    with file:
        yield file


def _import_av() -> Any:
    try:
        import av
        import av.logging
    except ImportError:
        raise VideoError(NO_AV) from None
    av.logging.set_level(None)
    return av
