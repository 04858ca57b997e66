"""`edgevlm locate`: where something is in a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevlm.cli.help import Command, group
from edgevlm.cli.options import chosen_model, image_budget, image_options, model_options, runtime_config
from edgevlm.cli.run import read_picture
from edgevlm.errors import OutputError, one_line
from edgevlm.strict_json import write_json

if TYPE_CHECKING:
    from PIL import Image


_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@click.command(cls=Command)
@click.argument("image")
@click.argument("phrase")
@model_options
@image_options
@group(
    "Output",
    click.option("-o", "--output", type=click.Path(path_type=Path), help="Draw the places on a copy of the picture."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a line for each place."),
    click.option("--max-locations", default=20, show_default=True, help="At most this many places."),
)
def locate(image: str, phrase: str, output: Path | None, as_json: bool, max_locations: int, **options: Any) -> None:
    """Find PHRASE in the IMAGE and print where it is, in pixels. An IMAGE of - is read from stdin.

    The pixels are those of the picture turned upright. Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5 give boxes, the
    bundled model gives the point where a drawn shape is.

    \b
    edgevlm locate shapes.png "the red star"
    edgevlm locate plant.jpg "the red valve" -m ./qwen2.5-vl -o marked.png
    edgevlm locate plant.jpg "valves" -m ./qwen2.5-vl --json
    """
    from edgevlm.cli.progress import Progress

    runtime, budget = runtime_config(options), image_budget(options)
    picture = read_picture(image)  # a bad picture is told before the model is loaded, and a bad name for the copy
    if output:
        _check_output(output, image)
    model = chosen_model(options["model"])
    with Progress() as progress:
        progress.stage("loading the model")
        from edgevlm.inputs.image import load_picture
        from edgevlm.vlm import VLM

        vlm, decoded = VLM(model, runtime, wait=False), load_picture(picture)
        found = progress.follow(vlm.locate_events(decoded, phrase, None, budget, max_locations))
    if as_json:
        click.echo(write_json(found.to_dict()))
    else:
        from edgevlm.cli.output import print_locations

        print_locations(found)
    if output:
        _save(found.draw(decoded), output)


def _check_output(output: Path, image: str) -> None:
    """Raise `OutputError` for a file that no picture can be written to, or that is the picture itself."""
    if output.suffix.lower() not in _FORMATS:
        raise OutputError(f"-o takes a name that ends in {', '.join(_FORMATS)}, not {output}")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise OutputError(f"cannot write {output}: {'it is a folder' if output.is_dir() else 'no such folder'}")
    if image != "-" and output.exists() and output.samefile(image):
        raise OutputError(f"{output} is the picture itself; name another file")


def _save(marked: Image.Image, output: Path) -> None:
    """Write the picture whole or not at all."""
    draft = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with draft.open("xb") as file:
            marked.save(file, _FORMATS[output.suffix.lower()], quality=90)
        draft.replace(output)
    except (OSError, ValueError) as error:  # the latter from Pillow, for more pixels a side than a format has
        raise OutputError(f"cannot write {output}: {getattr(error, 'strerror', None) or one_line(error)}") from None
    finally:
        draft.unlink(missing_ok=True)
