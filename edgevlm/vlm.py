"""`VLM`: an exported model, loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from edgevlm.answer import Answer, Event, Piece, Progress, result_of
from edgevlm.calibration import load_calibration
from edgevlm.chat import Chat
from edgevlm.decoding.config import GenerationConfig, override
from edgevlm.decoding.prompt_lookup import MOST_QUESTIONS, EarlierAnswers
from edgevlm.decoding.scoring import YES_NO, LabelScores, Scores, check_temperature, log_likelihoods
from edgevlm.decoding.stream import Step, TextModel, check_satisfied, collect, stream_answer
from edgevlm.decoding.structured import GrammarTokenizer, check_choices, check_pair
from edgevlm.errors import ContextLengthError, DamagedModelError, DeviceError, ImageError
from edgevlm.families import Family, make_family
from edgevlm.families.base import IMAGE_EMBEDS, ImageBudget, Visual
from edgevlm.inputs.image import ImageInput, content_digest, load_picture
from edgevlm.inputs.messages import Message, about_label, user_message
from edgevlm.inputs.prompt import Prompt, feature_keys, image_places, join, merge, prefix_keys
from edgevlm.inputs.thinking import Opening
from edgevlm.inputs.video import Video, Visuals, as_visuals, kinds_of, load_frames
from edgevlm.inputs.vision_cache import EncodedImage, PreprocessedImage, VisionCache
from edgevlm.interrupt import checked
from edgevlm.manifest import check_files, load_manifest
from edgevlm.metrics import Stopwatch
from edgevlm.model_store import DEFAULT_NOTICE, find_model
from edgevlm.runtime.arithmetic import ChosenArithmetic
from edgevlm.runtime.config import RuntimeConfig
from edgevlm.runtime.core import resolve_device
from edgevlm.runtime.kv_pool import SessionPool
from edgevlm.runtime.kv_session import Session
from edgevlm.runtime.language_model import LanguageModel
from edgevlm.runtime.loader import ModelLoader, Submodels
from edgevlm.runtime.vision_encoder import VisionEncoder

if TYPE_CHECKING:
    from edgevlm.locations import Locations

T = TypeVar("T")
logger = logging.getLogger(__name__)


class VLM:
    """A vision-language model that answers questions about pictures.

    `model` is an exported folder or a short name under edgevlm's models folder; None means the bundled model, which
    is for displays, gauges, lights, labels, parts and simple charts, and says so once through `logging`.
    With `wait=False` it returns while the submodels still load, for a process that asks at once: pictures are encoded
    before the language model is loaded. What keeps a submodel from being loaded is raised where it is first needed.
    Safe to use from several threads: each answer has its own state. Raises `ModelError` and `DeviceError`.
    """

    def __init__(
        self, model: str | os.PathLike[str] | None = None, config: RuntimeConfig | None = None, *, wait: bool = True
    ) -> None:
        started = perf_counter()
        if model is None:
            logger.warning(DEFAULT_NOTICE)
        self.folder = find_model(model)
        self.config = config or RuntimeConfig()
        self.manifest = load_manifest(self.folder)
        check_files(self.folder, self.manifest)
        self.calibration = load_calibration(self.folder, self.manifest.fingerprint)
        family = make_family(self.manifest.family, self.manifest.family_config)
        self.device = resolve_device(self.config.device)
        self._submodels = self._load(family)
        from edgevlm.inputs.processor import Processor  # tokenizers and Jinja, imported while the submodels load

        try:
            self.processor = Processor(self.folder, self.manifest, family)
        except DamagedModelError:
            self._submodels.settle()
            raise
        self.grammar_tokenizer = GrammarTokenizer(
            self.processor.tokenizer, self.manifest.vocab_size, self.manifest.eos_token_ids
        )
        if self.config.device.upper() == "AUTO" and self.device != "CPU":  # a GPU that may not run the model
            try:
                self._submodels.wait()
            except DeviceError:
                self.device = "CPU"
                self._submodels = self._load(family)
        if wait:
            self._submodels.wait()
        self._vision_cache = VisionCache(self.config.image_cache_bytes, self.config.view_tolerance)
        self._sessions = SessionPool(self._submodels.session, self.config.kept_sessions)
        self._earlier_answers = EarlierAnswers(MOST_QUESTIONS if self.config.kept_sessions else 0)
        self.load_s = perf_counter() - started

    def _load(self, family: Family) -> Submodels:
        return Submodels(ModelLoader(self.folder, self.manifest, self.config, self.device), family)

    @property
    def vision(self) -> VisionEncoder:
        """The vision submodel; waits where it is still loading, and raises what kept it from being loaded."""
        return self._submodels.vision

    @property
    def language_model(self) -> LanguageModel:
        """The language model; waits where it is still loading, and raises what kept it from being loaded."""
        return self._submodels.language_model

    @property
    def vision_arithmetic(self) -> ChosenArithmetic:
        """What the vision encoder computes with on this machine, and why."""
        return self.vision.arithmetic

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have."""
        return self.manifest.context_length

    def generate(
        self,
        images: Visuals,
        question: str,
        config: GenerationConfig | None = None,
        image_budget: ImageBudget | None = None,
        *,
        cache_salt: str = "",
        **options: Any,
    ) -> Answer:
        """Return the whole answer to `question` about `images`, pictures or videos: one, several, or none.

        `options` are fields of `GenerationConfig` and `ImageBudget`, such as `max_new_tokens=16` and `detail="low"`,
        and win over both. What was computed under one `cache_salt` is not used under another, so that neither the time
        to the first token nor `cached_tokens` tells one caller what another has shown. Errors as in `stream`, and
        `IncompleteAnswerError` for an answer cut short of its constraint.
        """
        return collect(self.stream(images, question, config, image_budget, cache_salt=cache_salt, **options))

    def stream(
        self,
        images: Visuals,
        question: str,
        config: GenerationConfig | None = None,
        image_budget: ImageBudget | None = None,
        *,
        cache_salt: str = "",
        **options: Any,
    ) -> Generator[Piece, None, None]:
        """Yield the answer piece by piece, never splitting a character; the last piece carries the `Answer`.

        Arguments as in `generate`. An answer cut short of its constraint is not an error here: its `satisfied` is
        False. Raises `ImageError`, `PromptError`, and `OptionError` for an unknown option, for a budget that no picture
        fits, and for a constraint that the model's tokens cannot follow; `ThinkingError` for a model that cannot think.
        """
        config, image_budget = override(config, image_budget, options)
        pictures = as_visuals(images)
        messages = [user_message(question, kinds_of(pictures))]
        with closing(self.events(messages, pictures, config, image_budget, cache_salt)) as events:
            yield from (event for event in events if isinstance(event, Piece))

    def events(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageInput | Video | PreprocessedImage],
        config: GenerationConfig | None = None,
        image_budget: ImageBudget | None = None,
        cache_salt: str = "",
    ) -> Generator[Event, None, None]:
        """Yield the progress and the pieces of the answer to a conversation; closing this ends the answer.

        The placeholders of `messages`, parts of type `image` and `video`, stand for `images`, in order. There is a
        `Progress` for every view that is encoded and every token that is generated. Errors as in `stream`.
        """
        with closing(self.steps(messages, images, config, image_budget, cache_salt)) as events:
            yield from (event for event in events if not isinstance(event, Step))

    def steps(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageInput | Video | PreprocessedImage],
        config: GenerationConfig | None = None,
        image_budget: ImageBudget | None = None,
        cache_salt: str = "",
    ) -> Generator[Event | Step, None, None]:
        """Yield what `events` yields, and each step of the decoder before it is made.

        `make_together` makes the steps of several answers in one inference; one that nobody has made when the generator
        goes on is made alone.
        """
        config, watch = config or GenerationConfig(), Stopwatch()
        opening = self._opening(config)
        prompt = yield from self._prepare(messages, images, opening, watch, image_budget, cache_salt)
        model = TextModel(
            self.processor.tokenizer,
            self.grammar_tokenizer,
            self.manifest.eos_token_ids,
            self.context_length,
            self.load_s,
            self._earlier_answers,
        )
        prefix = self.processor.thinking.response_prefix(opening) if config.constraint else ""
        with self.session(prompt) as session:
            yield from stream_answer(session, prompt, config, model, watch, prefix, opening.thought)

    def score(
        self,
        images: Visuals,
        question: str,
        choices: Sequence[str],
        config: GenerationConfig | None = None,
        image_budget: ImageBudget | None = None,
        *,
        calibration_temperature: float | None = None,
        cache_salt: str = "",
        **options: Any,
    ) -> Scores:
        """Return how likely the model is to answer `question` with each of the choices; see `Scores` for the formula.

        `calibration_temperature` scales the probabilities; None means that which `edgevlm calibrate` has saved with the
        model, 1 the model's own probabilities. Other arguments as in `generate`; of `GenerationConfig` only
        `chat_template_kwargs` counts, and the model does not think. Raises `ImageError`, `PromptError`, `OptionError`
        for choices that are empty or alike, and `DeviceError` where the logits overflow.
        """
        config, image_budget = override(config, image_budget, options)
        return result_of(
            self.score_events(images, question, choices, config, image_budget, cache_salt, calibration_temperature)
        )

    def score_events(
        self,
        images: Visuals,
        question: str,
        choices: Sequence[str],
        config: GenerationConfig | None = None,
        image_budget: ImageBudget | None = None,
        cache_salt: str = "",
        calibration_temperature: float | None = None,
    ) -> Generator[Progress, None, Scores]:
        """Yield the progress of `score`; return the scores."""
        pictures = as_visuals(images)
        messages = [user_message(question, kinds_of(pictures))]
        scores = None
        steps = self.score_steps(messages, pictures, choices, config, image_budget, cache_salt, calibration_temperature)
        with closing(steps) as events:
            for event in events:
                if isinstance(event, Progress):
                    yield event
                elif isinstance(event, Scores):
                    scores = event
        assert scores is not None
        return scores

    def score_steps(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageInput | Video | PreprocessedImage],
        choices: Sequence[str],
        config: GenerationConfig | None = None,
        image_budget: ImageBudget | None = None,
        cache_salt: str = "",
        calibration_temperature: float | None = None,
    ) -> Generator[Progress | Step | Scores, None, None]:
        """Yield the progress of scoring answers to a conversation, each step before it is made, and last the scores.

        `messages` and `images` as in `events`, steps as in `steps`, and errors as in `score`.
        """
        check_choices(choices)
        temperature = self._temperature(calibration_temperature)
        config, watch = config or GenerationConfig(), Stopwatch()
        opening = self._opening(replace(config, think=False))
        prompt = yield from self._prepare(messages, images, opening, watch, image_budget, cache_salt)
        answers = self._answer_ids(choices, opening, prompt)
        with self.session(prompt) as session:
            found = yield from log_likelihoods(session, prompt, answers, self.manifest.eos_token_ids, watch)
        yield Scores(
            dict(zip(choices, found, strict=True)),
            prompt_tokens=len(prompt),
            image_tokens=prompt.image_tokens,
            views=prompt.views,
            cached_tokens=watch.counts["cached_tokens"],
            cached_views=prompt.cached_views,
            timings=watch.timings(self.load_s, 0),
            temperature=temperature,
        )

    def score_labels(
        self,
        images: Visuals,
        question: str,
        labels: Sequence[str],
        config: GenerationConfig | None = None,
        image_budget: ImageBudget | None = None,
        *,
        answers: tuple[str, str] = YES_NO,
        calibration_temperature: float | None = None,
        cache_salt: str = "",
        **options: Any,
    ) -> LabelScores:
        """Return how likely each label applies, asked about on its own: labels do not exclude each other.

        `{label}` in the question stands for the label ("Is there any {label}?"); where there is none, the question is
        followed by one whether the label applies. `answers` are the two that are scored, the one that affirms first.
        The pictures are encoded once, and the prompts share their prefix. Other arguments and errors as in `score`.
        """
        config, image_budget = override(config, image_budget, options)
        pictures = as_visuals(images)
        messages = [user_message(question, kinds_of(pictures))]
        steps = self.score_labels_steps(
            messages, pictures, labels, config, image_budget, cache_salt, calibration_temperature, answers
        )
        *_, scores = steps
        assert isinstance(scores, LabelScores)
        return scores

    def score_labels_steps(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageInput | Video | PreprocessedImage],
        labels: Sequence[str],
        config: GenerationConfig | None = None,
        image_budget: ImageBudget | None = None,
        cache_salt: str = "",
        calibration_temperature: float | None = None,
        answers: tuple[str, str] = YES_NO,
    ) -> Generator[Progress | Step | LabelScores, None, None]:
        """Yield the progress of judging labels, each step before it is made, and last the scores.

        `labels` and `answers` as in `score_labels`, all else as in `score_steps`.
        """
        check_choices(labels, "labels")
        check_pair(answers)
        temperature = self._temperature(calibration_temperature)
        config, watch = config or GenerationConfig(), Stopwatch()
        opening = self._opening(replace(config, think=False))
        asked = [about_label(messages, label) for label in labels]
        encoded = yield from self._encode_prompt(asked[0], images, opening, watch, image_budget, cache_salt)
        prompt = yield from self._prepare(asked[0], encoded, opening, watch, image_budget, cache_salt)
        found, tokens, image_tokens = [], 0, 0
        with self.session(prompt) as session:
            for number, question in enumerate(asked):
                if number:
                    prompt = yield from self._prepare(question, encoded, opening, watch, image_budget, cache_salt)
                ids = self._answer_ids(answers, opening, prompt)
                found.append((yield from log_likelihoods(session, prompt, ids, self.manifest.eos_token_ids, watch)))
                tokens, image_tokens = tokens + len(prompt), image_tokens + prompt.image_tokens
        yield LabelScores(
            {label: dict(zip(answers, each, strict=True)) for label, each in zip(labels, found, strict=True)},
            prompt_tokens=tokens,
            image_tokens=image_tokens,
            views=prompt.views,
            cached_tokens=watch.counts["cached_tokens"],
            cached_views=prompt.cached_views,
            timings=watch.timings(self.load_s, 0),
            temperature=temperature,
        )

    def _answer_ids(self, answers: Sequence[str], opening: Opening, prompt: Prompt) -> list[list[int]]:
        """Return the token ids of answers to be scored after a prompt, known to fit."""
        prefix = self.processor.thinking.response_prefix(opening)
        found = [self.grammar_tokenizer.encode(prefix + answer) for answer in answers]
        self._check_length(len(prompt) + max(map(len, found)))
        return found

    def _temperature(self, given: float | None) -> float:
        """Return the calibration temperature that counts. Raises `OptionError`."""
        if given is None:
            return self.calibration.temperature if self.calibration else 1.0
        check_temperature(given)
        return float(given)

    def locate(
        self,
        image: ImageInput,
        phrase: str,
        config: GenerationConfig | None = None,
        image_budget: ImageBudget | None = None,
        *,
        max_locations: int = 20,
        cache_salt: str = "",
        **options: Any,
    ) -> Locations:
        """Return where in a picture `phrase` is, such as "the red valve": boxes or points in pixels, see `Locations`.

        Arguments as in `generate`; of `GenerationConfig` only `chat_template_kwargs` counts, and the answer is greedy
        under the grammar of the model's own convention, without a thought. Raises `ImageError`, `PromptError`,
        `OptionError` for a model without a known convention, and `IncompleteAnswerError` where the context is full
        before the answer ends.
        """
        config, image_budget = override(config, image_budget, options)
        return result_of(self.locate_events(image, phrase, config, image_budget, max_locations, cache_salt))

    def locate_events(
        self,
        image: ImageInput,
        phrase: str,
        config: GenerationConfig | None = None,
        image_budget: ImageBudget | None = None,
        max_locations: int = 20,
        cache_salt: str = "",
    ) -> Generator[Progress, None, Locations]:
        """Yield the progress of `locate`; return the places."""
        from edgevlm.locate import Search

        search = Search.of(self.processor.family, phrase, max_locations)
        given = as_visuals(image)
        if len(given) != 1 or isinstance(given[0], Video):
            raise ImageError(f"locate takes one picture, not {len(given) if len(given) != 1 else 'a video'}")
        picture, budget = load_picture(given[0]), image_budget or ImageBudget()
        answer, config = None, search.config(config or GenerationConfig(), self.context_length)
        with closing(self.events(search.messages, [picture], config, budget, cache_salt)) as events:
            for event in events:
                if isinstance(event, Progress):
                    yield event
                else:
                    answer = event.answer
        assert answer is not None
        check_satisfied(answer)
        return search.read(answer, picture, budget)

    def session(self, prompt: Prompt) -> AbstractContextManager[Session]:
        """Lend the session with the longest cached prefix of the prompt."""
        return self._sessions.take(prompt.prefix_keys)

    def chat(
        self,
        config: GenerationConfig | None = None,
        system: str | None = None,
        image_budget: ImageBudget | None = None,
        *,
        cache_salt: str = "",
        **options: Any,
    ) -> Chat:
        """Return a new conversation; `options` as in `generate`. The model is told `system` before the first turn."""
        config, image_budget = override(config, image_budget, options)
        return Chat(self, config, system, image_budget, cache_salt)

    def preprocess(
        self,
        images: Sequence[ImageInput | Video | PreprocessedImage],
        image_budget: ImageBudget | None = None,
        cache_salt: str = "",
    ) -> list[PreprocessedImage]:
        """Decode, resize and split the pictures of one prompt; one that the vision cache knows is only decoded.

        The result may stand for the pictures in `events` and `count_tokens`. Raises `ImageError` and `OptionError`.
        """
        family = self.processor.family
        budget = family.budget_for(image_budget or ImageBudget(), len(images))
        preprocessed = []
        for image in checked(images):
            if isinstance(image, Video):
                image = self._preprocess_video(image, budget, cache_salt)  # noqa: PLW2901
            if not isinstance(image, PreprocessedImage):
                picture = load_picture(image)
                key = (picture.digest, budget, cache_salt)
                found = self._vision_cache.picture(key) or family.preprocess(picture.pixels, budget)
                image = PreprocessedImage(key, found)  # noqa: PLW2901
            preprocessed.append(image)
        return preprocessed

    def _preprocess_video(self, video: Video, budget: ImageBudget, cache_salt: str) -> PreprocessedImage:
        frames = load_frames(video, self.processor.family, budget)
        digests = tuple(content_digest(each) for each in frames.pixels)
        key = (digests, tuple(frames.times_s), frames.rate, cache_salt)
        return PreprocessedImage(key, self.processor.family.preprocess_video(frames), is_video=True)

    def count_tokens(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageInput | Video | PreprocessedImage],
        config: GenerationConfig | None = None,
        image_budget: ImageBudget | None = None,
    ) -> int:
        """Return how many tokens the prompt of a conversation has. Raises `ImageError` and `PromptError`."""
        opening = self._opening(config or GenerationConfig())
        preprocessed = self.preprocess(images, image_budget)
        return len(self.processor.prompt_ids(messages, preprocessed, opening.variables, opening.suffix))

    def _opening(self, config: GenerationConfig) -> Opening:
        """Return how the prompt opens the answer's turn. Raises `ThinkingError`."""
        return self.processor.thinking.opening(config.think, config.chat_template_kwargs)

    def encode_events(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageInput | Video | PreprocessedImage],
        config: GenerationConfig | None = None,
        image_budget: ImageBudget | None = None,
        cache_salt: str = "",
    ) -> Generator[Progress, None, list[PreprocessedImage]]:
        """Yield the progress of encoding a conversation's pictures ahead of its answer; return them encoded.

        They may then stand for the pictures in `events`, whose vision stage is over at once. Errors as in `events`.
        """
        opening = self._opening(config or GenerationConfig())
        return (yield from self._encode_prompt(messages, images, opening, Stopwatch(), image_budget, cache_salt))

    def _encode_prompt(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageInput | Video | PreprocessedImage],
        opening: Opening,
        watch: Stopwatch,
        image_budget: ImageBudget | None,
        cache_salt: str,
    ) -> Generator[Progress, None, list[PreprocessedImage]]:
        with watch.stage("preprocess"):
            preprocessed, _ = self._preprocess_prompt(messages, images, opening, image_budget, cache_salt)
        with watch.stage("load"):
            vision = self.vision
        with watch.stage("vision"):
            encoded = yield from self._encode(vision, preprocessed, cache_salt)
        return [replace(image, image=views) for image, views in zip(preprocessed, encoded, strict=True)]

    def prepare(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageInput | Video | PreprocessedImage],
        config: GenerationConfig,
        watch: Stopwatch,
        image_budget: ImageBudget | None = None,
        cache_salt: str = "",
    ) -> Prompt:
        """Return a conversation with its pictures as the language model's inputs. Errors as in `events`."""
        opening = self._opening(config)
        return result_of(self._prepare(messages, images, opening, watch, image_budget, cache_salt))

    def _prepare(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageInput | Video | PreprocessedImage],
        opening: Opening,
        watch: Stopwatch,
        image_budget: ImageBudget | None,
        cache_salt: str,
    ) -> Generator[Progress, None, Prompt]:
        family = self.processor.family
        with watch.stage("preprocess"):
            preprocessed, ids = self._preprocess_prompt(messages, images, opening, image_budget, cache_salt)
        with watch.stage("load"):
            vision = self.vision
        with watch.stage("vision"):
            encoded = yield from self._encode(vision, preprocessed, cache_salt)
        with watch.stage("load"):
            language_model = self.language_model
        shown = family.image_rows(ids)
        features = [family.assemble(image.layout, [view.outputs for view in image.views]) for image in encoded]
        image_embeds = join([each[IMAGE_EMBEDS] for each in features], self.manifest.hidden_size)
        rows = [key for pair in zip(encoded, features, strict=True) for key in feature_keys(*pair)]
        return Prompt(
            merge(language_model.embed(ids), shown, image_embeds),
            ids=ids.tolist(),
            prefix_keys=prefix_keys(ids, shown, rows, cache_salt),
            inputs=family.language_inputs(ids, [image.layout for image in encoded], features),
            images=image_places(shown, [len(each[IMAGE_EMBEDS]) for each in features]),
            image_tokens=len(image_embeds),
            views=sum(map(len, encoded)),
            cached_views=sum(len(image) - image.encoded for image in encoded),
            cache_salt=cache_salt,
        )

    def _preprocess_prompt(
        self,
        messages: Sequence[Message],
        images: Sequence[ImageInput | Video | PreprocessedImage],
        opening: Opening,
        image_budget: ImageBudget | None,
        cache_salt: str,
    ) -> tuple[list[PreprocessedImage], npt.NDArray[np.int64]]:
        """Return the pictures of a conversation preprocessed, and the token ids of its prompt, known to fit."""
        preprocessed = self.preprocess(images, image_budget, cache_salt)
        found = self.processor.prompt_ids(messages, preprocessed, opening.variables, opening.suffix)
        ids = np.asarray(found, np.int64)
        self.processor.check_known(ids)
        self._check_length(len(ids))
        return preprocessed, ids

    def _encode(
        self, vision: VisionEncoder, images: Sequence[PreprocessedImage], cache_salt: str
    ) -> Generator[Progress, None, list[EncodedImage]]:
        """Encode the views that are not in the vision cache; return the pictures' embeddings."""
        total = sum(len(image.image) for image in images if isinstance(image.image, Visual))
        before, encoded = 0, []
        for image in images:
            steps = self._vision_cache.encode(image, vision.encode, cache_salt)
            encoded.append((yield from as_progress(steps, before, total)))
            before += len(image.image) if isinstance(image.image, Visual) else 0
        return encoded

    def _check_length(self, length: int) -> None:
        limit = self.context_length
        if length >= limit:
            raise ContextLengthError(
                f"the prompt has {length:,} tokens and the model's context holds {limit:,};"
                " shorten the question, or use fewer pictures or frames, a lower detail or max_image_tokens"
            )


def as_progress(steps: Generator[int, None, T], before: int, total: int) -> Generator[Progress, None, T]:
    """Yield the counts that `steps` yields, after `before` others, as progress of the vision encoder."""
    while True:
        try:
            yield Progress("vision", before + next(steps), total)
        except StopIteration as stop:
            result: T = stop.value
            return result
