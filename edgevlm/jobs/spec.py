"""Jobs: what a row asks, and the row of its answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from edgevlm.calibration import CALIBRATION
from edgevlm.decoding.config import GenerationConfig, override
from edgevlm.decoding.output_format import OutputFormat
from edgevlm.errors import ImageError, IncompleteAnswerError, ModelError, OptionError, PromptError, VideoError
from edgevlm.families.base import Family, FrameSampling, ImageBudget
from edgevlm.inputs.image import Crop, Picture, load_picture, read_image
from edgevlm.inputs.video import Video, check_takes_video, probe_video, video_files
from edgevlm.manifest import hash_file
from edgevlm.model_store import MANIFEST, find_model, is_there
from edgevlm.strict_json import read_json

if TYPE_CHECKING:
    from edgevlm.vlm import VLM

ROW_ERRORS = (ImageError, PromptError, OptionError, IncompleteAnswerError)
"""Errors reported in the row; any other aborts the run."""


@dataclass(frozen=True)
class Job:
    """A row of a jobs file that is not blank."""

    line: int
    """Line number in the file, from 1."""
    data: bytes
    key: str
    """Hash of the row, the model and the defaults: equal for rows with equal answers."""


class QuestionRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of a row that asks about pictures or a video."""

    id: Any = UNSET
    image: str | list[str] | UnsetType = UNSET
    question: str | UnsetType = UNSET
    choices: list[str] | UnsetType = UNSET
    crop: Crop | UnsetType = UNSET
    video: str | UnsetType = UNSET
    fps: float | UnsetType = UNSET
    frames: int | UnsetType = UNSET

    def __post_init__(self) -> None:
        """Raise `ValueError` for fields that exclude each other, which msgspec reports as it does a wrong type."""
        if self.video is not UNSET and self.image is not UNSET:
            raise ValueError("image and video exclude each other")
        if self.video is UNSET and (self.fps is not UNSET or self.frames is not UNSET):
            raise ValueError("fps and frames are for a video, and the row has none")

    def given(self, *names: str) -> dict[str, Any]:
        """Return those of the fields that the row has."""
        return {name: value for name in names if (value := getattr(self, name)) is not UNSET}


class Row(QuestionRow, frozen=True, forbid_unknown_fields=True):
    """The fields of a row of a jobs file."""

    schema: str | dict[str, Any] | UnsetType = UNSET
    regex: str | UnsetType = UNSET
    max_new_tokens: int | UnsetType = UNSET


R = TypeVar("R", bound=QuestionRow)


@dataclass(frozen=True)
class Defaults:
    """Defaults for rows that do not override them."""

    question: str | None = None
    output_format: OutputFormat = field(default_factory=OutputFormat)
    config: GenerationConfig = field(default_factory=GenerationConfig)
    image_budget: ImageBudget = field(default_factory=ImageBudget)
    sampling: FrameSampling = field(default_factory=FrameSampling)
    """Which frames of a video are looked at."""

    def config_digest(self, model: str | None) -> str:
        """Return a digest of the model (SHA-256 of its manifest) and these defaults, part of every job's key.

        Raises `ModelError`.
        """
        folder = find_model(model)
        manifest = folder / MANIFEST
        try:
            known = hash_file(manifest)
        except FileNotFoundError:
            known = ""
        except OSError as error:
            raise ModelError(f"{manifest} cannot be read: {error.strerror or error}") from None
        options = asdict(self)
        if self.sampling == FrameSampling():
            del options["sampling"]  # the digest of outputs that are older than videos
        for name in ("think", "thinking_budget"):
            if options["config"][name] is None:
                del options["config"][name]  # that of outputs that are older than thinking
        if self.output_format.choices and is_there(folder / CALIBRATION):  # whose temperature is in the probabilities
            options["calibration"] = hash_file(folder / CALIBRATION)
        return json.dumps([known, options], sort_keys=True, default=str)


