"""Decoding: a picture in any form to a uint8 RGB array `(H, W, 3)`.

The reference for a plain file is transformers' `load_image`: EXIF orientation applied, then RGB. Transparency is
laid over white, as the Idefics3 image processor does with an RGBA picture; 16-bit samples keep their high byte. The
fourth byte of a BMP, TGA or ICO is padding where it is 0 throughout: the picture is opaque.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from edgevlm.errors import ImageError, ImageTooLargeError, one_line
from edgevlm.families.base import MAX_PIXELS, RGB

ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any] | ImageFile | Picture"
Images: TypeAlias = "ImageInput | Sequence[ImageInput] | None"

Crop: TypeAlias = tuple[int, int, int, int]
"""A box `x0, y0, x1, y1` in pixels of the upright picture, from its upper left corner; x1 and y1 are not in it."""

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "DIB", "ICO", "JPEG2000", "PPM", "TGA")
"""Pixel formats only: Pillow would also take, say, PostScript, and run an interpreter on a stranger's program."""

_FOURTH_BYTE = {"BMP", "DIB", "TGA", "ICO"}
"""Formats of four bytes a pixel whose writers often have no alpha to put into the fourth, and leave it 0."""
_SIXTEEN_BIT = {"I", "I;16", "I;16B", "I;16L", "I;16N"}
_JPEG_IN_TIFF, _PARTS_OF_TIFF = {"jpeg", "tiff_jpeg"}, (273, 324)
"""Of a TIFF, the compressions that are JPEG, and the tags that list its strips or tiles."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transpose that undoes each EXIF orientation."""
_MOST_SCANS, _MOST_SCANNED_PIXELS = 16, 1_000_000_000
"""Scans of a JPEG, each of which goes over all of its pixels: so many always, and more as long as they times the pixels
are not more than that. Encoders write about ten scans; a file of a few megabytes may hold a hundred thousand."""
_MOST_READS = 200_000
"""Of one image file. A PNG of 100 million pixels takes about half of them, for chunks of the usual 8 KiB; one of empty
chunks, or a JPEG of empty segments, would take millions before its first pixel."""
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
"""What begins a segment of a JPEG: within a scan's data 0xFF is followed by 0 or a restart."""
_SCAN, _END = 0xDA, 0xD9


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, in lower case, that Pillow knows for the formats read here; 60 ms at the first call."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)


@dataclass(frozen=True, eq=False)
class ImageFile:
    """The bytes of an image file, and the name that errors give it."""

    data: bytes
    name: str


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture, hashed once however often it is asked about."""

    pixels: RGB
    orientation: int = 1
    """The EXIF orientation that its file has, 1 to 8; in `pixels` the picture is upright."""

    @cached_property
    def digest(self) -> bytes:
        """A 16-byte hash of its pixels and their shape."""
        return content_digest(self.pixels)

    def cropped(self, crop: Crop) -> Picture:
        """Return the part of the picture in a box. Raises `ImageError` for one that is empty or reaches outside."""
        (left, top, right, bottom), (height, width) = crop, self.pixels.shape[:2]
        if left >= right or top >= bottom:
            raise ImageError(f"the crop {list(crop)} is empty: give x0, y0, x1, y1 with x0 below x1 and y0 below y1")
        if left < 0 or top < 0 or right > width or bottom > height:
            raise ImageError(f"the crop {list(crop)} reaches outside the picture, whose pixels are {width}x{height}")
        return replace(self, pixels=self.pixels[top:bottom, left:right].copy())


@dataclass(frozen=True, eq=False)
class KeptImage(ImageFile):
    """An image file that is decoded when its picture is first asked for, and then kept with it."""

    @cached_property
    def picture(self) -> Picture:
        """The picture. Raises `ImageError`."""
        return _decode(self.data, self.name, MAX_PIXELS)


def content_digest(pixels: RGB) -> bytes:
    """Return a 16-byte hash of an array's content and shape."""
    digest = blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def load_picture(source: ImageInput) -> Picture:
    """Return `source` decoded, as `load_image` does. Raises `ImageError`."""
    return _load(source, MAX_PIXELS)


def load_image(source: ImageInput, max_pixels: int = MAX_PIXELS) -> RGB:
    """Return `source` as a uint8 array `(H, W, 3)`, upright, transparency laid over white.

    `source` is a path, the bytes of an image file, a PIL image, a uint8 array `(H, W, 3)`, or what has been read or
    decoded before. Of an animation the first frame is taken. Raises `ImageError`.
    """
    return _load(source, max_pixels).pixels


