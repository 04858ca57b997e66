"""`edgevlm run`: one answer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevlm.cli.help import Command, group
from edgevlm.cli.options import (
    chosen_format,
    chosen_model,
    frame_sampling,
    generation_config,
    generation_options,
    image_budget,
    model_options,
    output_options,
    runtime_config,
    video_options,
)
from edgevlm.errors import ImageError, OptionError
from edgevlm.strict_json import write_json

if TYPE_CHECKING:
    from edgevlm.cli.progress import Progress
    from edgevlm.decoding.config import GenerationConfig
    from edgevlm.families.base import FrameSampling, ImageBudget
    from edgevlm.inputs.image import ImageFile
    from edgevlm.inputs.video import Video
    from edgevlm.runtime.config import RuntimeConfig
    from edgevlm.vlm import VLM


@click.command(cls=Command)
@click.argument("arguments", nargs=-1, required=True, metavar="[IMAGE]... QUESTION")
@model_options
@generation_options
@video_options
@output_options
@group(
    "Output",
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming text."),
    click.option("--stats", is_flag=True, help="Print tokens, timings and memory after the answer."),
)
def run(arguments: tuple[str, ...], as_json: bool, stats: bool, **options: Any) -> None:
    """Answer QUESTION about the IMAGEs; without an image, just answer it. An IMAGE of - is read from stdin.

    An IMAGE may be a video, or a folder of its frames. With --fps or --frames a GIF and stdin are videos, too.

    Without -m the bundled model answers, for pictures of panels and parts alone.

    \b
    edgevlm run panel.png "Which lamp is lit?"
    edgevlm run photo.jpg "What is in this picture?" -m SmolVLM-256M-Instruct-int4
    edgevlm run clip.mp4 "What happens?" --frames 8 -m ./my-qwen3-vl
    edgevlm run before.png after.png "What has changed?" -m ./my-model
    cat photo.jpg | edgevlm run - "Describe it." --json
    edgevlm run gauge.jpg "Read the gauge." --schema reading.json
    edgevlm run door.jpg "Is the door open?" --choices yes,no
    """
    from edgevlm.families.base import FrameSampling
    from edgevlm.inputs.video import Video

    *images, question = arguments
    output_format, generation = chosen_format(options), generation_config(options)
    generation, budget = replace(generation, constraint=output_format.constraint), image_budget(options)
    runtime = runtime_config(options)
    _check_question(question)
    sampling = frame_sampling(options)
    pictures = [_input(name, sampling) for name in images]  # a bad picture is told before the model is loaded
    if sampling != FrameSampling() and not any(isinstance(each, Video) for each in pictures):
        raise OptionError("--fps and --frames are for a video, and none is given")
    request = _Request(question, chosen_model(options["model"]), runtime, generation, budget)
    if output_format.choices:
        _score(pictures, request, output_format.choices, as_json)
    else:
        _answer(pictures, request, as_json, stats)


@dataclass(frozen=True)
class _Request:
    """What is asked of which model, but for the pictures."""

    question: str
    model: str | Path
    runtime: RuntimeConfig
    generation: GenerationConfig
    image_budget: ImageBudget


def _check_question(question: str) -> None:
    """Catch the likeliest slip: a picture and no question."""
    from edgevlm.inputs.image import image_suffixes
    from edgevlm.inputs.video import names_video
    from edgevlm.model_store import is_there

    suffix = Path(question).suffix.lower()
    names_image = suffix and len(question.split()) == 1 and (suffix in image_suffixes() or names_video(question))
    is_file = suffix and is_there(Path(question)) and Path(question).is_file()
    if question == "-" or names_image or is_file:
        raise ImageError(f"no question: {question} is an image; put the question after it, in quotes")


def _input(name: str, sampling: FrameSampling) -> ImageFile | Video:
    """Return a picture or a video whose header is sound."""
    from edgevlm.families.base import FrameSampling
    from edgevlm.inputs.video import Video, is_folder, names_video, probe_video

    said_so = sampling != FrameSampling() and (name == "-" or name.lower().endswith(".gif"))
    if said_so or names_video(name) or is_folder(name):
        video = Video(_stdin("the video") if name == "-" else name, sampling.fps, sampling.frames)
        probe_video(video)
        return video
    return read_picture(name)


def read_picture(name: str) -> ImageFile:
    """Return a picture's file, or that which comes on stdin for -, its header checked. Raises `ImageError`."""
    from edgevlm.inputs.image import probe_image, probed_image

    if name != "-":
        return probed_image(name)
    file = _stdin("the image")
    probe_image(file)
    return file


def _stdin(called: str) -> ImageFile:
    from edgevlm.inputs.image import ImageFile

    data = sys.stdin.buffer.read() if sys.stdin else b""  # None: started with stdin closed
    if not data:
        raise ImageError("no image came on stdin, where an IMAGE of - is read from")
    return ImageFile(data, called)


def _load(request: _Request, progress: Progress) -> VLM:
    progress.stage("loading the model")
    from edgevlm.vlm import VLM

    return VLM(request.model, request.runtime, wait=False)


def _score(images: list[ImageFile | Video], request: _Request, choices: Sequence[str], as_json: bool) -> None:
    from edgevlm.cli.progress import Progress

    with Progress() as progress:
        vlm = _load(request, progress)
        scores = progress.follow(
            vlm.score_events(images, request.question, choices, request.generation, request.image_budget)
        )
    if as_json:
        click.echo(write_json(scores.to_dict()))
    else:
        from edgevlm.cli.output import print_scores

        print_scores(scores)


def _answer(images: list[ImageFile | Video], request: _Request, as_json: bool, stats: bool) -> None:
    from edgevlm.answer import Piece
    from edgevlm.cli.progress import AnswerPrinter, Progress, print_cut
    from edgevlm.decoding.stream import check_satisfied
    from edgevlm.inputs.messages import user_message
    from edgevlm.inputs.video import kinds_of

    with Progress() as progress:
        vlm = _load(request, progress)
        answer, printer = None, AnswerPrinter()
        messages = [user_message(request.question, kinds_of(images))]
        for event in vlm.events(messages, images, request.generation, request.image_budget):
            progress.show(event)
            if isinstance(event, Piece):
                if not as_json:
                    printer.show(event)
                answer = event.answer
    assert answer is not None
    if as_json:
        click.echo(write_json(answer.to_dict()))
    else:
        click.echo()
        if answer.satisfied is not False:
            print_cut(answer)
        if stats:
            from edgevlm.cli.output import print_stats

            print_stats(answer)
    check_satisfied(answer)
