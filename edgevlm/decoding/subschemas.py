"""The parts of a JSON Schema: which an answer can come to, where each `$ref` leads, which speak of one value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any
from urllib.parse import unquote, urljoin

from edgevlm.errors import OptionError

Node = dict[str, Any]

MAPS = ("properties", "patternProperties", "$defs", "definitions")
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
SINGLE = ("items", "additionalItems", "additionalProperties")
ITEMS = ("items", "prefixItems", "additionalItems")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
RULES = {*MAPS[:2], *LISTS, *SINGLE, *BOUNDS, "type", "required", "minItems", "minProperties", "multipleOf"}


def refuse(keyword: str, why: str) -> OptionError:
    return OptionError(f"the JSON schema cannot be used: {keyword}: {' '.join(why.split())[:200]}")


def listed(node: Node, key: str) -> list[Any]:
    value = node.get(key)
    return value if isinstance(value, list) else []


def mapped(node: Node, key: str) -> dict[str, Any]:
    value = node.get(key)
    return value if isinstance(value, dict) else {}


class Document:
    """The parts of a schema that an answer can come to, and where each `$ref` leads."""

    def __init__(self, root: Node) -> None:
        self._named: dict[str, Any] = {"": root}
        self._base: dict[int, str] = {}
        self.targets: dict[int, Any] = {}
        self._index(root, "")
        self.nodes = self._reach(root)

    @cached_property
    def groups(self) -> list[list[Node]]:
        """The parts that speak of one value, together: llguidance makes one of them."""
        return _Groups(self).found()

    @cached_property
    def alone(self) -> set[int]:
        """The parts that are the only ones to speak of their value, by `id`."""
        return {id(node) for group in self.groups if len(group) == 1 for node in group}

    def following(self, node: Node) -> Iterator[Node]:
        """Yield the parts that a part leads to."""
        parts = [*_parts(node, skip=("$defs", "definitions")), self.targets.get(id(node))]
        return (part for part in parts if isinstance(part, dict))

    def depth(self) -> int:
        """Return how many parts lie within one another at most; of those that lead to each other all count (Tarjan)."""
        order: dict[int, int] = {}
        lowest: dict[int, int] = {}
        depths: dict[int, int] = {}
        stack: list[Node] = []
        work = [(self.nodes[0], self.following(self.nodes[0]))]
        while work:
            node, parts = work[-1]
            if id(node) not in order:
                order[id(node)] = lowest[id(node)] = len(order)
                stack.append(node)
            for part in parts:
                if id(part) not in order:
                    work.append((part, self.following(part)))
                    break
                if id(part) not in depths:
                    lowest[id(node)] = min(lowest[id(node)], order[id(part)])
            else:
                work.pop()
                if work:
                    above = id(work[-1][0])
                    lowest[above] = min(lowest[above], lowest[id(node)])
                if lowest[id(node)] == order[id(node)]:
                    at = next(at for at in range(len(stack) - 1, -1, -1) if stack[at] is node)
                    cycle = {id(each): each for each in stack[at:]}
                    del stack[at:]
                    below = (id(part) for each in cycle.values() for part in self.following(each))
                    deepest = max((depths[each] for each in below if each not in cycle), default=0)
                    depths |= dict.fromkeys(cycle, len(cycle) + deepest)
        return depths[id(self.nodes[0])]

    def _index(self, root: Node, base: str) -> None:
        waiting = [(root, base)]
        while waiting:
            node, base = waiting.pop()
            name, anchor = node.get("$id"), node.get("$anchor")
            if isinstance(name, str):
                base = urljoin(base, name)
                self._named[base.removesuffix("#")] = node
            if isinstance(anchor, str):
                self._named[f"{base}#{anchor}"] = node
            self._base[id(node)] = base.partition("#")[0]
            waiting += [(part, base) for part in _parts(node) if isinstance(part, dict)]

    def _reach(self, root: Node) -> list[Node]:
        found, waiting = {id(root): root}, [root]
        while waiting:
            node = waiting.pop()
            if isinstance(node.get("$ref"), str):
                self.targets[id(node)] = self._resolve(node["$ref"], self._base[id(node)])
            new = {id(part): part for part in self.following(node) if id(part) not in found}
            found |= new
            waiting += new.values()
        return list(found.values())

    def _resolve(self, ref: str, base: str) -> Any:
        url, _, fragment = ref.partition("#")
        url = urljoin(base, url) if url else base
        try:
            if fragment and not fragment.startswith("/"):
                return self._named[f"{url}#{fragment}"]
            target = self._named[url]
            for step in unquote(fragment).split("/")[1:]:
                key = step.replace("~1", "/").replace("~0", "~")
                target = target[int(key)] if isinstance(target, list) else target[key]
        except (LookupError, TypeError, ValueError):
            raise refuse("$ref", f"{ref[:80]} is not in the schema, and nothing is fetched") from None
        if isinstance(target, dict) and id(target) not in self._base:
            self._index(target, url)
        return target


def _parts(node: Node, skip: Iterable[str] = ()) -> Iterator[Any]:
    for key, value in node.items():
        if key in MAPS and key not in skip and isinstance(value, dict):
            yield from value.values()
        elif key in LISTS and isinstance(value, list):
            yield from value
        elif key in SINGLE:
            yield value


class _Groups:
    """Puts the parts together that may speak of one value; rather too many than too few."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._group = {id(node): [node] for node in document.nodes}
        self._changed: dict[int, list[Node]] = {}
        """Groups whose parts' own parts have still to be put together."""

    def found(self) -> list[list[Node]]:
        for node in self._document.nodes:
            choices = [part for key in ("allOf", "anyOf", "oneOf") for part in listed(node, key)]
            self._join([node, self._document.targets.get(id(node)), *choices])
        self._changed = {id(group): group for group in self._all()}
        while self._changed:
            self._join_values(self._changed.popitem()[1])
        return [[node for node in group if node.keys() & RULES] for group in self._all()]

    def _all(self) -> list[list[Node]]:
        return list({id(group): group for group in self._group.values()}.values())

    def _join(self, parts: Iterable[Any]) -> None:
        groups = {id(group): group for part in parts if (group := self._group.get(id(part)))}
        if len(groups) > 1:
            largest, *others = sorted(groups.values(), key=len, reverse=True)
            for group in others:
                largest += group
                self._group |= dict.fromkeys(map(id, group), largest)
                self._changed.pop(id(group), None)
            self._changed[id(largest)] = largest

    def _join_values(self, group: Sequence[Node]) -> None:
        """Join what is said of one property, or of one item."""
        named: dict[str, list[Any]] = {}
        for node in group:
            for name, value in mapped(node, "properties").items():
                named.setdefault(name, []).append(value)
        patterns = [value for node in group for value in mapped(node, "patternProperties").values()]
        others = [node.get("additionalProperties") for node in group] if len(group) > 1 else []
        for values in named.values():
            self._join([*values, *patterns, *others])
        if len(group) > 1:
            self._join([*patterns, *others])
            items = [part for node in group for key in ITEMS for part in listed(node, key)]
            self._join([*items, *(node.get(key) for node in group for key in ITEMS)])
