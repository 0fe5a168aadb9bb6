"""pyqsd: a storage daemon for disk images, a drop-in for qemu-storage-daemon.

>>> from pyqsd import Daemon
>>> async with Daemon() as daemon:
...     await daemon.qmp("blockdev-add", driver="null-co", node_name="disk")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Daemon", "Error", "__version__"]

if TYPE_CHECKING:
    from pyqsd.monitor.daemon import Daemon
    from pyqsd.qapi.errors import Error


def __getattr__(name: str) -> Any:
    # Imported when first asked for: `pyqsd --version` must not wait for the whole daemon.
    if name == "Daemon":
        from pyqsd.monitor.daemon import Daemon

        return Daemon
    if name == "Error":
        from pyqsd.qapi.errors import Error

        return Error
    raise AttributeError(f"module 'pyqsd' has no attribute {name!r}")
