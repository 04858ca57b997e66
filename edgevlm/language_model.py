"""The language part: token embeddings, and the LM with a KV cache for each session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgevlm.paged import PagedSession, Pages
from edgevlm.session import Session, embed
from edgevlm.stateful import StatefulSession

if TYPE_CHECKING:
    import openvino as ov


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

    def __init__(self, compiled: ov.CompiledModel, embeddings: TextEmbeddings) -> None:
        self._compiled = compiled
        self._embeddings = embeddings
        self._pages = Pages.of(compiled)
        self._hidden_size = compiled.input("inputs_embeds").get_partial_shape()[-1].get_length()

    def embed(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the embeddings `(1, n, hidden)` of `n` token ids."""
        return self._embeddings.embed(ids)

    def warm_up(self) -> None:
        """Read one token: what OpenVINO puts off until the first inference takes longer than a short prompt does."""
        self.session().step([0])

    def session(self) -> Session:
        """Return a fresh state: a request costs well under a millisecond to make, and shares the weights."""
        requests = self._compiled.create_infer_request(), self._embeddings.request()
        if self._pages is None:
            return StatefulSession(*requests, self._hidden_size)
        return PagedSession(*requests, self._hidden_size, self._pages)
