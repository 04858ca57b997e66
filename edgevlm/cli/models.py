"""`edgevlm models`: the models that have a short name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevlm.cli.help import Command
from edgevlm.errors import ModelError
from edgevlm.strict_json import write_json

if TYPE_CHECKING:
    from edgevlm.manifest import Manifest


@click.command(cls=Command)
@click.option("--check", is_flag=True, help="Compare every file with its SHA-256; exit 1 if one differs.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@click.pass_context
def models(ctx: click.Context, check: bool, as_json: bool) -> None:
    """List the bundled and the exported models, with size and precision.

    \b
    edgevlm models
    edgevlm models --check
    """
    from edgevlm.cli.output import print_models

    found = describe_models(full_check=check)
    if as_json:
        click.echo(write_json(found))
    else:
        print_models(found)
    if check and any(each["state"].startswith("damaged") for each in found):
        ctx.exit(1)


def describe_models(*, full_check: bool = False) -> list[dict[str, Any]]:
    """Return name, family, precision, size and state of every model with a short name, damaged ones included."""
    from edgevlm.model_store import list_models

    return [_describe(folder, full_check) for folder in list_models()]


def _describe(folder: Path, full_check: bool) -> dict[str, Any]:
    from edgevlm.families import make_family
    from edgevlm.manifest import check_files, load_manifest

    known: dict[str, Any] = {"name": folder.name, "path": str(folder)}
    try:
        manifest = load_manifest(folder)
        known |= {
            "source": manifest.source,
            "family": manifest.family,
            "precision": _precision(manifest),
            "size_bytes": manifest.size_bytes,
        }
        make_family(manifest.family, manifest.family_config)
        check_files(folder, manifest, full=full_check)
    except ModelError as error:
        return known | {"state": f"damaged: {error}"}
    return known | {"state": "checked" if full_check else "ok"}


def _precision(manifest: Manifest) -> str:
    """Return the precision of each submodel, and what share of the vision encoder's tokens is merged."""
    parts = [f"{name} {part.precision}" for name, part in manifest.submodels.items()]
    share = manifest.export_options.get("merge_tokens")
    return ", ".join([*parts, f"{share:.0%} of vision tokens merged"] if share else parts)
