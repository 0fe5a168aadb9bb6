"""Dirty bitmaps: which parts of a node have been written since a point in time.

The bits live in chunks that exist only where something was marked. A chunk in which little is dirty is a list of that;
a chunk that is dirty throughout is one shared object. A disk of any size costs nothing while it is clean, and at most
one bit per granule. `mark` is on the way of every write: for a granule that is dirty already it is a look-up, for one
more in such a list an append. Lists are unsorted, and have what was marked repeatedly more than once; whoever wants to
know more looks at the bits that they stand for.

Offsets, lengths and granularities are bytes.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import ClassVar

from pyqsd.qapi.errors import Error

#: Granules per chunk are ``1 << _CHUNK_SHIFT`` (at least), so a chunk has 4 KiB.
_CHUNK_SHIFT = 15
#: A bitmap has at most ``1 << _MAX_CHUNKS_SHIFT`` chunks; larger disks get larger chunks.
_MAX_CHUNKS_SHIFT = 20
#: A list of this length is looked through: what is twice in it goes, and if more than half is left it becomes bits.
_MAX_LISTED = 512
#: Ranges of more granules than this are not listed one by one.
_MAX_LISTED_RANGE = 32
_BIT = (1, 2, 4, 8, 16, 32, 64, 128)

MAX_NAME = 1023
#: A user's bitmap has no more than ``1 << MAX_GRANULES_SHIFT`` granules, as in QSD: else its chunks would be too large.
MAX_GRANULES_SHIFT = 41
MIN_GRANULARITY = 512
_DEFAULT_GRANULARITY = 65536


def default_granularity(cluster_size: int) -> int:
    """The granularity of a bitmap whose user names none: the image's cluster size (0: none), between 4 and 64 KiB."""
    if cluster_size <= 0:
        return _DEFAULT_GRANULARITY
    return min(max(cluster_size, 4096), _DEFAULT_GRANULARITY)


