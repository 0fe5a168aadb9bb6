"""The graph of block nodes: opening, naming, attaching, draining and closing them (a service of the daemon)."""

from __future__ import annotations

import asyncio
import errno
import logging
import random
import re
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from pyqsd.block import graph_perms, op_blockers, registry
from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.child import Child
from pyqsd.block.driver import ROLE_COW, ROLE_PRIMARY
from pyqsd.block.node import Node
from pyqsd.block.op_blockers import Op
from pyqsd.block.options import BlockdevDetectZeroesOptions, BlockdevDiscardOptions, BlockdevOptions, BlockdevRef
from pyqsd.qapi.errors import Error, from_oserror
from pyqsd.qapi.types import NULL
from pyqsd.trace import events as trace

if TYPE_CHECKING:
    from pyqsd.block.driver import Driver
    from pyqsd.qapi.command import EventBus
    from pyqsd.qom.objects import Objects

log = logging.getLogger(__name__)

_WELL_FORMED = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_LONGEST_NAME = 31
#: Nodes that name each other as backing files must end somewhere.
_DEEPEST = 200


class _Drain:
    """A drained section: the nodes that are drained, and the backends that it has quiesced."""

    def __init__(self, nodes: tuple[Node, ...]) -> None:
        self.nodes = nodes
        self.backends: list[BlockBackend] = []


