"""`POST /v1/convert/file` and `/v1/convert/source`: a document in, a document out, as docling-serve has them.

The server is a view of `edgevlm convert`: pages come from `inputs.pages`, prompts from `jobs.convert`, and documents
from `jobs.documents`. Each page is a job of its own in the engine's queue.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgevlm.answer import Answer
from edgevlm.decoding.config import GenerationConfig
from edgevlm.errors import EdgeVLMError, ImageError
from edgevlm.families.base import RGB, ImageBudget
from edgevlm.inputs.page_process import count_pages, rasterize
from edgevlm.inputs.pages import Document, is_pdf, open_document
from edgevlm.jobs.convert import markup_of, page_prompt, why_cut
from edgevlm.jobs.documents import Figures, Target, assembled, check_target
from edgevlm.jobs.markdown_pages import PageText, as_document
from edgevlm.server.errors import ApiError, FailedError, blaming, to_api_error
from edgevlm.server.messages import Conversation
from edgevlm.server.plan import Plan
from edgevlm.server.settings import ServeConfig
from edgevlm.server.uploads import TARGETS, Upload
from edgevlm.strict_json import read_json
from edgevlm.vlm import VLM

_AT_ONCE = 2
"""Documents of which a page is opened at the same time, and those that are put together."""


@dataclass
class _Sheets:
    """The pages of an upload as pictures; a PDF is opened in a process of its own. Raises `ImageError`."""

    upload: Upload
    max_pixels: int
    turns: asyncio.Semaphore
    _document: Document | None = None

    async def count(self) -> int:
        """Return how many there are."""
        name, data = self.upload.name, self.upload.data
        async with self.turns:
            if is_pdf(Path(name), data):
                return await count_pages(data, name)
            self._document = await asyncio.to_thread(open_document, Path(name), data, self.max_pixels)
        return self._document.pages

    async def picture(self, number: int) -> RGB:
        """Return a page, from 1."""
        async with self.turns:
            if self._document:
                return await asyncio.to_thread(self._document.page, number)
            return await rasterize(self.upload.data, self.upload.name, number)


class Converter:
    """Converts documents for a server."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._sheets, self._assembly = asyncio.Semaphore(_AT_ONCE), asyncio.Semaphore(_AT_ONCE)

    def plan(self, upload: Upload, vlm: VLM, caller: str) -> Conversion:
        """Understand a request. Raises `ApiError`."""
        sheets = _Sheets(upload, self._config.max_pixels, self._sheets)
        return Conversion(upload, vlm, self._config, caller, sheets, self._assembly)


