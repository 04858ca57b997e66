"""The language model: embedding table, and decoder with a KV cache for each session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgevlm.families.base import DecoderTraits
from edgevlm.runtime.graph_passes import LOGITS_TO_KEEP
from edgevlm.runtime.kv_paged import KVBlockLayout, PagedSession, family_inputs
from edgevlm.runtime.kv_session import DecoderInfo, Requests, Session, embed
from edgevlm.runtime.kv_stateful import StatefulSession

if TYPE_CHECKING:
    import openvino as ov


_INPUTS = {"inputs_embeds", "attention_mask", "position_ids", "beam_idx", LOGITS_TO_KEEP}


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
        self._pages = KVBlockLayout.of(compiled)
        hidden_size = compiled.input("inputs_embeds").get_partial_shape()[-1].get_length()
        self._info = DecoderInfo(hidden_size, traits, _extras(compiled, paged=self._pages is not None))

    def embed(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the embeddings `(1, n, hidden)` of `n` token ids."""
        return self._embeddings.embed(ids)

    def warm_up(self) -> None:
        """Run one token: what OpenVINO defers to the first inference takes longer than a short prefill."""
        self.session().step([0])

    def session(self) -> Session:
        """Return a new session; it shares the weights, and its requests take well under a millisecond to create."""
        requests = Requests(self._compiled.create_infer_request(), self._embeddings.request())
        if self._pages is None:
            return StatefulSession(requests, self._info)
        return PagedSession(requests, self._info, self._pages)


def _extras(compiled: ov.CompiledModel, *, paged: bool) -> dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]:
    """Return the element type and shape for one token of the inputs that not every decoder has."""
    inputs = family_inputs(compiled) if paged else [each for each in compiled.inputs if not each.get_names() & _INPUTS]
    return {
        each.any_name: (each.element_type.to_dtype(), tuple(size.get_length() for size in list(each.partial_shape)[2:]))
        for each in inputs
    }
