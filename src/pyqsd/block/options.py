"""The options that every block node has, and references to nodes (QAPI ``BlockdevOptions``, ``BlockdevRef``)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated

from pyqsd.block import registry
from pyqsd.qapi.types import Alternate, Null, Struct


class BlockdevDiscardOptions(StrEnum):
    """What happens to discard requests."""

    IGNORE = "ignore"
    UNMAP = "unmap"


class BlockdevDetectZeroesOptions(StrEnum):
    """Whether writes of zero bytes become zero writes."""

    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


class BlockdevCacheOptions(Struct):
    """`direct`: bypass the host page cache (O_DIRECT). `no_flush`: ignore flushes."""

    direct: bool | None = None
    no_flush: bool | None = None


class BlockdevOptions(Struct, tag_field="driver", tag="pyqsd-base"):
    """The options of a node; each driver's ``Options`` is a branch, found through the driver registry.

    Members that a child inherits from its parent when they are absent are None here; `Node` has the effective values.
    """

    node_name: str | None = None
    discard: BlockdevDiscardOptions | None = None
    cache: BlockdevCacheOptions | None = None
    active: bool | None = None
    read_only: bool | None = None
    auto_read_only: bool | None = None
    force_share: bool | None = None
    detect_zeroes: BlockdevDetectZeroesOptions | None = None

    @classmethod
    def branches(cls) -> Mapping[str, type[Struct]]:
        return {name: registry.driver_class(name).Options for name in registry.driver_names()}

    @classmethod
    def branch(cls, tag: str) -> type[Struct] | None:
        return registry.driver_class(tag).Options if registry.is_driver(tag) else None


#: A new node in line, or the name of an existing one.
BlockdevRef = Annotated[str | BlockdevOptions, Alternate("BlockdevRef")]
#: The same, or null for "no such child".
BlockdevRefOrNull = Annotated[str | BlockdevOptions | Null, Alternate("BlockdevRefOrNull")]
