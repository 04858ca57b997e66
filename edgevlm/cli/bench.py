"""`edgevlm bench`: what the model does on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevlm.cli.help import Command
from edgevlm.cli.options import chosen_model
from edgevlm.strict_json import write_json

if TYPE_CHECKING:
    from edgevlm.bench.measure import Report


@click.command(cls=Command)
@click.argument("model", required=False)
@click.option("--image", type=click.Path(path_type=Path), help="Picture to look at; default: a drawn one of 1600x1200.")
@click.option(
    "--device", "devices", multiple=True, default=["AUTO"], help="Device; repeat to sweep several.  [default: AUTO]"
)
@click.option("--threads", multiple=True, type=int, help="CPU threads; repeat to sweep several.")
@click.option(
    "--inference-precision",
    "inference_precisions",
    type=click.Choice(["auto", "f32", "bf16", "f16"]),
    multiple=True,
    default=["auto"],
    help="Repeat to sweep several.  [default: auto]",
)
@click.option(
    "--vision-arithmetic",
    "vision_arithmetics",
    type=click.Choice(["auto", "exported", "compressed", "float32"]),
    multiple=True,
    default=["auto"],
    help="Repeat to sweep several.  [default: auto]",
)
@click.option(
    "--detail",
    "details",
    type=click.Choice(["auto", "low", "high"]),
    multiple=True,
    default=["auto"],
    help="Repeat to sweep several.  [default: auto]",
)
@click.option("--max-image-tokens", multiple=True, type=int, help="Image tokens at most; repeat to sweep several.")
@click.option(
    "--prompt-tokens", multiple=True, type=int, help="Pad the prompt to this length; repeat to sweep several."
)
@click.option("--new-tokens", default=32, show_default=True, help="Tokens of each answer, exactly.")
@click.option("-n", "--repetitions", default=5, show_default=True, help="Measured answers for each point.")
@click.option("--report", type=click.Path(path_type=Path), help="Also write a page or picture: .html or .png.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines: the run, then each point.")
def bench(model: str | None, image: Path | None, report: Path | None, as_json: bool, **options: Any) -> None:
    """Measure MODEL on this machine: load, vision, prefill, first token, decoding, memory.

    Repeated options are swept: every combination is a row. TTFT is always that of a picture never seen
    before; the next question about the same picture stands in a column of its own. The last lines name the
    machine and say, for each row, how many cores were used, by edgevlm and by other processes.

    \b
    edgevlm bench
    edgevlm bench SmolVLM-256M-Instruct-int4 --image photo.jpg --detail low --detail high
    edgevlm bench ./my-model --threads 1 --threads 2 --report bench.html
    """
    from edgevlm.bench.measure import lines
    from edgevlm.bench.report import check_target, write_report
    from edgevlm.cli.output import print_bench

    if report:
        check_target(report)
    found = _bench(model, image, options)
    if as_json:
        for line in lines(found):
            click.echo(write_json(line))
    else:
        print_bench(found)
    if report:
        write_report(found, report)


def _bench(model: str | None, image: Path | None, options: dict[str, Any]) -> Report:
    from tempfile import TemporaryDirectory

    from edgevlm.bench.measure import Sweep, sample_picture
    from edgevlm.bench.measure import bench as measure
    from edgevlm.cli.progress import Progress
    from edgevlm.inputs.image import load_image
    from edgevlm.model_store import find_model

    names = ("devices", "inference_precisions", "vision_arithmetics", "details", "new_tokens", "repetitions")
    swept = {name: options[name] for name in names}
    swept |= {name: options[name] or (None,) for name in ("threads", "max_image_tokens", "prompt_tokens")}
    sweep = Sweep(**swept)
    folder = find_model(chosen_model(model))
    with TemporaryDirectory(prefix="edgevlm-", ignore_cleanup_errors=True) as scratch, Progress() as progress:
        picture = image or sample_picture(Path(scratch))
        return measure(folder, load_image(picture), picture, sweep, progress.stage)
