"""The server's side of the handshake: bytes in, bytes out, no sockets (proto.md, "Fixed newstyle negotiation")."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Protocol

from pyqsd.exports.nbd import protocol as p

#: Options with more data than this are refused: nobody needs it, and it would have to be kept in memory.
_MAX_DATA = 1 << 20


class Offered(Protocol):
    """What the handshake wants to know of an export."""

    name: str
    description: str | None
    allocation_depth: bool

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def flags(self) -> int:
        """Transmission flags, without those that depend on the connection."""

    @property
    def minimum_block(self) -> int:
        """Requests should be multiples of this many bytes."""

    @property
    def maximum_payload(self) -> int:
        """Bytes."""

    @property
    def bitmap_names(self) -> tuple[str, ...]:
        """The dirty bitmaps that clients may see."""


class MetaContexts:
    """The metadata contexts that a client has selected for one export: ids 0 (base:allocation), 1
    (qemu:allocation-depth) and 2 + n (the export's dirty bitmap n)."""

    __slots__ = ("export", "ids")

    def __init__(self, export: Offered | None = None, ids: Iterable[int] = ()) -> None:
        self.export = export
        self.ids = frozenset(ids)


def context_name(export: Offered, number: int) -> str:
    """The name of a metadata context by its id."""
    if number == 0:
        return "base:allocation"
    if number == 1:
        return "qemu:allocation-depth"
    return "qemu:dirty-bitmap:" + export.bitmap_names[number - 2]


def match_query(export: Offered, query: str, listing: bool) -> set[int]:
    """The contexts that `query` selects. A namespace or "qemu:dirty-bitmap:" alone matches everything in it when
    `listing`, and nothing otherwise (proto.md, "Metadata querying"; QEMU docs/interop/nbd)."""
    namespace, colon, leaf = query.partition(":")
    if not colon:
        return set()
    if namespace == "base":
        return {0} if leaf == "allocation" or (listing and not leaf) else set()
    if namespace != "qemu":
        return set()
    found = set()
    if export.allocation_depth and (leaf == "allocation-depth" or (listing and not leaf)):
        found.add(1)
    if (listing and not leaf) or leaf.startswith("dirty-bitmap:"):
        wanted = leaf[len("dirty-bitmap:") :]
        for number, name in enumerate(export.bitmap_names):
            if name == wanted or (listing and not wanted):
                found.add(2 + number)
    return found


class Handshake:
    """One negotiation.

    Arguments:
        find: the export with this name, or None.
        exports: all exports, in the order that LIST shows.

    `feed` bytes, then call `step` until it returns None. Afterwards `chosen` is the export with which transmission
    begins, or `ended` says that the connection is to be closed once everything has been sent. `step` raises
    `Violation` for a peer that does not speak the protocol.
    """

    def __init__(self, find: Callable[[str], Offered | None], exports: Callable[[], Iterable[Offered]]) -> None:
        self._find = find
        self._exports = exports
        self._data = bytearray()
        self._skip = 0
        self._refusal = b""
        self._greeted = False
        self._fixed = False
        self._no_zeroes = False
        self._contexts = MetaContexts()
        self.mode = p.SIMPLE
        self.chosen: Offered | None = None
        self.ended = False

    @staticmethod
    def hello() -> bytes:
        """What the server says first."""
        return struct.pack(">QQH", p.NBDMAGIC, p.IHAVEOPT, p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Bytes from the client."""
        self._data += data

    def rest(self) -> bytes:
        """What came after the option that began transmission."""
        return bytes(self._data)

    @property
    def contexts(self) -> MetaContexts:
        """The metadata contexts for the chosen export."""
        return self._contexts if self._contexts.export is self.chosen else MetaContexts()

    def step(self) -> bytes | None:
        """Handle the next message if all of it is there: what is to be sent in reply; None if there is none yet."""
        if self.ended or self.chosen is not None:
            return None
        data = self._data
        if self._skip:
            n = min(self._skip, len(data))
            del data[:n]
            self._skip -= n
            if self._skip:
                return None
            pending, self._refusal = self._refusal, b""
            return pending
        if not self._greeted:
            return self._client_flags()
        if len(data) < p.OPTION_HEADER.size:
            if len(data) >= 8:
                self._check_magic(int.from_bytes(data[:8], "big"))
            return None
        magic, option, length = p.OPTION_HEADER.unpack_from(data)
        self._check_magic(magic)
        if length > p.MAX_PAYLOAD:
            raise p.Violation(f"len ({length}) is larger than max len ({p.MAX_PAYLOAD})")
        if not self._fixed and option != p.OPT_EXPORT_NAME:
            name = p.OPTION_NAMES.get(option, "<unknown>")
            raise p.Violation(f"Unsupported option {option} ({name})")
        if option == p.OPT_EXPORT_NAME and (self.mode == p.EXTENDED or length > p.MAX_STRING):
            raise p.Violation(
                "Extended headers already negotiated" if self.mode == p.EXTENDED else "Bad length received"
            )
        refusal = self._refuse_early(option, length)
        if refusal is not None:
            del data[: p.OPTION_HEADER.size]
            self._skip = length
            if not length:
                return refusal
            self._refusal = refusal
            return b""
        end = p.OPTION_HEADER.size + length
        if len(data) < end:
            return None
        payload = bytes(data[p.OPTION_HEADER.size : end])
        del data[:end]
        try:
            return self._handle(option, payload)
        except p.OptionError as exc:
            return self._error(option, exc.kind, exc.message)

    @staticmethod
    def _check_magic(magic: int) -> None:
        if magic != p.IHAVEOPT:
            raise p.Violation("Bad magic received")

    def _client_flags(self) -> bytes | None:
        if len(self._data) < 4:
            return None
        flags = int.from_bytes(self._data[:4], "big")
        del self._data[:4]
        unknown = flags & ~(p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES)
        if unknown:
            raise p.Violation(f"Unknown client flags 0x{unknown:x} received")
        self._greeted = True
        self._fixed = bool(flags & p.FLAG_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & p.FLAG_NO_ZEROES)
        return b""

    @staticmethod
    def _error(option: int, kind: int, message: str) -> bytes:
        return p.option_reply(option, kind, p.text_bytes(message)[: p.MAX_STRING])

    def _refuse_early(self, option: int, length: int) -> bytes | None:
        """The error reply to an option whose data need not be read, or None."""
        if option in (p.OPT_LIST, p.OPT_STARTTLS, p.OPT_STRUCTURED_REPLY, p.OPT_EXTENDED_HEADERS):
            if length:
                name = p.OPTION_NAMES[option]
                return self._error(option, p.REP_ERR_INVALID, f"option '{name}' has unexpected length")
        elif option not in p.OPTION_NAMES:
            return self._error(option, p.REP_ERR_UNSUP, f"Unsupported option {option} (<unknown>)")
        elif length > _MAX_DATA and option != p.OPT_ABORT:
            name = p.OPTION_NAMES[option]
            return self._error(option, p.REP_ERR_TOO_BIG, f"option '{name}' has too much data")
        return None

    def _handle(self, option: int, data: bytes) -> bytes:
        if option == p.OPT_EXPORT_NAME:
            return self._export_name(data)
        if option == p.OPT_ABORT:
            self.ended = True
        elif option == p.OPT_LIST:
            return self._list()
        elif option == p.OPT_STARTTLS:
            raise p.OptionError(p.REP_ERR_POLICY, "TLS not configured")
        elif option in (p.OPT_INFO, p.OPT_GO):
            return self._info(option, data)
        elif option == p.OPT_STRUCTURED_REPLY:
            if self.mode == p.EXTENDED:
                raise p.OptionError(p.REP_ERR_EXT_HEADER_REQD, "extended headers already negotiated")
            if self.mode == p.STRUCTURED:
                raise p.OptionError(p.REP_ERR_INVALID, "structured reply already negotiated")
            self.mode = p.STRUCTURED
        elif option == p.OPT_EXTENDED_HEADERS:
            if self.mode == p.EXTENDED:
                raise p.OptionError(p.REP_ERR_INVALID, "extended headers already negotiated")
            self.mode = p.EXTENDED
        else:
            return self._meta_context(option, data)
        return p.option_reply(option, p.REP_ACK)

    def _flags(self, export: Offered, option: int) -> int:
        flags = export.flags
        if self.mode >= p.STRUCTURED:
            flags |= p.SEND_DF
        if self.mode == p.EXTENDED and (
            option == p.OPT_INFO or (self._contexts.export is export and self._contexts.ids)
        ):
            # What it depends on may still come after INFO.
            flags |= p.BLOCK_STATUS_PAYLOAD
        return flags

    def _export_name(self, data: bytes) -> bytes:
        export = self._find(p.bytes_text(data))
        if export is None:
            raise p.Violation("export not found")
        self.chosen = export
        return struct.pack(">QH", export.size, self._flags(export, p.OPT_EXPORT_NAME)) + bytes(
            0 if self._no_zeroes else 124
        )

    def _list(self) -> bytes:
        out = bytearray()
        for export in self._exports():
            name = p.text_bytes(export.name)
            description = p.text_bytes(export.description or "")
            out += p.option_reply(p.OPT_LIST, p.REP_SERVER, struct.pack(">I", len(name)) + name + description)
        out += p.option_reply(p.OPT_LIST, p.REP_ACK)
        return bytes(out)

    def _known(self, name: str) -> Offered:
        export = self._find(name)
        if export is None:
            raise p.OptionError(p.REP_ERR_UNKNOWN, f"export '{p.sane_name(name)}' not present")
        return export

    def _info(self, option: int, data: bytes) -> bytes:
        reader = p.OptionData(option, data)
        name = reader.name()
        requests = [reader.uint16() for _ in range(reader.uint16())]
        reader.end()
        export = self._known(name)
        asked_sizes = p.INFO_BLOCK_SIZE in requests
        minimum = export.minimum_block
        out = bytearray()

        def info(kind: int, data: bytes) -> None:
            out.extend(p.option_reply(option, p.REP_INFO, struct.pack(">H", kind) + data))

        if p.INFO_NAME in requests:
            info(p.INFO_NAME, p.text_bytes(export.name))
        if export.description is not None:
            info(p.INFO_DESCRIPTION, p.text_bytes(export.description))
        # A client that does not ask for sizes cannot be expected to heed them; it may send anything.
        shown = minimum if asked_sizes or option == p.OPT_INFO else 1
        info(p.INFO_BLOCK_SIZE, struct.pack(">III", shown, max(4096, shown), export.maximum_payload))
        info(p.INFO_EXPORT, struct.pack(">QH", export.size, self._flags(export, option)))
        if option == p.OPT_INFO and not asked_sizes and minimum > 1:
            out += self._error(option, p.REP_ERR_BLOCK_SIZE_REQD, "request NBD_INFO_BLOCK_SIZE to use this export")
            return bytes(out)
        out += p.option_reply(option, p.REP_ACK)
        if option == p.OPT_GO:
            self.chosen = export
        return bytes(out)

    def _meta_context(self, option: int, data: bytes) -> bytes:
        setting = option == p.OPT_SET_META_CONTEXT
        if setting:
            self._contexts = MetaContexts()
            if self.mode < p.STRUCTURED:
                name = p.OPTION_NAMES[option]
                raise p.OptionError(
                    p.REP_ERR_INVALID, f"request option '{name}' when structured reply is not negotiated"
                )
        reader = p.OptionData(option, data)
        export = self._known(reader.name())
        count = reader.uint32()
        found: set[int] = set()
        if not count and not setting:
            found = {0, *range(2, 2 + len(export.bitmap_names))}
            if export.allocation_depth:
                found.add(1)
        for _ in range(count):
            query = reader.query()
            if query is not None:
                found |= match_query(export, query, not setting)
        reader.end()
        out = bytearray()
        for number in sorted(found):
            text = p.text_bytes(context_name(export, number))
            out += p.option_reply(option, p.REP_META_CONTEXT, struct.pack(">I", number if setting else 0) + text)
        out += p.option_reply(option, p.REP_ACK)
        if setting:
            self._contexts = MetaContexts(export, found)
        return bytes(out)
