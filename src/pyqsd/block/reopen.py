"""``blockdev-reopen``: other options for open nodes, all or nothing.

Everything that can fail is prepared first, with the new children in place already; then the permissions are worked out
with them and the new read-only states, and only then is anything switched over, children before their parents. Requests
are held back meanwhile.
"""

from __future__ import annotations

import errno
import logging
from typing import Any

from msgspec import structs

from pyqsd.block import graph_perms
from pyqsd.block import permissions as perms
from pyqsd.block.child import Child
from pyqsd.block.driver import ROLE_COW, ROLE_IMAGE
from pyqsd.block.graph import Graph, apply_options
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevOptions
from pyqsd.block.replace import Change
from pyqsd.qapi.errors import Error
from pyqsd.qapi.json_writer import to_wire
from pyqsd.qapi.types import NULL

log = logging.getLogger(__name__)

#: What `Node` itself deals with.
_GENERIC = frozenset({"cache", "read_only", "auto_read_only", "discard", "detect_zeroes"})
_EFFECTIVE = (
    "read_only",
    "auto_read_only",
    "cache_direct",
    "no_flush",
    "discard_unmap",
    "force_share",
    "active",
    "detect_zeroes",
)


class _Prepared:
    """One node's way to its new options, and back."""

    def __init__(self, node: Node, options: BlockdevOptions) -> None:
        self.node = node
        # Options in line need not repeat the name.
        self.options = structs.replace(options, node_name=node.options.node_name)
        self.old_effective = {name: getattr(node, name) for name in _EFFECTIVE}
        self.new_effective: dict[str, Any] = {}
        self.state: Any = None
        self.driver_prepared = False
        #: Child name → the node to use instead, or None for no child.
        self.replaced: dict[str, Node | None] = {}

    def set_effective(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self.node, name, value)


def _wire(options: BlockdevOptions, name: str) -> str:
    fields: tuple[str, ...] = options.__struct_fields__
    return str(options.__struct_encode_fields__[fields.index(name)])


def _inherits(parent: Node, child: Child) -> bool:
    """Whether `child` was opened in line, so that it goes along with its parent's options."""
    return not child.node.monitor_owned and not child.node.job_owned and child.node.parents[-1] is child


class _Reopening:
    """What belongs to one command. `keep_children`: options do not say anything about children, which stay."""

    def __init__(self, graph: Graph, explicit: set[Node], keep_children: bool) -> None:
        self.graph = graph
        self.explicit = explicit
        self.keep_children = keep_children
        self.queue: list[_Prepared] = []
        self.change = Change()


async def reopen(graph: Graph, entries: list[BlockdevOptions]) -> None:
    """Give the nodes that `entries` name their new options. Raises Error, and then nothing has changed."""
    wanted: list[tuple[Node, BlockdevOptions]] = []
    for options in entries:
        if options.node_name is None:
            raise Error("node-name not specified")
        node = graph.get(options.node_name)
        if node is None:
            raise Error(f"Failed to find node with node-name='{options.node_name}'")
        wanted = [pair for pair in wanted if pair[0] is not node]
        wanted.append((node, options))
    await _reopen_nodes(graph, wanted, False)


async def set_read_only(graph: Graph, node: Node, read_only: bool) -> None:
    """Make `node`, with the children that were opened in line for it, read-only or not, and leave all else as it is.
    Raises Error, and then nothing has changed."""
    if node.read_only != read_only:
        await _reopen_nodes(graph, [(node, structs.replace(node.options, read_only=read_only))], True)


async def read_only_again(graph: Graph, node: Node) -> None:
    """Make `node` read-only; if that fails, it is as good, only that others may then write to it."""
    try:
        await set_read_only(graph, node, True)
    except (Error, OSError) as exc:
        log.warning("node '%s' stays writable: %s", node.name, exc)


