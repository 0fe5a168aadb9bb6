"""Permissions: what the user of a node may do with it, and lets others do.

`perm` is what the parent needs, `shared` what it lets the node's other parents do (QAPI ``BlockPermission``).
"""

from __future__ import annotations

CONSISTENT_READ = 1
WRITE = 2
WRITE_UNCHANGED = 4
RESIZE = 8
ALL = 15

NAMES = {CONSISTENT_READ: "consistent read", WRITE: "write", WRITE_UNCHANGED: "write unchanged", RESIZE: "resize"}


def names(perm: int) -> str:
    """The set bits as QSD's messages spell them, joined with commas."""
    return ", ".join(text for bit, text in NAMES.items() if perm & bit)


def qapi_names(perm: int) -> list[str]:
    """The set bits as QAPI's ``BlockPermission`` spells them."""
    return [text.replace(" ", "-") for bit, text in NAMES.items() if perm & bit]
