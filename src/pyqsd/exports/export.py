"""Block exports: what every type of export has in common, and the service that holds them.

An export type is a package of this room with a module ``export`` that has its class as ``EXPORT``; it is imported when
the first export of its type is made.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import logging
import pkgutil
import re
from collections.abc import Callable, Mapping
from enum import Enum, StrEnum
from functools import cache
from typing import Any, ClassVar, TypeVar

from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.graph import Graph
from pyqsd.qapi.command import Event, EventBus, event
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Struct

log = logging.getLogger(__name__)

S = TypeVar("S")

_WELL_FORMED = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
#: Export types whose name is not that of their package.
_NAMES = {"vhost_user": "vhost-user-blk", "vduse": "vduse-blk"}


class BlockExportType(StrEnum):
    """The export types that there are."""

    NBD = "nbd"
    VHOST_USER_BLK = "vhost-user-blk"


class BlockExportRemoveMode(StrEnum):
    """`safe`: only if nobody uses the export. `hard`: its users are disconnected."""

    SAFE = "safe"
    HARD = "hard"


class BlockExportOptions(Struct, kw_only=True, tag_field="type", tag="pyqsd-base"):
    """The options of an export; each type's ``Options`` is a branch."""

    id: str
    fixed_iothread: bool | None = None
    iothread: str | None = None
    node_name: str
    writable: bool | None = None
    writethrough: bool | None = None
    allow_inactive: bool | None = None

    @classmethod
    def branches(cls) -> Mapping[str, type[Struct]]:
        return {name: export_class(name).Options for name in export_types()}

    @classmethod
    def branch(cls, tag: str) -> type[Struct] | None:
        return export_class(tag).Options if tag in export_types() else None


class BlockExportInfo(Struct, kw_only=True):
    """What ``query-block-exports`` says about an export."""

    id: str
    type: BlockExportType
    node_name: str
    shutting_down: bool


@event("BLOCK_EXPORT_DELETED")
class BlockExportDeleted(Event):
    """An export is gone for good; its id and its node are free again."""

    id: str


@cache
def _modules() -> dict[str, str]:
    package = importlib.import_module(__package__ or "")
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = f"{__package__}.{info.name}.export"
        if info.ispkg and importlib.util.find_spec(module) is not None:
            found[_NAMES.get(info.name, info.name)] = module
    return found


def export_types() -> tuple[str, ...]:
    """The names of all export types, sorted."""
    return tuple(sorted(_modules()))


@cache
def export_class(name: str) -> type[Export]:
    """The class of the export type `name`; KeyError when there is none."""
    found: type[Export] = importlib.import_module(_modules()[name]).EXPORT
    return found


class State(Enum):
    """The life of an export."""

    CREATED = "created"
    RUNNING = "running"
    SHUTTING_DOWN = "shutting down"
    DELETED = "deleted"


_TRANSITIONS = {
    State.CREATED: (State.RUNNING, State.DELETED),
    State.RUNNING: (State.SHUTTING_DOWN,),
    State.SHUTTING_DOWN: (State.DELETED,),
    State.DELETED: (),
}


class Export:
    """One export of one node.

    Subclasses say how the node is offered: `start`, `stop`, `in_use`, and `drain_begin` / `drain_end`.

    Arguments:
        exports: the service that holds it.
        options: its whole options.
        backend: its use of the node; the permissions are taken.
    """

    #: The wire name.
    export_type: ClassVar[BlockExportType]
    #: The options struct: ``class Options(BlockExportOptions, tag="nbd")``.
    Options: ClassVar[type[BlockExportOptions]] = BlockExportOptions
    #: What other users of the node may do meanwhile.
    SHARED: ClassVar[int] = perms.ALL

    def __init__(self, exports: Exports, options: Any, backend: BlockBackend) -> None:
        self.exports = exports
        self.id: str = options.id
        self.options = options
        self.backend = backend
        self.writable = bool(options.writable)
        #: A client of a monitor has asked for it, not the command line.
        self.from_monitor = False
        self.state = State.CREATED

    def become(self, state: State) -> None:
        """Change the state."""
        if state not in _TRANSITIONS[self.state]:
            raise AssertionError(f"export '{self.id}': {self.state.value} cannot become {state.value}")
        self.state = state

    async def start(self) -> None:
        """Begin to offer the node. Raises Error, having undone everything."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Disconnect all users and wait for what they have in flight."""
        raise NotImplementedError

    def in_use(self) -> bool:
        """Whether somebody uses it now."""
        raise NotImplementedError

    def resized(self) -> None:
        """The node has another size."""

    def drain_begin(self) -> None:
        """Start no new requests until `drain_end`; those in flight go on."""

    def drain_end(self) -> None:
        """Go on."""


