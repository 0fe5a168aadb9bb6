"""The same bytes to the real daemon's monitor and to a session: the same answers.

Compared as JSON, message by message: the order of keys is that of a hash table there.
"""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from pyqsd.qapi.command import Command
from pyqsd.qapi.errors import Error
from tests.monitor import wire
from tests.qapi import sample
from tests.qapi.cases import BLOCKDEV

#: Ends whatever was begun, and has an answer of its own.
SYNC = b'\n\xff\n{"id": "sync %d"}\n'
SYNC_ANSWER = b'"sync %d", "error": {"class": "GenericError", "desc": "QMP input lacks member \'execute\'"}}\r\n'


async def block_resize(*, device: str | None = None, node_name: str | None = None, size: int) -> None:
    """As in QSD, where there is no node at all."""
    raise Error(f"Cannot find device='{device or ''}' nor node-name='{node_name or ''}'")


COMMANDS = (
    wire.command("blockdev-add", sample.blockdev_add, boxed=True),
    wire.command("block_resize", block_resize),
)


def split(output: bytes) -> dict[int, list[Any]]:
    """The messages before each answer to `SYNC`, by its number."""
    found: dict[int, list[Any]] = {}
    messages: list[Any] = []
    for line in output.split(b"\r\n")[:-1]:
        if b"[" * 500 in line:  # too deep for json
            messages.append(line)
            continue
        message = json.loads(line.replace(b"[inf", b"[1e999").replace(b": inf", b": 1e999"))
        if str(message.get("id", "")).startswith("sync "):
            assert message["error"]["desc"] == "QMP input lacks member 'execute'"
            found[int(message["id"].split()[1])] = messages
            messages = []
        elif "QMP" not in message:
            messages.append(message)
    assert messages == []
    return found


def both(cases: list[bytes], negotiate: bytes, *commands: Command, piece: int = 4096) -> None:
    parts = [case + SYNC % number for number, case in enumerate(cases)]
    parts[0] = negotiate + parts[0]
    data = b"".join(parts)
    # Out of band, a request would overtake the answers to those before it, or not, as threads there happen to run.
    if negotiate != wire.NEGOTIATE_OOB:
        parts = [data]

    async def run() -> bytes:
        return await wire.Local(*commands).feed(data, piece)

    ours = split(asyncio.run(run()))
    with wire.Theirs() as theirs_daemon:
        first = len(cases) - len(parts)
        replies = [theirs_daemon.talk(part, SYNC_ANSWER % (first + n)) for n, part in enumerate(parts)]
        theirs = split(b"".join(replies))
    assert len(ours) == len(theirs) == len(cases)
    different = [(case, ours[n], theirs[n]) for n, case in enumerate(cases) if ours[n] != theirs[n]]
    for case, our, their in different[:10]:
        print(f"{case!r}\n  ours:   {our}\n  theirs: {their}")
    assert len(different) == 0


