"""LRU cache of the vision encoder's outputs, keyed by the content of views."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np

from edgevlm.families.base import RGB, Arrays, View, Visual
from edgevlm.inputs.image import content_digest

_PLACES, _PICTURES = 64, 256
"""Views kept for comparison within a tolerance, and pictures whose views are remembered by name."""


@dataclass(frozen=True)
class EncodedView:
    """What the vision encoder makes of one view."""

    key: Hashable
    """Names the view's content: equal keys, equal outputs."""
    outputs: Arrays
    """`(tokens, ...)` by name, read-only."""

    @property
    def nbytes(self) -> int:
        """Bytes of all outputs."""
        return sum(each.nbytes for each in self.outputs.values())


@dataclass(frozen=True)
class EncodedImage:
    """A picture as the language model reads it, but for the family's assembling of it."""

    layout: Hashable
    views: Sequence[EncodedView]
    encoded: int
    """How many of the views had to be encoded for this call; the others were known."""

    def __len__(self) -> int:
        return len(self.views)


@dataclass(frozen=True)
class PreprocessedImage:
    """A picture that has been through preprocessing, or one that is known by its key and needs none."""

    key: Hashable
    """Names its content, and how closely it is looked at for whom."""
    image: Visual | EncodedImage
    is_video: bool = False

    @property
    def layout(self) -> Hashable:
        """How its views make it up, in the family's own terms."""
        return self.image.layout


class VisionCache:
    """The encoder's outputs by content, the least recently used dropped beyond `limit_bytes`; shared by all threads.

    A view is known again when its pixels are equal; with `tolerance`, also when they differ from those last encoded
    at the same place of a picture of the same layout by at most that much on average (levels of 0 to 255): sensor noise
    of a fixed camera. The comparison is always with the pixels that were encoded, so that slow change is noticed.
    """

    def __init__(self, limit_bytes: int, tolerance: float = 0.0) -> None:
        self._limit, self._tolerance = limit_bytes, tolerance
        self._views: OrderedDict[Hashable, EncodedView] = OrderedDict()
        self._pictures: OrderedDict[Hashable, tuple[Hashable, tuple[Hashable, ...]]] = OrderedDict()
        self._places: OrderedDict[Hashable, tuple[RGB, Hashable]] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()

    def picture(self, key: Hashable) -> EncodedImage | None:
        """Return a whole picture, if all of its views are still known."""
        with self._lock:
            layout, keys = self._pictures.get(key, (None, ()))
            if not keys or any(each not in self._views for each in keys):
                return None
            self._pictures.move_to_end(key)
            for each in keys:
                self._views.move_to_end(each)
            return EncodedImage(layout, [self._views[each] for each in keys], 0)

    def encode(
        self, image: PreprocessedImage, encode: Callable[[Iterable[View]], Iterator[Arrays]], salt: str = ""
    ) -> Generator[int, None, EncodedImage]:
        """Yield how many of the picture's views are encoded so far; return the picture encoded.

        `encode` is called once, for those of the views that are not known under this salt; a view that occurs twice is
        encoded once.
        """
        if isinstance(image.image, EncodedImage):
            return image.image
        visual = image.image
        keys = [(salt, content_digest(view.pixels)) for view in visual.views]
        places = [(salt, visual.layout, index) for index in range(len(visual))]
        pixels = [view.pixels for view in visual.views]
        found = [self._find(*each) for each in zip(keys, pixels, places, strict=True)]
        views = {key: view for key, view in zip(keys, found, strict=True) if view}
        first = {key: index for index, key in reversed(list(enumerate(keys))) if key not in views}
        missing = sorted(first.values())
        done = len(visual) - len(missing)
        yield done
        for index, outputs in zip(missing, encode(visual.views[index] for index in missing), strict=True):
            for array in outputs.values():
                array.flags.writeable = False
            views[keys[index]] = EncodedView(keys[index], outputs)
            self._add(views[keys[index]], pixels[index], places[index])
            done += 1
            yield done
        encoded = [views[key] for key in keys]
        with self._lock:
            self._pictures[image.key] = (visual.layout, tuple(view.key for view in encoded))
            _drop_oldest(self._pictures, _PICTURES)
        return EncodedImage(visual.layout, encoded, len(missing))

    def _find(self, key: Hashable, pixels: RGB, place: Hashable) -> EncodedView | None:
        with self._lock:
            if key not in self._views and self._tolerance > 0:
                before, key = self._places.get(place, (None, key))
                if before is None or not _is_near(before, pixels, self._tolerance):
                    return None
            if key not in self._views:
                return None
            self._views.move_to_end(key)
            return self._views[key]

    def _add(self, view: EncodedView, pixels: RGB, place: Hashable) -> None:
        with self._lock:
            if view.key not in self._views:
                self._bytes += view.nbytes
            self._views[view.key] = view
            while self._bytes > self._limit and self._views:
                self._bytes -= self._views.popitem(last=False)[1].nbytes
            if self._tolerance > 0:
                self._places[place] = (pixels.copy(), view.key)
                self._places.move_to_end(place)
                _drop_oldest(self._places, _PLACES)


def _is_near(before: RGB, now: RGB, tolerance: float) -> bool:
    """Tell whether two views' mean absolute difference, in levels, is within the tolerance."""
    return before.shape == now.shape and float(np.abs(before.astype(np.int16) - now).mean()) <= tolerance


def _drop_oldest(entries: OrderedDict[Any, Any], limit: int) -> None:
    while len(entries) > limit:
        entries.popitem(last=False)
