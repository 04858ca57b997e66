"""Samples: a pair as views, token ids, and inputs of encoder and decoder, for calibration and verification alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgevlm.families.base import (
    IMAGE_EMBEDS,
    PIXEL_VALUES,
    SLIDING_CACHE_START,
    Array,
    Arrays,
    Family,
    ImageBudget,
    LanguageInputs,
    View,
    Visual,
)
from edgevlm.inputs.messages import user_message
from edgevlm.inputs.processor import Processor
from edgevlm.inputs.prompt import join, merge
from edgevlm.runtime.loader import ModelLoader
from edgevlm_export.calibration import VISION_PIXELS, VISION_TILES, VISION_WIDTH, Pair, load_pairs, with_questions

DECODER_INPUTS = ("inputs_embeds", "attention_mask", "position_ids", SLIDING_CACHE_START)
"""Inputs of decoders that are no family's own."""


@dataclass(frozen=True)
class Sample:
    """A prompt and its answer as token ids, with its pictures."""

    ids: Array  # (n,)
    prompt: int
    """How many of the ids are the prompt's."""
    visuals: Sequence[Visual]

    @property
    def views(self) -> list[View]:
        """The views of all pictures."""
        return [view for visual in self.visuals for view in visual.views]


def make_sample(processor: Processor, pair: Pair) -> Sample:
    """Return a pair's prompt and answer, its picture at `detail="low"`."""
    visuals = processor.preprocess([pair.image] if pair.image else [], ImageBudget("low"))
    prompt = processor.prompt_ids([user_message(pair.question, len(visuals))], visuals)
    answer = processor.tokenizer.encode(pair.answer, add_special_tokens=False) if pair.answer else []
    return Sample(np.asarray(prompt + answer, np.int64), len(prompt), visuals)


def encoder_inputs(family: Family, view: View) -> dict[str, Array]:
    """Return the vision submodel's inputs for one view."""
    return {**view.inputs(), **family.constants}


def decoder_inputs(
    family: Family, ids: Array, visuals: Sequence[Visual], inputs_embeds: Array, encoded: Sequence[Arrays]
) -> dict[str, Array]:
    """Return the language model's inputs for a text, of its embeddings `(1, n, D)` and its views' encoding in order."""
    ends = np.cumsum([len(visual) for visual in visuals])
    features = [
        family.assemble(visual.layout, encoded[end - len(visual) : end])
        for visual, end in zip(visuals, ends, strict=True)
    ]
    image_embeds = join([each[IMAGE_EMBEDS] for each in features], inputs_embeds.shape[-1])
    inputs = family.language_inputs(ids, [visual.layout for visual in visuals], features)
    return {
        "inputs_embeds": merge(inputs_embeds.copy(), family.image_rows(ids), image_embeds),
        "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": inputs.positions if len(inputs.positions) == 1 else inputs.positions[:, None],
        **{name: array[None] for name, array in inputs.extras.items()},
    }


def prompt_inputs(inputs: Arrays) -> LanguageInputs | None:
    """Return positions and extra inputs of `decoder_inputs`, None where they are those of any text."""
    positions = inputs["position_ids"]
    extras = {name: array[0] for name, array in inputs.items() if name not in DECODER_INPUTS}
    if positions.ndim == 2 and not extras:
        return None
    return LanguageInputs(positions if positions.ndim == 2 else positions[:, 0], extras)


def pixel_values(views: Sequence[View]) -> Array:
    """Return the `pixel_values` `(T, 3, H, W)` of views of one size."""
    return np.concatenate([view.inputs()[PIXEL_VALUES] for view in views])


def pixel_views(values: Array, others: Arrays | None = None) -> list[View]:
    """Return views that give these `pixel_values` `(T, 3, H, W)`, and what `others` `(T, ...)` hold by name."""
    nothing, arrays = np.empty((0, 0, 3), np.uint8), {PIXEL_VALUES: values, **(others or {})}
    inputs = [{name: array[number, None] for name, array in arrays.items()} for number in range(len(values))]
    return [View(nothing, lambda each=each: each) for each in inputs]  # type: ignore[misc]


def other_inputs(views: Sequence[View]) -> dict[str, Array]:
    """Return what views of one size need beside their `pixel_values`, `(T, ...)` by name."""
    inputs = [view.inputs() for view in views]
    return {name: np.concatenate([each[name] for each in inputs]) for name in inputs[0] if name != PIXEL_VALUES}


def vision_samples(processor: Processor, pairs: Sequence[Pair], hidden_size: int) -> list[dict[str, Array]]:
    """Return the vision submodel's inputs for views taken evenly from the pairs' pictures, or the shipped ones.

    `hidden_size` is that of the model.
    """
    pictures = [pair.image for pair in pairs if pair.image] or [pair.image for pair in load_pairs() if pair.image]
    visuals = [processor.preprocess([picture], ImageBudget("auto"))[0] for picture in pictures]
    views = [view for visual in visuals for view in visual.views]
    height, width, _ = views[0].pixels.shape
    pixels = VISION_PIXELS * max(1.0, VISION_WIDTH / hidden_size)
    limit = max(VISION_TILES, int(pixels) // (height * width))
    return [encoder_inputs(processor.family, view) for view in views[:: -(-len(views) // limit)]]


def language_samples(processor: Processor, loader: ModelLoader, pairs: Sequence[Pair]) -> list[dict[str, Array]]:
    """Return the language model's inputs for every pair, prompt and answer in one sequence."""
    vision, embeddings = loader.vision(processor.family), loader.text_embeddings()
    samples = [make_sample(processor, pair) for pair in with_questions(pairs)]
    return [
        decoder_inputs(
            processor.family, each.ids, each.visuals, embeddings.embed(each.ids), list(vision.encode(each.views))
        )
        | {"beam_idx": np.zeros(1, np.int32)}
        for each in samples
    ]
