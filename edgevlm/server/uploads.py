"""The requests of docling-serve's API, a form or JSON, and its answers: a document, and what becomes of it.

Each field is honoured, refused by its name, or has no effect, which the answer tells in `ignored`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from edgevlm.inputs.image import printable
from edgevlm.jobs.convert import MAX_NEW_TOKENS
from edgevlm.jobs.documents import Target
from edgevlm.server.errors import FORM_PATH, ApiError
from edgevlm.server.refusals import explain
from edgevlm.server.schemas import Shape

_SLICE = 2**16
"""Bytes of a form that are parsed before other requests have their turn."""
_MOST_FIELDS = 200
TARGETS: dict[str, Target] = {"md": "markdown", "json": "json", "html": "html", "text": "text", "doctags": "doctags"}
"""Formats in docling's words, and in those of `edgevlm convert`."""


def _split(value: object) -> object:
    """Return the items of a list, which a form may have as one text."""
    items = value if isinstance(value, list) else [value]
    split = [re.split(r"[;,]\s*", item.strip()) if isinstance(item, str) else [item] for item in items]
    return [part for parts in split for part in parts]


def _in_order(pages: list[int]) -> list[int]:
    if len(pages) != 2 or not 1 <= pages[0] <= pages[1]:
        raise PydanticCustomError("page_range", "must be the first and the last page, from 1")
    return pages


def _off(value: bool) -> bool:
    if value:
        raise PydanticCustomError("unsupported", "is not made here; leave it out, or say false")
    return value


def _inbody(value: str) -> str:
    if value != "inbody":  # docling's client then asks again, for the body
        text = "needs artifact storage to be configured, and this server has none; input should be inbody"
        raise PydanticCustomError("unsupported", text)
    return value


Off: TypeAlias = Annotated[bool | None, AfterValidator(_off)]
"""What docling-serve makes when it is true, and this server does not."""
NoEffect: TypeAlias = Any
"""What tunes docling's pipeline of several models; here one model reads the page."""


class ConvertOptions(Shape):
    """What becomes of a document; docling-serve's fields, and `model`, `task`, `prompt` and `max_tokens`."""

    model_config = ConfigDict(strict=False)
    to_formats: (
        Annotated[list[Literal["md", "json", "html", "text", "doctags"]], BeforeValidator(_split), Field(min_length=1)]
        | None
    ) = None
    """Markdown alone, if left out."""
    image_export_mode: Literal["placeholder", "embedded"] = "placeholder"
    include_images: bool = True
    """False leaves a mark in the place of each picture, whatever `image_export_mode` is."""
    page_range: Annotated[list[int], BeforeValidator(_split), AfterValidator(_in_order)] | None = None
    """First and last page that is read, from 1; all, if left out."""
    document_timeout: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Seconds after which no further page is read; the server's own limit holds all the same."""
    target_type: Annotated[str, AfterValidator(_inbody)] = "inbody"
    """Into the answer; nothing else is possible."""

    model: str | None = None
    task: str = "page"
    """What a page is, as `edgevlm convert --task` has it."""
    prompt: str | None = Field(None, min_length=1)
    """Asked about each page instead of the task's prompt."""
    max_tokens: int = Field(MAX_NEW_TOKENS, ge=1, le=2**20)
    """Of a page's answer."""

    from_formats: NoEffect = None
    pipeline: NoEffect = None
    do_ocr: NoEffect = None
    force_ocr: NoEffect = None
    ocr_engine: NoEffect = None
    ocr_lang: NoEffect = None
    ocr_preset: NoEffect = None
    ocr_custom_config: NoEffect = None
    pdf_backend: NoEffect = None
    table_mode: NoEffect = None
    table_cell_matching: NoEffect = None
    table_structure_preset: NoEffect = None
    do_table_structure: NoEffect = None
    layout_preset: NoEffect = None
    images_scale: NoEffect = None
    picture_description_area_threshold: NoEffect = None

    abort_on_error: Off = None
    include_page_images: Off = None
    do_code_enrichment: Off = None
    do_formula_enrichment: Off = None
    do_picture_classification: Off = None
    do_picture_description: Off = None
    do_chart_extraction: Off = None
    do_pdf_heading_hierarchy: Off = None
    md_compact_tables: Off = None
    md_page_break_placeholder: Literal[""] | None = None

    @property
    def ignored(self) -> list[str]:
        """Fields of the request that have no effect."""
        fields = type(self).model_fields.items()
        return [name for name, each in fields if each.annotation is NoEffect and getattr(self, name) is not None]

    @property
    def targets(self) -> list[Target]:
        """What is asked for, in the words of `edgevlm convert`."""
        return [TARGETS[name] for name in dict.fromkeys(self.to_formats or ["md"])]

    @property
    def pages(self) -> tuple[int, int]:
        """First and last page that is read."""
        first, last = self.page_range or (1, sys.maxsize)
        return first, last


