"""The files of an exported folder, and the manifest that seals them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm.errors import SourceError
from edgevlm.families import make_family
from edgevlm.manifest import SUBMODELS, File, Manifest, Submodel, hash_file
from edgevlm.model_store import MANIFEST
from edgevlm.runtime.core import import_openvino
from edgevlm_export.families.text_models import text_section
from edgevlm_export.options import Precision
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.verify import Arrays

if TYPE_CHECKING:
    import openvino as ov

FILE_NAMES = {part: f"openvino_{part}_model.xml" for part in SUBMODELS}
_CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Written:
    """What a route made: parts in the folder, and what to compare them with."""

    precisions: Mapping[str, Precision]
    tool_versions: Mapping[str, str]
    reference_name: str
    """What computed the reference."""
    cases: Arrays
    reference: Arrays


def start_folder(work: Path, checkpoint: Checkpoint, facts: Mapping[str, Any], template: str) -> Manifest:
    """Copy the checkpoint's small files into `work` and return the manifest without what the routes add.

    `template` is the chat template's source.
    """
    try:
        small = {path.name: path.read_bytes() for path in checkpoint.small_files()}
    except OSError as error:
        raise SourceError(f"{error.filename} cannot be read: {error.strerror or error}") from None
    for name, data in small.items():
        (work / name).write_bytes(data)
    (work / _CHAT_TEMPLATE).write_text(template, encoding="utf-8", newline="")
    text = text_section(checkpoint.section(""))
    family = make_family(checkpoint.model_type, facts)
    return Manifest(
        source=checkpoint.source,
        revision=checkpoint.revision,
        family=checkpoint.model_type,
        family_config=facts,
        submodels={part: Submodel(name, "", 0) for part, name in FILE_NAMES.items()},
        files={},
        hidden_size=text.size("hidden_size"),
        vocab_size=text.size("vocab_size"),
        context_length=text.size("max_position_embeddings"),
        eos_token_ids=checkpoint.eos_token_ids,
        special_tokens=checkpoint.named_tokens,
        text_tokens=checkpoint.text_tokens(template + family.block_text()),
        chat_template=_CHAT_TEMPLATE,
        tool_versions={},
    )


def save_ir(model: ov.Model, path: Path, precision: Precision) -> None:
    """Write one IR file pair. Raises `OSError` when the disk does not take it all."""
    try:
        import_openvino().save_model(model, path, compress_to_fp16=precision == "fp16")
    except RuntimeError as error:
        raise OSError(f"OpenVINO could not write {path.name}; the disk may be full") from error


def seal(staging: Path, manifest: Manifest, precisions: Mapping[str, Precision]) -> Manifest:
    """Write and return the manifest with sizes and hashes of the finished files."""
    paths = [path for path in sorted(staging.iterdir()) if path.is_file() and path.name != MANIFEST]
    files = {path.name: File(hash_file(path), path.stat().st_size) for path in paths}
    parts = {}
    for part, precision in precisions.items():
        name = FILE_NAMES[part]
        weights = Path(name).with_suffix(".bin").name
        parts[part] = Submodel(name, precision, files[name].size_bytes + files[weights].size_bytes)
    manifest = replace(manifest, submodels=parts, files=files)
    manifest.save(staging)
    return manifest
