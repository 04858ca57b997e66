"""An exported folder, ready to answer."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any

import numpy as np

from edgevlm.answer import Answer, Piece
from edgevlm.chat import Chat
from edgevlm.decoding.config import GenerationConfig
from edgevlm.decoding.scoring import Scores, log_likelihoods
from edgevlm.decoding.stream import Progress, collect, stream_answer
from edgevlm.decoding.structured import GrammarTokenizer, check_choices
from edgevlm.errors import ContextLengthError, DeviceError
from edgevlm.families.base import IMAGE_EMBEDS, Visual
from edgevlm.inputs.chat_template import Message, user_message
from edgevlm.inputs.image import ImageInput, Images, as_list, load_image
from edgevlm.inputs.processor import Processor
from edgevlm.inputs.prompt import Prompt, feature_keys, image_places, join, merge, prefix_keys
from edgevlm.inputs.vision_cache import EncodedImage, VisionCache, content_key
from edgevlm.manifest import check_files, load_manifest
from edgevlm.metrics import Stopwatch
from edgevlm.model_store import DEFAULT_NOTICE, find_model
from edgevlm.runtime.config import RuntimeConfig
from edgevlm.runtime.core import first_line, resolve_device
from edgevlm.runtime.kv_pool import SessionPool
from edgevlm.runtime.kv_session import Session
from edgevlm.runtime.loader import ModelLoader

logger = logging.getLogger(__name__)


class VLM:
    """A vision-language model that answers questions about pictures.

    `model` is an exported folder or a short name under edgevlm's models folder; None means the bundled model, which
    is for displays, gauges, lights, labels, parts and simple charts, and says so once through `logging`.
    Safe to use from several threads: each answer has its own state. Raises `ModelError` and `DeviceError`.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, config: RuntimeConfig | None = None) -> None:
        started = perf_counter()
        if model is None:
            logger.warning(DEFAULT_NOTICE)
        self.folder = find_model(model)
        self.config = config or RuntimeConfig()
        self.manifest = load_manifest(self.folder)
        check_files(self.folder, self.manifest)
        self.processor = Processor(self.folder, self.manifest)
        self.grammar_tokenizer = GrammarTokenizer(
            self.processor.tokenizer, self.manifest.vocab_size, self.manifest.eos_token_ids
        )
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
        loader = ModelLoader(self.folder, self.manifest, self.config, self.device)
        with ThreadPoolExecutor(1) as pool:  # reading and compiling a part keeps one core busy
            vision = pool.submit(loader.vision, self.processor.family)
            self.language_model = loader.language_model()
            try:
                self.language_model.warm_up()
            except RuntimeError as error:  # what a device has compiled it may still not run
                raise DeviceError(f"{self.device} cannot run this model: {first_line(error)}") from None
            self.vision = vision.result()
        self._vision_cache = VisionCache(self.config.image_cache_bytes, self.config.tile_tolerance)
        self._sessions = SessionPool(self.language_model.session, self.config.kept_sessions)

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have."""
        return self.manifest.context_length

    def generate(
        self,
        images: Images,
        question: str,
        config: GenerationConfig | None = None,
        on_progress: Progress | None = None,
        **options: Any,
    ) -> Answer:
        """Return the whole answer to `question` about `images`: one, several, or none.

        `options` are fields of `GenerationConfig`, such as `max_new_tokens=16`, and win over `config`. Errors as in
        `stream`, and `IncompleteAnswerError` for an answer cut short of its constraint.
        """
        return collect(self.stream(images, question, config, on_progress, **options))

    def stream(
        self,
        images: Images,
        question: str,
        config: GenerationConfig | None = None,
        on_progress: Progress | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """Yield the answer piece by piece, never splitting a character; the last piece carries the `Answer`.

        `options` as in `generate`. An answer cut short of its constraint is not an error here: its `satisfied` is
        False. Raises `ImageError`, `PromptError`, and `OptionError` for an unknown option and for a constraint that the
        model's tokens cannot follow.
        """
        config = (config or GenerationConfig()).override(options)
        pictures = as_list(images)
        yield from self.stream_messages([user_message(question, len(pictures))], pictures, config, on_progress)

    def stream_messages(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageInput],
        config: GenerationConfig | None = None,
        on_progress: Progress | None = None,
    ) -> Iterator[Piece]:
        """Yield the answer to a conversation whose image placeholders stand for `images`, in order; as `stream`."""
        config = config or GenerationConfig()
        watch = Stopwatch()
        prompt = self.prepare(messages, images, config, watch, on_progress)
        with self.session(prompt) as session:
            yield from stream_answer(
                session,
                prompt,
                config,
                tokenizer=self.processor.tokenizer,
                grammar_tokenizer=self.grammar_tokenizer,
                lead=self.processor.template.response_prefix(config.chat_template_kwargs) if config.constraint else "",
                eos_token_ids=self.manifest.eos_token_ids,
                context_length=self.context_length,
                watch=watch,
                load_s=self.load_s,
                on_progress=on_progress,
            )

    def score(
        self,
        images: Images,
        question: str,
        choices: Sequence[str],
        config: GenerationConfig | None = None,
        on_progress: Progress | None = None,
    ) -> Scores:
        """Return how likely the model is to answer `question` with each of the choices; see `Scores` for the formula.

        Of `config` only what concerns the pictures counts. Raises `ImageError`, `PromptError`, `OptionError` for
        choices that are empty or alike, and `DeviceError` where the logits overflow.
        """
        check_choices(choices)
        config = config or GenerationConfig()
        watch = Stopwatch()
        pictures = as_list(images)
        prompt = self.prepare([user_message(question, len(pictures))], pictures, config, watch, on_progress)
        lead = self.processor.template.response_prefix(config.chat_template_kwargs)
        answers = [self.grammar_tokenizer.encode(lead + choice) for choice in choices]
        self._check_length(len(prompt) + max(map(len, answers)))
        with self.session(prompt) as session:
            found = log_likelihoods(session, prompt, answers, self.manifest.eos_token_ids, watch)
        return Scores(
            dict(zip(choices, found, strict=True)),
            prompt_tokens=len(prompt),
            image_tokens=prompt.image_tokens,
            tiles=prompt.tiles,
            cached_tokens=watch.counts["cached_tokens"],
            cached_tiles=prompt.cached_tiles,
            timings=watch.timings(self.load_s, 0),
        )

    def session(self, prompt: Prompt) -> AbstractContextManager[Session]:
        """Lend the session that holds most of the prompt's beginning in its KV cache."""
        return self._sessions.take(prompt.prefix_keys)

    def chat(self, config: GenerationConfig | None = None, system: str | None = None, **options: Any) -> Chat:
        """Return a new conversation; `options` as in `generate`. The model is told `system` before the first turn."""
        return Chat(self, (config or GenerationConfig()).override(options), system)

    def count_tokens(
        self, messages: Sequence[Message], images: Sequence[ImageInput], config: GenerationConfig | None = None
    ) -> int:
        """Return how many tokens the prompt of a conversation has. Raises `ImageError` and `PromptError`."""
        config = config or GenerationConfig()
        shown = [each for _, each in self._preprocess(images, config)]
        return len(self.processor.prompt_ids(messages, shown, config.chat_template_kwargs))

    def prepare(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageInput],
        config: GenerationConfig,
        watch: Stopwatch,
        on_progress: Progress | None = None,
    ) -> Prompt:
        """Turn a conversation and its pictures into the embeddings that the language model reads."""
        family = self.processor.family
        with watch.stage("preprocess"):
            visuals = self._preprocess(images, config)
            shown = [each for _, each in visuals]
            ids = np.asarray(self.processor.prompt_ids(messages, shown, config.chat_template_kwargs), np.int64)
        self.processor.check_known(ids)
        self._check_length(len(ids))
        with watch.stage("vision"):
            pictures = self._encode(visuals, config.cache_salt, on_progress)
        features = [family.assemble(each.layout, [view.outputs for view in each.views]) for each in pictures]
        image_embeds = join([each[IMAGE_EMBEDS] for each in features], self.manifest.hidden_size)
        inputs = family.language_inputs(ids, [each.layout for each in pictures], features)
        rows = [key for pair in zip(pictures, features, strict=True) for key in feature_keys(*pair)]
        return Prompt(
            merge(self.language_model.embed(ids), ids, family.image_token_id, image_embeds),
            ids=ids.tolist(),
            prefix_keys=prefix_keys(ids, family.image_token_id, rows, config.cache_salt),
            inputs=inputs,
            images=image_places(ids, family.image_token_id, [len(each[IMAGE_EMBEDS]) for each in features]),
            image_tokens=len(image_embeds),
            tiles=sum(map(len, pictures)),
            cached_tiles=sum(len(each) - each.encoded for each in pictures),
        )

    def _check_length(self, length: int) -> None:
        limit = self.context_length
        if length >= limit:
            raise ContextLengthError(
                f"the prompt has {length:,} tokens and the model's context holds {limit:,};"
                " shorten the question, or use fewer pictures, max_tiles or a lower detail"
            )

    def _preprocess(
        self, images: Sequence[ImageInput], config: GenerationConfig
    ) -> list[tuple[bytes, Visual | EncodedImage]]:
        """Return each picture's key and its views, or their encoding if it has been looked at before."""
        family, found = self.processor.family, list[tuple[bytes, Visual | EncodedImage]]()
        detail = family.detail_for(config.detail, len(images))
        for image in images:
            pixels = load_image(image)
            key = content_key(pixels, detail, config.max_tiles, config.cache_salt)
            known = self._vision_cache.picture(key)
            found.append((key, known or family.preprocess(pixels, detail, config.max_tiles)))
        return found

    def _encode(
        self, visuals: Sequence[tuple[bytes, Visual | EncodedImage]], salt: str, on_progress: Progress | None
    ) -> list[EncodedImage]:
        """Return the pictures encoded, calling the vision encoder only for views that are not cached."""
        total, done = sum(len(each) for _, each in visuals if isinstance(each, Visual)), 0

        def on_view() -> None:
            nonlocal done
            done += 1
            if on_progress:
                on_progress("vision", done, total)

        if on_progress and total:
            on_progress("vision", 0, total)
        cache, encode = self._vision_cache, self.vision.encode
        return [
            cache.encode(key, each, encode, on_view, salt) if isinstance(each, Visual) else each
            for key, each in visuals
        ]
