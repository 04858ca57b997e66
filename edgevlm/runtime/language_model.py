"""The language model: embedding table, and decoder with a KV cache for each session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgevlm.families.base import SLIDING_CACHE_START, DecoderTraits
from edgevlm.runtime.graph_passes import LOGITS_TO_KEEP
from edgevlm.runtime.kv_paged import KVBlockLayout, KVBlockPool, PagedSession, family_inputs
from edgevlm.runtime.kv_session import DecoderInfo, Requests, Session, embed
from edgevlm.runtime.kv_stateful import StatefulSession

if TYPE_CHECKING:
    import openvino as ov


_INPUTS = {"inputs_embeds", "attention_mask", "position_ids", "beam_idx", LOGITS_TO_KEEP, SLIDING_CACHE_START}


class TextEmbeddings:
    """The compiled embedding table."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._compiled = compiled

    def request(self) -> ov.InferRequest:
        """Return an inference request, one for each session."""
        return self._compiled.create_infer_request()

    def embed(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the embeddings `(1, n, hidden)` of `n` token ids."""
        return embed(self.request(), ids)


class LanguageModel:
    """The compiled LM; `session()` gives one conversation's state."""

    def __init__(self, compiled: ov.CompiledModel, embeddings: TextEmbeddings, traits: DecoderTraits) -> None:
        self._compiled = compiled
        self._embeddings = embeddings
        layout = KVBlockLayout.of(compiled)
        self._pool = KVBlockPool(compiled.create_infer_request(), layout) if layout else None
        hidden_size = compiled.input("inputs_embeds").get_partial_shape()[-1].get_length()
        self._info = DecoderInfo(hidden_size, traits, _extras(compiled, paged=layout is not None))

    def embed(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the embeddings `(1, n, hidden)` of `n` token ids."""
        return self._embeddings.embed(ids)

    def warm_up(self) -> None:
        """Run one token: what OpenVINO defers to the first inference takes longer than a short prefill."""
        self.session().step([0])

    @property
    def is_paged(self) -> bool:
        """Whether paged attention reads the KV cache, so that steps of several sequences may share an inference."""
        return self._pool is not None

    def session(self) -> Session:
        """Return a new session; it shares the weights, and its requests take well under a millisecond to create."""
        embeddings = self._embeddings.request()
        if self._pool is None:
            return StatefulSession(Requests(self._compiled.create_infer_request(), embeddings), self._info)
        return PagedSession(Requests(self._pool.request, embeddings), self._info, self._pool)


def _extras(compiled: ov.CompiledModel, *, paged: bool) -> dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]:
    """Return the element type and shape for one token of the inputs that not every decoder has."""
    inputs = family_inputs(compiled) if paged else [each for each in compiled.inputs if not each.get_names() & _INPUTS]
    return {
        each.any_name: (each.element_type.to_dtype(), tuple(size.get_length() for size in list(each.partial_shape)[2:]))
        for each in inputs
    }
