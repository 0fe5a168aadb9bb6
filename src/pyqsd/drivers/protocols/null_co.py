"""``null-co``: an image that keeps nothing and reads as zeroes, for measuring everything above it."""

from __future__ import annotations

from pyqsd.block.options import BlockdevOptions
from pyqsd.drivers.protocols._null import Null
from pyqsd.qapi.types import Int64, Uint64


class Options(BlockdevOptions, tag="null-co"):
    """QAPI ``BlockdevOptionsNull``; `size` in bytes (1 GiB), `latency_ns` in nanoseconds."""

    size: Int64 | None = None
    latency_ns: Uint64 | None = None
    read_zeroes: bool | None = None


class NullCo(Null):
    """Answers at once. See docs/drivers/null-co.md."""

    name = "null-co"
    Options = Options


DRIVER = NullCo