@dataclass
class Conversion:
    """A document on its way. Raises `ApiError` for what the model cannot do, or what is not installed."""

    upload: Upload
    vlm: VLM
    config: ServeConfig
    caller: str
    sheets: _Sheets
    assembly: asyncio.Semaphore
    pages: list[PageText] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        options = self.upload.options
        self._first, self._last = options.pages
        with blaming("task"):
            self._prompt = page_prompt(self.vlm, options.task, options.prompt)
        if len(self._prompt) > self.config.max_prompt_chars:
            limit = self.config.max_prompt_chars
            raise ApiError(413, "prompt_too_long", f"prompt: has more than {limit:,} characters", param="prompt")
        self._markup = markup_of(self.vlm.manifest)
        self._check_installed(options.targets)
        if self._markup or options.task != "table":  # what writes Markdown may write tables in OTSL
            with blaming("to_formats"):
                for target in options.targets:
                    check_target(target, self._markup)

    def _check_installed(self, targets: Sequence[Target]) -> None:
        """Raise `ApiError` where a library is missing that these formats need."""
        needed = set()
        if "json" in targets or (self._markup and set(targets) != {"doctags"}):
            needed.add("docling_core")
        if "html" in targets and not self._markup:
            needed.add("markdown_it")
        if is_pdf(Path(self.upload.name), self.upload.data):
            needed.add("pypdfium2")
        for name in sorted(needed):
            if find_spec(name) is None:
                message = f"this document needs {name}; install it on the server with: pip install 'edgevlm[convert]'"
                raise ApiError(501, "not_installed", message)

    async def run(self, ask: Callable[[Plan], Awaitable[Answer]], within_s: float) -> dict[str, Any]:
        """Return the answer; `ask` answers about a page. Raises `ApiError`, and what ends the server or the request."""
        within_s = min(within_s, self.upload.options.document_timeout or within_s)
        try:
            async with asyncio.timeout(max(0.0, within_s)):
                await self._read(ask)
        except TimeoutError:
            told = f"no further page was read: the time limit of {within_s:.3g} s was reached"
            if not self.pages:
                raise ApiError(504, "time_limit", told) from None
            self._tell("pipeline", "timeout", told)
        async with self.assembly:
            made = await asyncio.to_thread(self._assembled, asyncio.get_running_loop()) if self.pages else {}
        status = "partial_success" if self.errors else "success"
        return {
            "document": {"filename": self.upload.name, **dict.fromkeys(map(_content, TARGETS)), **made},
            "status": status if self.pages else "failure",
            "errors": self.errors,
            "processing_time": round(time.monotonic() - self._began, 3),
            "timings": {},
            "ignored": self.upload.options.ignored,
        }

    async def _read(self, ask: Callable[[Plan], Awaitable[Answer]]) -> None:
        """Read the pages, one after another. Raises `TimeoutError` and `ApiError`."""
        try:
            count = await self.sheets.count()
        except ImageError as error:
            self._tell("document_backend", "backend_failure", str(error))
            return
        numbers = range(self._first, min(count, self._last) + 1)
        if not numbers:
            message = f"page_range: begins at {self._first}, but the last page is {count}"
            self._tell("user_input", "policy", message)
        if len(numbers) > (limit := self.config.max_pages):
            message = f"the document has {len(numbers)} pages, more than the limit of {limit}; choose with page_range"
            raise ApiError(413, "too_many_pages", message, param="page_range")
        for number in numbers:
            await self._read_page(number, ask)

    async def _read_page(self, number: int, ask: Callable[[Plan], Awaitable[Answer]]) -> None:
        try:
            pixels = await self.sheets.picture(number)
        except ImageError as error:
            self._tell("document_backend", "backend_failure", str(error), number)
            return
        shown = self.vlm.processor.family.page_picture
        try:
            answer = await ask(self._plan(await asyncio.to_thread(shown, pixels, self.upload.options.task)))
        except ApiError as error:
            if error.code == "time_limit":
                raise TimeoutError from None
            raise
        except (EdgeVLMError, FailedError) as error:
            self._tell("model", "inference_failure", f"page {number}: {to_api_error(error).message}", number)
            return
        self.pages.append(PageText(number, answer.text, (pixels.shape[1], pixels.shape[0])))
        if answer.finish_reason != "stop":
            why = why_cut(answer.finish_reason, "max_tokens")
            self._tell("model", "inference_failure", f"page {number} may be incomplete: {why}", number)

    def _plan(self, pixels: RGB) -> Plan:
        config = GenerationConfig(max_new_tokens=self.upload.options.max_tokens)
        about = Conversation.of_page(pixels, self._prompt, self.config)
        return Plan(about, config, ImageBudget(), None, self.caller, has_place=True)

    def _assembled(self, loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
        """Return the document's contents, in a thread; `loop` rasterizes again the pages that have figures."""
        options, name = self.upload.options, Path(self.upload.name).stem
        figures = None
        if options.image_export_mode == "embedded" and options.include_images:
            figures = Figures(
                None, lambda number: asyncio.run_coroutine_threadsafe(self.sheets.picture(number), loop).result()
            )
        written = [target for target in options.targets if self._markup or target != "json"]
        made: dict[Any, Any] = {**assembled(name, self.pages, written, figures, self._markup)}
        if "json" in options.targets:
            made["json"] = read_json(made["json"]) if self._markup else as_document(name, self.pages).export_to_dict()
        return {_content(short): made[target] for short, target in TARGETS.items() if target in made}

    def _tell(self, component: str, category: str, message: str, page: int | None = None) -> None:
        """Add an error as docling has them."""
        told = {"component_type": component, "module_name": "edgevlm", "error_message": message, "category": category}
        self.errors.append({**told, "page_no": page})


def _content(name: str) -> str:
    return f"{name}_content"
