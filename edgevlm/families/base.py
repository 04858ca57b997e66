"""What the runtime asks of a family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edgevlm.image import RGB

Detail: TypeAlias = Literal["low", "high", "auto"]


class Grid(Protocol):
    """How a picture was split: `rows` x `cols` tiles, 0 x 0 when it was not."""

    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...


@dataclass(frozen=True)
class Tiles:
    """One preprocessed picture: `rows` x `cols` tiles (0 x 0 when not split), then the global view."""

    pixels: npt.NDArray[np.uint8]  # (T, H, W, 3)
    lookup: npt.NDArray[np.float32]  # (3, 256): what each channel's values are normalised to
    rows: int
    cols: int

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> npt.NDArray[np.float32]:
        """Return one tile's `pixel_values` `(1, 3, H, W)`; a whole picture's are large, and seldom needed at once."""
        return np.stack([self.lookup[channel][self.pixels[index, ..., channel]] for channel in range(3)])[None]

    @property
    def pixel_values(self) -> npt.NDArray[np.float32]:
        """All tiles' `pixel_values` `(T, 3, H, W)`."""
        return np.concatenate([self[index] for index in range(len(self))])


class Family(Protocol):
    """One architecture family's preprocessing and prompt rules."""

    image_token: str
    image_token_id: int
    tokens_per_tile: int
    tile_size: tuple[int, int]
    """Height and width of a tile in pixels."""

    def preprocess(self, image: RGB, detail: Detail, max_tiles: int | None) -> Tiles:
        """Return the tiles of `image`; `max_tiles` bounds their number, the global view included."""
        ...

    def image_text(self, grid: Grid) -> str:
        """Return the text that takes the place of one image placeholder in the rendered prompt."""
        ...

    def vision_inputs(self) -> dict[str, npt.NDArray[Any]]:
        """Return every input of the vision part for one tile, `pixel_values` excepted: they never change."""
        ...