class Exports:
    """All exports of a daemon (a service)."""

    def __init__(self, graph: Graph, events: EventBus) -> None:
        self.graph = graph
        self.events = events
        self._exports: dict[str, Export] = {}
        self._stopping: set[asyncio.Task[None]] = set()
        self._shared: dict[type, Any] = {}

    def shared(self, cls: Callable[[Exports], S]) -> S:
        """What all exports of a type share (the NBD server): made by calling `cls` the first time."""
        found = self._shared.get(cls)  # type: ignore[call-overload]
        if found is None:
            found = self._shared[cls] = cls(self)  # type: ignore[index]
        return found  # type: ignore[no-any-return]

    def find(self, id: str) -> Export | None:
        """The export `id`, or None."""
        return self._exports.get(id)

    def of_type(self, kind: BlockExportType) -> list[Export]:
        """The exports of that type, oldest first."""
        return [export for export in self._exports.values() if export.export_type is kind]

    async def add(self, options: BlockExportOptions, *, from_monitor: bool = False) -> Export:
        """Export a node (``block-export-add``). Raises Error."""
        if not _WELL_FORMED.fullmatch(options.id):
            raise Error("Invalid block export id")
        if options.id in self._exports:
            raise Error(f"Block export id '{options.id}' is already in use")
        cls = export_class(str(options.__struct_config__.tag))
        node = self.graph.get(options.node_name)
        if node is None:
            raise Error(f"Cannot find device='' nor node-name='{options.node_name}'")
        if options.writable and node.read_only:
            raise Error("Cannot export read-only node as writable")
        if options.iothread is not None:
            raise Error(f'iothread "{options.iothread}" not found')
        if not node.active and not options.allow_inactive:
            from pyqsd.block.activation import activate

            await activate(self.graph, node)
        perm = perms.CONSISTENT_READ | (perms.WRITE if options.writable else 0)
        backend = BlockBackend(self.graph, "an unnamed block device", perm, perms.ALL)
        backend.allow_inactive = bool(options.allow_inactive)
        backend.insert(node)
        try:
            # One after the other, as QSD does: messages name the first conflict.
            backend.set_perms(perm, cls.SHARED)
            export = cls(self, options, backend)
            export.from_monitor = from_monitor
            # From here on the id is taken, whatever else happens while the export starts.
            self._exports[options.id] = export
            backend.on_resize = export.resized
            backend.on_drain_begin = export.drain_begin
            backend.on_drain_end = export.drain_end
            if backend.quiesced:
                export.drain_begin()
            await export.start()
        except BaseException:
            made = self._exports.pop(options.id, None)
            if made is not None:
                made.become(State.DELETED)
            backend.remove()
            raise
        export.become(State.RUNNING)
        return export

    async def remove(self, id: str, mode: BlockExportRemoveMode = BlockExportRemoveMode.SAFE) -> None:
        """Begin to remove an export (``block-export-del``); the event says when it is gone. Raises Error."""
        export = self._exports.get(id)
        if export is None or export.state is State.CREATED:
            raise Error(f"Export '{id}' is not found")
        if export.state is not State.RUNNING:
            raise Error(f"Export '{id}' is already shutting down")
        if mode is BlockExportRemoveMode.SAFE and export.in_use():
            raise Error(f"export '{id}' still in use", hint="Use mode='hard' to force client disconnect")
        if export.in_use():
            self._stop(export)
        else:
            export.become(State.SHUTTING_DOWN)
            await self._finish(export)

    def _stop(self, export: Export) -> None:
        export.become(State.SHUTTING_DOWN)
        task = asyncio.get_running_loop().create_task(self._finish(export))
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

    async def _finish(self, export: Export) -> None:
        try:
            await export.stop()
        except Exception:
            log.exception("export '%s': stopping failed", export.id)
        node = export.backend.node
        export.backend.remove()
        export.become(State.DELETED)
        del self._exports[export.id]
        # It may have been the last user of a node that a snapshot has made.
        await self.graph.unref(node)
        self.events.emit(BlockExportDeleted(id=export.id))

    async def remove_all(self, kind: BlockExportType | None = None) -> None:
        """Remove all exports (of one type), the newest first, and wait until they are gone."""
        for export in reversed(list(self._exports.values())):
            if export.state is State.RUNNING and kind in (None, export.export_type):
                self._stop(export)
        while self._stopping:
            await asyncio.wait(self._stopping)

    def query(self) -> list[BlockExportInfo]:
        """All exports, the newest first (``query-block-exports``)."""
        return [
            BlockExportInfo(
                id=export.id,
                type=export.export_type,
                node_name=export.backend.node.name,
                shutting_down=export.state is State.SHUTTING_DOWN,
            )
            for export in reversed(list(self._exports.values()))
            if export.state is not State.CREATED
        ]

    async def shutdown(self) -> None:
        """End of the daemon: every export and everything that exports share goes."""
        await self.remove_all()
        for thing in self._shared.values():
            await thing.close()
