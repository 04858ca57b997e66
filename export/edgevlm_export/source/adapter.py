"""A PEFT adapter as peft saves it: read and checked, and what it makes of each of a checkpoint's tensors.

adapter_model.safetensors has its tensors under the names that modules have in transformers' memory; adapter_config.json
says how they are to be read. Names and arithmetic are those of peft 0.21 (`tuners/lora/`, `tuners/trainable_tokens/`).
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgevlm.errors import SourceError
from edgevlm.manifest import MergedAdapter, hash_file
from edgevlm_export.source.changes import Change, LowRank, Rows
from edgevlm_export.source.checkpoint import ADAPTER_CONFIG, Checkpoint, check_safetensors, read_json
from edgevlm_export.source.config_reader import ConfigReader
from edgevlm_export.source.safetensors_reader import DTYPES, Tensors

ADAPTER_WEIGHTS = "adapter_model.safetensors"
HEAD = "lm_head.weight"
TABLE = "embed_tokens.weight"
"""How the plain names of LM head and embedding table end, which may be one tensor."""
_DEFAULTS: dict[str, Any] = {"r": 8, "lora_alpha": 8, "init_lora_weights": True}
"""Of `LoraConfig`."""
_PARTS = {
    ".lora_A.weight": ("A", ".weight"),
    ".lora_B.weight": ("B", ".weight"),
    ".lora_B.bias": ("shift", ".bias"),
    ".lora_embedding_A": ("embedding A", ".weight"),
    ".lora_embedding_B": ("embedding B", ".weight"),
    ".lora_magnitude_vector": ("magnitude", ".weight"),
    ".lora_magnitude_vector.weight": ("magnitude", ".weight"),
    ".token_adapter.trainable_tokens_delta": ("tokens", ".weight"),
    ".token_adapter.base_layer.weight": ("base", ".weight"),
    ".base_layer.weight": ("base", ".weight"),
    ".base_layer.bias": ("base", ".bias"),
}
"""Endings of the names in an adapter: which part of a change such a tensor is, and which tensor of the module it
changes. A name with none of them is that of a tensor that was trained whole."""
_PAIRS = (("A", "B"), ("embedding A", "embedding B"))
_EXCLUSIVE = {"whole": ("whole", "base"), "base": ("whole", "base")}
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA, which acts from certain tokens on",
    "arrow_config": "Arrow, which chooses among adapters for each token",
    "kasa_config": "KaSA",
    "layer_replication": "repeated layers",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA on parameters instead of modules",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}
_BY_PEFT = "merge it with peft's merge_and_unload, where that can, and export what that saves"
_MOVING = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}
"""Initialisations that subtract what the adapter begins as from the checkpoint's weights."""
_KEEPING = ("gaussian", "eva", "orthogonal", "mica")
_HARMLESS = (
    "auto_mapping",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_dora",
)
"""How training went, and what the tensors show. `fan_in_fan_out` is for GPT-2's Conv1D: peft takes it back for the
modules that are here."""
_RECORDED = (
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "bias",
    "modules_to_save",
    "trainable_token_indices",
    "init_lora_weights",
    "peft_version",
)
"""Of the config, what the manifest has of it."""
_WRAPPERS = re.compile(r"^(?:base_model\.model\.)?(?:model\.)?(?:language_model\.)?(?:model\.)?")
_PICTURES = ("size", "max_image_size", "min_pixels", "max_pixels", "max_patches", "crop_size", "resample")
"""Settings of image processors that decide what of a picture is seen."""