async def _reopen_nodes(graph: Graph, wanted: list[tuple[Node, BlockdevOptions]], keep_children: bool) -> None:
    work = _Reopening(graph, {node for node, _ in wanted}, keep_children)
    queue, change = work.queue, work.change
    async with graph.changing, graph.drained(*_concerned(work.explicit)):
        try:
            for node, options in wanted:
                await _prepare(work, node, options)
            _check_permissions(work)
        except BaseException:
            for item in reversed(queue):
                item.set_effective(item.old_effective)
            change.undo()
            for item in reversed(queue):
                if item.driver_prepared:
                    await item.node.driver.reopen_abort(item.state)
            raise
        for item in reversed(queue):
            item.node.options = item.node.driver.options = item.options
            item.node.driver.reopen_commit(item.state)
        change.commit()
        for item in reversed(queue):
            item.node.refresh_limits()
            await item.node.driver.reopen_complete()
        for child in change.removed:
            await graph.unref(child.node)
    await graph.settled()


def _concerned(nodes: set[Node]) -> list[Node]:
    """`nodes`, and what goes along with them."""
    found = list(nodes)
    for node in found:
        found += [child.node for child in node.children if _inherits(node, child) and child.node not in found]
    return found


async def _prepare(
    work: _Reopening,
    node: Node,
    options: BlockdevOptions,
    above: _Prepared | None = None,
    role: int = 0,
    by_name: bool = False,
) -> None:
    """`above`, `role`, `by_name`: whose child goes along here, and whether those options only name it."""
    item = _Prepared(node, options)
    driver = node.driver
    children: dict[str, Any] = {}
    if not work.keep_children:
        if driver.backing is not None and getattr(options, "backing", None) is None:
            raise Error(f"backing is missing for '{node.name}'")
        children = _child_references(node, options)
        for name, ref in children.items():
            _find_replacement(work.graph, item, name, ref)
        _check_driver(node, options)
    if options.force_share is not None and options.force_share != node.force_share:
        raise Error("Cannot change the option 'force-share'")
    try:
        apply_options(node, options, above.node if above is not None else None, role)
        if above is not None and by_name:
            _keep_inherited(item, options, above.options, work.keep_children)
        item.new_effective = {name: getattr(node, name) for name in _EFFECTIVE}
    finally:
        item.set_effective(item.old_effective)
    item.new_effective["active"] = node.active
    if item.new_effective["force_share"] != item.old_effective["force_share"]:
        raise Error("Cannot change the option 'force-share'")
    if not node.read_only:
        await node.flush()
    work.queue.append(item)
    _replace_children(work.change, item)
    item.state = await driver.reopen_prepare(options, item.new_effective["read_only"])
    item.driver_prepared = True
    if not work.keep_children:
        _check_same(node, options)
    # From here on the node counts as what it is going to be; children inherit from that.
    item.set_effective(item.new_effective)
    for child in tuple(node.children):
        if child.name in item.replaced or child.node in work.explicit or not _inherits(node, child):
            continue
        ref = children.get(child.name)
        if ref is None and not work.keep_children:
            raise Error("Option 'driver' cannot be reset to its default value")
        inner = ref if isinstance(ref, BlockdevOptions) else child.node.options
        await _prepare(work, child.node, inner, item, child.role, not isinstance(ref, BlockdevOptions))


def _replace_children(change: Change, item: _Prepared) -> None:
    for name, new in item.replaced.items():
        current = next((child for child in item.node.children if child.name == name), None)
        role = ROLE_COW if name == "backing" else ROLE_IMAGE
        if current is not None:
            role = current.role
            change.remove(current)
        if new is not None:
            change.add(item.node, name, new, role)


def _keep_inherited(item: _Prepared, options: BlockdevOptions, above: BlockdevOptions, with_read_only: bool) -> None:
    """A child that its parent's options only name stays as it is where those say nothing; `with_read_only`: but it is
    read-only, or not, as its parent is."""
    own, parents = options.cache, above.cache
    given = {
        "read_only": (options.read_only, above.read_only),
        "auto_read_only": (options.auto_read_only, above.auto_read_only),
        "force_share": (options.force_share, above.force_share),
        "cache_direct": (own and own.direct, parents and parents.direct),
        "no_flush": (own and own.no_flush, parents and parents.no_flush),
    }
    for name, values in given.items():
        if with_read_only and name in ("read_only", "auto_read_only"):
            continue
        if values == (None, None):
            setattr(item.node, name, item.old_effective[name])


