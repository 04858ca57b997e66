"""Options that several commands share, and what they mean."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevlm.cli.help import group

if TYPE_CHECKING:
    from edgevlm.decoding.config import GenerationConfig
    from edgevlm.decoding.output_format import OutputFormat
    from edgevlm.families.base import FrameSampling, ImageBudget
    from edgevlm.jobs.spec import Defaults
    from edgevlm.runtime.config import RuntimeConfig


LONG_RUNNING_DEFAULTS = {"default_map": {"kv_cache": "paged"}}
"""Click's context settings for commands whose process keeps running."""


def model_options(command: Any) -> Any:
    """Add the options that say which model runs, and how."""
    command = group(
        "Advanced",
        click.option(
            "--inference-precision",
            type=click.Choice(["auto", "f32", "bf16", "f16"]),
            default="auto",
            show_default=True,
            help="auto: OpenVINO's choice for the device; f32: equal to the reference.",
        ),
        click.option(
            "--vision-arithmetic",
            type=click.Choice(["auto", "exported", "compressed", "float32"]),
            default="auto",
            show_default=True,
            help="exported: W8A8 where it is; compressed: activations are not quantized; float32: nor weights.",
        ),
        click.option(
            "--kv-cache",
            type=click.Choice(["stateful", "paged"]),
            default="stateful",
            show_default=True,
            help="paged: faster prefill and drafts on a CPU, slower start.",
        ),
        click.option(
            "--kv-cache-precision",
            type=click.Choice(["auto", "u8", "f16", "f32"]),
            default="auto",
            show_default=True,
            help="auto: 16 bits (float32 with --inference-precision f32); u8: half the memory.",
        ),
        click.option("--no-cache", is_flag=True, help="Do not keep compiled models on disk."),
    )(command)
    return group(
        "Model",
        click.option("-m", "--model", help="Exported folder or short name.  [default: panel, bundled]"),
        click.option("--device", default="AUTO", show_default=True, help="AUTO, CPU, GPU or NPU."),
        click.option("--threads", type=int, help="CPU threads; OpenVINO decides if left out."),
    )(command)


def chosen_model(name: str | None) -> str | Path:
    """Return the model that was named, or the bundled one, saying so on stderr."""
    from edgevlm.model_store import DEFAULT_NOTICE, default_model

    if name is not None:
        return name
    click.echo(DEFAULT_NOTICE, err=True)
    return default_model()


def generation_options(command: Any) -> Any:
    """Add the options that say how closely pictures are looked at, and how an answer is generated."""
    command = group(
        "Generation",
        click.option("--max-new-tokens", default=256, show_default=True, help="Most tokens of an answer."),
        click.option("--temperature", default=0.0, show_default=True, help="0 is greedy; higher is more varied."),
        click.option(
            "--top-p",
            default=1.0,
            show_default=True,
            help="Nucleus sampling: keep the likeliest tokens up to this cumulative probability.",
        ),
        click.option("--top-k", default=0, show_default=True, help="Keep this many of the likeliest tokens; 0: all."),
        click.option("--seed", type=int, help="Makes sampling repeatable."),
        click.option("--stop", multiple=True, help="End the answer before this text; repeat for several texts."),
        click.option("--keep-special-tokens", is_flag=True, help="Show special tokens in the answer."),
        click.option(
            "--template-var",
            multiple=True,
            metavar="NAME=VALUE",
            help="Set a variable of the chat template, such as add_vision_id=true; repeat for several variables.",
        ),
        click.option(
            "--think/--no-think",
            default=None,
            help="Have the model think before it answers, or not; left out: as its chat template has it.",
        ),
        click.option("--thinking-budget", type=int, metavar="N", help="Most tokens of the thought before an answer."),
    )(command)
    return image_options(command)


def image_options(command: Any) -> Any:
    """Add the options that say how closely pictures are looked at."""
    return group(
        "Image",
        click.option(
            "--detail",
            type=click.Choice(["auto", "low", "high"]),
            default="auto",
            show_default=True,
            help="low: fewest image tokens; auto: as many as the pixels fill; high: as the checkpoint's processor.",
        ),
        click.option("--max-image-tokens", type=int, help="At most this many image tokens for each picture."),
        click.option("--max-tiles", "max_views", type=int, hidden=True),
    )(command)


def video_options(command: Any) -> Any:
    """Add the options that say which frames of a video are looked at."""
    return group(
        "Video",
        click.option("--fps", type=float, help="Frames sampled for each second of a video; of a folder: that it has."),
        click.option("--frames", type=int, help="Frames sampled of each video, evenly spread."),
    )(command)


def frame_sampling(options: dict[str, Any]) -> FrameSampling:
    """Return what `video_options` say."""
    from edgevlm.families.base import FrameSampling

    return FrameSampling(options["fps"], options["frames"])


def output_options(command: Any) -> Any:
    """Add the options of structured output; one of them at most may be given."""
    return group(
        "Output",
        click.option("--schema", type=click.Path(path_type=Path), help="Answer with JSON of this JSON Schema, a file."),
        click.option(
            "--choices",
            help="Score these answers, separated by commas (yes,no), and print their probabilities.",
        ),
        click.option("--regex", help="Answer with text that this regular expression matches from end to end."),
    )(command)


def chosen_format(options: dict[str, Any]) -> OutputFormat:
    """Return what `output_options` ask for."""
    from edgevlm.decoding.output_format import OutputFormat

    given = [name for name in ("schema", "choices", "regex") if options[name] is not None]
    if len(given) > 1:
        raise click.UsageError(f"--{given[0]} and --{given[1]} exclude each other")
    choices = read_choices(options["choices"]) if given == ["choices"] else None
    return OutputFormat.of(schema=options["schema"], choices=choices, regex=options["regex"])


def read_choices(text: str) -> list[str]:
    """Return the texts between commas; one that holds a comma stands in quotes."""
    return next(csv.reader([text], skipinitialspace=True), [])


def runtime_config(options: dict[str, Any]) -> RuntimeConfig:
    """Return what `model_options` say, but for the model."""
    from edgevlm.runtime.config import RuntimeConfig

    return RuntimeConfig(
        device=options["device"],
        threads=options["threads"],
        inference_precision=options["inference_precision"],
        vision_arithmetic=options["vision_arithmetic"],
        kv_cache_precision=options["kv_cache_precision"],
        kv_cache=options["kv_cache"],
        cache=not options["no_cache"],
    )


def generation_config(options: dict[str, Any]) -> GenerationConfig:
    """Return what `generation_options` say."""
    from edgevlm.decoding.config import GenerationConfig

    names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop", "think", "thinking_budget")
    return GenerationConfig(
        **{name: options[name] for name in names},
        skip_special_tokens=not options["keep_special_tokens"],
        chat_template_kwargs=dict(_template_variable(each) for each in options["template_var"]),
    )


def image_budget(options: dict[str, Any]) -> ImageBudget:
    """Return what `generation_options` say of the pictures."""
    from edgevlm.families.base import ImageBudget

    return ImageBudget(options["detail"], options["max_image_tokens"], options["max_views"])


def _template_variable(text: str) -> tuple[str, Any]:
    """Return the name and value of `NAME=VALUE`; a value that is no JSON is a text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--template-var takes NAME=VALUE, such as enable_thinking=false, not {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def row_defaults(question: str | None, options: dict[str, Any]) -> Defaults:
    """Return what `batch` and `watch` ask of each row that says nothing else."""
    from edgevlm.jobs.spec import Defaults

    output_format, config = chosen_format(options), generation_config(options)
    return Defaults(question, output_format, config, image_budget(options), frame_sampling(options))
