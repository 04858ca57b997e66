"""The checkpoint's own tokenizer, through the `tokenizers` library."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from edgevlm.errors import DamagedModelError, PromptError

TOKENIZER_FILE = "tokenizer.json"


class Tokenizer:
    """Text to token ids and back, as transformers' fast tokenizers do it."""

    def __init__(self, folder: Path) -> None:
        path = folder / TOKENIZER_FILE
        try:
            self._fast = FastTokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise DamagedModelError(f"{path} cannot be read as a tokenizer: {error}; export the model again") from None
        self._fast.no_padding()
        self._fast.no_truncation()

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, special tokens recognised and added as the checkpoint says.

        Raises `PromptError` for a text with surrogates, which stand for bytes that are not UTF-8.
        """
        try:
            return list(self._fast.encode(text).ids)
        except TypeError:
            raise PromptError("the question is not valid Unicode text; write it in UTF-8") from None

    def to_json(self) -> str:
        """Return the tokenizer in the format of `tokenizer.json`."""
        return str(self._fast.to_str())

    @property
    def size(self) -> int:
        """How many tokens there are, added ones included."""
        return int(self._fast.get_vocab_size(with_added_tokens=True))

    def token(self, token_id: int) -> str:
        """Return what a token is called."""
        return str(self._fast.id_to_token(token_id))

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids` without special tokens."""
        return str(self._fast.decode(ids, skip_special_tokens=True))

    def detokenizer(self) -> Detokenizer:
        """Return a fresh streaming detokenizer."""
        return Detokenizer(self)

    def decode_step(self, stream: DecodeStream, token_id: int) -> str:
        """Feed one id to `stream` and return the text that became whole."""
        return stream.step(self._fast, token_id) or ""


class Detokenizer:
    """Token ids in, one by one; text out as soon as its characters are whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
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
        return self._tokenizer.decode(self._ids)[self._length :]
