"""A prompt with its pictures merged in: embeddings, positions, and the keys that prefix reuse compares."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgevlm.errors import PromptError
from edgevlm.families.base import IMAGE_EMBEDS, Arrays, LanguageInputs
from edgevlm.inputs.vision_cache import EncodedImage


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the language model."""

    inputs_embeds: npt.NDArray[np.float32]  # (1, n, hidden)
    ids: Sequence[int]
    prefix_keys: Sequence[Hashable]
    """Key of each position: a token id, or the key of a view and the index of its row."""
    inputs: LanguageInputs
    images: Sequence[range]
    """Positions of each picture's rows, first to last."""
    image_tokens: int
    views: int
    cached_views: int
    cache_salt: str = ""
    """Prompts of different salts share nothing that was computed or answered before."""

    def __len__(self) -> int:
        return len(self.ids)

    def marks_after(self, start: int) -> list[int]:
        """Return where later prompts may go on from, counted from `start`: each picture's end, and the prompt's."""
        return [mark - start for mark in (*(each.stop for each in self.images), len(self))]


def join(arrays: Sequence[npt.NDArray[np.float32]], hidden_size: int) -> npt.NDArray[np.float32]:
    """Concatenate arrays of rows `(·, hidden)`, of which there may be none, to `(n, hidden)`."""
    return np.concatenate([np.empty((0, hidden_size), np.float32), *arrays])


def feature_keys(picture: EncodedImage, features: Arrays) -> list[Hashable]:
    """Return a key for each row of a picture's assembled features.

    Where these are the views' rows in order, a row's key depends on its view alone, so that it is reused in any picture
    that has the same view.
    """
    image_embeds, start = features[IMAGE_EMBEDS], 0
    rows: list[Hashable] = []
    for view in picture.views:
        own = view.outputs[IMAGE_EMBEDS]
        if not np.array_equal(own, image_embeds[start : start + len(own)]):
            break
        rows += [(view.key, row) for row in range(len(own))]
        start += len(own)
    if len(rows) == len(image_embeds):
        return rows
    whole = (picture.layout, *(view.key for view in picture.views))
    return [(whole, row) for row in range(len(image_embeds))]


def prefix_keys(
    ids: npt.NDArray[np.int64], shown: npt.NDArray[np.bool_], rows: Sequence[Hashable], salt: str = ""
) -> list[Hashable]:
    """Return the key of each position: a token id, or the key of the row of image embeddings in its place.

    The rows are where `shown` `(n,)`. The first key holds the salt, so that prompts of different salts share no prefix.
    """
    keys: list[Hashable] = ids.tolist()
    for place, key in zip(np.flatnonzero(shown), rows, strict=True):
        keys[place] = key
    if salt:
        keys[0] = (salt, keys[0])
    return keys


def image_places(shown: npt.NDArray[np.bool_], counts: Sequence[int]) -> list[range]:
    """Return the range of positions of each picture's rows in the prompt, which lie where `shown` `(n,)`."""
    places = np.flatnonzero(shown)
    ends = np.cumsum(counts)
    return [range(int(places[end - n]), int(places[end - 1]) + 1) for n, end in zip(counts, ends, strict=True) if n]


def merge(
    inputs_embeds: npt.NDArray[np.float32],
    shown: npt.NDArray[np.bool_],
    image_embeds: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Put `image_embeds` `(n, hidden)` into `inputs_embeds` `(1, S, hidden)` at the n places where `shown` `(S,)`."""
    if shown.sum() != len(image_embeds):
        raise PromptError(f"the prompt has {shown.sum()} image tokens for {len(image_embeds)} image embeddings")
    inputs_embeds[0, shown] = image_embeds
    return inputs_embeds
