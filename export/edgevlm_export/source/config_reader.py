"""A checkpoint's JSON files, read without trusting them, and what they state that nothing here reads.

A key that is not read is never passed over in silence: it is known to change nothing (`_HARMLESS`), or its name speaks
of the arithmetic (`_ARITHMETIC`) and its value refuses the export, or it is told and stands in the manifest.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import copy
from typing import Any

from edgevlm.errors import SourceError

CONFIG = "config.json"
_ARITHMETIC = re.compile(
    r"rope|rotary|scal|multiplier|norm|bias|softcap|window|activation|(^|_)act(_|$)|(^|_)ti(e|ed)(_|$)|layer_types"
    r"|expert|router|moe|mrope|qk_|resampler|pooling|residual|embedding_type|alibi|sparse|crop|flip|resiz|order|divisor|weights",
    re.IGNORECASE,
)
"""Names that speak of what is computed."""
_NEUTRAL_IN_DECODING: Mapping[str, Any] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1.0,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
}
"""What would change a greedy answer in transformers' `generate`, and the value that changes nothing."""
_HARMLESS = frozenset(
    {
        # where it comes from, and how transformers loads and runs it
        "_attn_implementation_autoset",
        "_commit_hash",
        "_flash_attn_2_enabled",
        "_from_model_config",
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "is_llama_config",
        "model_type",
        "processor_class",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "use_bfloat16",
        "use_cache",
        "use_reentrant_checkpointing",
        # token ids: the tokenizer and generation_config.json have them
        "_pad_token_id",
        "bos_token_id",
        "decoder_start_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        # training
        "attention_dropout",
        "initializer_range",
        "neftune_noise_alpha",
        "pretraining_tp",
        # what every config of transformers 4 has: outputs, other tasks, and beams
        "add_cross_attention",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "finetuning_task",
        "id2label",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "length_penalty",
        "max_length",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "prefix",
        "problem_type",
        "pruned_heads",
        "remove_invalid_values",
        "return_dict",
        "return_dict_in_generate",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "top_k",
        "top_p",
        "typical_p",
        # of decoding, which is the runtime's: generation_config.json is looked at for them
        *_NEUTRAL_IN_DECODING,
        # a resampler that `use_resampler` turns on
        "perceiver_config",
    }
)
"""Keys of published configurations that change nothing of what is exported."""


class ConfigReader:
    """One object of a JSON file, read with the defaults that transformers has for it."""

    def __init__(
        self,
        stated: Any,
        name: str,
        defaults: Mapping[str, Any] | None = None,
        *,
        file: str = CONFIG,
        harmless: Collection[str] = (),
    ) -> None:
        """`name` is the object's place in the file, empty for the whole; `harmless` are keys that change nothing."""
        stated = {} if stated is None else stated
        if not isinstance(stated, Mapping):
            raise SourceError(f"{file}: {name} is not a JSON object" if name else f"{file} is not a JSON object")
        self.file = file
        self._prefix = f"{name}." if name else ""
        self._stated = {key: value for key, value in stated.items() if value is not None}
        self._defaults = dict(defaults or {})
        self._harmless = harmless
        self._read: set[str] = set()
        self.notes: dict[str, str] = {}
        """Reports about values that were read and not followed, by full name."""

    def __contains__(self, key: str) -> bool:
        return key in self._stated

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, `default` where there is neither one nor the class's own."""
        self._read.add(key)
        return self._stated.get(key, self._defaults.get(key, default))

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text. Raises `SourceError`."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "must be a text")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive whole number. Raises `SourceError`."""
        value = self.get(key, default)
        if value is None:
            raise SourceError(f"{self.file} states no {self._prefix}{key}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(key, value, "must be a positive whole number")
        return value

    def number(self, key: str) -> float:
        """Return a number above 0. Raises `SourceError`."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self._wrong(key, value, "must be a number above 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return whether something is so. Raises `SourceError`."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "must be true or false")
        return value

    @property
    def stated(self) -> dict[str, Any]:
        """All that is stated, null left out."""
        return dict(self._stated)

    def name_of(self, key: str) -> str:
        """Return a key's full name in the file."""
        return f"{self._prefix}{key}"

    def heads(self, key: str, channels: int) -> int:
        """Return a number of heads that divides the channels. Raises `SourceError`."""
        heads = self.size(key)
        if channels % heads:
            raise SourceError(f"{self.file} contradicts itself: {self._prefix}{key} {heads} does not divide {channels}")
        return heads

    def section(self, key: str, defaults: Mapping[str, Any] | None = None, **options: Any) -> ConfigReader:
        """Return an object within this one. Raises `SourceError`."""
        return ConfigReader(self.get(key), f"{self._prefix}{key}", defaults, file=self.file, **options)

    def assuming(self, defaults: Mapping[str, Any]) -> ConfigReader:
        """Return this object with more defaults; what is read through either counts as read."""
        other = copy(self)
        other._defaults = {**self._defaults, **defaults}
        return other

    def note(self, key: str, text: str) -> None:
        """Report what became of a value."""
        self.notes[self.name_of(key)] = text

    def unread(self) -> Iterator[tuple[str, str, Any]]:
        """Yield key, full name and value of what is stated, may matter, and has not been asked for."""
        for key, value in self._stated.items():
            known = key in self._read or key in _HARMLESS or key in self._harmless
            if not known and not (key in self._defaults and self._defaults[key] == value):
                yield key, self.name_of(key), value

    def _wrong(self, key: str, value: Any, what: str) -> SourceError:
        return SourceError(f"{self.file}: {self._prefix}{key} {what}, not {value!r}")


class UnsupportedError(SourceError):
    """The checkpoint asks for something that the native route does not build; optimum-intel may."""


def overlooked(sections: Iterable[ConfigReader], ignored: Collection[str] = ()) -> dict[str, Any]:
    """Return by file and name what is stated, is not read, and speaks of nothing that is computed.

    Raises `SourceError` for what does, unless it is null or false, or among the `ignored`, by key or full name.
    """
    found: dict[str, Any] = {}
    for section in sections:
        found |= {f"{section.file}: {name}": text for name, text in section.notes.items()}
        for key, name, value in section.unread():
            if _ARITHMETIC.search(key):
                if value is False:
                    continue
                if not {key, name} & set(ignored):
                    raise SourceError(
                        f"{section.file}: edgevlm does not know {name} ({_short(value)}), which may change what the"
                        f" model computes; --ignore-config-key {name} exports all the same"
                    )
            found[f"{section.file}: {name}"] = value
    return found


def overlooked_in_decoding(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return what generation_config.json asks for that would change a greedy answer, and that edgevlm does not do."""
    return {
        f"generation_config.json: {key}": value
        for key, neutral in _NEUTRAL_IN_DECODING.items()
        if (value := generation.get(key)) not in (None, neutral)
    }


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
