"""The checkpoint's own tokenizer, through the `tokenizers` library.

Special tokens are of two kinds. *Text tokens* are part of an answer (`<doctag>`, `<loc_12>` of a docling model): they
are shown, and may be written in a question. All others are *control tokens*: they shape the prompt (`<|im_end|>`,
`<image>`), and only the chat template and the family may write them. What a caller says is kept apart from them by
`escape`: a control token in it reaches the model as the letters it is made of.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from edgevlm.errors import DamagedModelError, PromptError

TOKENIZER_FILE = "tokenizer.json"
LETTERS, DIGITS = "a", "0"
"""Shapes of tokens that are part of a word, and of a number."""
_ESCAPE, _CONTROL = (f"{secrets.randbelow(10**24):024}" for _ in range(2))
"""Random digits that mark control tokens: within one that a caller wrote, after one of the prompt. No template's filter
changes digits, and nobody can guess them."""


class Tokenizer:
    """Text to token ids and back, as transformers' fast tokenizers do it."""

    def __init__(self, folder: Path, text_tokens: Collection[str] = ()) -> None:
        """`text_tokens` are the special tokens that are part of an answer."""
        path = folder / TOKENIZER_FILE
        try:
            source = path.read_text(encoding="utf-8")
            if text_tokens:
                source = _unmark(source, text_tokens)
            self._fast = _load(source)
            added = self._fast.get_added_tokens_decoder()
            self._shapes: dict[int, str] = {}
            self._added = {token.content: token_id for token_id, token in added.items()}
            self._controls = {
                token_id: token.content for token_id, token in added.items() if token.special and token.content
            }
        except Exception as error:  # the library raises bare Exception
            raise DamagedModelError(f"{path} cannot be read as a tokenizer: {error}; export the model again") from None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`: control tokens recognised, but for escaped ones, and added as the checkpoint says.

        Raises `PromptError` for a text with surrogates, which stand for bytes that are not UTF-8.
        """
        try:
            if _ESCAPE not in text:
                return list(self._fast.encode(text, add_special_tokens=add_special_tokens).ids)
            plain = self._name_controls(text).replace(_ESCAPE, "")
            return list(self._with_named_controls.encode(plain, add_special_tokens=add_special_tokens).ids)
        except TypeError:
            raise PromptError("the question is not valid Unicode text; write it in UTF-8") from None

    def escape(self, text: str, *others: str) -> str:
        """Return `text` so that `encode` makes no control token of it, whatever stands beside it by then.

        `others` are what must not be found in it either, control tokens or not.
        """
        for token in (*self._controls.values(), *others):
            while token in text:
                text = text.replace(token, token[0] + _ESCAPE + token[1:])
        return text

    def to_json(self) -> str:
        """Return the tokenizer in the format of `tokenizer.json`."""
        return str(self._fast.to_str())

    def to_plain_json(self) -> str:
        """Return the tokenizer in that format, without its control tokens' own names: no text is one of them."""
        return str(self._with_named_controls.to_str())

    @property
    def size(self) -> int:
        """How many tokens there are, added ones included."""
        return int(self._fast.get_vocab_size(with_added_tokens=True))

    def added_id(self, token: str) -> int | None:
        """Return the id of an added token, which no text is split within; None where the vocabulary has no such one."""
        return self._added.get(token)

    def token(self, token_id: int) -> str:
        """Return what a token is called."""
        return str(self._fast.id_to_token(token_id))

    def shape(self, token_id: int) -> str:
        """Return what a token is alike in: `LETTERS`, `DIGITS`, or its text with digits that all stand for others."""
        if (shape := self._shapes.get(token_id)) is None:
            text = self.decode([token_id], skip_special_tokens=False)
            shape = LETTERS if text.strip().isalpha() else re.sub(r"\d+", DIGITS, text)
            shape = self._shapes[token_id] = DIGITS if shape.strip() == DIGITS else shape
        return shape

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`, without control tokens unless they are wanted."""
        return str(self._fast.decode(ids, skip_special_tokens=skip_special_tokens))

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """Return a fresh streaming detokenizer."""
        return Detokenizer(self, skip_special_tokens)

    def decode_step(self, stream: DecodeStream, token_id: int) -> str:
        """Feed one id to `stream` and return the text that became whole."""
        return stream.step(self._fast, token_id) or ""

    def _name_controls(self, text: str) -> str:
        """Call each whole control token in `text` by a name that no caller can have written."""
        found = self._fast.encode(text, add_special_tokens=False)
        named, end = [], 0
        for token_id, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if control := self._controls.get(token_id):
                named += [text[end:start], text[start:stop].replace(control, control + _CONTROL)]
                end = stop
        return "".join([*named, text[end:]])

    @cached_property
    def _with_named_controls(self) -> FastTokenizer:
        """The same tokenizer, which knows control tokens by those names alone."""
        source = json.loads(self.to_json())
        names = {content: content + _CONTROL for content in self._controls.values()}
        for token in source["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = source["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(token, token): token_id for token, token_id in model["vocab"].items()}
        else:  # Unigram: pairs of a token and its score
            model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        fast = _load(json.dumps(source))
        assert all(fast.token_to_id(names[content]) == token_id for token_id, content in self._controls.items())
        return fast


def _load(source: str) -> FastTokenizer:
    fast = FastTokenizer.from_str(source)
    fast.no_padding()
    fast.no_truncation()
    return fast


def _unmark(source: str, text_tokens: Collection[str]) -> str:
    """Return a `tokenizer.json` in which these tokens are not special, and so are decoded like any other."""
    tokenizer = json.loads(source)
    for token in tokenizer["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in text_tokens
    return json.dumps(tokenizer)


class Detokenizer:
    """Token ids in, one by one; text out as soon as its characters are whole."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._length = 0

    def add(self, token_id: int) -> str:
        """Return the text that `token_id` completes, which may be empty."""
        self._ids.append(token_id)
        text = self._tokenizer.decode_step(self._stream, token_id)
        self._length += len(text)
        return text

    def finish(self) -> str:
        """Return what is left: characters that the last tokens began and never completed."""
        return self._tokenizer.decode(self._ids, skip_special_tokens=self._skip)[self._length :]
