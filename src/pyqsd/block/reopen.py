"""``blockdev-reopen``: other options for open nodes, all or nothing.

Everything that can fail is prepared first, then the permissions are worked out with the new children and read-only
states, and only then is anything switched over, children before their parents. Requests are held back meanwhile.
"""

from __future__ import annotations

import errno
from contextlib import AsyncExitStack
from typing import Any

from pyqsd.block import graph_perms
from pyqsd.block import permissions as perms
from pyqsd.block.child import Child
from pyqsd.block.graph import Graph, apply_options, is_below
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevOptions
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import NULL

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
        self.options = options
        self.old_effective = {name: getattr(node, name) for name in _EFFECTIVE}
        self.new_effective: dict[str, Any] = {}
        self.state: Any = None
        self.driver_prepared = False
        #: Child name → the node to use instead, or None for no child.
        self.replaced: dict[str, Node | None] = {}
        self.old_children: list[Child] = []
        self.new_children: list[Child] = []

    def set_effective(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self.node, name, value)


def _wire(options: BlockdevOptions, name: str) -> str:
    fields: tuple[str, ...] = options.__struct_fields__
    return str(options.__struct_encode_fields__[fields.index(name)])


def _inherits(parent: Node, child: Child) -> bool:
    """Whether `child` was opened in line, so that it goes along with its parent's options."""
    return not child.node.monitor_owned and child.node.parents[-1] is child


async def reopen(graph: Graph, entries: list[BlockdevOptions]) -> None:
    """Give the nodes that `entries` name their new options. Raises Error, and then nothing has changed."""
    wanted: list[tuple[Node, BlockdevOptions]] = []
    for options in entries:
        if options.node_name is None:
            raise Error("node-name not specified")
        node = graph.nodes.get(options.node_name)
        if node is None:
            raise Error(f"Failed to find node with node-name='{options.node_name}'")
        wanted = [pair for pair in wanted if pair[0] is not node]
        wanted.append((node, options))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(graph.drained(*[node for node, _ in wanted]))
        queue: list[_Prepared] = []
        try:
            for node, options in wanted:
                await _prepare(graph, node, options, None, 0, queue, {n for n, _ in wanted})
            _switch_graph(queue)
        except BaseException:
            for item in reversed(queue):
                item.set_effective(item.old_effective)
                if item.driver_prepared:
                    await item.node.driver.reopen_abort(item.state)
            raise
        for item in reversed(queue):
            item.node.options = item.options
            item.node.driver.options = item.options
            item.node.driver.reopen_commit(item.state)
        for item in reversed(queue):
            item.node.refresh_limits()
            for child in item.old_children:
                await graph.unref(child.node)


async def _prepare(
    graph: Graph,
    node: Node,
    options: BlockdevOptions,
    parent: Node | None,
    role: int,
    queue: list[_Prepared],
    explicit: set[Node],
) -> None:
    item = _Prepared(node, options)
    driver = node.driver
    if driver.backing is not None and getattr(options, "backing", None) is None:
        raise Error(f"backing is missing for '{node.name}'")
    children = _child_references(node, options)
    for name, ref in children.items():
        _find_replacement(graph, item, name, ref)
    _check_same(node, options)
    try:
        apply_options(node, options, parent, role)
        item.new_effective = {name: getattr(node, name) for name in _EFFECTIVE}
    finally:
        item.set_effective(item.old_effective)
    if item.new_effective["force_share"] != item.old_effective["force_share"]:
        raise Error("Cannot change the option 'force-share'")
    if not node.read_only:
        await node.flush()
    queue.append(item)
    item.state = await driver.reopen_prepare(options, item.new_effective["read_only"])
    item.driver_prepared = True
    # From here on the node counts as what it is going to be; children inherit from that.
    item.set_effective(item.new_effective)
    for child in tuple(node.children):
        if child.name in item.replaced or child.node in explicit or not _inherits(node, child):
            continue
        ref = children.get(child.name)
        inner = ref if isinstance(ref, BlockdevOptions) else child.node.options
        await _prepare(graph, child.node, inner, node, child.role, queue, explicit)


def _check_same(node: Node, options: BlockdevOptions) -> None:
    """Options that cannot change are the same as before. Raises Error."""
    old = node.options
    if type(options) is not type(old):
        names = set(options.__struct_fields__)
        for name in old.__struct_fields__:
            if name not in names and getattr(old, name) is not None:
                raise Error(f"Option '{_wire(old, name)}' cannot be reset to its default value")
        raise Error("Cannot change the option 'driver'")
    changeable = _GENERIC | node.driver.mutable_options
    children = {child.name for child in node.children} | {"file", "backing"}
    for name in old.__struct_fields__:
        if name in changeable or _wire(old, name) in children:
            continue
        before, after = getattr(old, name), getattr(options, name)
        if name == "node_name" and after is None:
            continue
        if before != after and not (name == "active" and after is None):
            if after is None:
                raise Error(f"Option '{_wire(old, name)}' cannot be reset to its default value")
            raise Error(f"Cannot change the option '{_wire(old, name)}'")


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
    new = graph.nodes.get(ref)
    if new is None:
        raise Error(f"Cannot find device='' nor node-name='{ref}'")
    if new is node or is_below(node, new):
        raise Error(f"Making '{new.name}' a {name} child of '{node.name}' would create a cycle")
    item.replaced[name] = new


def _switch_graph(queue: list[_Prepared]) -> None:
    """Exchange children and work out all permissions. Raises Error, and then the graph is as before."""
    was_read_only = {item.node: item.old_effective["read_only"] for item in queue}
    try:
        for item in queue:
            for name, new in item.replaced.items():
                current = next((child for child in item.node.children if child.name == name), None)
                role = current.role if current is not None else _role_of(name)
                if current is not None:
                    Graph.unlink(current)
                    item.old_children.append(current)
                if new is not None:
                    child = Child(item.node, name, new, role, 0, perms.ALL)
                    Graph.link(child)
                    item.new_children.append(child)
        roots = [item.node for item in queue]
        roots += [child.node for item in queue for child in item.old_children]
        try:
            graph_perms.refresh(roots)
        except Error as exc:
            if exc.desc == "Block node is read-only":
                _name_read_only_node(queue, was_read_only)
            raise
    except BaseException:
        for item in queue:
            for child in item.new_children:
                Graph.unlink(child)
            for child in item.old_children:
                Graph.link(child)
            item.new_children, item.old_children = [], []
        raise


def _name_read_only_node(queue: list[_Prepared], was_read_only: dict[Node, bool]) -> None:
    for item in queue:
        node = item.node
        perm, _ = graph_perms.cumulative(node)
        if node.read_only and not was_read_only[node] and perm & perms.WRITE:
            raise Error(f"Read-only block node '{node.name}' cannot support read-write users", errno.EPERM)


def _role_of(name: str) -> int:
    from pyqsd.block.driver import ROLE_COW, ROLE_IMAGE

    return ROLE_COW if name == "backing" else ROLE_IMAGE
