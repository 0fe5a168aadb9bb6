"""Values as JSON text, spelled as QSD spells it.

Members are separated by ``", "`` and ``": "``, characters beyond ASCII are escaped with capital hexadecimal digits, and
"pretty" text has an item a line, indented by four blanks.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from pyqsd.qapi.types import Null

_ESCAPE = re.compile(r"\\(?:u(?:d[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}|[0-9a-f]{4})|.)")
# Nothing here refers to itself, and all keys are strings: the checks of `json.dumps` are left out.
_dumps = json.JSONEncoder(check_circular=False).encode


def _hook(value: Any) -> Any:
    if isinstance(value, Null):
        return None
    raise TypeError(f"{type(value).__name__} has no wire form")


def to_wire(value: Any) -> Any:
    """`value` (structs, enums, lists, dicts, `NULL` …) as dicts, lists, strings and numbers."""
    return msgspec.to_builtins(value, enc_hook=_hook)


def to_json(value: Any, *, pretty: bool = False, echo: bool = False) -> str:
    """The JSON text of a value that `to_wire` made, on one line unless `pretty`. `echo`: spell numbers with a fraction
    as QSD does, too, and take any depth (costs more)."""
    if not pretty and not echo:
        try:
            return _capital(_dumps(value))
        except RecursionError:
            pass
    return _write(value, pretty)


def string(text: str) -> str:
    """The JSON text of a string."""
    return _capital(_dumps(text))


def _capital(text: str) -> str:
    if "\\u" in text:
        text = _ESCAPE.sub(lambda match: _escaped(match[0]), text)
    return text.replace("\x7f", "\\u007F")


def _escaped(text: str) -> str:
    if text[1] != "u":
        return text
    if len(text) == 12:
        # A pair of surrogates.
        return "\\u" + text[2:6].upper() + "\\u" + text[8:].upper()
    # A byte that is no text, as names of files and those in images may have them.
    return "\\uFFFD" if text.startswith("\\ud") and text[3] in "89abcdef" else "\\u" + text[2:].upper()


def _scalar(value: Any) -> str:
    if type(value) is str:
        return string(value)
    if type(value) is float:
        return f"{value:.17g}"
    return _dumps(value)


def _write(value: Any, pretty: bool) -> str:
    """Without recursion: what is echoed to a client is as deep as the client likes."""
    out: list[str] = []
    # Iterators over the items of the open containers, and what closes them.
    stack: list[tuple[Any, str]] = []
    separator = "," if pretty else ", "
    first = True
    current = value
    while True:
        if isinstance(current, dict):
            out.append("{")
            stack.append((iter(current.items()), "}"))
            first = True
        elif isinstance(current, list):
            out.append("[")
            stack.append((iter(current), "]"))
            first = True
        else:
            out.append(_scalar(current))
            first = False
        while stack:
            items, close = stack[-1]
            try:
                current = next(items)
            except StopIteration:
                stack.pop()
                if pretty:
                    out.append("\n" + "    " * len(stack))
                out.append(close)
                first = False
                continue
            if not first:
                out.append(separator)
            if pretty:
                out.append("\n" + "    " * len(stack))
            if close == "}":
                key, current = current
                out.append(string(key) + ": ")
            break
        else:
            return "".join(out)
