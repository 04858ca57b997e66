"""What drafts save of answers to pages, replayed without a model: tokens that each step of the decoder makes.

    python -m benchmarks.page_drafts build/side_by_side/edgevlm-int4 [--draft-tokens 8]

Pages of drawn reports are written as models write them, by docling-core as DocTags and DocLang, and as Markdown with
tables in HTML or OTSL. The generator decodes each of them with its drafts, an oracle in the place of the model, first
as a page of its own and then after the pages before it. Tags are single tokens; places in DocTags are, too, or have
several, as in granite-docling's vocabulary. `stateful` and `paged` are tokens for each time that a step without drafts
takes, where drafted tokens make it as much longer as was measured (`STEP_COSTS`).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgevlm import GenerationConfig
from edgevlm.decoding.prompt_lookup import EarlierAnswers, PromptLookup
from edgevlm.decoding.sampling import TokenSelector
from edgevlm.decoding.stream import Step, stream_tokens
from edgevlm.families.base import LanguageInputs
from edgevlm.inputs.prompt import Prompt
from edgevlm.inputs.tokenizer import Tokenizer
from edgevlm.metrics import Stopwatch

SEEDS, PAGES = (1, 2), 6
"""One report for each seed, of so many pages."""
STEP_COSTS = {"stateful": 0.13, "paged": 0.03}
"""How much longer a step is for each drafted token: SmolVLM-256M's shape in INT8 and InternVL3-1B's in INT4, steps of 2
to 9 tokens, 1000 cached, on two cores with VNNI."""
Table: TypeAlias = Sequence[Sequence[str]]


@dataclass
class Sheet:
    """Where the next block of a page goes, on a grid of 500."""

    random: random.Random
    top: int = 30

    def place(self, lines: int, left: int = 60, right: int = 440) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of the next block, off by one at times, as models are."""
        left, right = (side + self.random.choice((-1, 0, 0, 0, 0, 1)) for side in (left, right))
        top = self.top + self.random.randint(5, 9)
        self.top = min(top + 9 * lines, 475)
        return left, top, right, self.top

    @property
    def full(self) -> bool:
        return self.top > 430


@dataclass
class Block:
    """One element of a page."""

    kind: str
    content: Any
    place: tuple[int, int, int, int]


def sentences() -> list[str]:
    """Return sentences of Python's language reference, which Python brings along."""
    from pydoc_data.topics import topics

    prose = re.sub(r"[*`>|\[\]\"]|\([^)]*\)", " ", " ".join(topics.values()))
    found = [re.sub(r"\s+", " ", each).strip() for each in re.split(r"(?<=[.:])\s", prose)]
    return [each for each in found if 30 < len(each) < 300 and re.fullmatch(r"[A-Z][\w ,.:'-]+", each)]


def table(rng: random.Random, words: Sequence[str], rows: int = 8, columns: int = 5) -> list[list[str]]:
    """Return the cells of a table: a row of names, then a name and numbers in each row."""
    name = lambda: " ".join(rng.sample(words, rng.randint(1, 2)))  # noqa: E731
    digits = [rng.choice(("{:.1f}", "{:.2f}", "{:.0f}")) for _ in range(columns)]
    body = [
        [name(), *(digits[column].format(rng.uniform(1, 999)) for column in range(1, columns))] for _ in range(rows - 1)
    ]
    return [[name().title() for _ in range(columns)], *body]


def report(seed: int) -> list[list[Block]]:
    """Return the blocks of a report's pages, with running headers and footers."""
    rng, prose = random.Random(seed), sentences()  # noqa: S311
    words = sorted({word for each in prose for word in re.findall(r"[a-z]{4,9}", each)})
    start = rng.randrange(len(prose))
    text = iter(prose[start:] + prose[:start])
    head = f"{next(text)[:40].strip()}, revision {rng.randint(1, 9)}"
    return [_page(rng, text, words, head, number) for number in range(1, PAGES + 1)]