def plain_name(name: str, renamed: Mapping[str, str]) -> str:
    """Return a tensor's or module's name without what transformers 4 and 5 put around it, in files and in memory.

    So `language_model.model.layers.0`, `model.language_model.layers.0` and `model.layers.0` are one. `renamed` are the
    family's parts of names that published files have, with those that transformers 5 has for them in memory.
    """
    plain = _WRAPPERS.sub("", name)
    for published, held in renamed.items():
        plain = plain.replace(published, held, 1)
    return plain


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk."""

    folder: Path
    weight: float
    """By which the difference that it makes is multiplied."""
    config: ConfigReader
    tensors: Tensors
    parts: Mapping[str, Mapping[str, str]]
    """Its tensors by the plain names of those that they change, and by which part of the change they are."""

    def with_names(self, renamed: Mapping[str, str]) -> Adapter:
        """Return it with the plain names of a family that has `renamed` some. Raises `SourceError`."""
        return replace(self, parts=_sorted_parts(self.folder, self.tensors, renamed))

    @property
    def base(self) -> str:
        """The checkpoint that it was trained on, as its config names it, empty where it does not."""
        return str(self.config.get("base_model_name_or_path", ""))

    def change(self, target: str) -> Change:
        """Return what it makes of the tensor with that plain name. Raises `SourceError`."""
        names = self.parts[target]
        whole = next((self.tensors.get(names[part]) for part in ("whole", "base") if part in names), None)
        rows = Rows(self._token_ids(names["tokens"]), self.tensors.get(names["tokens"])) if "tokens" in names else None
        return Change(whole, self._low_rank(target), rows)

    def check(self, target: str, shape: tuple[int, ...]) -> None:
        """Raise `SourceError` where what it changes does not have that shape."""
        change = self.change(target)
        if change.fits(shape):
            return
        held = " and ".join(f"{name} {self.tensors.shape(name)}" for name in self.parts[target].values())
        advice = "it was trained on another model"
        if target.endswith((TABLE, HEAD)) and change.whole is not None and change.whole.array.shape[1:] == shape[1:]:
            advice = f"tokens were added in training; {_BY_PEFT}"
        raise SourceError(f"{self.folder} has {held}, and {target} of the checkpoint is {shape}; {advice}")

    def replaces(self, target: str) -> bool:
        """Tell whether the whole tensor was trained as a copy of its own (`modules_to_save`)."""
        return "whole" in self.parts.get(target, {}) and not self.config.flag("ensure_weight_tying")

    def record(self, notes: Collection[str]) -> MergedAdapter:
        """Return what the manifest says about it."""
        stated = {name: self.config.get(name) for name in _RECORDED}
        return MergedAdapter(
            name=self.folder.resolve().name,
            base=_last(self.base),
            weight=self.weight,
            files={name: hash_file(self.folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)},
            config={name: value for name, value in stated.items() if value not in (None, False, {}, [])},
            tensors=len(self.parts),
            notes=tuple(notes),
        )

    def _low_rank(self, target: str) -> LowRank | None:
        names = self.parts[target]
        found = {
            part: self.tensors.get(name).float32().astype(np.float64)
            for part, name in names.items()
            if part not in ("whole", "base", "tokens")
        }
        if "shift" in found:
            return LowRank(found["shift"].reshape(-1, 1) * self._scale(names["shift"])[1], np.ones((1, 1)))
        magnitude = found["magnitude"].ravel() if "magnitude" in found else None
        for first, second in _PAIRS:
            if first in found:
                a, b = found[first], found[second]
                rank, scale = self._scale(names[first])
                if a.ndim < 2 or b.ndim < 2 or len(a) != rank or b.shape[1] != rank:
                    raise SourceError(
                        f"{self.folder}: {names[first]} {a.shape} and {names[second]} {b.shape} are not of rank {rank},"
                        f" as {ADAPTER_CONFIG} says; save the adapter anew"
                    )
                if first == "A":
                    return LowRank(b.reshape(len(b), -1) * scale, a.reshape(rank, -1), magnitude)
                return LowRank(a.T * scale, b.T, magnitude, of_columns=True)
        return None

    def _scale(self, name: str) -> tuple[int, float]:
        """Return rank and factor of the product of which the file has a tensor called so."""
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        rank = _of_module(self.config.get("rank_pattern"), module, self.config.size("r"))
        alpha = _of_module(self.config.get("alpha_pattern"), module, self.config.number("lora_alpha"))
        if not rank >= 1:
            raise SourceError(f"{self.config.file}: rank_pattern gives {module} the rank {rank}")
        return int(rank), alpha / (math.sqrt(rank) if self.config.flag("use_rslora") else rank)

    def _token_ids(self, name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the rows that the tensor called so holds, which the config alone says."""
        stated, module = self.config.get("trainable_token_indices"), name.partition(".token_adapter.")[0]
        if isinstance(stated, Mapping):
            stated = next((ids for layer, ids in stated.items() if module.endswith(layer)), None)
        is_list = isinstance(stated, list) and all(isinstance(each, int) and each >= 0 for each in stated)
        if not is_list or len(stated) != self.tensors.shape(name)[0]:
            raise SourceError(
                f"{self.config.file}: trainable_token_indices does not say which rows {name}"
                f" {self.tensors.shape(name)} holds; save the adapter anew"
            )
        return np.asarray(stated, np.int64)


