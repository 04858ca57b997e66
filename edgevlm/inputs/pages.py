"""Documents: a PDF, a TIFF of many pages, or a picture, whose pages are decoded one at a time.

PDFs are rasterized by PDFium (pypdfium2, an optional dependency), which must not run in two threads at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from edgevlm.errors import ImageError, OptionError, one_line
from edgevlm.families.base import MAX_PIXELS, RGB
from edgevlm.inputs.image import ImageFile, count_frames, load_frame, printable, read_image

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument, PdfPage

DPI = 144
"""Twice the unit of a PDF; docling rasterizes for its vision-language models at the same scale."""
LONGEST_SIDE = 4096
"""Pixels of a page at most: a poster of five metres gets fewer dots per inch."""
_POINTS = 72
"""Units of a PDF in an inch."""
_HEAD = 1024
"""Bytes of a file among which a PDF's mark is."""
_PDFIUM = Lock()


@dataclass(frozen=True)
class Document:
    """A file of pages."""

    path: Path
    pages: int
    is_pdf: bool
    data: bytes | None = None
    """The file's bytes, where it does not lie at `path`, which then is its name."""
    max_pixels: int = MAX_PIXELS
    """Of a page that is a picture."""

    def page(self, number: int, dpi: int = DPI) -> RGB:
        """Return page `number`, from 1, as a uint8 array `(H, W, 3)`. `dpi` is for PDFs. Raises `ImageError`."""
        if not self.is_pdf:
            return load_frame(_image(self.path, self.data), number - 1, self.max_pixels).pixels
        with _PDFIUM, _opened(self.path, self.data) as pdf:
            try:
                with closing(pdf[number - 1]) as page:
                    return _rasterized(page, dpi)
            except Exception as error:  # a library's, on hostile data
                raise ImageError(f"page {number} of {self.path.name} cannot be rasterized: {one_line(error)}") from None


def open_document(path: Path, data: bytes | None = None, max_pixels: int = MAX_PIXELS) -> Document:
    """Return a document whose header is sound, of the file at `path` or of `data`; no page is decoded.

    Raises `ImageError`, and `OptionError` for a PDF without pypdfium2.
    """
    if not is_pdf(path, data):
        return Document(path, count_frames(_image(path, data), max_pixels), False, data, max_pixels)
    with _PDFIUM, _opened(path, data) as pdf:
        pages = len(pdf)
    return Document(path, pages, True, data, max_pixels)


def is_pdf(path: Path, data: bytes | None = None) -> bool:
    """Tell whether a file, or `data`, begins as PDFs do."""
    try:
        if data is None:
            with path.open("rb") as file:
                data = file.read(_HEAD)
        return b"%PDF-" in data[:_HEAD]
    except OSError:
        return path.suffix.lower() == ".pdf"  # `read_image` tells what is wrong


def _image(path: Path, data: bytes | None) -> ImageFile:
    return ImageFile(read_image(path) if data is None else data, printable(str(path)))


@contextmanager
def _opened(path: Path, data: bytes | None) -> Iterator[PdfDocument]:
    try:
        import pypdfium2
    except ImportError:
        raise OptionError("PDFs need pypdfium2; install it with: pip install 'edgevlm[convert]'") from None
    name = printable(str(path))
    try:
        pdf = pypdfium2.PdfDocument(path if data is None else data)
    except FileNotFoundError:
        raise ImageError(f"no such file: {name}") from None
    except Exception:  # PDFium's reason is that of an earlier file where a PDF has no pages
        if _is_encrypted(path, data):
            raise ImageError(f"{name} is encrypted; save it without a password first") from None
        raise ImageError(f"{name} cannot be read as a PDF: it is damaged, or has no pages") from None
    with closing(pdf):
        yield pdf


def _is_encrypted(path: Path, data: bytes | None) -> bool:
    try:
        return b"/Encrypt" in (path.read_bytes() if data is None else data)
    except OSError:
        return False


def _rasterized(page: PdfPage, dpi: int) -> RGB:
    width, height = page.get_size()
    if not (width > 0 and height > 0):
        raise ImageError("it has no area")
    scale = min(dpi / _POINTS, LONGEST_SIDE / max(width, height))
    with closing(page.render(scale=scale, rev_byteorder=True, prefer_bgrx=False)) as bitmap:
        pixels: np.ndarray[Any, np.dtype[np.uint8]] = bitmap.to_numpy()
        return np.ascontiguousarray(pixels[..., :3] if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2))
