"""`edgevlm carrier`: training data for models that read less from a picture of a text than from the text."""

from __future__ import annotations

from pathlib import Path

import click

from edgevlm.cli.help import Command, group
from edgevlm.strict_json import write_json


@click.group()
def carrier() -> None:
    """Prepare training data for models that understand a text less when a picture carries it.

    How much a model loses tells the suite carrier of edgevlm eval.

    \b
    edgevlm carrier rewrite train.jsonl -o carried.jsonl
    """


@carrier.command(cls=Command, short_help="Rewrite text questions, partly as pictures of text.")
@click.argument("rows", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="JSON Lines file of rows.")
@click.option("--ratio", default=0.5, show_default=True, help="Share of the rows without pictures that get one.")
@click.option("--seed", default=0, show_default=True, help="Which rows, and how their pictures look.")
@click.option("--clean", is_flag=True, help="Do not turn, blur, stain, shadow or wave the pictures.")
@click.option("--font", type=click.Path(path_type=Path), help="TrueType or OpenType file to draw in.")
@group("Output", click.option("--json", "as_json", is_flag=True, help="Print the counts as one JSON object."))
def rewrite(rows: Path, output: Path, ratio: float, seed: int, clean: bool, font: Path | None, as_json: bool) -> None:
    """Rewrite text questions of ROWS so that a picture carries the middle third, and of short ones all.

    A row has messages, as in Hugging Face chats, or a question and an answer, as for edgevlm tune. Rows come out with
    images and messages, which TRL's sft_vlm.py reads, and with what the picture says; pictures lie in a folder beside
    them, and their paths are relative to the file. Answers stay as they are, and so do rows that have pictures.
    Formulas between $ signs and letters beyond ASCII need pip install 'edgevlm[report]', or --font a file
    that has the letters.

    The same seed makes the same rows. Killed or run again, it goes on where it was. Nothing is written where a row
    cannot be used.

    \b
    edgevlm carrier rewrite train.jsonl -o carried.jsonl
    edgevlm carrier rewrite train.jsonl -o carried.jsonl --ratio 0.25 --font NotoSansJP.ttf
    """
    from edgevlm.cli.output import Bar
    from edgevlm.evals.rewrite import Rewriting
    from edgevlm.evals.rewrite import rewrite as run

    with Bar() as bar:
        summary = run(rows, output, Rewriting(ratio, seed, clean, font), bar.progress)
    if as_json:
        click.echo(write_json(summary.to_dict()))
        return
    click.echo(f"{output}: {summary.rows} rows, {summary.rewritten} of them with a picture of text")
    for why, count in summary.kept.items():
        click.echo(f"{count} stayed text: {why}")
