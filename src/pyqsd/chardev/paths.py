"""File names from JSON and the command line, as the kernel gets them."""

from __future__ import annotations

import os


def encode(path: str) -> bytes:
    """The bytes of a file name. A NUL, which no file name can have, is C0 80, as QSD's JSON parser spells it; so the
    name that was asked for is never cut short."""
    return os.fsencode(path).replace(b"\0", b"\xc0\x80")
