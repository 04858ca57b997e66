"""The run-time interface of a family: one architecture's preprocessing and prompt rules, without OpenVINO.

A picture becomes a `Visual`: views, each of them one call of the vision encoder, and a layout, which only the family
reads. The encoder's outputs for the views are assembled to features, one row for each image token of the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edgevlm.errors import OptionError
from edgevlm.families.grounding import Grounding

RGB: TypeAlias = npt.NDArray[np.uint8]
Array: TypeAlias = npt.NDArray[Any]
Arrays: TypeAlias = Mapping[str, Array]
Detail: TypeAlias = Literal["low", "high", "auto"]
PIXEL_VALUES, IMAGE_EMBEDS = "pixel_values", "image_embeds"
IMAGE_GROUPS = "image_group_ids"
"""Input of a decoder whose image tokens attend to each other: the view of each, counted from 1, and 0 for text."""
PER_LAYER_IDS = "per_layer_token_ids"
"""Input of a decoder whose layers have tables of token embeddings of their own; at image tokens that of padding."""
SLIDING_CACHE_START = "sliding_cache_start"
"""Input of a decoder whose layers have sliding windows, `(1,)`: how many of the first entries their KV cache lacks."""
MAX_PIXELS = 100_000_000
"""A larger picture is refused before it is decoded: RGB at 100 megapixels takes 300 MB."""


DETAILS = ("auto", "low", "high")


@dataclass(frozen=True)
class ImageBudget:
    """Detail and cost of each picture of a prompt; it means the same for every family."""

    detail: Detail = "auto"
    """`low`: the fewest image tokens of the family, or at most 256 where a picture keeps its shape; `auto`: as many as
    the picture has pixels for; `high`: as the checkpoint's own processor, which may enlarge the picture."""
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
        """Raise `OptionError` if `max_image_tokens` is below `least`, the fewest image tokens of a picture."""
        if self.max_image_tokens is not None and self.max_image_tokens < least:
            raise OptionError(
                f"max_image_tokens is {self.max_image_tokens}, but a picture takes this model {least} image tokens or"
                f" more; allow at least {least}"
            )


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video are looked at; at most one of the two is given."""

    fps: float | None = None
    """This many for each second; None is the family's own rate."""
    frames: int | None = None
    """This many, evenly spread."""

    def __post_init__(self) -> None:
        if self.fps is not None and self.frames is not None:
            raise OptionError("fps and frames exclude each other; give one of them")
        if self.fps is not None and not (self.fps > 0 and math.isfinite(self.fps)):
            raise OptionError(f"fps must be a number above 0, not {self.fps}")
        if self.frames is not None and self.frames < 1:
            raise OptionError(f"frames must be at least 1, not {self.frames}")


@dataclass(frozen=True)
class Frames:
    """The frames of a video that are looked at."""

    pixels: Sequence[RGB]
    """Each `(H, W, 3)`, all of one size, which is that of the views."""
    times_s: Sequence[float]
    """When each is shown, in seconds from the beginning."""
    rate: float
    """How many of them there are for each second."""
    duration_s: float
    """Of the whole video."""


@dataclass(frozen=True)
class View:
    """One call of the vision encoder: a tile, a thumbnail, a whole picture, or a few frames of a video."""

    pixels: npt.NDArray[np.uint8]
    """`(H, W, 3)`, or `(T, H, W, 3)` for T frames; hashed by the vision cache."""
    inputs: Callable[[], Arrays]
    """Makes the encoder's inputs, a batch of one, by the graph's names; called only where the view is not cached."""


class LaidOut(Protocol):
    """A picture that has been through preprocessing, encoded or not."""

    @property
    def layout(self) -> Hashable:
        """The family's own description of how the views lie in the picture."""
        ...


@dataclass(frozen=True)
class Visual:
    """A picture after preprocessing."""

    views: Sequence[View]
    layout: Hashable
    """The family's own description of how the views lie in the picture, such as rows and columns of tiles."""

    def __len__(self) -> int:
        return len(self.views)


@dataclass(frozen=True)
class LanguageInputs:
    """Inputs of the decoder for a prompt of n tokens, other than `inputs_embeds`."""

    positions: npt.NDArray[np.int64]
    """`(axes, n)`: one axis, or three for M-RoPE."""
    extras: Arrays = field(default_factory=dict)
    """`(n, ...)` by the graph's names, such as token types or features for deeper layers; zero for what follows."""

    def after(self, start: int) -> LanguageInputs:
        """Return what is left after the first `start` tokens."""
        return self.between(start, None)

    def between(self, start: int, stop: int | None) -> LanguageInputs:
        """Return those of the tokens `start` to `stop`, None being the end."""
        extras = {name: array[start:stop] for name, array in self.extras.items()}
        return LanguageInputs(self.positions[:, start:stop], extras)


@dataclass(frozen=True)
class DecoderTraits:
    """What prefix reuse and drafts must respect; the exporter writes it into the manifest."""

    position_axes: int = 1
    atomic_images: bool = False
    """Image tokens attend to each other both ways: an image is reused whole or not at all."""
    recurrent: bool = False
    """A state is made of itself, token after token: rounded to 16 bits it would drift, so a CPU computes in float32."""
    rewindable: bool = True
    """False for state that can be continued and not truncated, such as a convolution's."""
    fixed_states: bool = False
    """What cannot be truncated are states of a fixed size, which sessions copy at lengths that they may go back to."""
    sliding_window: int | None = None
    """Tokens that a token attends to in layers with a sliding window: no older ones need be in their KV cache."""
    sliding_layers: tuple[int, ...] = ()
    """Indexes of the layers whose KV cache that is."""


