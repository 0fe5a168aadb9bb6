"""The backend ``ringbuf``: keeps the last bytes written, for ``ringbuf-read``."""

from __future__ import annotations

from pyqsd.chardev.chardev import Chardev
from pyqsd.chardev.options import ChardevBackend, ChardevCommon
from pyqsd.chardev.opts import Opts
from pyqsd.qapi.errors import Error

_DEFAULT_SIZE = 65536


class ChardevRingbuf(ChardevCommon):
    """`size`: bytes that are kept, a power of two; 64 KiB unless given."""

    size: int | None = None


class RingbufBackend(ChardevBackend, tag="ringbuf"):
    """The branch ``ringbuf``."""

    data: ChardevRingbuf


class RingbufChardev(Chardev):
    """See above."""

    name = "ringbuf"

    def __init__(self, label: str, options: ChardevRingbuf) -> None:
        super().__init__(label, options)
        self._content = bytearray()
        self._size = options.size or _DEFAULT_SIZE

    @classmethod
    def options_from(cls, opts: Opts) -> ChardevCommon:
        return ChardevRingbuf(size=opts.get("size"), **opts.common())

    async def open(self) -> None:
        if self._size < 0 or self._size & (self._size - 1):
            raise Error("size of ringbuf chardev must be power of two")
        self._opened()

    def _write(self, data: bytes) -> None:
        self.put(data)

    def put(self, data: bytes) -> None:
        """Append `data`; the oldest bytes make room."""
        self._content += data[-self._size :]
        excess = len(self._content) - self._size
        if excess > 0:
            del self._content[:excess]

    def take(self, size: int) -> bytes:
        """Remove and return the oldest bytes, at most `size` of them."""
        data = bytes(self._content[:size])
        del self._content[:size]
        return data


CHARDEV = RingbufChardev
BACKEND = RingbufBackend
