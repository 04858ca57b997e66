"""The whole export, readable as a recipe."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgevlm.errors import ExportError, OptionError, SourceError
from edgevlm.families.base import DecoderTraits
from edgevlm.manifest import Manifest, MergedAdapter
from edgevlm.model_store import models_dir
from edgevlm.runtime.config import RuntimeConfig
from edgevlm.vlm import VLM
from edgevlm_export.atomic_folder import atomic_folder, check_target
from edgevlm_export.calibration import load_pairs
from edgevlm_export.clock import OnStage, StageClock
from edgevlm_export.families import architecture, exporter, family_config
from edgevlm_export.memory import PeakMemory
from edgevlm_export.options import ExportOptions, Route
from edgevlm_export.output_folder import Written, seal, start_folder
from edgevlm_export.routes import native, onnx, optimum
from edgevlm_export.routes.base import ExportJob
from edgevlm_export.source.adapter import Adapter, notes_about, open_adapter
from edgevlm_export.source.checkpoint import Checkpoint, open_checkpoint
from edgevlm_export.source.config_reader import UnsupportedError, overlooked, overlooked_in_decoding
from edgevlm_export.source.merged_weights import MergedWeights
from edgevlm_export.source.safetensors_reader import Weights
from edgevlm_export.verify import Verification, check, scales, verify

_REFERENCE_CONFIG = RuntimeConfig(device="CPU", inference_precision="f32", vision_arithmetic="exported", cache=False)


@dataclass(frozen=True)
class ExportReport:
    """What an export made and what it cost."""

    folder: Path
    manifest: Manifest
    verification: Verification | None
    seconds: float
    stages: Mapping[str, float]
    """Seconds of each stage."""
    peak_memory_bytes: int
    """Of this process and its children together, sampled."""

    def to_dict(self) -> dict[str, Any]:
        """Return what `edgevlm export --json` prints."""
        return {
            "folder": str(self.folder),
            "parts": {name: asdict(part) for name, part in self.manifest.submodels.items()},
            "size_bytes": self.manifest.size_bytes,
            "adapters": [asdict(adapter) for adapter in self.manifest.adapters],
            "overlooked": self.manifest.overlooked,
            "verification": self.verification.to_dict() if self.verification else None,
            "seconds": round(self.seconds, 2),
            "stages": {name: round(seconds, 2) for name, seconds in self.stages.items()},
            "peak_memory_bytes": self.peak_memory_bytes,
        }


def export(
    source: str | os.PathLike[str],
    output: Path | None = None,
    options: ExportOptions | None = None,
    on_stage: OnStage | None = None,
) -> ExportReport:
    """Export the checkpoint `source` into the folder `output` (None: a name under edgevlm's models folder).

    `on_stage` is told the name of each stage as it begins. Raises `ExportError`; then nothing was written.
    """
    options = options or ExportOptions()
    clock = StageClock(on_stage)
    with PeakMemory() as memory:
        clock.begin("checkpoint")
        if output:  # before anything is downloaded
            check_target(output, Path(source), force=options.force)
        adapters = open_adapters(options)
        checkpoint = open_checkpoint(source, options.revision, options.via)
        checkpoint = checkpoint.with_files_of(adapter.folder for adapter in adapters)
        target = output or models_dir() / default_name(checkpoint, options)
        check_target(target, checkpoint.folder, force=options.force)
        facts, processor = family_config(checkpoint)
        template = checkpoint.chat_template(options.chat_template)
        unread = overlooked([processor], options.ignore_config_keys)
        unread |= overlooked_in_decoding(checkpoint.read("generation_config.json"))
        route = choose_route(checkpoint, facts, options, adapters)
        unread |= route.overlooked
        pairs = load_pairs(options.calibration)  # a bad calibration set is refused before the work begins
        with atomic_folder(target, checkpoint.folder, force=options.force) as staging:
            work = staging / "work"
            work.mkdir()
            manifest = start_folder(work, checkpoint, facts, template)
            manifest = replace(manifest, decoder_traits=route.traits, adapters=route.adapters, overlooked=unread)
            written = route.write(ExportJob(manifest, pairs, options, staging, work, clock))
            chosen = _as_json(options, route.name)
            manifest = replace(manifest, tool_versions=written.tool_versions, export_options=chosen)
            manifest = seal(staging, manifest, written.precisions)
            verification = None
            if options.verify:
                clock.begin("verify")
                verification = verify_folder(staging, written, options)
                manifest = replace(manifest, verification=verification.to_dict())
            clock.begin("write")
            shutil.rmtree(work)
            manifest.save(staging)
    return ExportReport(target, manifest, verification, clock.end(), clock.stages, memory.bytes)


def open_adapters(options: ExportOptions) -> list[Adapter]:
    """Return the adapters that the options name, with their weights. Raises `SourceError`."""
    weights = options.adapter_weights or [1.0] * len(options.adapters)
    pairs = zip(options.adapters, weights, strict=True)
    return [open_adapter(folder, weight, options.ignore_config_keys) for folder, weight in pairs]


def default_name(checkpoint: Checkpoint, options: ExportOptions) -> str:
    """Return the short name of an export: the checkpoint's own, those of the adapters, then the precision."""
    adapters = [folder.resolve().name for folder in options.adapters]
    return "-".join([checkpoint.source.split("/")[-1], *adapters, options.precision])


@dataclass(frozen=True)
class ChosenRoute:
    """How a checkpoint's parts are made."""

    name: Route
    write: Callable[[ExportJob], Written]
    traits: DecoderTraits = field(default_factory=DecoderTraits)
    adapters: tuple[MergedAdapter, ...] = ()
    overlooked: Mapping[str, Any] = field(default_factory=dict)
    """What config.json states that the route does not read. That is the native route's question alone: the others get
    the model's arithmetic from transformers, or from the ONNX files."""


def choose_route(
    checkpoint: Checkpoint, facts: Mapping[str, Any], options: ExportOptions, adapters: Sequence[Adapter] = ()
) -> ChosenRoute:
    """Return the route that the options, or else the checkpoint, ask for; the native one alone merges adapters.

    Raises `ExportError` where none can.
    """
    family, kind = exporter(checkpoint), f"family {checkpoint.model_type!r}"
    if options.native_only and not checkpoint.has_safetensors:
        raise OptionError(f"{options.native_only} needs safetensors, which the checkpoint lacks; leave it out")
    if options.via == "onnx" or not checkpoint.has_safetensors:
        if not family.covers_onnx:
            raise SourceError(f"the route from ONNX files does not cover {kind}; use safetensors and --via native")
        _need(onnx.LIBRARIES, "its ONNX files", "export-onnx")
        files = checkpoint.onnx_files()
        onnx.check_parts(files)
        return ChosenRoute("onnx", partial(onnx.write_submodels, files))
    if options.via != "optimum":
        try:
            weights = MergedWeights(checkpoint, adapters, family.renamed) if adapters else Weights(checkpoint)
            found = architecture(checkpoint, facts, weights).with_merged_tokens(options.merge_tokens, kind)
            unread = overlooked(found.sections, options.ignore_config_keys)
            weights.expect(found.shapes, found.unused)
            records = describe(weights, checkpoint) if isinstance(weights, MergedWeights) else ()
            write = partial(native.write_submodels, found, weights)
            return ChosenRoute("native", write, found.decoder_traits, records, unread)
        except UnsupportedError as error:
            if family.encode_in_torch is None:
                raise SourceError(f"{error}, and no other route covers {kind}") from None
            if option := options.native_only:
                raise OptionError(f"{error}, and no other route covers {option}; leave it out") from None
            if options.via == "native":
                raise SourceError(f"{error}; use --via optimum") from None
            _need(optimum.LIBRARIES, f"optimum-intel ({error})", "export-torch")
    if family.encode_in_torch is None:
        raise SourceError(f"the route through optimum-intel does not cover {kind}; use --via native")
    _need(optimum.LIBRARIES, "optimum-intel", "export-torch")
    return ChosenRoute("optimum", partial(optimum.write_submodels, checkpoint))


def describe(weights: MergedWeights, checkpoint: Checkpoint) -> tuple[MergedAdapter, ...]:
    """Return what the manifest says of the adapters that were merged."""
    records = []
    for adapter in weights.adapters:
        notes = notes_about(adapter, checkpoint)
        if weights.moves_head(adapter):
            notes.append(
                "its LoRA on the embedding table changes the LM head, which is the same tensor, as merge_and_unload"
                " does, though not in training"
            )
        records.append(adapter.record(notes))
    return tuple(records)


def _need(libraries: Sequence[str], route: str, extra: str) -> None:
    if missing := [name for name in libraries if find_spec(name) is None]:
        raise ExportError(
            f"this checkpoint goes through {route}, which needs {', '.join(missing)};"
            f" install it with: pip install 'edgevlm[{extra}]'"
        )


def verify_folder(staging: Path, written: Written, options: ExportOptions) -> Verification:
    """Load the finished folder, as it was exported, and compare it with the reference. Raises `VerificationError`."""
    figures = verify(VLM(staging, _REFERENCE_CONFIG), written.cases, written.reference)
    figures = replace(figures, reference=written.reference_name)
    check(figures, scales(written.reference), merges_tokens=bool(options.merge_tokens))
    return figures


def _as_json(options: ExportOptions, via: str) -> dict[str, Any]:
    told_elsewhere = {"adapters", "adapter_weights", "calibration", "force", "verify"}
    plain = asdict(options) | {"via": via}
    return {name: value for name, value in plain.items() if name not in told_elsewhere}
