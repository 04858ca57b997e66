"""What a model wrote of each page, put together as one document: Markdown, HTML, JSON, DocTags or text.

DocTags and DocLang are read by docling-core, an optional dependency, which writes what becomes of them; so it does with
tables in OTSL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from PIL import Image

from edgevlm.errors import OptionError
from edgevlm.families.base import RGB
from edgevlm.jobs.doclang import crop_figures, of_words, read_doclang
from edgevlm.jobs.markdown_pages import PageText, as_document, to_doctags, to_html, to_json, to_markdown
from edgevlm.strict_json import write_json

if TYPE_CHECKING:
    from docling_core.types.doc.document import DoclingDocument
    from docling_core.types.doc.items.picture.picture import PictureItem

Markup: TypeAlias = Literal["doclang", "doctags"]
MARKUP: Mapping[str, Markup] = {"<doclang>": "doclang", "<doctag>": "doctags"}
"""What a model writes whose vocabulary has that tag."""
Target: TypeAlias = Literal["markdown", "html", "json", "doctags", "text"]
TARGETS: tuple[Target, ...] = get_args(Target)
SUFFIXES: dict[Target, str] = {
    "markdown": ".md",
    "html": ".html",
    "json": ".json",
    "doctags": ".doctags",
    "text": ".txt",
}
_FIGURE_TAGS = ("<picture>", "<chart>")


@dataclass(frozen=True)
class Figures:
    """Where figures go that are cropped from pages, and the pages."""

    folder: Path | None
    """None holds them in the document itself, as `data:` URLs."""
    page: Callable[[int], RGB]
    """Return the picture of a page."""


def assemble(
    name: str, pages: Sequence[PageText], target: Target, figures: Figures, markup: Markup | None = None
) -> str:
    """Return the document; figures are written beside it, as it refers to them. Errors as in `assembled`."""
    return assembled(name, pages, [target], figures, markup)[target]


def assembled(
    name: str,
    pages: Sequence[PageText],
    targets: Sequence[Target],
    figures: Figures | None,
    markup: Markup | None = None,
) -> dict[Target, str]:
    """Return the document as each of `targets`, its pages read once; without `figures` it has a mark in their place.

    `markup` is what the model writes, None for Markdown; pages of tables in OTSL alone count as DocTags.

    Raises `OptionError` for a target that the model's answers cannot become, and without docling-core.
    """
    is_tables = markup is None and all(page.is_otsl for page in pages)
    for target in targets:
        check_target(target, "doctags" if is_tables else markup)
    made: dict[Target, str] = {}
    if "doctags" in targets:
        made["doctags"] = to_doctags(pages) if is_tables else "\n".join(page.text.strip() for page in pages) + "\n"
    others = [target for target in targets if target != "doctags"]
    if others and (markup or is_tables):
        document = _read(name, pages, figures, markup) if markup else as_document(name, pages)
        return made | {target: _written(document, target, figures) for target in others}
    return made | {target: _of_markdown(name, pages, target) for target in others}


def check_target(target: Target, markup: Markup | None) -> None:
    """Raise `OptionError` for a target that answers in a markup cannot become, or that docling-core is missing for."""
    if target == "doctags" and markup != "doctags":
        found = "DocLang" if markup else "Markdown"
        raise OptionError(f"this model writes {found}, not DocTags; choose markdown, html, json or text")
    if markup and target != "doctags":
        _need_docling()


def _need_docling() -> None:
    if find_spec("docling_core") is None:
        raise OptionError("documents need docling-core; install it with: pip install 'edgevlm[convert]'")


def _of_markdown(name: str, pages: Sequence[PageText], target: Target) -> str:
    if any(is_table for page in pages for _, is_table in page.parts):
        _need_docling()
    if target == "json":
        return to_json(name, pages)
    return to_html(pages) if target == "html" else to_markdown(pages)


def _read(name: str, pages: Sequence[PageText], figures: Figures | None, markup: Markup) -> DoclingDocument:
    """Return pages of markup as one document, which holds no page's picture."""
    from docling_core.types.doc.document import DoclingDocument

    read = []
    for page in pages:
        document = (_of_doclang if markup == "doclang" else _of_doctags)(name, page, figures)
        for item in document.pages.values():
            item.image = None
        for index, picture in enumerate(document.pictures, 1):
            _put(picture, figures, f"page-{page.number}-figure-{index}.png")
        read.append(document)
    whole = DoclingDocument.concatenate(read)
    whole.name = name
    _number_pages(whole, [page.number for page, document in zip(pages, read, strict=True) for _ in document.pages])
    return whole


def _number_pages(document: DoclingDocument, numbers: Sequence[int]) -> None:
    """Number pages as in their file; `concatenate` counts them from 1, whichever were left out.

    A model may see a page break within a page: both parts have its number.
    """
    found = dict(zip(sorted(document.pages), numbers, strict=True))
    document.pages = {found[n]: page.model_copy(update={"page_no": found[n]}) for n, page in document.pages.items()}
    lists = (document.texts, document.tables, document.pictures, document.key_value_items, document.form_items)
    for place in (place for items in lists for item in items for place in item.prov):
        place.page_no = found[place.page_no]


def _of_doctags(name: str, page: PageText, figures: Figures | None) -> DoclingDocument:
    from docling_core.types.doc.doctags import DocTagsDocument
    from docling_core.types.doc.document import DoclingDocument

    has_figures = any(tag in page.text for tag in _FIGURE_TAGS)
    sheet = Image.fromarray(figures.page(page.number)) if figures and has_figures else Image.new("1", page.size)
    tries: tuple[list[Path | Image.Image] | None, ...] = ([sheet], None)
    for images in tries:  # without a picture no place is read, and a place may be what is wrong
        with suppress(Exception):  # docling-core's, on tags that a model has mixed up
            tags = DocTagsDocument.from_doctags_and_image_pairs([page.text], images)
            return DoclingDocument.load_from_doctags(tags, document_name=name)
    return of_words(page.text, name, page.size)


def _of_doclang(name: str, page: PageText, figures: Figures | None) -> DoclingDocument:
    document = read_doclang(page.text, name, page.size)
    if figures and document.pictures:
        crop_figures(document, Image.fromarray(figures.page(page.number)))
    return document


def _put(picture: PictureItem, figures: Figures | None, name: str) -> None:
    """Write a figure's crop to a file, and have the document refer to it, or leave it where it is."""
    crop = picture.image and picture.image.pil_image
    if figures is None or picture.image is None or not isinstance(crop, Image.Image) or 0 in crop.size:
        picture.image = None
    elif figures.folder:
        figures.folder.mkdir(parents=True, exist_ok=True)
        crop.save(figures.folder / name)
        picture.image.uri = Path(figures.folder.name, name)


def _written(document: DoclingDocument, target: Target, figures: Figures | None) -> str:
    from docling_core.types.doc.base import ImageRefMode

    if target == "json":
        return write_json(_plain(document.export_to_dict())) + "\n"
    if target == "text":
        return document.export_to_text() + "\n"
    if figures is None:
        mode = ImageRefMode.PLACEHOLDER
    else:
        mode = ImageRefMode.REFERENCED if figures.folder else ImageRefMode.EMBEDDED
    if target == "html":
        return document.export_to_html(image_mode=mode)
    return document.export_to_markdown(image_mode=mode) + "\n"


def _plain(value: Any) -> Any:
    """Return what JSON can hold of a document's dictionary, in which paths are objects."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
