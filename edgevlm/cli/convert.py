"""`edgevlm convert`: pages to documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgevlm.cli.help import Command, group
from edgevlm.cli.options import (
    LONG_RUNNING_DEFAULTS,
    chosen_model,
    generation_config,
    generation_options,
    image_budget,
    model_options,
    runtime_config,
)
from edgevlm.strict_json import write_json


@click.command(
    cls=Command,
    context_settings={"default_map": {**LONG_RUNNING_DEFAULTS["default_map"], "max_new_tokens": 4096}},
)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--to",
    "target",
    type=click.Choice(["markdown", "html", "json", "doctags", "text"]),
    default="markdown",
    show_default=True,
    help="What each file becomes.",
)
@click.option(
    "-o", "--output", default=".", show_default=True, type=click.Path(path_type=Path), help="Folder of the documents."
)
@click.option(
    "--task",
    default="page",
    show_default=True,
    help="page, text, table, formula, chart, or another of the model's.",
)
@click.option("--prompt", help="Ask this about each page instead.")
@click.option("--pages", metavar="RANGES", help="Which pages of each file, such as 1-3,7,10-.")
@click.option("--dpi", default=144, show_default=True, help="Dots per inch at which PDFs are rasterized.")
@model_options
@generation_options
@group("Output", click.option("--json", "as_json", is_flag=True, help="Print the counts as one JSON object."))
def convert(
    files: tuple[Path, ...],
    target: str,
    output: Path,
    task: str,
    prompt: str | None,
    pages: str | None,
    dpi: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Convert FILES of pages to documents: PDFs, TIFFs of many pages, pictures, and folders of these.

    Page by page a model reads them, so choose one that has learned to: granite-docling writes DocTags and
    granite-for-docling DocLang, which become any of the formats, with tables as tables, formulas as LaTeX, and figures
    cropped beside the document; the bundled model cannot read pages. Any other model is asked for Markdown; tables in
    OTSL among it become tables. PDFs, DocTags, DocLang and OTSL need pip install 'edgevlm[convert]'.

    Killed or run again, it goes on where it was: what was read of NAME is kept in NAME.pages.jsonl, also for another
    format. A file or a page that cannot be read is told in one line, harms no other, and the exit code is then 1.

    \b
    edgevlm convert report.pdf -m granite-docling-int8
    edgevlm convert scans/ --to html -o documents -m granite-docling-int8
    edgevlm convert table.png --task table --to json -m granite-docling-int8
    """
    from edgevlm.cli.output import Bar
    from edgevlm.jobs.convert import Conversion, parse_pages
    from edgevlm.jobs.convert import convert as run

    what = Conversion(
        output,
        target,  # type: ignore[arg-type]
        task,
        prompt,
        str(chosen_model(options["model"])),
        runtime_config(options),
        generation_config(options),
        image_budget(options),
        parse_pages(pages) if pages else (),
        dpi,
    )
    with Bar() as bar:
        summary = run(files, what, bar.tell, bar.progress)
    if as_json:
        click.echo(write_json(summary.to_dict()))
    else:
        for path in summary.written:
            click.echo(str(path))
    if summary.failed_files or summary.failed_pages:
        click.get_current_context().exit(1)
