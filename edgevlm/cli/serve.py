"""`edgevlm serve`: a server for OpenAI's and Ollama's clients."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edgevlm.cli.help import Command, group
from edgevlm.cli.options import LONG_RUNNING_DEFAULTS, model_options, runtime_config
from edgevlm.errors import OptionError, ServerError

if TYPE_CHECKING:
    from edgevlm.server.settings import ServeConfig

_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
_BOUNDS: tuple[tuple[str, Any, Any, str], ...] = (
    ("--max-tokens", int, 512, "Default max_tokens of a request."),
    ("--max-queue", int, 16, "Most requests that may wait, or run beside the first."),
    ("--max-running", int, 4, "Most answers that are decoded together, under paged attention."),
    ("--max-loaded-models", int, 3, "Most models in memory; the least recently used makes room for another."),
    ("--unload-after", float, 300.0, "Seconds that models but the first stay loaded after their last use."),
    ("--max-images", int, 8, "Most pictures of a request."),
    ("--max-pixels", int, 50_000_000, "Most pixels of a picture."),
    ("--max-pages", int, 100, "Most pages that are read of a document."),
    ("--max-body-mb", float, 32.0, "Largest request body, in MiB."),
    ("--time-limit", float, 300.0, "Most seconds for an answer, waiting included."),
    ("--stop-timeout", float, 10.0, "Seconds that the running answer may still take after SIGTERM."),
)


@click.command(cls=Command, context_settings=LONG_RUNNING_DEFAULTS)
@click.argument("model_arguments", metavar="[MODEL]...", nargs=-1)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8000, show_default=True, help="Port to listen on; 0 takes a free one.")
@click.option(
    "--model-name",
    "model_names",
    multiple=True,
    help="What callers call the model; repeat for several models, in order; default: its folder's name.",
)
@click.option("--print-unit", is_flag=True, help="Print a systemd unit that starts this server, and exit.")
@group(
    "Access",
    click.option("--api-key", envvar="EDGEVLM_API_KEY", help="Callers must send it; better given in EDGEVLM_API_KEY."),
    click.option("--api-key-file", type=click.Path(path_type=Path), help="File with a key on each line."),
    click.option("--allow-anyone", is_flag=True, help="Listen beyond this machine without a key."),
    click.option("--allow-host", multiple=True, help="Host name that requests may use; repeat for several names."),
    click.option(
        "--allow-origin",
        multiple=True,
        help="Origin whose pages may use the server, such as https://shop.example; may repeat; * needs a key.",
    ),
    click.option("--image-folder", type=click.Path(path_type=Path), help="Let pictures under it be named by path."),
    click.option("--log-content", is_flag=True, help="Write questions and answers into the log."),
)
@group(
    "Limits",
    *(
        click.option(name, type=kind, default=default, show_default=True, help=text)
        for name, kind, default, text in _BOUNDS
    ),
)
@model_options
@click.pass_context
def serve(ctx: click.Context, /, **options: Any) -> None:
    """Serve OpenAI's and Ollama's APIs, and a web page, on localhost.

    Of several models the first is loaded at the start, another when a request names it.

    POST /v1/chat/completions, POST /v1/responses and GET /v1/models are as OpenAI has them, POST /api/chat and POST
    /api/generate as Ollama has them, POST /v1/convert/file and /v1/convert/source as docling-serve has them, under the
    same keys and limits; the page is at /; /healthz, /readyz and /metrics are for monitoring. Another --host needs an
    API key. No URL is ever fetched.

    \b
    edgevlm serve
    edgevlm serve SmolVLM-256M-Instruct-int4 --port 9000
    edgevlm serve panel SmolVLM-256M-Instruct-int4 --unload-after 600
    EDGEVLM_API_KEY=... edgevlm serve --host 0.0.0.0
    edgevlm serve ./my-model --print-unit | sudo tee /etc/systemd/system/edgevlm.service
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ServerError(f"serving needs {', '.join(missing)}; install it with: pip install 'edgevlm[serve]'")
    if options["model"] and options["model_arguments"]:
        raise click.UsageError("name the model once: as MODEL or with -m")
    models = options["model_arguments"] or (options["model"],)
    runtime, config = runtime_config(options), _config(options)
    if options["print_unit"]:
        from edgevlm.model_store import find_model
        from edgevlm.server.unit import render_unit

        click.echo(render_unit([find_model(model).resolve() for model in models], _given(ctx)), nl=False)
        return
    from edgevlm.server.run import serve as run_server

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    run_server(models, runtime, config)


def _given(ctx: click.Context) -> list[str]:
    """Return the options of the command line again, but for those that a unit holds otherwise: model and key."""
    words = []
    for option in ctx.command.params:
        left_out = ("model", "model_arguments", "print_unit", "api_key")
        if option.name in left_out or ctx.get_parameter_source(str(option.name)) is not ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[str(option.name)]
        name = option.opts[0]
        if value is True:
            words.append(name)
        for each in value if isinstance(value, tuple) else [] if value is True else [value]:
            words += [name, str(each.resolve() if isinstance(each, Path) else each)]
    return words


def _bytes(mebibytes: float) -> int:
    if not isfinite(mebibytes):
        raise OptionError(f"--max-body-mb must be finite, not {mebibytes}")
    return round(mebibytes * 2**20)


def _config(options: dict[str, Any]) -> ServeConfig:
    from edgevlm.server.settings import ServeConfig, read_keys

    keys = (options["api_key"],) if options["api_key"] else ()
    return ServeConfig(
        host=options["host"],
        port=options["port"],
        api_keys=keys + (read_keys(options["api_key_file"]) if options["api_key_file"] else ()),
        allow_anyone=options["allow_anyone"],
        allowed_hosts=options["allow_host"],
        allowed_origins=options["allow_origin"],
        image_folder=options["image_folder"],
        model_names=options["model_names"],
        max_body_bytes=_bytes(options["max_body_mb"]),
        max_images=options["max_images"],
        max_pixels=options["max_pixels"],
        max_pages=options["max_pages"],
        max_queue=options["max_queue"],
        max_loaded_models=options["max_loaded_models"],
        unload_after_s=options["unload_after"],
        max_running=options["max_running"],
        max_tokens=options["max_tokens"],
        time_limit_s=options["time_limit"],
        stop_timeout_s=options["stop_timeout"],
        log_content=options["log_content"],
    )
