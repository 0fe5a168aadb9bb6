"""The options of ``--chardev``: one flat list for all backends, in QEMU's oldest syntax.

Unlike everywhere else there is no nesting and no JSON, a name alone is a boolean (``server``, ``nowait``; deprecated),
every option is known to every backend, and what a backend does not use it does not look at.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyqsd.chardev import registry
from pyqsd.qapi.convert import parse_integer, parse_size
from pyqsd.qapi.errors import Error
from pyqsd.trace import report

if TYPE_CHECKING:
    from pyqsd.chardev.chardev import Chardev

#: Every option and its type, in the order of the help.
KNOWN: dict[str, str] = {
    "abstract": "bool",
    "append": "bool",
    "backend": "str",
    "chardev": "str",
    "chardevs.0": "str",
    "chardevs.1": "str",
    "chardevs.2": "str",
    "chardevs.3": "str",
    "clipboard": "bool",
    "cols": "num",
    "debug": "num",
    "delay": "bool",
    "fd": "str",
    "height": "num",
    "host": "str",
    "input-path": "str",
    "ipv4": "bool",
    "ipv6": "bool",
    "localaddr": "str",
    "localport": "str",
    "logappend": "bool",
    "logfile": "str",
    "mouse": "bool",
    "mux": "bool",
    "name": "str",
    "nodelay": "bool",
    "path": "str",
    "port": "str",
    "reconnect-ms": "num",
    "reconnect": "num",
    "rows": "num",
    "server": "bool",
    "signal": "bool",
    "size": "size",
    "telnet": "bool",
    "tight": "bool",
    "tls-authz": "str",
    "tls-creds": "str",
    "tn3270": "bool",
    "to": "num",
    "wait": "bool",
    "websocket": "bool",
    "width": "num",
}

_TYPE_HELP = {"bool": "<bool (on/off)>", "str": "<str>", "num": "<num>", "size": "<size>"}

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
ID_HINT = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."

_TRUE = ("on", "yes", "true", "y")
_FALSE = ("off", "no", "false", "n")


def check_id(identifier: str) -> None:
    """Raise Error unless `identifier` is well-formed."""
    if not _ID.fullmatch(identifier):
        raise Error("Parameter 'id' expects an identifier", hint=ID_HINT)


def help_for(text: str) -> tuple[str, int] | None:
    """What to print for ``--chardev help`` and ``--chardev TYPE,help``, and the exit status; None when `text` does not
    ask for help."""
    pairs = split(text)
    if any(flag and name in ("help", "?") for name, _, flag in pairs):
        lines = [f"  {name}={_TYPE_HELP[typ]}" for name, typ in KNOWN.items()]
        return "\n".join(["chardev options:", *lines]) + "\n", 1
    backend = next((value for name, value, _ in reversed(pairs) if name == "backend"), None)
    if backend in ("help", "?"):
        names = [f"  {name}" for name in registry.chardev_names()]
        return "\n".join(["Available chardev backend types: ", *names]) + "\n", 0
    return None


def split(text: str, implied: str | None = "backend") -> list[tuple[str, str, bool]]:
    """The (name, value, was a name alone) in `text`. The first value may go without its name, `implied`, if given."""
    pairs: list[tuple[str, str, bool]] = []
    position = 0
    while position < len(text):
        stop = position
        while stop < len(text) and text[stop] not in "=,":
            stop += 1
        if stop < len(text) and text[stop] == "=":
            value, end = _value(text, stop + 1)
            pairs.append((text[position:stop], value, False))
        elif not pairs and implied is not None:
            value, end = _value(text, position)
            pairs.append((implied, value, False))
        else:
            name, end = text[position:stop], stop
            if name.startswith("no"):
                pairs.append((name[2:], "off", True))
            else:
                pairs.append((name, "on", True))
        position = end + 1
    return pairs


def _value(text: str, position: int) -> tuple[str, int]:
    """The value at `position`, in which a doubled comma is one, and where it ends."""
    parts: list[str] = []
    while True:
        stop = text.find(",", position)
        if stop < 0:
            parts.append(text[position:])
            return "".join(parts), len(text)
        if not text.startswith(",,", stop):
            parts.append(text[position:stop])
            return "".join(parts), stop
        parts.append(text[position : stop + 1])
        position = stop + 2


class Opts:
    """Parsed options; what a backend asks for is converted."""

    def __init__(self) -> None:
        self._id: str | None = None
        self._values: dict[str, Any] = {}

    def add(self, name: str, text: str) -> None:
        """Set the option `name`; a later one wins. Raises Error."""
        typ = KNOWN.get(name)
        if typ is None:
            raise Error(f"Invalid parameter '{name}'")
        self._values[name] = _PARSERS[typ](name, text)

    def set_id(self, identifier: str) -> None:
        """Set the label. Raises Error when it is not well-formed."""
        check_id(identifier)
        self._id = identifier

    def label(self) -> str:
        """The label. Raises Error when there is none."""
        if self._id is None:
            raise Error("chardev: no id specified")
        return self._id

    def backend(self) -> type[Chardev]:
        """The class of the backend. Raises Error."""
        name = self.get("backend")
        if name is None:
            raise Error(f'chardev: "{self._id}" missing backend')
        if name not in registry.chardev_names():
            raise Error(f"'{name}' is not a valid char driver name")
        return registry.chardev_class(name)

    def get(self, name: str) -> Any:
        """The value of an option, or None."""
        return self._values.get(name)

    def common(self) -> dict[str, Any]:
        """The members of `ChardevCommon`."""
        return {"logfile": self.get("logfile"), "logappend": self.get("logappend")}

    def refuse_unsupported(self) -> None:
        """Raise Error for what no backend here does although every one of QSD's does."""
        if self.get("mux"):
            raise Error("chardev: 'mux' is not supported")


