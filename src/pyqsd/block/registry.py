"""Finding drivers by name.

A driver is a module (or package) below ``pyqsd/drivers/{formats,protocols,filters}`` named like the driver with ``-``
as ``_``, which has the driver's class as ``DRIVER``; nothing else is registered by hand. Other distributions add
drivers with entry points in the group ``pyqsd.drivers``. Modules are imported when their driver is first used.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyqsd.block.driver import Driver

_ROOMS = ("formats", "protocols", "filters")


#: The drivers whose name has an underscore on the wire.
_NAMES = {"host_device": "host_device"}


@cache
def _own() -> dict[str, str]:
    """The modules of this distribution's drivers by driver."""
    found: dict[str, str] = {}
    for room in _ROOMS:
        package = importlib.import_module(f"pyqsd.drivers.{room}")
        for info in pkgutil.iter_modules(package.__path__):
            if not info.name.startswith("_"):
                found[_NAMES.get(info.name, info.name.replace("_", "-"))] = f"{package.__name__}.{info.name}"
    return found


@cache
def _others() -> dict[str, str]:
    """Those of other distributions. Looked for only when needed: it means a look at every installed distribution."""
    from importlib.metadata import entry_points

    own = _own()
    return {point.name: point.module for point in entry_points(group="pyqsd.drivers") if point.name not in own}


def is_driver(name: str) -> bool:
    """Whether there is a driver `name`."""
    return name in _own() or name in _others()


def driver_names() -> tuple[str, ...]:
    """The names of all drivers, sorted."""
    return tuple(sorted({**_own(), **_others()}))


@cache
def driver_class(name: str) -> type[Driver]:
    """The class of the driver `name`; KeyError when there is none."""
    module = importlib.import_module(_own().get(name) or _others()[name])
    driver: type[Driver] = module.DRIVER
    return driver
