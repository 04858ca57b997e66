"""A session whose KV cache is OpenVINO state: for every device and every graph."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgevlm.families.base import SLIDING_CACHE_START, LanguageInputs
from edgevlm.malloc import return_freed_memory
from edgevlm.runtime.graph_passes import LOGITS_TO_KEEP
from edgevlm.runtime.kv_session import DecoderInfo, Requests, Session
from edgevlm.runtime.kv_sliding import SlidingCache, cut
from edgevlm.runtime.kv_snapshots import Snapshots, is_fixed

_MOST_STALE = 512
"""Most masked entries that stay in the cache; beyond that they are removed, which copies the cache once."""
_MOST_DRAFT_BYTES = 4 * 2**20
"""States of more bytes are not copied for every draft."""


class StatefulSession(Session):
    """A sequence whose KV cache is the state of its infer request.

    Rewinding masks entries instead of touching the cache, which costs nothing and changes no result, until there are
    `_MOST_STALE` of them and they are removed. Where the decoder has states of a fixed size besides, it goes back to
    lengths at which it kept copies of them; where it has layers with a sliding window, to those whose window is cached.
    """

    cached_attention_slowdown = 13  # 874 tokens at once take 0.63 s, 128 at a time 1.27 s

    def __init__(self, requests: Requests, decoder: DecoderInfo) -> None:
        super().__init__(requests, decoder)
        self._beam = np.zeros(1, np.int32)
        self._mask = np.zeros((1, 0), np.int64)  # (1, T): 1 for each entry of the KV cache, 0 where it is masked
        self._snapshots = Snapshots(self._request) if decoder.traits.fixed_states else None
        self._sliding = SlidingCache(decoder.traits) if decoder.traits.sliding_layers else None
        self._set_from: dict[str, npt.NDArray[np.float32]] = {}  # what states were set from when they were cut

    @property
    def takes_drafts(self) -> bool:
        """Whether drafts pay, and can be taken back."""
        if self._snapshots is None:
            return super().takes_drafts
        return self._snapshots.size_bytes <= _MOST_DRAFT_BYTES

    def _reachable(self, length: int) -> int:
        if length >= self.length:
            return length
        length = super()._reachable(length) if self._snapshots is None else self._snapshots.longest(length)
        return length if self._sliding is None or self._sliding.has_window(length, self._mask) else 0

    def _keep(self, *, for_draft: bool = False) -> None:
        if self._snapshots and self.length:
            self._snapshots.keep(self.length, for_draft=for_draft)

    def _forget(self, length: int) -> None:
        if length:
            live = np.flatnonzero(self._mask[0])
            self._mask[0, live[length:]] = 0
            if self._snapshots:
                self._snapshots.restore(length)
            if self._mask.shape[1] - length > _MOST_STALE:
                self._cut()
        else:
            self._request.reset_state()
            self._mask = np.zeros((1, 0), np.int64)
            if self._sliding:
                self._sliding.start = 0
            if self._snapshots:
                self._snapshots.clear()

    def _cached_entries(self, common: int) -> int:
        return common + min(self._mask.shape[1] - common, _MOST_STALE)

    def _cut(self) -> None:
        """Remove masked entries, and those that no window reaches from layers that have one."""
        live, sliding = np.flatnonzero(self._mask[0]), self._sliding
        states = [each for each in self._request.query_state() if not is_fixed(each.name)]
        local = [each for each in states if sliding and sliding.holds(each.name)]
        others = [each for each in states if not (sliding and sliding.holds(each.name))]
        if sliding:
            self._set_from["local"] = cut(local, sliding.cut(live))
            return_freed_memory()
        if len(live) < self._mask.shape[1]:
            self._set_from["others"] = cut(others, live)
        self._mask = np.ones((1, len(live)), np.int64)

    def _read(
        self, inputs_embeds: npt.NDArray[np.float32], inputs: LanguageInputs, logits_to_keep: int
    ) -> npt.NDArray[np.float32]:
        count = inputs_embeds.shape[1]
        sliding = {}
        if self._sliding:
            if self._sliding.is_long(self._mask.shape[1]):
                self._cut()
            sliding[SLIDING_CACHE_START] = np.array([self._sliding.start], np.int64)
        mask = np.concatenate([self._mask, np.ones((1, count), np.int64)], axis=1)
        outputs = self._infer(
            {
                "inputs_embeds": inputs_embeds,
                "attention_mask": mask,
                "position_ids": inputs.positions if len(inputs.positions) == 1 else inputs.positions[:, None],
                "beam_idx": self._beam,
                **sliding,
                LOGITS_TO_KEEP: np.array([logits_to_keep], np.int64),
                **{name: array[None] for name, array in inputs.extras.items()},
            },
            count,
        )
        self._mask = mask
        return np.asarray(outputs["logits"][0], np.float32)