def open_adapter(folder: Path, weight: float = 1.0, ignored: Collection[str] = ()) -> Adapter:
    """Return the adapter in a folder. Raises `SourceError` where there is none, or one that cannot be merged.

    `ignored` are keys of its config that change nothing and that are not known here.
    """
    _check_folder(folder)
    config = ConfigReader(
        read_json(folder / ADAPTER_CONFIG), "", _DEFAULTS, file=str(folder / ADAPTER_CONFIG), harmless=_HARMLESS
    )
    _check_kind(config, ignored)
    check_safetensors(folder / ADAPTER_WEIGHTS)
    tensors = Tensors([folder / ADAPTER_WEIGHTS])
    for name in tensors:
        if tensors.dtype(name) not in DTYPES or not math.prod(tensors.shape(name)):
            raise SourceError(
                f"{folder}: {name} is {tensors.dtype(name)} of shape {tensors.shape(name)}, not weights of"
                f" {', '.join(DTYPES)}; save the adapter anew, gathered where training was sharded"
            )
    parts = _sorted_parts(folder, tensors, {})
    if not parts:
        raise SourceError(f"{folder / ADAPTER_WEIGHTS} holds no tensors; the adapter was saved without its weights")
    _check_pairs(folder, parts)
    return Adapter(folder, weight, config, tensors, parts)


