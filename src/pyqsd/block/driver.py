"""The contract of a block driver.

A driver says only what is theirs: where the data is (`map`), and the operations that differ from the defaults here.
Nobody calls a driver except its `Node`, which has already checked range, permissions and alignment, counted the
request and waited for conflicting ones. All offsets and lengths are bytes.

Requests carry ``iov``: a list of memoryviews (format ``B``) whose sizes add up to ``length``. A driver never keeps them
beyond the call and never copies them without need.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pyqsd.block import permissions as perms
from pyqsd.block.extents import ALLOCATED, DATA, DRIVER, Extent
from pyqsd.block.options import BlockdevOptions
from pyqsd.qapi.errors import Error

if TYPE_CHECKING:
    from pyqsd.block.amend import BlockdevAmendOptions
    from pyqsd.block.child import Child
    from pyqsd.block.create import BlockdevCreateOptions
    from pyqsd.block.graph import Graph
    from pyqsd.block.image_check import CheckResult
    from pyqsd.block.info import SnapshotInfo
    from pyqsd.block.node import Node
    from pyqsd.block.point_in_time import PointInTime
    from pyqsd.qapi.types import Struct

# Request flags.
#: The data must be on stable storage when the request completes.
FUA = 0x01
#: A zero write may deallocate.
MAY_UNMAP = 0x02
#: A zero write must fail with ENOTSUP rather than be written out as data.
NO_FALLBACK = 0x04
#: The write does not change what is read (copy on read); needs only the permission WRITE_UNCHANGED.
WRITE_UNCHANGED = 0x08
#: The data is to be stored compressed.
WRITE_COMPRESSED = 0x10
#: Rather left to a worker than done in the loop's thread: there is much to copy, and others can go on meanwhile.
BACKGROUND = 0x20

# Roles of a child (they decide its default permissions and inherited options).
#: Guest-visible data is read and written through it.
ROLE_DATA = 1
#: The format's own tables.
ROLE_METADATA = 2
#: The child has the very content of its parent.
ROLE_FILTERED = 4
#: The backing file.
ROLE_COW = 8
#: The main child, which the parent's filename comes from.
ROLE_PRIMARY = 16
ROLE_IMAGE = ROLE_DATA | ROLE_METADATA | ROLE_PRIMARY


class Limits:
    """What a driver can do in one request (bytes; 0: no limit). Set by `Driver.refresh_limits`.

    `request_alignment`: offsets and lengths must be multiples of it; the node pads (reads, modifies, writes) what is
    not. `memory_alignment`: addresses of the buffers. `opt_transfer`, `max_transfer`, `pdiscard_alignment`,
    `max_pdiscard`, `pwrite_zeroes_alignment`, `max_pwrite_zeroes` as in QEMU's BlockLimits.
    """

    __slots__ = (
        "max_pdiscard",
        "max_pwrite_zeroes",
        "max_transfer",
        "memory_alignment",
        "opt_transfer",
        "pdiscard_alignment",
        "pwrite_zeroes_alignment",
        "request_alignment",
    )

    def __init__(self) -> None:
        self.request_alignment = 1
        self.memory_alignment = 1
        self.opt_transfer = 0
        self.max_transfer = 0
        self.pdiscard_alignment = 0
        self.max_pdiscard = 0
        self.pwrite_zeroes_alignment = 0
        self.max_pwrite_zeroes = 0

    def merge(self, below: Limits) -> None:
        """Take over what a child's limits mean for its parent."""
        self.memory_alignment = max(self.memory_alignment, below.memory_alignment)
        self.opt_transfer = max(self.opt_transfer, below.opt_transfer)
        if below.max_transfer:
            self.max_transfer = min(self.max_transfer or below.max_transfer, below.max_transfer)


