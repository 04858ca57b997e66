"""A page of DocLang, the markup of granite-for-docling, as a document of docling-core, places in pixels."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from docling_core.types.doc.document import DoclingDocument

_TAG = re.compile(r"<(/?)([a-z][a-z0-9_]*)[^<>]*?(/?)>")
_UNFINISHED_TAG = re.compile(r"<[^<>]*$")
_BEGINNING, _END = "<doclang", "</doclang>"


def read_doclang(text: str, name: str, size: tuple[int, int]) -> DoclingDocument:
    """Return a model's answer as a document of one page of `size`, width and height in pixels.

    Elements that the answer broke off in are closed. One that is no DocLang for all that is a document of its words.
    """
    from docling_core.transforms.deserializer.doclang import DocLangDocDeserializer
    from docling_core.types.doc.base import Size

    try:
        document = DocLangDocDeserializer().deserialize_str(closed(text), repair_unescaped_text=True)
    except ValueError:
        document = of_words(text, name, size)
    document.name = name
    for page in document.pages.values():
        across, down = size[0] / page.size.width, size[1] / page.size.height
        page.size = Size(width=size[0], height=size[1])
    for item in (*document.texts, *document.tables, *document.pictures):
        for place in item.prov:
            place.bbox = place.bbox.resize_by_scale(across, down)
    return document


def of_words(text: str, name: str, size: tuple[int, int]) -> DoclingDocument:
    """Return a document of one page with the words of an answer whose markup is broken."""
    from docling_core.types.doc.base import Size
    from docling_core.types.doc.document import DoclingDocument
    from docling_core.types.doc.labels import DocItemLabel

    document = DoclingDocument(name=name)
    document.add_page(1, Size(width=size[0], height=size[1]))
    document.add_text(DocItemLabel.TEXT, _TAG.sub(" ", text).strip())
    return document


def crop_figures(document: DoclingDocument, sheet: Image.Image) -> None:
    """Give each figure of a document of one page its part of the picture of that page."""
    from docling_core.types.doc.common.reference import ImageRef

    for picture in document.pictures:
        if picture.prov:
            box = picture.prov[0].bbox
            left, top, right, bottom = (round(each) for each in (box.l, box.t, box.r, box.b))
            if left < right and top < bottom:
                picture.image = ImageRef.from_pil(sheet.crop((left, top, right, bottom)), dpi=72)


def closed(text: str) -> str:
    """Return the DocLang in an answer, with the elements closed that it broke off in."""
    body, end, _ = text[max(text.find(_BEGINNING), 0) :].partition(_END)
    text = _UNFINISHED_TAG.sub("", body) + end
    open_tags: list[str] = []
    for end, name, empty in _TAG.findall(text):
        if end and open_tags and open_tags[-1] == name:
            open_tags.pop()
        elif not end and not empty:
            open_tags.append(name)
    return text + "".join(f"</{name}>" for name in reversed(open_tags))
