"""Which of several mistakes is told.

QSD reports one unexpected member, the first in the order of its hash tables. Tools and tests compare messages, so the
same one is picked here. Only mistakes come this way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_WORD = 0xFFFFFFFF
_BUCKETS = 512
#: Sizes of the second table, and the primes that hashes are taken modulo of.
_SIZES = ((8, 7), (16, 13), (32, 31), (64, 61), (128, 127), (256, 251), (512, 509), (1024, 1021))


def object_order(members: Iterable[str]) -> list[str]:
    """The members of a JSON object as QSD walks through them, when they were put there in the order given."""
    buckets: dict[int, list[str]] = {}
    for member in members:
        buckets.setdefault(_object_hash(member) % _BUCKETS, []).insert(0, member)
    return [member for number in sorted(buckets) for member in buckets[number]]


def first_left(members: Iterable[str], expected: Iterable[str]) -> str:
    """The member that QSD's conversion reports as unexpected, of an object with `members`."""
    # They go from one hash table into another, from which the expected ones are taken one by one.
    size, prime = _SIZES[0]
    table: list[str | None] = [None] * size
    for count, member in enumerate(object_order(members), 1):
        table[_free(table, prime, member)] = member
        if count + count // 16 >= size and size < _SIZES[-1][0]:
            size, prime = _SIZES[[known for known, _ in _SIZES].index(size) + 1]
            table = _grown(table, size, prime)
    wanted = set(expected)
    return next(member for member in table if member is not None and member not in wanted)


def _free(table: Sequence[object], prime: int, member: str) -> int:
    """The first place for `member` that nothing has taken."""
    place = (_table_hash(member) * 11 & _WORD) % prime
    step = 0
    while table[place] is not None:
        step += 1
        place = (place + step) % len(table)
    return place


def _grown(old: list[str | None], size: int, prime: int) -> list[str | None]:
    """The table made larger where it is: who stands where another belongs is the next one to move."""
    still = [*old, *[None] * (size - len(old))]
    table: list[str | None] = [None] * size
    for position in range(len(old)):
        moving = still[position]
        still[position] = None
        while moving is not None:
            place = _free(table, prime, moving)
            table[place] = moving
            moving, still[place] = still[place], None
    return table


def _object_hash(text: str) -> int:
    raw = text.encode("utf-8", "surrogateescape")
    value = 0x238F13AF * len(raw)
    for position, byte in enumerate(raw):
        value += byte << (position * 5 % 24)
    return ((value & _WORD) * 1103515243 + 12345) & _WORD


def _table_hash(text: str) -> int:
    value = 5381
    for byte in text.encode("utf-8", "surrogateescape"):
        value = (value * 33 + (byte - 256 if byte > 127 else byte)) & _WORD
    return max(value, 2)
