"""`edgevlm run`: one answer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevlm.cli.options import (
    chosen_format,
    chosen_model,
    generation_config,
    generation_options,
    model_options,
    output_options,
    runtime_config,
)
from edgevlm.errors import ImageError
from edgevlm.strict_json import write_json

if TYPE_CHECKING:
    from edgevlm.decoding.config import GenerationConfig
    from edgevlm.runtime.config import RuntimeConfig


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="[IMAGE]... QUESTION")
@model_options
@generation_options
@output_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming text.")
@click.option("--stats", is_flag=True, help="Print tokens, timings and memory after the answer.")
def run(arguments: tuple[str, ...], as_json: bool, stats: bool, **options: Any) -> None:
    """Answer QUESTION about the IMAGEs; without an image, just answer it. An IMAGE of - is read from stdin.

    Without -m the bundled model answers, for pictures of panels and parts alone.

    \b
    edgevlm run panel.png "Which lamp is lit?"
    edgevlm run photo.jpg "What is in this picture?" -m SmolVLM-256M-Instruct-int4
    edgevlm run before.png after.png "What has changed?" -m ./my-model
    cat photo.jpg | edgevlm run - "Describe it." --json
    edgevlm run gauge.jpg "Read the gauge." --schema reading.json
    edgevlm run door.jpg "Is the door open?" --choices yes,no
    """
    *images, question = arguments
    generation, runtime, output_format = generation_config(options), runtime_config(options), chosen_format(options)
    _check_question(question)
    asked = [_image(name) for name in images], question
    if output_format.choices:
        _rate(*asked, output_format.choices, options["model"], generation, runtime, as_json)
    else:
        generation = replace(generation, constraint=output_format.constraint)
        _answer(*asked, options["model"], generation, runtime, as_json, stats)


def _check_question(question: str) -> None:
    """Catch the likeliest slip: a picture and no question."""
    from edgevlm.inputs.image import image_suffixes
    from edgevlm.model_store import is_there

    suffix = Path(question).suffix.lower()
    names_image = suffix and len(question.split()) == 1 and suffix in image_suffixes()
    is_file = suffix and is_there(Path(question)) and Path(question).is_file()
    if question == "-" or names_image or is_file:
        raise ImageError(f"no question: {question} is an image; put the question after it, in quotes")


def _image(name: str) -> bytes | str:
    if name != "-":
        return name
    data = sys.stdin.buffer.read() if sys.stdin else b""  # None: started with stdin closed
    if not data:
        raise ImageError("no image came on stdin, where an IMAGE of - is read from")
    return data


def _rate(
    images: list[bytes | str],
    question: str,
    choices: Sequence[str],
    model: str | None,
    generation: GenerationConfig,
    runtime: RuntimeConfig,
    as_json: bool,
) -> None:
    from edgevlm.cli.output import Progress, print_scores
    from edgevlm.inputs.image import probe_image

    for image in images:
        probe_image(image)
    chosen = chosen_model(model)
    with Progress() as progress:
        progress.stage("loading the model")
        from edgevlm.vlm import VLM

        scores = VLM(chosen, runtime).score(images, question, choices, generation, progress.step)
    if as_json:
        click.echo(write_json(scores.to_dict()))
    else:
        print_scores(scores)


def _answer(
    images: list[bytes | str],
    question: str,
    model: str | None,
    generation: GenerationConfig,
    runtime: RuntimeConfig,
    as_json: bool,
    stats: bool,
) -> None:
    from edgevlm.cli.output import Progress, print_cut, print_stats
    from edgevlm.decoding.stream import check_satisfied
    from edgevlm.inputs.image import probe_image

    for image in images:  # a bad picture is told before the model is loaded
        probe_image(image)
    chosen = chosen_model(model)
    with Progress() as progress:
        progress.stage("loading the model")
        from edgevlm.vlm import VLM

        vlm = VLM(chosen, runtime)
        answer = None
        for piece in vlm.stream(images, question, generation, progress.step):
            progress.clear()
            if not as_json:
                click.echo(piece.text, nl=False)
            answer = piece.answer
    assert answer is not None
    if as_json:
        click.echo(write_json(answer.to_dict()))
    else:
        click.echo()
        if answer.satisfied is not False:
            print_cut(answer)
        if stats:
            print_stats(answer)
    check_satisfied(answer)
