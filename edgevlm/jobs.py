"""One row of work: pictures, a question, the form of its answer; and the row that comes of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from edgevlm.errors import ImageError, IncompleteAnswerError, ModelError, OptionError, PromptError
from edgevlm.form import Form
from edgevlm.generate import GenerationConfig, whole
from edgevlm.image import read_image
from edgevlm.manifest import hash_file
from edgevlm.paths import MANIFEST, find_model
from edgevlm.strict_json import read_json

if TYPE_CHECKING:
    from edgevlm.model import VLM

ROW_ERRORS = (ImageError, PromptError, OptionError, IncompleteAnswerError)
"""What a row may have wrong with it; anything else concerns them all."""
_FIELDS = {"id", "image", "question", "schema", "choices", "regex", "max_new_tokens"}


@dataclass(frozen=True)
class Job:
    """A row of a jobs file that is not blank."""

    line: int
    """Where it is in the file, from 1."""
    data: bytes
    key: str
    """Names what is asked of which model: rows that would be answered alike have the same."""


@dataclass(frozen=True)
class Defaults:
    """What holds for rows that do not say otherwise."""

    question: str | None = None
    form: Form = field(default_factory=Form)
    config: GenerationConfig = field(default_factory=GenerationConfig)

    def salt(self, model: str | None) -> str:
        """Return what all rows' keys share: the model's manifest, by its SHA-256, and these defaults.

        Raises `ModelError`.
        """
        manifest = find_model(model) / MANIFEST
        try:
            known = hash_file(manifest)
        except FileNotFoundError:
            known = ""
        except OSError as error:
            raise ModelError(f"{manifest} cannot be read: {error.strerror or error}") from None
        return json.dumps([known, asdict(self)], sort_keys=True, default=str)


def read_jobs(path: Path, salt: str) -> list[Job]:
    """Return the rows of a JSON Lines file, whatever is in them. Raises `OptionError` if it cannot be read."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError:
        raise OptionError(f"no such jobs file: {path}") from None
    except OSError as error:
        raise OptionError(f"cannot read the jobs file {path}: {error.strerror or error}") from None
    rows = ((number, line.strip()) for number, line in enumerate(lines, 1))
    return [Job(number, line, job_key(salt, line)) for number, line in rows if line]


def job_key(salt: str, data: bytes) -> str:
    """Return the name of a job."""
    return hashlib.sha256(salt.encode() + b"\0" + data).hexdigest()[:16]


class Asker:
    """Answers jobs with one model; a row that cannot be answered says why under `error`."""

    def __init__(self, vlm: VLM, defaults: Defaults, folder: Path) -> None:
        self._vlm, self._defaults, self._folder = vlm, defaults, folder

    def __call__(self, job: Job) -> dict[str, Any]:
        """Return the answer's row, which begins with the job's `line` and `key`."""
        row: dict[str, Any] = {"line": job.line, "job": job.key}
        try:
            task = _parse(job.data)
            row |= {name: task[name] for name in ("id", "image") if name in task}
            return row | self._ask(task)
        except ROW_ERRORS as error:
            return row | {"error": str(error)}

    def _ask(self, task: Mapping[str, Any]) -> dict[str, Any]:
        question = task.get("question", self._defaults.question)
        if question is None:
            raise OptionError('the row has no "question", and --question gives none')
        own = {name: task[name] for name in ("schema", "choices", "regex") if task.get(name) is not None}
        if isinstance(own.get("schema"), str):
            own["schema"] = self._folder / own["schema"]
        form = Form.of(**own) if own else self._defaults.form
        config = self._defaults.config
        if "max_new_tokens" in task:
            config = replace(config, max_new_tokens=task["max_new_tokens"])
        image = task.get("image", [])
        images = [read_image(self._folder / name) for name in ([image] if isinstance(image, str) else image)]
        return ask(self._vlm, images, question, config, form)


def ask(vlm: VLM, images: list[bytes], question: str, config: GenerationConfig, form: Form) -> dict[str, Any]:
    """Return what a model makes of pictures, given as the bytes of their files, as fields of a row.

    Raises `ImageError`, `PromptError`, `OptionError` and `IncompleteAnswerError`.
    """
    started = perf_counter()
    row: dict[str, Any] = {"sha256": [hashlib.sha256(data).hexdigest() for data in images], "question": question}
    if form.choices:
        scores = vlm.score(images, question, form.choices, config)
        row |= {"answer": scores.best, "probabilities": {key: round(p, 6) for key, p in scores.probabilities.items()}}
    else:
        answer = whole(vlm.stream(images, question, replace(config, constraint=form.constraint)))
        row |= {"answer": answer.text, "finish_reason": answer.finish_reason}
        if form.constraint and form.constraint.is_json:
            row["value"] = _value(answer.text)
    return row | {"seconds": round(perf_counter() - started, 3)}


def _value(text: str) -> Any:
    """Return what an answer in JSON says. Raises `OptionError` for numbers that a row cannot hold, such as 1e999."""
    try:
        return read_json(text)
    except ValueError as error:
        raise OptionError(
            f"the answer has the form, but {error}; narrow the schema with minimum, maximum and maxItems"
        ) from None


def _parse(data: bytes) -> dict[str, Any]:
    """Return a row's fields, of the right types. Raises `OptionError`."""
    try:
        task = read_json(data)
    except ValueError as error:
        raise OptionError(f"the row is not JSON that can be read: {error}") from None
    if not isinstance(task, dict):
        raise OptionError('the row is not a JSON object; write {"image": …, "question": …}')
    unknown = sorted(task.keys() - _FIELDS)
    if unknown:
        raise OptionError(f"the row has an unknown field {unknown[0]!r}; known are {', '.join(sorted(_FIELDS))}")
    wrong = [name for name, fits in _TYPES.items() if name in task and not fits(task[name])]
    if wrong:
        raise OptionError(f"the row's {wrong[0]!r} is of the wrong type")
    return task


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "image": lambda value: isinstance(value, str) or _texts(value),
    "question": lambda value: isinstance(value, str),
    "schema": lambda value: isinstance(value, str | dict),
    "choices": _texts,
    "regex": lambda value: isinstance(value, str),
    "max_new_tokens": lambda value: isinstance(value, int) and not isinstance(value, bool),
}
