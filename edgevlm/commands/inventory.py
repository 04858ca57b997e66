"""`edgevlm models` and `edgevlm doctor`: what is there."""

from __future__ import annotations

import click

from edgevlm.strict_json import write_json


@click.command()
@click.option("--check", is_flag=True, help="Compare every file with its SHA-256; exit 1 if one differs.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@click.pass_context
def models(ctx: click.Context, check: bool, as_json: bool) -> None:
    """List the bundled and the exported models, with size and precision.

    \b
    edgevlm models
    edgevlm models --check
    """
    from edgevlm.inventory import describe_models
    from edgevlm.terminal import print_models

    found = describe_models(full_check=check)
    if as_json:
        click.echo(write_json(found))
    else:
        print_models(found)
    if check and any(each["state"].startswith("damaged") for each in found):
        ctx.exit(1)


@click.command()
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
        click.echo(write_json(facts))
    else:
        print_facts(facts)
