"""What the runtime asks of a family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edgevlm.image import RGB

Detail: TypeAlias = Literal["low", "high", "auto"]


@dataclass(frozen=True)
class Tiles:
    """One preprocessed picture: `rows` x `cols` tiles (0 x 0 when not split), then the global view."""

    pixel_values: npt.NDArray[np.float32]  # (T, 3, H, W)
    rows: int
    cols: int

    def __len__(self) -> int:
        return len(self.pixel_values)


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

    def image_text(self, tiles: Tiles) -> str:
        """Return the text that takes the place of one image placeholder in the rendered prompt."""
        ...

    def vision_inputs(self) -> dict[str, npt.NDArray[Any]]:
        """Return every input of the vision part for one tile, `pixel_values` excepted: they never change."""
        ...
