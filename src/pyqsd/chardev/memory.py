"""The backend ``memory``: the old name of ``ringbuf``."""

from __future__ import annotations

from pyqsd.chardev.options import ChardevBackend
from pyqsd.chardev.ringbuf import ChardevRingbuf, RingbufChardev


class MemoryBackend(ChardevBackend, tag="memory"):
    """The branch ``memory``."""

    data: ChardevRingbuf


class MemoryChardev(RingbufChardev):
    """See above."""

    name = "memory"
    qom_parent = "chardev-ringbuf"


CHARDEV = MemoryChardev
BACKEND = MemoryBackend
