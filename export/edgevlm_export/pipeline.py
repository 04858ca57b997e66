"""The whole export, readable as a recipe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

import edgevlm
from edgevlm.chat import user_message
from edgevlm.device import RuntimeConfig, import_openvino, read_ir
from edgevlm.errors import ExportError, SourceError
from edgevlm.generate import GenerationConfig
from edgevlm.manifest import LANGUAGE, PART_NAMES, VISION, File, Manifest, Part, hash_file
from edgevlm.model import VLM
from edgevlm.parts import PartLoader
from edgevlm.paths import MANIFEST, models_dir
from edgevlm.processor import Processor
from edgevlm_export.calibration import Pair, language_samples, load_pairs, vision_samples
from edgevlm_export.checkpoint import Checkpoint, open_checkpoint
from edgevlm_export.compress import compress, import_nncf
from edgevlm_export.convert import CASES, JOB, REFERENCE, RESULT
from edgevlm_export.draft import draft_folder
from edgevlm_export.families import family_facts
from edgevlm_export.graph import fuse_sibling_matmuls
from edgevlm_export.memory import PeakMemory
from edgevlm_export.options import ExportOptions, Precision
from edgevlm_export.verify import Verification, check, load_arrays, scales, verify

if TYPE_CHECKING:
    import openvino as ov

OnStage: TypeAlias = Callable[[str], None]
FILE_NAMES = {part: f"openvino_{part}_model.xml" for part in PART_NAMES}
VERIFY_TOKENS = 32
_CHAT_TEMPLATE = "chat_template.jinja"
_REFERENCE_CONFIG = RuntimeConfig(device="CPU", inference_precision="f32", cache=False)


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
            "parts": {name: asdict(part) for name, part in self.manifest.parts.items()},
            "size_bytes": self.manifest.size_bytes,
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
        checkpoint = open_checkpoint(source, options.revision)
        facts = family_facts(checkpoint)
        pairs = load_pairs(options.calibration)  # a bad set is refused before the work begins
        target = output or models_dir() / default_name(checkpoint, options)
        with draft_folder(target, force=options.force) as draft:
            work = draft / "work"
            work.mkdir()
            manifest = start_folder(work, checkpoint, facts)
            versions = convert(checkpoint, manifest, pairs, options, work, clock)
            manifest = replace(manifest, tool_versions=versions, export_options=_as_json(options))
            precisions = compress_parts(draft, manifest, pairs, work, options, clock)
            copy_small_files(work, draft)
            manifest = seal(draft, manifest, precisions)
            verification = None
            if options.verify:
                clock.begin("verify")
                verification = verify_folder(draft, work)
                manifest = replace(manifest, verification=verification.to_dict())
            clock.begin("write")
            shutil.rmtree(work)
            manifest.save(draft)
    return ExportReport(target, manifest, verification, clock.end(), clock.stages, memory.bytes)


def default_name(checkpoint: Checkpoint, options: ExportOptions) -> str:
    """Return the short name of an export: the checkpoint's own, then the precision."""
    return f"{checkpoint.source.split('/')[-1]}-{options.precision}"


def start_folder(work: Path, checkpoint: Checkpoint, facts: Mapping[str, Any]) -> Manifest:
    """Copy the checkpoint's small files into `work` and return the manifest as far as it is known."""
    for path in checkpoint.small_files():
        shutil.copyfile(path, work / path.name)
    (work / _CHAT_TEMPLATE).write_text(checkpoint.chat_template, encoding="utf-8")
    text = checkpoint.config.get("text_config", {})
    try:
        return Manifest(
            source=checkpoint.source,
            revision=checkpoint.revision,
            family=checkpoint.model_type,
            family_facts=facts,
            parts={part: Part(name, "", 0) for part, name in FILE_NAMES.items()},
            files={},
            hidden_size=int(text["hidden_size"]),
            vocab_size=int(text["vocab_size"]),
            context_length=int(text["max_position_embeddings"]),
            eos_token_ids=checkpoint.eos_token_ids,
            special_tokens=checkpoint.special_tokens,
            chat_template=_CHAT_TEMPLATE,
            tool_versions={},
        )
    except KeyError as error:
        raise SourceError(f"config.json states no text_config.{error.args[0]}") from None


def write_cases(work: Path, manifest: Manifest, pairs: Sequence[Pair]) -> None:
    """Write the verification's inputs: one question about a picture, and one without."""
    processor = Processor(work, manifest)
    arrays: dict[str, Any] = {}
    with_picture = next((pair for pair in pairs if pair.image), None)
    without = next((pair for pair in pairs if not pair.image), Pair("What is the capital of France?"))
    for name, pair in (("picture", with_picture), ("text", without)):
        if pair is None:
            continue
        tiles = processor.preprocess([pair.image] if pair.image else [], GenerationConfig(detail="low"))
        ids = processor.prompt_ids([user_message(pair.question, len(tiles))], tiles)
        arrays[f"{name}.input_ids"] = np.asarray(ids, np.int64)
        if tiles:
            arrays[f"{name}.pixel_values"] = np.concatenate([each.pixel_values for each in tiles])
    np.savez(work / CASES, **arrays)


