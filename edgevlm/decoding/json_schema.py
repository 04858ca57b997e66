"""A JSON Schema as llguidance holds it to the letter: rewritten where need be, or refused by the keyword at fault.

llguidance says itself what it does not know. What is here it takes and then lets a wrong value through, or finds no
next token in the middle of an answer.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import cache
from typing import TYPE_CHECKING, Any, TypeGuard

from edgevlm.decoding.patterns import FORMATS, has_control, translate
from edgevlm.decoding.subschemas import BOUNDS, Document, Node, listed, mapped, refuse

if TYPE_CHECKING:
    from llguidance import LLParserLimits, LLTokenizer
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
MOST_CHARACTERS = 200_000
"""Of the shortest text that a schema allows, which llguidance writes out at once where it leaves no choice."""
MOST_DEPTH = 200
"""Of parts within parts: llguidance goes into them by recursion, with some kilobytes of stack for each, and where the
stack ends, the process does."""
MOST_REMAINDERS = 10_000
"""Of all multiples together: llguidance has a state for each remainder, all of them made before the first token."""


def enforceable(schema: Mapping[str, Any]) -> Node:
    """Return a schema of the same meaning that llguidance holds. Raises `OptionError`, naming the keyword."""
    held: Node = json.loads(json.dumps(schema))
    style = held.get("x-guidance")
    if isinstance(style, dict):
        style.setdefault("json_allowed_escapes", STRING_ESCAPES)
    document = Document(held)
    if document.depth() > MOST_DEPTH:
        raise refuse(
            "$ref" if document.targets else "type", f"its parts lie more than {MOST_DEPTH} deep in one another"
        )
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
    left = MOST_REMAINDERS
    for group in document.groups:
        left -= _remainders({abs(node["multipleOf"]) for node in group if _is_number(node.get("multipleOf"))})
        if left < 0:
            raise refuse("multipleOf", f"more than {MOST_REMAINDERS:,} remainders would have to be told apart")
    # llguidance looks for a multiple within the bounds by rounded division, and reckons a common one in 32 bits.
    for node in document.nodes:
        rules = {key: node[key] for key in ("multipleOf", *BOUNDS) if key in node}
        kind = "integer" if node.get("type") == "integer" else "number"
        if "multipleOf" in rules and len(rules) > 1 and not _goes_on({"type": kind, **rules}):
            raise refuse("multipleOf", f"no multiple of {node['multipleOf']} is within the bounds")


def _remainders(values: set[float]) -> int:
    """Return how many remainders the common multiple of `values` has, by each decimal place."""
    numbers = [Decimal(repr(value)) for value in values if 0 < value < math.inf]
    places = max((max(0, -int(number.as_tuple().exponent)) for number in numbers), default=0)
    whole = [int(number.scaleb(places)) for number in numbers]
    if len(whole) > 1 and math.lcm(*whole) * max(whole) >= 2**32:
        raise refuse("multipleOf", "the common multiple of several is too large to be held")
    return _states(math.lcm(*whole)) * (places + 1) if whole else 0


def _states(multiple: int) -> int:
    """Return how many states llguidance makes for a multiple at most: zeros at its end cost little."""
    significant = int(str(multiple).rstrip("0"))
    return min(multiple, 100 * significant)


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

    matcher = LLMatcher(_bytes(), grammar, log_level=0, limits=parser_limits())
    if matcher.is_error() or not matcher.consume_tokens(list(text.encode())):
        return True
    return any(matcher.compute_bitmask()) and not matcher.is_error()


@cache
def parser_limits() -> LLParserLimits:
    """Return how much llguidance may do for one grammar, and for one token."""
    from llguidance import LLParserLimits

    # As set by llguidance, they end an answer at an object of five hundred optional properties.
    return LLParserLimits(max_items_in_row=100_000, step_max_items=1_000_000)


@cache
def _bytes() -> LLTokenizer:
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def _check_ends(document: Document) -> None:
    """Refuse a part of which every instance would hold another of its kind, without end or as good as without."""
    sizes: dict[int, float] = {}

    def size(part: Any) -> float:
        return sizes.get(id(part), math.inf) if isinstance(part, dict) else 1

    holders: dict[int, list[Node]] = {}
    for node in document.nodes:
        for part in document.following(node):
            holders.setdefault(id(part), []).append(node)
    waiting, queued = deque(document.nodes[::-1]), {id(node) for node in document.nodes}
    while waiting:
        node = waiting.popleft()
        queued.discard(id(node))
        least = _least_size(node, document, size)
        if least > MOST_CHARACTERS and least != math.inf:
            why = f"the shortest text that satisfies it has more than {MOST_CHARACTERS:,} letters"
            raise refuse(_at_fault(node), why)
        if id(node) not in sizes and least != math.inf:
            sizes[id(node)] = least
            again = [each for each in holders.get(id(node), ()) if id(each) not in sizes and id(each) not in queued]
            waiting += again
            queued |= set(map(id, again))
    for node in document.nodes[::-1]:
        if id(node) not in sizes and id(node) in document.targets:
            raise refuse("$ref", f"{node['$ref'][:80]} leads back to itself without end")


def _at_fault(node: Node) -> str:
    known = ("minItems", "prefixItems", "items", "required", "const", "enum", "$ref", "allOf", "anyOf", "oneOf")
    return next((key for key in known if key in node), "type")


def _least_size(node: Node, document: Document, size: Callable[[Any], float]) -> float:
    """Return about how many characters an instance has at least, infinite as long as it is not known to end."""
    together = [document.targets.get(id(node)), *listed(node, "allOf")]
    choices = [listed(node, key) for key in ("anyOf", "oneOf") if listed(node, key)]
    least = max(*map(size, together), *(min(map(size, each)) for each in choices), 1)
    if least == math.inf:
        return least
    kinds = _kinds(node, id(node) in document.alone)
    ways: list[float] = []
    if literals := [node["const"]] if "const" in node else listed(node, "enum"):
        ways.append(min(len(json.dumps(each)) for each in literals))
    elif "enum" in node or kinds - {"array", "object"}:
        ways.append(1)
    if "object" in kinds:
        names = sum(len(name) for name in listed(node, "required") if isinstance(name, str))
        ways.append(names + _total(min(map(size, each)) for each in _needed_values(node)))
    if "array" in kinds:
        first, count, rest = _needed_items(node)
        ways.append(_total(map(size, first)) + (count * size(rest) if count else 0))
    return max(least, min(ways, default=math.inf))


def _total(sizes: Iterable[float]) -> float:
    total = 1.0
    for each in sizes:
        total += each
        if total == math.inf:
            break
    return total


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


def _needed_items(node: Node) -> tuple[list[Any], int, Any]:
    """Return the first items that an array has at least, how many more, and what those are."""
    items, least = node.get("items", True), node.get("minItems", 0)
    first, rest = (
        (items, node.get("additionalItems", True)) if isinstance(items, list) else (listed(node, "prefixItems"), items)
    )
    least = least if isinstance(least, int) else 0
    return first[:least], max(0, least - len(first)), rest
