"""What can be done with a whole image: checking, storing bitmaps, changing properties, snapshots.

These operations change tables behind the back of the driver's requests. Each runs to its end, even if whoever asked for
it is cancelled, holds `Image.operation_lock` where others could meet it, and lets the driver forget what it has at hand
(`_forget`).
"""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING, Any

from pyqsd.block import graph_perms
from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.driver import Driver
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2 import info
from pyqsd.qapi.errors import Error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from pyqsd.block.child import Child
    from pyqsd.block.dirty_bitmap import DirtyBitmap
    from pyqsd.block.image_check import CheckResult
    from pyqsd.block.info import SnapshotInfo
    from pyqsd.block.node import Node
    from pyqsd.drivers.formats.qcow2.amend_options import AmendOptions
    from pyqsd.drivers.formats.qcow2.bitmap_format import StoredBitmap
    from pyqsd.drivers.formats.qcow2.compression import Unpacked
    from pyqsd.drivers.formats.qcow2.encryption import Encryption
    from pyqsd.drivers.formats.qcow2.image import Image
    from pyqsd.drivers.formats.qcow2.unmap import Unmapper
    from pyqsd.drivers.formats.qcow2.write import Writer


class Operations(Driver):
    """The part of the driver for operations on the whole image; `Qcow2` has the rest."""

    image: Image
    _writer: Writer
    _unmapper: Unmapper
    _unpacked: Unpacked

    def __init__(self, node: Node, options: Any) -> None:
        super().__init__(node, options)
        #: Whether writes may go on without another look at the header.
        self._ready = False
        #: The image is being repaired, whether or not the node may be written to.
        self._repairing = False
        self._preallocated: bool | None = None
        self._last_key = -1
        self._encryption: Encryption | None = None

    async def _prepare_write(self) -> None:
        """Before the first write. Raises OSError."""
        raise NotImplementedError

    async def _complete(self) -> None:
        """Bring everything to disk, refcounts too, and say so in the header. Raises OSError."""
        raise NotImplementedError

    def _use_size(self) -> None:
        """The disk has another size: the default size of the cache follows it."""
        raise NotImplementedError

    # --- checking ---------------------------------------------------------------------------------------------------

    async def check(self, repair: str = "none") -> CheckResult:
        from pyqsd.drivers.formats.qcow2.check import checking, repairing

        image = self.image
        image.check_usable()
        if self.options.x_snapshot is not None:
            raise Error("A node that shows an internal snapshot cannot be checked", errno.ENOTSUP)
        surplus = image.surplus.error
        if surplus is not None and repair != "all":
            # What the snapshots that were left out have only looks leaked.
            raise Error(f'Check failed: {surplus.desc}; "all" repairs that', errno.EFBIG)
        async with image.operation_lock:
            await self._complete()
            if repair == "none":
                return await checking.check(image)
            found: list[CheckResult] = []

            async def run() -> None:
                found.append(await repairing.check_and_repair(image, repair == "all"))

            # Also a node that was opened read-only, because its image is corrupt, writes to the file then.
            self._repairing = True
            try:
                graph_perms.refresh([self.node])
                # What is half repaired is not left so, even if nobody waits any more.
                await image.uncancelled(run())
            finally:
                await image.tasks_done()
                self._forget()
                self._repairing = False
                graph_perms.refresh([self.node])
            return found[0]

    def child_perms(self, child: Child, role: int, perm: int, shared: int) -> tuple[int, int]:
        need, share = super().child_perms(child, role, perm, shared)
        if self._repairing and child is self.file:
            need |= perms.WRITE | perms.RESIZE
        return need, share

    # --- bitmaps in the image -----------------------------------------------------------------------------------------

    async def check_new_bitmap(self, name: str, granularity: int) -> None:
        from pyqsd.drivers.formats.qcow2 import bitmaps

        bitmaps.check_new(self.image, self.node, name, granularity)

    async def remove_bitmap(self, name: str) -> Callable[[], Awaitable[None]]:
        from pyqsd.drivers.formats.qcow2 import bitmaps

        image = self.image
        gone: list[tuple[int, StoredBitmap]] = []

        async def restore() -> None:
            if gone:
                async with image.operation_lock:
                    await image.to_the_end(bitmaps.restore(image, gone))

        if not image.bitmaps or not self.node.active:
            # Of an inactive node, the image is somebody else's: only what was added in memory since goes.
            return restore
        if self.node.read_only:
            raise Error("Failed to update bitmap extension: Operation not permitted", errno.EPERM)
        if not self._ready:
            await self._prepare_write()
        async with image.operation_lock:
            await image.to_the_end(bitmaps.remove(image, name, gone))
        return restore

    async def _store_bitmaps(self) -> list[DirtyBitmap]:
        """Bring persistent bitmaps into the image. Raises OSError, Error."""
        image, node = self.image, self.node
        if not node.dirty_bitmaps or node.read_only or not node.active or image.broken:
            return []
        from pyqsd.drivers.formats.qcow2 import bitmaps

        if not bitmaps.storable(node):
            return []

        async def store() -> None:
            stored.extend(await bitmaps.store(image, node))

        stored: list[DirtyBitmap] = []
        if not self._ready:
            await self._prepare_write()
        async with image.operation_lock:
            await image.to_the_end(store())
        return stored

    async def _store_bitmaps_or_say_so(self) -> None:
        try:
            await self._store_bitmaps()
        except (OSError, Error) as exc:
            text = exc.strerror if isinstance(exc, OSError) else exc.desc
            name = self.node.name
            print(f"Lost persistent bitmaps during inactivation of node '{name}': {text}", file=sys.stderr)

    async def _use_bitmaps(self) -> None:
        """The bitmaps in the image may change from now on, unless that cannot be said on disk."""
        if not self.image.bitmaps or self.options.x_snapshot is not None:
            return
        from pyqsd.drivers.formats.qcow2 import bitmaps

        try:
            await bitmaps.mark_in_use(self.image)
            readonly = False
        except Error as exc:
            print(f"Failed to make dirty bitmaps writable: {exc.desc}", file=sys.stderr)
            readonly = True
        self._bitmaps_readonly(readonly)

    def _bitmaps_readonly(self, readonly: bool) -> None:
        for one in self.image.bitmaps:
            bitmap = self.node.dirty_bitmaps.get(headers.shown(one.name))
            if bitmap is not None and bitmap.persistent:
                bitmap.readonly = readonly

    # --- amending ---------------------------------------------------------------------------------------------------

    @classmethod
    def amend_options(cls) -> type[AmendOptions]:
        from pyqsd.drivers.formats.qcow2.amend_options import AmendOptions

        return AmendOptions

    async def amend(self, options: AmendOptions, force: bool) -> None:
        from pyqsd.drivers.formats.qcow2 import amend

        image, node = self.image, self.node
        if not amend.wanted(options):
            return
        amend.check(image, options, self.options)
        perm = perms.CONSISTENT_READ | perms.WRITE | (perms.RESIZE if options.size is not None else 0)
        backend = BlockBackend(node.graph, f"the amendment of node '{node.name}'", perm, perms.ALL)
        backend.insert(node)
        try:
            if not self._ready:
                await self._prepare_write()
            if options.encrypt is not None:
                assert self._encryption is not None
                secret = self.options.encrypt.key_secret
                await amend.amend_key_slots(image, self._encryption, options.encrypt, secret, force)
            async with node.graph.drained(node), image.operation_lock:
                # Snapshots and bitmaps may have come while it waited.
                amend.check(image, options, self.options)
                await self._complete()
                try:
                    await image.uncancelled(amend.amend_image(image, self._writer, self._unmapper, options))
                finally:
                    await image.tasks_done()
                    self._forget()
                    self._use_size()
                if options.size is not None:
                    await node.truncate(options.size)
        finally:
            backend.remove()

    # --- snapshots ------------------------------------------------------------------------------------------------

    def snapshot_list(self) -> list[SnapshotInfo]:
        if self.image.header.incompatible & headers.INCOMPAT_DATA_FILE:
            raise OSError(errno.ENOTSUP, "Operation not supported")
        return info.snapshot_infos(self.image)

    async def snapshot_create(self, name: str) -> SnapshotInfo:
        from pyqsd.drivers.formats.qcow2 import snapshot_ops

        async def create() -> None:
            made.append(info.snapshot_info(await snapshot_ops.create(self.image, name)))

        made: list[SnapshotInfo] = []
        await self._snapshot_operation(create)
        return made[0]

    async def snapshot_delete(self, ident: str | None, name: str | None) -> None:
        from pyqsd.drivers.formats.qcow2 import snapshot_ops

        async def delete() -> None:
            # Not before it is our turn: others make new tables, and may have deleted it.
            one = snapshot_ops.find(self.image, ident, name)
            if one is None:
                raise Error("Can't find the snapshot", errno.ENOENT)
            await snapshot_ops.delete(self.image, one)

        if snapshot_ops.find(self.image, ident, name) is None:
            raise Error("Can't find the snapshot", errno.ENOENT)
        if self.node.read_only or not self.node.active:
            raise Error("Failed to remove snapshot from snapshot list: Operation not permitted", errno.EPERM)
        await self._snapshot_operation(delete)

    async def snapshot_goto(self, ident: str | None, name: str | None) -> None:
        from pyqsd.drivers.formats.qcow2 import snapshot_ops

        async def goto() -> None:
            one = snapshot_ops.find(self.image, ident, name)
            if one is None:
                raise OSError(errno.ENOENT, "No such file or directory")
            await snapshot_ops.goto(self.image, one)

        await self._snapshot_operation(goto)
        self._use_size()

    async def _snapshot_operation(self, operation: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run an operation on the snapshots to its end, whoever is cancelled meanwhile. Raises OSError, Error."""
        image = self.image
        image.check_usable()
        if self.node.read_only or not self.node.active:
            raise OSError(errno.EPERM, "Operation not permitted")
        if not self._ready:
            await self._prepare_write()
        async with image.operation_lock:
            try:
                await image.to_the_end(operation())
            finally:
                self._forget()

    def _forget(self) -> None:
        """The tables were changed by other than a request."""
        self._unpacked.forget()
        self._last_key = -1
        self._preallocated = None
