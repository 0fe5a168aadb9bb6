"""The events of the block room (QAPI ``BLOCK_IO_ERROR``, ``BLOCK_IMAGE_CORRUPTED``, ``BLOCK_WRITE_THRESHOLD``)."""

from __future__ import annotations

from enum import StrEnum

from pyqsd.qapi.command import Event, event
from pyqsd.qapi.types import Uint64


class IoOperationType(StrEnum):
    """The kind of request that failed."""

    READ = "read"
    WRITE = "write"


class BlockErrorAction(StrEnum):
    """What was done about a failed request."""

    IGNORE = "ignore"
    REPORT = "report"
    STOP = "stop"


@event("BLOCK_IO_ERROR", rate_limit=("qom_path", "device", "node_name"))
class BlockIoError(Event, kw_only=True):
    """A request of a guest device failed; `reason` is the system's text for people."""

    qom_path: str
    device: str
    node_name: str | None = None
    operation: IoOperationType
    action: BlockErrorAction
    nospace: bool | None = None
    reason: str


@event("BLOCK_IMAGE_CORRUPTED")
class BlockImageCorrupted(Event, kw_only=True):
    """An image was found to be corrupt; with `fatal` it is not written to any more. `offset`, `size`: bytes."""

    device: str
    node_name: str | None = None
    msg: str
    offset: int | None = None
    size: int | None = None
    fatal: bool


@event("BLOCK_WRITE_THRESHOLD")
class BlockWriteThreshold(Event, kw_only=True):
    """A write went `amount_exceeded` bytes beyond the threshold of a node, which is thereby off again."""

    node_name: str
    amount_exceeded: Uint64
    write_threshold: Uint64
