"""Convert: files of pages to documents, a page at a time, resumably.

The answers of a file's pages are rows of a file of their own, which a work queue writes as it does those of a batch:
killed or run again, no page is lost or read twice. The document is written when all of them are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from edgevlm.decoding.config import GenerationConfig
from edgevlm.errors import ImageError, OptionError
from edgevlm.families.base import ImageBudget
from edgevlm.inputs.image import image_suffixes
from edgevlm.inputs.pages import DPI, Document, open_document
from edgevlm.jobs.documents import MARKUP, SUFFIXES, Figures, Markup, Target, assemble, check_target
from edgevlm.jobs.jsonl import Row, beside, writing
from edgevlm.jobs.markdown_pages import PageText
from edgevlm.jobs.spec import ROW_ERRORS, Defaults, Job, job_key
from edgevlm.jobs.work_queue import WorkQueue, noop
from edgevlm.malloc import return_freed_memory
from edgevlm.manifest import Manifest, hash_file, load_manifest
from edgevlm.model_store import find_model
from edgevlm.runtime.config import RuntimeConfig

if TYPE_CHECKING:
    from edgevlm.vlm import VLM

MAX_NEW_TOKENS = 4096
"""Of a page."""
OnProgress = Callable[[int, int], object]
"""Called with the pages done and the pages in all."""


@dataclass(frozen=True)
class Conversion:
    """Which model reads pages, how, and what becomes of them."""

    folder: Path
    """Where documents go."""
    target: Target = "markdown"
    task: str = "page"
    """A name of the family's `page_prompts`."""
    prompt: str | None = None
    """Asked instead of the task's prompt."""
    model: str | None = None
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    config: GenerationConfig = field(default_factory=lambda: GenerationConfig(max_new_tokens=MAX_NEW_TOKENS))
    image_budget: ImageBudget = field(default_factory=ImageBudget)
    pages: Sequence[range] = ()
    """Which pages of each file, from 1; all where there is none."""
    dpi: int = DPI
    """Dots per inch of a PDF's pages."""

    def __post_init__(self) -> None:
        if not 36 <= self.dpi <= 600:
            raise OptionError(f"dpi must be between 36 and 600, not {self.dpi}")

    def chosen(self, document: Document) -> list[int]:
        """Return the numbers of the pages of a document that are read."""
        numbers = range(1, document.pages + 1)
        return [number for number in numbers if not self.pages or any(number in each for each in self.pages)]

    def digest(self) -> str:
        """Return a digest of all that a page's answer depends on besides the page. Raises `ModelError`."""
        options = [self.task, self.prompt, self.dpi]
        return Defaults(config=self.config, image_budget=self.image_budget).config_digest(self.model) + str(options)


@dataclass
class ConvertSummary:
    """What became of the files."""

    files: int = 0
    failed_files: int = 0
    pages: int = 0
    failed_pages: int = 0
    cut_pages: int = 0
    """Ended by a budget or as a loop, and so perhaps incomplete."""
    written: list[Path] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return what `edgevlm convert --json` prints."""
        return {**vars(self), "written": [str(path) for path in self.written]}


class PageReader:
    """Reads pages with one model, which is loaded when the first page needs it."""

    def __init__(self, conversion: Conversion) -> None:
        self._conversion = conversion

    @cached_property
    def vlm(self) -> VLM:
        """The model. Raises `ModelError` and `DeviceError`."""
        from edgevlm.vlm import VLM

        return VLM(self._conversion.model, self._conversion.runtime)

    @cached_property
    def prompt(self) -> str:
        """What is asked about each page. Raises `OptionError` for a task that the model does not know."""
        return page_prompt(self.vlm, self._conversion.task, self._conversion.prompt)

    def read(self, document: Document, job: Job) -> Row:
        """Return the row of a page, which has an `error` where it could not be read."""
        row: Row = {"line": job.line, "job": job.key, "page": job.line}
        prompt, started = self.prompt, perf_counter()
        try:
            pixels = document.page(job.line, self._conversion.dpi)
            row["size"] = [pixels.shape[1], pixels.shape[0]]
            picture = self.vlm.processor.family.page_picture(pixels, self._conversion.task)
            answer = self.vlm.generate(picture, prompt, self._conversion.config, self._conversion.image_budget)
        except ROW_ERRORS as error:
            return row | {"error": str(error)}
        finally:
            return_freed_memory()
        told = {"answer": answer.text, "finish_reason": answer.finish_reason, "tokens": answer.generated_tokens}
        return row | told | {"seconds": round(perf_counter() - started, 3)}


def page_prompt(vlm: VLM, task: str, prompt: str | None = None) -> str:
    """Return what a model is asked about a page. Raises `OptionError` for a task that it does not know."""
    if prompt is not None:
        return prompt
    prompts = page_prompts(vlm)
    if task not in prompts:
        raise OptionError(f"this model knows no task {task!r}; it knows {', '.join(prompts)}")
    return prompts[task]


def page_prompts(vlm: VLM) -> Mapping[str, str]:
    """Return what a model is asked for each task."""
    family = vlm.processor.family
    prompts = {"doclang": family.doclang_prompts, "doctags": family.doctags_prompts, None: family.page_prompts}
    return prompts[markup_of(vlm.manifest)]


def markup_of(manifest: Manifest) -> Markup | None:
    """Return what a model writes of a page, None for Markdown."""
    return next((markup for tag, markup in MARKUP.items() if tag in manifest.text_tokens), None)


def convert(
    files: Sequence[Path],
    conversion: Conversion,
    on_error: Callable[[str], object] = noop,
    on_progress: OnProgress = noop,
) -> ConvertSummary:
    """Convert files and the files of folders; `on_error` is told of each file and page that could not be read.

    Raises `OptionError`, `OutputError`, `ModelError` and `DeviceError`; what is wrong with one file harms no other.
    """
    summary, reader, digest = ConvertSummary(), PageReader(conversion), conversion.digest()
    markup = markup_of(load_manifest(find_model(conversion.model)))  # the model itself may have nothing left to read
    if markup:  # what writes Markdown may write tables in OTSL
        check_target(conversion.target, markup)
    opened: list[tuple[Document, Path, str]] = []
    for path, name in _collect(files):
        summary.files += 1
        try:
            document = open_document(path)
            opened.append((document, conversion.folder / name, _content(document)))
        except ImageError as error:
            summary.failed_files += 1
            on_error(str(error))
    total = sum(len(conversion.chosen(document)) for document, _, _ in opened)
    done = 0
    for document, stem, content in opened:
        numbers = conversion.chosen(document)
        tell = partial(_tell_progress, on_progress, done, total)
        rows = _rows(document, numbers, stem, reader, digest + content, tell)
        done += len(numbers)
        _tell_pages(document, rows, summary, on_error)
        if pages := [_page_text(row) for row in rows if "answer" in row]:
            summary.written.append(_write(document, stem, pages, conversion, markup))
    return summary


def _tell_progress(on_progress: OnProgress, before: int, total: int, count: int) -> None:
    on_progress(before + count, total)


def _collect(files: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Return each file with the name, without suffix, of its document. Raises `OptionError`."""
    found: dict[Path, Path] = {}
    for given in files:
        for path, name in _files_of(given):
            if (other := found.setdefault(name, path)) != path:
                raise OptionError(
                    f"{other} and {path} would both become {name}; convert them into folders of their own"
                )
    if not found:
        raise OptionError("there is no PDF and no picture to convert")
    return [(path, name) for name, path in found.items()]


