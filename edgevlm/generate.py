"""The one generator: a prompt's embeddings in, pieces of text out; everything else is a view of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgevlm.answer import Answer, FinishReason, Piece, TokenLogprob
from edgevlm.chat import check_variables
from edgevlm.constraint import Constraint, Vocabulary
from edgevlm.drafting import PromptLookup
from edgevlm.errors import IncompleteAnswerError, OptionError
from edgevlm.families.base import Detail, LanguageInputs
from edgevlm.metrics import Stopwatch, peak_memory
from edgevlm.sampling import Chooser, Logits, make_sampler, token_logprob
from edgevlm.session import Session, common_length
from edgevlm.tokenizer import Tokenizer

Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with a stage's name, the steps done and the steps in all."""
DETAILS = ("auto", "low", "high")


@dataclass(frozen=True)
class GenerationConfig:
    """How an answer is made; greedy by default."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    detail: Detail = "auto"
    """`low`: the global view only; `auto`: as many tiles as the picture's pixels fill; `high`: as the checkpoint's own
    processor does, which enlarges small pictures."""
    max_tiles: int | None = None
    """At most this many tiles for each picture, its global view included."""
    draft_tokens: int = 8
    """Most tokens drafted from earlier text for one step to check; 0 drafts none. In float32 the answer is the same;
    in BF16 a step of several tokens rounds differently from a step of one, and a near tie may fall the other way."""
    constraint: Constraint | None = None
    """The form that the answer must have."""
    top_logprobs: int | None = None
    """Give each token's log-probability with this many of the likeliest in its place; 0: its own alone; None: none."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the answer's text, but for those that are part of it, such as granite-docling's
    `<doctag>`; False shows all but the end token, and stop texts see them."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """The chat template's own variables, such as `enable_thinking`."""
    cache_salt: str = ""
    """What has been computed under one salt is not used under another: neither the time to the first token nor
    `cached_tokens` then tells one caller what another has shown."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise OptionError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.detail not in DETAILS:
            raise OptionError(f"detail must be one of {', '.join(DETAILS)}, not {self.detail!r}")
        if self.max_tiles is not None and self.max_tiles < 1:
            raise OptionError(f"max_tiles must be at least 1, not {self.max_tiles}")
        if not 0 <= self.draft_tokens <= 64:
            raise OptionError(f"draft_tokens must be between 0 and 64, not {self.draft_tokens}")
        if not isinstance(self.constraint, Constraint | None):
            raise OptionError("constraint must be a Constraint, such as Constraint.json_schema(…)")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= 20:
            raise OptionError(f"top_logprobs must be between 0 and 20, not {self.top_logprobs}")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise OptionError("stop must be a tuple of texts, none of them empty")
        if not isinstance(self.chat_template_kwargs, Mapping):
            raise OptionError("chat_template_kwargs must be a mapping of the template's variables to values")
        check_variables(self.chat_template_kwargs)
        make_sampler(self.temperature, self.top_p, self.top_k, self.seed)

    def override(self, options: Mapping[str, Any]) -> GenerationConfig:
        """Return the configuration with some fields changed. Raises `OptionError`, also for one that there is not."""
        known = [each.name for each in fields(self)]
        if unknown := next((name for name in options if name not in known), None):
            near = get_close_matches(unknown, known, 1)
            say = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise OptionError(f"there is no option {unknown!r}; {say}")
        return replace(self, **options) if options else self


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the language model."""

    inputs_embeds: npt.NDArray[np.float32]  # (1, n, hidden)
    ids: Sequence[int]
    keys: Sequence[Hashable]
    """What stands at each place: a token id, or a view's key and a row of its features."""
    inputs: LanguageInputs
    images: Sequence[range]
    """The places of each picture's features."""
    image_tokens: int
    tiles: int
    cached_tiles: int

    def __len__(self) -> int:
        return len(self.ids)


def stream_tokens(
    session: Session, prompt: Prompt, chooser: Chooser, max_tokens: int, watch: Stopwatch, drafter: PromptLookup
) -> Iterator[tuple[int, Logits]]:
    """Yield up to `max_tokens` token ids after the prompt, each with the logits `(V,)` that stood in its place.

    The caller stops when it has seen the end. Every token is the chooser's, after all tokens before it: a draft that it
    does not choose is taken back. What it is forced to choose goes to the model as a draft that always comes true.
    """
    ahead, drafted = chooser.forced[: max_tokens - 1], 0
    with watch.stage("prefill"):
        start = session.rewind_to_common(prompt.keys, prompt.inputs, prompt.images)
        inputs_embeds = prompt.inputs_embeds[:, start:]
        if ahead:
            inputs_embeds = np.concatenate([inputs_embeds, session.embed(ahead)], axis=1)
        keys = [*prompt.keys[start:], *ahead]
        logits = session.prefill(inputs_embeds, 1 + len(ahead), keys, prompt.inputs.after(start))
    watch.count("cached_tokens", start)
    left = max_tokens
    while True:
        accepted = 0
        for row, expected in zip(logits, [*ahead, None], strict=True):
            token = chooser.choose(row)
            watch.first_token = watch.first_token or perf_counter()
            drafter.add(token)
            left -= 1
            yield token, row
            if not left or chooser.complete:
                return
            if token != expected:
                break
            accepted += 1
            watch.count("accepted_tokens", bool(drafted))
        if drafted:
            session.rewind(session.length - drafted + accepted)
            drafter.learn(drafted, accepted)
        forced = chooser.forced[: left - 1]
        draft = [] if forced else chooser.possible(drafter.draft(left - 1))
        ahead, drafted = forced or draft, len(draft)
        watch.count("drafted_tokens", drafted)
        logits = session.step([token, *ahead])


