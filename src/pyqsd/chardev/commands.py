"""The QMP commands ``chardev-*``, ``query-chardev*`` and ``ringbuf-*``."""

from __future__ import annotations

import base64
from enum import StrEnum
from typing import TYPE_CHECKING

from pyqsd.chardev import registry
from pyqsd.chardev.base64 import decode_base64
from pyqsd.chardev.chardev import Chardevs
from pyqsd.chardev.options import ChardevBackend
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Struct

if TYPE_CHECKING:
    from pyqsd.chardev.ringbuf import RingbufChardev


class ChardevInfo(Struct):
    """`filename`: what it is and what it is connected to. `frontend_open`: something uses it."""

    label: str
    filename: str
    frontend_open: bool


class ChardevBackendInfo(Struct):
    """The name of a backend."""

    name: str


class ChardevReturn(Struct):
    """`pty`: the name of the slave, for pseudo terminals."""

    pty: str | None = None


class DataFormat(StrEnum):
    """How bytes are written in JSON."""

    UTF8 = "utf8"
    BASE64 = "base64"


@command("query-chardev")
async def query_chardev(chardevs: Chardevs, /) -> list[ChardevInfo]:
    """What chardevs there are."""
    return [
        ChardevInfo(label=chardev.label, filename=chardev.filename(), frontend_open=chardev.frontend is not None)
        for chardev in chardevs
    ]


@command("query-chardev-backends")
async def query_chardev_backends() -> list[ChardevBackendInfo]:
    """What backends there are."""
    return [ChardevBackendInfo(name=name) for name in registry.chardev_names()]


@command("chardev-add")
async def chardev_add(chardevs: Chardevs, /, *, id: str, backend: ChardevBackend) -> ChardevReturn:
    """Open a chardev."""
    if chardevs.get(id) is not None:
        raise Error(f"Chardev with id '{id}' already exists")
    try:
        chardev = await chardevs.add(id, backend)
    except Error as exc:
        raise exc.prefixed(f"Failed to add chardev '{id}': ") from exc
    return ChardevReturn(pty=chardev.reply())


@command("chardev-change")
async def chardev_change(chardevs: Chardevs, /, *, id: str, backend: ChardevBackend) -> ChardevReturn:
    """Put another backend behind the label `id`, which nothing uses."""
    chardev = await chardevs.change(id, backend)
    return ChardevReturn(pty=chardev.reply())


@command("chardev-remove")
async def chardev_remove(chardevs: Chardevs, /, *, id: str) -> None:
    """Close a chardev."""
    await chardevs.remove(id)


@command("chardev-send-break")
async def chardev_send_break(chardevs: Chardevs, /, *, id: str) -> None:
    """Send a break to the frontend; a monitor takes no notice of it."""
    chardevs.find(id)


def _ringbuf(chardevs: Chardevs, device: str) -> RingbufChardev:
    from pyqsd.chardev.ringbuf import RingbufChardev

    chardev = chardevs.get(device)
    if chardev is None:
        raise Error(f"Device '{device}' not found")
    if not isinstance(chardev, RingbufChardev):
        raise Error(f"{device} is not a ringbuf device")
    return chardev


@command("ringbuf-write")
async def ringbuf_write(chardevs: Chardevs, /, *, device: str, data: str, format: DataFormat | None = None) -> None:
    """Append to a ring buffer."""
    chardev = _ringbuf(chardevs, device)
    chardev.put(decode_base64(data) if format == DataFormat.BASE64 else data.encode("utf-8", "surrogatepass"))


@command("ringbuf-read")
async def ringbuf_read(chardevs: Chardevs, /, *, device: str, size: int, format: DataFormat | None = None) -> str:
    """Take at most `size` bytes from a ring buffer. What is not UTF-8 reads as replacement characters."""
    chardev = _ringbuf(chardevs, device)
    if size <= 0:
        raise Error("size must be greater than zero")
    data = chardev.take(size)
    if format == DataFormat.BASE64:
        return base64.b64encode(data).decode()
    return data.decode("utf-8", "replace")
