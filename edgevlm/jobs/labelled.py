"""Labelled rows: questions whose right choices a user knows, scored resumably as a batch is answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

from msgspec import UNSET

from edgevlm.decoding.output_format import OutputFormat
from edgevlm.decoding.scoring import YES_NO
from edgevlm.decoding.structured import check_choices
from edgevlm.errors import ImageError, OptionError
from edgevlm.inputs.image import printable
from edgevlm.jobs.batch import Batch
from edgevlm.jobs.spec import Defaults, Job, QuestionRow, RowRunner, parse_row, read_jobs
from edgevlm.model_store import is_there

_TOLD = 8
"""Lines of wrong rows that an error names after the first."""


class LabelledRow(QuestionRow, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fields of a row: a question as in a row of `edgevlm batch`, its choices, and what is right."""

    label: bool | str | list[str]
    """Whether the first of two choices is right, the right one of several, or those of several labels that apply."""


@dataclass(frozen=True)
class LabelledQuestion:
    """What is asked in a labelled row."""

    question: str
    choices: Sequence[str]
    label: bool | str | list[str]
    about: str
    """The names of its pictures or of its video; empty for a question about none."""

    @classmethod
    def of(cls, row: LabelledRow, defaults: Defaults) -> LabelledQuestion:
        """Return the question of a row. Raises `OptionError`."""
        question = defaults.question if row.question is UNSET else row.question
        if question is None:
            raise OptionError('the row has no "question", and --question gives none')
        given = defaults.output_format.choices if row.choices is UNSET else row.choices
        choices = given or (YES_NO if isinstance(row.label, bool) else ())
        if not choices:
            raise OptionError('the row has no "choices", and --choices gives none')
        check_choices(choices)
        _check_label(row.label, choices)
        return cls(question, choices, row.label, " ".join(_names(row)) or ("" if row.video is UNSET else row.video))

    @property
    def right(self) -> list[str]:
        """The right choice of each decision; a label that is a list makes one, of two, for each choice."""
        if isinstance(self.label, list):
            return [YES_NO[choice not in self.label] for choice in self.choices]
        return [self.choices[not self.label] if isinstance(self.label, bool) else self.label]


def _check_label(label: bool | str | list[str], choices: Sequence[str]) -> None:
    if isinstance(label, bool):
        if len(choices) != 2:
            raise OptionError(f"a label of true or false needs two choices, what is true first, not {len(choices)}")
        return
    labels = [label] if isinstance(label, str) else label
    if unknown := [each for each in labels if each not in choices]:
        raise OptionError(f"the label {unknown[0]!r} is none of the choices: {', '.join(choices)}")
    if len(set(labels)) < len(labels):
        raise OptionError("the labels must differ from one another")


class LabelledRunner(RowRunner):
    """Scores labelled rows, by the model's own log-likelihoods."""

    row_type: ClassVar[type[QuestionRow]] = LabelledRow

    def _ask(self, task: QuestionRow) -> dict[str, Any]:
        assert isinstance(task, LabelledRow)
        asked, started = LabelledQuestion.of(task, self._defaults), perf_counter()
        visuals = self._visuals(task)
        score = self._vlm.score_labels if isinstance(asked.label, list) else self._vlm.score
        scores = score(
            [each.source for each in visuals],
            asked.question,
            asked.choices,
            self._defaults.config,
            self._defaults.image_budget,
            calibration_temperature=1.0,
        )
        return {
            "sha256": [sha256 for each in visuals for sha256 in each.sha256],
            "question": asked.question,
            "label": asked.label,
            "log_likelihoods": dict(scores.log_likelihoods),
            "seconds": round(perf_counter() - started, 3),
        }


class LabelledBatch(Batch):
    """A batch of labelled rows; its output has the log-likelihoods of their choices."""

    def read(self) -> list[Job]:
        """Return the rows as jobs, checked. Raises `OptionError`, which names the lines, and `ModelNotFoundError`."""
        # The choices are a part of the key, but not the calibration that is there: it is what is to be fitted.
        without = replace(self.defaults, output_format=OutputFormat())
        choices = json.dumps(["labelled", *self.defaults.output_format.choices])
        jobs = read_jobs(self.jobs, without.config_digest(self.model) + choices)
        self._questions(jobs)
        return jobs

    def questions(self) -> list[LabelledQuestion]:
        """Return what the rows ask. Raises `OptionError`."""
        return self._questions(read_jobs(self.jobs, ""))

    def runner(self) -> LabelledRunner:
        """Load the model. Raises `ModelError` and `DeviceError`."""
        from edgevlm.vlm import VLM

        return LabelledRunner(VLM(self.model, self.runtime), self.defaults, self.jobs.parent)

    def _questions(self, jobs: Sequence[Job]) -> list[LabelledQuestion]:
        found = []
        wrong: dict[int, str] = {}
        for job in jobs:
            try:
                row = parse_row(job.data, LabelledRow)
                found.append(LabelledQuestion.of(row, self.defaults))
                _check_pictures(row, self.jobs.parent)
            except (OptionError, ImageError) as error:
                wrong[job.line] = str(error)
        if wrong:
            first, *others = wrong
            lines = ", ".join(map(str, others[:_TOLD])) + (", …" if len(others) > _TOLD else "")
            more = f"; {len(others)} more cannot be used: line{'s' * (len(others) > 1)} {lines}" if others else ""
            raise OptionError(f"{self.jobs}, line {first}: {wrong[first]}{more}")
        return found


def _check_pictures(row: LabelledRow, folder: Path) -> None:
    """Raise `ImageError` for a picture that is not there."""
    for name in _names(row):
        if not (is_there(folder / name) and (folder / name).is_file()):
            raise ImageError(f"no such image file: {printable(name)}")


def _names(row: LabelledRow) -> list[str]:
    return [] if row.image is UNSET else [row.image] if isinstance(row.image, str) else row.image
