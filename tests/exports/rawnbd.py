"""A small blocking NBD client that says exactly what it is told to, right or wrong, and returns what it hears."""

from __future__ import annotations

import socket
import struct
from typing import Any

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
REPLYMAGIC = 0x3E889045565A9
REQUEST = 0x25609513
EXT_REQUEST = 0x21E41C71
SIMPLE = 0x67446698
STRUCTURED = 0x668E33EF
EXT_REPLY = 0x6E8A278C

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO, OPT_GO = 1, 2, 3, 5, 6, 7
OPT_STRUCTURED_REPLY, OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT, OPT_EXTENDED_HEADERS = 8, 9, 10, 11
REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = 1, 2, 4, 8, 16, 32


class Closed(Exception):
    """The server closed the connection."""


def meta(name: str | bytes, *queries: str | bytes) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    out = string(name) + struct.pack(">I", len(queries))
    return out + b"".join(string(query) for query in queries)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(data)) + data


def info(name: str | bytes, *requests: int) -> bytes:
    """The data of INFO and GO."""
    return string(name) + struct.pack(f">H{len(requests)}H", len(requests), *requests)


class RawClient:
    """`address`: a path, or (host, port), or a connected socket."""

    def __init__(self, address: Any, timeout: float = 10.0) -> None:
        if isinstance(address, socket.socket):
            self.sock = address
        elif isinstance(address, tuple):
            self.sock = socket.create_connection(address)
        else:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(address)
        self.sock.settimeout(timeout)
        self.extended = False
        self.cookie = 0

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *args: object) -> None:
        self.sock.close()

    def close(self) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def recv(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                more = self.sock.recv(length - len(data))
            except ConnectionError:
                raise Closed from None
            if not more:
                raise Closed
            data += more
        return bytes(data)

    def at_eof(self) -> bool:
        """Wait for the server to close; False if it sends something instead."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True

    # --- handshake ---

    def greet(self, flags: int = 3) -> tuple[int, int, int]:
        hello = struct.unpack(">QQH", self.recv(18))
        self.send(struct.pack(">I", flags))
        return hello

    def option(self, option: int, data: bytes = b"", length: int | None = None) -> list[tuple[int, bytes]]:
        """Send an option; the replies up to the final one as (type, data), or [(0, b"closed")] after them."""
        replies: list[tuple[int, bytes]] = []
        try:
            self.send(struct.pack(">QII", IHAVEOPT, option, len(data) if length is None else length) + data)
            while True:
                magic, opt, kind, size = struct.unpack(">QIII", self.recv(20))
                assert magic == REPLYMAGIC, hex(magic)
                assert opt == option, opt
                replies.append((kind, self.recv(size)))
                if kind == REP_ACK or kind & 0x80000000:
                    break
        except (Closed, BrokenPipeError):
            replies.append((0, b"closed"))
            return replies
        if option == OPT_EXTENDED_HEADERS and replies[-1][0] == REP_ACK:
            self.extended = True
        return replies

    def export_name(self, name: str | bytes, zeroes: bool = False) -> tuple[int, int]:
        data = name.encode() if isinstance(name, str) else name
        self.send(struct.pack(">QII", IHAVEOPT, OPT_EXPORT_NAME, len(data)) + data)
        size, flags = struct.unpack(">QH", self.recv(10))
        if zeroes:
            assert self.recv(124) == bytes(124)
        return size, flags

    def go(
        self, name: str = "", structured: bool = True, extended: bool = False, contexts: tuple[str, ...] = ()
    ) -> int:
        """Greet, negotiate, enter transmission; returns the size. Raises AssertionError if the server says no."""
        self.greet()
        if extended:
            assert self.option(OPT_EXTENDED_HEADERS)[-1][0] == REP_ACK
        elif structured:
            assert self.option(OPT_STRUCTURED_REPLY)[-1][0] == REP_ACK
        self.contexts = {}
        if contexts:
            for kind, data in self.option(OPT_SET_META_CONTEXT, meta(name, *contexts))[:-1]:
                assert kind == REP_META_CONTEXT
                self.contexts[data[4:].decode()] = struct.unpack(">I", data[:4])[0]
        replies = self.option(OPT_GO, info(name, 3))
        assert replies[-1][0] == REP_ACK, replies
        for kind, data in replies:
            if kind == REP_INFO and data[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", data[2:])
        return self.size

    # --- transmission ---

    def request(
        self,
        kind: int,
        offset: int = 0,
        length: int = 0,
        data: bytes = b"",
        flags: int = 0,
        cookie: int | None = None,
        magic: int | None = None,
    ) -> int:
        if cookie is None:
            self.cookie += 1
            cookie = self.cookie
        if self.extended:
            head = struct.pack(">IHHQQQ", EXT_REQUEST if magic is None else magic, flags, kind, cookie, offset, length)
        else:
            head = struct.pack(">IHHQQI", REQUEST if magic is None else magic, flags, kind, cookie, offset, length)
        self.send(head + data)
        return cookie

    def chunk(self, reading: int = 0) -> tuple[Any, ...]:
        """One simple reply ("simple", cookie, error, data of `reading` bytes) or chunk ("chunk", cookie, flags, type,
        payload)."""
        magic = struct.unpack(">I", self.recv(4))[0]
        if magic == SIMPLE:
            error, cookie = struct.unpack(">IQ", self.recv(12))
            return ("simple", cookie, error, self.recv(reading) if not error else b"")
        if magic == STRUCTURED:
            flags, kind, cookie, length = struct.unpack(">HHQI", self.recv(16))
            return ("chunk", cookie, flags, kind, self.recv(length))
        assert magic == EXT_REPLY, hex(magic)
        flags, kind, cookie, offset, length = struct.unpack(">HHQQQ", self.recv(28))
        return ("ext", cookie, flags, kind, self.recv(length), offset)

    def reply(self, reading: int = 0) -> list[tuple[Any, ...]]:
        """All chunks of the next reply."""
        out = []
        while True:
            chunk = self.chunk(reading)
            out.append(chunk)
            if chunk[0] == "simple" or chunk[2] & 1:
                return out

    def ask(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> list[Any]:
        """Send and wait for the reply; [("closed",)] when the connection ends instead. Cookies are left out."""
        try:
            cookie = self.request(kind, offset, length, data, flags)
            chunks = self.reply(length if kind == READ else 0)
        except (Closed, BrokenPipeError):
            return [("closed",)]
        assert all(chunk[1] == cookie for chunk in chunks)
        return [(chunk[0], *chunk[2:]) for chunk in chunks]

    def error(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> tuple[int, str]:
        """(NBD error, message) of the reply; (0, "") for success."""
        for chunk in self.ask(kind, offset, length, data, flags):
            if chunk[0] == "closed":
                raise Closed
            if chunk[0] == "simple":
                return chunk[1], ""
            if chunk[2] & 0x8000:
                code, size = struct.unpack(">IH", chunk[3][:6])
                return code, chunk[3][6 : 6 + size].decode()
        return 0, ""

    def read(self, offset: int, length: int, flags: int = 0) -> bytes:
        out = bytearray(length)
        seen = 0
        for chunk in self.ask(READ, offset, length, flags=flags):
            if chunk[0] == "simple":
                assert chunk[1] == 0, chunk
                return chunk[2]
            kind, payload = chunk[2], chunk[3]
            if kind == 1:
                start = struct.unpack(">Q", payload[:8])[0] - offset
                out[start : start + len(payload) - 8] = payload[8:]
                seen += len(payload) - 8
            elif kind == 2:
                start, size = struct.unpack(">QI", payload)
                seen += size
            else:
                assert kind == 0, chunk
        assert seen == length
        return bytes(out)

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        if self.extended:
            flags |= PAYLOAD_LEN
        assert self.error(WRITE, offset, len(data), data, flags) == (0, "")
