"""A tiny model that thinks: its chat template has the form of Qwen3.5's, and its weights say what it says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from edgevlm.inputs.tokenizer import Tokenizer
from edgevlm_export import ExportOptions, export
from tests.conftest import make_checkpoint, make_tokenizer

ADDED = ("<think>", "</think>", "\n\n")
TURN = (
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and (preserve_thinking is defined and preserve_thinking is"
    " true or loop.index0 > ns.last) %}<think>\n{{ m.reasoning_content | default('') | trim }}\n</think>\n\n{% endif %}"
    "{% for part in m.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n"
)
HEAD = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
)
ALWAYS = HEAD + "<think>\n{{ start | default('') }}{% endif %}"
"""A template without a way round the thought; `start` is what the tests let the model begin with."""
TEMPLATE = HEAD + (
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% else %}"
    "<think>\n{{ start | default('') }}{% endif %}{% endif %}"
)


def make_thinking_tokenizer() -> Any:
    """Return the tests' tokenizer with the tokens of a thought, which are not special, and one for a blank line."""
    from transformers import AddedToken

    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(each, special=False, normalized=False) for each in ADDED])
    return tokenizer


class Script:
    """Token ids that the model says, each after the one before."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        words = [number for number in range(100, tokenizer.size) if tokenizer.token(number)[:1] == "Ġ"]
        words = [number for number in words if len(tokenizer.token(number)) > 2]
        self._encode = tokenizer.encode
        self.thought = [*words[:4], *tokenizer.encode("漢")]
        self.answer = [*tokenizer.encode("é"), *words[4:8]]
        self.loop = words[8:13]
        """A thought that never ends, after `L`."""
        self.close, self.blank = self.one("</think>"), self.one("\n\n")
        self.end = self.one("<end_of_utterance>")

    def one(self, text: str) -> int:
        """Return the only token of a text."""
        [token] = self._encode(text, add_special_tokens=False)
        return token

    @property
    def chains(self) -> Iterable[Sequence[int]]:
        """What follows what: a thought and its answer; thoughts that do not end, and end with the end token."""
        yield [self.one("\n"), *self.thought, self.close, self.blank, *self.answer, self.end]
        yield [self.one("L"), *self.loop, self.loop[0]]
        yield [self.one("E"), self.end]


def export_thinking_model(folder: Path) -> Path:
    """Export a model whose next token depends on the last one alone, as its script says."""
    checkpoint = make_checkpoint(
        folder / "thinking", "idefics3", tokenizer=make_thinking_tokenizer(), template=TEMPLATE, num_hidden_layers=1
    )
    write_script(checkpoint / "model.safetensors", Script(Tokenizer(checkpoint)).chains)
    return export(checkpoint, folder / "export", ExportOptions(precision="fp32", verify=False)).folder


def write_script(path: Path, chains: Iterable[Sequence[int]]) -> None:
    """Let the decoder's layers add nothing, and give each token a direction of its own that the head reads."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "text_model" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[:] = 0
    [embeddings] = (tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    head, norm = tensors["lm_head.weight"], tensors["model.text_model.norm.weight"]
    embeddings[:], head[:], norm[:] = 0, 0, 1
    said: dict[int, int] = {}
    for chain in chains:
        for token, following in pairwise(chain):
            assert said.setdefault(token, following) == following, "a token has one successor"
            place = list(said).index(token)
            embeddings[token, place], head[following, place] = 1, 4
    assert len(said) <= embeddings.shape[1]
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path, {"format": "pt"})
