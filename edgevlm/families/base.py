"""What a family is at run time: one architecture's preprocessing and prompt rules. NumPy and Pillow only, no OpenVINO.

A picture becomes a `Visual`: views, each of them one call of the vision encoder, and a layout, which only the family
reads. The encoder's outputs for the views are assembled to features, one row for each image token of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edgevlm.errors import OptionError

RGB: TypeAlias = npt.NDArray[np.uint8]
Array: TypeAlias = npt.NDArray[Any]
Arrays: TypeAlias = Mapping[str, Array]
Detail: TypeAlias = Literal["low", "high", "auto"]
PIXEL_VALUES, IMAGE_EMBEDS = "pixel_values", "image_embeds"
MAX_PIXELS = 100_000_000
"""A larger picture is refused before it is decoded: RGB at 100 megapixels takes 300 MB."""


DETAILS = ("auto", "low", "high")


@dataclass(frozen=True)
class ImageBudget:
    """How closely each picture of a prompt is looked at; it means the same for every family."""

    detail: Detail = "auto"
    """`low`: as few image tokens as the family can do with; `auto`: as many as the picture has the pixels for; `high`:
    what the checkpoint's own processor does, which may enlarge the picture."""
    max_image_tokens: int | None = None
    """At most this many image tokens for each picture."""
    max_views: int | None = None
    """At most this many calls of the vision encoder for each picture."""

    def __post_init__(self) -> None:
        if self.detail not in DETAILS:
            raise OptionError(f"detail must be one of {', '.join(DETAILS)}, not {self.detail!r}")
        for name in ("max_image_tokens", "max_views"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} must be at least 1, not {value}")

    def check(self, least: int) -> None:
        """Raise `OptionError` if a picture cannot be had for so few image tokens as `max_image_tokens`."""
        if self.max_image_tokens is not None and self.max_image_tokens < least:
            raise OptionError(
                f"max_image_tokens is {self.max_image_tokens}, but a picture takes this model {least} image tokens or"
                f" more; allow at least {least}"
            )


@dataclass(frozen=True)
class View:
    """One call of the vision encoder: a tile, a thumbnail, or a whole picture."""

    pixels: npt.NDArray[np.uint8]
    """`(H, W, 3)`: what the vision cache knows it by."""
    inputs: Callable[[], Arrays]
    """Makes the encoder's inputs, a batch of one, by the graph's names; called only where the view is not cached."""


class LaidOut(Protocol):
    """A picture that has been through preprocessing, encoded or not."""

    @property
    def layout(self) -> Hashable:
        """How its views make it up."""
        ...


@dataclass(frozen=True)
class Visual:
    """A picture after preprocessing."""

    views: Sequence[View]
    layout: Hashable
    """How the views make up the picture, in the family's own terms, such as rows and columns of tiles."""

    def __len__(self) -> int:
        return len(self.views)


@dataclass(frozen=True)
class LanguageInputs:
    """What the decoder reads of a prompt of n tokens, beside `inputs_embeds`."""

    positions: npt.NDArray[np.int64]
    """`(axes, n)`: one axis, or three for M-RoPE."""
    extras: Arrays = field(default_factory=dict)
    """`(n, ...)` by the graph's names, such as token types or features for deeper layers; zero for what follows."""

    def after(self, start: int) -> LanguageInputs:
        """Return what is left after the first `start` tokens."""
        extras = {name: array[start:] for name, array in self.extras.items()}
        return LanguageInputs(self.positions[:, start:], extras)


@dataclass(frozen=True)
class DecoderTraits:
    """What reuse of a KV cache has to respect; the exporter writes it into the manifest."""

    position_axes: int = 1
    atomic_images: bool = False
    """Image tokens attend to each other both ways: an image is reused whole or not at all."""
    rewindable: bool = True
    """False for a state that can be continued and not cut, such as a convolution's."""


class Family:
    """One architecture's rules; the defaults fit those of one position axis whose features are the views' in a row."""

    placeholder: str
    """What the chat template writes for a picture."""
    other_placeholders: tuple[str, ...] = ()
    """What older templates write instead: the first that one holds counts, where it does not hold `placeholder`."""
    image_token_id: int
    """Its places in the prompt take the features."""
    tokens_per_view: int
    """Image tokens of a view, for a family whose views have as many each."""
    view_size: tuple[int, int] | None = None
    """Height and width of every view, for which the encoder is compiled; None where they differ."""
    constants: Arrays = MappingProxyType({})
    """Inputs of the encoder that are the same for every view."""

    def budget_for(self, budget: ImageBudget, images: int) -> ImageBudget:  # noqa: ARG002
        """Return the budget of each picture of a prompt that has `images` of them."""
        return budget

    def preprocess(self, image: RGB, budget: ImageBudget) -> Visual:
        """Return the views of `image` `(H, W, 3)`. Raises `OptionError` for a budget that allows not even one."""
        raise NotImplementedError

    def max_views(self, budget: ImageBudget) -> int | None:
        """Return how many views a picture may have, for a family whose views have `tokens_per_view` each.

        None is no bound. Raises `OptionError` for a budget of less than one view.
        """
        if budget.max_image_tokens is None:
            return budget.max_views
        budget.check(self.tokens_per_view)
        views = budget.max_image_tokens // self.tokens_per_view
        return views if budget.max_views is None else min(views, budget.max_views)

    def image_text(self, layout: Hashable) -> str:
        """Return the text that takes the place of one placeholder in the rendered prompt, image tokens written out."""
        raise NotImplementedError

    def block_text(self) -> str:
        """Return a text that holds all that image blocks are made of."""
        raise NotImplementedError

    def assemble(self, layout: Hashable, outputs: Sequence[Arrays]) -> dict[str, Array]:  # noqa: ARG002
        """Join the encoder's outputs `(rows, ...)` for each view to the picture's features `(n, ...)`, by name."""
        return {name: np.concatenate([each[name] for each in outputs]) for name in outputs[0]}

    def language_inputs(
        self,
        ids: npt.NDArray[np.int64],
        layouts: Sequence[Hashable],  # noqa: ARG002
        features: Sequence[Arrays],  # noqa: ARG002
    ) -> LanguageInputs:
        """Return positions and extra inputs of a prompt, its pictures in order."""
        return LanguageInputs(np.arange(len(ids), dtype=np.int64)[None])
