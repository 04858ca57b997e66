"""What adapters make of a tensor, a block of rows at a time: no more than the tensor itself and a block are in memory.

A tensor is seen as a matrix, its first axis by all others. The arithmetic is in float64, and what comes of it is stored
in the tensor's own type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from edgevlm_export.source.safetensors_reader import Array, RawTensor

Float64: TypeAlias = npt.NDArray[np.float64]
BLOCK = 2**20
"""Numbers of a block: 8 MB in float64, of which there are some copies."""


@dataclass(frozen=True)
class LowRank:
    """A product of two narrow matrices, which is added (LoRA), and may then be given lengths (DoRA)."""

    left: Float64  # (rows, r), multiplied by what scales the product
    right: Float64  # (r, columns)
    magnitude: Float64 | None = None
    """DoRA: the length of each row, or of each column, once the product has been added."""
    of_columns: bool = False

    def added(self, block: Float64, rows: slice) -> Float64:
        """Return the rows with the product's added."""
        product: Float64 = self.left[rows] @ self.right
        product += block
        return product

    def scaled(self, block: Float64, rows: slice, norms: Float64 | None) -> Float64:
        """Return such rows with their lengths; `norms` are those that the columns have."""
        if self.magnitude is None:
            return block
        if norms is not None:
            factors: Float64 = self.magnitude / norms
        else:
            factors = (self.magnitude[rows] / np.sqrt(np.square(block).sum(axis=1)))[:, None]
        return block * factors

    @property
    def shape(self) -> tuple[int, int]:
        """Of the product."""
        return self.left.shape[0], self.right.shape[1]


@dataclass(frozen=True)
class Rows:
    """Rows that stand in for others: the embeddings of single tokens."""

    ids: npt.NDArray[np.int64]  # (n,)
    values: RawTensor  # (n, columns)

    def put(self, block: Float64, rows: slice) -> Float64:
        """Return a block with those of these rows that lie in it."""
        held = (self.ids >= rows.start) & (self.ids < rows.start + len(block))
        if held.any():
            block = block.copy()
            block[self.ids[held] - rows.start] = self.values.float32()[held]
        return block


@dataclass(frozen=True)
class Change:
    """What one adapter makes of a tensor: its own in its place, then the product added, then rows of its own."""

    whole: RawTensor | None = None
    low_rank: LowRank | None = None
    rows: Rows | None = None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Tell whether a tensor of this shape can be changed so."""
        count, columns = shape[0], math.prod(shape[1:])
        fits = self.whole is None or self.whole.array.shape == shape
        if product := self.low_rank:
            fits &= product.shape == (count, columns)
            length = columns if product.of_columns else count
            fits &= product.magnitude is None or product.magnitude.shape == (length,)
        if self.rows:
            fits &= self.rows.values.array.shape[1:] == shape[1:] and int(self.rows.ids.max(initial=0)) < count
        return fits

    def norms(self, matrix: RawTensor) -> Float64 | None:
        """Return the length of each column that DoRA divides by, None where it does not."""
        if self.low_rank is None or self.low_rank.magnitude is None or not self.low_rank.of_columns:
            return None
        squares = np.zeros(matrix.array.shape[1])
        for rows, block in blocks(matrix if self.whole is None else as_matrix(self.whole)):
            squares += np.square(self.low_rank.added(block, rows)).sum(axis=0)
        return np.sqrt(squares)

    def of(self, block: Float64, rows: slice, norms: Float64 | None) -> Float64:
        """Return what becomes of a block of rows."""
        if self.whole is not None:
            block = wide(as_matrix(self.whole), rows)
        if self.low_rank:
            block = self.low_rank.scaled(self.low_rank.added(block, rows), rows, norms)
        return self.rows.put(block, rows) if self.rows else block


def merge(tensor: RawTensor, changes: Sequence[tuple[float, Change]]) -> RawTensor:
    """Return a tensor W with the difference that each change makes, times its weight: W + Σ weight (change(W) - W).

    Of several plain LoRA adapters that is the sum of their products, peft's `combination_type="cat"`. Raises
    `FloatingPointError` where a value is not finite.
    """
    matrix = as_matrix(tensor)
    merged = np.empty(matrix.array.shape, matrix.array.dtype)
    weights = [weight for weight, _ in changes]
    with np.errstate(all="ignore"):
        norms = [change.norms(matrix) for _, change in changes]
        for rows, block in blocks(matrix):
            made = [change.of(block, rows, lengths) for (_, change), lengths in zip(changes, norms, strict=True)]
            if weights == [1]:
                found = made[0]
            else:
                found = block + sum(weight * (each - block) for weight, each in zip(weights, made, strict=True))
            merged[rows] = narrow(found, tensor.dtype)
            if not np.isfinite(found if tensor.dtype == "bf16" else merged[rows]).all():
                raise FloatingPointError
    return RawTensor(merged.reshape(tensor.array.shape), tensor.dtype)


def blocks(matrix: RawTensor) -> Iterator[tuple[slice, Float64]]:
    """Yield a matrix in blocks of rows, each with its place."""
    count, columns = matrix.array.shape
    step = max(1, BLOCK // max(columns, 1))
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        yield rows, wide(matrix, rows)


def as_matrix(tensor: RawTensor) -> RawTensor:
    """Return a tensor's first axis by all others."""
    return RawTensor(tensor.array.reshape(len(tensor.array), -1), tensor.dtype)


def wide(matrix: RawTensor, rows: slice) -> Float64:
    """Return some rows in float64."""
    return RawTensor(matrix.array[rows], matrix.dtype).float32().astype(np.float64)


def narrow(block: Float64, dtype: str) -> Array:
    """Return float64 in a type as `RawTensor` holds it, rounded to the nearest, ties to even."""
    if dtype == "f16":
        return block.astype(np.float16)
    single = block.astype(np.float32)
    if dtype == "f32":
        return single
    bits = single.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
