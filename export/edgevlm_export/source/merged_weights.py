"""A checkpoint's weights with adapters merged into each as it is read, so that a graph sees a checkpoint like any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edgevlm.errors import SourceError
from edgevlm_export.source.adapter import HEAD, TABLE, Adapter, plain_name
from edgevlm_export.source.changes import merge
from edgevlm_export.source.checkpoint import Checkpoint
from edgevlm_export.source.safetensors_reader import DTYPES, RawTensor, Weights


class MergedWeights(Weights):
    """Tensors by name, each changed as the adapters say; all that these hold is checked at once. Raises `SourceError`.

    Where embedding table and LM head are one tensor, what changes the table changes the head, as in peft's
    `merge_and_unload`. An adapter that changes the head by itself, or the table as a copy, makes two of them.
    `renamed` are parts of names that the checkpoint's family has renamed (`FamilyExporter.renamed`).
    """

    def __init__(self, checkpoint: Checkpoint, adapters: Sequence[Adapter], renamed: Mapping[str, str]) -> None:
        super().__init__(checkpoint)
        self.adapters = [adapter.with_names(renamed) for adapter in adapters]
        self._changes: dict[str, list[tuple[Adapter, str]]] = {}
        """By the file's names: the adapters that change a tensor, each with the plain name under which it does."""
        self._names = {plain_name(name, renamed): name for name in self}
        self._table = next((name for name in self._names if name.endswith(TABLE)), TABLE)
        for target in dict.fromkeys(target for adapter in self.adapters for target in adapter.parts):
            if target != HEAD:
                self._add(target, [(adapter, target) for adapter in self.adapters if target in adapter.parts])
        self._is_tied = HEAD not in self._names or self._has_copied_head(checkpoint)
        self._add_head()

    def get(self, name: str) -> RawTensor:
        """Return a tensor: memory-mapped where no adapter changes it, else made anew in the type that it has."""
        tensor = super().get(name)
        if name not in self._changes:
            return tensor
        changes = [(adapter.weight, adapter.change(target)) for adapter, target in self._changes[name]]
        try:
            return merge(tensor, changes)
        except FloatingPointError:
            raise SourceError(
                f"{name} holds infinite values or NaN once {_folders(self._changes[name])} is merged; the adapter or"
                " the checkpoint is damaged"
            ) from None

    def release(self) -> None:
        """Let the system take back the memory of what was read, the adapters' own included."""
        super().release()
        for adapter in self.adapters:
            adapter.tensors.release()

    def moves_head(self, adapter: Adapter) -> bool:
        """Tell whether the LM head changes only because a product is added to the table that it is, too."""
        adds = "embedding A" in adapter.parts.get(self._table, {})
        return adds and self._is_tied and self._head_change(adapter) == self._table

    def _add(self, target: str, changes: list[tuple[Adapter, str]]) -> None:
        """Note what changes the tensor with this plain name."""
        for adapter, part in changes:
            if target not in self._names:
                raise _unknown(adapter, part)
            adapter.check(part, self.shape(self._names[target]))
        if changes:
            self._changes[self._names[target]] = changes

    def _add_head(self) -> None:
        """Note what changes the LM head, which becomes a tensor of its own where that is not what changes the table."""
        held = [(adapter, self._head_change(adapter)) for adapter in self.adapters]
        if HEAD not in self._names and self._table in self._names:
            if all(name == (self._table if self._table in adapter.parts else None) for adapter, name in held):
                return
            self._names[HEAD] = HEAD
            self._entries[HEAD] = self._entries[self._names[self._table]]
        self._add(HEAD, [(adapter, name) for adapter, name in held if name])

    def _head_change(self, adapter: Adapter) -> str | None:
        """Return the plain name under which an adapter changes the LM head, None where it does not."""
        if HEAD in adapter.parts:
            return HEAD
        follows = self._is_tied and self._table in adapter.parts and not adapter.replaces(self._table)
        return self._table if follows else None

    def _has_copied_head(self, checkpoint: Checkpoint) -> bool:
        """Tell whether the stored LM head is a copy of the table that it is tied to, where the table changes."""
        text = checkpoint.config.get("text_config") or {}
        says_tied = any(section.get("tie_word_embeddings") for section in (checkpoint.config, text))
        if not says_tied or not any(self._table in adapter.parts for adapter in self.adapters):
            return False
        names = [self._names[name] for name in (self._table, HEAD)]
        if len({(self.dtype(name), self.shape(name)) for name in names}) > 1 or self.dtype(names[0]) not in DTYPES:
            return False
        table, head = (Weights.get(self, name).array for name in names)
        return np.array_equal(table, head)


def _folders(changes: Sequence[tuple[Adapter, str]]) -> str:
    return " and ".join(str(adapter.folder) for adapter, _ in changes)


def _unknown(adapter: Adapter, target: str) -> SourceError:
    """Return the error of an adapter that changes what the checkpoint does not have."""
    name = next(iter(adapter.parts[target].values()))
    if target.endswith(".bias"):
        return SourceError(f"{adapter.folder} has {name}, a bias that the checkpoint has no place for")
    origin = f" ({adapter.base})" if adapter.base else ""
    return SourceError(
        f"{adapter.folder} has {name}, which matches no weight of the checkpoint; it was trained on another"
        f" architecture{origin}"
    )