class Driver:
    """Base of all block drivers. The instance belongs to one node (`self.node`) and one loop."""

    #: The wire name.
    name: ClassVar[str]
    #: The options struct: ``class Options(BlockdevOptions, tag="raw")``.
    Options: ClassVar[type[BlockdevOptions]] = BlockdevOptions
    #: Talks to storage itself (file, host_device, nbd, null-co …) rather than to a child.
    is_protocol: ClassVar[bool] = False
    #: Names of images may begin with its name and a colon, although it is no protocol.
    names_images: ClassVar[bool] = False
    #: Passes on the very content of one child.
    is_filter: ClassVar[bool] = False
    #: It comes and goes with a job of its own, so that no other job may rely on edges that lead to it.
    never_freeze: ClassVar[bool] = False
    #: Its filename is that of its main child.
    named_as_child: ClassVar[bool] = False
    #: Can have a backing file.
    supports_backing: ClassVar[bool] = False
    #: Has internal snapshots.
    supports_snapshots: ClassVar[bool] = False
    #: Request flags that `pwritev` honours; the node emulates FUA with a flush where it is missing.
    write_flags: ClassVar[int] = 0
    #: Request flags that `pwrite_zeroes` honours.
    zero_flags: ClassVar[int] = 0
    #: Options (attribute names) that `reopen_prepare` lets change; any other change of an option is refused for it.
    mutable_options: ClassVar[frozenset[str]] = frozenset()
    #: Options (attribute names, or ``option.member``) that decide what is read; a node opened with one of them has a
    #: json: filename.
    strong_options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, node: Node, options: Any) -> None:
        self.node = node
        self.options = options
        #: The main child (``file``) and the backing file, if there are any; `Node` keeps them.
        self.file: Child | None = None
        self.backing: Child | None = None
        #: A child that is no part of the content: a flush does not concern it.
        self.unflushed: Child | None = None
        #: What the content was at a point in time, if that is preserved here.
        self.past: PointInTime | None = None

    @classmethod
    def create_options(cls) -> type[BlockdevCreateOptions] | None:
        """The options struct of ``blockdev-create``, or None if this driver makes no images."""
        return None

    @classmethod
    async def create(cls, graph: Graph, options: Any) -> None:
        """Make a new image as `options` (of the type `create_options`) say. All that can be checked is checked before
        anything is overwritten. Raises Error, OSError."""
        raise Error("Driver does not support blockdev-create", errno.ENOTSUP)

    @classmethod
    def amend_options(cls) -> type[BlockdevAmendOptions] | None:
        """The options struct of ``x-blockdev-amend``, or None if images of this driver cannot be changed."""
        return None

    async def amend(self, options: Any, force: bool) -> None:
        """Change the image as `options` (of the type `amend_options`) say; `force`: also if nobody can read it any more
        afterwards. Raises Error, OSError."""
        raise Error("Driver does not support x-blockdev-amend", errno.ENOTSUP)

    @classmethod
    def probe(cls, buf: bytes, filename: str) -> int:
        """How sure it is, from 0 (not) to 100, that a file that begins with `buf` is an image of this format."""
        return 0

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        """The options (wire names) that a name of an image stands for, as it is found inside another image; protocols
        only. Raises Error."""
        if "filename" in cls.Options.__struct_fields__:
            return {"filename": filename.removeprefix(f"{cls.name}:")}
        if filename != f"{cls.name}://":
            raise Error(f"The only allowed filename for this driver is '{cls.name}://'", errno.EINVAL)
        return {}

    # --- life ---------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the image. Children are opened with ``self.node.open_child``. Raises Error; the node then undoes what
        was opened so far (children are detached; `close` is not called)."""

    async def close(self) -> None:
        """Write back what is cached and release everything. Errors are reported, but it is closed after it anyway."""

    async def activate(self) -> None:
        """The node becomes active again, after its children: forget what is cached, because others may have changed the
        image meanwhile. Raises Error, OSError."""

    async def inactivate(self) -> None:
        """Write back everything cached, so that the image on disk is complete, without closing."""

    async def reopen_prepare(self, options: Any, read_only: bool) -> Any:
        """Check that the node can go on with `options` (a whole, converted struct) and `read_only`, and do all that can
        fail. Returns a state for `reopen_commit` / `reopen_abort`. Raises Error naming the option that cannot change.
        Child references have been dealt with by the node."""
        return None

    def reopen_commit(self, state: Any) -> None:
        """Switch over. Cannot fail."""

    async def reopen_abort(self, state: Any) -> None:
        """Forget what `reopen_prepare` prepared."""

    def child_changed(self, child: Child) -> None:
        """The edge `child` leads to another node now, or is new: remember that one. Nothing is in flight."""

    async def add_child(self, node: Node) -> None:
        """Take one more child (``x-blockdev-change``). Raises Error."""
        raise Error(f"The node {self.node.name} does not support adding a child", errno.ENOTSUP)

    async def del_child(self, child: Child) -> None:
        """Give up a child (``x-blockdev-change``). Raises Error."""
        raise Error(f"The node {self.node.name} does not support removing a child", errno.ENOTSUP)

    async def change_backing_file(self, filename: str | None, fmt: str | None) -> None:
        """Write another name of the backing file, and of its format, into the image; the graph stays as it is. Raises
        Error, OSError."""
        raise OSError(errno.ENOTSUP, "no backing file")

    async def reopen_complete(self) -> None:
        """All nodes have been switched over, and their parents may use them from now on: what must be done before that,
        and needs the new state of the children. Cannot fail."""

    def refresh_limits(self, limits: Limits) -> None:
        """Fill in what differs from "no limits"; called after open, resize and reopen, and when a child's changed."""

    def child_perms(self, child: Child, role: int, perm: int, shared: int) -> tuple[int, int]:
        """The permissions that this node needs on `child`, and shares, when its own parents cumulatively need `perm`
        and share `shared`."""
        from pyqsd.block.graph_perms import default_child_perms

        return default_child_perms(self, child, role, perm, shared)

    # A change of permissions goes through these: `check_perm`, then `set_perm` or `abort_perm_update`, each with the
    # cumulative permissions of all parents of the node (bits of `pyqsd.block.permissions`).

    def check_perm(self, perm: int, shared: int) -> None:
        """Take what holding `perm` and sharing only `shared` requires (locks), in addition to what is held. Raises
        Error, and then nothing has changed."""

    def set_perm(self, perm: int, shared: int) -> None:
        """The permissions are now these: drop what is no longer needed. Cannot fail."""

    def abort_perm_update(self) -> None:
        """Go back to the permissions of the last `set_perm`. Cannot fail."""

    # --- size ---------------------------------------------------------------------------------------------------

    def length(self) -> int:
        """The size of the content in bytes (from memory; `Node.length` is kept up to date after `truncate`)."""
        raise Error(f"Driver '{self.name}' has no length", errno.ENOTSUP)

    async def truncate(self, length: int, exact: bool, preallocation: str, zero_new: bool) -> None:
        """Resize. `exact`: not larger than asked for either. `preallocation`: off, metadata, falloc, full.
        `zero_new`: what is added must read as zeroes. Raises Error."""
        raise Error("Image format driver does not support resize", errno.ENOTSUP)

    @property
    def grows_ahead(self) -> bool:
        """Whether it makes the storage larger in good time itself, so that its parents need not do that."""
        return False

    def allocated_size(self) -> int | None:
        """Bytes that the image occupies on the host, or None."""
        return self.file.node.driver.allocated_size() if self.file is not None else None

    # --- where the data is ------------------------------------------------------------------------------------------

    def allocation_unit(self) -> int:
        """Bytes that are allocated together, and are better copied together."""
        return 1

    def map(self, offset: int, length: int) -> Extent | None:
        """Where the bytes at ``[offset, offset + length)`` are, for a prefix of that range, from what is in memory;
        None when metadata must be read first (`load_map`). See `pyqsd.block.extents`. Must not wait, has no effect."""
        return (length, DATA | ALLOCATED | DRIVER, None, 0)

    async def load_map(self, offset: int, length: int) -> Extent:
        """The same answer, reading metadata as needed. Raises OSError, Error."""
        extent = self.map(offset, length)
        assert extent is not None
        return extent

    def map_write(self, offset: int, length: int) -> tuple[int, Node, int] | None:
        """``(n, node, child offset)`` if the first `n` bytes may be overwritten in place, in `node`, now, with nothing
        else to do or to wait for; else None, and `pwritev` does it."""
        return None

    async def block_status(self, offset: int, length: int, want_zero: bool) -> Extent:
        """Like `load_map`, for block status: may do more work to tell holes from data, unless `want_zero` is false."""
        return await self.load_map(offset, length)

    # --- I/O -----------------------------------------------------------------------------------------------------

    def read_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        """Read the whole range if that takes no waiting; False (with the buffers in any state) otherwise. Formats get
        this from their `map`; protocols override it."""
        return self.node.read_mapped_now(offset, length, iov)

    def read_own_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        """The same for a range that `map` says is `DRIVER`."""
        return False

    def write_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        """Write the whole range if that takes no waiting; False otherwise, with nothing or part of it written (the
        caller then writes it all again). Formats get this from `map_write`; protocols override it."""
        return self.node.write_mapped_now(offset, length, iov)

    async def preadv(self, offset: int, length: int, iov: list[memoryview]) -> None:
        """Read; the range is inside the node. Formats get this from their map: the node calls it only for ranges that
        are `DRIVER`. Raises OSError."""
        raise OSError(errno.ENOTSUP, "read")

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        """Write; `flags` only has bits of `write_flags`. Raises OSError."""
        raise OSError(errno.ENOTSUP, "write")

    async def copy_from(self, offset: int, length: int, source: Node, at: int) -> bool:
        """Write what the protocol node `source` has at the offset `at`, without it passing through this program. False
        if that cannot be done; nothing or part of it is written then. Raises OSError."""
        return False

    async def pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Make the range read as zeroes cheaply. Raises OSError with ENOTSUP if that cannot be done for exactly this
        range; the node then writes zero bytes unless `NO_FALLBACK`."""
        raise OSError(errno.ENOTSUP, "write zeroes")

    async def pdiscard(self, offset: int, length: int) -> None:
        """The content is no longer needed. ENOTSUP is fine, and means that nothing was done."""
        raise OSError(errno.ENOTSUP, "discard")

    async def flush(self) -> None:
        """Hand everything that this driver caches to its children (the node then flushes them), in the declared
        order; protocols: make everything written so far durable. Raises OSError."""

    # --- the image as a whole -----------------------------------------------------------------------------------------

    async def check(self, repair: str = "none") -> CheckResult:
        """Look for errors in the metadata of the image, and `repair` "leaks", "all", or "none" of them. The node is
        drained, and nobody else writes to it where something is repaired. Raises Error, OSError if it cannot be done.
        """
        raise Error("This image format does not support checks", errno.ENOTSUP)

    # --- internal snapshots -------------------------------------------------------------------------------------------

    def snapshot_list(self) -> list[SnapshotInfo]:
        """All snapshots in the image. Raises OSError with ENOTSUP where there cannot be any."""
        raise OSError(errno.ENOTSUP, "Operation not supported")

    # The following are called while no request is in flight, and make `length` right; the node is told by the caller.

    async def snapshot_create(self, name: str) -> SnapshotInfo:
        """Take a snapshot. Raises OSError, Error."""
        raise OSError(errno.ENOTSUP, "Operation not supported")

    async def snapshot_delete(self, ident: str | None, name: str | None) -> None:
        """Delete the snapshot with this id and name (None: any). Raises OSError, Error."""
        raise OSError(errno.ENOTSUP, "Operation not supported")

    async def snapshot_goto(self, ident: str | None, name: str | None) -> None:
        """Make the content, and the size, that of the snapshot with this id and name (None: any). Raises OSError,
        Error."""
        raise OSError(errno.ENOTSUP, "Operation not supported")

    # --- bitmaps in the image -----------------------------------------------------------------------------------------

    async def check_new_bitmap(self, name: str, granularity: int) -> None:
        """Whether one more dirty bitmap can be stored in the image; granularity in bytes. Raises Error if not."""
        raise Error(f"Can't store persistent bitmaps to {self.node.name}: Operation not supported", errno.ENOTSUP)

    async def remove_bitmap(self, name: str) -> Callable[[], Awaitable[None]]:
        """Remove a persistent bitmap from the image; to call what is returned takes that back. Both raise Error."""
        raise Error(f"Can't remove persistent bitmaps from {self.node.name}: Operation not supported", errno.ENOTSUP)

    # --- what people see ----------------------------------------------------------------------------------------------

    def exact_filename(self) -> str:
        """The plain filename with which the image could be opened again, or "" (then a json: filename is made)."""
        return ""

    def format_specific(self) -> Struct | None:
        """``ImageInfo.format-specific``, or None."""
        return None

    def driver_specific_stats(self) -> Struct | None:
        """``BlockStats.driver-specific``, or None."""
        return None

    def image_info(self) -> dict[str, Any]:
        """Members of ``ImageInfo`` that this driver knows: cluster-size, dirty-flag, compressed, encrypted,
        backing-filename and its format as the image has them … (keys are Python attribute names of `ImageInfo`)."""
        return {}


class Filter(Driver):
    """A node with the content of its child ``file``: everything is forwarded. A filter is what it does differently."""

    is_filter = True
    write_flags = FUA | WRITE_UNCHANGED | WRITE_COMPRESSED
    zero_flags = FUA | MAY_UNMAP | NO_FALLBACK | WRITE_UNCHANGED

    @property
    def target(self) -> Node:
        """The filtered child."""
        assert self.file is not None
        return self.file.node

    def length(self) -> int:
        return self.target.length

    async def truncate(self, length: int, exact: bool, preallocation: str, zero_new: bool) -> None:
        await self.target.truncate(length, exact=exact, preallocation=preallocation, zero_new=zero_new)

    @property
    def grows_ahead(self) -> bool:
        return self.target.driver.grows_ahead

    def allocation_unit(self) -> int:
        return self.target.driver.allocation_unit()

    def map(self, offset: int, length: int) -> Extent | None:
        from pyqsd.block.extents import OFFSET_VALID, RAW

        return (length, RAW | OFFSET_VALID, self.target, offset)

    def map_write(self, offset: int, length: int) -> tuple[int, Node, int] | None:
        return (length, self.target, offset)

    async def preadv(self, offset: int, length: int, iov: list[memoryview]) -> None:
        await self.target.preadv(offset, length, iov)

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        await self.target.pwritev(offset, length, iov, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        await self.target.pwrite_zeroes(offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        await self.target.pdiscard(offset, length)

    def image_info(self) -> dict[str, Any]:
        known = self.target.driver.image_info()
        return {name: known[name] for name in ("cluster_size", "dirty_flag") if name in known}


__all__ = ["ALLOCATED", "DATA", "Driver", "Filter", "Limits", "perms"]
