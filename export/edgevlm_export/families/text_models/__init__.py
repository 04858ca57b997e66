"""Text models: one small reader for each `text_config.model_type`, and what its config class assumes.

A reader turns config.json's `text_config` into a `Decoder`; the table `TEXT_MODELS` names all that there are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from edgevlm_export.families.text_models import gemma3, lfm2, llama, qwen3_5
from edgevlm_export.families.text_models.common import Names
from edgevlm_export.families.text_models.defaults import DEFAULTS
from edgevlm_export.graphs.decoder import Decoder
from edgevlm_export.source.config_reader import ConfigReader, UnsupportedError

__all__ = ["DEFAULTS", "TEXT_MODELS", "Names", "read_decoder", "text_section"]

_FLAT = {"paddleocr_vl": "paddleocr_vl_text", "qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}
"""Families whose config.json may have the text model's keys beside the others, instead of in `text_config`."""

TEXT_MODELS: dict[str, Callable[[ConfigReader, Names], Decoder]] = {
    "gemma3_text": gemma3.read_gemma3,
    "glm_ocr_text": llama.read_glm_ocr,
    "granite_docling_text": llama.read_granite,
    "llama": llama.read_llama,
    "mistral": llama.read_mistral,
    "paddleocr_vl": llama.read_paddleocr_vl,
    "paddleocr_vl_text": llama.read_paddleocr_vl,
    "qwen2": llama.read_qwen2,
    "qwen3": llama.read_qwen3,
    "qwen2_vl": llama.read_qwen2_vl,
    "qwen2_vl_text": llama.read_qwen2_vl,
    "qwen2_5_vl": llama.read_qwen2_vl,
    "qwen2_5_vl_text": llama.read_qwen2_vl,
    "qwen3_vl_text": llama.read_qwen3_vl,
    "lfm2": lfm2.read_lfm2,
    "qwen3_5_text": qwen3_5.read_qwen3_5,
}


def text_section(config: ConfigReader, harmless: Collection[str] = (), usual: str = "llama") -> ConfigReader:
    """Return config.json's `text_config` with its class's defaults, none where the class is not known here.

    It is config.json itself where the family has the text model's keys there. `harmless` keys change nothing. `usual`
    is the text model where config.json names none and none is called after the family.
    """
    family = str(config.get("model_type", ""))
    if family in _FLAT and "text_config" not in config:
        return config.assuming(DEFAULTS[_FLAT[family]])
    inner = f"{family}_text" if f"{family}_text" in DEFAULTS else usual
    kind = ConfigReader(config.get("text_config"), "text_config").get("model_type", inner)
    return config.section(
        "text_config", {"model_type": kind, **DEFAULTS.get(_FLAT.get(str(kind), str(kind)), {})}, harmless=harmless
    )


def read_decoder(text: ConfigReader, prefix: str, head: str, *, tied: bool) -> Decoder:
    """Return the decoder of `text_config`; `tied` where the LM head is the embedding table.

    Raises `SourceError`, and `UnsupportedError` for what is not built here.
    """
    model_type = str(text.get("model_type", "llama"))
    if model_type not in TEXT_MODELS:
        known = ", ".join(TEXT_MODELS)
        raise UnsupportedError(f"the native route builds no {model_type!r} decoder; it knows {known}")
    return TEXT_MODELS[model_type](text, Names(prefix, f"{prefix}.embed_tokens" if tied else head))
