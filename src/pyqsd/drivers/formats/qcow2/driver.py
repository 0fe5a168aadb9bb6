"""The qcow2 driver: where the data is, and how its parts are put together.

See docs/drivers/qcow2.md; the format is QEMU's docs/interop/qcow2.
"""

from __future__ import annotations

import asyncio
import errno
from array import array
from typing import TYPE_CHECKING, Any

from pyqsd.block import iov as iovs
from pyqsd.block.driver import MAY_UNMAP, NO_FALLBACK, ROLE_COW, ROLE_IMAGE, WRITE_COMPRESSED, Limits
from pyqsd.block.extents import ALLOCATED, COMPRESSED, DATA, DRIVER, OFFSET_VALID, RECURSE, ZERO, Extent
from pyqsd.drivers.formats.qcow2 import extended, info, opening, tables
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.compression import Unpacked
from pyqsd.drivers.formats.qcow2.operations import Operations
from pyqsd.drivers.formats.qcow2.options import Options
from pyqsd.drivers.formats.qcow2.options import settings as make_settings
from pyqsd.drivers.formats.qcow2.tables import COPIED, OFFSET_MASK, Slice
from pyqsd.drivers.formats.qcow2.unmap import Unmapper
from pyqsd.drivers.formats.qcow2.write import Writer
from pyqsd.qapi.errors import Error, from_oserror, strerror
from pyqsd.qapi.types import Null

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyqsd.block.child import Child
    from pyqsd.block.dirty_bitmap import DirtyBitmap
    from pyqsd.block.graph import Graph
    from pyqsd.block.node import Node
    from pyqsd.drivers.formats.qcow2.create_options import CreateOptions
    from pyqsd.drivers.formats.qcow2.encryption import Access, Encryption
    from pyqsd.drivers.formats.qcow2.image import Image
    from pyqsd.drivers.formats.qcow2.packing import Packer

#: Compressed clusters that are unpacked at a time, bytes.
_UNPACK_MOST = 2 << 20
_STORED = DATA | ALLOCATED | OFFSET_VALID
#: What is encrypted by itself, bytes.
_SECTOR = 512
_NO_ENTRIES: array[int] = array("Q")


