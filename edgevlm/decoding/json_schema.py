"""A JSON Schema as llguidance holds it to the letter: rewritten where need be, or refused by the keyword at fault.

llguidance says itself what it does not know. What is here it takes and then lets a wrong value through, or finds no
next token in the middle of an answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cache
from typing import TYPE_CHECKING, Any, TypeGuard

from edgevlm.decoding.patterns import FORMATS, has_control, translate
from edgevlm.decoding.subschemas import BOUNDS, Document, Node, listed, mapped, refuse

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from llguidance._lib import JsonCompileOptions

# No `\u…`: llguidance would take `{"\u0061": …}` for a name other than `a`, which may have any value.
STRING_ESCAPES = 'nrbtf\\"'
JSON_STYLE: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": STRING_ESCAPES,
}
"""JSON as `json.dumps` writes it: whitespace left to chance is what a small model loses itself in. A schema may say
otherwise with llguidance's `x-guidance`."""

LARGEST = 2**53  # llguidance reckons in doubles
MOST_ITEMS = 10_000  # which is more than an answer can hold


def enforceable(schema: Mapping[str, Any]) -> Node:
    """Return a schema of the same meaning that llguidance holds. Raises `OptionError`, naming the keyword."""
    held: Node = json.loads(json.dumps(schema))
    style = held.get("x-guidance")
    if isinstance(style, dict):
        style.setdefault("json_allowed_escapes", STRING_ESCAPES)
    document = Document(held)
    _check_ends(document)
    for node in document.nodes:
        _check_numbers(node)
        _check_counts(node)
        _rewrite(node)
    _check_multiples(document)
    _check_names(document)
    return held


def _rewrite(node: Node) -> None:
    """Write anew what llguidance reads in another way than JSON Schema does."""
    # It reads what stands on either side of `allOf` and the like apart, even where the one is about the other.
    _put_beside(node, "items", "additionalItems")
    _put_beside(node, "minimum", "exclusiveMinimum")
    _put_beside(node, "maximum", "exclusiveMaximum")
    if {"prefixItems", "additionalItems"} <= node.keys():
        raise refuse("additionalItems", "prefixItems goes with items instead")
    if isinstance(node.get("pattern"), str):
        node["pattern"] = _translated("pattern", node["pattern"])
    if isinstance(node.get("patternProperties"), dict):
        patterns = node["patternProperties"].items()
        node["patternProperties"] = {_translated("patternProperties", key): value for key, value in patterns}
    known = FORMATS.get(node["format"]) if isinstance(node.get("format"), str) else None
    if node.get("format") == "unknown":
        raise refuse("format", "unknown is no format")
    if known:
        del node["format"]
        _add(node, {"pattern": f"^{known}$"})
    kinds = [node["type"]] if isinstance(node.get("type"), str) else listed(node, "type")
    if "number" in kinds and not {"multipleOf", *BOUNDS} & node.keys():
        # With a bound it writes no exponent: 1e999 would be read as infinite.
        signs: list[Node] = [{"type": "number", "minimum": 0}, {"type": "number", "exclusiveMaximum": 0}]
        _add(node, {"anyOf": [*signs, *({"type": kind} for kind in kinds if kind != "number")]})


def _add(node: Node, rule: Node) -> None:
    """Hold a rule together with a part's own, after them, which leaves the order of properties as it was."""
    if isinstance(node.get("allOf", []), list):
        node["allOf"] = [*listed(node, "allOf"), rule]


def _put_beside(node: Node, first: str, second: str) -> None:
    if first in node and second in node:
        value = node.pop(second)
        items = list(node.items())
        at = list(node).index(first) + 1
        node.clear()
        node.update([*items[:at], (second, value), *items[at:]])


def _translated(keyword: str, pattern: str) -> str:
    try:
        return translate(pattern)
    except ValueError as error:
        raise refuse(keyword, f"{pattern[:80]} cannot be followed: {error}") from None


