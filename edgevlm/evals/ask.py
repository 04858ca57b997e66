"""How a model is asked: an export in this process, about items with options in every order of these."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgevlm.decoding.config import GenerationConfig
from edgevlm.decoding.sampling import Logits
from edgevlm.decoding.structured import Constraint
from edgevlm.errors import IncompleteAnswerError
from edgevlm.evals.items import LETTERS, Item, Suite
from edgevlm.evals.model import Model, Schema, Scored
from edgevlm.families.base import RGB, ImageBudget
from edgevlm.inputs.messages import user_message
from edgevlm.jobs.convert import page_prompts
from edgevlm.manifest import Manifest, load_manifest
from edgevlm.metrics import Stopwatch
from edgevlm.model_store import default_model

if TYPE_CHECKING:
    from edgevlm.vlm import VLM

_GREY, _TOKENIZER = 128, "tokenizer.json"
_FREE_TOKENS = 64
"""Of an answer without a constraint."""
_LETTER = re.compile(r"^\W*([A-Z])(?:\W*$|[.):,])|(?i:\banswer(?: is)?):?\W*([A-Z])\b(?!')", re.ASCII)


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
        constraint = Constraint.json_schema(schema) if schema else None
        return self._answer(pictures, question, max_new_tokens=max_new_tokens, constraint=constraint)

    def choose(self, pictures: Sequence[RGB], question: str, options: Sequence[str]) -> str:
        """As `Model.choose`."""
        return self._answer(pictures, question, constraint=Constraint.choices(options))

    def _answer(self, pictures: Sequence[RGB], question: str, **changes: Any) -> str:
        config = replace(self._config, **changes)
        try:
            return self._vlm.generate(list(pictures), question, config, self._budget).text
        except IncompleteAnswerError as error:
            return error.answer.text

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


@dataclass(frozen=True)
class Said:
    """What a model said to an item when it generated, over all orders of its options."""

    text: str
    """In the first order, as it was generated."""
    answer: str
    """The option that it says; empty where it says none."""
    right: float
    """Mean over the orders."""


def judge(suite: Suite, model: Model, item: Item, pictures: Sequence[RGB]) -> Judged:
    """Score an item's options about pictures, in every cyclic order where they have letters."""
    answers, shares, masses = [], [], []
    for question, names, order in _wordings(suite, item):
        scored = model.score(pictures, question, names)
        by_option = {option: scored.probabilities[name] for name, option in zip(names, order, strict=True)}
        answers.append(max(order, key=lambda option: by_option[option]))
        masses.append(scored.mass)
        shares.append([by_option[option] for option in item.options])
    right = [answer == item.truth for answer in answers]
    scores = dict(zip(item.options, np.mean(shares, 0).tolist(), strict=True))
    return Judged(answers[0], float(np.mean(right)), all(right), scores, float(np.mean(masses)))


def speak(suite: Suite, model: Model, item: Item, pictures: Sequence[RGB], *, free: bool) -> Said:
    """Have an item's options generated, as `judge` scores them: under a constraint, or free and parsed."""
    texts, answers = [], []
    for question, names, order in _wordings(suite, item):
        texts.append(
            model.generate(pictures, question, _FREE_TOKENS) if free else model.choose(pictures, question, names)
        )
        answers.append(said_option(texts[-1], names, order))
    right = float(np.mean([answer == item.truth for answer in answers]))
    return Said(texts[0], answers[0], right)


def said_option(text: str, names: Sequence[str], options: Sequence[str]) -> str:
    """Return the option that a text says by its name (its letter, or the option itself) or as words; "" if none.

    A letter counts alone, at the beginning before `.`, `)`, `:` or `,`, and after "answer". A text that names several
    options says none.
    """
    by_name = dict(zip(names, options, strict=True))
    if (whole := text.strip().rstrip(".")) in by_name:
        return by_name[whole]
    letter = _LETTER.search(text.strip())
    if letter and set(names) <= set(LETTERS):
        return by_name.get(letter[1] or letter[2], "")
    mentioned = [option for option in options if re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text, re.IGNORECASE)]
    return mentioned[0] if len(mentioned) == 1 else ""


def _wordings(suite: Suite, item: Item) -> Iterator[tuple[str, Sequence[str], Sequence[str]]]:
    """Yield the questions of an item with options, what each can be answered with, and the options that stand for."""
    if not item.is_lettered:
        yield item.question, item.options, item.options
        return
    for turn in range(len(item.options)):
        order = item.options[turn:] + item.options[:turn]
        yield suite.lettered(item.question, order), tuple(LETTERS[: len(order)]), order


def blinded(pictures: Sequence[RGB]) -> list[RGB]:
    """Return grey pictures of the same sizes."""
    return [np.full_like(picture, _GREY) for picture in pictures]
