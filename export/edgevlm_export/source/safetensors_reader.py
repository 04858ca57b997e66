"""A checkpoint's tensors, mapped from its safetensors files: nothing is read before it is used.

The format: 8 bytes of header length, a JSON header with each tensor's type, shape and place, then the bytes.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgevlm.errors import SourceError
from edgevlm_export.source.checkpoint import Checkpoint

Array: TypeAlias = npt.NDArray[Any]
DTYPES: dict[str, tuple[str, type]] = {
    "F32": ("f32", np.float32),
    "F16": ("f16", np.float16),
    "BF16": ("bf16", np.uint16),
}
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|position_ids)$")
"""Tensors that old checkpoints carry and that follow from the config."""


@dataclass(frozen=True)
class RawTensor:
    """A tensor as it is stored; bfloat16, which NumPy lacks, is held as its 16 bits."""

    array: Array
    dtype: str
    """OpenVINO's name of the element type: f32, f16 or bf16."""

    def float32(self) -> npt.NDArray[np.float32]:
        """Return the values as float32, which is exact for all three types."""
        if self.dtype == "bf16":
            return (self.array.astype(np.uint32) << 16).view(np.float32)
        return self.array.astype(np.float32, copy=False)

    def rounded(self, value: float) -> np.float32:
        """Return a number as this tensor's type holds it, rounded to nearest, ties to even."""
        if self.dtype == "bf16":
            bits = int(np.float32(value).view(np.uint32))
            return np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
        return np.float32(self.array.dtype.type(value))


def concatenate(tensors: Sequence[RawTensor]) -> RawTensor:
    """Return tensors joined along their first axis, in their own type where it is one, else in float32."""
    if len(tensors) == 1:
        return tensors[0]
    if len({tensor.dtype for tensor in tensors}) == 1:
        return RawTensor(np.concatenate([tensor.array for tensor in tensors]), tensors[0].dtype)
    return RawTensor(np.concatenate([tensor.float32() for tensor in tensors]), "f32")


class Tensors:
    """The tensors of some safetensors files, by name."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._entries: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for path in paths:
            start, header = _read_header(path)
            self._entries |= {name: (path, start, entry) for name, entry in header.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    @property
    def count(self) -> int:
        """How many numbers all tensors together hold, by the files' headers."""
        return sum(math.prod(entry["shape"]) for _, _, entry in self._entries.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, by the file's header."""
        return tuple(self._entries[name][2]["shape"])

    def dtype(self, name: str) -> str:
        """Return a tensor's element type as the file's header has it, such as BF16."""
        return str(self._entries[name][2]["dtype"])

    def get(self, name: str) -> RawTensor:
        """Return a tensor, memory-mapped."""
        path, start, entry = self._entries[name]
        kind, dtype = DTYPES[entry["dtype"]]
        count = int(np.prod(entry["shape"], dtype=np.int64))
        offset = start + entry["data_offsets"][0]
        return RawTensor(np.frombuffer(self._map(path), dtype, count, offset).reshape(entry["shape"]), kind)

    def release(self) -> None:
        """Let the system take back the memory of what was read; it is read from the file again when needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for each in self._maps.values():
                each.madvise(mmap.MADV_DONTNEED)

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[path]


class Weights(Tensors):
    """A checkpoint's tensors; `expect` checks them against the shapes that the config asks for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.weight_files())

    def expect(self, shapes: Mapping[str, tuple[int, ...]], unused: Collection[str] = ()) -> None:
        """Check that the checkpoint has these tensors and no others but `unused`, or such by pattern (`mtp.*`).

        Raises `SourceError`.
        """
        for name, shape in shapes.items():
            self._check(name, shape)
        others = sorted(self._entries.keys() - shapes.keys() - set(unused))
        unknown = [name for name in others if not any(fnmatchcase(name, pattern) for pattern in unused)]
        if found := next((name for name in unknown if not _BUFFERS.search(name)), None):
            raise SourceError(
                f"the checkpoint holds weights that its config has no place for, such as {found};"
                " config.json and the weights do not belong together"
            )

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self:
            raise SourceError(f"the checkpoint lacks weights that its config asks for, such as {name}")
        if self.dtype(name) not in DTYPES:
            raise SourceError(
                f"weight {name} is stored as {self.dtype(name)}; the native route reads {', '.join(DTYPES)}"
                " (quantized checkpoints are not exported: take the original one)"
            )
        if self.shape(name) != shape:
            raise SourceError(f"weight {name} has shape {self.shape(name)}, its config asks for {shape}")


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where the tensors' bytes start and the header's entries; `checkpoint` has checked that it is sound."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header
