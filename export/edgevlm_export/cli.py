"""`edgevlm export`: a checkpoint to a folder of OpenVINO IR."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevlm.cli.help import Command, group
from edgevlm.errors import ExportError
from edgevlm.strict_json import write_json

if TYPE_CHECKING:
    from edgevlm_export.options import ExportOptions
    from edgevlm_export.pipeline import ExportReport

_PRECISION = click.Choice(["fp32", "fp16", "int8", "int4"])


@click.command(cls=Command)
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder to make; default: a short name.")
@click.option("--int4", "precision", flag_value="int4", help="INT4 language model, the rest INT8: the smallest.")
@click.option("--int8", "precision", flag_value="int8", default="int8", help="INT8 weights (the default).")
@click.option("--fp16", "precision", flag_value="fp16", help="FP16 weights, no compression.")
@click.option("--fp32", "precision", flag_value="fp32", help="FP32 weights: equal to the reference.")
@click.option(
    "--vision-precision",
    type=click.Choice([*_PRECISION.choices, "w8a8"]),
    help="Vision encoder and connector only; w8a8, the default with --int8 and --int4, quantizes activations too, "
    "which makes them fastest; int8 exports sooner and stays nearer to the reference.",
)
@click.option("--lm-precision", type=_PRECISION, help="Language model only.")
@click.option(
    "--merge-tokens",
    type=click.Choice(["0.25", "0.5"]),
    help="Share of the vision encoder's tokens that its early layers merge: the first token comes sooner. Off by "
    "default, for small text and digits may be misread: compare both exports on your own pictures.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A PEFT adapter to merge into SOURCE, as TRL and peft save it; repeat for several.",
)
@click.option(
    "--weight",
    "adapter_weights",
    multiple=True,
    type=float,
    help="What an adapter's change is multiplied by: one for each --adapter, in their order.  [default: 1]",
)
@group(
    "INT4",
    click.option("--group-size", type=int, help="Weights that share a scale.  [default: 32]"),
    click.option(
        "--ratio", type=float, help="Share of the weights that become INT4; the rest stays INT8.  [default: 0.8]"
    ),
    click.option("--sym/--asym", "sym", default=None, help="Without or with a zero point.  [default: asym]"),
    click.option("--all-layers", is_flag=True, help="The embeddings and the LM head, too."),
    click.option("--awq/--no-awq", default=None, help="Activation-aware scaling.  [default: no]"),
    click.option(
        "--scale-estimation/--no-scale-estimation", default=None, help="Fit scales to inputs.  [default: yes]"
    ),
    click.option("--gptq/--no-gptq", default=None, help="Correct each layer's error on real inputs (slow)."),
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Your own pictures and questions; a folder of pictures is enough.",
)
@click.option(
    "--via",
    type=click.Choice(["auto", "native", "optimum", "onnx"]),
    default="auto",
    show_default=True,
    help="native needs no torch; optimum goes through optimum-intel; onnx reads the checkpoint's own ONNX files; auto "
    "is native where it covers the checkpoint, and onnx where there are no safetensors.",
)
@click.option("--no-verify", is_flag=True, help="Skip the comparison with the uncompressed model.")
@click.option("--force", is_flag=True, help="Replace an earlier export, and nothing else.")
@click.option("--revision", help="Branch, tag or commit of a hub id.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoint brings along.")
@click.option(
    "--chat-template",
    default="default",
    show_default=True,
    metavar="NAME",
    help="Which of the checkpoint's chat templates, where it has several.",
)
@click.option(
    "--ignore-config-key",
    multiple=True,
    metavar="NAME",
    help="Export although config.json states NAME, which edgevlm does not know; repeat for several names.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def export(source: str, output: Path | None, as_json: bool, **options: Any) -> None:
    """Turn the checkpoint SOURCE, a folder or a hub id, into a folder of OpenVINO IR.

    \b
    edgevlm export HuggingFaceTB/SmolVLM-256M-Instruct --int4
    edgevlm export ./my-checkpoint --int8 -o ./my-model
    edgevlm export ./my-checkpoint --int4 --gptq --calibration ./pictures
    edgevlm export HuggingFaceTB/SmolVLM-256M-Instruct --int4 --adapter ./my-sft
    edgevlm export ./my-checkpoint --int8 --via optimum
    edgevlm export ./with-onnx-files --int8 --via onnx
    """
    missing = [name for name in ("nncf", "safetensors", "huggingface_hub") if find_spec(name) is None]
    if missing:
        raise ExportError(f"exporting needs {', '.join(missing)}; install it with: pip install 'edgevlm[export]'")
    from edgevlm.cli.progress import Progress

    with Progress() as progress:
        progress.stage("starting")
        from edgevlm_export import export as export_checkpoint

        report = export_checkpoint(source, output, _export_options(options), progress.stage)
    if as_json:
        click.echo(write_json(report.to_dict()))
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
        chat_template=options["chat_template"],
        ignore_config_keys=options["ignore_config_key"],
        merge_tokens=float(options["merge_tokens"] or 0),
        adapters=options["adapters"],
        adapter_weights=options["adapter_weights"],
    )


def print_report(report: ExportReport) -> None:
    """Print what an export made: parts, figures against the reference, cost."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from edgevlm.cli.output import megabytes

    console = Console()
    verified = report.verification
    table = Table("part", "precision", "size", "max abs error", "cosine")
    for name, part in report.manifest.submodels.items():
        figures = verified.parts.get(name) if verified else None
        errors = (f"{figures.max_abs_error:.2g}", f"{figures.cosine:.6f}") if figures else ("-", "-")
        table.add_row(name, part.precision, megabytes(part.size_bytes), *errors)
    console.print(table)
    if verified:
        console.print(
            f"likeliest next tokens equal to the reference's ({verified.reference}): "
            f"{verified.greedy_agreement:.1%} of {verified.positions}, KL {verified.kl_divergence:.2g} nats",
            highlight=False,
        )
    else:
        console.print("not verified against the reference")
    if share := report.manifest.export_options["merge_tokens"]:
        console.print(
            f"{share:.0%} of vision tokens merged; the figures of vision_embeddings say what that changes, too"
        )
    for adapter in report.manifest.adapters:
        digest = adapter.files["adapter_model.safetensors"][:12]
        text = f"adapter {adapter.name} merged with weight {adapter.weight:g}: {adapter.tensors} tensors changed"
        console.print(Text(f"{text} (SHA-256 {digest}…)"), soft_wrap=True)
        for note in adapter.notes:
            console.print(Text(f"adapter {adapter.name}: {note}"), soft_wrap=True)
    for name, value in report.manifest.overlooked.items():
        console.print(Text(f"not read: {name} = {json.dumps(value, ensure_ascii=False)}"), soft_wrap=True)
    console.print(f"{report.seconds:.1f} s, peak memory {report.peak_memory_bytes / 2**20:,.0f} MiB", highlight=False)
    console.print(f"{report.folder}", highlight=False, soft_wrap=True)