def _check_driver(node: Node, options: BlockdevOptions) -> None:
    """The driver is the same. Raises Error."""
    old = node.options
    if type(options) is not type(old):
        for name in old.__struct_fields__:
            if name not in _GENERIC and getattr(old, name) is not None and getattr(options, name, None) is None:
                raise Error(f"Option '{_wire(old, name)}' cannot be reset to its default value")
        raise Error("Cannot change the option 'driver'")


def _check_same(node: Node, options: BlockdevOptions) -> None:
    """Options that cannot change are the same as before. Raises Error."""
    old = node.options
    changeable = _GENERIC | node.driver.mutable_options
    children = {child.name for child in node.children} | {"file", "backing"}
    for name in old.__struct_fields__:
        if name in changeable or _wire(old, name) in children:
            continue
        before, after = getattr(old, name), getattr(options, name)
        if name == "node_name" and after is None:
            continue
        if name == "active" and after == node.active:
            continue
        if before != after:
            if after is None:
                raise Error(f"Option '{_wire(old, name)}' cannot be reset to its default value")
            raise Error(
                f"Cannot change the option '{_first_change(_wire(old, name), to_wire(before), to_wire(after))}'"
            )


def _first_change(path: str, before: Any, after: Any) -> str:
    """The first member of an option, with its path, that differs."""
    if isinstance(after, dict):
        inner = after.items()
    elif isinstance(after, list):
        inner = {str(index): value for index, value in enumerate(after)}.items()
    else:
        return path
    for key, value in inner:
        if isinstance(before, list):
            old = before[int(key)] if int(key) < len(before) else None
        else:
            old = before.get(key) if isinstance(before, dict) else None
        if value != old:
            return _first_change(f"{path}.{key}", old, value)
    return path


def _child_references(node: Node, options: BlockdevOptions) -> dict[str, Any]:
    """The values of the options that name children, by wire name."""
    found: dict[str, Any] = {}
    names = {child.name for child in node.children} | {"file", "backing"}
    for name in options.__struct_fields__:
        value = getattr(options, name)
        if _wire(options, name) in names and (isinstance(value, str | BlockdevOptions) or value is NULL):
            found[_wire(options, name)] = value
    return found


def _find_replacement(graph: Graph, item: _Prepared, name: str, ref: Any) -> None:
    node = item.node
    current = next((child for child in node.children if child.name == name), None)
    if ref is NULL:
        if current is not None:
            _check_replaceable(node, current)
            item.replaced[name] = None
        return
    if isinstance(ref, BlockdevOptions):
        if current is None or not _inherits(node, current):
            raise Error(f"Cannot change the option '{name}.driver'")
        return
    if current is not None and current.node.name == ref:
        return
    if name not in ("file", "backing"):
        raise Error(f"Cannot change the option '{name}'")
    new = graph.get(ref)
    if new is None:
        raise Error(f"Cannot find device='' nor node-name='{ref}'")
    if current is not None and current.node.explicit() is new:
        return
    _check_replaceable(node, current)
    item.replaced[name] = new


def _check_replaceable(parent: Node, current: Child | None) -> None:
    if current is not None and current.node.implicit:
        raise Error(f"Cannot replace implicit {current.name} child of {parent.name}", errno.EPERM)


def _check_permissions(work: _Reopening) -> None:
    try:
        graph_perms.refresh([item.node for item in work.queue] + [child.node for child in work.change.removed])
    except Error as exc:
        if exc.desc == "Block node is read-only":
            _name_read_only_node(work.queue)
        raise


def _name_read_only_node(queue: list[_Prepared]) -> None:
    for item in queue:
        node = item.node
        perm, _ = graph_perms.cumulative(node)
        if node.read_only and not item.old_effective["read_only"] and perm & perms.WRITE:
            raise Error(f"Read-only block node '{node.name}' cannot support read-write users", errno.EPERM)
