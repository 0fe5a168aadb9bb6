"""Which operations a node is kept from while somebody relies on it: a job that works on it, or an overlay.

Permissions say what may be done with the content of a node, this says which commands may take it at all. The operations
are those that QSD knows, and which of them somebody lets through is QSD's choice too.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final

from pyqsd.block.driver import ROLE_COW
from pyqsd.qapi.errors import Error

if TYPE_CHECKING:
    from pyqsd.block.node import Node


class Op(StrEnum):
    """What a command does with a node."""

    BACKUP_SOURCE = "backup-source"
    BACKUP_TARGET = "backup-target"
    CHANGE = "change"
    COMMIT_SOURCE = "commit-source"
    COMMIT_TARGET = "commit-target"
    DELETE = "delete"
    EXTERNAL_SNAPSHOT = "external-snapshot"
    INTERNAL_SNAPSHOT = "internal-snapshot"
    INTERNAL_SNAPSHOT_DELETE = "internal-snapshot-delete"
    MIRROR_SOURCE = "mirror-source"
    MIRROR_TARGET = "mirror-target"
    REPLACE = "replace"
    RESIZE = "resize"
    STREAM = "stream"


#: What an overlay does not keep its backing file from.
_WITH_OVERLAY: Final = frozenset({Op.COMMIT_TARGET, Op.STREAM, Op.BACKUP_SOURCE, Op.BACKUP_TARGET})


class Blocker:
    """Somebody who keeps a node from all operations but those in `allowed`; `reason` is for the message."""

    def __init__(self, reason: str, allowed: frozenset[Op] = frozenset()) -> None:
        self.reason = reason
        self.allowed = allowed


def check(node: Node, op: Op) -> None:
    """Raises Error if somebody keeps `node` from `op`."""
    for blocker in reversed(node.op_blockers):
        if op not in blocker.allowed:
            raise Error(f"Node '{node.name}' is busy: {blocker.reason}")
    if op in _WITH_OVERLAY:
        return
    for edge in node.parents:
        if edge.role & ROLE_COW:
            overlay = edge.parent.description().removeprefix("node ")
            raise Error(f"Node '{node.name}' is busy: node is used as backing hd of {overlay}")
