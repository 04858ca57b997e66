"""The route through torch and optimum-intel: for the families that have no graphs here, and for comparison."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

import edgevlm
from edgevlm.errors import ExportError, SourceError
from edgevlm.inputs.processor import Processor
from edgevlm.manifest import LANGUAGE, SUBMODELS, VISION, Manifest
from edgevlm.runtime.config import RuntimeConfig
from edgevlm.runtime.core import read_ir
from edgevlm.runtime.loader import ModelLoader
from edgevlm_export.calibration import Pair, verification_pairs
from edgevlm_export.clock import StageClock
from edgevlm_export.compress import compress, import_nncf
from edgevlm_export.fuse import fuse_sibling_matmuls
from edgevlm_export.options import VERIFY_TOKENS, ExportOptions, Precision
from edgevlm_export.output_folder import FILE_NAMES, Written, save_ir
from edgevlm_export.routes.optimum_worker import CASES, JOB, REFERENCE, RESULT
from edgevlm_export.samples import language_samples, make_sample, pixel_values, vision_samples
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.verify import load_arrays

LIBRARIES = ("torch", "transformers", "optimum")


def write_parts(
    checkpoint: Checkpoint,
    manifest: Manifest,
    pairs: Sequence[Pair],
    options: ExportOptions,
    staging: Path,
    work: Path,
    clock: StageClock,
) -> Written:
    """Convert, fuse and compress the submodels into `staging`. Raises `ExportError`."""
    versions = convert(checkpoint, manifest, pairs, options, work, clock)
    precisions = compress_parts(staging, manifest, pairs, work, options, clock)
    copy_small_files(work, staging)
    cases, reference = (load_arrays(work / name) if options.verify else {} for name in (CASES, REFERENCE))
    cases = {key: array for key, array in cases.items() if not key.startswith("family.")}
    return Written(precisions, versions, "transformers", cases, reference)


def write_cases(work: Path, manifest: Manifest, pairs: Sequence[Pair]) -> None:
    """Write the verification's inputs: one question about a picture, and one without."""
    processor = Processor(work, manifest)
    arrays: dict[str, Any] = {f"family.{name}": array for name, array in processor.family.constants.items()}
    for name, pair in verification_pairs(pairs).items():
        sample = make_sample(processor, pair)
        arrays[f"{name}.input_ids"] = sample.ids[: sample.prompt]
        if sample.views:
            arrays[f"{name}.pixel_values"] = pixel_values(sample.views)
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
        "family": manifest.family,
    }
    (work / JOB).write_text(json.dumps(job), encoding="utf-8")
    log = work / "convert.log"
    command = [sys.executable, "-m", "edgevlm_export.routes.optimum_worker", str(work)]
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
    staging: Path, manifest: Manifest, pairs: Sequence[Pair], work: Path, options: ExportOptions, clock: StageClock
) -> dict[str, Precision]:
    """Fuse, compress and save each submodel from `work` into `staging`; return the precision of each."""
    precisions = {part: options.part_precision(part) for part in SUBMODELS}
    samples = calibration_samples(work, manifest, pairs, precisions, options, clock)
    for part, precision in precisions.items():
        clock.begin(f"compress {part}")
        model = read_ir(work / FILE_NAMES[part])
        fuse_sibling_matmuls(model)
        model = compress(model, precision, options.int4, samples.get(part))
        save_ir(model, staging / FILE_NAMES[part], precision)
    return precisions


def calibration_samples(
    work: Path,
    manifest: Manifest,
    pairs: Sequence[Pair],
    precisions: Mapping[str, Precision],
    options: ExportOptions,
    clock: StageClock,
) -> dict[str, list[dict[str, Any]]]:
    """Return model inputs for each submodel whose compression needs data."""
    for_language = options.int4.needs_data and precisions[LANGUAGE] == "int4"
    for_vision = precisions[VISION] == "w8a8"
    samples: dict[str, list[dict[str, Any]]] = {}
    if not for_language and not for_vision:
        return samples
    clock.begin("calibrate")
    processor = Processor(work, manifest)
    if for_language:
        loader = ModelLoader(work, manifest, RuntimeConfig(device="CPU", cache=False), "CPU")
        samples[LANGUAGE] = language_samples(processor, loader, pairs)
    if for_vision:
        samples[VISION] = vision_samples(processor, pairs, manifest.hidden_size)
    return samples


def copy_small_files(work: Path, staging: Path) -> None:
    """Copy everything that is neither IR nor the conversion's own."""
    ours = {JOB, CASES, REFERENCE, RESULT, "convert.log", "openvino_config.json"}
    for path in work.iterdir():
        if path.is_file() and path.name not in ours and path.suffix not in {".xml", ".bin"}:
            shutil.copyfile(path, staging / path.name)