def _load(source: ImageInput, max_pixels: int) -> Picture:
    if isinstance(source, Picture):
        return source
    if isinstance(source, ImageFile):
        return source.picture if isinstance(source, KeptImage) else _decode(source.data, source.name, max_pixels)
    if isinstance(source, np.ndarray):
        return Picture(_check_array(source, max_pixels))
    if isinstance(source, Image.Image):
        with _quiet:
            return _upright(source, "the image", max_pixels)
    if isinstance(source, bytes):
        return _decode(source, "the image", max_pixels)
    if not isinstance(source, str | os.PathLike):
        raise ImageError(f"an image must be a path, bytes, a PIL image or a uint8 array, not {type(source).__name__}")
    return _decode(read_image(source), printable(os.fspath(source)), max_pixels)


def probe_image(file: ImageFile, max_pixels: int = MAX_PIXELS) -> None:
    """Raise the `ImageError` that an image file's header already calls for; no pixel is decoded."""
    with _quiet, _open(file.data, file.name, max_pixels) as image:
        _check_size(*image.size, file.name, max_pixels)
        _check_scans(file.data, image, file.name)


def count_frames(file: ImageFile, max_pixels: int = MAX_PIXELS) -> int:
    """Return the pages of a TIFF, 1 for any other picture. Raises `ImageError`; no pixel is decoded."""
    probe_image(file, max_pixels)
    with _quiet, _open(file.data, file.name, max_pixels) as image:
        try:
            return int(getattr(image, "n_frames", 1)) if image.format == "TIFF" else 1
        except Exception as error:  # hostile data
            raise ImageError(f"{file.name} cannot be opened as an image: {one_line(error)}") from None


def load_frame(file: ImageFile, index: int, max_pixels: int = MAX_PIXELS) -> Picture:
    """Return page `index` of a TIFF, from 0, as `load_picture` returns the first. Raises `ImageError`."""
    if index == 0:
        return _load(file, max_pixels)
    with _quiet, _open(file.data, file.name, max_pixels) as image:
        try:
            image.seek(index)
        except Exception as error:
            raise ImageError(f"page {index + 1} of {file.name} cannot be decoded: {one_line(error)}") from None
        _check_scans(file.data, image, file.name)
        return _upright(image, file.name, max_pixels)


def probed_image(source: str | os.PathLike[str]) -> ImageFile:
    """Return an image file, read, whose header is sound. Raises `ImageError`."""
    file = ImageFile(read_image(source), printable(os.fspath(source)))
    probe_image(file)
    return file


def read_image(source: str | os.PathLike[str]) -> bytes:
    """Return the bytes of an image file, whatever they are. Raises `ImageError`."""
    path, name = Path(source), printable(os.fspath(source))
    try:
        if path.is_dir():
            raise ImageError(f"{name} is a folder, not an image file")
        if path.exists() and not path.is_file():
            raise ImageError(f"{name} is a device or a pipe, not an image file; use - for stdin")
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"no such image file: {name}") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from None


def _check_array(array: npt.NDArray[Any], max_pixels: int) -> RGB:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ImageError(f"an image array must be uint8 of shape (H, W, 3), not {array.dtype} of {array.shape}")
    _check_size(array.shape[1], array.shape[0], "the image", max_pixels)
    return np.ascontiguousarray(array)


def _check_size(width: int, height: int, name: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"{name} has {width}x{height} pixels, more than the limit of {max_pixels:,}; shrink it first"
        )


