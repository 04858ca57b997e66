"""Answers inside forms: a model that has only ever begun its answers itself is lost after `{"colour": "`.

Constrained decoding writes such beginnings for it. They are given, not learned; what follows them is.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

from training.scene import QA, Random, chance, pick

SHARE = 0.15
"""Share of the answers that stand in a form."""
_KEYS = (
    *("answer", "value", "reading", "result", "text", "label", "code", "state", "name", "kind", "shape"),
    *("colour", "color", "light", "count", "number", "missing", "present", "unit", "highest", "place", "x"),
)
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


def formed(pair: QA, random: Random) -> QA:
    """Return the question with its answer as it is, or in JSON as a schema or a function's arguments ask for."""
    if not chance(random, SHARE):
        return pair
    bare = _NUMBER.fullmatch(pair.answer) and chance(random, 0.5)
    quote = "" if bare else '"'
    if chance(random, 0.2):
        return replace(pair, lead='["', close='"]') if quote else replace(pair, lead="[", close="]")
    key = json.dumps(pick(random, _KEYS))
    lead, close = f"{{{key}:{pick(random, (' ', ' ', ''))}{quote}", f"{quote}}}"
    if chance(random, 0.2):
        name = json.dumps(pick(random, ("report", "show", "set", "log", "note")))
        lead, close = f'<tool_call>{{"name": {name}, "arguments": {lead}', f"{close}}}</tool_call>"
    return replace(pair, lead=lead, close=close)
