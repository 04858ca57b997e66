"""The contract between exporter and runtime: `edgevlm.json` in an exported folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from edgevlm.errors import DamagedModelError, ExportError
from edgevlm.families.base import DecoderTraits
from edgevlm.model_store import MANIFEST
from edgevlm.strict_json import write_json

SCHEMA_VERSION = 2
_RENAMED = {"family_facts": "family_config", "parts": "submodels"}
"""Fields of schema version 1, which differs from 2 in nothing else."""
VISION, TEXT_EMBEDDINGS, LANGUAGE = "vision_embeddings", "text_embeddings", "language"
SUBMODELS = (VISION, TEXT_EMBEDDINGS, LANGUAGE)
_HASH_AT_LOAD_BYTES = 16 * 2**20
"""Files up to this many bytes are hashed at every load; larger ones by `check_files(full=True)`."""


@dataclass(frozen=True)
class Submodel:
    """One IR of the export: its .xml file, the .bin beside it, and how its weights are stored."""

    file: str
    precision: str
    size_bytes: int


@dataclass(frozen=True)
class File:
    """Expected size and hash of a file."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class MergedAdapter:
    """A PEFT adapter that was merged into the checkpoint's weights."""

    name: str
    """Of its folder."""
    base: str
    """The checkpoint that it was trained on, as its config names it, without folders."""
    weight: float
    """By which the difference that it makes was multiplied."""
    files: Mapping[str, str]
    """SHA-256 of its config and of its weights, by the files' names."""
    config: Mapping[str, Any]
    """What its config says of how it is merged: rank, alpha and the like."""
    tensors: int
    """How many tensors it changes."""
    notes: tuple[str, ...] = ()
    """What a user should know of it."""


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime has to know about an exported folder."""

    source: str
    revision: str | None
    family: str
    family_config: Mapping[str, Any]
    submodels: Mapping[str, Submodel]
    files: Mapping[str, File]
    hidden_size: int
    vocab_size: int
    context_length: int
    eos_token_ids: tuple[int, ...]
    special_tokens: Mapping[str, str]
    chat_template: str
    tool_versions: Mapping[str, str]
    decoder_traits: DecoderTraits = field(default_factory=DecoderTraits)
    adapters: tuple[MergedAdapter, ...] = ()
    """Adapters that were merged into `source`."""
    text_tokens: tuple[str, ...] = ()
    """Special tokens that are part of an answer; all others shape the prompt."""
    overlooked: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the checkpoint's configuration that the exporter does not know, with their values."""
    export_options: Mapping[str, Any] = field(default_factory=dict)
    verification: Mapping[str, Any] | None = None
    schema_version: int = SCHEMA_VERSION

    @property
    def size_bytes(self) -> int:
        """Bytes on disk of the whole export."""
        return sum(file.size_bytes for file in self.files.values())

    @property
    def fingerprint(self) -> str:
        """A short name for this exact export: a hash over its files' hashes."""
        text = json.dumps({name: file.sha256 for name, file in sorted(self.files.items())})
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write `edgevlm.json` into `folder`. Raises `ExportError` where a number of the checkpoint's is not finite."""
        try:
            text = write_json(asdict(self), indent=2)
        except ValueError:
            raise ExportError("the checkpoint's configuration holds Infinity or NaN; write the number meant") from None
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def load_manifest(folder: Path) -> Manifest:
    """Read and check `edgevlm.json`. Raises `DamagedModelError`."""
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedModelError(
            f"{folder} has no {MANIFEST}, so it is no edgevlm export; make one with `edgevlm export SOURCE`"
        ) from None
    except OSError as error:
        raise DamagedModelError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise DamagedModelError(f"{path} cannot be read ({error}); export the model again") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version == 1:
        data = {_RENAMED.get(name, name): value for name, value in data.items()} | {"schema_version": SCHEMA_VERSION}
    elif version != SCHEMA_VERSION:
        raise DamagedModelError(
            f"{path} has schema version {version}, this edgevlm reads 1 and {SCHEMA_VERSION}; export the model again"
        )
    try:
        manifest = msgspec.convert(data, Manifest)
    except msgspec.ValidationError as error:
        raise DamagedModelError(f"{path} is damaged ({error}); export the model again") from None
    missing = [name for name in SUBMODELS if name not in manifest.submodels]
    if missing:
        raise DamagedModelError(f"{path} names no {missing[0]} submodel; export the model again")
    return manifest


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path, manifest: Manifest, *, full: bool = False) -> None:
    """Compare the folder's files with the manifest: every size, and the hash of all (`full`) or of the smaller ones.

    Raises `DamagedModelError` naming the first file that differs.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError:
            raise DamagedModelError(f"{folder} lacks its file {name}; export the model again") from None
        if size != expected.size_bytes:
            raise DamagedModelError(
                f"{path} has {size:,} bytes instead of {expected.size_bytes:,}: truncated or replaced; export again"
            )
        try:
            same = (size > _HASH_AT_LOAD_BYTES and not full) or hash_file(path) == expected.sha256
        except OSError as error:
            raise DamagedModelError(f"{path} cannot be read: {error.strerror or error}") from None
        if not same:
            raise DamagedModelError(f"{path} is not what was exported (SHA-256 differs); export the model again")
