"""What a request may say that is not honoured, what may not, and how a caller is told.

Nothing that would change an answer is dropped without a word. What asks for nothing is taken out before a request is
understood: a hint, a field at the value that means the same as leaving it out, a null. Any other field that the server
does not know is refused by its name, as OpenAI does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgevlm.server.errors import FORM_PATH, SOURCE_PATH, ApiError
from edgevlm.strict_json import write_json

REQUEST_HINTS = frozenset(
    {
        "user", "safety_identifier", "store", "metadata", "service_tier", "prediction", "prompt_cache_key",
        "prompt_cache_options", "prompt_cache_retention",  # OpenAI's
        "request_id", "priority",  # vLLM's
        "cache_prompt", "id_slot", "timings_per_token",  # llama.cpp's
        "keep_alive",  # Ollama's
    }
)  # fmt: skip
"""Who asks, what for, what is kept, how fast: they leave the answer as it is."""
MESSAGE_HINTS = frozenset(
    {
        "name", "tool_call_id", "annotations",  # OpenAI's; small models' templates have no place for a name
        "id", "parsed", "reasoning", "reasoning_details", "thinking", "thinking_blocks",
        "provider_specific_fields", "tool_name", "cache_control",  # what clients send back of an answer, or for a cache
    }
)  # fmt: skip
PART_HINTS = frozenset({"cache_control", "prompt_cache_breakpoint", "uuid"})
IMAGE_HINTS = frozenset({"format"})
"""A picture's format is told from its bytes."""
TOOL_HINTS = frozenset({"cache_control"})
CALL_HINTS = frozenset({"index", "parsed_arguments", "extra_content", "provider_specific_fields"})
STREAM_HINTS = frozenset({"include_obfuscation"})

