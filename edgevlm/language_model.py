"""The language part: token embeddings, and the stateful LM whose KV cache lives inside OpenVINO."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgevlm.device import import_openvino

if TYPE_CHECKING:
    import openvino as ov

LOGITS_TO_KEEP = "logits_to_keep"


def keep_last_logits(model: ov.Model) -> ov.Model:
    """Add an input `logits_to_keep` (int64 `(1,)`): the head then reads only that many last positions.

    At prefill this spares `sequence - 1` rows of the largest matrix product in a small model.
    """
    openvino = import_openvino()
    opset = openvino.opset13
    head = model.output("logits").get_node().input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    keep = opset.parameter([1], np.int64, name=LOGITS_TO_KEEP)
    keep.output(0).set_names({LOGITS_TO_KEEP})
    one = np.array([1], np.int64)
    start = opset.multiply(keep, np.array([-1], np.int64))
    stop = np.array([np.iinfo(np.int32).max], np.int64)
    kept = opset.slice(head.input_value(0), start, stop, one, one)  # (B, S, D) -> (B, logits_to_keep, D)
    head.input(0).replace_source_output(kept.output(0))
    model.add_parameters([keep])
    model.validate_nodes_and_infer_types()
    return model


class TextEmbeddings:
    """The compiled embedding table."""

    def __init__(self, compiled: ov.CompiledModel) -> None:
        self._compiled = compiled

    def request(self) -> ov.InferRequest:
        """Return an inference request, one for each session."""
        return self._compiled.create_infer_request()

    def embed(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the embeddings `(1, n, hidden)` of `n` token ids."""
        return _embed(self.request(), ids)


def _embed(request: ov.InferRequest, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
    tokens = np.asarray(ids, np.int64).reshape(1, -1)
    return np.array(request.infer([tokens])[0], np.float32)


class LanguageModel:
    """The compiled LM; `session()` gives one conversation's state."""

    def __init__(self, compiled: ov.CompiledModel, embeddings: TextEmbeddings) -> None:
        self._compiled = compiled
        self._embeddings = embeddings

    def session(self) -> Session:
        """Return a fresh state: a request costs well under a millisecond to make, and shares the weights."""
        return Session(self._compiled.create_infer_request(), self._embeddings.request())


class Session:
    """One sequence being decoded, with its own KV cache; sessions of one model may run in several threads."""

    def __init__(self, request: ov.InferRequest, embeddings: ov.InferRequest) -> None:
        self._request = request
        self._embeddings = embeddings
        self._beam = np.zeros(1, np.int32)
        self.length = 0
        """Positions in the KV cache."""

    def reset(self) -> None:
        """Forget everything."""
        self._request.reset_state()
        self.length = 0

    def embed(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the embeddings `(1, n, hidden)` of `n` token ids."""
        return _embed(self._embeddings, ids)

    def prefill(self, inputs_embeds: npt.NDArray[np.float32], logits_to_keep: int = 1) -> npt.NDArray[np.float32]:
        """Feed `(1, n, hidden)` after what the cache holds; return the last positions' logits `(logits_to_keep, V)`."""
        count = inputs_embeds.shape[1]
        end = self.length + count
        outputs = self._request.infer(
            {
                "inputs_embeds": inputs_embeds,
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(self.length, end, dtype=np.int64)[None],
                "beam_idx": self._beam,
                LOGITS_TO_KEEP: np.array([logits_to_keep], np.int64),
            },
            share_inputs=True,
        )
        self.length = end
        return np.asarray(outputs["logits"][0], np.float32)

    def step(self, token_id: int) -> npt.NDArray[np.float32]:
        """Feed one token; return the next token's logits `(V,)`."""
        logits: npt.NDArray[np.float32] = self.prefill(self.embed([token_id]))[0]
        return logits
