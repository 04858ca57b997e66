"""The route through torch and optimum-intel: for the families that have no graphs here, and for comparison."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

import edgevlm
from edgevlm.errors import ExportError, SourceError
from edgevlm.inputs.processor import Processor
from edgevlm_export.calibration import verification_pairs
from edgevlm_export.compress import import_nncf
from edgevlm_export.options import VERIFY_TOKENS
from edgevlm_export.output_folder import Written
from edgevlm_export.routes.base import ExportJob, compress_submodels, copy_small_files
from edgevlm_export.routes.optimum_worker import CASES, JOB, REFERENCE, RESULT
from edgevlm_export.samples import make_sample, pixel_values
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.verify import load_arrays

LIBRARIES = ("torch", "transformers", "optimum")
_LOG = "convert.log"


def write_submodels(checkpoint: Checkpoint, job: ExportJob) -> Written:
    """Convert, fuse and compress the submodels. Raises `ExportError`."""
    versions = convert(checkpoint, job)
    precisions = compress_submodels(job)
    copy_small_files(job.work, job.staging, {JOB, CASES, REFERENCE, RESULT, _LOG, "openvino_config.json"})
    cases, reference = (load_arrays(job.work / name) if job.options.verify else {} for name in (CASES, REFERENCE))
    cases = {key: array for key, array in cases.items() if not key.startswith("family.")}
    return Written(precisions, versions, "transformers", cases, reference)


def write_cases(job: ExportJob) -> None:
    """Write the verification's inputs: one question about a picture, and one without."""
    processor = Processor(job.work, job.manifest)
    arrays: dict[str, Any] = {f"family.{name}": array for name, array in processor.family.constants.items()}
    for name, pair in verification_pairs(job.pairs).items():
        sample = make_sample(processor, pair)
        arrays[f"{name}.input_ids"] = sample.ids[: sample.prompt]
        if sample.views:
            arrays[f"{name}.pixel_values"] = pixel_values(sample.views)
    np.savez(job.work / CASES, **arrays)


def convert(checkpoint: Checkpoint, job: ExportJob) -> dict[str, str]:
    """Run the torch side in a child process; return the versions of what it used. Raises `ExportError`."""
    work, options = job.work, job.options
    if options.verify:
        write_cases(job)
    request = {
        "checkpoint": str(checkpoint.folder),
        "trust_remote_code": options.trust_remote_code,
        "dtype": options.dtype,
        "verify": options.verify,
        "verify_tokens": VERIFY_TOKENS,
        "family": job.manifest.family,
    }
    (work / JOB).write_text(json.dumps(request), encoding="utf-8")
    log = work / _LOG
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
                    job.clock.begin(line[2:].strip())
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
