"""Broken input for both protocols, made from valid input by a seeded random generator."""

from __future__ import annotations

import json
import random
import socket
import struct
from pathlib import Path
from typing import Any

from tests.support import nbd
from tests.support.nbd import NbdClient

EDGES = (
    0,
    1,
    2,
    7,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 62,
    1 << 63,
    (1 << 64) - 1,
)


def mutate(rng: random.Random, data: bytes, times: int | None = None) -> bytes:
    """A few changes: bits, bytes, whole big-endian numbers, cuts, repetitions, insertions."""
    result = bytearray(data)
    for _ in range(times or rng.randint(1, 4)):
        kind = rng.randrange(7)
        at = rng.randrange(len(result)) if result else 0
        if kind == 0 and result:
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and result:
            result[at] = rng.randrange(256)
        elif kind == 2 and result:
            width = rng.choice((2, 4, 8))
            number = rng.choice(EDGES) & ((1 << (8 * width)) - 1)
            result[at : at + width] = number.to_bytes(width, "big")
        elif kind == 3:
            del result[at:]
        elif kind == 4:
            piece = result[at : at + rng.randint(1, 64)]
            result[at:at] = piece * rng.randint(1, 4)
        elif kind == 5:
            result[at:at] = rng.randbytes(rng.randint(1, 40))
        else:
            del result[at : at + rng.randint(1, 16)]
    return bytes(result)


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", nbd.IHAVEOPT, number, len(data)) + data


def handshake(rng: random.Random, export: str) -> bytes:
    """What a client says up to NBD_OPT_GO, in one stream; the client flags first."""
    info = NbdClient.info_request(export, (nbd.INFO_BLOCK_SIZE, nbd.INFO_NAME))
    query = NbdClient.meta_query(export, ("base:allocation", "qemu:", "x" * rng.randint(0, 30)))
    choices = [
        option(nbd.OPT_LIST),
        option(nbd.OPT_STRUCTURED_REPLY),
        option(nbd.OPT_EXTENDED_HEADERS),
        option(nbd.OPT_INFO, info),
        option(nbd.OPT_LIST_META_CONTEXT, query),
        option(nbd.OPT_SET_META_CONTEXT, query),
        option(nbd.OPT_STARTTLS),
        option(rng.randrange(64), rng.randbytes(rng.randint(0, 50))),
    ]
    parts = [struct.pack(">I", 3), *(rng.choice(choices) for _ in range(rng.randint(1, 6)))]
    parts.append(rng.choice((option(nbd.OPT_GO, info), option(nbd.OPT_EXPORT_NAME, export.encode()))))
    return b"".join(parts)


def requests(rng: random.Random, size: int, extended: bool, read_only: bool = False) -> bytes:
    """A stream of requests, most of them valid."""
    stream = b""
    for cookie in range(rng.randint(1, 8)):
        command = rng.choice((0, 0, 3, 5, 7) if read_only else (0, 0, 1, 3, 4, 5, 6, 7))
        length = rng.choice((1, 512, 4096, 70000))
        offset = rng.choice((0, 511, rng.randrange(size), max(0, size - length), size, 1 << 63))
        payload = b""
        if command == nbd.CMD_WRITE:
            payload = rng.randbytes(length)
        flags = rng.choice((0, 0, 1, 2, 4, 8, 16, 32, 63, 0xFFFF))
        if extended:
            if payload and rng.random() < 0.9:
                flags |= nbd.F_PAYLOAD_LEN
            stream += struct.pack(">IHHQQQ", nbd.EXTENDED_REQUEST, flags, command, cookie, offset, length) + payload
        else:
            stream += struct.pack(">IHHQQI", nbd.REQUEST, flags, command, cookie, offset, length) + payload
    return stream


def pour(sock: socket.socket, data: bytes, deadline: float) -> int:
    """Sends everything while reading what comes, half-closes, and reads to the end; the number of bytes read.

    Raises TimeoutError when the server neither reads nor closes within `deadline` seconds.
    """
    sock.settimeout(deadline)
    got = 0
    view = memoryview(data)
    try:
        while view:
            sock.setblocking(False)
            try:
                got += len(sock.recv(1 << 20))
            except BlockingIOError:
                pass
            try:
                view = view[sock.send(view[: 1 << 16]) :]
            except BlockingIOError:
                sock.settimeout(deadline)
                data = sock.recv(1 << 20)
                if not data:
                    return got
                got += len(data)
        sock.settimeout(deadline)
        sock.shutdown(socket.SHUT_WR)
        while True:
            data = sock.recv(1 << 20)
            if not data:
                return got
            got += len(data)
    except (ConnectionResetError, BrokenPipeError):
        return got
    except OSError as exc:
        if isinstance(exc, TimeoutError):
            raise
        return got  # the other side closed before the half-close


def attack_handshake(path: Path, rng: random.Random, export: str, deadline: float = 10.0) -> None:
    """One connection with a broken handshake, and then broken requests in case it came through."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with sock:
        sock.connect(str(path))
        pour(sock, mutate(rng, handshake(rng, export) + requests(rng, 1 << 20, False, True)), deadline)


def attack_requests(path: Path, rng: random.Random, export: str, deadline: float = 10.0) -> None:
    """One connection with a good handshake and broken requests."""
    extended = rng.random() < 0.5
    with NbdClient(path, export, extended=extended, structured=rng.random() < 0.7) as client:
        stream = requests(rng, client.size, client.extended)
        if rng.random() < 0.8:
            stream = mutate(rng, stream)
        pour(client.sock, stream, deadline)


QMP_MESSAGES: list[Any] = [
    {"execute": "query-version"},
    {"execute": "query-named-block-nodes", "arguments": {"flat": True}, "id": 5},
    {"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "fuzz", "size": 65536}},
    {"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "r", "file": {"driver": "null-co"}}},
    {"execute": "blockdev-del", "arguments": {"node-name": "fuzz"}},
    {"execute": "blockdev-reopen", "arguments": {"options": [{"driver": "raw", "node-name": "r", "file": "fuzz"}]}},
    {"execute": "block-export-del", "arguments": {"id": "nosuch", "mode": "hard"}},
    {"execute": "object-add", "arguments": {"qom-type": "secret", "id": "s", "data": "x"}},
    {"execute": "object-del", "arguments": {"id": "s"}},
    {"execute": "qom-list", "arguments": {"path": "/objects"}, "id": {"a": [1, 2.5, None, "\u20ac"]}},
    {"execute": "qom-list-types", "arguments": {"implements": "user-creatable"}},
    {"exec-oob": "query-version", "id": 1},
]


def broken_qmp(rng: random.Random) -> bytes:
    """One broken message: its text changed, or one of its values."""
    message = json.loads(json.dumps(rng.choice(QMP_MESSAGES)))
    if rng.random() < 0.4:
        where = message.get("arguments", message)
        key = rng.choice(list(where))
        where[key] = rng.choice((None, True, 0, -1, 1 << 63, 1 << 70, 1.5, "", "x" * 5000, [], [[]], {}, {"a": {}}))
        return json.dumps(message).encode()
    return mutate(rng, json.dumps(message).encode())