def stream_answer(
    session: Session,
    prompt: Prompt,
    config: GenerationConfig,
    *,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    lead: str,
    eos_token_ids: Sequence[int],
    context_length: int,
    watch: Stopwatch,
    load_s: float,
    on_progress: Progress | None = None,
) -> Iterator[Piece]:
    """Yield the answer's pieces; the last one carries the `Answer`.

    `lead` is what the model writes before an answer; one with a constraint begins after it. `on_progress` is told of
    every token, also of one that completes no text; what it raises ends the answer.
    """
    room = context_length - len(prompt)
    budget = min(config.max_new_tokens, room)
    sampler = make_sampler(config.temperature, config.top_p, config.top_k, config.seed)
    guided = config.constraint is not None
    chooser = vocabulary.guide(config.constraint, sampler, lead) if config.constraint else Chooser(sampler)
    detokenizer = tokenizer.detokenizer(skip_special_tokens=config.skip_special_tokens)
    text = StopText(config.stop, lead if guided else "")
    drafter = PromptLookup(prompt.ids, config.draft_tokens if session.rewindable else 0)
    ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    told = 0
    reason: FinishReason = "length" if config.max_new_tokens <= room else "context"
    for token, logits in stream_tokens(session, prompt, chooser, budget, watch, drafter):
        ids.append(token)
        if on_progress:
            on_progress("decode", len(ids), budget)
        if token in eos_token_ids:
            reason = "stop"
            break
        if config.top_logprobs is not None:
            logprobs.append(token_logprob(token, logits, config.top_logprobs, vocabulary.token_bytes))
        if piece := text.add(detokenizer.add(token)):
            yield Piece(piece, logprobs=tuple(logprobs[told:]))
            told = len(logprobs)
        if text.stopped:
            break
    rest = text.finish(detokenizer.finish())
    if text.stopped or chooser.complete:
        reason = "stop"
    answer = Answer(
        text=text.shown,
        finish_reason=reason,
        prompt_tokens=len(prompt),
        image_tokens=prompt.image_tokens,
        generated_tokens=len(ids),
        tiles=prompt.tiles,
        token_ids=tuple(ids),
        cached_tokens=watch.counts.get("cached_tokens", 0),
        cached_tiles=prompt.cached_tiles,
        drafted_tokens=watch.counts.get("drafted_tokens", 0),
        accepted_tokens=watch.counts.get("accepted_tokens", 0),
        forced_tokens=chooser.forced_tokens,
        satisfied=chooser.satisfied and not text.stopped,
        logprobs=tuple(logprobs),
        timings=watch.timings(load_s, len(ids)),
        peak_memory_bytes=peak_memory(),
    )
    yield Piece(rest, answer, tuple(logprobs[told:]))


def whole(pieces: Iterable[Piece]) -> Answer:
    """Return the answer that the last piece carries. Raises `IncompleteAnswerError`."""
    *_, last = pieces
    assert last.answer is not None
    check_satisfied(last.answer)
    return last.answer


def check_satisfied(answer: Answer) -> None:
    """Raise `IncompleteAnswerError` for an answer that was cut before it had the form it was to have."""
    if answer.satisfied is False:
        why = {
            "length": f"max_new_tokens ({answer.generated_tokens}) was reached; allow more, or a shorter form",
            "context": "the context is full; ask about fewer or smaller pictures",
            "stop": "a stop text came in the middle of it",
        }
        raise IncompleteAnswerError(
            f"the answer is not whole and does not satisfy the constraint: {why[answer.finish_reason]}", answer
        )


class StopText:
    """Lets text through after the lead and up to the first stop text, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str], lead: str = "") -> None:
        self._stops = tuple(stops)
        self._lead = lead
        self._held = ""
        self.shown = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """Take new text and return what may be shown of it now."""
        if self.stopped:
            return ""
        self._held += self._without_lead(text)
        # The stop text that is whole first ends the answer, however the text was cut into pieces.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._show(min(found)[1])
        return self._show(len(self._held) - self._possible_beginning())

    def finish(self, text: str = "") -> str:
        """Take the last text and return all that was still held back."""
        shown = self.add(text)
        return shown if self.stopped else shown + self._show(len(self._held))

    def _without_lead(self, text: str) -> str:
        """Take what is left of the lead off the beginning of the text."""
        common = common_length(self._lead, text)
        self._lead = self._lead[common:] if common == len(text) else ""
        return text[common:]

    def _show(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self.shown += text
        return text

    def _possible_beginning(self) -> int:
        """Return the length of the longest end of the held text that begins some stop text."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        return next(
            (n for n in range(min(longest, len(self._held)), 0, -1) if self._begins_stop(self._held[-n:])),
            0,
        )

    def _begins_stop(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
