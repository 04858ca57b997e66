"""`edgevlm eval`: what a model can see."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

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
from edgevlm.errors import OptionError
from edgevlm.strict_json import write_json

if TYPE_CHECKING:
    from edgevlm.evals.model import Model
    from edgevlm.evals.run import Mode


@click.command("eval", cls=Command, context_settings=LONG_RUNNING_DEFAULTS)
@click.option("--suite", "suites", default="all", show_default=True, help="Suites, separated by commas, or all.")
@click.option("--items", type=int, help="Items of each suite at most.")
@click.option("--quick", is_flag=True, help="About fifty items of each suite, ten of long answers.")
@click.option("--sample-seed", default=0, show_default=True, help="Makes other items of the same kinds.")
@click.option("--data", type=click.Path(path_type=Path), help="Your own items, for anomaly, mcq and wikivqa.")
@click.option("--against", metavar="MODEL", help="Another model, asked the same items and compared in pairs.")
@click.option("--url", help="Ask a server of OpenAI's API at http://…/v1 instead; its key is in EDGEVLM_API_KEY.")
@click.option("--no-blind", is_flag=True, help="Do not ask each item about grey pictures, too.")
@click.option(
    "--mode",
    type=click.Choice(["score", "generate", "free"]),
    default="score",
    show_default=True,
    help="Score the options; also have them generated, under a constraint or free: knows and does not say.",
)
@click.option("--strategy", type=click.Choice(["edges"]), help="Also ask for each edge of a flowchart by itself.")
@model_options
@generation_options
@group(
    "Output",
    click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the rows; run again, it goes on."),
    click.option("--keep-pictures", is_flag=True, help="Also write each item's pictures to the -o folder."),
    click.option("--report", type=click.Path(path_type=Path), help="Also write a page with the failures' pictures."),
    click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON object."),
)
def evaluate(
    suites: str,
    items: int | None,
    quick: bool,
    sample_seed: int,
    data: Path | None,
    against: str | None,
    url: str | None,
    no_blind: bool,
    mode: Mode,
    strategy: str | None,
    output: Path | None,
    keep_pictures: bool,
    report: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Find out what a model can see: questions about drawn and real pictures, whose answers are known.

    Options are scored by their probability, under letters in every order. Beside what is right stand chance, the same
    questions about grey pictures (blind), and always giving the commonest answer (majority); intervals are of 95 %.
    --against compares two exports of a model on the same items: what INT4 costs, or what tuning gained. The suite
    fidelity compares them token by token, without right answers.

    \b
    edgevlm eval --suite spacenum --quick
    edgevlm eval -m my-int4 --against my-fp32 -o results --report report.html
    edgevlm eval -m my-int4 --against my-fp32 --suite fidelity
    edgevlm eval --url http://localhost:8080/v1 --suite mcq --data MMBench.tsv
    """
    from edgevlm.cli.evaluation import Evaluation

    def local(name: str | None) -> Model:
        from edgevlm.evals.ask import LocalModel
        from edgevlm.vlm import VLM

        vlm = VLM(chosen_model(name), runtime_config(options))
        return LocalModel(vlm, generation_config(options), image_budget(options))

    def remote(address: str) -> Model:
        from edgevlm.evals.remote import RemoteModel

        if not against:
            _check_remote(options)
        return RemoteModel(address, options["model"], os.environ.get("EDGEVLM_API_KEY"), options["detail"])

    run = Evaluation(
        suites,
        items,
        quick,
        sample_seed,
        data,
        blind=not no_blind,
        output=output,
        mode=mode,
        strategy=strategy or "",
        keep_pictures=keep_pictures,
    )
    first = remote(url) if url else local(options["model"])
    found = run(first, local(against) if against else None)
    if report:
        found.write_page(report)
    if as_json:
        click.echo(write_json(found.to_dict()))
    else:
        found.show()


def _check_remote(options: Mapping[str, Any]) -> None:
    """Raise `OptionError` for an option on the command line that a server would not be told of."""
    context = click.get_current_context()
    for name in options:
        if name not in ("model", "detail") and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = next(each.opts[0] for each in context.command.params if each.name == name)
            raise OptionError(f"{option} is for models in this process; leave it out with --url")
