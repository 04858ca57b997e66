"""Pages of a PDF, rasterized in a process of their own, which its parent may kill at any time.

What a stranger's PDF makes PDFium do, crash, loop or fill memory, it does there. `python -m edgevlm.inputs.page_process
NAME NUMBER DPI` reads the PDF from stdin and writes a line of JSON: `{"pages": ...}` for page 0, `{"error": ...}`, or
`{"width": ..., "height": ...}` and then the page's pixels, RGB.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.errors import EdgeVLMError, ImageError
from edgevlm.families.base import RGB
from edgevlm.inputs.image import printable
from edgevlm.inputs.pages import DPI, open_document
from edgevlm.strict_json import read_json, write_json

SECONDS = 30.0
"""For a page, or for counting them; a page of a drawing's hundred thousand lines takes one or two."""
_MEMORY = 2 * 2**30
"""Address space of the process, on POSIX systems; a page of 4096 pixels a side takes 112 MiB of it."""


async def count_pages(data: bytes, name: str) -> int:
    """Return the pages of a PDF. Raises `ImageError`."""
    head, _ = await _ask(data, name, 0, DPI)
    return int(head["pages"])


async def rasterize(data: bytes, name: str, number: int, dpi: int = DPI) -> RGB:
    """Return page `number`, from 1, of a PDF as a uint8 array `(H, W, 3)`. Raises `ImageError`.

    Cancelling this kills the process.
    """
    head, pixels = await _ask(data, name, number, dpi)
    return np.frombuffer(pixels, np.uint8).reshape(head["height"], head["width"], 3)


async def _ask(data: bytes, name: str, number: int, dpi: int) -> tuple[dict[str, Any], memoryview]:
    name = printable(name)  # a caller's: an argument of a command holds no NUL
    command = [sys.executable, "-P", "-m", __name__, name, str(number), str(dpi)]
    pipe, null = asyncio.subprocess.PIPE, asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=null, env=_environment())
    what = f"page {number} of {name}" if number else name
    try:
        async with asyncio.timeout(SECONDS):
            told, _ = await process.communicate(data)
    except TimeoutError:
        raise ImageError(f"{what} takes more than {SECONDS:g} s to be opened; save it again, or as a picture") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    line, _, _ = told.partition(b"\n")
    try:
        head = read_json(line)
    except ValueError:
        raise ImageError(f"{what} cannot be opened: it takes too much memory or is damaged; save it again") from None
    if "error" in head:
        raise ImageError(head["error"])
    return head, memoryview(told)[len(line) + 1 :]


def _environment() -> dict[str, str]:
    """Return this process's environment without its API key; a second thread would be one more stack in memory."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGEVLM_")}
    return kept | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def _limit() -> None:
    """Bound what this process may take, where the system can."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (2 * int(SECONDS), 2 * int(SECONDS)))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(name: str, number: int, dpi: int) -> None:
    _limit()
    out = sys.stdout.buffer
    try:
        document = open_document(Path(name), sys.stdin.buffer.read())
        if not number:
            out.write(write_json({"pages": document.pages}).encode())
            return
        pixels = document.page(number, dpi)
    except EdgeVLMError as error:
        out.write(write_json({"error": str(error)}).encode())
        return
    out.write(write_json({"width": pixels.shape[1], "height": pixels.shape[0]}).encode() + b"\n")
    out.write(pixels.data)


if __name__ == "__main__":
    _answer(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