REQUESTS = [
    b"{}",
    b"[]",
    b"1 ",
    b'"a"',
    b"null ",
    b'{"id":1}',
    b'{"execute":1}',
    b'{"execute":null}',
    b'{"execute":"nosuch","id":1}',
    b'{"execute":"","id":1}',
    b'{"execute":"query-commands ","id":[{}]}',
    b'{"execute":"block_resize","xyz":1}',
    b'{"execute":"block_resize","arguments":1,"id":null}',
    b'{"execute":"block_resize","arguments":null}',
    b'{"execute":"block_resize","arguments":[]}',
    b'{"execute":"block_resize"}',
    b'{"execute":"block_resize","arguments":{}}',
    b'{"execute":"block_resize","arguments":{"size":1,"x":2}}',
    b'{"execute":"block_resize","arguments":{"size":1}}',
    b'{"execute":"block_resize","arguments":{"size":"1"}}',
    b'{"execute":"block_resize","arguments":{"size":1.0}}',
    b'{"execute":"block_resize","arguments":{"size":9223372036854775808}}',
    b'{"execute":"block_resize","arguments":{"size":1,"device":7}}',
    b'{"execute":"block_resize","arguments":{"size":1,"device":"a","node-name":"b"}}',
    b'{"execute":"block_resize","arguments":{"size":1,"node_name":"b"}}',
    b'{"execute":"qmp_capabilities"}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":["x"]}}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":[1]}}',
    b'{"execute":"qmp_capabilities","arguments":{"enable":"oob"}}',
    b'{"execute":"qmp_capabilities","arguments":{"x":1}}',
    b'{"exec-oob":"nosuch"}',
    b'{"exec-oob":"block_resize","id":"o"}',
    b'{"exec-oob":"block_resize","arguments":1,"id":"o"}',
    b'{"exec-oob":1}',
    b'{"exec-oob":"a","execute":"b"}',
    b'{"execute":"a","exec-oob":"b","id":1}',
    b'{"exec-oob":"qmp_capabilities"}',
    b'{"arguments":{}}',
    b'{"arguments":1,"execute":1}',
    b'{"execute":1,"zzz":1}',
    b'{"a":1,"execute":1,"arguments":2}',
    b'{"abc":1,"id":5}',
    b'{"execute":"nosuch","id":{"a":[1,2.5,null,true,"\\u20ac\\u0001/\x7f\\ud83d\\ude00"]}}',
    b'{"execute":"nosuch","id":-12345678901234567890}',
    b'{"execute":"nosuch","id":18446744073709551615}',
    b'{"execute":"nosuch","id":1e2}',
    b'{"execute":"nosuch","id":0.1}',
    b'{"execute":"nosuch","id":"\\u0000"}',
    b"{'execute':'nosuch','id':'it\\'s'}",
    b'{"id":' + b"[" * 1000 + b"]" * 1000 + b"}",
    b'{"id":' + b"[" * 1023 + b"]" * 1023 + b"}",
    b'{"id":' + b"[" * 1024 + b"]" * 1024 + b"}",
    b"[" * 1025,
    b'{"a":' * 1025,
    b'{"id": "' + b"x" * 20000 + b'"}',
    b"x" * 2000 + b" ",
    b"\x00",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
]


@pytest.mark.parametrize("negotiate", [b"", wire.NEGOTIATE, wire.NEGOTIATE_OOB], ids=["before", "in band", "oob"])
def test_requests(negotiate: bytes) -> None:
    cases = [case for case in REQUESTS if negotiate or b'"qmp_capabilities"' not in case]
    both(cases, negotiate, *COMMANDS)


def test_negotiation() -> None:
    """One session that gets into command mode in the end."""
    cases = [
        b'{"execute":"nosuch","id":1}',
        b'{"execute":"qmp_capabilities","arguments":{"enable":["x"]},"id":2}',
        b'{"execute":"qmp_capabilities","arguments":{"x":1}}',
        b'{"execute":"qmp_capabilities","arguments":1}',
        b'{"exec-oob":"qmp_capabilities"}',
        b'{"execute":"qmp_capabilities","id":3}',
        b'{"execute":"qmp_capabilities","id":4}',
        b'{"execute":"nosuch","id":5}',
    ]
    both(cases, b"")


def test_which_of_several_mistakes_is_told() -> None:
    numbers = random.Random(1)
    names = ["filename", "locking", "x", "y", "foo", "bar", "export", "file", "server", "backing", "encrypt", "image"]
    names += [
        "offset",
        "aio",
        "port",
        "host",
        "path",
        "abc",
        "key-secret",
        "prealloc-align",
        "lazy-refcounts",
        "\u00e9",
    ]
    cases = []
    for _ in range(500):
        options: dict[str, Any] = {"driver": "null-co", "size": 1, "read-only": True}
        options.update((name, 1) for name in numbers.sample(names, numbers.randrange(2, 20)))
        members = list(options.items())
        numbers.shuffle(members)
        cases.append(json.dumps({"execute": "blockdev-add", "arguments": dict(members)}).encode())
    for _ in range(500):
        request = {name: 1 for name in numbers.sample(names, numbers.randrange(4))}
        request |= {name: 1 for name in numbers.sample(["execute", "exec-oob", "arguments"], numbers.randrange(4))}
        members = list(request.items())
        numbers.shuffle(members)
        cases.append(json.dumps(dict(members)).encode())
    both(cases, wire.NEGOTIATE, *COMMANDS)


def test_options() -> None:
    """What is told about wrong options over QMP."""
    texts = [text for text in BLOCKDEV if text.startswith("{") and text.endswith("}")]
    cases = [b'{"execute":"blockdev-add","arguments":%s}' % text.encode() for text in texts]
    assert len(cases) > 50
    both(cases, wire.NEGOTIATE, *COMMANDS)


