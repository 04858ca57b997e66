"""How a model is asked: an export in this process, or any server that speaks OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from edgevlm.decoding.config import GenerationConfig
from edgevlm.decoding.sampling import Logits
from edgevlm.decoding.structured import Constraint
from edgevlm.evals.items import LETTERS, Item, Suite
from edgevlm.families.base import RGB, ImageBudget
from edgevlm.inputs.messages import user_message
from edgevlm.jobs.convert import page_prompts
from edgevlm.manifest import Manifest, load_manifest
from edgevlm.metrics import Stopwatch
from edgevlm.model_store import default_model

if TYPE_CHECKING:
    from edgevlm.vlm import VLM

Schema: TypeAlias = Mapping[str, Any]
_GREY, _TOKENIZER = 128, "tokenizer.json"


@dataclass(frozen=True)
class Scored:
    """How likely a model is to answer with each option."""

    probabilities: Mapping[str, float]
    mass: float
    """Probability of any of them; near 0 the model had something else to say."""


class Model(Protocol):
    """What can be asked."""

    name: str
    is_general: bool
    """It was made for more than the bundled model was."""

    prompts: Mapping[str, str]
    """What it was taught to be asked for a task, by the task's name, such as `page`."""

    def describe(self) -> dict[str, Any]:
        """Return what tells it from others, for the first row of the results."""

    def score(self, pictures: Sequence[RGB], question: str, options: Sequence[str]) -> Scored:
        """Return how likely each option is. Raises `EdgeVLMError`."""

    def generate(
        self, pictures: Sequence[RGB], question: str, max_new_tokens: int, schema: Schema | None = None
    ) -> str:
        """Return the greedy answer, JSON of `schema` where there is one. Raises `EdgeVLMError`."""


class LocalModel:
    """An export, loaded in this process."""

    def __init__(self, vlm: VLM, config: GenerationConfig, image_budget: ImageBudget) -> None:
        self.name = vlm.folder.name
        self.is_general = not same_tokens(vlm.manifest, load_manifest(default_model()))  # tuned ones keep them
        self.prompts = page_prompts(vlm)
        self.manifest = vlm.manifest
        self._vlm, self._config, self._budget = vlm, config, image_budget

    def describe(self) -> dict[str, Any]:
        """Return the export's name, digest and precisions, and the detail of its pictures."""
        precisions = {name: submodel.precision for name, submodel in self.manifest.submodels.items()}
        return {
            "model": self.name,
            "fingerprint": self.manifest.fingerprint,
            "precision": precisions,
            "detail": self._budget.detail,
        }

    def score(self, pictures: Sequence[RGB], question: str, options: Sequence[str]) -> Scored:
        """As `Model.score`."""
        scores = self._vlm.score(
            list(pictures), question, options, self._config, self._budget, calibration_temperature=1.0
        )
        return Scored(scores.probabilities, scores.total_probability)

    def generate(
        self, pictures: Sequence[RGB], question: str, max_new_tokens: int, schema: Schema | None = None
    ) -> str:
        """As `Model.generate`."""
        config = replace(self._config, max_new_tokens=max_new_tokens)
        if schema:
            config = replace(config, constraint=Constraint.json_schema(schema))
        return self._vlm.generate(list(pictures), question, config, self._budget).text

    def token_ids(self, pictures: Sequence[RGB], question: str, max_new_tokens: int) -> list[int]:
        """Return the greedy answer's tokens and, unless it was cut short, the end token."""
        config = replace(self._config, max_new_tokens=max_new_tokens, repetition_detection=None)
        answer = self._vlm.generate(list(pictures), question, config, self._budget)
        return [*answer.token_ids, *self.manifest.eos_token_ids[: answer.finish_reason == "stop"]]

    def logits(self, pictures: Sequence[RGB], question: str, answer: Sequence[int]) -> Logits:
        """Return the logits `(n, V)` of each of an answer's `n` tokens, those before it given."""
        messages = [user_message(question, len(pictures))]
        prompt = self._vlm.prepare(messages, list(pictures), self._config, Stopwatch(), self._budget)
        with self._vlm.session(prompt) as session:
            start = session.reuse_prefix(prompt.prefix_keys, prompt.inputs, prompt.images)
            embeds, inputs = prompt.inputs_embeds[:, start:], prompt.inputs.after(start)
            first = session.prefill(embeds, 1, prompt.prefix_keys[start:], inputs)
            return np.concatenate([first, session.step(answer[:-1])]) if len(answer) > 1 else first

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return self._vlm.processor.tokenizer.decode(list(ids))


def same_tokens(one: Manifest, other: Manifest) -> bool:
    """Tell whether two exports have the same tokenizer, as those of one checkpoint have."""
    return one.files.get(_TOKENIZER) == other.files.get(_TOKENIZER)


@dataclass(frozen=True)
class Judged:
    """What a model said to an item, over all orders of its options."""

    answer: str
    """In the first order."""
    right: float
    """Mean over the orders."""
    robust: bool
    """Right in every order."""
    scores: Mapping[str, float]
    """Mean probability of each option."""
    mass: float


def judge(suite: Suite, model: Model, item: Item, pictures: Sequence[RGB]) -> Judged:
    """Ask an item with options about pictures, in every cyclic order where they have letters."""
    if not item.is_lettered:
        scored = model.score(pictures, item.question, item.options)
        answer = max(item.options, key=lambda option: scored.probabilities[option])
        return Judged(answer, float(answer == item.truth), answer == item.truth, scored.probabilities, scored.mass)
    answers, totals, masses = [], dict.fromkeys(item.options, 0.0), []
    for turn in range(len(item.options)):
        order = item.options[turn:] + item.options[:turn]
        letters = tuple(LETTERS[: len(order)])
        scored = model.score(pictures, suite.lettered(item.question, order), letters)
        by_option = {option: scored.probabilities[letter] for letter, option in zip(letters, order, strict=True)}
        answers.append(max(order, key=lambda option: by_option[option]))
        masses.append(scored.mass)
        for option, probability in by_option.items():
            totals[option] += probability / len(order)
    right = [answer == item.truth for answer in answers]
    return Judged(answers[0], float(np.mean(right)), all(right), totals, float(np.mean(masses)))


def blinded(pictures: Sequence[RGB]) -> list[RGB]:
    """Return grey pictures of the same sizes."""
    return [np.full_like(picture, _GREY) for picture in pictures]
