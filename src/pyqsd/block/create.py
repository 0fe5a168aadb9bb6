"""Making images: the options of ``blockdev-create``, and a short way for those who need an image at a filename.

Drivers that can make images have the options for it (`Driver.create_options`) and do it (`Driver.create`).
"""

from __future__ import annotations

import errno
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from pyqsd.block import registry
from pyqsd.block.driver_union import DriverUnion
from pyqsd.qapi.errors import Error

if TYPE_CHECKING:
    from pyqsd.block.driver import Driver
    from pyqsd.block.graph import Graph
    from pyqsd.qapi.types import Struct


class PreallocMode(StrEnum):
    """What a new image gets at once: nothing, its tables, or (by two ways) all its space."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


class BlockdevCreateOptions(DriverUnion, tag_field="driver", tag="pyqsd-base"):
    """How an image is made; the options of each driver are a branch."""

    @classmethod
    def options_of(cls, driver: type[Driver]) -> type[Struct] | None:
        return driver.create_options()


async def create_image(
    graph: Graph,
    fmt: str,
    filename: str,
    size: int,
    backing_filename: str | None = None,
    backing_format: str | None = None,
) -> None:
    """Make an image of the format `fmt` (or just a file, of the protocol `fmt`) in the file `filename`, which is
    created, or overwritten if it exists.

    Arguments:
        size: of the disk, in bytes.
        backing_filename, backing_format: what the image shall name as its backing file; nothing is opened.

    Raises Error, OSError.
    """
    from pyqsd.block.open_image import protocol_options
    from pyqsd.qapi.convert import convert

    if not registry.is_driver(fmt):
        raise Error(f"Unknown file format '{fmt}'", errno.ENOENT)
    cls = registry.driver_class(fmt)
    below = protocol_options(filename)
    protocol = registry.driver_class(below["driver"])
    if cls.create_options() is None and fmt != "raw":
        raise Error(f"Format driver '{fmt}' does not support image creation", errno.ENOTSUP)
    if protocol.create_options() is None:
        raise Error(f"Protocol driver '{protocol.name}' does not support image creation", errno.ENOTSUP)
    if backing_filename is not None and not cls.supports_backing:
        raise Error(f"Backing file not supported for file format '{fmt}'", errno.ENOTSUP)

    async def create(driver: str, **members: Any) -> None:
        options: BlockdevCreateOptions = convert({"driver": driver, **members}, BlockdevCreateOptions)
        await registry.driver_class(driver).create(graph, options)

    size = -(-size // 512) * 512
    is_plain = fmt == "raw" or cls.is_protocol
    await create(protocol.name, filename=below["filename"], size=size if is_plain else 0)
    if is_plain:
        return
    members: dict[str, Any] = {"file": below, "size": size}
    if backing_filename is not None:
        members["backing-file"] = backing_filename
    if backing_format is not None:
        members["backing-fmt"] = backing_format
    await create(fmt, **members)
