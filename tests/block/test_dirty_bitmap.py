"""Dirty bitmaps against a model that is a plain set of granules."""

from __future__ import annotations

import hashlib
import random
import tracemalloc
from collections.abc import Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyqsd.block import dirty_bitmap
from pyqsd.block.dirty_bitmap import DirtyBitmap, default_granularity
from pyqsd.qapi.errors import Error


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 bits and short lists, so that small examples cross their borders."""
    monkeypatch.setattr(dirty_bitmap, "_CHUNK_SHIFT", 6)
    monkeypatch.setattr(dirty_bitmap, "_MAX_CHUNKS_SHIFT", 4)
    monkeypatch.setattr(dirty_bitmap, "_MAX_LISTED", 12)
    monkeypatch.setattr(dirty_bitmap, "_MAX_LISTED_RANGE", 4)


class Model:
    def __init__(self, size: int, granularity: int) -> None:
        self.size, self.granularity = size, granularity
        self.dirty: set[int] = set()

    def touched(self, offset: int, length: int) -> range:
        if length <= 0:
            return range(0)
        return range(offset // self.granularity, (offset + length - 1) // self.granularity + 1)

    def is_dirty(self, byte: int) -> bool:
        return byte // self.granularity in self.dirty

    def next(self, offset: int, end: int, dirty: bool) -> int | None:
        end = min(end, self.size)
        while offset < end:
            if self.is_dirty(offset) == dirty:
                return offset
            offset = (offset // self.granularity + 1) * self.granularity
        return None


def compare(bitmap: DirtyBitmap, model: Model) -> None:
    assert bitmap.size == model.size
    assert bitmap.count == len(model.dirty) * model.granularity
    found = {granule for start, length in bitmap.areas() for granule in model.touched(start, length)}
    assert found == model.dirty
    assert sum(length for _, length in bitmap.areas()) == sum(
        min((g + 1) * model.granularity, model.size) - g * model.granularity for g in model.dirty
    )


ranges = st.tuples(st.integers(0, 9000), st.integers(0, 9000))
steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["mark", "clear", "mark", "next", "serialize"]), ranges),
        st.tuples(st.just("truncate"), st.tuples(st.integers(0, 20000), st.just(0))),
        st.tuples(st.just("clear all"), st.just((0, 0))),
    ),
    min_size=5,
    max_size=30,
)


@settings(max_examples=300, deadline=None)
@given(size=st.integers(0, 9000), shift=st.sampled_from([0, 3, 5]), steps=steps)
@example(
    size=0, shift=3, steps=[("truncate", (9000, 0)), ("mark", (0, 9000)), ("clear", (9, 8500)), ("next", (0, 9000))]
)
def test_against_a_set(size: int, shift: int, steps: list[tuple[str, tuple[int, int]]]) -> None:
    granularity = 1 << shift
    bitmap, model = DirtyBitmap("b", size, granularity), Model(size, granularity)
    for step, (a, b) in steps:
        offset = a % (model.size + 1)
        length = b % (model.size - offset + 1)
        if step == "mark":
            bitmap.mark(offset, length)
            model.dirty.update(model.touched(offset, length))
        elif step == "clear":
            bitmap.clear(offset, length)
            model.dirty.difference_update(model.touched(offset, length))
        elif step == "clear all":
            bitmap.clear()
            model.dirty.clear()
        elif step == "truncate":
            bitmap.truncate(a)
            model.size = a
            model.dirty = {g for g in model.dirty if g * granularity < a}
        elif step == "next":
            end = offset + length
            start = model.next(offset, end, True)
            assert bitmap.next_dirty(offset, end) == start
            assert bitmap.next_zero(offset, end) == model.next(offset, end, False)
            most = max(1, a % 700)
            expected = None
            if start is not None:
                stop = model.next(start, min(end, start + most), False)
                expected = (start, (min(end, start + most, model.size) if stop is None else stop) - start)
            assert bitmap.next_dirty_area(offset, end, most) == expected
        else:
            offset = offset // (8 * granularity) * 8 * granularity
            data = bitmap.serialize(offset, length)
            bits = int.from_bytes(data, "little")
            limit = -(-min(offset + length, model.size) // granularity)
            assert bits == sum(
                1 << (g - offset // granularity) for g in model.dirty if offset <= g * granularity and g < limit
            )
            other = DirtyBitmap("c", model.size, granularity)
            other.mark(0, model.size)
            other.deserialize(offset, data)
            for g in model.touched(offset, min(len(data) * 8 * granularity, model.size - offset)):
                if g < limit:
                    assert other.is_dirty(g * granularity) == (g in model.dirty)
            if offset:
                assert other.is_dirty(0)
    compare(bitmap, model)


@settings(max_examples=100, deadline=None)
@given(
    size=st.integers(1, 9000),
    shifts=st.tuples(st.sampled_from([0, 4]), st.sampled_from([0, 4])),
    first=st.lists(ranges, max_size=8),
    second=st.lists(ranges, max_size=8),
)
def test_merge(size: int, shifts: tuple[int, int], first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    into, model = DirtyBitmap("a", size, 1 << shifts[0]), Model(size, 1 << shifts[0])
    other = DirtyBitmap("b", size, 1 << shifts[1])
    for bitmap, marks in ((into, first), (other, second)):
        for offset, length in marks:
            offset = min(offset, size)
            bitmap.mark(offset, min(length, size - offset))
    for source in (into, other):
        for start, length in source.areas():
            model.dirty.update(model.touched(start, length))
    before = list(other.areas())
    into.merge(other)
    compare(into, model)
    assert list(other.areas()) == before
    # What was merged is not shared with its source.
    into.clear(0, 1)
    assert list(other.areas()) == before


def test_merge_of_another_size_is_refused() -> None:
    into = DirtyBitmap("a", 100000, 512)
    into.merge(DirtyBitmap("b", 100100, 512))
    with pytest.raises(Error) as caught:
        into.merge(DirtyBitmap("c", 1 << 40, 512))
    assert str(caught.value) == (
        "Bitmaps are of different sizes (destination size is 100352, source size is 1099511627776) and can't be merged"
    )


def test_huge_disks_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    size = (1 << 63) - 512
    bitmap = DirtyBitmap("b", size, 65536)
    bitmap.mark(size - 1, 1)
    assert list(bitmap.areas()) == [(size // 65536 * 65536, size % 65536)]
    petabyte = DirtyBitmap("b", 1 << 50, 65536)
    petabyte.mark(0, 1 << 50)
    assert petabyte.count == 1 << 50
    assert list(petabyte.areas()) == [(0, 1 << 50)]
    petabyte.clear(1 << 49, 65536)
    assert petabyte.next_zero(0) == 1 << 49


def test_growing_far_keeps_the_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    bitmap = DirtyBitmap("b", 1 << 40, 512)
    marks = [(0, 512), (1 << 30, 1 << 26), ((1 << 40) - 512, 512)]
    for mark in marks:
        bitmap.mark(*mark)
    bitmap.truncate(1 << 50)
    assert list(bitmap.areas()) == marks
    bitmap.truncate(1 << 40)
    assert list(bitmap.areas()) == marks


@pytest.mark.parametrize(
    ("cluster_size", "granularity"), [(0, 65536), (512, 4096), (4096, 4096), (32768, 32768), (2 << 20, 65536)]
)
def test_default_granularity(cluster_size: int, granularity: int) -> None:
    assert default_granularity(cluster_size) == granularity


def test_sha256_is_that_of_64_bit_words() -> None:
    # The digests are QSD 10.0.2's for the same writes to a disk of 100000 bytes.
    bitmap = DirtyBitmap("b0", 100000, 65536)
    clean = DirtyBitmap("b1", 100000, 512)
    assert clean.sha256() == "66687aadf862bd776c8fc18b8e9f8e20089714856ee233b3902a591d0d5f2925"
    for bits in (bitmap, clean):
        for offset, length in ((99999, 1), (4096, 10), (8192, 512), (0, 1)):
            bits.mark(offset, length)
    assert bitmap.sha256() == "35be322d094f9d154a8aba4733b8497f180353bd7ae7b0a15f90b586b549f28b"
    assert bitmap.count == 131072
    large = DirtyBitmap("b2", 100000, 1 << 31)
    large.mark(0, 1)
    assert large.sha256() == "7c9fa136d4413fa6173637e883b6998d32e1d675f88cddff9dcbcf331820f4b8"
    empty = DirtyBitmap("b3", 0, 512)
    assert empty.sha256() == hashlib.sha256(bytes(8)).hexdigest()


def test_what_commands_may_not_use() -> None:
    bitmap = DirtyBitmap("b", 1 << 20, 65536)
    bitmap.check()
    bitmap.inconsistent = True
    bitmap.check(allow_inconsistent=True)
    with pytest.raises(Error, match=r"^Bitmap 'b' is inconsistent and cannot be used$"):
        bitmap.check()
    bitmap.readonly = True
    bitmap.check(allow_readonly=True, allow_inconsistent=True)
    with pytest.raises(Error, match=r"^Bitmap 'b' is readonly and cannot be modified$"):
        bitmap.check()
    bitmap.busy = True
    with pytest.raises(Error, match=r"^Bitmap 'b' is currently in use by another operation and cannot be used$"):
        bitmap.check(allow_readonly=True)


def test_granularity_is_a_power_of_two() -> None:
    for wrong in (0, 3, -4):
        with pytest.raises(ValueError):
            DirtyBitmap("b", 1, wrong)


def test_long_ways_inside_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for granule in [*range(1, 700), *range(700, 70000, 997), *range(32760, 32776)]:
        bitmap, holed = DirtyBitmap("b", 1 << 26, 512), DirtyBitmap("c", 1 << 26, 512)
        bitmap.mark(granule * 512, 512)
        assert bitmap.next_dirty(0) == granule * 512
        holed.mark(0, 1 << 26)
        holed.clear(granule * 512, 512)
        assert holed.next_zero(0) == granule * 512
        assert holed.next_dirty_area(0) == (0, granule * 512)


def test_random_life() -> None:
    """Mostly short marks and clears, so that chunks go from lists to bits to whole ones and back."""
    dice = random.Random(5)
    for _ in range(12):
        granularity = dice.choice([512, 4096])
        size = dice.randrange(1, 3000) * 512
        bitmap, model = DirtyBitmap("b", size, granularity), Model(size, granularity)
        for _ in range(500):
            what = dice.choice(["mark"] * 8 + ["clear"] * 3 + ["copy up", "merge", "exchange", "resize", "store"])
            offset = dice.randrange(model.size)
            length = min(dice.choice([1, 512, 5000, 5000, 60_000, model.size]), model.size - offset)
            if what == "mark":
                for _ in range(dice.choice([1, 1, 30])):
                    bitmap.mark(offset, length)
                    model.dirty.update(model.touched(offset, length))
            elif what == "clear":
                bitmap.clear(offset, length)
                model.dirty.difference_update(model.touched(offset, length))
            elif what == "copy up":
                # What a job does: from one dirty area to the next, clearing them.
                while (area := bitmap.next_dirty_area(offset, None, 3 * granularity)) is not None:
                    assert model.is_dirty(area[0]) and model.next(offset, model.size, True) == area[0]
                    bitmap.clear(*area)
                    model.dirty.difference_update(model.touched(*area))
                    offset = area[0]
                    if dice.random() < 0.05:
                        break
            elif what == "merge":
                other = DirtyBitmap("", model.size, dice.choice([512, 4096]))
                for _ in range(dice.randrange(6)):
                    at = dice.randrange(model.size)
                    other.mark(at, min(dice.choice([1, 9000, 200_000]), model.size - at))
                bitmap.merge(other)
                for start, n in other.areas():
                    model.dirty.update(model.touched(start, n))
            elif what == "exchange":
                other = bitmap.copy()
                compare(other, model)
                bitmap.exchange(DirtyBitmap("", model.size, granularity))
                assert not bitmap.count
                bitmap.exchange(other)
            elif what == "resize":
                model.size = dice.randrange(1, 3000) * 512
                model.dirty = {g for g in model.dirty if g * granularity < model.size}
                bitmap.truncate(model.size)
            else:
                other = DirtyBitmap("", model.size, granularity)
                other.deserialize(0, bitmap.serialize(0, model.size))
                assert other.sha256() == bitmap.sha256()
                bitmap = other
            if dice.random() < 0.2:
                compare(bitmap, model)
        compare(bitmap, model)


def test_a_large_disk_needs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 TiB at 64 KiB: 32 MiB if each granule had its bit."""
    monkeypatch.undo()
    dice = random.Random(9)

    def needed(marks: Iterable[tuple[int, int]]) -> int:
        tracemalloc.start()
        bitmap = DirtyBitmap("b", 16 << 40, 65536)
        for offset, length in marks:
            bitmap.mark(offset, length)
        current, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return current

    assert needed(()) < 10_000
    assert needed([(0, 16 << 40)]) < 1 << 20
    assert needed((dice.randrange(1 << 28) << 16, 4096) for _ in range(100_000)) < 2 << 20
    # The same few granules again and again.
    assert needed(((n % 300) << 33, 4096) for n in range(100_000)) < 1 << 20
    # A list of what is dirty where little is, in place of its bits, also when it comes from an image.
    sparse = DirtyBitmap("b", 16 << 40, 65536)
    for _ in range(10_000):
        sparse.mark(dice.randrange(1 << 28) << 16, 4096)
    data = sparse.serialize(0, 16 << 40)
    tracemalloc.start()
    loaded = DirtyBitmap("b", 16 << 40, 65536)
    loaded.deserialize(0, data)
    current, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loaded.sha256() == sparse.sha256() and current < 2 << 20
