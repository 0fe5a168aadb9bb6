"""Working out permissions through the graph, all or nothing.

Facts as QSD shows them in ``x-debug-query-block-graph`` and in its messages.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pyqsd.block import permissions as perms
from pyqsd.block.driver import ROLE_COW, ROLE_DATA, ROLE_FILTERED, ROLE_METADATA
from pyqsd.qapi.errors import Error

if TYPE_CHECKING:
    from pyqsd.block.child import Child
    from pyqsd.block.driver import Driver
    from pyqsd.block.node import Node

Perms = tuple[int, int]


def default_child_perms(driver: Driver, child: Child, role: int, perm: int, shared: int) -> Perms:
    """What a driver needs and shares on a child of `role`, given what its parents need and share."""
    if role & ROLE_FILTERED:
        return perm, shared
    if role & ROLE_COW:
        # Reading the backing file must give what it gave before; its other users may do what ours allow.
        need = perm & perms.CONSISTENT_READ
        share = perms.CONSISTENT_READ | perms.WRITE_UNCHANGED
        if shared & perms.WRITE or not driver.node.active:
            share |= perms.WRITE | perms.RESIZE
        return need, share
    need, share = perm, shared
    if role & ROLE_METADATA:
        if not driver.node.read_only and driver.node.active:
            need |= perms.WRITE | perms.RESIZE
        need |= perms.CONSISTENT_READ
        # Nobody else may change the tables.
        share &= ~perms.WRITE
    if role & (ROLE_METADATA | ROLE_DATA):
        if need & perms.WRITE:
            need |= perms.RESIZE
        share &= ~perms.RESIZE
    if not driver.node.active:
        share |= perms.WRITE | perms.RESIZE
    return need, share


def child_perms(parent: Node, child: Child, perm: int, shared: int) -> Perms:
    """What `parent`, whose own parents need `perm` and share `shared`, needs and shares on `child`."""
    need, share = parent.driver.child_perms(child, child.role, perm, shared)
    # With force-share a child lets everybody else do everything.
    return need, perms.ALL if child.node.force_share else share


def topological(roots: Iterable[Node]) -> list[Node]:
    """All nodes reachable from `roots`, parents before children."""
    order: list[Node] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node in seen:
            return
        seen.add(node)
        for child in node.children:
            visit(child.node)
        order.append(node)

    for root in roots:
        visit(root)
    order.reverse()
    return order


def _check_conflicts(node: Node, new: dict[Child, Perms]) -> None:
    parents = node.parents
    for a in parents:
        shared = new.get(a, (a.perm, a.shared))[1]
        for b in parents:
            if a is b:
                continue
            missing = new.get(b, (b.perm, b.shared))[0] & ~shared
            if missing:
                raise Error(
                    f"Permission conflict on node '{node.name}': permissions '{perms.names(missing)}' are both "
                    f"required by {_user(b)} and unshared by {_user(a)}.",
                    errno.EPERM,
                )


def _check_last_block(node: Node) -> None:
    """Whoever writes to the last block of a node must not make it longer by that."""
    if -(-node.length // 512) * 512 % node.limits.request_alignment:
        raise Error(
            "Cannot get 'write' permission without 'resize': Image size is not a multiple of request alignment",
            errno.EPERM,
        )


def _user(edge: Child) -> str:
    return f"{edge.parent.description()} (uses node '{edge.node.name}' as '{edge.name}' child)"


def cumulative(node: Node, new: dict[Child, Perms] | None = None) -> Perms:
    """What all parents of `node` together need, and all of them share."""
    perm, shared = 0, perms.ALL
    for edge in node.parents:
        p, s = (edge.perm, edge.shared) if new is None else new.get(edge, (edge.perm, edge.shared))
        perm |= p
        shared &= s
    return perm, shared


def refresh(roots: Iterable[Node], given: dict[Child, Perms] | None = None) -> None:
    """Recompute the permissions on all edges below `roots`, where the edges in `given` are to get the permissions named
    there. Either all of it happens, or nothing and Error is raised (a conflict, a read-only node, a file lock)."""
    new: dict[Child, Perms] = dict(given or {})
    order = topological(roots)
    prepared: list[tuple[Node, int, int]] = []
    try:
        for node in order:
            _check_conflicts(node, new)
            perm, shared = cumulative(node, new)
            changing = perm & (perms.WRITE | perms.WRITE_UNCHANGED | perms.RESIZE)
            if changing and not node.active:
                raise Error(f"Permission '{perms.names(changing)}' unavailable on inactive node", errno.EPERM)
            if changing & ~perms.RESIZE and node.read_only:
                raise Error("Block node is read-only", errno.EPERM)
            if changing & ~perms.RESIZE and not perm & perms.RESIZE and node.opened:
                _check_last_block(node)
            prepared.append((node, perm, shared))
            if node.opened:
                node.driver.check_perm(perm, shared)
            for child in node.children:
                new[child] = child_perms(node, child, perm, shared)
    except BaseException:
        for node, _, _ in reversed(prepared):
            if node.opened:
                node.driver.abort_perm_update()
        raise
    for child, (perm, shared) in new.items():
        child.perm, child.shared = perm, shared
    for node, perm, shared in prepared:
        if node.opened:
            node.driver.set_perm(perm, shared)
