"""Pictures already looked at: their tiles' embeddings by content, so that what is known is not encoded again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgevlm.families import Tiles

Pixels: TypeAlias = npt.NDArray[np.uint8]
_PLACES, _PICTURES = 64, 256
"""Tiles kept for comparison within a tolerance, and pictures whose tiles are remembered by name."""


@dataclass(frozen=True)
class TileEmbedding:
    """What the vision part makes of one tile."""

    key: bytes
    """Names the tile's content: equal keys, equal embeddings."""
    image_embeds: npt.NDArray[np.float32]  # (tokens, hidden), read-only


@dataclass(frozen=True)
class EncodedImage:
    """A picture as the language model reads it."""

    rows: int
    cols: int
    tiles: Sequence[TileEmbedding]
    encoded: int
    """How many of the tiles had to be encoded for this call; the others were known."""

    def __len__(self) -> int:
        return len(self.tiles)


def content_key(pixels: Pixels, *facts: Hashable) -> bytes:
    """Return a 16-byte name for an array's content, its shape and `facts` about its use."""
    digest = blake2b(repr((pixels.shape, *facts)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


class EmbeddingCache:
    """Embeddings by content, the least recently used dropped beyond `limit_bytes`; shared by all threads.

    A tile is known again when its pixels are equal; with `tolerance`, also when they differ from those last encoded
    at the same place of a picture of the same size by at most that much on average (levels of 0 to 255): sensor noise
    of a fixed camera. The comparison is always with the pixels that were encoded, so that slow change is noticed.
    """

    def __init__(self, limit_bytes: int, tolerance: float = 0.0) -> None:
        self._limit, self._tolerance = limit_bytes, tolerance
        self._tiles: OrderedDict[bytes, TileEmbedding] = OrderedDict()
        self._pictures: OrderedDict[bytes, tuple[int, int, tuple[bytes, ...]]] = OrderedDict()
        self._places: OrderedDict[Hashable, tuple[Pixels, bytes]] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def picture(self, key: bytes) -> EncodedImage | None:
        """Return a whole picture, if all of its tiles are still known."""
        with self._lock:
            rows, cols, keys = self._pictures.get(key, (0, 0, ()))
            if not keys or any(each not in self._tiles for each in keys):
                return None
            self._pictures.move_to_end(key)
            for each in keys:
                self._tiles.move_to_end(each)
            return EncodedImage(rows, cols, [self._tiles[each] for each in keys], 0)

    def encode(
        self,
        key: bytes,
        tiles: Tiles,
        encode: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]],
        on_tile: Callable[[], None] | None = None,
        salt: str = "",
    ) -> EncodedImage:
        """Return the picture called `key`, calling `encode` for those of its tiles not known under this salt."""
        found, encoded = [], 0
        for index in range(len(tiles)):
            pixels, place = tiles.pixels[index], (salt, tiles.rows, tiles.cols, index)
            tile_key = content_key(pixels, salt)
            tile = self._find(tile_key, pixels, place)
            if tile is None:
                image_embeds = encode(tiles[index])[0]
                image_embeds.flags.writeable = False
                tile = TileEmbedding(tile_key, image_embeds)
                encoded += 1
                self._add(tile, pixels, place)
            found.append(tile)
            if on_tile:
                on_tile()
        with self._lock:
            self._pictures[key] = (tiles.rows, tiles.cols, tuple(tile.key for tile in found))
            _drop_oldest(self._pictures, _PICTURES)
        return EncodedImage(tiles.rows, tiles.cols, found, encoded)

    def _find(self, key: bytes, pixels: Pixels, place: Hashable) -> TileEmbedding | None:
        with self._lock:
            if key not in self._tiles and self._tolerance > 0:
                before, key = self._places.get(place, (None, key))
                if before is None or not _is_near(before, pixels, self._tolerance):
                    return None
            if key not in self._tiles:
                return None
            self._tiles.move_to_end(key)
            return self._tiles[key]

    def _add(self, tile: TileEmbedding, pixels: Pixels, place: Hashable) -> None:
        with self._lock:
            if tile.key not in self._tiles:
                self._bytes += tile.image_embeds.nbytes
            self._tiles[tile.key] = tile
            while self._bytes > self._limit and self._tiles:
                self._bytes -= self._tiles.popitem(last=False)[1].image_embeds.nbytes
            if self._tolerance > 0:
                self._places[place] = (pixels.copy(), tile.key)
                self._places.move_to_end(place)
                _drop_oldest(self._places, _PLACES)


def _is_near(before: Pixels, now: Pixels, tolerance: float) -> bool:
    """Tell whether two tiles' mean absolute difference, in levels, is within the tolerance."""
    return before.shape == now.shape and float(np.abs(before.astype(np.int16) - now).mean()) <= tolerance


def _drop_oldest(entries: OrderedDict[Any, Any], limit: int) -> None:
    while len(entries) > limit:
        entries.popitem(last=False)
