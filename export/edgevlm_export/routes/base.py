"""What the routes share: the job they get, and compression of submodels that are converted whole."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm.inputs.processor import Processor
from edgevlm.manifest import LANGUAGE, SUBMODELS, VISION, Manifest
from edgevlm.runtime.config import RuntimeConfig
from edgevlm.runtime.core import read_ir
from edgevlm.runtime.loader import ModelLoader
from edgevlm_export.calibration import Pair
from edgevlm_export.clock import StageClock
from edgevlm_export.compress import compress
from edgevlm_export.fuse import fuse_sibling_matmuls
from edgevlm_export.options import ExportOptions, Precision
from edgevlm_export.output_folder import FILE_NAMES, save_ir
from edgevlm_export.samples import language_samples, vision_samples


@dataclass(frozen=True)
class ExportJob:
    """One export in progress, as a route sees it."""

    manifest: Manifest
    """Without submodels and files, which come last."""
    pairs: Sequence[Pair]
    """Pictures and questions for calibration and verification."""
    options: ExportOptions
    staging: Path
    """The folder that becomes the export."""
    work: Path
    """A folder for what the export does not keep; the checkpoint's small files lie in it."""
    clock: StageClock


def compress_submodels(job: ExportJob) -> dict[str, Precision]:
    """Fuse, compress and save each submodel from `work` into `staging`; return the precision of each."""
    precisions = {name: job.options.part_precision(name) for name in SUBMODELS}
    samples = calibration_samples(job)
    for name, precision in precisions.items():
        job.clock.begin(f"compress {name}")
        model = read_ir(job.work / FILE_NAMES[name])
        fuse_sibling_matmuls(model)
        model = compress(model, precision, job.options.int4, samples.get(name))
        save_ir(model, job.staging / FILE_NAMES[name], precision)
    return precisions


def calibration_samples(job: ExportJob) -> dict[str, list[dict[str, Any]]]:
    """Return model inputs for each submodel whose compression needs data."""
    for_language = job.options.int4.needs_data and job.options.part_precision(LANGUAGE) == "int4"
    for_vision = job.options.part_precision(VISION) == "w8a8"
    samples: dict[str, list[dict[str, Any]]] = {}
    if not for_language and not for_vision:
        return samples
    job.clock.begin("calibrate")
    processor = Processor(job.work, job.manifest)
    if for_language:
        loader = ModelLoader(job.work, job.manifest, RuntimeConfig(device="CPU", cache=False), "CPU")
        samples[LANGUAGE] = language_samples(processor, loader, job.pairs)
    if for_vision:
        samples[VISION] = vision_samples(processor, job.pairs, job.manifest.hidden_size)
    return samples


def copy_small_files(work: Path, staging: Path, except_for: Collection[str] = ()) -> None:
    """Copy everything that is neither IR nor among the names `except_for`."""
    for path in work.iterdir():
        if path.is_file() and path.name not in except_for and path.suffix not in {".xml", ".bin"}:
            shutil.copyfile(path, staging / path.name)
