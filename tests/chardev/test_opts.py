"""The flat options of ``--chardev``."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqsd.chardev import opts, registry
from pyqsd.qapi.errors import Error


def test_split() -> None:
    assert opts.split("socket,id=a,path=x,,y,server,nowait,delay") == [
        ("backend", "socket", False),
        ("id", "a", False),
        ("path", "x,y", False),
        ("server", "on", True),
        ("wait", "off", True),
        ("delay", "on", True),
    ]
    assert opts.split("a=b=c,=d") == [("a", "b=c", False), ("", "d", False)]
    assert opts.split("") == []
    assert opts.split("a,,b,c=") == [("backend", "a,b", False), ("c", "", False)]


@pytest.mark.parametrize("text", ["on", "yes", "true", "y"])
def test_true(text: str) -> None:
    assert opts.parse(f"null,id=a,server={text}").get("server") is True


@pytest.mark.parametrize("text", ["off", "no", "false", "n"])
def test_false(text: str) -> None:
    assert opts.parse(f"null,id=a,server={text}").get("server") is False


@pytest.mark.parametrize(
    ("text", "value"), [("reconnect=0x10", 16), ("to=-1", (1 << 64) - 1), ("size=4k", 4096), ("size=1.5M", 3 << 19)]
)
def test_numbers(text: str, value: int) -> None:
    assert opts.parse(f"null,id=a,{text}").get(text.partition("=")[0]) == value


def test_later_ones_win_except_the_id() -> None:
    parsed = opts.parse("null,id=a,backend=ringbuf,size=3,id=1y,size=4")
    assert (parsed.label(), parsed.backend().name, parsed.get("size")) == ("a", "ringbuf", 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null,id=a,server=ON", "Parameter 'server' expects 'on' or 'off'"),
        ("null,id=a,to=x", "Parameter 'to' expects a number"),
        ("null,id=a,to=", "Parameter 'to' expects a number"),
        ("null,id=a,to=18446744073709551616", "Value '18446744073709551616' is too large for parameter 'to'"),
        ("null,id=a,size=x", "Parameter 'size' expects a non-negative number below 2^64"),
        ("null,id=a,size=-1", "Value '-1' is out of range for parameter 'size'"),
        ("null,id=a,size=99999999999999999999", "Value '99999999999999999999' is out of range for parameter 'size'"),
        ("null,id=a,nosuch=1", "Invalid parameter 'nosuch'"),
        ("null,id=a,=1", "Invalid parameter ''"),
        ("null,id=1", "Parameter 'id' expects an identifier"),
        ("null,id=", "Parameter 'id' expects an identifier"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(Error) as caught:
        opts.parse(text)
    assert caught.value.desc == message


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("null,id=a,wait", ["short-form boolean option 'wait' deprecated", "Please use wait=on instead"]),
        ("null,id=a,nowait", ["short-form boolean option 'nowait' deprecated", "Please use wait=off instead"]),
        ("null,id=a,delay", ["short-form boolean option 'delay' deprecated", "Please use nodelay=off instead"]),
        ("null,id=a,nodelay", ["short-form boolean option 'nodelay' deprecated", "Please use nodelay=on instead"]),
    ],
)
def test_short_forms_are_warned_of(text: str, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr("pyqsd.trace.report.warn", lambda *texts: said.append(list(texts)))
    opts.parse(text)
    assert said == [lines]


def test_help() -> None:
    for text in ("help", "?", "backend=help,id=a"):
        shown = opts.help_for(text)
        assert shown is not None
        assert shown[0].splitlines() == [
            "Available chardev backend types: ",
            *(f"  {name}" for name in registry.chardev_names()),
        ]
        assert shown[1] == 0
    shown = opts.help_for("null,id=a,help")
    assert shown is not None and shown[1] == 1 and shown[0].startswith("chardev options:\n  abstract=<bool (on/off)>\n")
    assert opts.help_for("null,id=help") is None
    assert opts.help_for("null,help=on") is None


def test_every_backend_is_whole() -> None:
    assert registry.chardev_names() == ("file", "memory", "null", "pipe", "pty", "ringbuf", "socket", "stdio")
    for name in registry.chardev_names():
        assert registry.chardev_class(name).name == name
        assert registry.backend_class(name).__struct_config__.tag == name


PIECES = st.sampled_from(
    [
        "socket",
        "null",
        "id",
        "=",
        ",",
        ",,",
        "a",
        "1",
        "server",
        "no",
        "on",
        "size",
        "to",
        "path",
        "help",
        "-",
        "k",
        "ä",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=15).map("".join)))
def test_anything_is_parsed_or_refused(text: str) -> None:
    pairs = opts.split(text)
    # What was split can be put together again, and says the same.
    again = ",".join(f"{name}={value.replace(',', ',,')}" for name, value, _ in pairs)
    if all("," not in name and "=" not in name for name, _, _ in pairs):
        assert [(name, value) for name, value, _ in opts.split(again)] == [(name, value) for name, value, _ in pairs]
    try:
        parsed = opts.parse(text)
        parsed.backend().options_from(parsed)
        parsed.label()
    except Error as exc:
        assert exc.desc
    opts.help_for(text)
