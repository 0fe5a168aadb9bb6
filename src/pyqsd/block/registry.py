"""Finding drivers by name.

A driver is a module (or package) below ``pyqsd/drivers/{formats,protocols,filters}`` named like the driver with ``-``
as ``_``, which has the driver's class as ``DRIVER``; nothing else is registered by hand. Other distributions add
drivers with entry points in the group ``pyqsd.drivers``. Modules are imported when their driver is first used.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyqsd.block.driver import Driver

_ROOMS = ("formats", "protocols", "filters")


@cache
def _modules() -> dict[str, str]:
    found: dict[str, str] = {}
    for room in _ROOMS:
        package = importlib.import_module(f"pyqsd.drivers.{room}")
        for info in pkgutil.iter_modules(package.__path__):
            if not info.name.startswith("_"):
                found[_NAMES.get(info.name, info.name.replace("_", "-"))] = f"{package.__name__}.{info.name}"
    for point in entry_points(group="pyqsd.drivers"):
        found.setdefault(point.name, point.value)
    return found


#: The drivers whose name has an underscore on the wire.
_NAMES = {"host_device": "host_device"}


def driver_names() -> tuple[str, ...]:
    """The names of all drivers, sorted."""
    return tuple(sorted(_modules()))


@cache
def driver_class(name: str) -> type[Driver]:
    """The class of the driver `name`; KeyError when there is none."""
    module = importlib.import_module(_modules()[name].partition(":")[0])
    driver: type[Driver] = module.DRIVER
    return driver
