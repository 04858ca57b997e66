"""Training data whose questions are partly pictures of text, against carrier sensitivity (LoMo, arXiv 2605.30265).

Half of the rows without pictures, drawn by the seed, give the middle third of a question to a picture, and a short
question whole; the answer stays as it is. Rows come out as TRL's `sft_vlm.py` reads them.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from edgevlm.errors import OptionError, OutputError
from edgevlm.evals.typeset import CHUNK, Typesetter, distorted
from edgevlm.jobs.jsonl import Row, append_rows, beside, writing
from edgevlm.jobs.work_queue import noop
from edgevlm.strict_json import read_json, write_json

Message = dict[str, Any]
_ROLES = ("system", "user", "assistant", "tool")
_FEWEST_CHUNKS = 12
"""A text of fewer words and formulas becomes a picture whole."""
_LONGEST = 3000
"""Characters of a picture; more could not be read at the size that models see it in."""
_ROWS_AT_A_TIME = 64


@dataclass(frozen=True)
class Rewriting:
    """How rows are rewritten."""

    ratio: float = 0.5
    """Share of the rows without pictures."""
    seed: int = 0
    clean: bool = False
    """Pictures are not distorted."""
    font: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise OptionError(f"ratio must be between 0 and 1, not {self.ratio}")


@dataclass
class RewriteSummary:
    """Counts of rows."""

    rows: int = 0
    rewritten: int = 0
    resumed: int = 0
    """Written by an earlier run."""
    kept: dict[str, int] = field(default_factory=dict)
    """Rows that were chosen and are text all the same, by the reason."""

    def to_dict(self) -> dict[str, Any]:
        """Return what `edgevlm carrier rewrite --json` prints."""
        return asdict(self)


class _Made(NamedTuple):
    """A row, and what is yet to be drawn for it."""

    row: Row
    picture: Path | None
    draw: Callable[[], Image.Image]
    kept: str | None


def rewrite(
    source: Path, output: Path, how: Rewriting, on_progress: Callable[[int, int], object] = noop
) -> RewriteSummary:
    """Write the rows of `source`, some rewritten, to `output`, and their pictures to a folder beside it.

    Rows are read and written one after another; those that an earlier run wrote are not written again. Raises
    `OptionError` for a row that cannot be used, before anything is written, and `OutputError` for an output of other
    rows or options.
    """
    beside(output, "")  # it has a name
    if output.resolve() == source.resolve():
        raise OptionError(f"{output} is the file of rows itself; choose another -o")
    typesetter = Typesetter(how.font)
    total = sum(1 for _ in _conversations(source))
    if not total:
        raise OptionError(f"{source} has no rows")
    summary, kept, pending = RewriteSummary(total), Counter[str](), list[_Made]()
    with closing(_written(output)) as known:
        for done, (number, conversation) in enumerate(_conversations(source)):
            made = _make(number, conversation, source, output, how, typesetter)
            summary.rewritten += made.picture is not None
            kept.update([made.kept] if made.kept else [])
            if (line := next(known, None)) is None:
                pending.append(made)
            elif line != write_json(made.row).encode():
                raise OutputError(f"{output} holds other rows, or of other options; choose another -o, or delete it")
            else:
                summary.resumed += 1
            if len(pending) == _ROWS_AT_A_TIME or done == total - 1:
                _write(output, pending)
                pending = []
            on_progress(done + 1, total)
        if next(known, None) is not None:
            raise OutputError(f"{output} holds more rows than {source}; choose another -o, or delete it")
    summary.kept = dict(kept)
    return summary


def _write(output: Path, made: list[_Made]) -> None:
    """Write the pictures, each whole or not at all, and then the rows that name them."""
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        for each in made:
            if each.picture:
                each.picture.parent.mkdir(exist_ok=True)
                draft = each.picture.with_suffix(".draft")
                with draft.open("wb") as file:
                    each.draw().convert("RGB").save(file, format="PNG")
                    file.flush()
                    os.fsync(file.fileno())
                draft.replace(each.picture)
        if made:
            append_rows(output, [each.row for each in made])


def _written(output: Path) -> Generator[bytes, None, None]:
    """Yield the whole lines of an output; what a crash left of another is overwritten by the next that is appended."""
    try:
        with output.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") or not line.strip(b"\0\n"):
                    return
                yield line[:-1]
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"cannot read {output}: {error.strerror or error}") from None


class _Conversation(NamedTuple):
    """A row, in the conversational form."""

    messages: list[Message]
    """The content of each is a list of parts."""
    images: list[str]
    others: Row
    """Fields that are passed on."""


def _conversations(source: Path) -> Iterator[tuple[int, _Conversation]]:
    """Yield the rows with their lines' numbers, from 1. Raises `OptionError`."""
    try:
        with source.open("rb") as file:
            for number, line in enumerate(file, 1):
                if text := line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip():
                    yield number, _conversation(text, f"{source}, line {number}")
    except FileNotFoundError:
        raise OptionError(f"no such file of rows: {source}") from None
    except OSError as error:
        raise OptionError(f"cannot read {source}: {error.strerror or error}") from None


