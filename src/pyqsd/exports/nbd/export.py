"""The export type ``nbd``: a node as an export of the NBD server."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, ClassVar

from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.bitmap_commands import BlockDirtyBitmap, BlockDirtyBitmapOrStr, find_bitmap
from pyqsd.block.extents import DATA, ZERO
from pyqsd.exports.export import BlockExportOptions, BlockExportType, Export, Exports
from pyqsd.exports.nbd import protocol as p
from pyqsd.exports.nbd.server import NbdServer
from pyqsd.qapi.errors import Error

if TYPE_CHECKING:
    from pyqsd.block.dirty_bitmap import DirtyBitmap
    from pyqsd.block.node import Node
    from pyqsd.exports.nbd.connection import Connection


class NbdOptions(BlockExportOptions, kw_only=True, tag="nbd"):
    """`name`: what clients ask for (default: the node's name). `description`: for people. `bitmaps`: dirty bitmaps that
    clients may query; names are looked for along the backing chain. `allocation_depth`: clients may query which layer
    of the chain holds the data."""

    name: str | None = None
    description: str | None = None
    bitmaps: list[BlockDirtyBitmapOrStr] | None = None
    allocation_depth: bool | None = None


class NbdExport(Export):
    """A node as NBD clients see it."""

    export_type = BlockExportType.NBD
    Options = NbdOptions
    # The size has been told to clients, who have no way to learn of another one.
    SHARED: ClassVar[int] = perms.ALL & ~perms.RESIZE

    def __init__(self, exports: Exports, options: NbdOptions, backend: BlockBackend) -> None:
        super().__init__(exports, options, backend)
        self.name = options.node_name if options.name is None else options.name
        self.description = options.description
        self.allocation_depth = bool(options.allocation_depth)
        self.writethrough = bool(options.writethrough)
        #: Writes without FUA need not be durable when they are answered.
        self.fast_write = self.writable and not self.writethrough
        self.bitmaps: list[DirtyBitmap] = []
        self.size = 0
        self.flags = 0
        self.paused = False
        self.connections: set[Connection] = set()
        self._gone: asyncio.Event | None = None

    # --- what the handshake asks ------------------------------------------------------------------------------------

    @property
    def minimum_block(self) -> int:
        """Requests that are no multiples of this many bytes take longer."""
        return self.backend.node.limits.request_alignment

    @property
    def maximum_payload(self) -> int:
        """Bytes."""
        limit = self.backend.node.limits.max_transfer
        return min(limit, p.MAX_PAYLOAD) if limit else p.MAX_PAYLOAD

    @property
    def bitmap_names(self) -> tuple[str, ...]:
        """The names of the dirty bitmaps that clients may query."""
        return tuple(bitmap.name for bitmap in self.bitmaps)

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Enter the export into the server. Raises Error."""
        server = self.exports.shared(NbdServer)
        server.check_running()
        if len(p.text_bytes(self.name)) > p.MAX_STRING:
            raise Error(f"export name '{self.name}' too long")
        if self.description is not None and len(p.text_bytes(self.description)) > p.MAX_STRING:
            raise Error(f"description '{self.description}' too long")
        if self.name in server.exports:
            raise Error(f"NBD server already has export named '{self.name}'")
        bitmaps = [self._bitmap(ref) for ref in self.options.bitmaps or ()]
        self.size = self.backend.length
        self.flags = p.HAS_FLAGS | p.SEND_FLUSH | p.SEND_FUA | p.SEND_CACHE
        if server.max_connections != 1:
            self.flags |= p.CAN_MULTI_CONN
        if self.writable:
            self.flags |= p.SEND_TRIM | p.SEND_WRITE_ZEROES | p.SEND_FAST_ZERO
        else:
            self.flags |= p.READ_ONLY
        for bitmap in bitmaps:
            bitmap.busy = True
        self.bitmaps = bitmaps
        server.exports[self.name] = self

    def _bitmap(self, ref: str | BlockDirtyBitmap) -> DirtyBitmap:
        node: Node | None
        if isinstance(ref, str):
            name = ref
            node = self.backend.node
            while node is not None and name not in node.dirty_bitmaps:
                node = node.below()
            if node is None:
                raise Error(f"Bitmap '{name}' is not found")
        else:
            name = ref.name
            node, _ = find_bitmap(self.exports.graph, ref.node, name)
        bitmap = node.dirty_bitmaps[name]
        bitmap.check(allow_readonly=True)
        if not self.writable and not node.read_only and bitmap.enabled:
            raise Error(f"Enabled bitmap '{name}' incompatible with readonly export")
        return bitmap

    async def stop(self) -> None:
        """Disconnect all clients and wait for what they have in flight."""
        server = self.exports.shared(NbdServer)
        if server.exports.get(self.name) is self:
            del server.exports[self.name]
        self._gone = asyncio.Event()
        for connection in list(self.connections):
            connection.abort()
        if self.connections:
            await self._gone.wait()
        for bitmap in self.bitmaps:
            bitmap.busy = False

    def in_use(self) -> bool:
        """Whether clients are connected."""
        return bool(self.connections)

    def joined(self, connection: Connection) -> None:
        """A client begins transmission."""
        self.connections.add(connection)

    def left(self, connection: Connection) -> None:
        """A client is gone, and so is all that it had in flight."""
        self.connections.discard(connection)
        if self._gone is not None and not self.connections:
            self._gone.set()

    def resized(self) -> None:
        """Clients that come from now on see the new size."""
        self.size = self.backend.length

    def drain_begin(self) -> None:
        """Connections read no further requests."""
        self.paused = True
        for connection in self.connections:
            connection.pause()

    def drain_end(self) -> None:
        """Connections go on."""
        self.paused = False
        for connection in self.connections:
            connection.resume()

    # --- block status -------------------------------------------------------------------------------------------------

    async def status(self, context: int, offset: int, length: int, most: int) -> list[tuple[int, int]]:
        """The extents of a metadata context from `offset` on, at least one and at most `most`, as ``(length in bytes,
        flags)``; they need not cover all of `length`. Raises OSError."""
        if context >= 2:
            return self._bitmap_status(self.bitmaps[context - 2], offset, length, most)
        extents: list[tuple[int, int]] = []
        end = offset + length
        while offset < end:
            (n, flags, _, _), depth = await self.backend.block_status_above(None, offset, end - offset)
            if n <= 0:
                raise OSError(errno.EIO, "no block status")
            n = min(n, end - offset)
            if context == 1:
                state = depth
            else:
                state = (0 if flags & DATA else p.STATE_HOLE) | (p.STATE_ZERO if flags & ZERO else 0)
            if not _append(extents, n, state, most):
                break
            offset += n
        return extents

    @staticmethod
    def _bitmap_status(bitmap: DirtyBitmap, offset: int, length: int, most: int) -> list[tuple[int, int]]:
        extents: list[tuple[int, int]] = []
        end = offset + length
        while offset < end:
            area = bitmap.next_dirty_area(offset, end)
            if area is None:
                _append(extents, end - offset, 0, most)
                break
            start, n = area
            if start > offset and not _append(extents, start - offset, 0, most):
                break
            if not _append(extents, n, p.STATE_DIRTY, most):
                break
            offset = start + n
        return extents


def _append(extents: list[tuple[int, int]], length: int, state: int, most: int) -> bool:
    """Add an extent, or lengthen the last one if it has the same state; False if there is no room."""
    if extents and extents[-1][1] == state:
        extents[-1] = (extents[-1][0] + length, state)
        return True
    if len(extents) >= most:
        return False
    extents.append((length, state))
    return True


EXPORT = NbdExport
