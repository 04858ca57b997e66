"""No Infinity and no NaN in anything that is written as JSON, whoever made them."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgevlm import VLM, Constraint, ExportError, GenerationConfig, OptionError, OutputError
from edgevlm.decoding.output_format import OutputFormat
from edgevlm.errors import VerificationError
from edgevlm.families.base import ImageBudget
from edgevlm.jobs.jsonl import append_rows, read_rows
from edgevlm.jobs.sinks import SqliteSink
from edgevlm.jobs.spec import ask
from edgevlm.strict_json import read_json, write_json
from edgevlm_export import ExportOptions, export
from tests.helpers.command import cli

QUESTION = "What is in this picture?"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, {"a": [math.nan]}])
def test_a_number_that_is_not_finite_is_not_written(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("1e999", "1e999 is a larger number than readers of JSON can hold"),
        ('{"a": [-1.5E+400]}', "-1.5E+400 is a larger number"),
        ("9" * 5000, "99999999999999999999… is a larger number"),
        ("NaN", "NaN is not JSON"),
        ("-Infinity", "-Infinity is not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "Expecting property name"),
    ],
)
def test_what_cannot_be_kept_is_not_read(text: str, line: str) -> None:
    for each in (text, text.encode()):
        with pytest.raises(ValueError, match=line.replace("+", r"\+")):
            read_json(each)


@pytest.mark.parametrize(
    "value", [{"a": [1, -2.5, 1e308, 10**400, True, None, "Größe 🙂"]}, "half \ud83d of a pair", 0.1]
)
def test_what_is_written_is_read_again(value: object) -> None:
    for form in ({}, {"indent": 2}, {"compact": True}):
        text = write_json(value, **form)
        assert json.loads(text.encode()) == read_json(text) == value
    assert write_json({"a": "ü", "b": 1}, compact=True) == '{"a":"ü","b":1}'
    assert write_json(5e-324 / 2) == "0.0"


def form_of(text: str) -> OutputFormat:
    """Return a form of JSON that leaves the model no choice."""
    return OutputFormat(replace(Constraint.lark(f"start: {json.dumps(text)}"), is_json=True))


def test_a_row_holds_the_value_of_an_answer_or_says_why_not(vlm: VLM) -> None:
    config = GenerationConfig(max_new_tokens=200)
    assert ask(vlm, [], QUESTION, config, ImageBudget(), form_of("[1.50, 2E3]"))["value"] == [1.5, 2000]
    with pytest.raises(
        OptionError, match=r"the answer has the form, but 1e999 is a larger number .* narrow the schema"
    ):
        ask(vlm, [], QUESTION, config, ImageBudget(), form_of('{"v": 1e999}'))


def test_a_schema_holds_finite_numbers() -> None:
    for schema in ({"type": "number", "maximum": math.inf}, '{"maximum": 1e999}', '{"minimum": NaN}'):
        with pytest.raises(OptionError, match="the JSON schema is not JSON: "):
            Constraint.json_schema(schema)


def test_rows_in_a_file_are_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"id": "half \ud83d"}])
    assert [row for row, _ in read_rows(path)] == [{"id": "half \ud83d"}]
    path.write_bytes(b'{"value": Infinity}\n')
    with pytest.raises(OutputError, match="holds something other than answers"):
        read_rows(path)


def test_rows_in_a_database_are_json(tmp_path: Path) -> None:
    row = {"time": "t", "path": "p", "size": 1, "mtime_ns": 1, "job": "j", "question": "q", "value": math.inf}
    with SqliteSink(tmp_path / "a.db") as store, pytest.raises(ValueError, match="not JSON compliant"):
        store.add(row)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def test_a_checkpoint_with_infinite_facts_is_refused(idefics3: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(idefics3, tmp_path / "checkpoint")
    edit_json(folder / "preprocessor_config.json", image_mean=[math.inf, 0.5, 0.5])
    with pytest.raises(ExportError, match="holds Infinity or NaN"):
        export(folder, tmp_path / "out", ExportOptions("fp32"))
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def overflowing(idefics3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose logits are no numbers."""
    folder = shutil.copytree(idefics3, tmp_path_factory.mktemp("overflowing") / "checkpoint")
    weights = load_file(folder / "model.safetensors")
    weights["model.text_model.norm.weight"][0] = np.nan  # a norm stays as it is at every precision
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_an_export_whose_figures_are_no_numbers_is_refused(overflowing: Path, tmp_path: Path, precision: Any) -> None:
    with pytest.raises(VerificationError, match="outputs that are no numbers; nothing was written"):
        export(overflowing, tmp_path / "out", ExportOptions(precision))
    assert not (tmp_path / "out").exists()


def test_choices_that_cannot_be_rated_are_told(overflowing: Path, tmp_path: Path) -> None:
    export(overflowing, tmp_path / "out", ExportOptions("fp32", verify=False))
    arguments = ["run", QUESTION, "-m", tmp_path / "out", "--choices", "yes,no", "--json", "--no-cache"]
    result = cli(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: the model's logits are no numbers on this device")


@pytest.mark.parametrize("left", [2**20 - 100, 2**20 + 100, 3 * 2**20, 2**21])
@pytest.mark.parametrize("whole", [[], [{"id": "a"}], [{"id": "a"}, {"id": "b" * 2**21}]])
def test_a_torn_row_of_any_length_is_cut_before_the_next(
    tmp_path: Path, whole: list[dict[str, str]], left: int
) -> None:
    path = tmp_path / "answers.jsonl"
    append_rows(path, whole)
    with path.open("ab") as file:
        file.write(b'{"id": "' + b"x" * left)
    append_rows(path, [{"id": "c"}])
    assert [row for row, _ in read_rows(path)] == [*whole, {"id": "c"}]
