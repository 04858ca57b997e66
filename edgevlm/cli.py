"""The command line: a command parses, calls one function, prints."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevlm import __version__
from edgevlm.errors import EdgeVLMError, ExportError, ImageError

if TYPE_CHECKING:
    from edgevlm.bench import Report
    from edgevlm.device import RuntimeConfig
    from edgevlm.generate import GenerationConfig
    from edgevlm_export.options import ExportOptions

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_PRECISION = click.Choice(["fp32", "fp16", "int8", "int4"])


class Commands(click.Group):
    """Turns the errors a user can cause into one line and an exit code: 1, or 130 after Ctrl-C."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EdgeVLMError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, package_name="edgevlm")
def main() -> None:
    """Ask a small vision-language model about a picture, on a machine with no GPU.

    \b
    edgevlm export HuggingFaceTB/SmolVLM-256M-Instruct --int4
    edgevlm run photo.jpg "What is in this picture?"
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")


def model_options(command: Any) -> Any:
    """Add the options that say which model runs, and how."""
    for option in (
        click.option("--no-cache", is_flag=True, help="Do not keep compiled models on disk."),
        click.option(
            "--inference-precision",
            type=click.Choice(["auto", "f32", "bf16", "f16"]),
            default="auto",
            show_default=True,
            help="auto is OpenVINO's choice for the device; f32 is the most exact.",
        ),
        click.option("--threads", type=int, help="CPU threads; OpenVINO decides if left out."),
        click.option("--device", default="AUTO", show_default=True, help="AUTO, CPU, GPU or NPU."),
        click.option("-m", "--model", help="Exported folder or short name; may be left out while there is only one."),
    ):
        command = option(command)
    return command


def generation_options(command: Any) -> Any:
    """Add the options that say how an answer is made."""
    for option in (
        click.option("--max-tiles", type=int, help="At most this many tiles a picture, the global view included."),
        click.option(
            "--detail",
            type=click.Choice(["auto", "low", "high"]),
            default="auto",
            show_default=True,
            help="low: the global view only; auto: as many tiles as the pixels fill; high: as the checkpoint does.",
        ),
        click.option("--stop", multiple=True, help="End the answer before this text; may be repeated."),
        click.option("--seed", type=int, help="Makes sampling repeatable."),
        click.option("--top-k", default=0, show_default=True, help="Sample from this many likeliest tokens; 0 is all."),
        click.option("--top-p", default=1.0, show_default=True, help="Sample from the likeliest tokens of this mass."),
        click.option("--temperature", default=0.0, show_default=True, help="0 is greedy; higher is more varied."),
        click.option("--max-new-tokens", default=256, show_default=True, help="Longest answer, in tokens."),
    ):
        command = option(command)
    return command


def _runtime(options: dict[str, Any]) -> RuntimeConfig:
    from edgevlm.device import RuntimeConfig

    return RuntimeConfig(
        device=options["device"],
        threads=options["threads"],
        inference_precision=options["inference_precision"],
        cache=not options["no_cache"],
    )


def _generation(options: dict[str, Any]) -> GenerationConfig:
    from edgevlm.generate import GenerationConfig

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop", "detail", "max_tiles")
    return GenerationConfig(**{name: options[name] for name in names})


@main.command()
@click.argument("arguments", nargs=-1, required=True, metavar="[IMAGE]... QUESTION")
@model_options
@generation_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming text.")
@click.option("--stats", is_flag=True, help="Print tokens, timings and memory after the answer.")
def run(arguments: tuple[str, ...], as_json: bool, stats: bool, **options: Any) -> None:
    """Answer QUESTION about the IMAGEs; without an image, just answer it. An IMAGE of - is read from stdin.

    \b
    edgevlm run photo.jpg "What is in this picture?"
    edgevlm run before.png after.png "What has changed?" -m ./my-model
    edgevlm run "What is the capital of France?"
    cat photo.jpg | edgevlm run - "Describe it." --json
    """
    *images, question = arguments
    generation, runtime = _generation(options), _runtime(options)
    _check_question(question)
    _answer([_image(name) for name in images], question, options["model"], generation, runtime, as_json, stats)


@main.command()
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
    from edgevlm.image import probe_image
    from edgevlm.repl import talk
    from edgevlm.terminal import Progress

    generation, runtime = _generation(options), _runtime(options)
    for image in images:
        probe_image(image)
    with Progress() as progress:
        progress.stage("loading the model")
        from edgevlm.model import VLM

        vlm = VLM(options["model"], runtime)
    talk(vlm.chat(generation, system), images)


def _check_question(question: str) -> None:
    """Catch the likeliest slip: a picture and no question."""
    from edgevlm.paths import is_there

    names_image = question.lower().endswith(_IMAGE_SUFFIXES) and len(question.split()) == 1
    is_file = Path(question).suffix and is_there(Path(question)) and Path(question).is_file()
    if question == "-" or names_image or is_file:
        raise ImageError(f"no question: {question} is an image; put the question after it, in quotes")


def _image(name: str) -> bytes | str:
    if name != "-":
        return name
    data = sys.stdin.buffer.read() if sys.stdin else b""  # None: started with stdin closed
    if not data:
        raise ImageError("no image came on stdin, where an IMAGE of - is read from")
    return data


def _answer(
    images: list[bytes | str],
    question: str,
    model: str | None,
    generation: GenerationConfig,
    runtime: RuntimeConfig,
    as_json: bool,
    stats: bool,
) -> None:
    from edgevlm.image import probe_image
    from edgevlm.terminal import Progress, print_cut, print_stats

    for image in images:  # a bad picture is told before the model is loaded
        probe_image(image)
    with Progress() as progress:
        progress.stage("loading the model")
        from edgevlm.model import VLM

        vlm = VLM(model, runtime)
        answer = None
        for piece in vlm.stream(images, question, generation, progress.step):
            progress.clear()
            if not as_json:
                click.echo(piece.text, nl=False)
            answer = piece.answer
    assert answer is not None
    if as_json:
        click.echo(json.dumps(answer.to_dict(), ensure_ascii=False))
        return
    click.echo()
    print_cut(answer)
    if stats:
        print_stats(answer)


@main.command()
@click.argument("model", required=False)
@click.option("--image", type=click.Path(path_type=Path), help="Picture to look at; default: a drawn one of 1600x1200.")
@click.option("--device", "devices", multiple=True, default=["AUTO"], help="May be repeated.  [default: AUTO]")
@click.option("--threads", multiple=True, type=int, help="CPU threads; may be repeated.")
@click.option(
    "--inference-precision",
    "inference_precisions",
    type=click.Choice(["auto", "f32", "bf16", "f16"]),
    multiple=True,
    default=["auto"],
    help="May be repeated.  [default: auto]",
)
@click.option(
    "--detail",
    "details",
    type=click.Choice(["auto", "low", "high"]),
    multiple=True,
    default=["auto"],
    help="May be repeated.  [default: auto]",
)
@click.option("--max-tiles", multiple=True, type=int, help="May be repeated.")
@click.option("--prompt-tokens", multiple=True, type=int, help="Fill the prompt up to this length; may be repeated.")
@click.option("--new-tokens", default=32, show_default=True, help="Tokens of each answer, exactly.")
@click.option("-n", "--repetitions", default=5, show_default=True, help="Measured answers for each point.")
@click.option("--report", type=click.Path(path_type=Path), help="Also write a page or picture: .html or .png.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines: the run, then each point.")
def bench(model: str | None, image: Path | None, report: Path | None, as_json: bool, **options: Any) -> None:
    """Measure MODEL on this machine: load, vision, prefill, first token, decoding, memory.

    Options that may be repeated are swept: every combination is a row. TTFT is always that of a picture never seen
    before; the next question about the same picture stands in a column of its own.

    \b
    edgevlm bench
    edgevlm bench SmolVLM-256M-Instruct-int4 --image photo.jpg --detail low --detail high
    edgevlm bench ./my-model --threads 1 --threads 2 --report bench.html
    """
    from edgevlm.bench import lines
    from edgevlm.report import check_target, write_report
    from edgevlm.terminal import print_bench

    if report:
        check_target(report)
    found = _bench(model, image, options)
    if as_json:
        for line in lines(found):
            click.echo(json.dumps(line, ensure_ascii=False))
    else:
        print_bench(found)
    if report:
        write_report(found, report)


def _bench(model: str | None, image: Path | None, options: dict[str, Any]) -> Report:
    from tempfile import TemporaryDirectory

    from edgevlm.bench import Sweep, sample_picture
    from edgevlm.bench import bench as measure
    from edgevlm.image import load_image
    from edgevlm.paths import find_model
    from edgevlm.terminal import Progress

    names = ("devices", "inference_precisions", "details", "new_tokens", "repetitions")
    swept = {name: options[name] for name in names}
    swept |= {name: options[name] or (None,) for name in ("threads", "max_tiles", "prompt_tokens")}
    sweep = Sweep(**swept)
    folder = find_model(model)
    with TemporaryDirectory(prefix="edgevlm-", ignore_cleanup_errors=True) as scratch, Progress() as progress:
        picture = image or sample_picture(Path(scratch))
        return measure(folder, load_image(picture), picture, sweep, progress.stage)


@main.command()
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to make; default: a short name.")
@click.option("--int4", "precision", flag_value="int4", help="INT4 language model, the rest INT8: the smallest.")
@click.option("--int8", "precision", flag_value="int8", default="int8", help="INT8 weights (the default).")
@click.option("--fp16", "precision", flag_value="fp16", help="FP16 weights, no compression.")
@click.option("--fp32", "precision", flag_value="fp32", help="FP32 weights: equal to the reference.")
@click.option(
    "--vision-precision",
    type=click.Choice([*_PRECISION.choices, "w8a8"]),
    help="Vision encoder and connector only; w8a8 quantizes activations too, which makes them fastest.",
)
@click.option("--lm-precision", type=_PRECISION, help="Language model only.")
@click.option("--group-size", type=int, help="INT4: weights that share a scale.  [default: 32]")
@click.option("--ratio", type=float, help="INT4: share of the weights; the rest stays INT8.  [default: 0.8]")
@click.option("--sym/--asym", "sym", default=None, help="INT4 without or with a zero point.  [default: asym]")
@click.option("--all-layers", is_flag=True, help="INT4 also for the embeddings and the LM head.")
@click.option("--awq/--no-awq", default=None, help="INT4: activation-aware scaling.  [default: no]")
@click.option(
    "--scale-estimation/--no-scale-estimation", default=None, help="INT4: fit scales to inputs.  [default: yes]"
)
@click.option("--gptq/--no-gptq", default=None, help="INT4: correct each layer's error on real inputs (slow).")
@click.option("--calibration", type=click.Path(path_type=Path), help="Your own pictures and questions.")
@click.option(
    "--via",
    type=click.Choice(["auto", "native", "optimum"]),
    default="auto",
    show_default=True,
    help="native needs no torch; optimum goes through optimum-intel; auto is native where it covers the checkpoint.",
)
@click.option("--no-verify", is_flag=True, help="Skip the comparison with the uncompressed model.")
@click.option("--force", is_flag=True, help="Replace the folder if it exists.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoint brings along.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def export(source: str, output: Path | None, as_json: bool, **options: Any) -> None:
    """Turn the checkpoint SOURCE, a folder or a hub id, into a folder of OpenVINO IR.

    \b
    edgevlm export HuggingFaceTB/SmolVLM-256M-Instruct --int4
    edgevlm export ./my-checkpoint --int8 -o ./my-model
    edgevlm export ./my-checkpoint --int4 --gptq --calibration ./pictures
    edgevlm export ./my-checkpoint --int8 --via optimum
    """
    missing = [name for name in ("nncf", "safetensors", "huggingface_hub") if find_spec(name) is None]
    if missing:
        raise ExportError(f"exporting needs {', '.join(missing)}; install it with: pip install 'edgevlm[export]'")
    from edgevlm.terminal import Progress, print_report

    with Progress() as progress:
        progress.stage("starting")
        from edgevlm_export import export as export_checkpoint

        report = export_checkpoint(source, output, _export_options(options), progress.stage)
    if as_json:
        click.echo(json.dumps(report.to_dict(), ensure_ascii=False))
    else:
        print_report(report)


def _export_options(options: dict[str, Any]) -> ExportOptions:
    from edgevlm_export.options import ExportOptions, Int4Recipe

    names = ("group_size", "ratio", "sym", "awq", "scale_estimation", "gptq")
    chosen = {name: options[name] for name in names if options[name] is not None}
    return ExportOptions(
        precision=options["precision"],
        vision_precision=options["vision_precision"],
        lm_precision=options["lm_precision"],
        int4=Int4Recipe(all_layers=options["all_layers"], **chosen),
        calibration=options["calibration"],
        via=options["via"],
        verify=not options["no_verify"],
        force=options["force"],
        revision=options["revision"],
        trust_remote_code=options["trust_remote_code"],
    )


@main.command()
@click.option("--check", is_flag=True, help="Compare every file with its SHA-256; exit 1 if one differs.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@click.pass_context
def models(ctx: click.Context, check: bool, as_json: bool) -> None:
    """List the exported models, with size and precision.

    \b
    edgevlm models
    edgevlm models --check
    """
    from edgevlm.inventory import describe_models
    from edgevlm.paths import models_dir
    from edgevlm.terminal import print_models

    found = describe_models(full_check=check)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
    elif found:
        print_models(found)
    else:
        click.echo(f"No models under {models_dir()} yet; make one with `edgevlm export SOURCE --int4`.", err=True)
    if check and any(each["state"].startswith("damaged") for each in found):
        ctx.exit(1)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> None:
    """Print what a bug report needs: versions, CPU, devices, folders, memory.

    \b
    edgevlm doctor
    edgevlm doctor --json
    """
    from edgevlm.inventory import diagnose
    from edgevlm.terminal import print_facts

    facts = diagnose()
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
    else:
        print_facts(facts)


if __name__ == "__main__":
    main()
