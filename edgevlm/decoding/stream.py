"""The generator: prefill, then decode with drafts and fast-forwarded tokens; all answers come from here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from edgevlm.answer import Answer, Event, FinishReason, Piece, Progress, TokenLogprob
from edgevlm.decoding.config import GenerationConfig
from edgevlm.decoding.prompt_lookup import EarlierAnswers, PromptLookup
from edgevlm.decoding.repetition import RepetitionGuard
from edgevlm.decoding.sampling import Logits, TokenSelector, make_sampler, token_logprob
from edgevlm.decoding.stop_text import StopText
from edgevlm.decoding.structured import GrammarTokenizer
from edgevlm.decoding.thinking import ThoughtSelector, ThoughtSplitter
from edgevlm.errors import IncompleteAnswerError
from edgevlm.inputs.prompt import Prompt
from edgevlm.inputs.thinking import Thought
from edgevlm.metrics import Stopwatch, peak_memory
from edgevlm.runtime.kv_paged import PagedSession, step_together
from edgevlm.runtime.kv_session import SHORT_STEP, Session

if TYPE_CHECKING:
    from edgevlm.inputs.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextModel:
    """What decoding needs of a model besides a session."""

    tokenizer: Tokenizer
    grammar_tokenizer: GrammarTokenizer
    eos_token_ids: Sequence[int]
    context_length: int
    load_s: float
    earlier_answers: EarlierAnswers = field(default_factory=EarlierAnswers)


@dataclass(eq=False)
class Step:
    """The next step of an answer, announced before it is made: whoever drives several answers may join theirs."""

    session: Session
    token_ids: Sequence[int]
    drafted: int = 0
    """How many of the tokens, the last ones, are a draft."""
    logits: Logits | None = None
    """`(n, V)`, after each of the tokens, once the step has been made."""

    def make(self) -> Logits:
        """Return the logits; make the step if it has not been made."""
        return self.session.step(self.token_ids, self.drafted) if self.logits is None else self.logits


def make_together(steps: Sequence[Step]) -> None:
    """Make the steps of several answers of one model in one inference.

    Those whose KV cache is OpenVINO's state are left to be made alone, and so are long ones, which may have to be
    broken off.
    """
    if len(steps) < 2:
        return
    short = [(step, step.session) for step in steps if len(step.token_ids) <= SHORT_STEP]
    paged = [(step, session) for step, session in short if isinstance(session, PagedSession)]
    if len(paged) < 2:
        return
    made = step_together([session for _, session in paged], [step.token_ids for step, _ in paged])
    for (step, _), logits in zip(paged, made, strict=True):
        step.logits = logits


def stream_tokens(
    session: Session, prompt: Prompt, selector: TokenSelector, max_tokens: int, watch: Stopwatch, drafter: PromptLookup
) -> Iterator[tuple[int, Logits] | Step]:
    """Yield up to `max_tokens` token ids after the prompt with their logits `(V,)`, and each step before it is made.

    The caller stops at the end token. One step feeds the last token together with the tokens expected after it: those
    the grammar fast-forwards, which always come true, or a draft, of which the first token that the selector does not
    select, and all after it, are taken back from the KV cache. Where its states cannot be cut there, those before them
    since the draft began are read once more, with the next token.
    """
    forced = selector.fast_forward[: max_tokens - 1]
    draft = []
    if not forced and session.rewindable:  # a state would have to be kept within the prefill
        draft = selector.filter_draft(drafter.first_draft(max_tokens - 1))
    lookahead, drafted = forced or draft, len(draft)
    watch.count("drafted_tokens", drafted)
    with watch.stage("prefill"):
        start = session.reuse_prefix(prompt.prefix_keys, prompt.inputs, prompt.images)
        inputs_embeds = prompt.inputs_embeds[:, start:]
        if lookahead:
            inputs_embeds = np.concatenate([inputs_embeds, session.embed(lookahead)], axis=1)
        keys = [*prompt.prefix_keys[start:], *lookahead]
        rest, marks = prompt.inputs.after(start), prompt.marks_after(start)
        logits = session.prefill(inputs_embeds, 1 + len(lookahead), keys, rest, marks)
    watch.count("cached_tokens", start)
    left = max_tokens
    while True:
        accepted = 0
        for row, expected in zip(logits, [*lookahead, None], strict=True):
            token = selector.select(row)
            watch.first_token = watch.first_token or perf_counter()
            drafter.add(token)
            left -= 1
            yield token, row
            if not left or selector.finished:
                return
            if token != expected:
                break
            accepted += 1
            watch.count("accepted_tokens", bool(drafted))
        again: list[int] = []
        if drafted:
            again = session.take_back(drafted - accepted)
        forced, draft = selector.fast_forward[: left - 1], []
        if not forced and not again and session.takes_drafts:
            draft = selector.filter_draft(drafter.draft(left - 1))
        lookahead, drafted = forced or draft, len(draft)
        watch.count("drafted_tokens", drafted)
        step = Step(session, [*again, token, *lookahead], drafted)
        yield step
        logits = step.make()[len(again) :]


def stream_answer(
    session: Session,
    prompt: Prompt,
    config: GenerationConfig,
    model: TextModel,
    watch: Stopwatch,
    response_prefix: str = "",
    thought: Thought | None = None,
) -> Iterator[Event | Step]:
    """Yield `Progress` for every token, the answer's pieces, and each step before it is made.

    The last piece carries the `Answer`. `response_prefix` is what the model writes before an answer: one with a
    constraint begins after it. `thought` tells the thought that comes before that.
    """
    context_left = model.context_length - len(prompt)
    max_tokens = min(config.max_new_tokens, context_left)
    token_bytes = model.grammar_tokenizer.token_bytes
    selector = make_selector(config, model, response_prefix, thought)
    text = StopText(config.stop, response_prefix)
    splitter = ThoughtSplitter(
        model.tokenizer,
        thought,
        text,
        skip_special_tokens=config.skip_special_tokens,
        strip=config.constraint is None,
    )
    earlier = model.earlier_answers.of(prompt)
    drafter = PromptLookup(prompt.ids, config.draft_tokens, model.tokenizer.shape, earlier)
    guard = RepetitionGuard(config.repetition_detection, token_bytes) if config.repetition_detection else None
    ids: list[int] = []
    logprobs: list[TokenLogprob] = []
    logprobs_sent = 0
    reason: FinishReason = "length" if config.max_new_tokens <= context_left else "context"
    for made in stream_tokens(session, prompt, selector, max_tokens, watch, drafter):
        if isinstance(made, Step):
            yield made
            continue
        token, logits = made
        ids.append(token)
        yield Progress("decode", len(ids), max_tokens)
        if token in model.eos_token_ids:
            reason = "stop"
            break
        reasoning, piece = splitter.add(token)
        if config.top_logprobs is not None and splitter.part == "answer":
            logprobs.append(token_logprob(token, logits, config.top_logprobs, token_bytes))
        if reasoning or piece:
            yield Piece(piece, None, tuple(logprobs[logprobs_sent:]), reasoning)
            logprobs_sent = len(logprobs)
        if text.stopped:
            break
        if guard and guard.add(token):
            reason = "repetition"
            break
    model.earlier_answers.add(prompt, ids)
    reasoning, rest = splitter.finish()
    if text.stopped or selector.finished:
        reason = "stop"
    answer = Answer(
        text=text.shown,
        finish_reason=reason,
        prompt_tokens=len(prompt),
        image_tokens=prompt.image_tokens,
        generated_tokens=len(ids),
        views=prompt.views,
        token_ids=tuple(ids),
        cached_tokens=watch.counts.get("cached_tokens", 0),
        cached_views=prompt.cached_views,
        drafted_tokens=watch.counts.get("drafted_tokens", 0),
        accepted_tokens=watch.counts.get("accepted_tokens", 0),
        fast_forward_tokens=selector.fast_forward_tokens,
        satisfied=selector.satisfied and not text.stopped,
        logprobs=tuple(logprobs),
        timings=watch.timings(model.load_s, len(ids)),
        peak_memory_bytes=peak_memory(),
        reasoning_content=splitter.reasoning_content,
        reasoning_tokens=splitter.reasoning_tokens,
    )
    yield Piece(rest, answer, tuple(logprobs[logprobs_sent:]), reasoning)


def make_selector(
    config: GenerationConfig, model: TextModel, response_prefix: str, thought: Thought | None
) -> TokenSelector:
    """Return what selects an answer's tokens, and those of the thought before it. Raises `OptionError`.

    Under a constraint the model thinks where the prompt opens the thought, or where the caller has asked for one.
    """
    sampler = make_sampler(config.temperature, config.top_p, config.top_k, config.seed)
    selector = TokenSelector(sampler)
    if config.constraint:
        selector = model.grammar_tokenizer.matcher(config.constraint, sampler, response_prefix)
        if thought and (thought.opened or thought.asked):
            return ThoughtSelector(sampler, thought, selector, config.thinking_budget, model.eos_token_ids)
    elif thought and config.thinking_budget is not None:
        return ThoughtSelector(sampler, thought, selector, config.thinking_budget)
    return selector


def collect(events: Iterable[Event]) -> Answer:
    """Return the answer that the last piece carries. Raises `IncompleteAnswerError`."""
    *_, last = events
    assert isinstance(last, Piece) and last.answer
    check_satisfied(last.answer)
    return last.answer


def check_satisfied(answer: Answer) -> None:
    """Raise `IncompleteAnswerError` for an answer that ended before it satisfied its constraint."""
    if answer.satisfied is False:
        less = "a thinking_budget" if answer.reasoning_content and not answer.text else "a shorter form"
        why = {
            "length": f"max_new_tokens ({answer.generated_tokens}) was reached; allow more, or {less}",
            "repetition": "it had become a loop",
            "context": "the context is full; ask about fewer or smaller pictures",
            "stop": "a stop text came in the middle of it",
        }
        raise IncompleteAnswerError(
            f"the answer is not whole and does not satisfy the constraint: {why[answer.finish_reason]}", answer
        )
