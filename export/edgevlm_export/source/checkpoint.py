"""The checkpoint to export: a local folder in Hugging Face layout, or a hub id through the local cache."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from edgevlm.errors import SourceError
from edgevlm.manifest import LANGUAGE, TEXT_EMBEDDINGS, VISION
from edgevlm.model_store import is_barred, is_there
from edgevlm_export.options import Route
from edgevlm_export.source.config_reader import ConfigReader

_PROCESSOR, _PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
_VIDEO_PREPROCESSOR = "video_preprocessor_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_FOLDER_OF_TEMPLATES = "additional_chat_templates"
_TEMPLATE_FILES = (_TEMPLATE, "chat_template.json")
_PROCESSOR_FILES = (_PROCESSOR, _PREPROCESSOR, _VIDEO_PREPROCESSOR)
_TOKENIZER_FILES = (
    "tokenizer.json",
    _TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
ADAPTER_CONFIG = "adapter_config.json"
"""What makes a folder a PEFT adapter."""
_PLACE = re.compile(r"<(loc|seg)_?\d+>")
_MARKUP: Mapping[str, re.Pattern[str]] = {
    "<doclang>": re.compile(r"(</?[a-z][^<>|]*>?)+|<!\[CDATA\[|\]\]>|\"/>"),
    "<doctag>": re.compile(r"</?[a-z][a-z0-9_]*>?"),
    "<fcel>": re.compile(r"<([eflux]cel|nl)>|<\|LOC_(\d+|[A-Z]+)\|>"),
}
"""The special tokens of a vocabulary that has this one; a token of DocLang may be several tags, or part of one."""
_SMALL = ["*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md"]
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
_ONNX_FILES: Mapping[str, tuple[str, ...]] = {
    VISION: ("vision_encoder.onnx",),
    TEXT_EMBEDDINGS: ("embed_tokens.onnx",),
    LANGUAGE: ("decoder_model_merged.onnx", "decoder_with_past_model.onnx"),
}
"""What each submodel is called as Transformers.js reads it, the first name before the next."""
_COPIED = (".json", ".jinja", ".txt", ".model")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, its small files read."""

    folder: Path
    source: str
    revision: str | None
    config: Mapping[str, Any]
    stand_ins: Mapping[str, Path] = field(default_factory=dict)
    """The folders of adapters that some files are read from instead, by the files' names."""

    @property
    def model_type(self) -> str:
        """The architecture's name in the Hugging Face config."""
        return str(self.config.get("model_type", ""))

    def with_files_of(self, adapters: Iterable[Path]) -> Checkpoint:
        """Return it with tokenizer, processors' settings and chat templates of the adapters in these folders.

        Each of the three is that of the first folder that has it.
        """
        stand_ins: dict[str, Path] = {}
        for folder in adapters:
            if (folder / "tokenizer.json").is_file():
                stand_ins = dict.fromkeys(_TOKENIZER_FILES, folder) | stand_ins
            if "image_processor" in _read(folder / _PROCESSOR) or (folder / _PREPROCESSOR).is_file():
                stand_ins = dict.fromkeys(_PROCESSOR_FILES, folder) | stand_ins
            if _templates_in(folder):
                stand_ins = dict.fromkeys(_TEMPLATE_FILES, folder) | stand_ins
        return replace(self, stand_ins=stand_ins)

    def path(self, name: str) -> Path:
        """Return where a file of the checkpoint is, or would be."""
        return self.stand_ins.get(name, self.folder) / name

    def read(self, name: str) -> dict[str, Any]:
        """Return a JSON file of the checkpoint, empty when there is none."""
        return _read(self.path(name))

    def section(
        self, name: str, defaults: Mapping[str, Any] | None = None, harmless: Collection[str] = ()
    ) -> ConfigReader:
        """Return an object of config.json, the whole where `name` is empty. Raises `SourceError`."""
        whole = ConfigReader(self.config, "", None if name else defaults, harmless=() if name else harmless)
        return whole.section(name, defaults, harmless=harmless) if name else whole

    def image_settings(self) -> Mapping[str, Any]:
        """Return the image processor's settings as they are stated."""
        nested = self.read(_PROCESSOR).get("image_processor")
        return nested if isinstance(nested, Mapping) else self.read(_PREPROCESSOR)

    def image_processor(self, defaults: Mapping[str, Any], harmless: Collection[str]) -> ConfigReader:
        """Return the image processor's settings: transformers 5 keeps them in processor_config.json, 4 in a file of
        their own. Raises `SourceError`."""
        nested = self.read(_PROCESSOR).get("image_processor")
        if nested is not None:
            return ConfigReader(nested, "image_processor", defaults, file=_PROCESSOR, harmless=harmless)
        if not self.path(_PREPROCESSOR).is_file():
            raise SourceError(f"{self.folder} has no {_PREPROCESSOR}, and no image_processor in {_PROCESSOR}")
        return ConfigReader(self.read(_PREPROCESSOR), "", defaults, file=_PREPROCESSOR, harmless=harmless)

    def video_processor(self, defaults: Mapping[str, Any], harmless: Collection[str]) -> ConfigReader:
        """Return the video processor's settings, from the first place of transformers' that has them.

        These are processor_config.json, video_preprocessor_config.json, and the image processor's own file. Raises
        `SourceError`.
        """
        nested = self.read(_PROCESSOR).get("video_processor")
        if nested is not None:
            return ConfigReader(nested, "video_processor", defaults, file=_PROCESSOR, harmless=harmless)
        file = next((each for each in (_VIDEO_PREPROCESSOR, _PREPROCESSOR) if self.path(each).is_file()), None)
        return ConfigReader(self.read(file) if file else {}, "", defaults, file=file or _PROCESSOR, harmless=harmless)

    def chat_template(self, name: str = "default") -> str:
        """Return the Jinja source of the template called so, from the first place that has one. Raises `SourceError`.

        Places and names as transformers 5.24 has them: chat_template.jinja is the default one, others lie in
        additional_chat_templates/; chat_template.json, processor_config.json and tokenizer_config.json may hold one, or
        several by name.
        """
        folder = self.path(_TEMPLATE).parent
        templates = _templates_in(folder)
        if name in templates:
            return templates[name]
        if not templates:
            raise SourceError(f"{self.folder} has no chat template; edgevlm needs a chat (instruct) checkpoint")
        known = ", ".join(sorted(templates))
        raise SourceError(f"{folder} has no chat template {name!r}; --chat-template takes one of: {known}")

    @cached_property
    def named_tokens(self) -> dict[str, str]:
        """The tokens that the tokenizer's files name (`bos_token`, `image_token`, …), as text.

        transformers reads special_tokens_map.json only where tokenizer_config.json does not describe its added tokens.
        """
        found = self.read(_TOKENIZER_CONFIG)
        if "added_tokens_decoder" not in found:
            found |= self.read("special_tokens_map.json")
        extra = found.get("extra_special_tokens")
        named = {**found, **(extra if isinstance(extra, dict) else {})}
        texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
        return {
            name: text for name, text in texts.items() if name.endswith("_token") and text and isinstance(text, str)
        }

    @cached_property
    def added_tokens(self) -> Mapping[str, Mapping[str, Any]]:
        """The tokens that tokenizer.json adds to the vocabulary, by what they are called. Raises `SourceError`."""
        added = self.read("tokenizer.json").get("added_tokens") or []
        try:
            return {str(token["content"]): token for token in added}
        except (KeyError, TypeError):
            raise SourceError(f"{self.path('tokenizer.json')} is no tokenizer: its added_tokens are broken") from None

    def text_tokens(self, written: str) -> tuple[str, ...]:
        """Return the special tokens that are part of an answer: markup and places, which its reader needs.

        They are `<loc_12>` and the like, and the tags of a vocabulary that has DocTags (`<doctag>`), DocLang
        (`<doclang>`) or OTSL alone (`<fcel>`), but for what the tokenizer's files name or the prompt is made of:
        `written` is all that templates and image blocks write.
        """
        pattern = next((each for name, each in _MARKUP.items() if name in self.added_tokens), _PLACE)
        control = {*self.named_tokens.values()}
        return tuple(
            name
            for name, token in self.added_tokens.items()
            if token.get("special") and pattern.fullmatch(name) and name not in control and name not in written
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end an answer, from the first file that states any, else the tokenizer's end token."""
        for name, holder in (
            ("generation_config.json", self.read("generation_config.json")),
            ("config.json", self.config),
            ("config.json: text_config", self.config.get("text_config") or {}),
        ):
            ids = holder.get("eos_token_id") if isinstance(holder, Mapping) else None
            if ids is not None:
                ids = ids if isinstance(ids, list) else [ids]
                if not ids or not all(isinstance(each, int) and each >= 0 for each in ids):
                    raise SourceError(f"{name}: eos_token_id must be a token id or several, not {ids!r}")
                return tuple(ids)
        if end := self.added_tokens.get(self.named_tokens.get("eos_token", "")):
            return (int(end["id"]),)
        raise SourceError(f"{self.folder} states no eos_token_id, in neither generation_config.json nor config.json")

    def small_files(self) -> list[Path]:
        """Return the files that go into the export unchanged: configs, tokenizer, licence and model card."""
        paths = {
            path.name: path
            for folder in {self.folder, *self.stand_ins.values()}
            for path in folder.iterdir()
            if path.is_file()
            and path == self.path(path.name)
            and (path.suffix in _COPIED or path.name.startswith("LICENSE") or path.name == "README.md")
            and not path.name.endswith(".safetensors.index.json")
        }
        return [paths[name] for name in sorted(paths)]

    @property
    def has_safetensors(self) -> bool:
        """Whether there are weights to make graphs for, or only graphs with their weights in them."""
        return _has_safetensors(self.folder)

    def onnx_files(self) -> dict[str, Path]:
        """Return the ONNX file of each submodel, all of them in `onnx/` or beside config.json. Raises `SourceError`."""
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
        """Return the safetensors files that transformers would read: see `_weight_names`."""
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
        if (folder / ADAPTER_CONFIG).is_file():
            base = _read(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
            raise SourceError(
                f"{folder} is a PEFT adapter{f' of {base}' if base else ''}; export the model that it was trained on,"
                f" with --adapter {folder}"
            )
        raise SourceError(f"{folder} has no config.json, so it is no Hugging Face checkpoint")
    checkpoint = Checkpoint(folder, source, revision, read_json(folder / "config.json"))
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
        for path in checkpoint.weight_files():
            check_safetensors(path)
    return checkpoint


def _has_safetensors(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _WEIGHT_FILES)


def check_safetensors(path: Path) -> None:
    """Open a weight file, which reads its header and compares it with the file's length. Raises `SourceError`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except FileNotFoundError:
        if path.is_file():
            raise SourceError(f"{path} may not be read") from None
        raise SourceError(f"{path.parent} lacks {path.name}, which its index names") from None
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{path} is damaged or truncated: {error}") from None


def _weight_names(folder: Path) -> list[str]:
    """Return the weight files as transformers chooses them: those that an index names, where there is no whole file.

    An index beside model.safetensors is what a checkpoint in shards, saved there before, has left behind.
    """
    whole, index = (folder / name for name in _WEIGHT_FILES)
    if whole.is_file() or not index.is_file():
        return [whole.name]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise SourceError(f"{index} has no weight_map from tensors to files")
    if outside := [name for name in weight_map.values() if Path(name).name != name]:
        raise SourceError(f"{index} names {outside[0]!r}, which is no file of the checkpoint")
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


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None


def _templates_in(folder: Path) -> dict[str, str]:
    """Return a folder's chat templates by name, whichever file holds them."""
    templates: dict[str, str] = {}
    for file in (_TOKENIZER_CONFIG, _PROCESSOR, "chat_template.json"):
        templates |= _templates(_read(folder / file).get("chat_template"), file)
    for path in sorted((folder / _FOLDER_OF_TEMPLATES).glob("*.jinja")):
        templates[path.stem] = _read_text(path)
    if (jinja := folder / _TEMPLATE).is_file():
        templates["default"] = _read_text(jinja)
    return templates


def _templates(found: Any, file: str) -> dict[str, str]:
    """Return the chat templates that a file holds, by name: one alone, or several as an object or as pairs."""
    if isinstance(found, list):
        pairs = [(each.get("name"), each.get("template")) for each in found if isinstance(each, Mapping)]
    else:
        pairs = list(found.items()) if isinstance(found, Mapping) else [("default", found)]
    if any(not isinstance(text, str | None) for _, text in pairs):
        raise SourceError(f"{file}: its chat_template is neither a text nor texts by name")
    return {str(name): text for name, text in pairs if text}


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object. Raises `SourceError`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise SourceError(f"{path} is not a JSON object")
    return data
