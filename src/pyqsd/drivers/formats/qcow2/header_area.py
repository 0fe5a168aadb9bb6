"""Writing the header area (fixed fields, extensions, backing file name), so that a crash leaves the old or the new one.

Source: QEMU docs/interop/qcow2, sections "Header", "Header extensions".

Only one sector is written as a whole or not at all. A change within one sector is one write. For others, the new
extensions first go to a part of the cluster that is not in use, with the length field of the header, which says where
the extensions begin, leading there: sector 0 switches over. Then they are brought to their usual place the same way.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from pyqsd.drivers.formats.qcow2 import header as headers

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.image import Image

_SECTOR = 512


async def write(image: Image) -> None:
    """Make the header area on disk that of `image.header`. The caller holds `image.header_lock`. Raises OSError, and
    Error when it does not fit."""
    header, size = image.header, image.cluster_size
    new = headers.encode(header).ljust(size, b"\0")
    old = bytes(await image.file.pread(0, size))
    changed = [at for at in range(0, size, _SECTOR) if old[at : at + _SECTOR] != new[at : at + _SECTOR]]
    # What the new header refers to is durable before the header is.
    await image.file.flush()
    if len(changed) > 1:
        spare = -(-max(len(old.rstrip(b"\0")), len(new.rstrip(b"\0"))) // _SECTOR) * _SECTOR
        moved = headers.encode(replace(header), spare)
        if len(moved) <= size and not moved[_SECTOR:spare].strip(b"\0"):
            await image.file.pwrite(spare, moved[spare:])
            await image.file.flush()
            await image.exchange(0, moved[:_SECTOR], old[:_SECTOR])
            with suppress(OSError):
                # The new header is valid where it is, if this fails. All but the sector that switches back first.
                await image.file.pwrite(_SECTOR, new[_SECTOR:spare])
                await image.file.flush()
                await image.exchange(0, new[:_SECTOR], moved[:_SECTOR])
                await image.file.pwrite(spare, new[spare : len(moved)])
            return
    if changed:
        # One sector; or a cluster so small that there is no room for a second set of extensions.
        start, end = changed[0], changed[-1] + _SECTOR
        await image.exchange(start, new[start:end], old[start:end])