def _files_of(given: Path) -> Iterator[tuple[Path, Path]]:
    if not given.is_dir():
        yield given, Path(given.stem or given.name)
        return
    suffixes = image_suffixes() | {".pdf"}
    for path in sorted(given.rglob("*")):
        if path.suffix.lower() in suffixes and path.is_file():
            yield path, path.relative_to(given).with_suffix("")


def _content(document: Document) -> str:
    """Return a digest of a document's file. Raises `ImageError`."""
    try:
        return hash_file(document.path)
    except OSError as error:
        raise ImageError(f"cannot read {document.path}: {error.strerror or error}") from None


def _rows(
    document: Document,
    numbers: Sequence[int],
    stem: Path,
    reader: PageReader,
    digest: str,
    on_change: Callable[[int], object],
) -> list[Row]:
    """Read the pages that are not read yet; return the rows of all, in order.

    `digest` is of all that their answers depend on besides their numbers.
    """
    output = beside(stem, ".pages.jsonl")
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    jobs = [Job(number, b"", job_key(digest, f"{number}".encode())) for number in numbers]
    rows: list[Row] = []
    queue = WorkQueue(output, jobs, rows.append)
    queue.refresh()
    on_change(queue.answered())
    if not queue.complete:
        queue.work(lambda job: reader.read(document, job), lambda: on_change(queue.answered()))
    return rows


def _tell_pages(
    document: Document, rows: Sequence[Row], summary: ConvertSummary, on_error: Callable[[str], object]
) -> None:
    """Count a document's pages, and tell of those that are not whole."""
    for row in rows:
        summary.pages += 1
        if "error" in row:
            summary.failed_pages += 1
            on_error(f"{document.path} page {row['page']}: {row['error']}")
        elif row["finish_reason"] != "stop":
            summary.cut_pages += 1
            on_error(f"{document.path} page {row['page']} may be incomplete: {why_cut(row['finish_reason'])}")


def why_cut(finish_reason: str, limit: str = "--max-new-tokens") -> str:
    """Return why a page may be incomplete; `limit` is what callers know the limit of its tokens by."""
    reasons = {"context": "the model's context is full", "repetition": "the answer had become a loop"}
    return reasons.get(finish_reason, f"{limit} was reached")


def _page_text(row: Row) -> PageText:
    return PageText(row["page"], row["answer"], tuple(row["size"]))


def _write(
    document: Document, stem: Path, pages: Sequence[PageText], conversion: Conversion, markup: Markup | None
) -> Path:
    """Write a document whole or not at all; return its path."""
    path = beside(stem, SUFFIXES[conversion.target])
    figures = Figures(beside(stem, "_artifacts"), lambda number: document.page(number, conversion.dpi))
    with writing(path):
        text = assemble(stem.name, pages, conversion.target, figures, markup)
        made = beside(path, ".part")
        try:
            made.write_text(text, encoding="utf-8", newline="\n")
            made.replace(path)
        finally:
            made.unlink(missing_ok=True)
    return path


def parse_pages(text: str) -> list[range]:
    """Return the ranges that a text such as `1-3,7,10-` names. Raises `OptionError`."""
    ranges = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            begin = int(first)
            end = int(last) if last else (2**31 if dash else begin)
        except ValueError:
            begin, end = 0, 0
        if not 1 <= begin <= end:
            raise OptionError(f"--pages takes numbers and ranges, such as 1-3,7,10-, not {text!r}")
        ranges.append(range(begin, end + 1))
    return ranges
