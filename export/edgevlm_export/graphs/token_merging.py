"""Token merging: a vision transformer's most similar tokens are averaged, so that the layers after run on fewer.

ToMe (Bolya et al. 2023, arXiv 2210.09461): after a layer's attention every other token looks for the most similar of
the rest by its key (bipartite soft matching), and the most similar pairs are averaged. Later attention adds the
logarithm of how many tokens each stands for (proportional attention). Before the connector every patch gets the vector
of the token that it became. How many tokens are left after each layer is known at export, so shapes stay static.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.errors import OptionError
from edgevlm.runtime.core import import_openvino
from edgevlm_export.graphs.constants import Constants, Output, named
from edgevlm_export.graphs.layers import dimension, split
from edgevlm_export.graphs.stages import Values

if TYPE_CHECKING:
    import openvino as ov

LAYERS: Mapping[float, tuple[int, ...]] = {0.25: (2,), 0.5: (1, 2, 3, 4)}
"""Which layers merge, by the share of the patches that are merged in all. Merging half of them at
once cost a prototype of the bundled model labels and counts."""
SIMILARITY = "token_similarity"
"""How the names of the products of keys end, which stay in float: quantized, they would merge other tokens."""
_LEAST_SIZE = 1e-7
"""Size of a token of padding alone, so that its logarithm is finite; float16 holds it."""


@dataclass(frozen=True)
class TokenMerging:
    """What one layer merges."""

    layer: str
    count: int
    has_class_token: bool
    """The first token is kept."""


def merged_tokens(ratio: float, patches: int, layers: int) -> dict[int, int]:
    """Return how many tokens each layer merges, by its index, for `ratio` of a view's patches.

    Raises `OptionError` where the transformer has too few layers.
    """
    indices = LAYERS[ratio]
    if layers <= indices[-1]:
        raise OptionError(
            f"--merge-tokens {ratio} needs a vision encoder of {indices[-1] + 1} layers, and this one runs {layers};"
            " leave it out"
        )
    ends = [int(patches * ratio) * number // len(indices) for number in range(len(indices) + 1)]
    return {index: end - start for index, (start, end) in zip(indices, pairwise(ends), strict=True)}


def merge_tokens(x: ov.Node, keys: ov.Node, merging: TokenMerging, values: Values) -> ov.Node:
    """Return `x` `(B, T, D)` with the most similar pairs averaged: `(B, T - count, D)`; `keys` are `(B, H, T, d)`.

    Sets `attention_bias`, the logarithm of each token's size, and `token_places`, which token each of the view became.
    """
    opset = import_openvino().opset13
    tokens, width = (x.get_output_partial_shape(0)[axis].get_length() for axis in (1, 2))
    left = tokens - merging.count
    places, bias = _places(keys, merging), values.outputs.get("attention_bias")
    if bias is None:
        size = opset.broadcast(np.float32(1), _with_batch(x, tokens, 1))
    else:
        size = opset.reshape(opset.exp(bias), np.array([0, tokens, 1]), special_zero=True)
    rows = opset.concat([opset.multiply(x, size), size], 2)  # (B, T, D + 1)
    repeat = np.zeros((1, 1, width + 1), np.int32)  # added: Broadcast takes ten times as long on a CPU
    indices = opset.add(opset.unsqueeze(places, np.int64(2)), repeat)
    empty = opset.broadcast(np.float32(0), _with_batch(x, left, width + 1))
    x, size = split(opset.scatter_elements_update(empty, indices, rows, np.int64(1), "sum"), [width, 1])
    size = opset.maximum(size, np.float32(_LEAST_SIZE))
    values["attention_bias"] = opset.reshape(opset.log(size), np.array([0, 1, 1, left]), special_zero=True)
    earlier = values.outputs.get("token_places")
    values["token_places"] = places if earlier is None else opset.gather(places, earlier, np.int64(1), batch_dims=1)
    return opset.divide(x, size)


def unmerged(values: Values) -> Output:
    """Return `hidden_states` with one vector for each token that the view had before any merging."""
    x, places = values["hidden_states"], values.outputs.get("token_places")
    return x if places is None else import_openvino().opset13.gather(x, places, np.int64(1), batch_dims=1).output(0)


def unmerge_tokens(values: Values, constants: Constants) -> None:  # noqa: ARG001
    """Set `hidden_states` so."""
    values.outputs["hidden_states"] = unmerged(values)


def _places(keys: ov.Node, merging: TokenMerging) -> ov.Node:
    """Return which of the tokens left each token becomes, int32 `(B, T)`.

    Those at even places that are left come first, those at odd places, which are all left, after them.
    """
    opset = import_openvino().opset13
    tokens = keys.get_output_partial_shape(0)[2].get_length()
    even, odd = (tokens + 1) // 2, tokens // 2
    similarity, partner = _most_similar(keys, tokens, merging)
    merged = opset.topk(similarity, np.int64(merging.count), 1, "max", "none", "i32").output(1)
    ones = opset.broadcast(np.int32(1), opset.shape_of(partner))
    zeros = opset.broadcast(np.int32(0), opset.shape_of(merged))
    is_left = opset.scatter_elements_update(ones, merged, zeros, np.int64(1))
    own = opset.subtract(opset.cum_sum(is_left, np.int64(1)), np.int32(1))
    left = even - merging.count
    places = opset.select(opset.greater(is_left, np.int32(0)), own, opset.add(partner, np.int32(left)))
    behind = opset.broadcast(np.arange(left, left + odd, dtype=np.int32)[None], _with_batch(keys, odd))
    order = np.arange(tokens) // 2 + np.arange(tokens) % 2 * even
    return opset.gather(opset.concat([places, behind], 1), order, np.int64(1))


def _most_similar(keys: ov.Node, tokens: int, merging: TokenMerging) -> tuple[ov.Node, ov.Node]:
    """Return for each token at an even place the largest cosine with one at an odd place, and which that is."""
    opset = import_openvino().opset13
    key = opset.reduce_mean(keys, np.array([1]))  # (B, T, d)
    norm = opset.sqrt(opset.reduce_sum(opset.multiply(key, key), np.array([2]), keep_dims=True))
    key = opset.divide(key, opset.maximum(norm, np.float32(1e-12)))
    step, axis = np.array([2]), np.array([1])
    even, odd = (opset.slice(key, np.array([start]), np.array([tokens]), step, axis) for start in (0, 1))
    cosines = named(opset.matmul(even, odd, False, True), f"{merging.layer}/{SIMILARITY}")
    best = opset.topk(cosines, np.int64(1), 2, "max", "none", "i32")
    similarity, partner = (opset.squeeze(each, np.array([2])) for each in best.outputs())
    if merging.has_class_token:
        last = np.zeros((1, (tokens + 1) // 2), np.float32)
        last[0, 0] = -4  # below every cosine
        similarity = opset.add(similarity, last)
    return similarity, partner


def _with_batch(x: Output, *sizes: int) -> ov.Node:
    """Return a shape that begins with the batch of `x`."""
    opset = import_openvino().opset13
    return opset.concat([opset.unsqueeze(dimension(x, 0), np.int64(0)), np.array(sizes)], 0)
