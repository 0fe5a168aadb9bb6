"""A small NBD client for tests, written from the NBD protocol document.

It can also do what no decent client does (raw bytes, half of a request, wrong lengths). For the decent part the real
clients (libnbd, qemu-img, fio …) are the judges; this one gives tests exact control over the order of things.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
REPLYMAGIC = 0x3E889045565A9
REQUEST = 0x25609513
EXTENDED_REQUEST = 0x21E41C71
SIMPLE_REPLY = 0x67446698
STRUCTURED_REPLY = 0x668E33EF
EXTENDED_REPLY = 0x6E8A278C

FLAG_FIXED_NEWSTYLE = 1
FLAG_NO_ZEROES = 2

OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_STARTTLS = 5
OPT_INFO = 6
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_LIST_META_CONTEXT = 9
OPT_SET_META_CONTEXT = 10
OPT_EXTENDED_HEADERS = 11

REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_META_CONTEXT = 4
REP_ERROR = 1 << 31

INFO_EXPORT = 0
INFO_NAME = 1
INFO_DESCRIPTION = 2
INFO_BLOCK_SIZE = 3

CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_TRIM = 4
CMD_CACHE = 5
CMD_WRITE_ZEROES = 6
CMD_BLOCK_STATUS = 7

F_FUA = 1
F_NO_HOLE = 2
F_DF = 4
F_REQ_ONE = 8
F_FAST_ZERO = 16
F_PAYLOAD_LEN = 32

CHUNK_NONE = 0
CHUNK_OFFSET_DATA = 1
CHUNK_OFFSET_HOLE = 2
CHUNK_BLOCK_STATUS = 5
CHUNK_BLOCK_STATUS_EXT = 6
CHUNK_ERROR = 32769
CHUNK_ERROR_OFFSET = 32770

TIMEOUT = 20.0


class NbdError(Exception):
    """The server answered a request with an error."""

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(f"NBD error {number} {text}".strip())
        self.number = number
        self.text = text


class ProtocolError(AssertionError):
    """The server broke the protocol."""


@dataclass
class Reply:
    """The whole answer to one request."""

    cookie: int
    error: int = 0
    text: str = ""
    data: dict[int, bytes] = field(default_factory=dict)  # offset → bytes
    holes: list[tuple[int, int]] = field(default_factory=list)
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # context id → (length, flags)
    simple: bytes | None = None


class NbdClient:
    """One connection. `address` is a unix socket's path or a (host, port) pair.

    With `export`, it is negotiated ready for requests; without, only the greeting has been read.
    """

    def __init__(
        self,
        address: str | os.PathLike[str] | tuple[str, int],
        export: str | None = None,
        *,
        structured: bool = True,
        extended: bool = False,
        contexts: tuple[str, ...] = (),
        timeout: float = TIMEOUT,
        greet: bool = True,
    ) -> None:
        self.timeout = timeout
        if isinstance(address, tuple):
            self.sock = socket.create_connection(address, timeout)
        else:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(timeout)
            self.sock.connect(os.fspath(address))
        self.structured = False
        self.extended = False
        self.size = 0
        self.flags = 0
        self.contexts: dict[str, int] = {}
        self.pending: dict[int, tuple[int, int, int]] = {}
        self._partial: dict[int, Reply] = {}
        self._cookie = 1
        try:
            if greet or export is not None:
                self.read_greeting()
            if export is not None:
                if extended:
                    self.extended = self.option(OPT_EXTENDED_HEADERS)[-1][0] == REP_ACK
                    self.structured = self.extended
                elif structured:
                    self.structured = self.option(OPT_STRUCTURED_REPLY)[-1][0] == REP_ACK
                if contexts:
                    self.set_meta_contexts(export, contexts)
                self.go(export)
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    # -- bytes ---------------------------------------------------------------------------------------------------

    def send_raw(self, data: bytes) -> None:
        self.sock.sendall(data)

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes; EOFError when the server closes before, TimeoutError when they do not come."""
        result = bytearray(count)
        view = memoryview(result)
        while view:
            got = self.sock.recv_into(view)
            if not got:
                raise EOFError("the server closed the connection")
            view = view[got:]
        return bytes(result)

    def wait_closed(self, timeout: float | None = None) -> bytes:
        """Reads until the server closes; returns what still came. TimeoutError when it stays open."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        rest = b""
        while True:
            if not select.select([self.sock], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the server keeps the connection open")
            try:
                data = self.sock.recv(1 << 16)
            except ConnectionResetError:
                return rest
            if not data:
                return rest
            rest += data

    # -- handshake -----------------------------------------------------------------------------------------------

    def read_greeting(self, client_flags: int = FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) -> int:
        magic, opt_magic, flags = struct.unpack(">QQH", self.read(18))
        if magic != NBDMAGIC or opt_magic != IHAVEOPT:
            raise ProtocolError(f"greeting {magic:x} {opt_magic:x}")
        self.send_raw(struct.pack(">I", client_flags))
        self.server_flags = int(flags)
        return self.server_flags

    def send_option(self, option: int, data: bytes = b"") -> None:
        self.send_raw(struct.pack(">QII", IHAVEOPT, option, len(data)) + data)

    def option_reply(self, option: int) -> tuple[int, bytes]:
        magic, echoed, kind, length = struct.unpack(">QIII", self.read(20))
        if magic != REPLYMAGIC or echoed != option or length > 1 << 20:
            raise ProtocolError(f"option reply {magic:x} to {echoed} (sent {option}), length {length}")
        return kind, self.read(length)

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Sends an option; all its replies, the last being the acknowledgement or an error."""
        self.send_option(option, data)
        replies = []
        while True:
            kind, payload = self.option_reply(option)
            replies.append((kind, payload))
            if kind == REP_ACK or kind & REP_ERROR:
                return replies

    @staticmethod
    def meta_query(export: str, queries: tuple[str, ...]) -> bytes:
        name = export.encode()
        data = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
        for query in queries:
            data += struct.pack(">I", len(query.encode())) + query.encode()
        return data

    def list_meta_contexts(self, export: str, queries: tuple[str, ...] = ()) -> list[str]:
        replies = self.option(OPT_LIST_META_CONTEXT, self.meta_query(export, queries))
        self._check_ack(replies)
        return [payload[4:].decode() for kind, payload in replies if kind == REP_META_CONTEXT]

    def set_meta_contexts(self, export: str, queries: tuple[str, ...]) -> dict[str, int]:
        replies = self.option(OPT_SET_META_CONTEXT, self.meta_query(export, queries))
        self._check_ack(replies)
        self.contexts = {
            payload[4:].decode(): struct.unpack(">I", payload[:4])[0]
            for kind, payload in replies
            if kind == REP_META_CONTEXT
        }
        return self.contexts

    @staticmethod
    def _check_ack(replies: list[tuple[int, bytes]]) -> None:
        kind, payload = replies[-1]
        if kind != REP_ACK:
            raise NbdError(kind, payload.decode("utf-8", "replace"))

    def list_exports(self) -> list[tuple[str, str]]:
        """(name, description) of all."""
        replies = self.option(OPT_LIST)
        self._check_ack(replies)
        result = []
        for kind, payload in replies:
            if kind == REP_SERVER:
                length = struct.unpack(">I", payload[:4])[0]
                result.append((payload[4 : 4 + length].decode(), payload[4 + length :].decode()))
        return result

    @staticmethod
    def info_request(export: str, requests: tuple[int, ...] = ()) -> bytes:
        name = export.encode()
        return struct.pack(f">I{len(name)}sH{len(requests)}H", len(name), name, len(requests), *requests)

    def info(self, export: str, requests: tuple[int, ...] = (), option: int = OPT_INFO) -> dict[int, bytes]:
        """NBD_OPT_INFO or GO: information type → payload."""
        replies = self.option(option, self.info_request(export, requests))
        self._check_ack(replies)
        infos = {struct.unpack(">H", payload[:2])[0]: payload[2:] for kind, payload in replies if kind == REP_INFO}
        self.size, self.flags = struct.unpack(">QH", infos[INFO_EXPORT])
        return infos

    def go(self, export: str, requests: tuple[int, ...] = (INFO_BLOCK_SIZE,)) -> dict[int, bytes]:
        return self.info(export, requests, OPT_GO)

    def export_name(self, export: str, no_zeroes: bool = True) -> None:
        self.send_option(OPT_EXPORT_NAME, export.encode())
        self.size, self.flags = struct.unpack(">QH", self.read(10))
        if not no_zeroes:
            self.read(124)

    # -- transmission --------------------------------------------------------------------------------------------

    def pack_request(
        self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"", cookie: int = 0
    ) -> bytes:
        if self.extended:
            if payload:
                flags |= F_PAYLOAD_LEN
            head = struct.pack(">IHHQQQ", EXTENDED_REQUEST, flags, command, cookie, offset, length)
        else:
            head = struct.pack(">IHHQQI", REQUEST, flags, command, cookie, offset, length)
        return head + payload

    def send(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> int:
        """Sends a request without waiting; its cookie."""
        cookie = self._cookie
        self._cookie += 1
        self.pending[cookie] = (command, offset, length)
        self.send_raw(self.pack_request(command, offset, length, flags, payload, cookie))
        return cookie

    def receive(self) -> Reply:
        """The next finished reply, of whichever request."""
        while True:
            magic = struct.unpack(">I", self.read(4))[0]
            if magic == SIMPLE_REPLY:
                error, cookie = struct.unpack(">IQ", self.read(12))
                if cookie not in self.pending:
                    raise ProtocolError(f"simple reply to {cookie}, which was not asked")
                command, _, length = self.pending.pop(cookie)
                if self.extended or (self.structured and command == CMD_READ and not error):
                    raise ProtocolError("simple reply where a structured one is due")
                reply = Reply(cookie, error)
                if command == CMD_READ and not error:
                    reply.simple = self.read(length)
                return reply
            if magic == STRUCTURED_REPLY and self.structured and not self.extended:
                flags, kind, cookie, length = struct.unpack(">HHQI", self.read(16))
            elif magic == EXTENDED_REPLY and self.extended:
                flags, kind, cookie, _, length = struct.unpack(">HHQQQ", self.read(28))
            else:
                raise ProtocolError(f"reply magic {magic:x}")
            if cookie not in self.pending:
                raise ProtocolError(f"chunk for {cookie}, which was not asked")
            if length > 33 << 20:
                raise ProtocolError(f"chunk of {length} bytes")
            reply = self._partial.setdefault(cookie, Reply(cookie))
            self._chunk(reply, kind, self.read(length), self.pending[cookie])
            if flags & 1:
                del self.pending[cookie], self._partial[cookie]
                return reply

    def _chunk(self, reply: Reply, kind: int, payload: bytes, request: tuple[int, int, int]) -> None:
        _, start, length = request
        if kind == CHUNK_NONE:
            if payload:
                raise ProtocolError("NBD_REPLY_TYPE_NONE with a payload")
        elif kind == CHUNK_OFFSET_DATA:
            offset = struct.unpack(">Q", payload[:8])[0]
            if offset < start or offset + len(payload) - 8 > start + length or len(payload) <= 8:
                raise ProtocolError(f"data chunk {offset}+{len(payload) - 8} for {start}+{length}")
            reply.data[offset] = payload[8:]
        elif kind == CHUNK_OFFSET_HOLE:
            offset, size = struct.unpack(">QI", payload)
            if offset < start or offset + size > start + length or not size:
                raise ProtocolError(f"hole chunk {offset}+{size} for {start}+{length}")
            reply.holes.append((offset, size))
        elif kind == CHUNK_BLOCK_STATUS:
            context = struct.unpack(">I", payload[:4])[0]
            reply.extents[context] = [struct.unpack_from(">II", payload, at) for at in range(4, len(payload), 8)]
        elif kind == CHUNK_BLOCK_STATUS_EXT:
            context, count = struct.unpack(">II", payload[:8])
            if len(payload) != 8 + 16 * count:
                raise ProtocolError("extended block status chunk of a wrong length")
            reply.extents[context] = [struct.unpack_from(">QQ", payload, at) for at in range(8, len(payload), 16)]
        elif kind in (CHUNK_ERROR, CHUNK_ERROR_OFFSET):
            error, text = struct.unpack(">IH", payload[:6])
            if not error:
                raise ProtocolError("error chunk without an error")
            reply.error = reply.error or error
            reply.text = payload[6 : 6 + text].decode("utf-8", "replace")
        else:
            raise ProtocolError(f"chunk type {kind}")

    def call(self, command: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> Reply:
        """One request, and its reply; raises `NbdError`."""
        cookie = self.send(command, offset, length, flags, payload)
        reply = self.receive()
        if reply.cookie != cookie:
            raise ProtocolError("reply to another request")
        if reply.error:
            raise NbdError(reply.error, reply.text)
        return reply

    @staticmethod
    def assemble(reply: Reply, offset: int, length: int) -> bytes:
        """The bytes of a successful read; checks that every byte was answered exactly once."""
        if reply.simple is not None:
            return reply.simple
        result = bytearray(length)
        parts = sorted([(at, len(data)) for at, data in reply.data.items()] + reply.holes)
        end = offset
        for at, size in parts:
            if at != end:
                raise ProtocolError(f"read chunks do not join at {end}: {parts}")
            end += size
        if end != offset + length:
            raise ProtocolError(f"read chunks end at {end} instead of {offset + length}")
        for at, data in reply.data.items():
            result[at - offset : at - offset + len(data)] = data
        return bytes(result)

    def pread(self, offset: int, length: int, flags: int = 0) -> bytes:
        return self.assemble(self.call(CMD_READ, offset, length, flags), offset, length)

    def pwrite(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.call(CMD_WRITE, offset, len(data), flags, data)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.call(CMD_WRITE_ZEROES, offset, length, flags)

    def trim(self, offset: int, length: int, flags: int = 0) -> None:
        self.call(CMD_TRIM, offset, length, flags)

    def cache(self, offset: int, length: int) -> None:
        self.call(CMD_CACHE, offset, length)

    def flush(self) -> None:
        self.call(CMD_FLUSH)

    def block_status(self, offset: int, length: int, flags: int = 0) -> dict[str, list[tuple[int, int]]]:
        """Context name → (length, flags) extents."""
        reply = self.call(CMD_BLOCK_STATUS, offset, length, flags)
        names = {number: name for name, number in self.contexts.items()}
        return {names[number]: extents for number, extents in reply.extents.items()}

    def block_map(self, context: str, length: int | None = None) -> list[tuple[int, int, int]]:
        """The whole of one context as (offset, length, flags), neighbours with equal flags merged."""
        end = self.size if length is None else length
        result: list[tuple[int, int, int]] = []
        offset = 0
        while offset < end:
            extents = self.block_status(offset, min(end - offset, 1 << 30))[context]
            for size, flags in extents:
                size = min(size, end - offset)
                if size <= 0:
                    break
                if result and result[-1][2] == flags:
                    start, before, _ = result[-1]
                    result[-1] = (start, before + size, flags)
                else:
                    result.append((offset, size, flags))
                offset += size
        return result

    def disconnect(self) -> None:
        """NBD_CMD_DISC and close."""
        self.send_raw(self.pack_request(CMD_DISC))
        self.sock.close()


def is_alive(address: str | os.PathLike[str], export: str, expect: bytes | None = None) -> Any:
    """Opens a connection, reads the first sector and leaves decently; `expect` is what must be there."""
    with NbdClient(address, export) as client:
        data = client.pread(0, 512)
        if expect is not None and data != expect:
            raise AssertionError("the other export's data changed")
        client.disconnect()
    return data
