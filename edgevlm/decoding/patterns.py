"""Regular expressions for llguidance: those of the string formats that it holds too loosely, and a schema's own."""

from __future__ import annotations

import re
from collections.abc import Callable

_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
# A second 60 is right only where it is 23:59 in UTC, and only on some days: no second 60 at all.
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"


def _label(size: int) -> str:
    """Return a host name's part of up to `size` characters, without the hyphens in third and fourth place of IDNA."""
    end, inner = "[a-zA-Z0-9]", "[a-zA-Z0-9-]"
    return f"{end}(?:{inner}{{0,2}}{end}|{inner}(?:{end}{inner}|-{end}){inner}{{0,{size - 5}}}{end})?"


def _atom(size: int) -> str:
    return f"[a-zA-Z0-9!#$%&'*+/=?^_`{{|}}~-]{{1,{size}}}"


def _dotted(part: Callable[[int], str], longest: int, total: int) -> str:
    """Return one to eight parts between dots: each as long as may be that all of them stay within `total`."""
    few = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8)]
    sizes = [(low, high, min(longest, (total + 1) // high - 1)) for low, high in few]
    texts = [rf"{part(size)}(?:\.{part(size)}){{{low - 1},{high - 1}}}" for low, high, size in sizes]
    return f"(?:{'|'.join(texts)})"


FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "hostname": _dotted(_label, 63, 253),
    "email": rf"{_dotted(_atom, 64, 64)}@(?:{_dotted(_label, 63, 189)}|\[{_BYTE}(?:\.{_BYTE}){{3}}\])",
}
"""Of the formats that llguidance knows, those that it holds too loosely: days and seconds that do not exist, host names
and addresses too long. What these allow is right by any reading of the standards."""

_SPACE = r"\t-\r \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff"
_NO_SPACE = (
    r"\x00-\x08\x0e-\x1f!-\u009f\u00a1-\u167f\u1681-\u1fff\u200b-\u2027\u202a-\u202e\u2030-\u205e\u2060-\u2fff"
    r"\u3001-\ufefe\uff00-\U0010ffff"
)
_ESCAPE = r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\[xu]\{[0-9a-fA-F]+\}|\\."
_TOKEN = re.compile(rf"{_ESCAPE}|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
_IN_CLASS = re.compile(rf"{_ESCAPE}|--|.", re.DOTALL)
_CODE = "0*(?:[0-7bBe-fE-F]|1[0-9a-fA-F]|7[fF])"
_CONTROL = re.compile(rf"[\x00-\x07\x0b\x0e-\x1f\x7f]|\\[av]|\\[xu]{_CODE}|\\[xu]\{{{_CODE}\}}")
"""What stands for one character that JSON can only write as `\\u00…`, which llguidance is not to let through: it would
let a name be spelled with it that the schema has a rule for."""


def has_control(text: str) -> bool:
    """Tell whether a text has a control character that JSON has no short escape for."""
    return any(_CONTROL.fullmatch(character) for character in text)


def translate(pattern: str) -> str:
    """Return a schema's pattern, written as for ECMAScript, so that Rust's `regex` matches the same.

    There, a class may hold classes and be reckoned with (`&&`, `--`, `~~`), and white space is not quite the same.
    Raises `ValueError` for what llguidance would not hold.
    """
    dot = "." if re.search(r"\(\?[a-z]*s", pattern) else r"[^\n\r\u2028\u2029]"
    return "".join(_outside_class(token, dot) for token in _TOKEN.findall(pattern))


def _outside_class(token: str, dot: str) -> str:
    if len(token) > 2 and token[0] == "[":
        head = "[^" if token[1] == "^" else "["
        return f"{head}{_in_class(token[len(head) : -1], head)}]"
    if _CONTROL.fullmatch(token):
        raise ValueError("it asks for a control character")
    return {".": dot, r"\s": f"[{_SPACE}]", r"\S": f"[{_NO_SPACE}]"}.get(token, token)


def _in_class(body: str, head: str) -> str:
    tokens = _IN_CLASS.findall(body)
    if "--" in tokens:
        raise ValueError(r"a hyphen in a class is written \-")
    if head == "[" and all(_CONTROL.fullmatch(each) for each in tokens if each != "-" or len(tokens) == 1):
        raise ValueError("it asks for a control character")
    written = {"[": r"\[", "]": r"\]", "&": r"\&", "~": r"\~", r"\s": _SPACE, r"\S": _NO_SPACE}
    return "".join(written.get(each, each) for each in tokens)