class DirtyBitmap:
    """One bitmap of a node.

    Arguments:
        name: unique within the node; "" for an anonymous one, which no command can address.
        size: length of the node in bytes.
        granularity: bytes per bit, a power of two.
        persistent: it is to be stored in the image when the node is closed or inactivated.
        enabled: writes are recorded.

    Further state: `busy` (an export or a job uses it; nobody else may), `readonly` (it cannot be changed because the
    image cannot), `inconsistent` (the image holds a version that was never finished; it can only be removed),
    `successor` (it is frozen, and this one records in its place: see `pyqsd.block.node_bitmaps`).
    """

    #: Users are not told of it.
    hidden: ClassVar[bool] = False

    __slots__ = (
        "_chunk_bytes",
        "_chunk_shift",
        "_chunks",
        "_enabled",
        "_full",
        "_inside",
        "_listed",
        "_mask",
        "_nbits",
        "_numbers",
        "_opened",
        "_shift",
        "_typecode",
        "_whole_chunks",
        "busy",
        "granularity",
        "inconsistent",
        "name",
        "on_enable",
        "persistent",
        "readonly",
        "size",
        "successor",
    )

    def __init__(
        self, name: str, size: int, granularity: int, *, persistent: bool = False, enabled: bool = True
    ) -> None:
        if granularity < 1 or granularity & (granularity - 1):
            raise ValueError("the granularity of a bitmap is a power of two")
        self.name = name
        self.granularity = granularity
        self.persistent = persistent
        self._enabled = enabled
        #: Called when it is enabled or disabled: the node that it belongs to has to know.
        self.on_enable: Callable[[], None] | None = None
        self.busy = False
        self.readonly = False
        self.inconsistent = False
        self.successor: DirtyBitmap | None = None
        self._shift = granularity.bit_length() - 1
        self._inside = granularity - 1
        self._lay_out(size)

    def __repr__(self) -> str:
        return f"<DirtyBitmap {self.name!r} size={self.size} granularity={self.granularity} count={self.count}>"

    def _lay_out(self, size: int) -> None:
        self.size = size
        self._nbits = (size + self.granularity - 1) >> self._shift
        self._chunk_shift = max(_CHUNK_SHIFT, self._nbits.bit_length() - _MAX_CHUNKS_SHIFT)
        self._mask = (1 << self._chunk_shift) - 1
        self._chunk_bytes = 1 << (self._chunk_shift - 3)
        #: What every chunk that is dirty throughout is.
        self._full = b"\xff" * self._chunk_bytes
        #: How many chunks lie inside the bitmap as a whole. One that ends beyond it is never a list.
        self._whole_chunks = self._nbits >> self._chunk_shift
        self._typecode = "H" if self._chunk_shift <= 16 else "I" if self._chunk_shift <= 32 else "Q"
        self._chunks: dict[int, bytes | bytearray] = {}
        #: The chunks that are lists of positions; no chunk is in both.
        self._listed: dict[int, array[int]] = {}
        #: The numbers of all chunks, sorted, and perhaps of some that are gone; None: there are new ones.
        self._numbers: list[int] | None = None
        #: The bits of the list that was last looked at: its number, itself, its length then, the bits.
        self._opened: tuple[int, array[int], int, bytearray] | None = None

    # --- what may be done with it -------------------------------------------------------------------------------

    def check(self, *, allow_readonly: bool = False, allow_inconsistent: bool = False) -> None:
        """Raise Error if a command may not use the bitmap now."""
        if self.busy:
            raise Error(f"Bitmap '{self.name}' is currently in use by another operation and cannot be used")
        if self.readonly and not allow_readonly:
            raise Error(f"Bitmap '{self.name}' is readonly and cannot be modified")
        if self.inconsistent and not allow_inconsistent:
            raise Error(
                f"Bitmap '{self.name}' is inconsistent and cannot be used",
                hint="Try block-dirty-bitmap-remove to delete this bitmap from disk",
            )

    @property
    def enabled(self) -> bool:
        """Whether writes are recorded."""
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._enabled = enabled
        if self.on_enable is not None:
            self.on_enable()

    @property
    def recording(self) -> bool:
        """Whether writes are recorded, here or by the successor: what users know as enabled."""
        return self.enabled or (self.successor is not None and self.successor.enabled)

    def with_successor(self) -> DirtyBitmap:
        """A bitmap that has all the bits of this one and of its successor; this one, if it has none."""
        if self.successor is None:
            return self
        united = DirtyBitmap(self.name, self.size, self.granularity, persistent=self.persistent, enabled=self.recording)
        united.merge(self)
        united.merge(self.successor)
        return united

    def copy(self) -> DirtyBitmap:
        """An anonymous bitmap with the same bits."""
        other = DirtyBitmap("", self.size, self.granularity)
        other.merge(self)
        return other

    def exchange(self, other: DirtyBitmap) -> None:
        """Have the bits of `other`, of the same size and granularity, which gets those of this one."""
        assert (self.size, self.granularity) == (other.size, other.granularity)
        self._chunks, other._chunks = other._chunks, self._chunks
        self._full, other._full = other._full, self._full
        self._listed, other._listed = other._listed, self._listed
        self._numbers = other._numbers = None
        self._opened = other._opened = None

    # --- changing -------------------------------------------------------------------------------------------------

    def mark(self, offset: int, length: int) -> None:
        """Mark what ``[offset, offset + length)`` touches as dirty."""
        if not length:
            return
        first = offset >> self._shift
        if (offset & self._inside) + length <= self.granularity:
            number = first >> self._chunk_shift
            chunk = self._chunks.get(number)
            if chunk is not None:
                if chunk[(first & self._mask) >> 3] & _BIT[first & 7]:
                    return
            else:
                listed = self._listed.get(number)
                if listed is not None:
                    position = first & self._mask
                    if listed[-1] != position:
                        listed.append(position)
                        if len(listed) >= _MAX_LISTED:
                            self._look_through(number)
                    return
                if number < self._whole_chunks:
                    self._listed[number] = array(self._typecode, (first & self._mask,))
                    self._numbers = None
                    return
        self._set(first, ((offset + length - 1) >> self._shift) + 1)

    def clear(self, offset: int = 0, length: int | None = None) -> None:
        """Mark as clean every granule that ``[offset, offset + length)`` touches (everything by default)."""
        if length is None:
            if offset == 0:
                self._chunks.clear()
                self._listed.clear()
                self._opened = None
                return
            length = self.size - offset
        if length > 0:
            self._reset(offset >> self._shift, ((offset + length - 1) >> self._shift) + 1)

    def _set(self, first: int, end: int) -> None:
        end = min(end, self._nbits)
        shift, chunks, full = self._chunk_shift, self._chunks, self._full
        whole = 1 << shift
        while first < end:
            number = first >> shift
            base = number << shift
            low, high = first - base, min(end - base, whole)
            chunk = chunks.get(number)
            if low == 0 and high == whole:
                if chunk is None and self._listed.pop(number, None) is None:
                    self._numbers = None
                chunks[number] = full
            elif chunk is None and number < self._whole_chunks and high - low <= _MAX_LISTED_RANGE:
                self._list(number, range(low, high))
            elif chunk is not full:
                chunk = self._as_bits(number)
                _fill(chunk, low, high)
                if chunk == full:
                    chunks[number] = full
            first = base + whole

    def _list(self, number: int, positions: range | array[int]) -> None:
        """Add to a chunk that is a list, or does not exist yet."""
        listed = self._listed.get(number)
        if listed is None:
            listed = self._listed[number] = array(self._typecode)
            self._numbers = None
        listed.extend(positions)
        if len(listed) >= _MAX_LISTED:
            self._look_through(number)

    def _look_through(self, number: int) -> None:
        """Nothing is twice in a list afterwards, or it has become bits."""
        positions = set(self._listed[number])
        if len(positions) > _MAX_LISTED // 2:
            chunk = self._as_bits(number)
            if chunk == self._full:
                self._chunks[number] = self._full
        else:
            self._listed[number] = array(self._typecode, positions)

    def _as_bits(self, number: int) -> bytearray:
        """The bits of a chunk, which are no list and no shared object from now on."""
        chunk = self._chunks.get(number)
        if not isinstance(chunk, bytearray):
            if chunk is not None:
                chunk = bytearray(chunk)
            elif number in self._listed:
                chunk = self._open(number)
                del self._listed[number]
                self._opened = None
            else:
                chunk = bytearray(self._chunk_bytes)
                self._numbers = None
            self._chunks[number] = chunk
        return chunk

    def _open(self, number: int) -> bytearray:
        """The bits that a list stands for; for looking at only."""
        listed = self._listed[number]
        opened = self._opened
        if opened is not None and opened[0] == number and opened[1] is listed:
            _, _, done, bits = opened
            if done == len(listed):
                return bits
        else:
            done, bits = 0, bytearray(self._chunk_bytes)
        for position in listed[done:]:
            bits[position >> 3] |= _BIT[position & 7]
        self._opened = (number, listed, len(listed), bits)
        return bits

    def _bits(self, number: int) -> bytes | bytearray | None:
        """The bits of a chunk; for looking at only. None: nothing is dirty there."""
        chunk = self._chunks.get(number)
        if chunk is None and number in self._listed:
            return self._open(number)
        return chunk

    def _list_again(self, number: int) -> None:
        """Make bits a list, if they are few."""
        chunk = self._chunks[number]
        value = int.from_bytes(chunk, "little")
        if number < self._whole_chunks and value.bit_count() <= _MAX_LISTED // 4:
            listed = array(self._typecode)
            bit = _find(chunk, 0, 0)
            while bit >= 0:
                listed.append(bit)
                bit = _find(chunk, bit + 1, 0) if bit + 1 < 8 * len(chunk) else -1
            del self._chunks[number]
            self._listed[number] = listed

    def _drop(self, number: int) -> None:
        if self._chunks.pop(number, None) is None:
            del self._listed[number]

    def _reset(self, first: int, end: int) -> None:
        end = min(end, self._nbits)
        shift, chunks = self._chunk_shift, self._chunks
        whole = 1 << shift
        while first < end:
            number = first >> shift
            base = number << shift
            low, high = first - base, min(end - base, whole)
            if number not in chunks and number not in self._listed:
                following = self._next_chunk(number + 1)
                if following is None:
                    return
                first = following << shift
                continue
            # Bits beyond the end of the bitmap are never set, so its last chunk may go as a whole too.
            if low == 0 and (high == whole or base + high == self._nbits):
                self._drop(number)
            else:
                listed = self._listed.get(number)
                if listed is None or (self._opened is not None and self._opened[1] is listed):
                    # Somebody is going through it, and it is going to be empty soon.
                    chunk = self._as_bits(number)
                    _wipe(chunk, low, high)
                    left = bool(chunk.strip(b"\0"))
                else:
                    rest = array(self._typecode, [one for one in listed if not low <= one < high])
                    self._listed[number] = rest
                    left = bool(rest)
                if not left:
                    self._drop(number)
            first = base + whole

    def truncate(self, size: int) -> None:
        """The node has `size` bytes now: what is beyond is forgotten, what is added is clean."""
        if size == self.size:
            return
        if size < self.size:
            self._reset((size + self.granularity - 1) >> self._shift, self._nbits)
        old = DirtyBitmap("", self.size, self.granularity)
        self.exchange(old)
        self._lay_out(size)
        if self._chunk_shift == old._chunk_shift:
            self._chunks, self._full, self._listed = old._chunks, old._full, old._listed
            if self._whole_chunks in self._listed:
                # It does not lie inside the bitmap any more.
                self._as_bits(self._whole_chunks)
            return
        for start, length in old.areas():
            self.mark(start, length)

    def check_merge(self, other: DirtyBitmap) -> None:
        """Raise Error when `other` cannot be merged into this bitmap because its size is another."""
        if _rounded(self.size) != _rounded(other.size):
            raise Error(
                f"Bitmaps are of different sizes (destination size is {_rounded(self.size)}, source size is "
                f"{_rounded(other.size)}) and can't be merged"
            )

    def merge(self, other: DirtyBitmap) -> None:
        """Mark everything that is dirty in `other`. Raises Error when the sizes differ."""
        self.check_merge(other)
        if other is self:
            return
        if self._shift != other._shift:
            for start, length in other.areas():
                self.mark(start, length)
            return
        for number, positions in other._listed.items():
            chunk = self._chunks.get(number)
            if chunk is None:
                self._list(number, positions)
            elif chunk is not self._full:
                self._unite(number, other._open(number))
        for number, theirs in other._chunks.items():
            if theirs is other._full:
                if number not in self._chunks and self._listed.pop(number, None) is None:
                    self._numbers = None
                self._chunks[number] = self._full
            elif self._chunks.get(number) is not self._full:
                self._unite(number, theirs)

    def _unite(self, number: int, bits: bytes | bytearray) -> None:
        chunk = self._as_bits(number)
        united = int.from_bytes(chunk, "little") | int.from_bytes(bits, "little")
        chunk[:] = united.to_bytes(self._chunk_bytes, "little")
        if chunk == self._full:
            self._chunks[number] = self._full

    # --- asking -----------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Dirty bytes, whole granules counted (also the last one, which may reach beyond the node)."""
        bits = 0
        for chunk in self._chunks.values():
            if chunk is self._full:
                bits += 1 << self._chunk_shift
            else:
                bits += int.from_bytes(chunk, "little").bit_count()
        for listed in self._listed.values():
            bits += len(set(listed))
        return bits << self._shift

    def is_dirty(self, offset: int) -> bool:
        """Whether the byte at `offset` belongs to a dirty granule."""
        bit = offset >> self._shift
        chunk = self._bits(bit >> self._chunk_shift)
        return chunk is not None and bool(chunk[(bit & self._mask) >> 3] & _BIT[bit & 7])

    def next_dirty(self, offset: int, end: int | None = None) -> int | None:
        """The first dirty byte in ``[offset, end)``, or None."""
        end = self.size if end is None else min(end, self.size)
        if offset >= end:
            return None
        bit = self._next_set(offset >> self._shift, ((end - 1) >> self._shift) + 1)
        return None if bit is None else max(bit << self._shift, offset)

    def next_zero(self, offset: int, end: int | None = None) -> int | None:
        """The first clean byte in ``[offset, end)``, or None."""
        end = self.size if end is None else min(end, self.size)
        if offset >= end:
            return None
        bit = self._next_clear(offset >> self._shift, ((end - 1) >> self._shift) + 1)
        return None if bit is None else max(bit << self._shift, offset)

    def next_dirty_area(
        self, offset: int, end: int | None = None, max_length: int | None = None
    ) -> tuple[int, int] | None:
        """``(start, length)`` of the first dirty area in ``[offset, end)``, cut to that range and to `max_length`."""
        end = self.size if end is None else min(end, self.size)
        start = self.next_dirty(offset, end)
        if start is None:
            return None
        if max_length is not None:
            end = min(end, start + max_length)
        stop = self.next_zero(start, end)
        return start, (end if stop is None else stop) - start

    def areas(self, offset: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """All dirty areas as ``(start, length)``, ascending."""
        while (area := self.next_dirty_area(offset, end)) is not None:
            yield area
            offset = area[0] + area[1]

    def _next_chunk(self, number: int) -> int | None:
        """The first chunk at or after `number` that exists."""
        numbers = self._numbers
        if numbers is None:
            numbers = self._numbers = sorted([*self._chunks, *self._listed])
        index = start = bisect_left(numbers, number)
        while index < len(numbers):
            number = numbers[index]
            if number in self._chunks or number in self._listed:
                break
            index += 1
        if index - start > 64:
            # So many are gone that the others are worth being sorted again.
            self._numbers = None
        return number if index < len(numbers) else None

    def _next_set(self, bit: int, end: int) -> int | None:
        shift = self._chunk_shift
        while bit < end:
            number = bit >> shift
            chunk = self._bits(number)
            if chunk is None:
                following = self._next_chunk(number + 1)
                if following is None:
                    return None
                bit = following << shift
                continue
            if chunk is self._full:
                return bit
            found = _find(chunk, bit & self._mask, 0)
            if found >= 0:
                bit = (number << shift) + found
                return bit if bit < end else None
            bit = (number + 1) << shift
        return None

    def _next_clear(self, bit: int, end: int) -> int | None:
        shift = self._chunk_shift
        while bit < end:
            number = bit >> shift
            chunk = self._bits(number)
            if chunk is None:
                return bit
            if chunk is not self._full:
                found = _find(chunk, bit & self._mask, 0xFF)
                if found >= 0:
                    bit = (number << shift) + found
                    return bit if bit < end else None
            bit = (number + 1) << shift
        return None

    # --- as bytes -----------------------------------------------------------------------------------------------------

    def serialize(self, offset: int, length: int) -> bytes:
        """The bits of ``[offset, offset + length)``, lowest bit first (the qcow2 specification's order, "Bitmap data").
        `offset` is a multiple of 8 granules."""
        first = offset >> self._shift
        if offset & (self.granularity * 8 - 1):
            raise ValueError("not on a byte of the bitmap")
        end = min((offset + length + self.granularity - 1) >> self._shift, self._nbits)
        parts: list[bytes] = []
        while first < end:
            number = first >> self._chunk_shift
            base = number << self._chunk_shift
            low = (first - base) >> 3
            high = min((end - base + 7) >> 3, self._chunk_bytes)
            chunk = self._bits(number)
            parts.append(bytes(high - low) if chunk is None else bytes(chunk[low:high]))
            first = base + (1 << self._chunk_shift)
        data = b"".join(parts)
        if end & 7 and data:
            data = data[:-1] + bytes((data[-1] & ((1 << (end & 7)) - 1),))
        return data

    def deserialize(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Replace the bits from `offset` (a multiple of 8 granules) on by `data`; bits beyond the end are ignored."""
        if offset & (self.granularity * 8 - 1):
            raise ValueError("not on a byte of the bitmap")
        first = offset >> self._shift
        end = min(first + len(data) * 8, self._nbits)
        self._reset(first, end)
        at = 0
        while first < end:
            number = first >> self._chunk_shift
            low = (first & self._mask) >> 3
            n = min(self._chunk_bytes - low, (end - first + 7) >> 3)
            piece = bytes(data[at : at + n])
            beyond = (first + n * 8) - end
            if beyond > 0:
                piece = piece[:-1] + bytes((piece[-1] & (0xFF >> beyond),))
            if piece.strip(b"\0"):
                chunk = self._as_bits(number)
                chunk[low : low + n] = piece
                if chunk == self._full:
                    self._chunks[number] = self._full
                else:
                    self._list_again(number)
            at += n
            first += n * 8

    def sha256(self) -> str:
        """The digest of all bits in words of 64, in hexadecimal, as ``x-debug-block-dirty-bitmap-sha256`` has it."""
        import hashlib

        digest = hashlib.sha256()
        left = max((self._nbits + 63) // 64, 1) * 8
        clean = bytes(self._chunk_bytes)
        number = 0
        while left > 0:
            n = min(left, self._chunk_bytes)
            chunk = self._bits(number) or clean
            digest.update(chunk if n == self._chunk_bytes else chunk[:n])
            left -= n
            number += 1
        return digest.hexdigest()


def _rounded(size: int) -> int:
    """Sizes are compared and shown in whole sectors."""
    return -(-size // 512) * 512


def _fill(chunk: bytearray, low: int, high: int) -> None:
    """Set the bits ``[low, high)``."""
    i, j = low >> 3, high >> 3
    if i == j:
        chunk[i] |= ((1 << (high - low)) - 1) << (low & 7)
        return
    if low & 7:
        chunk[i] |= (0xFF << (low & 7)) & 0xFF
        i += 1
    chunk[i:j] = b"\xff" * (j - i)
    if high & 7:
        chunk[j] |= (1 << (high & 7)) - 1


def _wipe(chunk: bytearray, low: int, high: int) -> None:
    """Reset the bits ``[low, high)``."""
    i, j = low >> 3, high >> 3
    if i == j:
        chunk[i] &= ~(((1 << (high - low)) - 1) << (low & 7))
        return
    if low & 7:
        chunk[i] &= (1 << (low & 7)) - 1
        i += 1
    chunk[i:j] = bytes(j - i)
    if high & 7:
        chunk[j] &= (0xFF << (high & 7)) & 0xFF


def _find(chunk: bytes | bytearray, bit: int, inverted: int) -> int:
    """The first set bit (`inverted` 0) or clear bit (0xFF) at or after `bit`, or -1."""
    i = bit >> 3
    byte = (chunk[i] ^ inverted) >> (bit & 7)
    if byte:
        return bit + (byte & -byte).bit_length() - 1
    i += 1
    size = len(chunk)
    window = 8
    while i < size:
        piece = chunk[i : i + window]
        value = int.from_bytes(piece, "little")
        if inverted:
            value ^= (1 << (8 * len(piece))) - 1
        if value:
            return i * 8 + (value & -value).bit_length() - 1
        i += window
        # Near bits are the usual case; far ones are worth a longer look at once.
        window = min(window * 4, 2048)
    return -1
