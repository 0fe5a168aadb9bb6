"""Base64 as QSD reads it: with line ends anywhere, and what is left over after the last four digits does not count."""

from __future__ import annotations

import binascii
import re

from pyqsd.qapi.errors import Error

_VALID = re.compile(r"[A-Za-z0-9+/=\n]*")


def decode_base64(text: str) -> bytes:
    """The bytes that `text` stands for. Raises Error."""
    if "\0" in text:
        raise Error("Base64 data contains embedded NUL characters")
    if not _VALID.fullmatch(text):
        raise Error("Base64 data contains invalid characters")
    decoded = bytearray()
    digits = text.replace("\n", "")
    for position in range(0, len(digits) - 3, 4):
        group = digits[position : position + 4]
        first, second, third = binascii.a2b_base64(group.replace("=", "A"))
        decoded.append(first)
        if group[2] != "=":
            decoded.append(second)
        if group[3] != "=":
            decoded.append(third)
    return bytes(decoded)
