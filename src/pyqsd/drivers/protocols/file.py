"""``file``: an image in a regular file of this host."""

from __future__ import annotations

import stat

from pyqsd.block.info import BlockStatsSpecific
from pyqsd.drivers.protocols._options import PosixOptions
from pyqsd.drivers.protocols._posix import PosixDriver
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Uint64


class Options(PosixOptions, tag="file"):
    """QAPI ``BlockdevOptionsFile``."""

    __features__ = ("dynamic-auto-read-only",)


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