def _sorted_parts(folder: Path, tensors: Tensors, renamed: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return `Adapter.parts` of its tensors. Raises `SourceError` where two of them are one part of a change."""
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for name in tensors:
        ending = next((each for each in _PARTS if name.endswith(each)), "")
        part, of_module = _PARTS.get(ending, ("whole", ""))
        names = parts[plain_name(name.removesuffix(ending) + of_module, renamed)]
        if other := next((names[each] for each in _EXCLUSIVE.get(part, (part,)) if each in names), None):
            raise SourceError(f"{folder} has {other} and {name}, which are the same weight; save the adapter anew")
        names[part] = name
    return dict(parts)


def _check_folder(folder: Path) -> None:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError(f"--adapter {folder}: there is no such folder; give the one that it was saved in") from None
    except OSError as error:
        raise SourceError(f"--adapter {folder} cannot be read: {error.strerror or error}") from None
    if ADAPTER_CONFIG not in names:
        inner = [name for name in names if (folder / name / ADAPTER_CONFIG).is_file()]
        hint = f"; {inner[-1]} in it is one" if inner else ""
        if "config.json" in names:
            hint = "; it is a whole checkpoint, which is exported as SOURCE"
        raise SourceError(f"{folder} has no {ADAPTER_CONFIG}, so it is no PEFT adapter{hint}")
    if ADAPTER_WEIGHTS not in names:
        found = next((name for name in names if name.startswith("adapter_model.")), "no weights")
        raise SourceError(f"{folder} has {found} and no {ADAPTER_WEIGHTS}; save the adapter anew with safetensors")


def _check_kind(config: ConfigReader, ignored: Collection[str]) -> None:
    """Raise `SourceError` for an adapter that cannot be merged, or whose config says what is not known here."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise SourceError(f"{config.file}: edgevlm merges adapters of peft_type LORA, DoRA among them, not {kind!r}")
    for key, what in _REFUSED.items():
        if config.get(key):
            raise SourceError(f"{config.file}: {key} is {what}, which edgevlm does not merge; {_BY_PEFT}")
    _check_start(config)
    for name in ("rank_pattern", "alpha_pattern"):
        _check_pattern(config, name)
    for name in ("base_model_name_or_path", "trainable_token_indices", "ensure_weight_tying"):
        config.get(name)
    config.size("r")
    config.number("lora_alpha")
    config.flag("use_rslora")
    for key, _, value in config.unread():
        if value and key not in ignored:
            raise SourceError(
                f"{config.file}: edgevlm does not know {key}, which may change what the adapter does;"
                f" --ignore-config-key {key} merges it all the same"
            )


def _check_start(config: ConfigReader) -> None:
    """Raise `SourceError` for an adapter whose beginning was taken out of the checkpoint's weights, or is unknown."""
    start = config.get("init_lora_weights")
    if isinstance(start, bool) or str(start).lower() in _KEEPING:
        return
    if what := next((what for prefix, what in _MOVING.items() if str(start).lower().startswith(prefix)), None):
        raise SourceError(
            f"{config.file}: {what} changed the model's own weights when training began, so the adapter does not fit"
            " the published ones; save it as LoRA with path_initial_model_for_weight_conversion"
        )
    raise SourceError(f"{config.file}: edgevlm does not know init_lora_weights {start!r}; {_BY_PEFT}")


def _check_pattern(config: ConfigReader, name: str) -> None:
    stated = config.get(name, {})
    try:
        numbers = [*stated.values()]
        for pattern in stated:
            re.compile(pattern)
    except (AttributeError, TypeError, re.error):
        raise SourceError(f"{config.file}: {name} is not numbers by names of modules") from None
    if not all(isinstance(number, int | float) and not isinstance(number, bool) and number > 0 for number in numbers):
        raise SourceError(f"{config.file}: {name} must hold numbers above 0")


def _check_pairs(folder: Path, parts: Mapping[str, Mapping[str, str]]) -> None:
    """Raise `SourceError` where a product lacks one of its matrices."""
    for names in parts.values():
        for pair in _PAIRS:
            held = [part for part in pair if part in names]
            if len(held) == 1:
                raise SourceError(
                    f"{folder} has {names[held[0]]} without its other half; the adapter was not saved whole"
                )
        if "magnitude" in names and not any(pair[0] in names for pair in _PAIRS):
            raise SourceError(f"{folder} has {names['magnitude']} without its lora_A; the adapter was not saved whole")


def _of_module(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """Return a module's number: that of the first name or regular expression that its name ends with."""
    for key, number in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return number
    return default


def notes_about(adapter: Adapter, checkpoint: Checkpoint) -> list[str]:
    """Return what a user should know about an adapter on this checkpoint, its own files standing in for some."""
    notes = []
    places = (checkpoint.source, str(checkpoint.folder), str(checkpoint.config.get("_name_or_path", "")))
    known = {_last(place) for place in places}
    if adapter.base and _last(adapter.base) not in known:
        notes.append(f"it was trained on {_last(adapter.base)}, and its shapes fit {_last(checkpoint.source)}, too")
    own = Checkpoint(checkpoint.folder, checkpoint.source, checkpoint.revision, checkpoint.config)
    if checkpoint.path("preprocessor_config.json").parent == adapter.folder:
        notes += _notes_about_pictures(checkpoint.image_settings(), own.image_settings())
    if checkpoint.path("tokenizer.json").parent == adapter.folder:
        held, others = (each.read("tokenizer.json") for each in (checkpoint, own))
        if any(held.get(name) != others.get(name) for name in ("normalizer", "pre_tokenizer")):
            notes.append("its tokenizer.json splits text otherwise than the checkpoint's; its own is used")
    return notes


def _notes_about_pictures(settings: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    notes = []
    if settings.get("do_image_splitting") is False and own.get("do_image_splitting"):
        notes.append(
            "it was trained without image splitting (do_image_splitting is false in its folder, as in TRL's DPO"
            " example): each picture is one view, whatever --detail says"
        )
    return notes + [
        f"pictures are seen with its {name}, {settings[name]}, not the checkpoint's {own[name]}"
        for name in _PICTURES
        if name in settings and name in own and settings[name] != own[name]
    ]


def _last(name: str) -> str:
    """Return a model's name without owner and folders, also of a folder in the Hugging Face cache."""
    if cached := re.search(r"models--[^/\\]+?--([^/\\]+)", name):
        return cached[1]
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]
