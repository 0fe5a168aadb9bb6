"""Where pyqsd differs from QSD 10.0.2 and why: (session, step) → reason.

Every entry is a decision; a difference that nobody decided is a bug and does not belong here.
"""

from __future__ import annotations

_NULL = (
    'blockdev-add {"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": "top.qcow2"}, '
    '"backing": {"driver": "null-co", "size": 1048576, "read-zeroes": true}}'
)
_ONE_PIECE = (
    "a read of data and zeroes is answered in one piece: NBD leaves that to the server, and one chunk is one system "
    "call; where nothing but zeroes is read, a hole is sent, as QSD does"
)


KNOWN: dict[tuple[str, str], str] = {
    ("backing-null", _NULL): "QSD gives null-co the name of the image's own backing file, which null-co refuses",
    ("reopen-exported", "read"): "QSD's export keeps the size that the node had before it was reopened",
    (
        "nbd-handshake",
        "contexts with a tail",
    ): "NBD wants an option whose length does not fit refused; QSD overlooks it",
    ("nbd-pieces", "mixed"): _ONE_PIECE,
    ("nbd-pieces", "mixed, extended"): _ONE_PIECE,
    (
        "nbd-pieces",
        "small zeroes",
    ): "a few bytes of zeroes are sent as data: a hole is hardly shorter, and to look for it takes time",
}