def warn_short_form(name: str, value: str) -> None:
    """Say that a name alone is an old way to write a boolean."""
    prefix = "no" if value == "off" else ""
    advice = f"nodelay={'on' if prefix else 'off'}" if name == "delay" else f"{name}={value}"
    report.warn(f"short-form boolean option '{prefix}{name}' deprecated", f"Please use {advice} instead")


def parse(text: str) -> Opts:
    """Parse the argument of ``--chardev``. Raises Error."""
    opts = Opts()
    pairs = split(text)
    # The label is looked for before everything else, and the first one counts.
    for name, value, _ in split(text, None):
        if name == "id":
            opts.set_id(value)
            break
    for name, value, flag in pairs:
        if flag:
            warn_short_form(name, value)
        if name != "id":
            opts.add(name, value)
    return opts


def _parse_bool(name: str, text: str) -> bool:
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise Error(f"Parameter '{name}' expects 'on' or 'off'")


def _parse_number(name: str, text: str) -> int:
    number = parse_integer(text)
    if number is None:
        raise Error(f"Parameter '{name}' expects a number")
    if not -(1 << 64) < number < 1 << 64:
        raise Error(f"Value '{text}' is too large for parameter '{name}'")
    return number & ((1 << 64) - 1)


def _parse_size(name: str, text: str) -> int:
    number = parse_size(text)
    if number is not None:
        return number
    if re.fullmatch(r"\s*-\s*[0-9]+.*|\s*\+?[0-9]+[bBkKmMgGtTpPeE]?", text):
        raise Error(f"Value '{text}' is out of range for parameter '{name}'")
    raise Error(
        f"Parameter '{name}' expects a non-negative number below 2^64",
        hint="Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.",
    )


def _parse_str(name: str, text: str) -> str:
    return text


_PARSERS: dict[str, Callable[[str, str], Any]] = {
    "bool": _parse_bool,
    "num": _parse_number,
    "size": _parse_size,
    "str": _parse_str,
}