def _conversation(text: bytes, where: str) -> _Conversation:
    try:
        row = read_json(text)
    except (ValueError, UnicodeDecodeError) as error:
        raise OptionError(f"{where}: not JSON that can be read: {error}") from None
    if not isinstance(row, dict) or not ("messages" in row or {"question", "answer"} <= set(row)):
        raise OptionError(f'{where}: a row has "messages", or a "question" and an "answer"')
    images = _images(row, where)
    if "messages" not in row:
        return _question(row, images, where)
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise OptionError(f'{where}: "messages" must be a list of turns')
    taken = {"messages", "image", "images", "carrier", "carried"}
    turns = [_message(each, where) for each in messages]
    if images and not any(part["type"] == "image" for turn in turns for part in turn["content"]):
        first = next((turn for turn in turns if turn["role"] == "user"), turns[0])
        first["content"] = [{"type": "image"} for _ in images] + first["content"]  # where TRL puts them, too
    shown = sum(part["type"] == "image" for turn in turns for part in turn["content"])
    if shown != len(images):
        raise OptionError(f"{where}: the messages show {shown} images, and the row has {len(images)}")
    return _Conversation(turns, images, {name: value for name, value in row.items() if name not in taken})


def _images(row: Mapping[str, Any], where: str) -> list[str]:
    given = row.get("images", row.get("image"))
    images = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(images, list) or not all(isinstance(each, str) and each for each in images):
        raise OptionError(f"{where}: images must be paths")
    return images


def _question(row: Mapping[str, Any], images: list[str], where: str) -> _Conversation:
    """Return a row of `edgevlm tune` as a conversation."""
    question, answer = row["question"], row["answer"]
    if not isinstance(question, str) or not question.strip():
        raise OptionError(f"{where}: the question must be a text")
    if "crop" in row:
        raise OptionError(f"{where}: a crop cannot be passed on; give the cropped picture")
    said = answer if isinstance(answer, str) else write_json(answer)
    asked = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    messages = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": said}]},
    ]
    return _Conversation(messages, images, {"id": row["id"]} if "id" in row else {})


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise OptionError(f"{where}: each message has a role ({', '.join(_ROLES)}) and a content")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(map(_is_part, parts)):
        raise OptionError(
            f'{where}: a content is a text, or a list of {{"type": "text"}} and {{"type": "image"}} parts'
        )
    return message | {"content": parts}


def _is_part(part: Any) -> bool:
    return isinstance(part, dict) and (
        part == {"type": "image"} or (part.get("type") == "text" and isinstance(part.get("text"), str))
    )


def _make(
    number: int, conversation: _Conversation, source: Path, output: Path, how: Rewriting, typesetter: Typesetter
) -> _Made:
    """Return a row as it is written: the last question of a chosen one has a picture."""
    random = np.random.default_rng([how.seed, number])
    messages, images, others = conversation
    row = {"images": [_moved(each, source, output) for each in images], "messages": messages, **others}
    row |= {"carrier": "text", "carried": ""}
    asked = next((at for at in reversed(range(len(messages))) if messages[at]["role"] == "user"), None)
    if images or asked is None or random.random() >= how.ratio:
        return _Made(row, None, _nothing, None)
    text = "".join(part["text"] for part in messages[asked]["content"])
    before, carried, after = thirds(text)
    if why := _why_text(carried, typesetter):
        return _Made(row, None, _nothing, why)
    content = [
        *([{"type": "text", "text": before}] if before else []),
        {"type": "image"},
        *([{"type": "text", "text": after}] if after else []),
    ]
    look = (how.seed, how.clean, how.font and how.font.name, carried)
    digest = hashlib.sha256(repr(look).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    picture = output.with_name(f"{output.stem}-pictures") / f"{number:06}-{digest}.png"
    row["images"] = [f"{picture.parent.name}/{picture.name}"]
    row["messages"] = [*messages[:asked], messages[asked] | {"content": content}, *messages[asked + 1 :]]
    row |= {"carrier": "half" if before else "picture", "carried": carried}

    def draw() -> Image.Image:
        sheet = typesetter.sheet(carried, random)
        return sheet if how.clean else distorted(sheet, random)

    return _Made(row, picture, draw, None)


def _why_text(carried: str, typesetter: Typesetter) -> str | None:
    """Return why a question stays text, None where a picture can carry it."""
    if not carried:
        return "the question is empty"
    if len(carried) > _LONGEST:
        return f"more than {_LONGEST} characters for a picture"
    return typesetter.why_not(carried)


def thirds(text: str) -> tuple[str, str, str]:
    """Return a text before, in and after its middle third, formulas whole; of a short one all is in the middle."""
    count = sum(1 for _ in CHUNK.finditer(text))
    if count < _FEWEST_CHUNKS:
        start, end = 0, len(text) if count else 0
    else:
        spans = list(islice(CHUNK.finditer(text), count // 3, count - count // 3))
        start, end = spans[0].start(), spans[-1].end()
    return text[:start], text[start:end], text[end:]


def _moved(image: str, source: Path, output: Path) -> str:
    """Return a picture's path, which is relative to its row's file, for the output."""
    if "://" in image or Path(image).is_absolute():
        return image
    try:
        return Path(os.path.relpath(source.parent / image, output.parent)).as_posix()
    except ValueError:  # on another drive of Windows
        return (source.parent / image).resolve().as_posix()


def _nothing() -> Image.Image:
    raise AssertionError