class Qcow2(Operations):
    """See docs/drivers/qcow2.md."""

    name = "qcow2"
    Options = Options
    supports_backing = True
    supports_snapshots = True
    strong_options = ("encrypt.key_secret",)
    write_flags = WRITE_COMPRESSED
    zero_flags = MAY_UNMAP | NO_FALLBACK
    mutable_options = frozenset(
        {
            "lazy_refcounts",
            "pass_discard_request",
            "pass_discard_snapshot",
            "pass_discard_other",
            "discard_no_unref",
            "overlap_check",
            "cache_size",
            "l2_cache_size",
            "l2_cache_entry_size",
            "refcount_cache_size",
            "cache_clean_interval",
            "encrypt",
        }
    )

    _packer: Packer | None
    _plain_map: Callable[[int, int], Extent | None]
    _plain_map_write: Callable[[int, int], tuple[int, Node, int] | None]

    def __init__(self, node: Node, options: Any) -> None:
        super().__init__(node, options)
        self._repaired = False
        self._preparing = asyncio.Lock()
        self._clean_timer: asyncio.TimerHandle | None = None
        self._access: Access | None = None
        # What `map` needs, at hand, beside `_last_key`: see `_adopt`.
        self._last_entries = _NO_ENTRIES
        self._slices: dict[int, Slice] = {}

    @classmethod
    def create_options(cls) -> type[CreateOptions]:
        from pyqsd.drivers.formats.qcow2.create_options import CreateOptions

        return CreateOptions

    @classmethod
    async def create(cls, graph: Graph, options: CreateOptions) -> None:
        from pyqsd.drivers.formats.qcow2 import create

        await create.create(graph, options)

    @classmethod
    def probe(cls, buf: bytes, filename: str) -> int:
        """How sure it is (0 to 100) that a file that begins with `buf` is a qcow2 image."""
        return headers.probe(buf)

    # --- life ---------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        file = (await self.node.open_child("file", self.options.file, ROLE_IMAGE)).node
        try:
            await self._load(file)
            if self.options.backing is not None or not self.node.check_only:
                # What the image names may be missing, and is not needed for a check.
                await self._open_backing()
        except BaseException:
            self._forget_key()
            raise
        self._start_cleaning()

    async def _load(self, file: Node) -> None:
        """Read the metadata of the image in `file` and use it from now on. Raises Error."""
        node = self.node
        header = await opening.read_header(node, file, self.options)
        data_file = await opening.open_data_file(node, header, self.options)
        image = await opening.open_image(node, file, header, self.options, data_file)
        if self.options.x_snapshot is not None:
            await self._show_snapshot(image, self.options.x_snapshot)
        if image.encrypted and (self.options.encrypt is not None or not node.check_only):
            if self._encryption is None:
                self._encryption = await opening.open_encryption(image, self.options)
            else:
                await self._encryption.reload(image)
        if not node.check_only:
            image.bitmaps = await opening.read_bitmaps(image)
        self._adopt(image)
        self._ready = self._repaired = False
        self._preallocated = None
        if not node.read_only and node.active:
            await self._repair()
            self._repaired = True
        if image.bitmaps and self.options.x_snapshot is None and node.active:
            from pyqsd.drivers.formats.qcow2 import bitmaps

            await bitmaps.load(image, node)

    async def _show_snapshot(self, image: Image, wanted: str) -> None:
        from pyqsd.drivers.formats.qcow2 import snapshot_ops

        self.node.set_read_only("'x-snapshot' can only be used with read-only=on")
        try:
            await snapshot_ops.load(image, snapshot_ops.select(image, wanted))
        except OSError as exc:
            raise from_oserror(exc, "Could not read the snapshot's L1 table") from exc

    async def _open_backing(self) -> None:
        ref, header = self.options.backing, self.image.header
        if ref is None:
            if header.backing_file:
                await self.node.open_backing(header.backing_file, header.backing_format)
        elif not isinstance(ref, Null):
            await self.node.open_child("backing", ref, ROLE_COW, "Could not open backing file: ")

    def _adopt(self, image: Image) -> None:
        """Use `image`, and keep at hand what the hot paths need of it."""
        self.image = image
        l2 = image.l2
        self._last_key = -1
        self._unpacked = Unpacked(image)
        self._packer = None
        for name in ("map", "map_write", "read_now", "write_now"):
            # Those of the image that was used before.
            self.__dict__.pop(name, None)
        if image.extended:
            self._writer = extended.ExtendedWriter(image, self._unpacked)
            # The usual ones are for one word an entry, and fast.
            setattr(self, "map", self._map_extended)  # noqa: B010
            setattr(self, "map_write", self._map_write_extended)  # noqa: B010
        else:
            self._writer = Writer(image, self._unpacked)
        if image.external:
            self._plain_map = self._map_extended if image.extended else self._map_ordinary
            self._plain_map_write = self._map_write_extended if image.extended else self._map_write_ordinary
            setattr(self, "map", self._map_external)  # noqa: B010
            setattr(self, "map_write", self._map_write_external)  # noqa: B010
        if self._encryption is not None:
            self._adopt_encryption(self._encryption)
        self._unmapper = Unmapper(image, self._writer)
        image.forget_slice = self._forget_slice
        image.forget_all = self._forget_all
        self._data = image.data
        self._slices = l2.slices
        self._slice_shift = l2.slice_shift
        self._slice_mask = l2.slice_entries - 1
        self._bits = image.cluster_bits
        self._size = image.cluster_size
        self._mask = image.cluster_mask
        #: The bits that must be clear in the L2 entry of an ordinary cluster.
        self._odd = ((1 << 63) - 1) & ~(OFFSET_MASK & ~image.cluster_mask)
        #: The same, with the bit that must be set for writing in place.
        self._odd_or_copied = self._odd | COPIED

    def _adopt_encryption(self, encryption: Encryption) -> None:
        """Ordinary clusters are read and written through `encryption`."""
        from pyqsd.drivers.formats.qcow2 import encryption as encrypted

        kind = encrypted.EncryptingExtendedWriter if self.image.extended else encrypted.EncryptingWriter
        self._writer = kind(self.image, self._unpacked, encryption)
        self._access = encrypted.Access(encryption, self.map, self.map_write, self._write_new_now)
        for name in ("map", "map_write", "read_now", "write_now"):
            setattr(self, name, getattr(self._access, name))

    def _forget_key(self) -> None:
        if self._encryption is not None:
            self._encryption.close()
            self._encryption = None

    def _forget_slice(self, found: Slice) -> None:
        if found.key == self._last_key:
            self._last_key = -1

    def _forget_all(self) -> None:
        self._last_key = -1
        self._slices = {}
        self._ready = False

    async def _repair(self) -> None:
        """Make the refcounts of a dirty image right. Raises Error."""
        if not self.image.header.incompatible & headers.INCOMPAT_DIRTY:
            return
        from pyqsd.drivers.formats.qcow2.check import repairing

        try:
            await repairing.repair_dirty(self.image)
        except (OSError, Error) as exc:
            number = exc.errno or errno.EIO
            raise Error(f"Could not repair dirty image: {strerror(number)}", number) from exc

    async def close(self) -> None:
        self._stop_cleaning()
        try:
            await self._store_bitmaps_or_say_so()
            await self._complete()
        finally:
            await self.image.tasks_done()
            await self.image.marked()
            self._unpacked.close()
            self._forget_key()

    async def inactivate(self) -> None:
        node = self.node
        # Others may use the image afterwards. Bitmaps are loaded again when the node becomes active.
        going = [bitmap for bitmap in node.dirty_bitmaps.values() if bitmap.persistent]
        await self._store_bitmaps_or_say_so()
        await self._complete()
        await self.image.tasks_done()
        for bitmap in going:
            node.dirty_bitmaps.discard(bitmap)

    async def activate(self) -> None:
        old = self.image
        self._unpacked.close()
        try:
            await self._load(old.file)
        except Error as exc:
            self._adopt(old)
            raise exc.prefixed("Could not reopen qcow2 layer: ") from exc

    async def change_backing_file(self, filename: str | None, fmt: str | None) -> None:
        self.image.check_usable()
        if filename is not None and len(headers.os_encode(filename)) > headers.MAX_BACKING_NAME:
            raise Error("Backing file name too long", errno.EINVAL)
        extensions = [one for one in self.image.header.extensions if one[0] != headers.EXT_BACKING_FORMAT]
        if filename and fmt:
            extensions.insert(0, (headers.EXT_BACKING_FORMAT, fmt.encode()))
        await self.image.rewrite_header(backing_file=filename or None, extensions=extensions)
        self.node.auto_backing_filename = None

    def child_changed(self, child: Child) -> None:
        image = self.image
        if child is self.file:
            image.use_file(child.node)
        elif child.name == "data-file":
            image.data = child.node
        self._data = image.data

    async def _complete(self) -> None:
        """Bring everything to disk, refcounts too, and say so in the header. Raises OSError."""
        image = self.image
        if image.broken or self.node.read_only or not self.node.active:
            return
        await image.writeback.run(refcounts=True)
        while image.writeback.needed:
            await image.writeback.run(refcounts=True)
        if self._ready:
            await image.mark_clean()
        if image.reserved:
            await image.cut_tail()

    async def _prepare_write(self) -> None:
        """Before the first write. Raises OSError."""
        self.image.check_usable()
        async with self._preparing:
            if self._ready:
                return
            if not self._repaired:
                # It was opened read-only, and may be dirty.
                try:
                    await self._repair()
                except Error as exc:
                    raise OSError(exc.errno or errno.EIO, exc.desc) from exc
                self._repaired = True
            await self.image.clear_autoclear()
            self._ready = True

    # --- unused cache entries ----------------------------------------------------------------------------------------

    def _start_cleaning(self) -> None:
        interval = self.image.settings.cache_clean_interval
        if interval:
            self._clean_timer = asyncio.get_running_loop().call_later(interval, self._clean)

    def _stop_cleaning(self) -> None:
        if self._clean_timer is not None:
            self._clean_timer.cancel()
            self._clean_timer = None

    def _clean(self) -> None:
        self._last_key = -1
        self.image.l2.drop_unused()
        self.image.refcounts.drop_unused()
        self._start_cleaning()

    # --- size -------------------------------------------------------------------------------------------------------

    def allocation_unit(self) -> int:
        return self.image.unit_size

    def refresh_limits(self, limits: Limits) -> None:
        if self.image.encrypted:
            limits.request_alignment = _SECTOR
        limits.pwrite_zeroes_alignment = self.image.unit_size
        limits.pdiscard_alignment = self._size

    def length(self) -> int:
        return self.image.header.size & ~511

    async def truncate(self, length: int, exact: bool, preallocation: str, zero_new: bool) -> None:
        from pyqsd.drivers.formats.qcow2 import resize

        self.image.check_usable()
        if self.image.bitmaps:
            from pyqsd.drivers.formats.qcow2 import bitmaps

            bitmaps.check_resize(self.image, self.node)
        if not self._ready:
            await self._prepare_write()
        self._last_key = -1
        self._preallocated = None
        await resize.truncate(self.image, self._writer, self._unmapper, length, exact, preallocation, zero_new)
        self._use_size()

    def _use_size(self) -> None:
        """The disk has another size: the default size of the cache follows it."""
        new = make_settings(self.options, self.image.header, self.node.discard_unmap, self.length())
        self.image.settings = new
        self.image.l2.max_slices = max(2, new.l2_cache_bytes // new.l2_slice_bytes)

    # --- where the data is -------------------------------------------------------------------------------------------

    def map(self, offset: int, length: int) -> Extent | None:
        key = offset >> self._slice_shift
        if key == self._last_key:
            entries = self._last_entries
        else:
            found = self._slices.get(key)
            if found is None:
                return self._map_missing(key, offset, length)
            found.used = True
            self._last_key = key
            self._last_entries = entries = found.entries
        at = (offset >> self._bits) & self._slice_mask
        entry = entries[at]
        within = offset & self._mask
        n = self._size - within
        host = entry & OFFSET_MASK
        if entry & self._odd or not host:
            return self._map_other(entries, at, entry, n, length, within)
        if n < length:
            size = self._size
            following = entry
            while n < length and at < self._slice_mask:
                at += 1
                following += size
                entry = entries[at]
                if entry != following:
                    if (entry ^ following) & ~COPIED:
                        break
                    following = entry
                n += size
            if n > length:
                n = length
        else:
            n = length
        return (n, _STORED, self._data, host + within)

    _map_ordinary = map

    def _map_other(self, entries: array[int], at: int, entry: int, n: int, length: int, within: int) -> Extent | None:
        """`map` for everything but ordinary clusters; `n`: bytes to the end of the cluster."""
        size = self._size
        if entry & tables.COMPRESSED:
            while n < length and at < self._slice_mask and entries[at + 1] & tables.COMPRESSED:
                at += 1
                n += size
            return (min(n, length), DATA | ALLOCATED | COMPRESSED | DRIVER, None, 0)
        host = entry & OFFSET_MASK
        if host & self._mask or (entry & tables.ZERO and self.image.header.version < 3):
            # `load_map` says what is wrong.
            return None
        zero = entry & tables.ZERO
        if not host and not zero and self.image.has_place(entry):
            return (min(n, length), _STORED, self._data, within)
        if not host:
            # There may be thousands of them.
            end = min(at - (n - length) // size + 1, self._slice_mask + 1)
            n = min(n + (tables.count_same(entries, at, end) - 1) * size, length)
            return (n, ZERO | ALLOCATED if zero else 0, None, 0)
        following = host
        while n < length and at < self._slice_mask:
            at += 1
            following += size
            entry = entries[at]
            if entry & tables.COMPRESSED or entry & tables.ZERO != zero or entry & OFFSET_MASK != following:
                break
            n += size
        n = min(n, length)
        if not zero:
            return (n, _STORED, self._data, host + within)
        return (n, ZERO | ALLOCATED | OFFSET_VALID, self._data, host + within)

    def _map_extended(self, offset: int, length: int) -> Extent | None:
        """`map` with subclusters."""
        key = offset >> self._slice_shift
        found = self._slices.get(key)
        if found is None:
            return self._map_missing(key, offset, length)
        found.used = True
        return extended.map_entry(self.image, found, offset, length)

    def _map_write_extended(self, offset: int, length: int) -> tuple[int, Node, int] | None:
        """`map_write` with subclusters."""
        found = self._slices.get(offset >> self._slice_shift) if self._ready else None
        if found is None:
            return None
        found.used = True
        return extended.map_write(self.image, found, offset, length)

    def _map_external(self, offset: int, length: int) -> Extent | None:
        """`map` with a data file, where each cluster is at its guest offset."""
        extent = self._plain_map(offset, length)
        if extent is not None and (extent[1] & DRIVER or (extent[1] & OFFSET_VALID and extent[3] != offset)):
            # `load_map` says what is wrong.
            return None
        return extent

    def _map_write_external(self, offset: int, length: int) -> tuple[int, Node, int] | None:
        """`map_write` with a data file."""
        target = self._plain_map_write(offset, length)
        if target is None or target[2] != offset:
            return None
        if self.image.raw_data and self._writer.in_flight:
            # Zeroes go to a raw data file before the tables say so, and this must not come in between.
            last = (offset + target[0] - 1) >> self._bits
            if self._writer.conflict(offset >> self._bits, last, False) is not None:
                return None
        return target

    def _map_missing(self, key: int, offset: int, length: int) -> Extent | None:
        """`map` where no slice is in memory: whole tables may be known to be empty."""
        if self.image.broken:
            return None
        l2 = self.image.l2
        l1 = l2.l1
        index = key >> l2.key_bits
        shift = self._slice_shift + l2.key_bits
        end = offset + length
        at = index
        while at < len(l1) and not l1[at] & OFFSET_MASK:
            at += 1
            if at << shift >= end:
                return (length, 0, None, 0)
        if at == index:
            return None
        return ((at << shift) - offset, 0, None, 0)

    async def load_map(self, offset: int, length: int) -> Extent:
        while True:
            self.image.check_usable()
            extent = self.map(offset, length)
            if extent is not None:
                return extent
            found = await self.image.l2.load(offset >> self._slice_shift)
            if found is not None:
                self._check_entry(found, (offset >> self._bits) & self._slice_mask)

    def _check_entry(self, found: Slice, at: int) -> None:
        words = self.image.l2.words
        entry = found.entries[at * words]
        if self.image.external:
            self.image.check_external(found, at, entry)
        if entry & tables.COMPRESSED:
            return
        if words == 2 and not extended.is_valid(self.image, entry, found.entries[at * 2 + 1]):
            raise self.image.bad_entry(found, at, "Invalid cluster entry found")
        host = entry & OFFSET_MASK
        if entry & tables.ZERO and self.image.header.version < 3:
            raise self.image.bad_entry(found, at, "Zero cluster entry found in pre-v3 image")
        if host & self._mask:
            raise self.image.bad_entry(found, at, "Cluster allocation offset {host:#x} unaligned", host)

    def map_write(self, offset: int, length: int) -> tuple[int, Node, int] | None:
        if not self._ready:
            return None
        key = offset >> self._slice_shift
        if key == self._last_key:
            entries = self._last_entries
        else:
            found = self._slices.get(key)
            if found is None:
                return None
            found.used = True
            self._last_key = key
            self._last_entries = entries = found.entries
        at = (offset >> self._bits) & self._slice_mask
        entry = entries[at]
        if entry & self._odd_or_copied != COPIED or entry == COPIED:
            return None
        within = offset & self._mask
        n = self._size - within
        host = entry ^ COPIED
        count = 1
        if n < length:
            size = self._size
            while n < length and at < self._slice_mask:
                at += 1
                entry += size
                if entries[at] != entry:
                    break
                n += size
                count += 1
        if n > length:
            n = length
        if self.image.data_meta.hit(host >> self._bits, count) is not None:
            # `pwritev` says what is wrong.
            return None
        return (n, self._data, host + within)

    _map_write_ordinary = map_write

    async def block_status(self, offset: int, length: int, want_zero: bool) -> Extent:
        extent = await self.load_map(offset, length)
        if extent[1] & _STORED == _STORED and not extent[1] & DRIVER:
            if self._preallocated is None:
                self._preallocated = await self._looks_preallocated()
            if self._preallocated:
                return (extent[0], extent[1] | RECURSE, extent[2], extent[3])
        return extent

    async def _looks_preallocated(self) -> bool:
        """Whether far more clusters are in use than the file occupies on the host, so that it is worth asking there
        where the zeroes are."""
        image = self.image
        occupied = image.file.driver.allocated_size()
        if occupied is None:
            return False
        clusters = occupied >> self._bits
        least = max(clusters * 10 // 9, clusters + 2)
        return await image.refcounts.at_least_in_use(least, image.file.length >> self._bits)

    # --- I/O -----------------------------------------------------------------------------------------------------

    async def preadv(self, offset: int, length: int, iov: list[memoryview]) -> None:
        done = 0
        while done < length:
            n, flags, node, at = await self.load_map(offset + done, length - done)
            if flags & COMPRESSED:
                n = min(n, max(_UNPACK_MOST, self._size - ((offset + done) & self._mask)))
            part = iovs.part(iov, done, n)
            access = self._access
            if access is not None and flags & DRIVER and not flags & COMPRESSED:
                await access.read(offset + done, n, part)
            elif flags & DRIVER:
                if not await self._read_compressed(offset + done, n, part):
                    continue
            elif flags & ZERO:
                iovs.fill_zero(part)
            elif node is not None:
                await node.preadv(at, n, part)
            elif self.backing is not None:
                await self.backing.node.preadv(offset + done, n, part)
            else:
                iovs.fill_zero(part)
            done += n

    def read_own_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        clusters = self._unpacked.read_now(self._entries(offset, length))
        if not clusters:
            return False
        within = offset & self._mask
        plain = [memoryview(cluster) for cluster in clusters]
        plain[0] = plain[0][within:]
        iovs.copy(iov, plain)
        return True

    async def _read_compressed(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        """Read neighbouring compressed clusters; False if they were replaced meanwhile. Raises OSError."""
        unpacked = self._unpacked
        generation = unpacked.generation
        entries = self._entries(offset, length)
        try:
            clusters = await unpacked.read_all(entries)
        except OSError:
            if generation != unpacked.generation and entries != self._entries(offset, length):
                return False
            raise
        if generation != unpacked.generation and entries != self._entries(offset, length):
            return False
        within = offset & self._mask
        plain = [memoryview(cluster) for cluster in clusters]
        plain[0] = plain[0][within:]
        iovs.copy(iov, plain)
        return True

    def _entries(self, offset: int, length: int) -> list[int]:
        """The L2 entries of a range within a slice; none if that is not in memory."""
        l2 = self.image.l2
        found = l2.slices.get(offset >> self._slice_shift)
        if found is None:
            return []
        first = (offset >> self._bits) & self._slice_mask
        stop = first + (((offset & self._mask) + length + self._mask) >> self._bits)
        return list(found.entries[first * l2.words : stop * l2.words : l2.words])

    def write_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        done = 0
        while True:
            left = length - done
            target = self.map_write(offset + done, left)
            if target is not None:
                n, node, at = target
                if n == length:
                    return node.write_now(at, length, iov)
                if not node.write_now(at, n, iovs.part(iov, done, n)):
                    return False
            else:
                n = self._write_new_now(offset + done, left, iovs.part(iov, done, left) if done else iov)
                if not n:
                    return False
            done += n
            if done == length:
                return True

    def _write_new_now(self, offset: int, length: int, iov: list[memoryview]) -> int:
        """Write a prefix of the range to clusters in which nothing is stored, if that takes no waiting: its length."""
        return self._writer.write_now(offset, length, iov) if self._ready else 0

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        if not self._ready:
            await self._prepare_write()
        # The format does not encrypt compressed clusters; what is to be secret is rather not compressed.
        if flags & WRITE_COMPRESSED and not self.image.encrypted:
            if self._packer is None:
                from pyqsd.drivers.formats.qcow2.packing import Packer

                self._packer = Packer(self.image, self._writer)
            await self._packer.write(offset, length, iov)
        else:
            await self._writer.pwritev(offset, length, iov)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        if not self._ready:
            await self._prepare_write()
        await self._unmapper.zero(offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        if not self._ready:
            await self._prepare_write()
        if self.image.header.version < 3 and self.backing is not None:
            # It would show what the backing file has there.
            raise OSError(errno.ENOTSUP, "discard")
        end = offset + length
        start = -(-offset // self._size) * self._size
        if end != self.node.length:
            end &= ~self._mask
        if start >= end:
            raise OSError(errno.ENOTSUP, "not whole clusters")
        await self._unmapper.discard(start, end - start, "request", False)

    async def flush(self) -> None:
        # What is in memory of a broken image is lost, so that nobody may believe it flushed.
        self.image.check_usable()
        if self._ready:
            await self.image.write_back()
        if self.image.external:
            # Whoever wrote to it may be gone, and with them the permission that the node goes by.
            await self.image.data.flush()

    # --- what people see ---------------------------------------------------------------------------------------------

    def allocated_size(self) -> int | None:
        sizes = [child.node.driver.allocated_size() for child in self.node.children if not child.role & ROLE_COW]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def exact_filename(self) -> str:
        assert self.file is not None
        return self.file.node.driver.exact_filename()

    def format_specific(self) -> info.ImageInfoSpecificQCow2Wrapper:
        return info.specific(self.image, self._encryption)

    def image_info(self) -> dict[str, Any]:
        return info.image_info(self.image)

    # --- reopening ---------------------------------------------------------------------------------------------------

    async def reopen_prepare(self, options: Any, read_only: bool) -> Any:
        image = self.image
        if image.header.incompatible & headers.INCOMPAT_CORRUPT and not read_only:
            raise Error("qcow2: Image is corrupt; cannot be opened read/write", errno.EACCES)
        if options.x_snapshot is not None and not read_only:
            raise Error("'x-snapshot' can only be used with read-only=on", errno.EACCES)
        opening.check_encryption(image.header, options, self.options)
        new = make_settings(options, image.header, self.node.discard_unmap, self.length())
        stored: list[DirtyBitmap] = []
        if not self.node.read_only:
            if read_only:
                stored = await self._store_bitmaps()
            # Everything goes to disk, so that the caches can be made anew, or the node can become read-only.
            try:
                await self._complete()
                await image.tasks_done()
                # The file may be about to be another node.
                await image.file.flush()
            except OSError as exc:
                raise Error("Failed to flush the L2 table cache", exc.errno or errno.EIO) from exc
        return (options, await opening.metadata_map(image, new.overlap), read_only, stored)

    def reopen_commit(self, state: Any) -> None:
        options, meta, read_only, _ = state
        image = self.image
        old = image.settings
        new = image.settings = make_settings(options, image.header, self.node.discard_unmap, self.length())
        image.meta = meta
        image.refcounts.max_blocks = max(2, new.refcount_cache_bytes >> self._bits)
        l2 = image.l2
        if new.l2_slice_bytes != old.l2_slice_bytes:
            l2.set_slice_bytes(new.l2_slice_bytes)
        l2.max_slices = max(2, new.l2_cache_bytes // new.l2_slice_bytes)
        self._last_key = -1
        self._slice_shift = l2.slice_shift
        self._slice_mask = l2.slice_entries - 1
        if read_only:
            self._ready = False
            self._bitmaps_readonly(True)
        self._stop_cleaning()
        self._start_cleaning()

    async def reopen_abort(self, state: Any) -> None:
        if state[3]:
            # They go on being used.
            await self._use_bitmaps()

    async def reopen_complete(self) -> None:
        if not self.node.read_only and self.node.active:
            await self._use_bitmaps()