def _check_numbers(node: Node) -> None:
    for key in ("const", "enum"):
        if key in node:
            _check_literal(key, node[key])
    for key in BOUNDS:
        value = node.get(key)
        if _is_number(value) and abs(value) >= LARGEST and not _is_held(key, value, node.get("type") == "integer"):
            raise refuse(key, f"{str(value)[:40]} is beyond what is held exactly, 2**53")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_literal(keyword: str, value: Any) -> None:
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict | list):
            waiting += each.values() if isinstance(each, dict) else each
        elif _is_number(each) and abs(each) > LARGEST:
            raise refuse(keyword, f"{str(each)[:40]} is beyond what is held exactly, 2**53")
        elif isinstance(each, str) and has_control(each):
            raise refuse(keyword, f"{json.dumps(each)[:80]} has a control character")


def _is_held(keyword: str, bound: float, integer: bool) -> bool:
    """Tell whether a large bound, as llguidance rounds it, lets nothing through beyond it."""
    if not bound < 2**64 > -bound or keyword.startswith("exclusive"):
        return False
    held = min(int(float(bound)), 2**63 - 1) if integer else int(Decimal(repr(float(bound))))
    return held >= bound if keyword == "minimum" else held <= bound


def _check_counts(node: Node) -> None:
    if isinstance(node.get("minItems"), int) and node["minItems"] > MOST_ITEMS:
        raise refuse("minItems", f"{node['minItems']} is more than an answer can hold")
    named, least = listed(node, "required"), node.get("minProperties")
    unnamed = node.get("additionalProperties", True) is not False or node.get("patternProperties")
    if isinstance(least, int) and least > len(set(map(str, named))) + 1 and unnamed:
        # A name that the schema does not give may come twice in an answer, and counts once.
        raise refuse("minProperties", f"{least} is not held where names are free; name them in required")


def _check_multiples(document: Document) -> None:
    # llguidance looks for a multiple within the bounds by rounded division, and reckons a common one in 32 bits.
    for node in document.nodes:
        rules = {key: node[key] for key in ("multipleOf", *BOUNDS) if key in node}
        kind = "integer" if node.get("type") == "integer" else "number"
        if "multipleOf" in rules and len(rules) > 1 and not _goes_on({"type": kind, **rules}):
            raise refuse("multipleOf", f"no multiple of {node['multipleOf']} is within the bounds")
    for group in document.groups:
        _check_common_multiple({abs(node["multipleOf"]) for node in group if _is_number(node.get("multipleOf"))})


def _check_common_multiple(values: set[float]) -> None:
    if len(values) > 1 and all(0 < value < 2**32 for value in values):
        numbers = [Decimal(repr(value)) for value in values]
        places = max(0, *(-int(number.as_tuple().exponent) for number in numbers))
        whole = [int(number.scaleb(places)) for number in numbers]
        if math.lcm(*whole) * max(whole) >= 2**32:
            raise refuse("multipleOf", "the common multiple of several is too large to be held")


def _check_names(document: Document) -> None:
    """Refuse an object that asks for more names than there are: a comma would have nothing to follow it."""
    for group in document.groups:
        patterns = list(dict.fromkeys(key for node in group for key in mapped(node, "patternProperties")))
        names = sorted(set().union(*map(_names, group)))
        is_open = all(node.get("additionalProperties", True) is not False for node in group)
        # Of several parts one may close the other's patterns, so that each has to have names of its own.
        for each in [patterns] if len(group) == 1 else [[pattern] for pattern in patterns]:
            if each and not _names_are_left(each, names, is_open):
                raise refuse("patternProperties", f"properties gives every name that {each[0][:80]} matches")


def _names(node: Node) -> set[str]:
    names = [*mapped(node, "properties"), *listed(node, "required")]
    return {name for name in names if isinstance(name, str)}


