"""``block-stream``: what is in layers of a backing chain comes up into the layer above them, which needs them no more.

A copy-on-read filter sits above that layer meanwhile, so that what its users read comes up too.

What must be on disk before what: the layer has all data, with its tables, and is flushed, before its header names
another backing file. Until then it names the layers that have the data.

Offsets and lengths are bytes.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable
from typing import ClassVar, Final

from pyqsd.block import copy_up, filenames, op_blockers
from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.block_copy import Workers
from pyqsd.block.commands import lookup
from pyqsd.block.driver import ROLE_COW
from pyqsd.block.events import BlockErrorAction
from pyqsd.block.extents import ALLOCATED, ZERO
from pyqsd.block.graph import Graph
from pyqsd.block.internal_filter import take_away
from pyqsd.block.node import Node
from pyqsd.block.op_blockers import Op
from pyqsd.block.reopen import read_only_again, set_read_only
from pyqsd.block.replace import Change
from pyqsd.drivers.filters.copy_on_read import CopyOnRead
from pyqsd.drivers.filters.copy_on_read import Options as CopyOnReadOptions
from pyqsd.jobs.block_job import BlockdevOnError, BlockJob
from pyqsd.jobs.job import Jobs, JobType
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import Error

#: Bytes of data that are copied in one piece (as in QSD: what is all zeroes is found in pieces of this size).
_PIECE: Final = 512 << 10
#: Bytes that are known to be zeroes and are dealt with in one piece.
_ZERO_PIECE: Final = 64 << 20
#: More of them take no less time, but a user who wants something of one waits longer.
_MOST_PIECES: Final = 3
#: So much data goes to disk at a time, while more is copied; else it would all be waited for in the end.
_FLUSH_EVERY: Final = 32 << 20
#: How long the command waits for the end of a job that has nothing to copy, seconds.
_SOON: Final = 1.0
_UNCHANGED: Final = perms.CONSISTENT_READ | perms.WRITE_UNCHANGED


class _Piece:
    """A range that is worked on; in the order of offsets."""

    __slots__ = ("done", "end", "error", "start")

    def __init__(self, start: int, end: int, done: bool = False) -> None:
        self.start = start
        self.end = end
        self.done = done
        self.error: OSError | None = None


class _Chain:
    """Which part of a backing chain is streamed.

    `target`: where the data comes; `overlay`: the same without filters, the layer that gets it; `lowest`: the last
    layer that data comes from; `above_base`: the last node that is streamed (`lowest`, or a filter below it).
    """

    def __init__(self, target: Node, lowest: Node, above_base: Node) -> None:
        self.target = target
        self.overlay = filenames.without_filters(target)
        self.lowest = lowest
        self.above_base = above_base

    def between(self) -> list[Node]:
        """The nodes below `target` that are streamed."""
        found: list[Node] = []
        node = self.target
        while node is not self.above_base and (below := node.below()) is not None:
            node = below
            found.append(node)
        return found


class StreamJob(BlockJob):
    """Streams the layers of `chain` into its top, with the copy-on-read filter `top` above that already.

    Arguments:
        backing_file: the name of the base that is written into the overlay; None: that with which it was opened.
        mask_protocol: if the base has no format, "raw" is written as that.
        was_read_only: the target is to be read-only again in the end.
    """

    kind: ClassVar[JobType] = JobType.STREAM

    def __init__(
        self,
        jobs: Jobs,
        id: str,
        top: Node,
        chain: _Chain,
        *,
        speed: int,
        on_error: BlockdevOnError,
        backing_file: str | None,
        mask_protocol: bool,
        was_read_only: bool,
        auto_finalize: bool,
        auto_dismiss: bool,
    ) -> None:
        super().__init__(
            jobs,
            id,
            top.graph,
            top,
            0,
            perms.ALL,
            speed=speed,
            auto_finalize=auto_finalize,
            auto_dismiss=auto_dismiss,
        )
        self._filter: Node | None = top
        self._chain = chain
        self._on_error = on_error
        self._backing_file = backing_file
        self._mask_protocol = mask_protocol
        self._was_read_only = was_read_only
        #: Those that are not done, and those above the first of them.
        self._pieces: deque[_Piece] = deque()
        self._has_failed = False
        self._flushing = False
        try:
            self._user: BlockBackend | None = self.open_backend(top, perms.CONSISTENT_READ, _UNCHANGED | perms.WRITE)
            self.add_node("active node", chain.target, 0, _UNCHANGED | perms.WRITE)
            for node in chain.between():
                # They are about to go; what is read of them must stay what it is.
                self.add_node("intermediate node", node, 0, _UNCHANGED)
        except BaseException:
            self.give_up()
            raise

    # --- the work ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        chain = self._chain
        if chain.overlay is chain.lowest:
            # Nothing to copy, only another name for the backing file.
            return
        total = chain.target.length
        self.expect(total)
        unit = max(chain.target.driver.allocation_unit(), 1)
        buffers = copy_up.Buffers(_PIECE, -(-_PIECE // unit) * unit + 2 * unit)
        ignored: OSError | None = None
        at = unflushed = 0
        async with Workers(_MOST_PIECES + 1, _MOST_PIECES * _PIECE) as workers:
            self.workers = workers
            while True:
                while at < total and not self._has_failed:
                    n, wanted = await self._look(at, total - at)
                    if wanted:
                        piece = _Piece(at, at + n)
                        self._pieces.append(piece)
                        # Zeroes take neither time nor room.
                        await workers.run(min(n, _PIECE), self._work(piece, buffers))
                    else:
                        self._skip(at, n)
                    at += n
                    unflushed += min(n, _PIECE) if wanted else 0
                    if unflushed >= _FLUSH_EVERY and not self._flushing:
                        unflushed = 0
                        self._flushing = True
                        await workers.run(0, self._flush())
                    await self.throttle(n if wanted else 0)
                await workers.idle()
                if not self._has_failed:
                    break
                self._has_failed = False
                failed = next(piece for piece in self._pieces if piece.error is not None)
                assert failed.error is not None
                # The first one counts; what is above it is looked at again.
                self._pieces.clear()
                at = failed.start
                action = self.error_action(self._on_error, True, failed.error.errno or errno.EIO)
                if action is BlockErrorAction.REPORT:
                    raise failed.error
                if action is BlockErrorAction.IGNORE:
                    ignored = ignored or failed.error
                    at = min(at + _PIECE, failed.end)
                    self.advance(at - self.progress_current)
                await self.throttle(0)
        if ignored is not None:
            # The layers below are still needed.
            raise ignored

    async def _look(self, offset: int, length: int) -> tuple[int, bool]:
        """How many bytes from `offset` on are dealt with next, and whether they are to be copied."""
        chain = self._chain
        allocated, n = await self._allocated(offset, length)
        if allocated:
            return n, False
        below = chain.overlay.below()
        assert below is not None
        try:
            base = chain.above_base.below()
            (m, flags, _, _), depth = await below.block_status_above(base, offset, n, False)
            if not m:
                # The layer below ends here, and a longer base must not show through.
                if base is None or offset >= base.length:
                    return length, False
                return min(n, base.length - offset, _PIECE if self.speed else _ZERO_PIECE), True
            if not depth:
                return m, False
            if m > _PIECE and not self.speed:
                (zeroes, flags, _, _), _ = await below.block_status_above(None, offset, m, True)
                if flags & ZERO and zeroes >= _PIECE:
                    return (m if zeroes >= m else zeroes // _PIECE * _PIECE) if m <= _ZERO_PIECE else _ZERO_PIECE, True
        except OSError:
            # Copying it will fail likewise, and that is dealt with.
            m = n
        return min(m, _PIECE), True

    async def _allocated(self, offset: int, length: int) -> tuple[bool, int]:
        try:
            n, flags, _, _ = await self._chain.overlay.block_status(offset, length, False)
        except OSError:
            return False, min(length, _PIECE)
        return bool(flags & ALLOCATED), n

    async def _work(self, piece: _Piece, buffers: copy_up.Buffers) -> None:
        target = self._chain.target
        start, end = copy_up.whole_units(target, piece.start, piece.end - piece.start)
        try:
            await copy_up.fill(target, start, end, buffers)
        except OSError as exc:
            piece.error = exc
            self._has_failed = True
        else:
            self._finish(piece)

    async def _flush(self) -> None:
        try:
            await self._chain.overlay.flush()
        finally:
            self._flushing = False

    def _skip(self, offset: int, length: int) -> None:
        pieces = self._pieces
        if not pieces:
            self.advance(length)
        elif pieces[-1].done:
            pieces[-1].end += length
        else:
            pieces.append(_Piece(offset, offset + length, True))

    def _finish(self, piece: _Piece) -> None:
        """Progress is up to where everything is done."""
        piece.done = True
        pieces = self._pieces
        while pieces and pieces[0].done:
            first = pieces.popleft()
            self.advance(first.end - first.start)

    # --- its end -----------------------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """The overlay gets the base as its backing file. Raises Error, OSError."""
        chain = self._chain
        overlay = chain.overlay
        if overlay.driver.backing is None:
            return
        async with self.graph.drained(chain.target):
            # Before its header names another backing file.
            await overlay.flush()
            base = chain.above_base.below()
            if base is not None:
                image = filenames.without_filters(base)
                name = filenames.filename(image) if self._backing_file is None else self._backing_file
                fmt = "raw" if self._mask_protocol and image.driver.is_protocol else image.driver.name
            await self._take_filter_away(overlay, base)
            try:
                await overlay.driver.change_backing_file(*((None, None) if base is None else (name, fmt)))
            except Error as exc:
                raise OSError(exc.errno or errno.EIO, exc.desc) from exc

    async def _take_filter_away(self, overlay: Node | None = None, base: Node | None = None) -> None:
        """Whoever uses the filter uses the target instead; and `overlay`, if that is given, has `base` as its backing
        file. Raises Error, and then nothing has changed."""
        top = self._filter
        if top is None:
            return
        async with self.graph.changing, self.graph.drained(top):
            if self._user is not None:
                self.close_backend(self._user)
                self._user = None
            self.remove_node(top)
            backing = overlay.driver.backing if overlay is not None else None

            def rebase(change: Change) -> None:
                if overlay is not None and backing is not None and backing.node is not base:
                    change.remove(backing)
                    if base is not None:
                        change.add(overlay, "backing", base, ROLE_COW)

            await _remove_filter(top, self._chain.target, rebase)
            self._filter = None

    async def abort(self) -> None:
        await self._take_filter_away()

    async def clean(self) -> None:
        # Not the base's: nodes are let go of later.
        await self._take_filter_away()
        if self._was_read_only:
            await read_only_again(self.graph, self._chain.target)

    async def dismissed(self) -> None:
        # As in QSD, they are held until then. Layers that nobody else uses are closed.
        await self.release_nodes()


async def _insert_filter(chain: _Chain, name: str | None) -> Node:
    """Put a copy-on-read filter over the target. Raises Error, and then nothing has changed."""
    target = chain.target
    graph = target.graph
    async with graph.drained(target):
        try:
            top = await graph.open_unattached(
                CopyOnReadOptions(node_name=name, file=target.name, bottom=chain.lowest.name)
            )
        except Error as exc:
            raise exc.prefixed("Could not create node: ") from exc
        top.job_owned = True
        top.implicit = name is None
        # It adds nothing of its own to what the node does with these.
        top.discard_unmap = True
        change = Change()
        try:
            change.move_parents(target, top)
            change.check()
        except Error as exc:
            change.undo()
            await graph.unref(top)
            raise exc.prefixed("Could not replace node: ") from exc
        change.commit()
    return top


async def _remove_filter(top: Node, target: Node, more: Callable[[Change], None] | None = None) -> None:
    """Whoever uses the filter `top` uses `target` instead, and `more` is changed together with that. Raises Error, and
    then nothing has changed."""
    assert isinstance(top.driver, CopyOnRead)
    # Drained from before the chain is thawed.
    async with top.graph.drained(top):
        with top.driver.thawed():
            await take_away(top, target, more)


def _in_chain(node: Node, top: Node) -> bool:
    layer: Node | None = top
    while layer is not None and layer is not node:
        layer = layer.below()
    return layer is node


def _find_chain(target: Node, base: Node | None, bottom: Node | None) -> _Chain:
    """The part of the chain below `target` down to `bottom`, or to above `base`. Raises Error."""
    if bottom is not None:
        return _Chain(target, bottom, bottom)
    image = filenames.without_filters(base) if base is not None else None
    lowest = filenames.without_filters(target)
    while (edge := lowest.driver.backing) is not None:
        below = filenames.without_filters(edge.node)
        if below is image:
            break
        lowest = below
    else:
        if base is not None:
            raise Error(f"'{base.name}' is not in the backing chain of '{target.name}'")
        return _Chain(target, lowest, lowest)
    above_base = lowest
    while (node := above_base.below()) is not base:
        assert node is not None
        above_base = node
    return _Chain(target, lowest, above_base)


@command("block-stream")
async def block_stream(
    jobs: Jobs,
    graph: Graph,
    /,
    *,
    job_id: str | None = None,
    device: str,
    base: str | None = None,
    base_node: str | None = None,
    backing_file: str | None = None,
    backing_mask_protocol: bool | None = None,
    bottom: str | None = None,
    speed: int | None = None,
    on_error: BlockdevOnError | None = None,
    filter_node_name: str | None = None,
    auto_finalize: bool | None = None,
    auto_dismiss: bool | None = None,
) -> None:
    """Copy what a node's backing chain has, down to above `base` or to `bottom`, or all of it, into the node, which
    needs these layers no more then."""
    for one, other, names in (
        (base, base_node, "'base' and 'base-node'"),
        (base, bottom, "'base' and 'bottom'"),
        (bottom, base_node, "'bottom' and 'base-node'"),
    ):
        if one is not None and other is not None:
            raise Error(f"{names} cannot be specified at the same time")
    target = graph.find(device)
    base_image = _base(graph, target, base, base_node)
    lowest = None if bottom is None else _bottom(graph, target, bottom)
    end = base_image if lowest is None else lowest.below()
    layer: Node | None = target
    while layer is not None and layer is not end:
        op_blockers.check(layer, Op.STREAM)
        layer = layer.below()
    if base_image is None and backing_file is not None:
        raise Error("backing file specified, but streaming the entire chain")
    chain = _find_chain(target, base_image, lowest)
    was_read_only = target.read_only
    if was_read_only:
        await set_read_only(graph, target, False)
    top: Node | None = None
    try:
        top = await _insert_filter(chain, filter_node_name)
        job = StreamJob(
            jobs,
            job_id or "",
            top,
            chain,
            speed=speed or 0,
            on_error=on_error or BlockdevOnError.REPORT,
            backing_file=backing_file,
            mask_protocol=bool(backing_mask_protocol),
            was_read_only=was_read_only,
            auto_finalize=auto_finalize is not False,
            auto_dismiss=auto_dismiss is not False,
        )
    except BaseException:
        if top is not None:
            await _remove_filter(top, chain.target)
        if was_read_only:
            await read_only_again(graph, target)
        raise
    job.start()
    if chain.overlay is chain.lowest:
        # In QSD, what is done at once is done before the command returns.
        await (job.wait(_SOON) if job.auto_finalize else asyncio.sleep(0))


def _base(graph: Graph, target: Node, filename: str | None, name: str | None) -> Node | None:
    if filename is not None:
        found = filenames.find_backing_image(target, filename)
        if found is None:
            raise Error(f"Can't find '{filename}' in the backing chain")
        return found
    if name is None:
        return None
    node = lookup(graph, None, name)
    if node is target or not _in_chain(node, target):
        raise Error(f"Node '{name}' is not a backing image of '{target.name}'")
    return node


def _bottom(graph: Graph, target: Node, name: str) -> Node:
    node = lookup(graph, None, name)
    if node.driver.is_filter:
        raise Error(f"Node '{name}' is a filter, use a non-filter node as 'bottom'")
    if not _in_chain(node, target):
        raise Error(f"Node '{name}' is not in a chain starting from '{target.name}'")
    return node