class Graph:
    """All nodes of a daemon. Changes are made by one command at a time."""

    def __init__(self, events: EventBus) -> None:
        self.events = events
        #: The objects of the daemon, for drivers that need one; None where there are none.
        self.objects: Objects | None = None
        self.nodes: dict[str, Node] = {}
        self.backends: list[BlockBackend] = []
        #: The jobs that work on nodes, until they are forgotten, the oldest first.
        self.block_jobs: list[Any] = []
        self._drains: list[_Drain] = []
        #: Held by who changes edges and waits for something in between, and by a job that changes edges in its end.
        self.changing = asyncio.Lock()
        #: What nodes still have to do because their parents gave up permissions.
        self._after_perms: set[asyncio.Task[None]] = set()
        self._names_made = 0
        self._depth = 0

    # --- finding -----------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Node | None:
        """The node `name` if it is open: one that a job is only just opening does not exist yet for others, and one
        that is being checked never does."""
        node = self.nodes.get(name)
        return node if node is not None and node.opened and not node.check_only else None

    def find(self, name: str) -> Node:
        """The node `name`. Raises Error."""
        node = self.get(name)
        if node is None:
            raise Error(f"Cannot find device='{name}' nor node-name='{name}'")
        return node

    def secret_text(self, id: str) -> str:
        """What the secret object `id` holds. Raises Error."""
        if self.objects is None:
            raise Error(f"No secret with id '{id}'", errno.ENOENT)
        return self.objects.secret_text(id)

    # --- adding ------------------------------------------------------------------------------------------------------

    async def add(self, options: BlockdevOptions) -> Node:
        """Open a node for the user (``blockdev-add``), who removes it with `remove`."""
        if options.node_name is None:
            raise Error("'node-name' must be specified for the root node")
        node = await self._open(options, None, 0)
        node.monitor_owned = True
        return node

    def _check_name(self, name: str) -> None:
        if not _WELL_FORMED.fullmatch(name):
            raise Error(f"Invalid node-name: '{name}'")
        if name in self.nodes:
            raise Error(f"Duplicate nodes with node-name='{name}'")
        if len(name) > _LONGEST_NAME:
            raise Error("Node name too long")

    def _make_name(self) -> str:
        # Unpredictable in part, so that nobody relies on it.
        while True:
            name = f"#block{self._names_made}{random.randrange(100):02d}"
            self._names_made += 1
            if name not in self.nodes:
                return name

    def make_node(self, name: str | None, driver_class: type[Driver]) -> Node:
        """A new node that is not opened, with no options at all, for a driver that only its maker knows. Raises Error
        if it cannot have this name."""
        if name is not None:
            self._check_name(name)
        node = Node(self, name or self._make_name(), driver_class, driver_class.Options(node_name=name))
        self.nodes[node.name] = node
        return node

    async def _open(self, options: BlockdevOptions, parent: Node | None, role: int, check_only: bool = False) -> Node:
        """Open a node; `parent` and `role`: whose inline child it is, to inherit options from; `check_only`: see
        `opened_for_check`."""
        if self._depth >= _DEEPEST:
            raise Error("Backing chain is too long, or has a loop")
        if options.node_name is not None:
            self._check_name(options.node_name)
        if getattr(options, "backing", None) == "":
            log.warning('Use of "backing": "" is deprecated; use "backing": null instead')
            options.backing = NULL  # type: ignore[attr-defined]
        driver_class = registry.driver_class(str(options.__struct_config__.tag))
        node = Node(self, options.node_name or self._make_name(), driver_class, options)
        apply_options(node, options, parent, role)
        if check_only:
            node.check_only = node.read_only = True
        self.nodes[node.name] = node
        self._depth += 1
        if trace.BDRV_OPEN_COMMON.enabled:
            flags = (not node.read_only) << 1 | node.cache_direct << 5 | node.no_flush << 9
            filename = getattr(options, "filename", "")
            trace.BDRV_OPEN_COMMON(id(node), filename, flags, options.__struct_config__.tag)
        try:
            await node.driver.open()
            node.length = node.driver.length()
            node.opened = True
            node.refresh_limits()
            # The driver decides its children's permissions on what it has learnt while it opened.
            graph_perms.refresh([node])
        except BaseException as exc:
            if node.opened:
                node.opened = False
                await self._quietly(node, node.driver.close())
            await self._detach_children(node)
            del self.nodes[node.name]
            if isinstance(exc, OSError):
                raise from_oserror(exc, "Could not open image") from exc
            raise
        finally:
            self._depth -= 1
        return node

    @asynccontextmanager
    async def using(self, ref: BlockdevRef) -> AsyncIterator[Node]:
        """The node that `ref` describes, opened for this block if it is no existing one. It may be deleted by others as
        long as it has no other user. Raises Error."""
        if isinstance(ref, str):
            yield self.find(ref)
            return
        node = await self._open(ref, None, 0)
        try:
            yield node
        finally:
            await self.unref(node)

    @asynccontextmanager
    async def opened_for_check(self, options: BlockdevOptions, repairs: bool) -> AsyncIterator[Node]:
        """A node for this block only, on which nothing but `Driver.check` is called: images open that do not otherwise.
        The node itself is read-only; with `repairs` what is below it may be written to. Raises Error, OSError."""
        if not repairs and options.read_only is None:
            options.read_only = True
        node = await self._open(options, None, 0, check_only=True)
        try:
            yield node
        finally:
            await self.unref(node)

    async def open_unattached(self, options: BlockdevOptions, parent: Node | None = None, role: int = 0) -> Node:
        """Open a node, as `parent` would as a child with `role`, but without attaching it: the caller passes it
        to `unref`. Raises Error, OSError."""
        return await self._open(options, parent, role)

    async def open_child(self, parent: Node, name: str, ref: BlockdevRef, role: int, context: str = "") -> Child:
        """Open (or find) the node that `ref` describes and attach it to `parent` as the child `name`. `context` is put
        before the message if it cannot be opened. Raises Error, OSError."""
        try:
            node = await self._find_or_open(parent, ref, role)
        except Error as exc:
            if not context:
                raise
            raise exc.prefixed(context) from exc
        try:
            return self.attach(parent, name, node, role)
        except BaseException:
            await self.unref(node)
            raise

    async def _find_or_open(self, parent: Node, ref: BlockdevRef, role: int) -> Node:
        if isinstance(ref, str):
            # The parent itself, or one that is being opened for its sake, is not found.
            return self.find(ref)
        return await self._open(ref, parent, role)

    def attach(self, parent: Node, name: str, node: Node, role: int) -> Child:
        """Make `node` the child `name` of `parent`. Raises Error and changes nothing on a permission conflict."""
        if parent is node or is_below(parent, node):
            raise Error(f"Making '{node.name}' a {name} child of '{parent.name}' would create a cycle")
        if parent.active and not node.active:
            raise Error(f"Inactive '{node.name}' can't be a {name} child of active '{parent.name}'")
        child = Child(parent, name, node, role, 0, perms.ALL)
        self.link(child)
        try:
            graph_perms.refresh(
                [node], {child: graph_perms.child_perms(parent, child, *graph_perms.cumulative(parent))}
            )
        except BaseException:
            self.unlink(child)
            raise
        return child

    @staticmethod
    def link(child: Child) -> None:
        """Enter the edge into both of its ends, without a look at permissions."""
        parent = child.parent
        assert isinstance(parent, Node)
        child.node.parents.insert(0, child)
        parent.children.append(child)
        if child.name == "file" or child.role & ROLE_PRIMARY:
            parent.driver.file = child
        elif child.name == "backing":
            parent.driver.backing = child

    @staticmethod
    def unlink(child: Child) -> None:
        """The opposite of `link`."""
        parent = child.parent
        assert isinstance(parent, Node)
        child.node.parents.remove(child)
        parent.children.remove(child)
        if parent.driver.file is child:
            parent.driver.file = None
        if parent.driver.backing is child:
            parent.driver.backing = None

    # --- removing ----------------------------------------------------------------------------------------------------

    async def remove(self, name: str) -> None:
        """Close the user's node `name` (``blockdev-del``). Raises Error if it is in use."""
        node = self.get(name)
        if node is None:
            raise Error(f"Failed to find node with node-name='{name}'")
        if any(isinstance(edge.parent, BlockBackend) and edge.parent.owner is None for edge in node.parents):
            raise Error(f"Node {name} is in use")
        op_blockers.check(node, Op.DELETE)
        if not node.monitor_owned:
            raise Error(f"Node {name} is not owned by the monitor")
        if node.parents:
            raise Error(f"Block device {name} is in use")
        node.monitor_owned = False
        await self.unref(node)

    async def unref(self, node: Node) -> None:
        """Close `node` if nobody uses it any more, and then its children likewise."""
        if node.monitor_owned or node.parents or self.nodes.get(node.name) is not node:
            return
        await node.wait_idle()
        await self._quietly(node, node.flush())
        node.opened = False
        await self._quietly(node, node.driver.close())
        del self.nodes[node.name]
        await self._detach_children(node)

    async def _detach_children(self, node: Node) -> None:
        for child in reversed(list(node.children)):
            self.unlink(child)
            graph_perms.refresh([child.node])
            await self.unref(child.node)
            await self.settled()

    @staticmethod
    async def _quietly(node: Node, action: Awaitable[None]) -> None:
        try:
            await action
        except (OSError, Error) as exc:
            log.error("node '%s': closing: %s", node.name, exc)

    async def close_all(self) -> None:
        """Close every node, parents first. Backends must be gone."""
        for node in [n for n in self.nodes.values() if n.monitor_owned]:
            node.monitor_owned = False
        while True:
            free = [node for node in self.nodes.values() if not node.parents]
            if not free:
                break
            for node in free:
                await self.unref(node)

    async def reopen(self, entries: list[BlockdevOptions]) -> None:
        """``blockdev-reopen``; see `pyqsd.block.reopen`."""
        from pyqsd.block.reopen import reopen

        await reopen(self, entries)

    # --- after a change of permissions -------------------------------------------------------------------------------

    def after_perms(self, action: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `action`, which raises nothing, soon: a change of permissions, which must not wait, leads to it."""
        task = asyncio.get_running_loop().create_task(action)
        self._after_perms.add(task)
        task.add_done_callback(self._after_perms.discard)
        return task

    async def settled(self) -> None:
        """Wait for everything that changes of permissions have led to so far."""
        if self._after_perms:
            await asyncio.wait(self._after_perms)

    # --- draining ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def drained(self, *nodes: Node) -> AsyncIterator[None]:
        """Hold back new requests to `nodes` and wait for those in flight; go on when the block ends."""
        section = _Drain(nodes)
        self._drains.append(section)
        for node in nodes:
            for backend in backends_above(node):
                if backend not in section.backends:
                    backend.quiesce()
                    section.backends.append(backend)
        try:
            for backend in section.backends:
                await backend.wait_idle()
            for node in nodes:
                await node.wait_idle()
            yield
        finally:
            self._drains.remove(section)
            for backend in section.backends:
                backend.resume()

    def join_drains(self, backend: BlockBackend) -> None:
        """A new user of the graph takes part in the drains that are going on below it."""
        for section in self._drains:
            if backend not in section.backends and any(
                node is backend.node or is_below(node, backend.node) for node in section.nodes
            ):
                backend.quiesce()
                # The newest is the first that goes on: QSD's order of the jobs that a transaction starts.
                section.backends.insert(0, backend)


def backends_above(node: Node) -> list[BlockBackend]:
    """All users of `node` and of the nodes above it."""
    found: list[BlockBackend] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node in seen:
            return
        seen.add(node)
        for edge in node.parents:
            if isinstance(edge.parent, Node):
                visit(edge.parent)
            elif edge.parent not in found:
                found.append(edge.parent)
                if edge.parent.passed_on_by is not None:
                    visit(edge.parent.passed_on_by)

    visit(node)
    return found


def is_below(node: Node, ancestor: Node) -> bool:
    """Whether `node` can be reached from `ancestor` along its children."""
    seen = {ancestor}
    rest = [ancestor]
    while rest:
        for child in rest.pop().children:
            if child.node is node:
                return True
            if child.node not in seen:
                seen.add(child.node)
                rest.append(child.node)
    return False


def apply_options(node: Node, options: BlockdevOptions, parent: Node | None, role: int) -> None:
    """Set the effective generic options of `node`: those given, and for an inline child what it inherits.

    Raises Error.
    """
    cache = options.cache
    direct = cache.direct if cache is not None else None
    no_flush = cache.no_flush if cache is not None else None
    read_only, auto_read_only = options.read_only, options.auto_read_only
    discard, force_share = options.discard, options.force_share
    if parent is not None:
        # Formats decide about flushes and discards themselves, so that below them both are on.
        direct = parent.cache_direct if direct is None else direct
        no_flush = parent.no_flush if no_flush is None else no_flush
        force_share = parent.force_share if force_share is None else force_share
        discard = BlockdevDiscardOptions.UNMAP if discard is None else discard
        # QSD opens the child called `file` before it looks at its parent's own `active`.
        first = role & ROLE_PRIMARY and hasattr(parent.options, "file")
        node.inherits_active = parent.inherits_active if first else parent.active
        if role & ROLE_COW:
            read_only = True if read_only is None else read_only
            auto_read_only = False if auto_read_only is None else auto_read_only
        else:
            # A repair writes below a node that is read-only itself.
            inherited = bool(parent.options.read_only) if parent.check_only else parent.read_only
            read_only = inherited if read_only is None else read_only
            auto_read_only = parent.auto_read_only if auto_read_only is None else auto_read_only
    node.cache_direct = bool(direct)
    node.no_flush = bool(no_flush)
    node.read_only = bool(read_only)
    node.auto_read_only = bool(auto_read_only)
    node.force_share = bool(force_share)
    node.discard_unmap = discard == BlockdevDiscardOptions.UNMAP
    node.active = node.inherits_active if options.active is None else options.active
    node.detect_zeroes = str(options.detect_zeroes or BlockdevDetectZeroesOptions.OFF)
    if node.force_share and not node.read_only:
        raise Error("force-share=on can only be used with read-only images")
    if node.detect_zeroes == "unmap" and not node.discard_unmap:
        raise Error("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
