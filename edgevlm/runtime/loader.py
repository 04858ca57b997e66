"""Loads and compiles the three submodels of an exported folder for one device."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm.errors import DeviceError
from edgevlm.families import Family
from edgevlm.manifest import LANGUAGE, TEXT_EMBEDDINGS, VISION, Manifest
from edgevlm.model_store import cache_dir
from edgevlm.runtime.arithmetic import choose_arithmetic
from edgevlm.runtime.compile_cache import compile_cached
from edgevlm.runtime.config import RuntimeConfig
from edgevlm.runtime.core import read_ir
from edgevlm.runtime.graph_passes import decompress_weights, drop_activation_quantization, keep_last_logits
from edgevlm.runtime.kv_paged import with_paged_attention
from edgevlm.runtime.language_model import LanguageModel, TextEmbeddings
from edgevlm.runtime.vision_encoder import VisionEncoder, make_static

if TYPE_CHECKING:
    import openvino as ov

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelLoader:
    """Reads, adapts and compiles the submodels of one folder for one device."""

    folder: Path
    manifest: Manifest
    config: RuntimeConfig
    device: str

    def vision(self, family: Family) -> VisionEncoder:
        """Return the vision encoder, static where all views of the family have one size."""
        arithmetic = choose_arithmetic(self.config, self.manifest.submodels[VISION], self.device)
        logger.info("vision: %s", arithmetic)
        model = make_static(self._read(VISION), family.constants, family.view_size)
        if arithmetic.graph != "exported":
            drop_activation_quantization(model)
        if arithmetic.graph == "float32":
            decompress_weights(model)
        return VisionEncoder(self._compile(VISION, model, self.config.properties(self.device)), arithmetic)

    def text_embeddings(self) -> TextEmbeddings:
        """Return the embedding table."""
        model = self._read(TEXT_EMBEDDINGS)
        return TextEmbeddings(self._compile(TEXT_EMBEDDINGS, model, self.config.properties(self.device)))

    def language_model(self) -> LanguageModel:
        """Return the language model with its embedding table."""
        embeddings = self.text_embeddings()
        compiled = self._paged() or self._compile(LANGUAGE, keep_last_logits(self._read(LANGUAGE)), self._properties)
        return LanguageModel(compiled, embeddings, self.manifest.decoder_traits)

    @property
    def _properties(self) -> dict[str, Any]:
        return self.config.language_properties(self.device)

    def _paged(self) -> ov.CompiledModel | None:
        """Return the LM with paged attention, or None where the device or the graph has none."""
        if self.config.kv_cache == "stateful" or not self.device.startswith("CPU"):
            return None
        traits = self.manifest.decoder_traits
        if traits.atomic_images or not traits.rewindable:
            logger.info("no paged attention: the decoder's state is not that of causal attention alone")
            return None
        model = with_paged_attention(self._read(LANGUAGE))
        try:
            return model and compile_cached(model, self.device, self._properties, None, 0)
        except DeviceError as error:
            logger.info("no paged attention: %s", error)
            return None

    def _read(self, part: str) -> ov.Model:
        return read_ir(self.folder / self.manifest.submodels[part].file)

    def _compile(self, part: str, model: ov.Model, properties: dict[str, Any]) -> ov.CompiledModel:
        entry = cache_dir() / "compiled" / f"{self.manifest.fingerprint}-{part}" if self.config.cache else None
        return compile_cached(model, self.device, properties, entry, self.config.cache_limit_bytes)
