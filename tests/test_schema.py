"""Whatever a schema lets a model write satisfies the schema by another's judgement, or the schema was refused."""

from __future__ import annotations

import calendar
import datetime
import itertools
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from edgevlm import VLM, Constraint, OptionError
from edgevlm.decoding.sampling import make_sampler
from edgevlm.server.errors import ApiError
from edgevlm.server.schemas import Function
from edgevlm.server.tools import Tools

BYTES = LLTokenizer("byte")
LOOP = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}
LIST = {"type": ["object", "null"], "properties": {"next": {"$ref": "#"}}, "required": ["next"]}
SCORE = {"properties": {"score": {"type": "integer"}}, "required": ["score"], "additionalProperties": False}
DRAFT4 = {"$schema": "http://json-schema.org/draft-04/schema#"}
DRAFT7 = {"$schema": "http://json-schema.org/draft-07/schema#"}


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


FAMILY: dict[str, dict[str, Any]] = {
    **{
        f"format {name}": {"type": "string", "format": name}
        for name in (
            *("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"),
        )
    },
    "format and pattern": {"type": "string", "format": "date", "pattern": "^(19|20).*(29|31)$", "minLength": 10},
    "format in a union": {"type": ["string", "null"], "format": "time", "maxLength": 9},
    "number": {"type": "number"},
    "numbers": {"type": "array", "items": {"type": ["number", "boolean"]}, "minItems": 2, "maxItems": 4},
    "bounds": {"type": "number", "exclusiveMinimum": -1.5, "maximum": 0.25},
    "small bounds": {"type": "number", "minimum": 1e-6, "exclusiveMaximum": 0.3},
    "whole within fractions": {"type": "integer", "minimum": -0.5, "maximum": 12.5, "multipleOf": 1.5},
    "cents": {"type": "number", "minimum": 0, "maximum": 20, "multipleOf": 0.05},
    "64 bits": {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
    "lengths": {"type": "string", "minLength": 2, "maxLength": 3},
    "white space": {"type": "string", "pattern": r"^\s\S.[^\s]$"},
    "a class of brackets": {"type": "string", "pattern": r"^[[&&\]~-]{2}[-][\w.-]$"},
    "literals": {"enum": [1, 2.5, -0.0, 1e-7, 'é"\\\n', None, [1, {"a": []}], {"b": 1, "a": True}]},
    "type and enum": {"type": ["string", "integer"], "enum": ["a", 1, 2.5, None]},
    "open object": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "null"}}},
    "names by pattern": {
        "type": "object",
        "properties": {"x": {"type": "null"}, "y-1": {"maximum": 9}},
        "patternProperties": {"^x": {}, "^y-": {"type": "integer"}},
        "additionalProperties": {"type": "boolean"},
    },
    "every name by pattern": {"type": "object", "patternProperties": {".*": {"type": "null"}}},
    "one of the names by pattern": {
        "type": "object",
        "properties": {"left": {"type": "null"}},
        "required": ["left"],
        "patternProperties": {"^(left|right)$": {}},
        "additionalProperties": False,
    },
    "required, not described": {"type": "object", "required": ["z"], "additionalProperties": {"type": "null"}},
    "at least one": {"type": "object", "minProperties": 1, "additionalProperties": {"type": "null"}},
    "at most two": {"type": "object", "maxProperties": 2, "additionalProperties": {"type": "null"}},
    "one of two": {**closed(), "properties": {"a": {"type": "null"}, "b": {"const": 1}}, "minProperties": 1},
    "tuple": {"type": "array", "prefixItems": [{"type": "null"}], "items": {"type": "integer"}, "minItems": 3},
    "old tuple": DRAFT7 | {"items": [{"type": "null"}], "allOf": [{"minItems": 2}], "additionalItems": {"const": 1}},
    "old bound": DRAFT4
    | {"type": "integer", "exclusiveMinimum": True, "allOf": [{"maximum": 7}], "minimum": 5},
    "all of": {"allOf": [closed(a={"type": "integer"}), {"properties": {"a": {"multipleOf": 3, "maximum": 30}}}]},
    "any of": {"properties": {"a": {"type": "null"}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    "one of": {"oneOf": [closed(kind={"const": "a"}, value={"type": "number"}), closed(kind={"const": "b"})]},
    "list": LIST,
    "tree": {
        "$ref": "#/components/schemas/Node",
        "components": {"schemas": {"Node": closed(sons={"items": {"$ref": "#/components/schemas/Node"}})}},
    },
    "by anchor": {"$ref": "#here", "$defs": {"a": {"$anchor": "here", "type": "string", "format": "date"}}},
    "by address": {
        "$id": "https://example.com/root",
        "$ref": "inner#/$defs/x",
        "$defs": {"a": {"$id": "inner", "$defs": {"x": {"type": "string", "format": "date"}}}},
    },
    "a loop that nothing leads to": {"type": "null", "$defs": {"loop": {"$ref": "#/$defs/loop"}}},
}  # fmt: skip


def is_valid(schema: Mapping[str, Any], text: str) -> bool:
    validator = jsonschema_rs.validator_for(dict(schema), validate_formats=True)
    return validator.is_valid(json.loads(text))


@cache
def grammar(schema: str) -> str:
    return Constraint.json_schema(schema).grammar


def taken(schema: Mapping[str, Any], text: str) -> bool:
    """Tell whether an answer of the schema may be this text."""
    matcher = LLMatcher(BYTES, grammar(json.dumps(schema)), log_level=0)
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


def written(vlm: VLM, constraint: Constraint, seed: int, most: int = 120) -> str | None:
    """Return what a model of no mind writes under a constraint, with a liking for ends; None if it does not end."""
    random, vocabulary = np.random.default_rng(seed), vlm.grammar_tokenizer
    guide = vocabulary.matcher(constraint, make_sampler(1.0, 1.0, 0, seed))
    size = vlm.processor.tokenizer.size
    ends = [*vlm.manifest.eos_token_ids, *(vlm.processor.tokenizer.encode(each)[-1] for each in '"}]')]
    data = b""
    for _ in range(most):
        logits = random.normal(0, 2, size).astype(np.float32)
        logits[ends] += 6
        token = guide.select(logits)
        if token not in vlm.manifest.eos_token_ids:
            data += vocabulary.token_bytes(token)
            if not guide.finished:
                continue
        return data.decode()
    return None


@pytest.mark.parametrize("name", FAMILY)
def test_what_is_written_under_a_schema_satisfies_it(vlm: VLM, name: str) -> None:
    constraint = Constraint.json_schema(FAMILY[name])
    texts = [text for seed in range(12) if (text := written(vlm, constraint, seed)) is not None]
    assert texts
    assert [text for text in texts if not is_valid(FAMILY[name], text)] == []


def test_a_date_is_a_day_of_the_calendar() -> None:
    for year in (1, 1900, 1957, 2000, 2024, 9999):
        for month, day in itertools.product(range(14), range(33)):
            exists = 1 <= month <= 12 and 1 <= day <= calendar.monthrange(year, month)[1]
            assert taken({"format": "date", "type": "string"}, f'"{year:04}-{month:02}-{day:02}"') == exists
    assert not taken({"format": "date", "type": "string"}, '"0000-01-01"')


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("time", ["23:59:59Z", "00:00:00.125+05:30"], ["12:00:60Z", "23:59:60Z", "24:00:00Z", "12:00:00"]),
        ("date-time", ["2024-02-29T00:00:00Z"], ["2023-02-29T00:00:00Z", "2024-02-29 00:00:00Z"]),
        (
            "email",
            ["first.last+tag@mail.example.org", "o'neil@[192.168.0.1]", "a@b", f"{'a' * 64}@{'b' * 62}.{'c' * 62}"],
            [f"{'a' * 65}@b", f"a@{'b' * 64}", f"{'a' * 20}.{'b' * 45}@c", "a@xn--b", "a..b@c", f"a@{'b.' * 130}c"],
        ),
        (
            "hostname",
            ["localhost", "a-b.example.com", "a.b.c.d.e.f.g.h", f"{'a' * 63}.{'b' * 63}"],
            ["a" * 64, "-a", "a-", "ab--c.com", ".".join(["a" * 60] * 5), "a."],
        ),
    ],
)  # fmt: skip
def test_a_format_is_held_to_the_letter(name: str, good: list[str], bad: list[str]) -> None:
    schema = {"type": "string", "format": name}
    assert [text for text in good if not (taken(schema, f'"{text}"') and is_valid(schema, f'"{text}"'))] == []
    assert [text for text in bad if taken(schema, f'"{text}"')] == []
    if "date" in name:
        datetime.datetime.fromisoformat(good[0])


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, r'{"\u0061": "x"}'),
        ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}}, r'{"\u0078": "x"}'),
        ({"type": "object", "x-guidance": {}, "properties": {"a": {"type": "integer"}}}, r'{"\u0061":"x"}'),
        ({"type": "string", "pattern": "^[[:alpha:]]$"}, '"b"'),
        ({"type": "string", "pattern": r"^[\w&&[^a]]$"}, '"b"'),
        ({"type": "string", "pattern": r"^\s$"}, '"\u0085"'),
        ({"type": "string", "pattern": r"^\S$"}, '"\ufeff"'),
        ({"type": "string", "pattern": "^.$"}, r'"\r"'),
        ({"type": "number"}, "1e999"),
        (FAMILY["old tuple"], "[null, 2]"),
        (FAMILY["old bound"], "5"),
    ],
)
def test_what_a_schema_forbids_is_not_written(schema: dict[str, Any], text: str) -> None:
    assert not taken(schema, text)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "#"}, r"\$ref: # leads back to itself without end"),
        (LOOP, r"\$ref: # leads back"),
        ({"anyOf": [{"type": "null"}, closed(loop={"$anchor": "a", **closed(next={"$ref": "#a"})})]}, r"\$ref: #a"),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}}, r"\$ref: #/\$defs/a"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, r"\$ref"),
        ({"type": "object", "minProperties": 1, "additionalProperties": {"$ref": "#"}}, r"\$ref"),
        ({"$ref": "#/$defs/none"}, r"\$ref: #/\$defs/none is not in the schema"),
        ({"type": "object", "patternProperties": {"^score$": {}}, **SCORE}, r"patternProperties: .*\^score\$"),
        ({"allOf": [SCORE, {"type": "object", "patternProperties": {"^score$": {}}}]}, "patternProperties"),
        ({"type": "object", "minProperties": 2}, "minProperties: 2"),
        ({"type": "object", "minProperties": 3, "required": ["a"]}, "minProperties: 3"),
        ({"type": "array", "minItems": 20_000}, "minItems: 20000"),
        ({"type": "number", "exclusiveMinimum": 0.3, "maximum": 0.35, "multipleOf": 0.1}, "multipleOf: no multiple"),
        ({"type": "integer", "minimum": 1, "maximum": 2.95, "multipleOf": 0.3}, "multipleOf: no multiple of 0.3"),
        ({"allOf": [{"type": "integer", "multipleOf": 65536}, {"multipleOf": 65537}]}, "multipleOf: the common"),
        ({"const": 2**53 + 1}, "const: 9007199254740993"),
        ({"enum": [{"a": [2**64 - 1]}]}, "enum: 18446744073709551615"),
        ({"type": "integer", "minimum": 2**53 + 1}, "minimum: 9007199254740993"),
        ({"type": "integer", "exclusiveMaximum": 2**63 - 1}, "exclusiveMaximum"),
        ({"type": "number", "maximum": 2**60}, "maximum"),
        ({"type": "integer", "minimum": 10**400}, "minimum: 10000"),
        ({"const": "a\u0001"}, "const: .* control character"),
        ({"type": "string", "pattern": r"^a\x0bb$"}, "pattern: .* control character"),
        ({"type": "string", "pattern": r"^a[\x00-\x07]$"}, "pattern: .* control character"),
        ({"type": "string", "pattern": "^[a-z--x]$"}, r"pattern: .* a hyphen in a class is written \\-"),
        ({"type": "string", "format": "unknown"}, "format: unknown"),
        ({"type": "string", "format": "idn-email"}, "Unknown format: idn-email"),
        ({"prefixItems": [{}], "items": {}, "additionalItems": False}, "additionalItems"),
        *(({key: True}, rf'Unimplemented keys: \["{key}"\]') for key in ("uniqueItems", "contains", "propertyNames")),
        *(({key: {}}, "Unimplemented keys") for key in ("not", "if", "dependentRequired", "unevaluatedProperties")),
        ({"oneOf": [{"multipleOf": 2}, {"multipleOf": 3}]}, "oneOf"),
        ({"type": "string", "const": 5}, "Unsatisfiable"),
        ({"type": "string", "format": "duration", "pattern": "^1"}, "Unsatisfiable schema: Regex is empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_held_is_refused_by_its_keyword(schema: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message) as error:
        Constraint.json_schema(schema)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    with pytest.raises(ApiError):
        _ = Tools([Function(name="tell", parameters=schema)], required=True, content=None).constraint


def test_a_large_object_is_followed(vlm: VLM) -> None:
    many = {"type": "object", "properties": {f"p{number}": {"type": "null"} for number in range(900)}}
    text = written(vlm, Constraint.json_schema(many | {"additionalProperties": False}), seed=1)
    assert text is not None
    assert is_valid(many, text)
