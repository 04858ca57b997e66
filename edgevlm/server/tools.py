"""Function calling: what the model is told of the tools, the form its answer has, and the calls read out of it.

A small model follows no convention reliably, so its answer is decoded under a constraint: a call is always
`<tool_call>{"name": …, "arguments": …}</tool_call>` with arguments of the function's schema.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import uuid4

from edgevlm.constraint import Constraint
from edgevlm.schema import JSON_STYLE, enforceable
from edgevlm.server.errors import ApiError
from edgevlm.server.schemas import ChatRequest, Function, NamedTool

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Tools:
    """The functions of a request that may be called."""

    functions: Sequence[Function]
    required: bool
    """Whether one must be called."""

    @property
    def instructions(self) -> str:
        """Return what the model is told."""
        described = "\n".join(
            json.dumps({"name": each.name, "description": each.description, "parameters": each.parameters})
            for each in self.functions
        )
        when = "Call one of these functions" if self.required else "You may call one of these functions"
        return f'{when} by writing {OPEN}{{"name": ..., "arguments": {{...}}}}{CLOSE}:\n{described}'

    @property
    def constraint(self) -> Constraint:
        """Return the form of the answer: a call, or, unless one is required, a text that begins like none."""
        rules = [f"call_{number}: {_call(each)}" for number, each in enumerate(self.functions)]
        calls = " | ".join(f"call_{number}" for number in range(len(self.functions)))
        start = f"start: {calls}" if self.required else f"start: TEXT | {calls}"
        return Constraint.lark("\n".join([start, *rules, *([] if self.required else [r"TEXT: /[^<](.|\n)*/"])]))


def _call(function: Function) -> str:
    head = json.dumps(f'{OPEN}{{"name": {json.dumps(function.name)}, "arguments": ')
    parameters = function.parameters or {"properties": {}, "additionalProperties": False}
    schema = json.dumps(enforceable({"type": "object", "x-guidance": JSON_STYLE, **parameters}))
    return f"{head} %json {schema} {json.dumps('}' + CLOSE)}"


def choose_tools(request: ChatRequest) -> Tools | None:
    """Return the tools that the answer may call, None when it may call none. Raises `ApiError`."""
    functions = [tool.function for tool in request.tools or ()]
    choice = request.tool_choice or ("auto" if functions else "none")
    if choice == "none":
        return None
    if not functions:
        raise ApiError(400, "no_tools", "tool_choice asks for a call, but there are no tools", param="tool_choice")
    if len({each.name for each in functions}) < len(functions):
        raise ApiError(400, "invalid_tools", "two tools have the same name", param="tools")
    if isinstance(choice, NamedTool):
        functions = [each for each in functions if each.name == choice.function.name]
        if not functions:
            raise ApiError(400, "unknown_tool", "tool_choice names none of the tools", param="tool_choice")
    return Tools(functions, required=choice != "auto")


def read_call(text: str) -> dict[str, object] | None:
    """Return the call that an answer is, as OpenAI writes it; None for a text, or a call that was cut short."""
    if not (text.startswith(OPEN) and text.endswith(CLOSE)):
        return None
    call = json.loads(text[len(OPEN) : -len(CLOSE)])
    arguments = json.dumps(call["arguments"], ensure_ascii=False)
    return {
        "id": f"call_{uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call["name"], "arguments": arguments},
    }