def _page(rng: random.Random, text: Iterator[str], words: Sequence[str], head: str, number: int) -> list[Block]:
    sheet = Sheet(rng)
    blocks = [Block("header", head, (60, 18, 301, 26))]
    while not sheet.full:
        kind = rng.choices(("heading", "text", "list", "table", "formula"), (2, 5, 2, 1.5, 1))[0]
        if kind == "heading":
            blocks.append(Block(kind, next(text)[:30].strip(), sheet.place(1, right=rng.randint(150, 300))))
        elif kind == "text":
            words_of = " ".join(next(text) for _ in range(rng.randint(2, 5)))
            blocks.append(Block(kind, words_of, sheet.place(1 + len(words_of) // 85)))
        elif kind == "list":
            for _ in range(rng.randint(2, 5)):
                item = next(text)[:80].strip()
                blocks.append(Block(kind, item, sheet.place(1, 75, 100 + 4 * len(item))))
        elif kind == "table":
            blocks.append(Block(kind, table(rng, words), sheet.place(9)))
        else:
            a, b, n = rng.choice("abc"), rng.choice("xyz"), rng.randint(1, 9)
            blocks.append(Block(kind, rf"{a} = \frac{{{b}^2}}{{\sqrt{{{a}_{n}}}}}", sheet.place(2)))
    blocks.append(Block("footer", f"Page {number} of {PAGES}", (230, 480, 270, 488)))
    return blocks


def as_document(blocks: Sequence[Block]) -> Any:
    """Return a page as docling-core's document."""
    from docling_core.types.doc.base import BoundingBox, Size
    from docling_core.types.doc.document import DoclingDocument, ProvenanceItem, TableCell, TableData
    from docling_core.types.doc.labels import DocItemLabel

    document = DoclingDocument(name="page")
    document.add_page(1, Size(width=500, height=500))
    labels = {
        "header": DocItemLabel.PAGE_HEADER,
        "footer": DocItemLabel.PAGE_FOOTER,
        "text": DocItemLabel.TEXT,
        "formula": DocItemLabel.FORMULA,
    }
    group = None
    for block in blocks:
        left, top, right, bottom = block.place
        prov = ProvenanceItem(page_no=1, bbox=BoundingBox(l=left, t=top, r=right, b=bottom), charspan=(0, 0))
        if block.kind == "list":
            group = group or document.add_list_group()
            document.add_list_item(block.content, parent=group, prov=prov)
            continue
        group = None
        if block.kind == "heading":
            document.add_heading(block.content, level=1, prov=prov)
        elif block.kind == "table":
            cells = [
                TableCell(
                    text=text,
                    start_row_offset_idx=row,
                    end_row_offset_idx=row + 1,
                    start_col_offset_idx=column,
                    end_col_offset_idx=column + 1,
                    column_header=row == 0,
                )
                for row, texts in enumerate(block.content)
                for column, text in enumerate(texts)
            ]
            data = TableData(table_cells=cells, num_rows=len(block.content), num_cols=len(block.content[0]))
            document.add_table(data, prov=prov)
        else:
            document.add_text(labels[block.kind], block.content, prov=prov)
    return document


def as_doctags(blocks: Sequence[Block]) -> str:
    """Return a page in DocTags."""
    return str(as_document(blocks).export_to_doctags())


def as_doclang(blocks: Sequence[Block]) -> str:
    """Return a page in DocLang, without the white space that docling-core lays it out with."""
    from docling_core.transforms.serializer.doclang import DocLangDocSerializer

    text = DocLangDocSerializer(doc=as_document(blocks)).serialize().text
    return re.sub(r"<!\[CDATA\[|\]\]>", "", re.sub(r"\s*\n\s*", "", text))


def html(rows: Table) -> str:
    """Return a table in HTML."""
    return "<table>" + "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows) + "</table>"


def otsl(rows: Table) -> str:
    """Return a table in OTSL."""
    return "".join("".join(f"<fcel>{cell}" for cell in row) + "<nl>" for row in rows)


def pipes(rows: Table) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def as_markdown(blocks: Sequence[Block], write_table: Callable[[Table], str]) -> str:
    """Return a page in Markdown, but for its tables."""
    forms = {"heading": "## {}", "list": "- {}", "formula": "$${}$$"}
    return "\n\n".join(
        write_table(block.content) if block.kind == "table" else forms.get(block.kind, "{}").format(block.content)
        for block in blocks
    )


def tables(blocks: Sequence[Block], write_table: Callable[[Table], str]) -> str:
    """Return the tables of a page alone."""
    return "".join(write_table(block.content) for block in blocks if block.kind == "table")


TAG = r"</?[a-z_0-9]+/?>"
CASES: dict[str, tuple[Callable[[Sequence[Block]], str], str]] = {
    "DocTags, places of several tokens": (as_doctags, r"(?!<loc)" + TAG),
    "DocTags, places of one token": (as_doctags, TAG),
    "DocLang": (as_doclang, TAG + r'|<location value="|"/>'),
    "Markdown": (partial(as_markdown, write_table=pipes), r"(?!)"),
    "Markdown, tables in HTML": (partial(as_markdown, write_table=html), r"(?!)"),
    "Markdown, tables in OTSL": (partial(as_markdown, write_table=otsl), "<fcel>|<nl>"),
    "tables in HTML alone": (partial(tables, write_table=html), r"(?!)"),
    "tables in OTSL alone": (partial(tables, write_table=otsl), "<fcel>|<nl>"),
}
"""How pages are written, and which texts are single tokens."""


class Oracle:
    """A session that knows the answer: its logits are the token that comes next, and it counts the tokens of a step."""

    rewindable = takes_drafts = True

    def __init__(self, answer: Sequence[int]) -> None:
        self._answer, self._length = answer, 0
        self.sizes: list[int] = []

    def reuse_prefix(self, *_: Any) -> int:
        return 0

    def embed(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        return np.zeros((1, len(ids), 1), np.float32)

    def prefill(self, _: Any, rows: int, *__: Any) -> list[int]:
        return self._next(rows)

    def step(self, token_ids: Sequence[int], _: int) -> list[int]:
        return self._next(len(token_ids))

    def take_back(self, count: int) -> list[int]:
        self._length -= count
        return []

    def _next(self, rows: int) -> list[int]:
        """Return what follows each of the next tokens, the last prompt token or those of a step."""
        self.sizes.append(rows)
        start, self._length = self._length, self._length + rows
        return [self._answer[min(start + row, len(self._answer) - 1)] for row in range(rows)]


def replay(pages: Sequence[Sequence[int]], shape: Callable[[int], str], drafts: int) -> list[list[int]]:
    """Return the tokens of each step of each page, all asked the same question."""
    question = [1, 2, 3]
    inputs = LanguageInputs(np.zeros((1, len(question)), np.int64))
    prompt = Prompt(np.zeros((1, len(question), 1), np.float32), question, question, inputs, (), 0, 0, 0)
    earlier, sizes = EarlierAnswers(), []
    for page in pages:
        oracle: Any = Oracle(page)
        drafter = PromptLookup(question, drafts, shape, earlier.of(prompt))
        made = stream_tokens(oracle, prompt, TokenSelector(int), len(page), Stopwatch(), drafter)
        found = [each[0] for each in made if not isinstance(each, Step)]
        assert found == list(page)
        earlier.add(prompt, found)
        sizes.append(oracle.sizes)
    return sizes


def tokenizer_with(path: Path, texts: Sequence[str], single: str) -> Tokenizer:
    """Return a tokenizer that has the texts' own `single` texts as tokens, as an export's markup is."""
    source = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    names = sorted({name for text in texts for name in re.findall(single, text)})
    start = 1 + max(token["id"] for token in source["added_tokens"])
    start = max(start, 1 + max(source["model"]["vocab"].values()))
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    source["added_tokens"] += [{"id": start + n, "content": name, **token} for n, name in enumerate(names)]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "tokenizer.json").write_text(json.dumps(source), encoding="utf-8")
        return Tokenizer(Path(folder), names)


def measure(model: Path, drafts: int) -> list[dict[str, Any]]:
    """Return the figures of each case."""
    reports = [report(seed) for seed in SEEDS]
    rows = []
    for name, (write, single) in CASES.items():
        texts = [[text for page in pages if (text := write(page))] for pages in reports]
        tokenizer = tokenizer_with(model, [text for each in texts for text in each], single)
        answers = [[[*tokenizer.encode(text), 0] for text in pages] for pages in texts]
        alone = [sizes for pages in answers for page in pages for sizes in replay([page], tokenizer.shape, drafts)]
        after = [sizes for pages in answers for sizes in replay(pages, tokenizer.shape, drafts)]
        tokens = sum(len(page) for pages in answers for page in pages)
        figures = {"case": name, "pages": len(after), "tokens": tokens}
        for which, found in (("alone", alone), ("after others", after)):
            steps = [size for sizes in found for size in sizes]
            figures[which] = tokens / len(steps)
            for cache, cost in STEP_COSTS.items():
                figures[f"{which}, {cache}"] = tokens / sum(1 + cost * (size - 1) for size in steps)
        rows.append(figures)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="a folder with the tokenizer.json that counts")
    parser.add_argument("--draft-tokens", type=int, default=GenerationConfig().draft_tokens)
    arguments = parser.parse_args()
    rows = measure(arguments.model, arguments.draft_tokens)
    print(f"| {' | '.join(rows[0])} |")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        print(f"| {' | '.join(f'{each:.2f}' if isinstance(each, float) else str(each) for each in row.values())} |")


if __name__ == "__main__":
    main()