def _check_scans(data: bytes, image: Image.Image, name: str) -> None:
    """Raise `ImageError` for a JPEG, or a TIFF of JPEGs, that takes far more time than its pixels call for."""
    in_tiff = image.format == "TIFF" and image.info.get("compression") in _JPEG_IN_TIFF
    if image.format != "JPEG" and not in_tiff:
        return
    most = max(_MOST_SCANS, _MOST_SCANNED_PIXELS // max(2**20, image.width * image.height))
    most *= _parts(image) if in_tiff else 1
    scans = data.count(bytes([0xFF, _SCAN]))  # quickly, and at least as many as there are
    if scans > most and image.format == "JPEG":
        scans = _count_scans(data)
    if scans > most:
        raise ImageError(f"{name} has {scans:,} scans over its pixels; save it again as a baseline JPEG")


def _parts(image: Image.Image) -> int:
    """Return the strips or tiles of a TIFF."""
    try:
        return max(1, *(len(image.tag_v2.get(tag, ())) for tag in _PARTS_OF_TIFF))  # type: ignore[attr-defined]
    except Exception:  # hostile data, which decoding it tells
        return 1


def _count_scans(data: bytes) -> int:
    """Return the scans of a JPEG up to its end; what a camera has put behind it does not count."""
    scans, at = 0, 2
    while (found := _MARKER.search(data, at)) and found[1][0] != _END:
        scans += found[1][0] == _SCAN
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2])
    return scans


def _decode(data: bytes, name: str, max_pixels: int) -> Picture:
    with _quiet, _open(data, name, max_pixels) as image:
        _check_scans(data, image, name)
        return _upright(image, name, max_pixels)


class _Quiet:
    """Silences Pillow's warnings, of many pixels or a broken EXIF block: what matters of them is an `ImageError`.

    The filters belong to the whole process: the first thread to enter sets them, and the last to leave sets them back.
    """

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.__exit__(None, None, None)


_quiet = _Quiet()


class _CountedBytes(BytesIO):
    """A file's bytes, which are read so many times at most: Pillow reads a header piece by piece, in Python."""

    left = _MOST_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise ImageError(f"it has more than {_MOST_READS:,} parts; save it again")
        return super().read(size)


def _open(data: bytes, name: str, max_pixels: int) -> Image.Image:
    if not data:
        raise ImageError(f"{name} is empty, not an image")
    try:
        return Image.open(_CountedBytes(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not an image in a format that edgevlm reads (JPEG, PNG, WebP, …)") from None
    except Image.DecompressionBombError:
        # Pillow's own limit may be the lower one, and it does not tell the size apart.
        limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))
        raise ImageTooLargeError(f"{name} has more pixels than the limit of {limit:,}; shrink it first") from None
    except Exception as error:  # a decoder may raise anything on hostile bytes
        raise ImageError(f"{name} cannot be opened as an image: {one_line(error)}") from None


def _upright(image: Image.Image, name: str, max_pixels: int) -> Picture:
    _check_size(*image.size, name, max_pixels)
    if 0 in image.size:
        raise ImageError(f"{name} has no pixels")
    if image.mode == "F":
        raise ImageError(f"{name} has floating-point pixels; convert it to 8 bits a channel first")
    try:
        # Pillow turns a TIFF as it loads it, and forgets how it was stored.
        stored = _orientation(image) if image.format == "TIFF" else 1
        image.load()
        orientation = _orientation(image)
        turned = image.transpose(_TURNS[orientation]) if orientation > 1 else image
        return Picture(np.asarray(_flatten(turned)), max(stored, orientation))
    except Exception as error:  # as above: truncated or hostile data
        raise ImageError(f"{name} cannot be decoded, it may be truncated: {one_line(error)}") from None


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 where there is none; `ImageOps.exif_transpose` fails where EXIF is broken."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the pixels are good all the same
        return 1
    return int(orientation) if orientation in _TURNS else 1


def _flatten(image: Image.Image) -> Image.Image:
    """Return the image in mode RGB."""
    if image.mode in _SIXTEEN_BIT:
        samples = np.asarray(image)
        high_byte = (np.clip(samples, 0, 65535).astype(np.uint16) >> 8).astype(np.uint8)
        if "transparency" in image.info:
            high_byte[samples == image.info["transparency"]] = 255
        return Image.fromarray(high_byte).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        if image.format in _FOURTH_BYTE and rgba.getchannel("A").getextrema() == (0, 0):
            return rgba.convert("RGB")
        white = Image.new("RGBA", rgba.size, (255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def printable(path: str) -> str:
    """Return a path for a message of one line: neither control characters nor a whole picture in base64."""
    short = path if len(path) <= 300 else path[:299] + "…"
    return short if short and short.isprintable() else repr(short)


def as_list(images: Images) -> list[ImageInput]:
    """Return one picture, several or none as a list."""
    if images is None:
        return []
    if isinstance(images, str | os.PathLike | bytes | Image.Image | np.ndarray | ImageFile | Picture):
        return [images]
    return list(images)
