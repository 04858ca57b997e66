"""The checkpoint to export: a local folder in Hugging Face layout, or a hub id through the local cache."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevlm.errors import SourceError
from edgevlm.manifest import LANGUAGE, TEXT_EMBEDDINGS, VISION
from edgevlm.paths import is_barred, is_there
from edgevlm_export.options import Route

_SMALL = ["*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md"]
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
_ONNX_FILES: Mapping[str, tuple[str, ...]] = {
    VISION: ("vision_encoder.onnx",),
    TEXT_EMBEDDINGS: ("embed_tokens.onnx",),
    LANGUAGE: ("decoder_model_merged.onnx", "decoder_with_past_model.onnx"),
}
"""What each part is called as Transformers.js reads it, the first name before the next."""
_COPIED = (".json", ".jinja", ".txt", ".model")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, its small files read."""

    folder: Path
    source: str
    revision: str | None
    config: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        """The architecture's name in the Hugging Face config."""
        return str(self.config.get("model_type", ""))

    def read(self, name: str) -> dict[str, Any]:
        """Return a JSON file of the checkpoint, empty when there is none."""
        path = self.folder / name
        return _read_json(path) if path.is_file() else {}

    @property
    def chat_template(self) -> str:
        """The Jinja source, from the first place where Hugging Face keeps it."""
        jinja = self.folder / "chat_template.jinja"
        if jinja.is_file():
            return jinja.read_text(encoding="utf-8")
        for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
            template = self.read(name).get("chat_template")
            if isinstance(template, list):
                template = next((each["template"] for each in template if each.get("name") == "default"), None)
            if template:
                return str(template)
        raise SourceError(f"{self.folder} has no chat template; edgevlm needs a chat (instruct) checkpoint")

    @property
    def special_tokens(self) -> dict[str, str]:
        """The special tokens that a chat template may name, as text."""
        found = self.read("tokenizer_config.json") | self.read("special_tokens_map.json")
        texts = {name: found.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        plain = {name: token["content"] if isinstance(token, dict) else token for name, token in texts.items()}
        return {name: str(token) for name, token in plain.items() if token}

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end an answer, from the first file that states any."""
        for holder in (self.read("generation_config.json"), self.config, self.config.get("text_config", {})):
            ids = holder.get("eos_token_id")
            if ids is not None:
                return tuple(ids) if isinstance(ids, list) else (int(ids),)
        raise SourceError(f"{self.folder} states no eos_token_id, in neither generation_config.json nor config.json")

    def small_files(self) -> list[Path]:
        """Return the files that go into the export unchanged: configs, tokenizer, licence and model card."""
        return [
            path
            for path in sorted(self.folder.iterdir())
            if path.is_file()
            and (path.suffix in _COPIED or path.name.startswith("LICENSE") or path.name == "README.md")
            and not path.name.endswith(".safetensors.index.json")
        ]

    @property
    def has_safetensors(self) -> bool:
        """Whether there are weights to make graphs for, or only graphs with their weights in them."""
        return _has_safetensors(self.folder)

    def onnx_files(self) -> dict[str, Path]:
        """Return the ONNX file of each part, all of them in `onnx/` or beside config.json. Raises `SourceError`."""
        lacking = f"{self.folder} has no ONNX files, neither in onnx/ nor beside config.json"
        for place in (self.folder / "onnx", self.folder):
            found = {
                part: path
                for part, names in _ONNX_FILES.items()
                for name in reversed(names)
                if (path := place / name).is_file()
            }
            missing = [" or ".join(names) for part, names in _ONNX_FILES.items() if part not in found]
            if not missing:
                return found
            if found:
                lacking = f"{place} lacks {missing[0]}, without which the other ONNX files are of no use"
                break
        raise SourceError(lacking)

    def weight_files(self) -> list[Path]:
        """Return the safetensors files, all that the index names where there is one."""
        return [self.folder / name for name in _weight_names(self.folder)]


def open_checkpoint(source: str | os.PathLike[str], revision: str | None = None, via: Route = "auto") -> Checkpoint:
    """Return the checkpoint that `source` names, with the weights that the route `via` reads. Raises `SourceError`."""
    folder = Path(source)
    if is_barred(folder / "config.json"):
        raise SourceError(f"{source} cannot be read: permission denied")
    if is_there(folder) and folder.is_dir():
        return _open_folder(folder, folder.resolve().name, None, via)
    if is_there(folder):
        raise SourceError(f"{source} is a file; give the checkpoint's folder or a hub id")
    snapshot = _fetch(str(source), revision, via)
    return _open_folder(snapshot, str(source), snapshot.name, via)


def _open_folder(folder: Path, source: str, revision: str | None, via: Route) -> Checkpoint:
    if not (folder / "config.json").is_file():
        raise SourceError(f"{folder} has no config.json, so it is no Hugging Face checkpoint")
    checkpoint = Checkpoint(folder, source, revision, _read_json(folder / "config.json"))
    has_onnx = any(place.is_dir() and any(place.glob("*.onnx")) for place in (folder / "onnx", folder))
    from_onnx = via == "onnx" or (via == "auto" and has_onnx and not checkpoint.has_safetensors)
    if from_onnx:
        checkpoint.onnx_files()
    elif not checkpoint.has_safetensors:
        other = "; --via onnx reads its ONNX files" if has_onnx else ""
        raise SourceError(f"{folder} has no model.safetensors; only safetensors weights are read{other}")
    if not (folder / "tokenizer.json").is_file():
        raise SourceError(f"{folder} has no tokenizer.json; save the checkpoint's fast tokenizer there first")
    if not from_onnx:
        _check_weights(folder)
    return checkpoint


def _has_safetensors(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _WEIGHT_FILES)


def _check_weights(folder: Path) -> None:
    """Open every weight file, which reads its header and compares it with the file's length."""
    from safetensors import SafetensorError, safe_open

    for name in _weight_names(folder):
        try:
            with safe_open(folder / name, framework="np"):  # type: ignore[no-untyped-call]
                pass
        except FileNotFoundError:
            raise SourceError(f"{folder} lacks {name}, which its index names") from None
        except (SafetensorError, OSError) as error:
            raise SourceError(f"{folder / name} is damaged or truncated: {error}") from None


def _weight_names(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SourceError(f"{index} has no weight_map from tensors to files")
    return sorted(set(weight_map.values()))


def _fetch(repo: str, revision: str | None, via: Route) -> Path:
    """Return the hub repository's snapshot with what the route reads: safetensors, or ONNX where there are none."""
    if via != "onnx":
        snapshot = _download(repo, revision, [*_SMALL, "*.safetensors"], ["*/*"])
        if via != "auto" or _has_safetensors(snapshot):
            return snapshot
    names = [name for alternatives in _ONNX_FILES.values() for name in alternatives]
    wanted = [f"onnx/{name}{ending}" for name in names for ending in ("", "_data*", ".data")]
    return _download(repo, revision, [*_SMALL, *wanted], ["onnx/*.json"])


def _download(repo: str, revision: str | None, wanted: list[str], unwanted: list[str]) -> Path:
    """Return the hub repository's snapshot in the Hugging Face cache, downloading what is missing."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted))
    except HFValidationError:
        raise SourceError(f"no folder {repo!r} here, and it is no hub id of the form owner/name") from None
    except GatedRepoError:
        raise SourceError(f"{repo} is gated; accept its terms on the hub and log in with `hf auth login`") from None
    except RevisionNotFoundError:
        raise SourceError(f"{repo} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise SourceError(f"no folder {repo!r} here and no such model on the hub") from None
    except LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise SourceError(f"no folder {repo!r} here, it is not in the Hugging Face cache, and {why}") from None
    except (HfHubHTTPError, OSError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SourceError(f"{repo} cannot be fetched: {line}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise SourceError(f"{path} is not a JSON object")
    return data
