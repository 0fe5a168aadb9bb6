"""Option types that the drivers of local files share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pyqsd.block.options import BlockdevOptions
from pyqsd.qapi.types import Features, Int64


class OnOffAuto(StrEnum):
    """Three states; ``auto`` lets the driver choose."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class BlockdevAioOptions(StrEnum):
    """How requests that have to wait are made."""

    THREADS = "threads"
    NATIVE = "native"
    IO_URING = "io_uring"


class PosixOptions(BlockdevOptions, kw_only=True):
    """QAPI ``BlockdevOptionsFile``, which ``file`` and ``host_device`` share."""

    filename: str
    pr_manager: str | None = None
    locking: OnOffAuto | None = None
    aio: BlockdevAioOptions | None = None
    aio_max_batch: Int64 | None = None
    drop_cache: bool | None = None
    x_check_cache_dropped: Annotated[bool | None, Features("unstable")] = None
