"""Changing properties of images that exist: the options of ``x-blockdev-amend``.

Drivers that can do that have the options for it (`Driver.amend_options`) and do it (`Driver.amend`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyqsd.block.driver_union import DriverUnion

if TYPE_CHECKING:
    from pyqsd.block.driver import Driver
    from pyqsd.qapi.types import Struct


class BlockdevAmendOptions(DriverUnion, tag_field="driver", tag="pyqsd-base"):
    """What is to change; the options of each driver are a branch."""

    @classmethod
    def options_of(cls, driver: type[Driver]) -> type[Struct] | None:
        return driver.amend_options()
