"""Where the bytes of a node are: the answer of `Driver.map` and of block status.

An extent is a plain tuple ``(length, flags, node, offset)``, because one is made per request:

* `length`: bytes from the offset that was asked for which the answer holds for, at least 1;
* `flags`: the bits below;
* `node`: the node that holds the bytes verbatim, or None;
* `offset`: the offset in `node` in bytes, meaningful with `OFFSET_VALID`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyqsd.block.node import Node

#: The bytes are stored in this layer (not necessarily nonzero).
DATA = 0x01
#: The range reads as zeroes.
ZERO = 0x02
#: `node` and `offset` say where the bytes are stored verbatim.
OFFSET_VALID = 0x04
#: This layer decides the content; without it, the backing file does (or zeroes, where there is none).
ALLOCATED = 0x08
#: Stored compressed. Only the driver can read it.
COMPRESSED = 0x10
#: Only the driver's own `preadv` can produce the bytes (compressed, encrypted, generated).
DRIVER = 0x20
#: The next layer (`node`, `offset`) knows more about zeroes: a preallocated image, a filter.
RECURSE = 0x40
#: The whole answer is that of `node` at `offset` (filters, raw).
RAW = 0x80
#: The range ends at the end of the node.
EOF = 0x100

Extent = tuple[int, int, "Node | None", int]
