"""`edgevlm chat`: a conversation."""

from __future__ import annotations

from typing import Any

import click

from edgevlm.cli.help import Command
from edgevlm.cli.options import (
    chosen_model,
    generation_config,
    generation_options,
    image_budget,
    model_options,
    runtime_config,
)


@click.command(cls=Command)
@click.argument("images", nargs=-1, metavar="[IMAGE]...")
@model_options
@generation_options
@click.option("--system", help="What the model is told before the first question.")
def chat(images: tuple[str, ...], system: str | None, **options: Any) -> None:
    """Talk about the IMAGEs, question after question. Each answer reads only what is new.

    Type a question, or /image FILE, /reset, /stats, /history, /help, /exit. Lines may also come from a pipe.

    \b
    edgevlm chat photo.jpg
    edgevlm chat photo.jpg -m SmolVLM-256M-Instruct-int4 --system "Answer in one sentence."
    """
    from edgevlm.cli.progress import Progress
    from edgevlm.cli.repl import talk
    from edgevlm.inputs.image import probed_image

    generation, runtime = generation_config(options), runtime_config(options)
    pictures = [probed_image(image) for image in images]
    chosen = chosen_model(options["model"])
    with Progress() as progress:
        progress.stage("loading the model")
        from edgevlm.vlm import VLM

        vlm = VLM(chosen, runtime)
    talk(vlm.chat(generation, system, image_budget(options)), pictures)
