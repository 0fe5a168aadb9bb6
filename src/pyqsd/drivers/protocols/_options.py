"""Option types that the drivers of local files share."""

from __future__ import annotations

from enum import StrEnum


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