PAGE_PROMPTS = {
    "page": "Convert this page to Markdown. Keep the reading order, and write tables as Markdown tables.",
    "text": "Write down all text in this picture.",
    "table": "Convert this table to a Markdown table.",
    "formula": "Convert this formula to LaTeX.",
    "chart": "Convert this chart to a Markdown table.",
}
DOCTAGS_PROMPTS = {
    "page": "Convert this page to docling.",
    "text": "Convert this page to docling.",
    "table": "Convert this table to OTSL.",
    "formula": "Convert formula to LaTeX.",
    "chart": "Convert chart to table.",
    "code": "Convert code to text.",
}
"""The instructions of granite-docling's model card."""
DOCLANG_PROMPTS = {
    "page": "<doclang>",
    "text": "<doclang> [<ocr>]",
    "table": "<doclang> [<table>]",
    "formula": "<doclang> [<formula>]",
    "chart": "<doclang> [<chart>]",
    "code": "<doclang> [<code>]",
}
"""Those of granite-for-docling in transformers' documentation."""


class Family:
    """One architecture's rules; the defaults fit one position axis and features that are the views' rows in order."""

    placeholder: str
    """The chat template's placeholder of a picture."""
    other_placeholders: tuple[str, ...] = ()
    """Placeholders of older templates, tried in order where a template lacks `placeholder`."""
    image_token_id: int
    """The token whose positions take the image embeddings."""
    video_placeholder: str | None = None
    """The chat template's placeholder of a video; None for a family that takes none."""
    video_template: str | None = None
    """The chat template of prompts with videos, where it is not the checkpoint's own."""
    video_token_id: int | None = None
    """The token whose positions take the embeddings of a video; None if that is the image token."""
    tokens_per_view: int
    """Image tokens of a view, for a family whose views have equally many."""
    view_size: tuple[int, int] | None = None
    """Height and width of every view, for which the encoder is compiled; None where they differ."""
    constants: Arrays = MappingProxyType({})
    """Encoder inputs that are equal for every view, baked in at load."""
    page_prompts: Mapping[str, str] = MappingProxyType(PAGE_PROMPTS)
    """What the model is asked about a page for each task, where it answers in Markdown."""
    doctags_prompts: Mapping[str, str] = MappingProxyType(DOCTAGS_PROMPTS)
    """The same for a model whose answers are DocTags."""
    doclang_prompts: Mapping[str, str] = MappingProxyType(DOCLANG_PROMPTS)
    """The same for a model whose answers are DocLang."""
    grounding: Grounding | None = None
    """How the model writes places in a picture; None where no convention is known."""

    def budget_for(self, budget: ImageBudget, images: int) -> ImageBudget:  # noqa: ARG002
        """Return the budget of each picture of a prompt that has `images` of them."""
        return budget

    def page_picture(self, page: RGB, task: str) -> RGB:  # noqa: ARG002
        """Return what a model is shown of a page for one of the tasks above."""
        return page

    def preprocess(self, image: RGB, budget: ImageBudget) -> Visual:
        """Return the views of `image` `(H, W, 3)`. Raises `OptionError` for a budget that allows not even one."""
        raise NotImplementedError

    def resized(self, height: int, width: int, budget: ImageBudget) -> tuple[int, int]:
        """Return the height and width that a picture has for the encoder, where `grounding` counts its pixels."""
        raise NotImplementedError

    def sample_frames(self, total: int, rate: float, sampling: FrameSampling, budget: ImageBudget) -> Sequence[int]:
        """Return which of the `total` frames of a video are looked at, rising; `rate` is how many a second has."""
        raise NotImplementedError

    def frame_size(self, height: int, width: int, count: int, budget: ImageBudget) -> tuple[int, int]:
        """Return height and width that `count` frames of `height` x `width` are resized to. Raises `ImageError`."""
        raise NotImplementedError

    def resize_frame(self, image: RGB, size: tuple[int, int]) -> RGB:
        """Return a frame `(H, W, 3)` at `size`, height and width."""
        raise NotImplementedError

    def preprocess_video(self, frames: Frames) -> Visual:
        """Return the views of a video, one for each temporal patch."""
        raise NotImplementedError

    def is_video(self, layout: Hashable) -> bool:  # noqa: ARG002
        """Tell whether a layout is that of a video."""
        return False

    def image_rows(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return `(n,)`: which tokens of a prompt take embeddings of pictures and videos."""
        shown: npt.NDArray[np.bool_] = ids == self.image_token_id
        return shown if self.video_token_id is None else shown | (ids == self.video_token_id)

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
        """Return the text that replaces one placeholder in the rendered prompt, its image or video tokens included."""
        raise NotImplementedError

    def image_texts(self, layouts: Sequence[Hashable]) -> list[str]:
        """Return the text of each picture and video of a prompt, in order."""
        return [self.image_text(layout) for layout in layouts]

    def block_text(self) -> str:
        """Return a text with every special token that an image block may hold."""
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

    def deeper_features(self, ids: npt.NDArray[np.int64], features: Sequence[Arrays]) -> dict[str, Array]:
        """Return the encoder's outputs besides `image_embeds`, for deeper layers of the decoder, of a prompt.

        They are `(n, D)` by name, and zero at text.
        """
        shown = self.image_rows(ids)
        deeper: dict[str, Array] = {}
        for name in (name for name in (features[0] if features else {}) if name != IMAGE_EMBEDS):
            rows = np.concatenate([each[name] for each in features])
            deeper[name] = np.zeros((len(ids), *rows.shape[1:]), rows.dtype)
            deeper[name][shown] = rows
        return deeper
