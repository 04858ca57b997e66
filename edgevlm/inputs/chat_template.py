"""The checkpoint's chat template, rendered in Jinja's sandbox the way transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgevlm.errors import DamagedModelError, PromptError, one_line
from edgevlm.inputs.messages import Message, text_message, user_message


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, by which templates mark what training learns from: its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    @staticmethod
    def _body(caller: Callable[[], str]) -> str:
        return caller()


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise DamagedModelError(f"the model's chat template does not parse: {one_line(error)}") from None

    def render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt for `messages`, opened for the assistant's answer. Raises `PromptError`.

        `variables` are the template's own, such as `enable_thinking`; they go before special tokens of that name.
        """
        known = {"tools": None, "documents": None, **self._special_tokens, **(variables or {})}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **known)
        except Exception as error:  # a template is a program: it may divide by zero or add a number to a text
            raise PromptError(f"the model's chat template refuses the conversation: {one_line(error)}") from None

    def response_prefix(self, variables: Mapping[str, Any] | None = None) -> str:
        """Return the whitespace that the template puts between the opened turn and its text.

        A model answers the way its template writes answers down: many begin theirs with a space.
        """
        question, answer = "question", "ANSWER"
        asked = [user_message(question, 0)]
        try:
            opened = self.render(asked, variables)
            whole = self.render([*asked, text_message("assistant", answer)], variables, add_generation_prompt=False)
        except PromptError:
            return ""
        lead = whole.removeprefix(opened).partition(answer)[0]
        return lead if whole.startswith(opened) and lead.isspace() else ""


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
