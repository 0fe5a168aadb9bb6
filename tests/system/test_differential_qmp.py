"""Differential: the QMP protocol itself — negotiation, ids, out-of-band, JSON of all sorts, several monitors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import poll
from tests.support.qmp import QmpClient
from tests.system.differential import Context, Do, Raw, Session, Subset, check_session, cmd

COMMANDS = (
    "block-export-add",
    "block-export-del",
    "block-set-write-threshold",
    "block_resize",
    "blockdev-add",
    "blockdev-del",
    "blockdev-reopen",
    "chardev-add",
    "chardev-remove",
    "nbd-server-add",
    "nbd-server-remove",
    "nbd-server-start",
    "nbd-server-stop",
    "object-add",
    "object-del",
    "qmp_capabilities",
    "qom-get",
    "qom-list",
    "qom-list-properties",
    "qom-list-types",
    "qom-set",
    "query-block",
    "query-block-exports",
    "query-blockstats",
    "query-chardev",
    "query-chardev-backends",
    "query-commands",
    "query-named-block-nodes",
    "query-qmp-schema",
    "query-version",
    "quit",
    "x-debug-query-block-graph",
)


def q(**more: Any) -> bytes:
    return json.dumps({"execute": "query-block-exports", **more}).encode()


def deep(depth: int, opening: bytes, closing: bytes, inner: bytes = b"") -> bytes:
    return opening * depth + inner + closing * depth


def second_monitor(context: Context) -> Any:
    def connect() -> QmpClient | None:
        try:
            return QmpClient(context.workdir / "second.sock", negotiate=False)
        except (FileNotFoundError, ConnectionRefusedError):
            return None

    client = poll(connect, "the second monitor")
    with client:
        return [
            client.greeting,
            client.command("query-version"),
            client.command("qmp_capabilities"),
            client.command("query-version"),
            client.command("object-add", **{"qom-type": "secret", "id": "t", "data": "x"}),
            context.daemon.qmp.command("qom-list", path="/objects"),
        ]


GARBAGE = [
    b"@\n",
    b"}\n",
    b"]\n",
    b"{]\n",
    b"[}\n",
    b"nonsense\n",
    b'{"execute": query}\n',
    b'{"execute": "query-version",}\n',
    b'{"execute" "query-version"}\n',
    b"{1: 2}\n",
    b'{"a": 1 "b": 2}\n',
    b"[1 2]\n",
    b"[1,]\n",
    b'{"a": tru}\n',
    b'{"a": nul}\n',
    b'{"a": +1}\n',
    b'{"a": 01}\n',
    b'{"a": 1.}\n',
    b'{"a": .5}\n',
    b'{"a": 1e}\n',
    b'{"a": -}\n',
    b'{"a": "\\x"}\n',
    b'{"a": "\\u12"}\n',
    b'{"a": "\\u12g4"}\n',
    b'{"a": "\\ud800"}\n',
    b'{"a": "\\udc00"}\n',
    b'{"a": "unfinished\n',
    b'"string"\n',
    b"1\n",
    b"null\n",
    b"true\n",
    b"[]\n",
    b"[{}]\n",
    b"{}\n",
    b'{"execute": 1}\n',
    b'{"execute": null}\n',
    b'{"execute": ["query-version"]}\n',
    b'{"execute": ""}\n',
    b'{"execute": "nosuch"}\n',
    b'{"execute": "query-version", "arguments": 1}\n',
    b'{"execute": "query-version", "arguments": []}\n',
    b'{"execute": "query-version", "arguments": "x"}\n',
    b'{"execute": "query-version", "arguments": {"a": 1}}\n',
    b'{"execute": "query-version", "nosuch": 1}\n',
    b'{"exec": "query-version"}\n',
    b'{"arguments": {}}\n',
    b'{"id": 1}\n',
    b'{"id": 1, "execute": "nosuch"}\n',
    b'{"execute": "query-version", "exec-oob": "query-version"}\n',
    b'{"exec-oob": "query-version"}\n',
    b'{"exec-oob": "query-version", "id": 4}\n',
    b'{"exec-oob": 1}\n',
    b'{"event": "x"}\n',
    b'{"return": {}}\n',
    b"%s\n",
    b'{"execute": %p}\n',
    b'{"a": %d}\n',
    b"\xff\n",
    b"\x01\n",
    b'{"\xc3\x28": 1}\n',
    b'{"execute": "\xf0\x9f\x98\x80"}\n',
    b'{"execute": "\xff"}\n',
    b'{"execute": "a\\u0000b"}\n',
    b'{"execute": "query-version", "execute": "query-block"}\n',
]

SESSIONS = [
    Session(
        "greeting-and-negotiation",
        [
            "query-version",
            cmd("query-block"),
            Raw(b'{"execute":"nosuch"}'),
            Raw(b'{"exec-oob":"query-version"}'),
            cmd("qmp_capabilities", enable=["nosuch"]),
            cmd("qmp_capabilities", enable="oob"),
            cmd("qmp_capabilities", enable=[1]),
            cmd("qmp_capabilities", nosuch=1),
            Raw(b"garbage\n"),
            Raw(b"[]\n"),
            "query-commands",
            {"execute": "qmp_capabilities", "id": "neg"},
            "query-version",
            "qmp_capabilities",
            cmd("qmp_capabilities", enable=["oob"]),
        ],
        negotiate=False,
    ),
    Session(
        "oob",
        [
            cmd("qmp_capabilities", enable=["oob"]),
            Raw(b'{"exec-oob":"query-version"}'),
            Raw(b'{"exec-oob":"nosuch", "id": 3}'),
            Raw(b'{"exec-oob":"query-block", "id": 3}'),
            Raw(b'{"exec-oob":"qmp_capabilities", "id": 3}'),
            Raw(b'{"exec-oob":1, "id": 3}'),
            Raw(b'{"exec-oob":"query-version", "execute":"query-version"}'),
            Raw(b'{"execute":"query-version", "id": {"a": [1, null, 2.5]}}'),
        ],
        negotiate=False,
    ),
    Session(
        "oob-twice",
        [cmd("qmp_capabilities", enable=["oob", "oob"]), "query-version"],
        negotiate=False,
    ),
    Session(
        "ids",
        [
            *(
                Raw(b'{"execute":"query-block-exports","id":' + value + b"}")
                for value in (
                    b"1",
                    b"-1",
                    b"0",
                    b'"text"',
                    b"null",
                    b"true",
                    b"[]",
                    b"{}",
                    b"1.5",
                    b"1e3",
                    b"9223372036854775807",
                    b"9223372036854775808",
                    b"18446744073709551615",
                    b"18446744073709551616",
                    b"-9223372036854775808",
                    b"-9223372036854775809",
                    b'{"a": {"b": [1, 2, {"c": null}]}}',
                    b'"\\u00e9\\n\\ud83d\\ude00"',
                    b"'single'",
                    b"0.1",
                    b"1E+2",
                    b"-0",
                    b"-0.0",
                )
            ),
        ],
    ),
    Session(
        "json-shapes",
        [
            Raw(b'{"execute":"query-block-exports"}{"execute":"query-block-exports"}', 2),
            Raw(b"{'execute':'query-block-exports'}"),
            Raw(b"{'execute':'query-block-exports', 'id': 'it\\'s'}"),
            Raw(b'{"execute":"query-block-exports", "id": \'mixed"quotes\'}'),
            Raw(b'\n\n  \t {"execute"\n:\t"query-block-exports"\r\n}   \n'),
            Raw(b'{"execute":"query-block-exports","id":1}' * 50, 50),
            Raw(b'{"exec', 0),
            Raw(b'ute":"query-blo', 0),
            Raw(b'ck-exports"}', 1),
            Raw(b'{"execute":"query-block-exports", "id": "\\"\\\\\\/\\b\\f\\n\\r\\t"}'),
            Raw(b'{"execute":"query-block-exports", "id": "' + b"x" * 100000 + b'"}'),
            Raw(b'{"execute":"query-block-exports", "arguments": {}}'),
            Raw(b'{"arguments": {}, "execute":"query-block-exports"}'),
        ],
    ),
    Session(
        "garbage",
        [Raw(text, None) for text in GARBAGE],
    ),
    Session(
        "deep",
        [
            Raw(q(id=json.loads(deep(900, b"[", b"]")))),
            Raw(deep(1023, b"[", b"]") + b"\n", None),
            Raw(deep(1024, b"[", b"]") + b"\n", None),
            Raw(b'{"a":' * 1000 + b"1" + b"}" * 1000 + b"\n", None),
            Raw(q(id=1)),
        ],
    ),
    Session(
        "too-deep",
        [
            Raw(b"[" * 1025 + b"\n", None),
            Raw(b"\n" + q(id=1)),
        ],
    ),
    Session(
        "several-monitors",
        [Do("second monitor", second_monitor), "query-block-exports"],
        args=[
            "--chardev",
            "socket,id=second,path=second.sock,server=on,wait=off",
            "--monitor",
            "chardev=second,id=second",
        ],
    ),
    Session(
        "queries",
        [
            "query-version",
            Subset("query-commands", "name", COMMANDS),
            cmd("query-version", nosuch=1),
            cmd("query-commands", nosuch=1),
            cmd("query-qmp-schema", nosuch=1),
            cmd("quit", nosuch=1),
            "nosuch",
            "query-block_exports",
            "Query-Block",
        ],
    ),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, image_set: Path, tmp_path: Path) -> None:
    check_session(session, image_set, tmp_path)
