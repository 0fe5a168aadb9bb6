"""``host_device``: an image on a block device (or a character device) of this host."""

from __future__ import annotations

import stat

from pyqsd.block.info import BlockStatsSpecific
from pyqsd.drivers.protocols._options import PosixOptions
from pyqsd.drivers.protocols._posix import PosixDriver
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Uint64


class Options(PosixOptions, tag="host_device"):
    """QAPI ``BlockdevOptionsFile``."""

    __features__ = ("dynamic-auto-read-only",)


class BlockStatsSpecificHostDevice(BlockStatsSpecific, tag="host_device"):
    """How many discards succeeded and failed, and how many bytes were discarded."""

    discard_nb_ok: Uint64
    discard_nb_failed: Uint64
    discard_bytes_ok: Uint64


class HostDevice(PosixDriver):
    """A device. See docs/drivers/host_device.md."""

    name = "host_device"
    Options = Options
    strong_options = ("filename",)

    def _check_kind(self, mode: int) -> None:
        if not (stat.S_ISBLK(mode) or stat.S_ISCHR(mode)):
            raise Error(
                f"'{self.name}' driver requires '{self.options.filename}' to be either a character or block device"
            )

    def driver_specific_stats(self) -> BlockStatsSpecificHostDevice:
        return BlockStatsSpecificHostDevice(
            discard_nb_ok=self.discard_ok,
            discard_nb_failed=self.discard_failed,
            discard_bytes_ok=self.discard_bytes,
        )


DRIVER = HostDevice