def read_jobs(path: Path, config_digest: str) -> list[Job]:
    """Return the rows of a JSON Lines file, not parsed. Raises `OptionError` if the file cannot be read."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError:
        raise OptionError(f"no such jobs file: {path}") from None
    except OSError as error:
        raise OptionError(f"cannot read the jobs file {path}: {error.strerror or error}") from None
    rows = ((number, line.strip()) for number, line in enumerate(lines, 1))
    return [Job(number, line, job_key(config_digest, line)) for number, line in rows if line]


def job_key(config_digest: str, data: bytes) -> str:
    """Return the key of a job."""
    return hashlib.sha256(config_digest.encode() + b"\0" + data).hexdigest()[:16]


class RowRunner:
    """Runs jobs on one model; a row that cannot be answered has an `error`."""

    row_type: ClassVar[type[QuestionRow]] = Row

    def __init__(self, vlm: VLM, defaults: Defaults, folder: Path) -> None:
        self._vlm, self._defaults, self._folder = vlm, defaults, folder

    def __call__(self, job: Job) -> dict[str, Any]:
        """Return the answer's row, which begins with the job's `line` and `key`."""
        row: dict[str, Any] = {"line": job.line, "job": job.key}
        try:
            task = parse_row(job.data, self.row_type)
            row |= task.given("id", "image", "crop", "video", "fps", "frames")
            return row | self._ask(task)
        except ROW_ERRORS as error:
            return row | {"error": str(error)}

    def _ask(self, task: QuestionRow) -> dict[str, Any]:
        assert isinstance(task, Row)
        question = self._defaults.question if task.question is UNSET else task.question
        if question is None:
            raise OptionError('the row has no "question", and --question gives none')
        own = task.given("schema", "choices", "regex")
        if isinstance(task.schema, str):
            own["schema"] = self._folder / task.schema
        output_format = OutputFormat.of(**own) if own else self._defaults.output_format
        config, budget = override(self._defaults.config, self._defaults.image_budget, task.given("max_new_tokens"))
        return ask(self._vlm, self._visuals(task), question, config, budget, output_format)

    def _visuals(self, task: QuestionRow) -> list[JobVisual]:
        """Return the pictures or the video of a row. Raises `ImageError` and `OptionError`."""
        if task.video is not UNSET:
            own = task.given("fps", "frames")
            sampling = FrameSampling(**own) if own else self._defaults.sampling
            return [JobVisual.of_video(self._folder / task.video, sampling, self._vlm.processor.family)]
        names = [] if task.image is UNSET else [task.image] if isinstance(task.image, str) else task.image
        if task.crop is not UNSET and len(names) != 1:
            raise OptionError(f'a row with a "crop" has one "image", not {len(names)}; give each crop a row of its own')
        visuals = [JobVisual.of_image(read_image(self._folder / name)) for name in names]
        return visuals if task.crop is UNSET else [visuals[0].cropped(task.crop)]


@dataclass(frozen=True)
class JobVisual:
    """A picture or a video of a job: the SHA-256 of its files goes into the row, its content to the model."""

    sha256: tuple[str, ...]
    """One, or for a folder of frames one for each."""
    source: bytes | Picture | Video
    """A picture is read once; of a video the path is kept, and its file may be larger than the memory."""

    @classmethod
    def of_image(cls, data: bytes) -> JobVisual:
        """Return the picture of a file's bytes, not decoded."""
        return cls((hashlib.sha256(data).hexdigest(),), data)

    @classmethod
    def decoded(cls, data: bytes) -> JobVisual:
        """Return the picture of a file's bytes, decoded. Raises `ImageError`."""
        return replace(cls.of_image(data), source=load_picture(data))

    @classmethod
    def of_video(cls, path: Path, sampling: FrameSampling, family: Family) -> JobVisual:
        """Return a video whose header is sound; no frame is decoded. Raises `ImageError` and `VideoError`."""
        check_takes_video(family)
        video = Video(path, sampling.fps, sampling.frames)
        probe_video(video)
        try:
            return cls(tuple(map(hash_file, video_files(video))), video)
        except OSError as error:
            raise VideoError(f"cannot read {video.name}: {error.strerror or error}") from None

    def cropped(self, crop: Crop) -> JobVisual:
        """Return the part of the picture in a box, decoded. Raises `ImageError`."""
        assert not isinstance(self.source, Video)
        return replace(self, source=load_picture(self.source).cropped(crop))


def ask(
    vlm: VLM,
    visuals: Sequence[JobVisual],
    question: str,
    config: GenerationConfig,
    image_budget: ImageBudget,
    output_format: OutputFormat,
) -> dict[str, Any]:
    """Answer a question about pictures or a video; return the fields of the row.

    Raises `ImageError`, `PromptError`, `OptionError` and `IncompleteAnswerError`.
    """
    started = perf_counter()
    row: dict[str, Any] = {"sha256": [sha256 for each in visuals for sha256 in each.sha256], "question": question}
    sources = [each.source for each in visuals]
    if output_format.choices:
        scores = vlm.score(sources, question, output_format.choices, config, image_budget)
        row |= {"answer": scores.best, "probabilities": {key: round(p, 6) for key, p in scores.probabilities.items()}}
        row["temperature"] = scores.temperature
    else:
        config = replace(config, constraint=output_format.constraint)
        answer = vlm.generate(sources, question, config, image_budget)
        row |= {"answer": answer.text, "finish_reason": answer.finish_reason}
        if answer.reasoning_content is not None:
            row["reasoning_content"] = answer.reasoning_content
        if output_format.constraint and output_format.constraint.is_json:
            row["value"] = _value(answer.text)
    return row | {"seconds": round(perf_counter() - started, 3)}


def _value(text: str) -> Any:
    """Parse an answer in JSON. Raises `OptionError` for numbers that a row cannot hold, such as 1e999."""
    try:
        return read_json(text)
    except ValueError as error:
        raise OptionError(
            f"the answer has the form, but {error}; narrow the schema with minimum, maximum and maxItems"
        ) from None


def parse_row(data: bytes, kind: type[R]) -> R:
    """Return a row's fields, of the right types. Raises `OptionError`."""
    try:
        return msgspec.convert(read_json(data), kind)
    except msgspec.ValidationError as error:
        raise OptionError(
            f"the row cannot be used: {error}; its fields are {', '.join(kind.__struct_fields__)}"
        ) from None
    except ValueError as error:
        raise OptionError(f"the row is not JSON that can be read: {error}") from None
