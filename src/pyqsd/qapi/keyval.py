"""QEMU's ``key=value,…`` syntax, as the command line takes it.

``a.b=c`` nests, ``l.0=x,l.1=y`` makes a list, a doubled comma stands for one comma in a value, and the first parameter
may be a value alone when the option has an implied key. Every leaf is a string; `pyqsd.qapi.convert` parses it in
keyval mode. A value that starts with ``{`` is JSON instead.
"""

from __future__ import annotations

import re
from typing import Any

from pyqsd.qapi.errors import Error
from pyqsd.qapi.json_stream import parse_text

#: A fragment of a key (what is between dots) is shorter than this, in bytes.
MAX_FRAGMENT = 127

# A key starts with a name, which may have a downstream prefix with dots in it; further fragments may be list indices.
_NAME = r"(?:__[a-zA-Z0-9.-]*_)?[a-zA-Z][a-zA-Z0-9_-]*"
_FRAGMENT = re.compile(rf"({_NAME})|([0-9]+)")


class HelpRequested(Exception):
    """The text has ``help`` or ``?`` as a parameter; `options` is what else it says."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__("help")
        self.options = options


def parse_option(text: str, implied_key: str | None, *, allow_help: bool = False) -> tuple[dict[str, Any], bool]:
    """The options in `text` and whether they are keyval (rather than JSON). Raises Error, and HelpRequested if
    `allow_help`."""
    if text.startswith("{"):
        value = parse_text(text)
        assert isinstance(value, dict)
        return value, False
    return parse_keyval(text, implied_key, allow_help=allow_help), True


def parse_keyval(text: str, implied_key: str | None, *, allow_help: bool = False) -> dict[str, Any]:
    """Parse ``key=value,…``. Raises Error; HelpRequested if `allow_help` and help is asked for."""
    root: dict[str, Any] = {}
    wants_help = False
    position = 0
    implied = implied_key
    while position < len(text):
        stop = position
        while stop < len(text) and text[stop] not in "=,":
            stop += 1
        key = text[position:stop]
        alone = stop == len(text) or text[stop] == ","
        position = stop + 1
        if alone and _is_help(key):
            wants_help = True
        elif alone and implied is not None and key:
            # The first parameter is the value of the implied key; there is no way to have a comma in it.
            _put(root, [implied], key)
        else:
            path = _walk(root, key)
            if alone:
                raise Error(f"Expected '=' after parameter '{key}'")
            value, position = _value(text, position)
            _put(root, path, value)
        implied = None
    if wants_help and not allow_help:
        raise Error("Help is not available for this option")
    _listify(root)
    if wants_help:
        raise HelpRequested(root)
    return root


def _is_help(text: str) -> bool:
    return text in ("help", "?")


def _value(text: str, position: int) -> tuple[str, int]:
    """The value at `position` and the position after the comma that ends it."""
    parts: list[str] = []
    while True:
        stop = text.find(",", position)
        if stop < 0:
            parts.append(text[position:])
            return "".join(parts), len(text)
        if not text.startswith(",,", stop):
            parts.append(text[position:stop])
            return "".join(parts), stop + 1
        parts.append(text[position : stop + 1])
        position = stop + 2


def _walk(root: dict[str, Any], key: str) -> list[str]:
    """Check a dotted key and make the dictionaries that it goes through; its fragments."""
    path: list[str] = []
    place = root
    position = 0
    while True:
        match = _FRAGMENT.match(key, position)
        if match is None or (match[2] is not None and position == 0):
            raise Error(f"Invalid parameter '{key}'")
        end = match.end()
        if end < len(key) and key[end] != ".":
            raise Error(f"Invalid parameter '{key}'")
        if end - position > MAX_FRAGMENT:
            what = "fragment " if match[0] != key else ""
            raise Error(f"Parameter {what}'{match[0]}' is too long")
        if path:
            inner = place.setdefault(path[-1], {})
            if not isinstance(inner, dict):
                raise _inconsistent(path)
            place = inner
        path.append(match[0])
        if end == len(key):
            return path
        position = end + 1


def _put(root: dict[str, Any], path: list[str], value: str) -> None:
    place = root
    for fragment in path[:-1]:
        place = place[fragment]
    if isinstance(place.get(path[-1]), dict):
        raise _inconsistent(path)
    place[path[-1]] = value


def _inconsistent(path: list[str]) -> Error:
    return Error(f"Parameters '{'.'.join(path)}.*' used inconsistently")


def _listify(root: dict[str, Any]) -> None:
    """Turn dictionaries whose keys are all indices into lists, from the inside out (the root's keys never are)."""
    # Where each dictionary is: the one that holds it, and its key there. Inner ones come after outer ones.
    found: list[tuple[dict[str, Any], int, str]] = [(root, -1, "")]
    for position, (value, _, _) in enumerate(found):
        found.extend((inner, position, key) for key, inner in value.items() if isinstance(inner, dict))
    for value, parent, key in reversed(found[1:]):
        indices = sum(key[0].isdigit() for key in value)
        if not indices:
            continue
        elements = {int(key): inner for key, inner in value.items() if key[0].isdigit()}
        missing = next((index for index in range(len(elements)) if index not in elements), None)
        if indices < len(value) or missing is not None:
            path = [key]
            while parent > 0:
                path.append(found[parent][2])
                parent = found[parent][1]
            path.reverse()
            if indices < len(value):
                raise _inconsistent(path)
            raise Error(f"Parameter '{'.'.join(path)}.{missing}' missing")
        found[parent][0][key] = [elements[index] for index in range(len(elements))]
