"""Loads and compiles the three submodels of an exported folder for one device."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from inspect import getsource
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevlm.errors import DeviceError
from edgevlm.families import Family
from edgevlm.manifest import LANGUAGE, TEXT_EMBEDDINGS, VISION, Manifest
from edgevlm.model_store import cache_dir
from edgevlm.runtime import graph_passes
from edgevlm.runtime.arithmetic import Graph, choose_arithmetic
from edgevlm.runtime.compile_cache import compile_cached
from edgevlm.runtime.config import RuntimeConfig
from edgevlm.runtime.core import first_line, read_ir
from edgevlm.runtime.graph_passes import decompress_weights, drop_activation_quantization, keep_last_logits, make_static
from edgevlm.runtime.kv_paged import with_paged_attention
from edgevlm.runtime.kv_session import Session
from edgevlm.runtime.language_model import LanguageModel, TextEmbeddings
from edgevlm.runtime.vision_encoder import VisionEncoder

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
        read = partial(self._read, VISION, partial(_prepare_vision, family=family, graph=arithmetic.graph))
        constants = {name: [str(array.dtype), array.tolist()] for name, array in family.constants.items()}
        baked, entry = f"{constants} {family.view_size}", f"{VISION}-{arithmetic.graph}"
        return VisionEncoder(self._compile(entry, read, self.config.properties(self.device), baked), arithmetic)

    def text_embeddings(self) -> TextEmbeddings:
        """Return the embedding table."""
        read = partial(self._read, TEXT_EMBEDDINGS)
        return TextEmbeddings(self._compile(TEXT_EMBEDDINGS, read, self.config.properties(self.device)))

    def language_model(self) -> LanguageModel:
        """Return the language model with its embedding table, warmed up. Raises `DeviceError`."""
        embeddings = self.text_embeddings()
        read = partial(self._read, LANGUAGE, keep_last_logits)
        compiled = self._paged() or self._compile(LANGUAGE, read, self._properties)
        language_model = LanguageModel(compiled, embeddings, self.manifest.decoder_traits)
        try:
            language_model.warm_up()
        except RuntimeError as error:  # a device may compile a model that it cannot run
            raise DeviceError(f"{self.device} cannot run this model: {first_line(error)}") from None
        return language_model

    @property
    def _properties(self) -> dict[str, Any]:
        properties = self.config.language_properties(self.device)
        if self.manifest.decoder_traits.recurrent and self.device.startswith("CPU"):
            properties.setdefault("INFERENCE_PRECISION_HINT", "f32")
        return properties

    def _paged(self) -> ov.CompiledModel | None:
        """Return the LM with paged attention, or None where the device or the graph has none."""
        if self.config.kv_cache == "stateful" or not self.device.startswith("CPU"):
            return None
        traits = self.manifest.decoder_traits
        if traits.atomic_images or traits.sliding_layers or not traits.rewindable:
            logger.info("no paged attention: the decoder's state is not that of causal attention alone")
            return None
        model = with_paged_attention(self._read(LANGUAGE))
        try:
            return model and compile_cached(lambda: model, self.device, self._properties, None, 0)
        except DeviceError as error:
            logger.info("no paged attention: %s", error)
            return None

    def _read(self, part: str, change: Callable[[ov.Model], ov.Model] = lambda model: model) -> ov.Model:
        return change(read_ir(self.folder / self.manifest.submodels[part].file))

    def _compile(
        self, name: str, read: Callable[[], ov.Model], properties: dict[str, Any], baked: str = ""
    ) -> ov.CompiledModel:
        """Compile a submodel, cached under `name`.

        `baked` names all that the graph depends on besides the export, the name, and the code of `graph_passes`: a
        compiled model is found again by these four.
        """
        entry = cache_dir() / "compiled" / f"{self.manifest.fingerprint}-{name}" if self.config.cache else None
        made_of = sha256(f"{_passes()} {baked}".encode()).hexdigest()
        return compile_cached(read, self.device, properties, entry, self.config.cache_limit_bytes, made_of)


def _prepare_vision(model: ov.Model, family: Family, graph: Graph) -> ov.Model:
    """Return the vision submodel as it is compiled."""
    make_static(model, family.constants, family.view_size)
    if graph != "exported":
        drop_activation_quantization(model)
    if graph == "float32":
        decompress_weights(model)
    return model


@cache
def _passes() -> str:
    """Name the code that changes graphs: by its source or, where a program was frozen without it, by the version."""
    try:
        return getsource(graph_passes)
    except OSError:
        return str(sys.modules["edgevlm"].__version__)  # it imports this module


class Submodels:
    """The submodels of one folder while they load and afterwards; whoever needs one waits for it.

    Loading and compiling a submodel uses one core, so each has a thread, which ends when its submodel is loaded.
    """

    def __init__(self, loader: ModelLoader, family: Family) -> None:
        threads = ThreadPoolExecutor(2, "edgevlm-load")
        self._vision = threads.submit(loader.vision, family)
        self._language_model = threads.submit(loader.language_model)
        threads.shutdown(wait=False)

    @property
    def vision(self) -> VisionEncoder:
        """The vision encoder. Raises `DamagedModelError` and `DeviceError`."""
        return self._vision.result()

    @property
    def language_model(self) -> LanguageModel:
        """The language model. Raises `DamagedModelError` and `DeviceError`."""
        return self._language_model.result()

    def session(self) -> Session:
        """Return a new session of the language model."""
        return self.language_model.session()

    def settle(self) -> None:
        """Wait until nothing is loading any more, whether it was loaded or not."""
        self._vision.exception()
        self._language_model.exception()

    def wait(self) -> None:
        """Wait until both are loaded. Raises what kept one of them from being loaded, when the other is done, too."""
        self.settle()
        self._language_model.result()
        self._vision.result()
