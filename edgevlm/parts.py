"""The three compiled parts of an exported folder, adapted to this machine as they are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm.cache import compile_cached
from edgevlm.device import RuntimeConfig, read_ir
from edgevlm.families import Family
from edgevlm.language_model import LanguageModel, TextEmbeddings, keep_last_logits
from edgevlm.manifest import LANGUAGE, TEXT_EMBEDDINGS, VISION, Manifest
from edgevlm.paths import cache_dir
from edgevlm.vision import VisionEncoder, specialise_vision

if TYPE_CHECKING:
    import openvino as ov


@dataclass(frozen=True)
class PartLoader:
    """Reads, specialises and compiles the parts of one folder for one device."""

    folder: Path
    manifest: Manifest
    config: RuntimeConfig
    device: str

    def vision(self, family: Family) -> VisionEncoder:
        """Return the vision part, fixed to the family's tile."""
        model = specialise_vision(self._read(VISION), family.vision_inputs(), family.tile_size)
        return VisionEncoder(self._compile(VISION, model, self.config.properties(self.device)))

    def text_embeddings(self) -> TextEmbeddings:
        """Return the embedding table."""
        model = self._read(TEXT_EMBEDDINGS)
        return TextEmbeddings(self._compile(TEXT_EMBEDDINGS, model, self.config.properties(self.device)))

    def language_model(self) -> LanguageModel:
        """Return the language model with its embedding table."""
        embeddings = self.text_embeddings()
        model = keep_last_logits(self._read(LANGUAGE))
        return LanguageModel(self._compile(LANGUAGE, model, self.config.language_properties(self.device)), embeddings)

    def _read(self, part: str) -> ov.Model:
        return read_ir(self.folder / self.manifest.parts[part].file)

    def _compile(self, part: str, model: ov.Model, properties: dict[str, Any]) -> ov.CompiledModel:
        entry = cache_dir() / "compiled" / f"{self.manifest.fingerprint}-{part}" if self.config.cache else None
        return compile_cached(model, self.device, properties, entry, self.config.cache_limit_bytes)
