"""Function calling: what the model is told of the tools, the form its answer has, and the calls read out of it.

A small model follows no convention reliably, so its answer is decoded under a constraint: a call is always
`<tool_call>{"name": …, "arguments": …}</tool_call>` with arguments of the function's schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import uuid4

from edgevlm.answer import Answer
from edgevlm.decoding.structured import Constraint
from edgevlm.server.errors import ApiError, blaming
from edgevlm.server.schemas import ChatRequest, Function, NamedTool
from edgevlm.strict_json import write_json

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_CALL = re.compile(OPEN + r'\{"name": "([^"]+)", "arguments": (.*)\}' + CLOSE, re.DOTALL)
_IN_PARTS = {"$ref", "allOf", "anyOf", "oneOf", "patternProperties"}
"""With these, what a function names stands elsewhere too, and nothing is closed."""


@dataclass(frozen=True)
class Tools:
    """The functions of a request that may be called."""

    functions: Sequence[Function]
    required: bool
    """Whether one must be called."""
    content: Constraint | None
    """The form of an answer that calls none; None lets it be any text."""

    @property
    def instructions(self) -> str:
        """Return what the model is told."""
        described = "\n".join(
            write_json({"name": each.name, "description": each.description, "parameters": each.parameters})
            for each in self.functions
        )
        when = "Call one of these functions" if self.required else "You may call one of these functions"
        return f'{when} by writing {OPEN}{{"name": ..., "arguments": {{...}}}}{CLOSE}:\n{described}'

    @property
    def constraint(self) -> Constraint:
        """Return the form of the answer: a call, or, unless one is required, a content that begins like none.

        JSON begins like none: there is no `<` before its first brace, bracket or quote. Raises `ApiError`.
        """
        forms = {f"arguments_{number}": _arguments(each) for number, each in enumerate(self.functions)}
        rules = [f"call_{number}: {_call(number, each)}" for number, each in enumerate(self.functions)]
        ways = [f"call_{number}" for number in range(len(self.functions))]
        if not self.required and self.content:
            ways.append("@content")
            forms["content"] = self.content
        elif not self.required:
            ways.append("TEXT")
            rules.append(r"TEXT: /[^<](.|\n)*/")
        with blaming("tools"):
            return Constraint.lark("\n".join([f"start: {' | '.join(ways)}", *rules]), forms)


def _arguments(function: Function) -> Constraint:
    """Return the form of a call's arguments: none that the function does not name, unless its schema says otherwise."""
    with blaming("tools", f"the parameters of {function.name}"):
        parameters = function.parameters or {"properties": {}}
        closed = {} if _IN_PARTS & parameters.keys() else {"additionalProperties": False}
        return Constraint.json_schema({"type": "object", **closed, **parameters})


def _call(number: int, function: Function) -> str:
    head = json.dumps(f'{OPEN}{{"name": "{function.name}", "arguments": ')
    return f"{head} @arguments_{number} {json.dumps('}' + CLOSE)}"


def choose_tools(request: ChatRequest, content: Constraint | None) -> Tools | None:
    """Return the tools that the answer may call instead of having a `content`, None when it may call none.

    Raises `ApiError`.
    """
    functions = [tool.function for tool in request.tools or ()]
    choice = request.tool_choice or "auto"
    if choice == "none" or (choice == "auto" and not functions):
        return None
    if not functions:
        raise ApiError(400, "no_tools", "tool_choice asks for a call, but there are no tools", param="tool_choice")
    if len({each.name for each in functions}) < len(functions):
        raise ApiError(400, "invalid_tools", "two tools have the same name", param="tools")
    if isinstance(choice, NamedTool):
        functions = [each for each in functions if each.name == choice.function.name]
        if not functions:
            raise ApiError(400, "unknown_tool", "tool_choice names none of the tools", param="tool_choice")
    return Tools(functions, required=choice != "auto", content=content)


def read_call(answer: Answer) -> dict[str, object] | None:
    """Return the call that an answer is, as OpenAI writes it; None for a content, or a call that was cut short.

    The arguments are passed on as the model wrote them: read and written again, 1e999 would be no JSON any more.
    """
    found = _CALL.fullmatch(answer.text) if answer.satisfied else None
    if not found:
        return None
    name, arguments = found.groups()
    return {
        "id": f"call_{uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
