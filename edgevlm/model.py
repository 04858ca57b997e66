"""An exported folder, ready to answer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from edgevlm.chat import Message, user_message
from edgevlm.device import RuntimeConfig, resolve_device
from edgevlm.errors import DeviceError, PromptError
from edgevlm.families import Tiles
from edgevlm.generate import Answer, GenerationConfig, Piece, Progress, Prompt, stream_answer
from edgevlm.image import ImageInput
from edgevlm.language_model import Session
from edgevlm.manifest import check_files, load_manifest
from edgevlm.metrics import Stopwatch
from edgevlm.parts import PartLoader
from edgevlm.paths import DEFAULT_NOTICE, find_model
from edgevlm.processor import Processor

_LOG = logging.getLogger(__name__)
Images: TypeAlias = "ImageInput | Sequence[ImageInput] | None"


class VLM:
    """A vision-language model that answers questions about pictures.

    `model` is an exported folder or a short name under edgevlm's models folder; None means the bundled model, which
    is for displays, gauges, lights, labels, parts and simple charts, and says so once through `logging`.
    Safe to use from several threads: each answer has its own state. Raises `ModelError` and `DeviceError`.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, config: RuntimeConfig | None = None) -> None:
        started = perf_counter()
        if model is None:
            _LOG.warning(DEFAULT_NOTICE)
        self.folder = find_model(model)
        self.config = config or RuntimeConfig()
        self.manifest = load_manifest(self.folder)
        check_files(self.folder, self.manifest)
        self.processor = Processor(self.folder, self.manifest)
        self.device = resolve_device(self.config.device)
        try:
            self._load()
        except DeviceError:
            if self.config.device.upper() != "AUTO" or self.device == "CPU":
                raise
            self.device = "CPU"
            self._load()
        self.load_s = perf_counter() - started

    def _load(self) -> None:
        loader = PartLoader(self.folder, self.manifest, self.config, self.device)
        self.vision = loader.vision(self.processor.family)
        self.language_model = loader.language_model()

    def generate(
        self,
        images: Images,
        question: str,
        config: GenerationConfig | None = None,
        on_progress: Progress | None = None,
    ) -> Answer:
        """Return the whole answer to `question` about `images`: one, several, or none. Errors as in `stream`."""
        *_, last = self.stream(images, question, config, on_progress)
        assert last.answer is not None
        return last.answer

    def stream(
        self,
        images: Images,
        question: str,
        config: GenerationConfig | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[Piece]:
        """Yield the answer piece by piece, never splitting a character; the last piece carries the `Answer`.

        Raises `ImageError` and `PromptError`.
        """
        config = config or GenerationConfig()
        pictures = _as_list(images)
        image_token = self.processor.family.image_token
        if image_token in question:
            raise PromptError(f"the question may not contain {image_token}, which stands for a picture")
        watch = Stopwatch()
        session = self.language_model.session()
        prompt = self.prepare([user_message(question, len(pictures))], pictures, config, session, watch, on_progress)
        yield from stream_answer(
            session,
            prompt,
            config,
            tokenizer=self.processor.tokenizer,
            eos_token_ids=self.manifest.eos_token_ids,
            context_length=self.manifest.context_length,
            watch=watch,
            load_s=self.load_s,
        )

    def prepare(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageInput],
        config: GenerationConfig,
        session: Session,
        watch: Stopwatch,
        on_progress: Progress | None = None,
    ) -> Prompt:
        """Turn a conversation and its pictures into the embeddings that the language model reads."""
        with watch.stage("preprocess"):
            tiles = self.processor.preprocess(images, config)
            ids = self.processor.prompt_ids(messages, tiles)
        self._check_length(len(ids))
        with watch.stage("vision"):
            image_embeds = self._encode(tiles, on_progress)
        inputs_embeds = merge(session.embed(ids), np.asarray(ids), self.processor.family.image_token_id, image_embeds)
        return Prompt(inputs_embeds, image_tokens=len(image_embeds), tiles=sum(map(len, tiles)))

    def _check_length(self, length: int) -> None:
        limit = self.manifest.context_length
        if length >= limit:
            raise PromptError(
                f"the prompt has {length:,} tokens and the model's context holds {limit:,};"
                " shorten the question, or use fewer pictures, max_tiles or a lower detail"
            )

    def _encode(self, tiles: Sequence[Tiles], on_progress: Progress | None) -> npt.NDArray[np.float32]:
        """Return all pictures' embeddings in prompt order, `(tokens, hidden)`."""
        total, done = sum(map(len, tiles)), 0

        def on_tile() -> None:
            nonlocal done
            done += 1
            if on_progress:
                on_progress("vision", done, total)

        if on_progress and total:
            on_progress("vision", 0, total)
        hidden = self.manifest.hidden_size
        embeds = [self.vision.encode(each, on_tile).reshape(-1, hidden) for each in tiles]
        return np.concatenate([np.empty((0, hidden), np.float32), *embeds])


def merge(
    inputs_embeds: npt.NDArray[np.float32],
    ids: npt.NDArray[np.int64],
    image_token_id: int,
    image_embeds: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """Put `image_embeds` `(n, hidden)` into `inputs_embeds` `(1, S, hidden)` at the n places of the image token."""
    places = ids == image_token_id
    if places.sum() != len(image_embeds):
        raise PromptError(f"the prompt has {places.sum()} image tokens for {len(image_embeds)} image embeddings")
    inputs_embeds[0, places] = image_embeds
    return inputs_embeds


def _as_list(images: Images) -> list[ImageInput]:
    if images is None:
        return []
    if isinstance(images, str | os.PathLike | bytes | Image.Image | np.ndarray):
        return [images]
    return list(images)
