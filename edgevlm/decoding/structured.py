"""Structured output: constraints, and the matcher that masks logits to the tokens they allow (llguidance)."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgevlm.decoding.sampling import Logits, Sampler, TokenSelector
from edgevlm.errors import OptionError, one_line
from edgevlm.strict_json import read_json, write_json

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from edgevlm.inputs.tokenizer import Tokenizer


@dataclass(frozen=True)
class Constraint:
    """What an answer must satisfy; made by its constructors, which raise `OptionError` for what cannot be enforced."""

    grammar: str = field(repr=False)
    """An llguidance grammar, in JSON."""
    source: str
    """The schema, pattern, choices or grammar as given."""
    is_json: bool = False
    """Whether every text that it allows is JSON."""

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Constraint:
        """Allow JSON that a JSON Schema describes, given as a mapping or as JSON text.

        A keyword that cannot be enforced is an error, never ignored. The grammar is that of the schema as
        `edgevlm.decoding.json_schema` rewrites it.
        """
        from llguidance import LLMatcher

        from edgevlm.decoding.json_schema import JSON_STYLE, enforceable

        try:
            found = read_json(schema) if isinstance(schema, str) else dict(schema)
            text = write_json(found)
        except (ValueError, TypeError, RecursionError) as error:
            raise OptionError(f"the JSON schema is not JSON: {one_line(error)}") from None
        if not isinstance(found, dict):
            raise OptionError(f"the JSON schema must be an object, not {text[:40]}")
        held = enforceable(found)
        return _checked(
            "JSON schema",
            lambda: LLMatcher.grammar_from_json_schema(json.dumps(held), defaults=JSON_STYLE),
            text,
            is_json=True,
        )

    @classmethod
    def json(cls) -> Constraint:
        """Allow any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Allow what a regular expression (Rust's `regex` syntax, no look-around) matches from end to end."""
        from llguidance import LLMatcher

        return _checked("regular expression", lambda: LLMatcher.grammar_from_regex(pattern), pattern)

    @classmethod
    def choices(cls, texts: Sequence[str]) -> Constraint:
        """Allow one of these texts."""
        check_choices(texts)
        quoted = [json.dumps(text, ensure_ascii=False) for text in texts]
        return _checked("choices", lambda: _lark(f"start: {' | '.join(quoted)}", {}), ", ".join(quoted))

    @classmethod
    def lark(cls, grammar: str, forms: Mapping[str, Constraint] | None = None) -> Constraint:
        """Allow what a grammar in llguidance's dialect of Lark describes; its `start` rule is the answer.

        `@name` in it is the grammar of the constraint of that name.
        """
        return _checked("grammar", lambda: _lark(grammar, forms or {}), grammar)

    def after(self, lead: str) -> str:
        """Return the grammar of `lead`, the response prefix, followed by the answer."""
        if not lead:
            return self.grammar
        return _lark(f"start: {json.dumps(lead)} @form", {"form": self})


def _lark(grammar: str, forms: Mapping[str, Constraint]) -> str:
    grammars = [{"name": "answer", "lark_grammar": grammar}]
    for name, form in forms.items():
        body, *rest = json.loads(form.grammar)["grammars"]
        grammars += [body | {"name": name}, *rest]
    return json.dumps({"grammars": grammars})


def check_choices(texts: Sequence[str], name: str = "choices") -> None:
    """Raise `OptionError` unless there are choices, none of them empty and no two alike."""
    if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise OptionError(f"{name} must be one text or more, none of them empty")
    if len(set(texts)) < len(texts):
        raise OptionError(f"{name} must differ from one another")


def check_pair(answers: Sequence[str]) -> None:
    """Raise `OptionError` unless there are two answers, what is true first."""
    check_choices(answers, "answers")
    if len(answers) != 2:
        raise OptionError(f"answers must be two, what is true and what is false, not {len(answers)}")


def _checked(what: str, make: Callable[[], str], source: str, is_json: bool = False) -> Constraint:
    from llguidance import LLMatcher

    from edgevlm.decoding.json_schema import goes_on, parser_limits

    try:
        grammar = make()
        wrong = LLMatcher.validate_grammar(grammar, limits=parser_limits())
        if not wrong and not is_json and not goes_on(grammar):
            wrong = "no text satisfies it"
    except (ValueError, TypeError, RecursionError) as error:  # surrogates, which are not Unicode text
        wrong = str(error)
    if wrong:
        raise OptionError(f"the {what} cannot be used: {_first_lines(wrong)}")
    return Constraint(grammar, source, is_json)


def _first_lines(message: str) -> str:
    """Return the parser's message without the excerpt and the state printed below it."""
    lines = [line.strip() for line in message.partition("<state>")[0].splitlines()]
    return " ".join(line for line in lines if not re.fullmatch(r"\d* ?\|.*|\^*", line))[:300]


class GrammarTokenizer:
    """The model's vocabulary for llguidance; built on first use, in about a third of a second."""

    def __init__(self, tokenizer: Tokenizer, size: int, eos_token_ids: Sequence[int]) -> None:
        self._source, self._size, self._eos = tokenizer, size, list(eos_token_ids)
        self._lock = Lock()

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        size = max(self._size, self._source.size)  # a tokenizer may know tokens that the model has no logits for
        return LLTokenizer(self._source.to_json(), n_vocab=size, eos_token=self._eos)

    @cached_property
    def _plain_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        return LLTokenizer(self._source.to_plain_json(), n_vocab=self._tokenizer.vocab_size, eos_token=self._eos)

    def _get(self) -> LLTokenizer:
        with self._lock:
            return self._tokenizer

    def _get_plain(self) -> LLTokenizer:
        """Return the tokenizer that makes no special token of any text."""
        with self._lock:
            return self._plain_tokenizer

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token; those of a special token are its name."""
        return self._get().decode_bytes([token_id])

    def spelled(self, token_id: int) -> list[int]:
        """Return the tokens of the letters that a special token is called by."""
        return self._get_plain().tokenize_bytes(self.token_bytes(token_id))

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` as an answer would hold it: a special token's name is its letters.

        Raises `OptionError`.
        """
        tokenizer = self._get()
        try:
            ids = tokenizer.tokenize_str(text)
        except UnicodeEncodeError:
            raise OptionError("a choice is not valid Unicode text; write it in UTF-8") from None
        if any(map(tokenizer.is_special_token, ids)):
            return self._get_plain().tokenize_str(text)
        return ids

    def matcher(self, constraint: Constraint, sampler: Sampler, lead: str = "") -> GrammarMatcher:
        """Return a matcher for one answer after the response prefix `lead`. Raises `OptionError`."""
        from llguidance import LLMatcher

        from edgevlm.decoding.json_schema import parser_limits

        matcher = LLMatcher(self._get(), constraint.after(lead), log_level=0, limits=parser_limits())
        return GrammarMatcher(matcher, sampler, self._eos, self.spelled)


class GrammarMatcher(TokenSelector):
    """Masks the logits to the tokens that the grammar allows.

    Where it allows one text only, the tokens of that text are `fast_forward`: selected without logits, so that one step
    processes all of them.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        sampler: Sampler,
        eos_token_ids: Sequence[int],
        spelled: Callable[[int], list[int]],
    ) -> None:
        """`spelled` returns the tokens of the letters that a special token is called by."""
        super().__init__(sampler)
        self._matcher, self._spelled = matcher, spelled
        self._eos = frozenset(eos_token_ids)
        self._pending: deque[int] = deque()
        self._look_ahead()
        if not self._matcher.is_stopped():
            self._bits()  # a constraint that no token satisfies is refused before the answer begins

    @property
    def fast_forward(self) -> list[int]:
        return list(self._pending)

    @property
    def finished(self) -> bool:
        return not self._pending and self._matcher.is_stopped()

    @property
    def satisfied(self) -> bool:
        return not self._pending and self._matcher.is_accepting()

    def select(self, logits: Logits) -> int:
        if self._pending:
            self.fast_forward_tokens += 1
            return self._pending.popleft()
        token = super().select(np.where(self._allowed(len(logits)), logits, np.float32(-np.inf)))
        if token not in self._eos:
            self._matcher.consume_token(token)
            self._look_ahead()
        return token

    def filter_draft(self, draft: Sequence[int]) -> list[int]:
        return list(draft[: self._matcher.validate_tokens(list(draft))])

    def _allowed(self, size: int) -> npt.NDArray[np.bool_]:
        """Return which of the first `size` tokens are allowed next, `(size,)`."""
        return np.unpackbits(self._bits(), count=size, bitorder="little").view(np.bool_)

    def _bits(self) -> npt.NDArray[np.uint8]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        if not bits.any():
            raise OptionError("the constraint asks for text that the model has no tokens for")
        return bits

    def _look_ahead(self) -> None:
        forced = self._matcher.compute_ff_tokens()
        while forced:
            valid = self._matcher.validate_tokens(forced)
            self._take(forced[:valid])
            if valid < len(forced):
                self._take(self._as_asked(forced[valid]))
            forced = forced[valid + 1 :]
        self._check()

    def _as_asked(self, token: int) -> list[int]:
        """Return the letters of a special token's name, or the token where the grammar asks for the token itself.

        llguidance makes the token of its name in a text, which its own parser then refuses. The end token it never
        calls valid, though it takes it where the grammar asks for it.
        """
        letters = self._spelled(token)
        return letters if self._matcher.validate_tokens(letters) == len(letters) else [token]

    def _take(self, tokens: Sequence[int]) -> None:
        self._matcher.consume_tokens(list(tokens))
        self._pending.extend(tokens)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise OptionError(f"the constraint cannot be followed: {_first_lines(self._matcher.get_error())}")
