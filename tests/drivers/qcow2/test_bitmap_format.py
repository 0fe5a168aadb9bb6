"""Bitmap directories, bitmap tables and snapshot tables as bytes: back and forth, and nothing unchecked."""

from __future__ import annotations

import errno
import random
import struct
from array import array
from pathlib import Path

import pytest

from pyqsd.drivers.formats.qcow2 import bitmap_format as fmt
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2 import snapshots
from pyqsd.qapi.errors import Error
from tests.support import images

CLUSTER = 65536
DISK = 1 << 30


def bitmaps() -> list[fmt.StoredBitmap]:
    return [
        fmt.StoredBitmap("one", 16, 5 * CLUSTER, 1, 0),
        fmt.StoredBitmap("zwei\udcff", 9, 1 << 50, 4, fmt.FLAG_AUTO),
        fmt.StoredBitmap("x" * 1023, 31, 7 * CLUSTER, 1, fmt.FLAG_IN_USE | fmt.FLAG_AUTO),
    ]


def test_directory_round_trip() -> None:
    data = fmt.encode_directory(bitmaps())
    assert len(data) == sum(fmt.entry_bytes(one.name) for one in bitmaps())
    assert fmt.decode_directory(data, 3, CLUSTER, DISK) == bitmaps()
    assert fmt.encode_directory([]) == b""


def test_directory_of_qemu(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", DISK)
    for name, more in (("a", []), ("longer name", ["-g", "4096"]), ("ü", ["--disable"])):
        images.peers.run("qemu-img", "bitmap", "--add", *more, path, name)
    image = path.read_bytes()
    header = headers.decode(image[:CLUSTER])
    headers.decode_extensions(header, image[:CLUSTER])
    assert header.bitmaps is not None
    start = header.bitmaps.directory_offset
    data = image[start : start + header.bitmaps.directory_size]
    found = fmt.decode_directory(data, 3, CLUSTER, DISK)
    assert [(one.name, one.granularity_bits, one.flags) for one in found] == [
        ("a", 16, fmt.FLAG_AUTO),
        ("longer name", 12, fmt.FLAG_AUTO),
        ("ü", 16, 0),
    ]
    assert fmt.encode_directory(found) == data
    for one in found:
        assert one.table_entries == fmt.data_clusters(DISK, one.granularity_bits, CLUSTER)
        table = fmt.decode_table(image[one.table_offset : one.table_offset + one.table_entries * 8], CLUSTER)
        assert table == array("Q", [0] * one.table_entries)


def entry(
    offset: int = CLUSTER,
    entries: int = 1,
    flags: int = 0,
    kind: int = 1,
    bits: int = 16,
    name: bytes = b"n",
    extra: int = 0,
) -> bytes:
    data = struct.pack(">QIIBBHI", offset, entries, flags, kind, bits, len(name), extra) + bytes(extra) + name
    return data + bytes(-len(data) % 8)


CONSTRAINTS = "Bitmap 'n' doesn't satisfy the constraints"


@pytest.mark.parametrize(
    ("data", "count", "message"),
    [
        (entry(), 0, "More bitmaps found than specified in header extension"),
        (entry(), 2, "Less bitmaps found than specified in header extension"),
        (entry()[:-8], 1, "Broken bitmap directory"),
        (entry()[:23], 1, "Broken bitmap directory"),
        (entry(extra=8), 1, "Bitmap extra data is not supported"),
        (entry(name=b"x" * 1024), 1, f"Bitmap '{'x' * 1024}' doesn't satisfy the constraints"),
        (entry(offset=0), 1, CONSTRAINTS),
        (entry(offset=512), 1, CONSTRAINTS),
        (entry(offset=(1 << 64) - CLUSTER), 1, CONSTRAINTS),
        (entry(entries=0), 1, CONSTRAINTS),
        (entry(entries=0x8000001), 1, CONSTRAINTS),
        (entry(entries=8193), 1, CONSTRAINTS),
        (entry(kind=0), 1, CONSTRAINTS),
        (entry(bits=8), 1, CONSTRAINTS),
        (entry(bits=32), 1, CONSTRAINTS),
        (entry(flags=4), 1, CONSTRAINTS),
        (entry(bits=9, entries=3), 1, CONSTRAINTS),
    ],
)
def test_bad_directory(data: bytes, count: int, message: str) -> None:
    with pytest.raises(Error) as caught:
        fmt.decode_directory(data, count, CLUSTER, DISK)
    assert caught.value.desc == message


def test_one_in_use_may_have_another_size() -> None:
    data = entry(bits=9, entries=1, flags=fmt.FLAG_IN_USE)
    assert fmt.decode_directory(data, 1, CLUSTER, DISK)[0].in_use


def test_random_bytes_are_refused_or_read_back() -> None:
    rnd = random.Random(1)
    good = fmt.encode_directory(bitmaps())
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rnd.randrange(1, 4)):
            data[rnd.choice((rnd.randrange(80), rnd.randrange(len(data))))] = rnd.randrange(256)
        try:
            found = fmt.decode_directory(data, 3, CLUSTER, DISK)
        except Error as exc:
            assert exc.errno == errno.EINVAL
            continue
        assert fmt.decode_directory(fmt.encode_directory(found), 3, CLUSTER, DISK) == found


def test_table() -> None:
    table = array("Q", [0, fmt.ALL_ONES, 3 * CLUSTER, (1 << 56) - CLUSTER])
    assert fmt.decode_table(fmt.encode_table(table), CLUSTER) == table
    for bad in (2, 512, 3 * CLUSTER | 1, 1 << 56, 1 << 63):
        with pytest.raises(OSError, match="Invalid entry"):
            fmt.decode_table(fmt.encode_table(array("Q", [0, bad])), CLUSTER)


def test_directory_limits() -> None:
    with pytest.raises(Error, match="too large"):
        fmt.encode_directory([fmt.StoredBitmap("x", 16, CLUSTER, 1, 0)] * 65536)


def test_snapshot_table_round_trip(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", DISK)
    for name in ("one", "näme two", "x" * 200):
        images.peers.run("qemu-img", "snapshot", "-c", name, path)
    image = path.read_bytes()
    header = headers.decode(image[:CLUSTER])
    found = []
    at = header.snapshots_offset
    for index in range(header.nb_snapshots):
        size = snapshots.entry_bytes(image[at : at + snapshots.header_bytes()])
        found.append(snapshots.decode(image[at : at + size], index))
        at += size
    assert [one.name for one in found] == ["one", "näme two", "x" * 200]
    assert (
        snapshots.encode_table(found, DISK)
        == image[header.snapshots_offset :].ljust(1 << 16, b"\0")[: at - header.snapshots_offset]
    )


def test_snapshot_entry_keeps_what_is_unknown() -> None:
    one = snapshots.Snapshot(CLUSTER, 3, "7", "n\udcff", 1, 2, 3, 1 << 33, 4096, 5, b"unknown")
    data = snapshots.encode(one, DISK)
    one.entry_size = len(data)
    assert snapshots.decode(data, 0) == one
    assert snapshots.entry_bytes(data) == len(data)
    old = snapshots.Snapshot(CLUSTER, 3, "7", "n", 1, 2, 3, 4, None, None)
    assert snapshots.decode(snapshots.encode(old, DISK), 0).disk_size == DISK
    with pytest.raises(Error, match="too long"):
        snapshots.encode(snapshots.Snapshot(CLUSTER, 3, "7", "n" * 65536, 1, 2, 3, 4, None, None), DISK)
    with pytest.raises(Error, match="too big"):
        snapshots.encode_table([one] * 65537, DISK)