NEUTRAL: Mapping[str, Sequence[Any]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "refusal": ("",),
    "images": ([],),
    "arguments": ("",),
    "continuous_usage_stats": (False,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "min_p": (0,),
    "typical_p": (1,),
    "repetition_penalty": (1,),
    "repeat_penalty": (1,),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "echo": (False,),
    "prefix": (False,),
    "think": (False,),
    "options": ({},),
    "background": (False,),
    "context_management": ([],),
    "reasoning": ({},),
    "store": (False,),
    "truncation": ("disabled",),
    "context": ([],),
    "raw": (False,),
    "shift": (False,),
    "suffix": ("",),
    "template": ("",),
    "truncate": (False,),
    "type": ("text", "message"),  # of a message: lm-evaluation-harness's, and OpenAI's responses'
    "_debug_render_only": (False,),
}
"""Fields that are taken at these values alone, at which they ask for nothing."""
_SCHEMA = 'response_format {"type": "json_schema", "json_schema": {"name": "...", "schema": {...}}}'
_IMAGE = 'a part of the content, {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
_OPTIONS = "temperature, top_p, top_k, seed, stop and max_tokens at the top level"
INSTEAD: Mapping[str, str] = {
    **dict.fromkeys(("guided_json", "structured_outputs", "format", "json_schema", "schema"), _SCHEMA),
    **dict.fromkeys(("guided_regex", "regex"), f'{_SCHEMA}, the schema being {{"type": "string", "pattern": "..."}}'),
    **dict.fromkeys(("guided_choice", "choices"), f'{_SCHEMA}, the schema being {{"enum": ["...", "..."]}}'),
    **dict.fromkeys(("guided_grammar", "grammar", "ebnf"), _SCHEMA),
    **dict.fromkeys(("images", "image"), _IMAGE),
    **dict.fromkeys(("n_predict", "num_predict", "max_new_tokens", "max_output_tokens"), "max_tokens"),
    **dict.fromkeys(("input", "prompt"), "messages"),
    **dict.fromkeys(("system", "instructions"), 'a message with the role "system"'),
    "options": _OPTIONS,
    "reasoning": "reasoning_effort",
    "enable_thinking": "think",
    "functions": "tools",
    "function_call": "tool_choice in a request, tool_calls in a message",
}
"""What serves the purpose of a field that is another server's, or was OpenAI's."""
_FORMAT = 'text {"format": {"type": "json_schema", "name": "...", "schema": {...}}}'
_ALL_INPUT = "input with the whole conversation: this server keeps no answer"
_OPTION = 'options {"temperature": ..., "top_p": ..., "top_k": ..., "seed": ..., "stop": ..., "num_predict": ...}'
_CONVERSION = {
    **dict.fromkeys(("vlm_pipeline_model", "vlm_pipeline_preset", "vlm_pipeline_model_local"), "model"),
    **dict.fromkeys(("file", "files"), f"files in a form to POST {FORM_PATH}"),
    **dict.fromkeys(("file_sources", "http_sources"), 'sources [{"kind": "file", "base64_string": "..."}]'),
    "max_new_tokens": "max_tokens",
}
INSTEAD_AT: Mapping[str, Mapping[str, str]] = {
    "/v1/responses": {
        **dict.fromkeys(("response_format", "format", "guided_json", "structured_outputs"), _FORMAT),
        **dict.fromkeys(("previous_response_id", "conversation"), _ALL_INPUT),
        **dict.fromkeys(("max_tokens", "max_completion_tokens"), "max_output_tokens"),
        "logprobs": 'include ["message.output_text.logprobs"] or top_logprobs',
        "file_id": 'image_url "data:image/png;base64,..."',
        "store": "false: this server keeps no answer",
        "background": "stream, or wait for the answer: this server keeps none",
        "prompt": "instructions and input",
        "messages": "input",
    },
    FORM_PATH: _CONVERSION,
    SOURCE_PATH: _CONVERSION,
    "/api/chat": {
        **dict.fromkeys(("temperature", "top_p", "top_k", "seed", "stop", "num_predict", "max_tokens"), _OPTION),
        "response_format": 'format, "json" or a JSON schema',
        "prompt": "messages, or POST /api/generate",
        "system": 'a message with the role "system"',
    },
    "/api/generate": {
        **dict.fromkeys(("temperature", "top_p", "top_k", "seed", "stop", "num_predict", "max_tokens"), _OPTION),
        "response_format": 'format, "json" or a JSON schema',
        **dict.fromkeys(("messages", "context", "tools"), "POST /api/chat"),
    },
}
"""The same for other APIs, by path; those at none of them are like chat completions."""
_WORDS = {
    "missing": "is missing",
    "model_type": "must be a JSON object",
    "model_attributes_type": "must be a JSON object",
    "dict_type": "must be a JSON object",
    "union_tag_not_found": "is missing",
}


def explain(error: Mapping[str, Any], body: object, path: str = "") -> ApiError:
    """Return what a caller of `path` is told of a complaint of pydantic's: where in `body`, what is wrong and taken."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "json_invalid":
        return ApiError(400, "invalid_request", f"the request is not JSON: {context['error']}")
    steps = _path(error["loc"], body, kind)
    code, text = "invalid_request", _WORDS.get(kind, error["msg"])
    if kind == "missing" and steps[-1:] == ["schema"]:
        text = "is missing; the JSON schema itself goes there"
    if kind.startswith("union_tag"):
        steps.append(context["discriminator"].strip("'"))
    if kind == "union_tag_invalid":
        *most, last = context["expected_tags"].split(", ")
        text = f"{str(context['tag'])[:40]!r} is not known; use {', '.join(most)} or {last}"
    if kind == "unsupported":
        code = "unsupported_parameter"
    if kind == "extra_forbidden":
        code, text = "unsupported_parameter", _refusal(steps[-1], INSTEAD_AT.get(path, INSTEAD))
    place = ".".join(steps)
    return ApiError(400, code, f"{place or 'the request'}: {text}", param=place or None)


def _refusal(name: str, instead: Mapping[str, str]) -> str:
    if name in instead:
        return f"is not honoured here; use {instead[name]}"
    if name in NEUTRAL:
        return f"is not honoured here but as {' or '.join(map(write_json, NEUTRAL[name]))}; leave it out"
    return "is not known here; leave it out"


def _path(loc: Sequence[str | int], body: object, kind: str) -> list[str]:
    """Return the steps to a place in the request: pydantic's, without the tags of unions, which no request has."""
    path: list[str] = []
    at: Any = body
    for each in loc[1:]:  # the first is "body"
        if isinstance(each, int) if isinstance(at, list) else isinstance(at, dict) and each in at:
            path.append(str(each))
            at = at[each]
    return [*path, str(loc[-1])] if kind == "missing" and len(loc) > 1 else path
