"""``file``: an image in a regular file of this host."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from pyqsd.aio import engine as engines
from pyqsd.block.create import BlockdevCreateOptions, PreallocMode
from pyqsd.block.info import BlockStatsSpecific
from pyqsd.drivers.protocols import _creation
from pyqsd.drivers.protocols._options import PosixOptions
from pyqsd.drivers.protocols._posix import PosixDriver
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Size, Uint64

if TYPE_CHECKING:
    from pyqsd.block.graph import Graph


class Options(PosixOptions, tag="file"):
    """QAPI ``BlockdevOptionsFile``."""

    __features__ = ("dynamic-auto-read-only",)


class CreateOptions(BlockdevCreateOptions, kw_only=True, tag="file"):
    """QAPI ``BlockdevCreateOptionsFile``. Sizes are bytes. `nocow`: no copy on write in the file (btrfs).
    `extent_size_hint`: what the file system allocates at once (XFS; default 1 MiB), 0: as it likes."""

    filename: str
    size: Size
    preallocation: PreallocMode | None = None
    nocow: bool | None = None
    extent_size_hint: Size | None = None


class BlockStatsSpecificFile(BlockStatsSpecific, tag="file"):
    """How many discards succeeded and failed, and how many bytes were discarded."""

    discard_nb_ok: Uint64
    discard_nb_failed: Uint64
    discard_bytes_ok: Uint64


class File(PosixDriver):
    """A regular file. See docs/drivers/file.md."""

    name = "file"
    Options = Options
    strong_options = ("filename",)

    @classmethod
    def create_options(cls) -> type[CreateOptions]:
        return CreateOptions

    @classmethod
    async def create(cls, graph: Graph, options: CreateOptions) -> None:
        pool = engines.acquire("threads")
        try:
            await pool.call(
                _creation.create,
                options.filename,
                options.size,
                str(options.preallocation or PreallocMode.OFF),
                bool(options.nocow),
                options.extent_size_hint,
            )
        finally:
            engines.release(pool)

    def _check_kind(self, mode: int) -> None:
        if not stat.S_ISREG(mode):
            raise Error(f"'{self.name}' driver requires '{self.options.filename}' to be a regular file")

    def driver_specific_stats(self) -> BlockStatsSpecificFile:
        return BlockStatsSpecificFile(
            discard_nb_ok=self.discard_ok,
            discard_nb_failed=self.discard_failed,
            discard_bytes_ok=self.discard_bytes,
        )


DRIVER = File