def convert(
    checkpoint: Checkpoint,
    manifest: Manifest,
    pairs: Sequence[Pair],
    options: ExportOptions,
    work: Path,
    clock: StageClock,
) -> dict[str, str]:
    """Run the torch side in a child process; return the versions of what it used. Raises `ExportError`."""
    if options.verify:
        write_cases(work, manifest, pairs)
    job = {
        "checkpoint": str(checkpoint.folder),
        "trust_remote_code": options.trust_remote_code,
        "dtype": options.dtype,
        "verify": options.verify,
        "verify_tokens": VERIFY_TOKENS,
    }
    (work / JOB).write_text(json.dumps(job), encoding="utf-8")
    log = work / "convert.log"
    command = [sys.executable, "-m", "edgevlm_export.convert", str(work)]
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8") as child,
    ):
        assert child.stdout is not None
        try:
            Thread(target=import_nncf, daemon=True).start()  # takes seconds, and the child leaves a core idle
            for line in child.stdout:
                if line.startswith("@ "):
                    clock.begin(line[2:].strip())
        except BaseException:
            child.kill()
            raise
    if not (work / RESULT).is_file():
        raise ExportError(_why_it_ended(child.returncode, log))
    result = json.loads((work / RESULT).read_text(encoding="utf-8"))
    if "refused" in result:
        raise SourceError(result["refused"])
    if "unwritten" in result:
        raise OSError(result["unwritten"])
    return {"edgevlm": edgevlm.__version__, **result["versions"]}


def _why_it_ended(returncode: int, log: Path) -> str:
    """Return the reason why the child wrote no result, for the user."""
    if returncode == -9:
        return "the conversion was killed, most likely for lack of memory; close other programs or use a larger machine"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"the conversion ended with exit code {returncode}: {lines[-1] if lines else 'it said nothing'}"


def compress_parts(
    draft: Path, manifest: Manifest, pairs: Sequence[Pair], work: Path, options: ExportOptions, clock: StageClock
) -> dict[str, Precision]:
    """Fuse, compress and save each part from `work` into `draft`; return the precision of each."""
    precisions = {part: options.part_precision(part) for part in PART_NAMES}
    samples = calibration_samples(work, manifest, pairs, precisions, options, clock)
    for part, precision in precisions.items():
        clock.begin(f"compress {part}")
        model = read_ir(work / FILE_NAMES[part])
        fuse_sibling_matmuls(model)
        model = compress(model, precision, options.int4, samples.get(part))
        save_ir(model, draft / FILE_NAMES[part], precision)
    return precisions


def calibration_samples(
    work: Path,
    manifest: Manifest,
    pairs: Sequence[Pair],
    precisions: Mapping[str, Precision],
    options: ExportOptions,
    clock: StageClock,
) -> dict[str, list[dict[str, Any]]]:
    """Return model inputs for each part whose compression needs data."""
    for_language = options.int4.needs_data and precisions[LANGUAGE] == "int4"
    for_vision = precisions[VISION] == "w8a8"
    samples: dict[str, list[dict[str, Any]]] = {}
    if not for_language and not for_vision:
        return samples
    clock.begin("calibrate")
    processor = Processor(work, manifest)
    if for_language:
        loader = PartLoader(work, manifest, RuntimeConfig(device="CPU", cache=False), "CPU")
        samples[LANGUAGE] = language_samples(processor, loader, pairs)
    if for_vision:
        samples[VISION] = vision_samples(processor, pairs)
    return samples


def save_ir(model: ov.Model, path: Path, precision: Precision) -> None:
    """Write one IR file pair. Raises `OSError` when the disk does not take it all."""
    try:
        import_openvino().save_model(model, path, compress_to_fp16=precision == "fp16")
    except RuntimeError as error:
        raise OSError(f"OpenVINO could not write {path.name}; the disk may be full") from error


def copy_small_files(work: Path, draft: Path) -> None:
    """Copy everything that is neither IR nor the conversion's own."""
    ours = {JOB, CASES, REFERENCE, RESULT, "convert.log", "openvino_config.json"}
    for path in work.iterdir():
        if path.is_file() and path.name not in ours and path.suffix not in {".xml", ".bin"}:
            shutil.copyfile(path, draft / path.name)


def seal(draft: Path, manifest: Manifest, precisions: Mapping[str, Precision]) -> Manifest:
    """Write and return the manifest with what the finished files weigh and hash to."""
    paths = [path for path in sorted(draft.iterdir()) if path.is_file() and path.name != MANIFEST]
    files = {path.name: File(hash_file(path), path.stat().st_size) for path in paths}
    parts = {}
    for part, precision in precisions.items():
        name = FILE_NAMES[part]
        weights = Path(name).with_suffix(".bin").name
        parts[part] = Part(name, precision, files[name].size_bytes + files[weights].size_bytes)
    manifest = replace(manifest, parts=parts, files=files)
    manifest.save(draft)
    return manifest


def verify_folder(draft: Path, work: Path) -> Verification:
    """Load the finished folder as the runtime would and compare it with the reference. Raises `VerificationError`."""
    cases, reference = load_arrays(work / CASES), load_arrays(work / REFERENCE)
    figures = verify(VLM(draft, _REFERENCE_CONFIG), cases, reference)
    check(figures, scales(reference))
    return figures


class StageClock:
    """Times the stages and announces each one."""

    def __init__(self, on_stage: OnStage | None) -> None:
        self._on_stage = on_stage
        self._started = self._stage_started = perf_counter()
        self._stage: str | None = None
        self.stages: dict[str, float] = {}

    def begin(self, stage: str) -> None:
        """End the stage before and begin `stage`."""
        self.end()
        self._stage, self._stage_started = stage, perf_counter()
        if self._on_stage:
            self._on_stage(stage)

    def end(self) -> float:
        """End the stage and return the seconds since the beginning."""
        if self._stage is not None:
            self.stages[self._stage] = self.stages.get(self._stage, 0.0) + perf_counter() - self._stage_started
            self._stage = None
        return perf_counter() - self._started


def _as_json(options: ExportOptions) -> dict[str, Any]:
    plain = asdict(options)
    return {name: value for name, value in plain.items() if name not in {"calibration", "force", "verify"}}
