"""The modules of a model: each declares its tensors once, for the check of the checkpoint and for the graph.

Names are the checkpoint's, shapes are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """One tensor by its full name."""

    name: str
    shape: Shape

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Yield name and shape."""
        yield self.name, self.shape


@dataclass(frozen=True)
class Linear:
    """x W^T + b, W `(rows, columns)`."""

    name: str
    rows: int
    columns: int
    bias: bool = False

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Yield names and shapes."""
        yield f"{self.name}.weight", (self.rows, self.columns)
        if self.bias:
            yield f"{self.name}.bias", (self.rows,)


@dataclass(frozen=True)
class Norm:
    """An RMSNorm or LayerNorm over `size` channels; the latter has a bias."""

    name: str
    size: int
    eps: float
    bias: bool = False
    unit_offset: bool = False
    """The weights are stored less 1: the norm multiplies by 1 + weight."""
    scaled: bool = True
    """Whether there are weights."""

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Yield names and shapes."""
        if self.scaled:
            yield f"{self.name}.weight", (self.size,)
        if self.bias:
            yield f"{self.name}.bias", (self.size,)


@dataclass(frozen=True)
class Embedding:
    """A table of `rows` vectors of `columns` channels."""

    name: str
    rows: int
    columns: int
    scale: float = 1.0
    """What its vectors are multiplied by, rounded to the type of the stored table, as transformers does it."""

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Yield name and shape."""
        yield f"{self.name}.weight", (self.rows, self.columns)


@dataclass(frozen=True)
class PatchConvolution:
    """A convolution whose stride is its kernel: each patch of `size` x `size` pixels becomes one vector."""

    name: str
    hidden: int
    channels: int
    size: int
    bias: bool = True

    @property
    def values(self) -> int:
        """Values of a patch."""
        return self.channels * self.size**2

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Yield names and shapes."""
        yield f"{self.name}.weight", (self.hidden, self.channels, self.size, self.size)
        if self.bias:
            yield f"{self.name}.bias", (self.hidden,)


@dataclass(frozen=True)
class FrameConvolution:
    """A convolution over `frames` pictures whose stride is its kernel: a patch of all of them becomes one vector."""

    name: str
    hidden: int
    channels: int
    frames: int
    size: int
    bias: bool = True

    @property
    def values(self) -> int:
        """Values of a patch."""
        return self.channels * self.frames * self.size**2

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Yield names and shapes."""
        yield f"{self.name}.weight", (self.hidden, self.channels, self.frames, self.size, self.size)
        if self.bias:
            yield f"{self.name}.bias", (self.hidden,)


@dataclass(frozen=True)
class DepthwiseConvolution:
    """A convolution of `size` places along a sequence, of each channel by itself."""

    name: str
    channels: int
    size: int
    bias: bool = False

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Yield names and shapes."""
        yield f"{self.name}.weight", (self.channels, 1, self.size)
        if self.bias:
            yield f"{self.name}.bias", (self.channels,)


def declared(tree: Any) -> Iterator[tuple[str, Shape]]:
    """Yield name and shape of every tensor of a module, or of all modules in a dataclass's fields or in a sequence."""
    if hasattr(tree, "tensors"):
        yield from tree.tensors()
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from declared(item)
    elif is_dataclass(tree):
        for field in fields(tree):
            yield from declared(getattr(tree, field.name))