def _names_are_left(patterns: Iterable[str], names: Sequence[str], is_open: bool) -> bool:
    """Tell whether an object with all of these names can have another that one of the patterns matches."""
    nothing: Node = {"const": None}
    probe = {
        "type": "object",
        "properties": dict.fromkeys(names, nothing),
        "required": names,
        "patternProperties": dict.fromkeys(patterns, nothing),
        "additionalProperties": nothing if is_open else False,
        "minProperties": len(names) + 1,
    }
    return _goes_on(probe, "{" + "".join(f"{json.dumps(name, ensure_ascii=False)}: null, " for name in names))


def _goes_on(schema: Node, text: str = "") -> bool:
    from llguidance import LLMatcher

    try:
        return goes_on(LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=JSON_STYLE), text)
    except ValueError:
        return True  # what is no JSON or no Unicode: llguidance says so


def goes_on(grammar: str, text: str = "") -> bool:
    """Tell whether there is a next byte, or an end, after a text that a grammar allows; true for what is no grammar."""
    from llguidance import LLMatcher

    matcher = LLMatcher(_bytes(), grammar, log_level=0)
    if matcher.is_error() or not matcher.consume_tokens(list(text.encode())):
        return True
    return any(matcher.compute_bitmask()) and not matcher.is_error()


@cache
def _bytes() -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _check_ends(document: Document) -> None:
    """Refuse a part of which every instance would hold another of its kind, and so on without end."""
    ended: set[int] = set()

    def ends(part: Any) -> bool:
        return not isinstance(part, dict) or id(part) in ended

    def settle(node: Node) -> bool:
        if _can_end(node, document, ends):
            ended.add(id(node))
        return id(node) in ended

    waiting, before = document.nodes[::-1], -1
    while waiting and len(waiting) != before:
        before, waiting = len(waiting), [node for node in waiting if not settle(node)]
    for node in waiting:
        if id(node) in document.targets:
            raise refuse("$ref", f"{node['$ref'][:80]} leads back to itself without end")


def _can_end(node: Node, document: Document, ends: Callable[[Any], bool]) -> bool:
    choices = [listed(node, key) for key in ("anyOf", "oneOf") if listed(node, key)]
    if not all(map(ends, [document.targets.get(id(node)), *listed(node, "allOf")])) or not all(
        any(map(ends, each)) for each in choices
    ):
        return False
    kinds = _kinds(node, id(node) in document.alone)
    return (
        bool({"const", "enum"} & node.keys() or kinds - {"array", "object"})
        or ("object" in kinds and all(any(map(ends, each)) for each in _needed_values(node)))
        or ("array" in kinds and all(map(ends, _needed_items(node))))
    )


def _kinds(node: Node, alone: bool) -> set[str]:
    if "type" in node:
        return {node["type"]} if isinstance(node["type"], str) else set(map(str, listed(node, "type")))
    # Another part may name the type: what is said of objects is then taken to be of nothing else.
    if alone or not {"required", "minItems"} & node.keys():
        return {"null"}
    return {"object" if "required" in node else "array"}


def _needed_values(node: Node) -> Iterator[list[Any]]:
    """Yield for each value that an object has at least what it may be, any one of several."""
    given, patterns = mapped(node, "properties"), mapped(node, "patternProperties")
    free = [*patterns.values(), node.get("additionalProperties", True)]
    required = [name for name in listed(node, "required") if isinstance(name, str)]
    for name in required:
        yield [given[name]] if name in given else free
    if isinstance(least := node.get("minProperties"), int) and least > len(required):
        yield [*given.values(), *free]


def _needed_items(node: Node) -> list[Any]:
    items, least = node.get("items", True), node.get("minItems", 0)
    first, rest = (
        (items, node.get("additionalItems", True)) if isinstance(items, list) else (listed(node, "prefixItems"), items)
    )
    least = least if isinstance(least, int) else 0
    return [*first[:least], *([rest] if least > len(first) else [])]
