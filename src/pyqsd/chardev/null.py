"""The backend ``null``: what is written is lost, and nothing is ever read."""

from __future__ import annotations

from pyqsd.chardev.chardev import Chardev
from pyqsd.chardev.options import ChardevBackend, ChardevCommon


class NullBackend(ChardevBackend, tag="null"):
    """The branch ``null``."""

    data: ChardevCommon


class NullChardev(Chardev):
    """See above. It never has a peer."""

    name = "null"

    async def open(self) -> None:
        pass


CHARDEV = NullChardev
BACKEND = NullBackend
