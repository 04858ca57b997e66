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
    """What stands at each place: a token id, or a view's key and a row of its features."""
    inputs: LanguageInputs
    images: Sequence[range]
    """The places of each picture's features."""
    image_tokens: int
    views: int
    cached_views: int

    def __len__(self) -> int:
        return len(self.ids)


def join(arrays: Sequence[npt.NDArray[np.float32]], hidden_size: int) -> npt.NDArray[np.float32]:
    """Return the rows `(n, hidden)` of several arrays, which may be none."""
    return np.concatenate([np.empty((0, hidden_size), np.float32), *arrays])


def feature_keys(picture: EncodedImage, features: Arrays) -> list[Hashable]:
    """Return a name for each row of a picture's features.

    Where they are the views' rows, one after another, a view names its own, whatever the picture around it.
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
    ids: npt.NDArray[np.int64], image_token_id: int, rows: Sequence[Hashable], salt: str = ""
) -> list[Hashable]:
    """Return what stands at each place of a prompt: a token id, or the name of the row of features in its place.

    The first name holds the salt, so that prompts of different salts have no beginning in common.
    """
    keys: list[Hashable] = ids.tolist()
    for place, key in zip(np.flatnonzero(ids == image_token_id), rows, strict=True):
        keys[place] = key
    if salt:
        keys[0] = (salt, keys[0])
    return keys


def image_places(ids: npt.NDArray[np.int64], image_token_id: int, counts: Sequence[int]) -> list[range]:
    """Return where each picture's features stand in the prompt, from the first to the last of them."""
    places = np.flatnonzero(ids == image_token_id)
    ends = np.cumsum(counts)
    return [range(int(places[end - n]), int(places[end - 1]) + 1) for n, end in zip(counts, ends, strict=True) if n]


def merge(
    inputs_embeds: npt.NDArray[np.float32],
    ids: npt.NDArray[np.int64],
    image_token_id: int,
    image_embeds: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Put `image_embeds` `(n, hidden)` into `inputs_embeds` `(1, S, hidden)` at the n places of the image token."""
    places = ids == image_token_id
    if places.sum() != len(image_embeds):
        raise PromptError(f"the prompt has {places.sum()} image tokens for {len(image_embeds)} image embeddings")
    inputs_embeds[0, places] = image_embeds
    return inputs_embeds
