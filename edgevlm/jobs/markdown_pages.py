"""Pages that a model wrote in Markdown or plain text, tables in OTSL and spotted lines among it, as one document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any

from edgevlm.jobs.page_parts import Line, has_places, read_lines, read_otsl, split_tables
from edgevlm.strict_json import write_json

if TYPE_CHECKING:
    from docling_core.types.doc.document import DoclingDocument
    from docling_core.types.doc.items.table.table import TableItem
    from docling_core.types.doc.items.table.table_data import TableData

_BREAK = "\n\n"


@dataclass(frozen=True)
class PageText:
    """What a model wrote of one page."""

    number: int
    """In its file, from 1."""
    text: str
    size: tuple[int, int]
    """Width and height of the page's picture."""

    @property
    def lines(self) -> list[Line]:
        """The lines whose places the answer tells."""
        return read_lines(self.text, self.size) if has_places(self.text) else []

    @property
    def words(self) -> str:
        """The answer without places."""
        return _BREAK.join(line.text for line in self.lines) if has_places(self.text) else self.text

    @cached_property
    def parts(self) -> list[tuple[str, bool]]:
        """Its parts in order: each, and whether it is a table in OTSL."""
        return list(split_tables(self.words))

    @property
    def is_otsl(self) -> bool:
        """Whether there is nothing but tables in OTSL."""
        parts = self.parts
        return bool(parts) and all(is_table for _, is_table in parts)


def to_markdown(pages: Sequence[PageText]) -> str:
    """Return the pages as Markdown; without tables in OTSL and places, they are as the model wrote them."""
    return _BREAK.join(_markdown(page) for page in pages) + "\n"


def to_html(pages: Sequence[PageText]) -> str:
    """Return the pages as HTML, cells of tables in OTSL merged as there."""
    from markdown_it import MarkdownIt

    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    parts = (part for page in pages for part in page.parts)
    body = "".join(
        "".join(f"{_html(text)}\n" for text, _ in group)
        if is_table
        else markdown.render(_BREAK.join(text for text, _ in group))
        for is_table, group in groupby(parts, key=lambda part: part[1])
    )
    return f'<!DOCTYPE html>\n<html>\n<head><meta charset="utf-8"></head>\n<body>\n{body}</body>\n</html>\n'


def to_json(name: str, pages: Sequence[PageText]) -> str:
    """Return the text of each page, the data of its tables in OTSL as docling-core has them, and its lines' places."""
    return write_json({"name": name, "pages": [_as_dict(page) for page in pages]}) + "\n"


def to_doctags(pages: Sequence[PageText]) -> str:
    """Return pages of tables in OTSL alone as DocTags."""
    tables = ("".join(f"<otsl>{text}</otsl>" for text, _ in page.parts) for page in pages)
    return "".join(f"<doctag>{text}</doctag>\n" for text in tables)


def as_document(name: str, pages: Sequence[PageText]) -> DoclingDocument:
    """Return the pages as a document of docling-core: tables in OTSL, and the text between them as it is."""
    from docling_core.types.doc.base import BoundingBox, Size
    from docling_core.types.doc.common.reference import ProvenanceItem
    from docling_core.types.doc.document import DoclingDocument
    from docling_core.types.doc.labels import DocItemLabel

    document = DoclingDocument(name=name)
    for page in pages:
        width, height = page.size
        document.add_page(page.number, Size(width=width, height=height))
        whole = BoundingBox(l=0, t=0, r=width, b=height)
        for text, is_table in page.parts:
            place = ProvenanceItem(page_no=page.number, bbox=whole, charspan=(0, 0 if is_table else len(text)))
            if is_table:
                document.add_table(read_otsl(text), prov=place)
            else:
                document.add_text(DocItemLabel.TEXT, text, prov=place)
    return document


def _markdown(page: PageText) -> str:
    if not has_places(page.text) and not any(is_table for _, is_table in page.parts):
        return page.text.strip()
    return _BREAK.join(_pipes(text) if is_table else text for text, is_table in page.parts)


def _as_dict(page: PageText) -> dict[str, Any]:
    found: dict[str, Any] = {"page": page.number, "text": page.text}
    if tables := [table.model_dump(mode="json") for table in _tables(page)]:
        found |= {"text": _markdown(page), "tables": tables}
    if has_places(page.text):
        found |= {"text": _markdown(page), "lines": [asdict(line) for line in page.lines]}
    return found


def _tables(page: PageText) -> Iterator[TableData]:
    return (read_otsl(text) for text, is_table in page.parts if is_table)


def _pipes(otsl: str) -> str:
    document, table = _alone(otsl)
    return str(table.export_to_markdown(document))


def _html(otsl: str) -> str:
    document, table = _alone(otsl)
    return str(table.export_to_html(document))


def _alone(otsl: str) -> tuple[DoclingDocument, TableItem]:
    from docling_core.types.doc.document import DoclingDocument

    document = DoclingDocument(name="table")
    return document, document.add_table(read_otsl(otsl))
