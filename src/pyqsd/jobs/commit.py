"""``block-commit``: the content of layers of a backing chain goes down into a layer below, and they leave the chain.

This is the commit of layers that nobody writes to. From the top of the chain, which guests write to, there is another
one, which is a mirror (`pyqsd.jobs.mirror`).

What must be on disk before what: the base has everything, and is flushed, before an overlay names it as its backing
file. Until then overlays name the layers above it, which hide in the base all that the job has changed there: a chain
is right at any moment, whatever happens.

Offsets and lengths are bytes.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, ClassVar, Final

from pyqsd.block import filenames, freezing, graph_perms, op_blockers
from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.block_copy import CopyError, Transfer, Workers
from pyqsd.block.commands import find_root, lookup
from pyqsd.block.driver import ROLE_COW
from pyqsd.block.events import BlockErrorAction
from pyqsd.block.extents import ALLOCATED, ZERO
from pyqsd.block.graph import Graph
from pyqsd.block.internal_filter import insert_above, take_away
from pyqsd.block.node import Node
from pyqsd.block.op_blockers import Op
from pyqsd.block.reopen import read_only_again, set_read_only
from pyqsd.jobs.block_job import BlockdevOnError, BlockJob
from pyqsd.jobs.commit_top import CommitTop, shared_below
from pyqsd.jobs.job import Jobs, JobType
from pyqsd.jobs.mirror import start_active_commit
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import DeviceNotFound, Error
from pyqsd.qapi.types import Features

log = logging.getLogger(__name__)

#: Bytes of data that are copied in one piece.
_PIECE: Final = 512 << 10
#: Bytes that are made zeroes in one piece.
_ZERO_PIECE: Final = 64 << 20
#: More of them take no less time, but a user of the disk waits longer.
_MOST_PIECES: Final = 4
#: After so many bytes the base is flushed, so that the last flush does not take long.
_FLUSH: Final = 16 << 20
#: A request that fails again and again, and is to be repeated, waits for so long in between, seconds.
_AGAIN: Final = 0.05

_Method = Callable[[int, int], Coroutine[Any, Any, None]]


class CommitJob(BlockJob):
    """Commits the layers from `top` down to `base`, which is below it, into `base`.

    Arguments:
        device: the top of the whole chain.
        backing_file: the name of the base that is written into the overlays of `top`; None: the one that it was opened
            with.
        mask_protocol: if the base has no format, they get "raw" as that.

    Made with `make`.
    """

    kind: ClassVar[JobType] = JobType.COMMIT

    def __init__(
        self,
        jobs: Jobs,
        id: str | None,
        device: Node,
        top: Node,
        base: Node,
        *,
        speed: int,
        on_error: BlockdevOnError,
        backing_file: str | None,
        mask_protocol: bool,
        auto_finalize: bool,
        auto_dismiss: bool,
    ) -> None:
        super().__init__(
            jobs,
            id,
            device.graph,
            device,
            0,
            perms.ALL,
            speed=speed,
            auto_finalize=auto_finalize,
            auto_dismiss=auto_dismiss,
        )
        self._top = top
        self._base = base
        self._on_error = on_error
        self._backing_file = backing_file
        self._mask_protocol = mask_protocol
        self._filter: Node | None = None
        self._frozen = False
        self._base_was_read_only = base.read_only
        self._from: BlockBackend | None = None
        self._into: BlockBackend | None = None
        #: What is still to be worked on: begin and end, the next area as the last.
        self._areas: list[tuple[int, int]] = []
        #: What has failed, where: begin and end, which are the same if it is in `_areas` anyway.
        self._failures: list[tuple[int, int, CopyError]] = []
        #: Bytes that were written since the last flush was begun.
        self._unflushed = 0
        self._flushing = False
        self._switching = False
        self._succeeded = False

    async def make(self, filter_name: str | None) -> None:
        """Take hold of the chain. Raises Error, and then there is no such job."""
        top, base = self._top, self._base
        try:
            if self._base_was_read_only:
                await set_read_only(self.graph, base, False)
            self._filter = await insert_above(top, CommitTop, filter_name)
            self._filter.read_only = True
            layer = top
            while layer is not base:
                self.add_node("intermediate node", layer, 0, shared_below(layer, base))
                below = layer.below()
                assert below is not None
                layer = below
            freezing.freeze(self._filter, base)
            self._frozen = True
            self.add_node("base", base, 0, perms.ALL)
            need = perms.CONSISTENT_READ | perms.WRITE | (perms.RESIZE if base.length < top.length else 0)
            self._into = self.open_backend(base, need, perms.CONSISTENT_READ | perms.WRITE_UNCHANGED)
            self._from = self.open_backend(top, 0, perms.ALL)
        except BaseException:
            await self.abort()
            self.give_up()
            raise

    # --- the work ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        assert self._from is not None
        assert self._into is not None
        length, end = self._top.length, self._hidden_end()
        self.expect(end)
        if self._base.length < length:
            await self.grow(self._into, length)
        transfer = Transfer(self._from, self._into, zero_flags=0)
        self._areas = [area for area in ((length, end), (0, length)) if area[0] < area[1]]
        async with Workers(_MOST_PIECES, _MOST_PIECES * _PIECE) as workers:
            self.workers = workers
            while True:
                while self._areas:
                    await self._next(transfer, self._into, workers)
                await workers.idle()
                if self._failures or not await self._flushed(self._into):
                    await self._judge()
                elif (grown := self._hidden_end()) > end:
                    # There is another overlay.
                    self.expect(grown - end)
                    self._areas, end = [(end, grown)], grown
                else:
                    return

    def _hidden_end(self) -> int:
        """Up to where the overlays must read in the base what they read now: behind the end of `top` they read zeroes,
        although the base may have something there."""
        assert self._filter is not None
        overlays = [edge.parent.length for edge in self._filter.parents if edge.role & ROLE_COW]
        return max(self._top.length, min(self._base.length, max(overlays, default=0)))

    async def _next(self, transfer: Transfer, into: BlockBackend, workers: Workers) -> None:
        """Begin to work on the next piece."""
        offset, end = self._areas.pop()
        n, method = 0, None
        try:
            n, method = await self._look(transfer, offset, end - offset)
        except OSError as exc:
            self._failures.append((offset, offset, CopyError(True, exc)))
        if offset + n < end:
            self._areas.append((offset + n, end))
        if method is not None:
            await workers.run(min(n, _PIECE), self._piece(offset, n, method(offset, n)))
            if self._unflushed >= _FLUSH and not self._flushing:
                self._unflushed, self._flushing = 0, True
                await workers.run(0, self._flush_early(into))
            await self.throttle(n)
        else:
            self.advance(n)
            await self.throttle(0)
        if self._failures:
            await workers.idle()
            await self._judge()

    async def _look(self, transfer: Transfer, offset: int, length: int) -> tuple[int, _Method | None]:
        """How many bytes from `offset` on are to be worked on, and in what way. Raises OSError."""
        n = length
        if offset < self._top.length:
            (n, flags, _, _), _ = await self._top.block_status_above(self._base, offset, length)
            if not flags & ALLOCATED:
                return n, None
            if not flags & ZERO:
                return min(n, _PIECE), transfer.copy
        (n, flags, _, _), _ = await self._base.block_status_above(None, offset, n)
        if flags & ZERO:
            return n, None
        return min(n, _PIECE if self.speed else _ZERO_PIECE), transfer.zero

    async def _piece(self, offset: int, length: int, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except CopyError as exc:
            self._failures.append((offset, offset + length, exc))
        else:
            self.advance(length)
            self._unflushed += length

    async def _flush_early(self, backend: BlockBackend) -> None:
        """A piece of work: what is there so far goes to the disk while more is copied."""
        try:
            await self._flushed(backend)
        finally:
            self._flushing = False

    async def _flushed(self, backend: BlockBackend) -> bool:
        try:
            await backend.flush()
        except OSError as exc:
            self._failures.append((0, 0, CopyError(False, exc)))
            return False
        return True

    async def _judge(self) -> None:
        """Nothing is under way: do about what has failed as the policy says. Whatever is not the end of the job is
        tried again. Raises OSError."""
        failures, self._failures = sorted(self._failures, key=lambda failure: failure[0]), []
        self._areas += [(start, end) for start, end, _ in reversed(failures) if start < end]
        for _, _, failure in failures:
            action = self.error_action(self._on_error, failure.reading, failure.error.errno or errno.EIO)
            if action is BlockErrorAction.REPORT:
                raise failure.error
            if action is BlockErrorAction.STOP:
                await self.pause_point()
                return
        await self.sleep(_AGAIN)

    # --- its end -----------------------------------------------------------------------------------------------------

    def cancel_requested(self, force: bool) -> bool:
        return not self._switching

    async def prepare(self) -> None:
        """The overlays get the base as their backing file. Raises Error, OSError."""
        self._switching = True
        assert self._filter is not None
        fmt = "raw" if self._mask_protocol and self._base.driver.is_protocol else self._base.driver.name
        name = filenames.filename(self._base) if self._backing_file is None else self._backing_file
        renamed: list[tuple[Node, str | None, str | None]] = []
        async with self.graph.drained(self._filter):
            self._let_go()
            try:
                for edge in tuple(self._filter.parents):
                    overlay = edge.parent
                    if isinstance(overlay, Node) and edge.role & ROLE_COW:
                        known = overlay.driver.image_info()
                        renamed.append((overlay, known.get("backing_filename"), known.get("backing_filename_format")))
                        await _rename_backing(overlay, name, fmt)
                await self._leave_chain(self._base)
            except BaseException:
                for overlay, old_name, old_fmt in reversed(renamed):
                    try:
                        await _rename_backing(overlay, old_name, old_fmt)
                    except (Error, OSError) as exc:
                        # It is as good: the base has everything.
                        log.error("node '%s' keeps '%s' as the name of its backing file: %s", overlay.name, name, exc)
                raise
        self._succeeded = True

    async def commit(self) -> None:
        await self._base_as_before()

    async def abort(self) -> None:
        self._let_go()
        self.remove_nodes()
        await self._leave_chain(self._top)
        await self._base_as_before()

    async def clean(self) -> None:
        # As in QSD, the nodes of a commit that has succeeded are held until it is dismissed.
        if self.auto_dismiss or not self._succeeded:
            await super().clean()

    async def dismissed(self) -> None:
        await self.release_nodes()

    def _let_go(self) -> None:
        """Stop to work on the chain, and let it change."""
        for backend in (self._from, self._into):
            if backend is not None:
                self.close_backend(backend)
        self._from = self._into = None
        if self._frozen:
            assert self._filter is not None
            freezing.thaw(self._filter, self._base)
            self._frozen = False

    async def _leave_chain(self, to: Node) -> None:
        """Whoever uses the filter uses `to` instead. Raises Error, and then nothing has changed."""
        top = self._filter
        if top is None:
            return
        await take_away(top, to)
        self._filter = None

    async def _base_as_before(self) -> None:
        if self._base_was_read_only:
            await read_only_again(self.graph, self._base)


async def _rename_backing(overlay: Node, name: str | None, fmt: str | None) -> None:
    """Write the name of another backing file into the image of `overlay`; it is on disk then. Raises Error, OSError."""
    read_only = overlay.read_only
    if read_only:
        await set_read_only(overlay.graph, overlay, False)
    try:
        await overlay.driver.change_backing_file(name, fmt)
        await overlay.flush()
    finally:
        if read_only:
            await set_read_only(overlay.graph, overlay, True)


@command("block-commit")
async def block_commit(
    jobs: Jobs,
    graph: Graph,
    /,
    *,
    job_id: str | None = None,
    device: str,
    base_node: str | None = None,
    base: Annotated[str | None, Features("deprecated")] = None,
    top_node: str | None = None,
    top: Annotated[str | None, Features("deprecated")] = None,
    backing_file: str | None = None,
    backing_mask_protocol: bool | None = None,
    speed: int | None = None,
    on_error: BlockdevOnError | None = None,
    filter_node_name: str | None = None,
    auto_finalize: bool | None = None,
    auto_dismiss: bool | None = None,
) -> None:
    """Bring the content of the layers of a chain from `top` down to above `base` into `base`, and take them out of the
    chain; by default from `device` to the end of the chain."""
    node = _device(graph, device)
    op_blockers.check(node, Op.COMMIT_SOURCE)
    upper = _top(graph, node, top_node, top)
    lower = _base(graph, upper, base_node, base)
    layer: Node | None = upper
    while layer is not None:
        op_blockers.check(layer, Op.COMMIT_TARGET)
        layer = layer.below() if layer is not lower else None
    if upper is lower:
        raise Error("cannot commit an image into itself")
    active = filenames.without_filters(upper) is filenames.without_filters(node)
    if active or graph_perms.cumulative(upper)[0] & perms.WRITE:
        if backing_file is not None:
            why = "is the active layer" if active else "has a writer on it"
            raise Error(f"'backing-file' specified, but 'top' {why}")
        await start_active_commit(
            jobs,
            graph,
            job_id or "",
            upper,
            lower,
            speed=speed or 0,
            on_error=on_error or BlockdevOnError.REPORT,
            filter_node_name=filter_node_name,
            auto_finalize=auto_finalize is not False,
            auto_dismiss=auto_dismiss is not False,
        )
        return
    if filenames.without_filters(upper) is filenames.without_filters(lower):
        raise Error("Invalid files for merge: top and base are the same")
    job = CommitJob(
        jobs,
        job_id or "",
        node,
        upper,
        lower,
        speed=speed or 0,
        on_error=on_error or BlockdevOnError.REPORT,
        backing_file=backing_file,
        mask_protocol=bool(backing_mask_protocol),
        auto_finalize=auto_finalize is not False,
        auto_dismiss=auto_dismiss is not False,
    )
    await job.make(filter_node_name)
    job.start()


def _device(graph: Graph, name: str) -> Node:
    if graph.get(name) is None:
        raise DeviceNotFound(f"Device '{name}' not found")
    return find_root(graph, name)


def _top(graph: Graph, device: Node, node_name: str | None, filename: str | None) -> Node:
    if node_name is not None and filename is not None:
        raise Error("'top-node' and 'top' are mutually exclusive")
    if node_name is not None:
        return _in_chain(device, lookup(graph, None, node_name))
    if filename is None or filename == filenames.filename(device):
        return device
    node = filenames.find_backing_image(device, filename)
    if node is None:
        raise Error(f"Top image file {filename} not found")
    return node


def _base(graph: Graph, top: Node, node_name: str | None, filename: str | None) -> Node:
    if node_name is not None and filename is not None:
        raise Error("'base-node' and 'base' are mutually exclusive")
    if node_name is not None:
        return _in_chain(top, lookup(graph, None, node_name))
    if filename is not None:
        node = filenames.find_backing_image(top, filename)
        if node is None:
            raise Error(f"Can't find '{filename}' in the backing chain")
        return node
    node = filenames.without_filters(top)
    while node.driver.backing is not None:
        node = filenames.without_filters(node.driver.backing.node)
    return node


def _in_chain(top: Node, node: Node) -> Node:
    layer: Node | None = top
    while layer is not node:
        if layer is None:
            raise Error(f"'{node.name}' is not in this backing file chain")
        layer = layer.below()
    return node