ATOMS = [
    *(b"{ } [ ] : , 1 -2 0 01 1.5 1e5 1E+2 -0 1. 1e - true false null nul @ % %s A /* +1 .5 0x10 True").split(b" "),
    *(b'\\ \\u0041 \\ud83d \\ude00 \\ud800 \\udc00 \\u12 \\uffff \\ufdd0 \\u0000 \\n \\q " \' "a" \'c\' "b"').split(
        b" "
    ),
    *(b" ", b"\n", b"\t", b"\r", b"\x00", b"\x01", b"\x1f", b"\x7f", b"\xfe", b"\xff"),
    *("é", "€", "\U0001f600", "\uffff", "\ufdd0"),
    *(b"\xc0\x80", b"\xed\xa0\x80", b"\xc3", b"\x80", b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80"),
    *(b"9223372036854775807", b"9223372036854775808", b"18446744073709551616", b"-9223372036854775809", b"1e400"),
    *(b'{"id":1}', b'{"id":"x","execute":"zz"}', b'"id":', b'{"id":'),
]


class Fuzz:
    """Random texts, most of them nearly JSON."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def atom(self) -> bytes:
        atom = self.random.choice(ATOMS)
        return atom.encode() if isinstance(atom, str) else atom

    def string(self) -> bytes:
        quote = self.random.choice([b'"', b"'"])
        return quote + b"".join(self.atom() for _ in range(self.random.randrange(4))) + quote

    def value(self, depth: int) -> bytes:
        kind = self.random.random()
        if depth == 0 or kind < 0.4:
            return self.string() if kind < 0.2 else self.atom()
        blank = self.random.choice([b"", b" ", b"\n"])
        count = self.random.randrange(4)
        if kind < 0.8:
            return b"[" + (b"," + blank).join(self.value(depth - 1) for _ in range(count)) + blank + b"]"
        members = (self.string() + b":" + self.value(depth - 1) for _ in range(count))
        return b"{" + (b"," + blank).join(members) + blank + b"}"

    def case(self) -> bytes:
        kind = self.random.random()
        if kind < 0.4:
            return b"".join(self.atom() for _ in range(self.random.randrange(1, 8)))
        text = bytearray(b'{"id":' + self.value(3) + b"}")
        if kind > 0.85:
            text[self.random.randrange(len(text))] = self.random.randrange(256)
        return bytes(text)


@pytest.mark.parametrize(("seed", "piece"), [(1, 4096), (2, 1), (3, 7), (4, 61)])
def test_fuzz(seed: int, piece: int) -> None:
    fuzz = Fuzz(seed)
    both([fuzz.case() for _ in range(1500)], wire.NEGOTIATE, piece=piece)


@pytest.mark.parametrize("pretty", [False, True], ids=["plain", "pretty"])
def test_spelling(pretty: bool) -> None:
    """Byte by byte, for what has no order of keys."""
    data = (
        wire.NEGOTIATE
        + b'{"execute": "qmp_capabilities", "id": [1, [], {}, {"a": [{"b": "\\u00e9\x7f\\"/"}]}, 1.5, 0.1, 1e3]}\n'
        + b'{"id": "end"}\n'
    )

    async def run() -> bytes:
        local = wire.Local(pretty=pretty)
        return local.greeting + await local.feed(data)

    ours = asyncio.run(run())
    with wire.Theirs(pretty=pretty) as daemon:
        theirs = daemon.talk(data, b"lacks member 'execute'\"" + (b"\r\n    }\r\n}\r\n" if pretty else b"}}\r\n"))
    head = b"}\r\n" if not pretty else b"\r\n}\r\n"
    # The greeting has the version in it, in another order.
    our_greeting, our_rest = ours.split(head, 1)
    their_greeting, their_rest = theirs.split(head, 1)
    assert our_rest == their_rest
    assert len(our_greeting.split(b"\r\n")) == len(their_greeting.split(b"\r\n"))
    assert sorted(json.loads(our_greeting + b"}")["QMP"]) == sorted(json.loads(their_greeting + b"}")["QMP"])
    assert json.loads(our_greeting + b"}")["QMP"]["capabilities"] == ["oob"]
    assert json.loads(our_greeting + b"}")["QMP"]["version"]["qemu"] == {"major": 10, "minor": 0, "micro": 2}