class FileSource(Shape):
    """A document in base64."""

    kind: Literal["file"]
    base64_string: str
    filename: str


class HttpSource(Shape):
    """A document at a URL, which is refused: the server fetches nothing."""

    kind: Literal["http"]
    url: str
    headers: dict[str, Any] | None = None


class ConvertTarget(Shape):
    """Where the document goes: into the answer."""

    kind: Annotated[str, AfterValidator(_inbody)]


class ConvertRequest(Shape):
    """A document, and what becomes of it."""

    sources: list[Annotated[FileSource | HttpSource, Field(discriminator="kind")]]
    """One."""
    options: ConvertOptions = Field(default_factory=lambda: ConvertOptions.model_validate({}))
    target: ConvertTarget | None = None


class ConvertError(BaseModel):
    """What went wrong with a document, or with a page of it."""

    component_type: str
    module_name: str
    error_message: str
    category: str
    page_no: int | None


class ConvertedDocument(BaseModel):
    """The document in each of the formats that were asked for; null in the others."""

    filename: str
    md_content: str | None = None
    json_content: dict[str, Any] | None = None
    html_content: str | None = None
    text_content: str | None = None
    doctags_content: str | None = None


class ConvertAnswer(BaseModel):
    """A document, converted."""

    document: ConvertedDocument
    status: str
    """`success`; `partial_success` where pages are missing or may be incomplete; `failure` where none was read."""
    errors: list[ConvertError]
    processing_time: float
    """Seconds, waiting included."""
    timings: dict[str, Any]
    """Empty: docling-serve has those of its pipeline here."""
    ignored: list[str]
    """Fields of the request that have no effect."""


@dataclass(frozen=True)
class Upload:
    """A document, and what becomes of it."""

    name: str
    data: bytes
    options: ConvertOptions


def form_schema() -> dict[str, Any]:
    """Return what OpenAPI tells of the form."""
    schema = ConvertOptions.model_json_schema()
    file = {"type": "string", "format": "binary", "description": "A PDF, a TIFF of many pages, or a picture; one."}
    form = {**schema, "properties": {"files": file, **schema["properties"]}, "required": ["files"]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}}}


class _Parser(MultiPartParser):
    """Starlette's, which keeps files in memory: the request's size is bounded already."""

    spool_max_size = sys.maxsize

    def close(self) -> None:
        """Close all files, also one whose part of the form has no end, which is in no form."""
        for file in self._files_to_close_on_error:
            file.close()


async def read_form(request: Request) -> Upload:
    """Return the document and the options of a form. Raises `ApiError`."""
    parser = _Parser(request.headers, _slices(request), max_files=2, max_fields=_MOST_FIELDS)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, "invalid_request", f"the form cannot be read: {error.message}") from None
    try:
        files = [each for each in form.getlist("files") if isinstance(each, UploadFile)]
        if len(files) != 1:
            raise _not_one("files", len(files))
        return Upload(_base_name(files[0].filename), await files[0].read(), _options(form))
    finally:
        parser.close()


def _options(form: FormData) -> ConvertOptions:
    fields = {name: (form.getlist(name) if len(form.getlist(name)) > 1 else form[name]) for name in form}
    del fields["files"]
    try:
        return ConvertOptions.model_validate(fields)
    except ValidationError as problem:
        wrong = problem.errors(include_url=False)[0]
        told = {**wrong, "loc": ("body", *wrong["loc"])}
    raise explain(told, fields, FORM_PATH)


async def _slices(request: Request) -> AsyncGenerator[bytes, None]:
    """Yield a body in small pieces, so that the event loop turns to other requests between them."""
    async for chunk in request.stream():
        for start in range(0, len(chunk), _SLICE):
            yield chunk[start : start + _SLICE]
            await asyncio.sleep(0)


def read_source(request: ConvertRequest) -> Upload:
    """Return the document of a request in JSON. Raises `ApiError`."""
    if len(request.sources) != 1:
        raise _not_one("sources", len(request.sources))
    [source] = request.sources
    if isinstance(source, HttpSource):
        message = 'sources.0.url: this server fetches no URL; send the document itself, in a source of the kind "file"'
        raise ApiError(400, "remote_source_refused", message, param="sources.0.url")
    try:
        data = base64.b64decode("".join(source.base64_string.split()), validate=True)
    except (binascii.Error, ValueError):
        param = "sources.0.base64_string"
        raise ApiError(400, "invalid_request", f"{param}: is not valid base64", param=param) from None
    return Upload(_base_name(source.filename), data, request.options)


def _not_one(param: str, count: int) -> ApiError:
    if not count:
        return ApiError(400, "invalid_request", f"{param}: is missing; send one document", param=param)
    message = f"{param}: a request is about one document; send each of several in a request of its own"
    return ApiError(400, "too_many_documents", message, param=param)


def _base_name(name: str | None) -> str:
    """Return a file's name without folders: some clients send a path of their own."""
    return printable(re.split(r"[/\\]", name or "")[-1] or "document")
