"""Mangled images: a clear error or an I/O error, never anything else, and never damage to what is sound."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block.driver import MAY_UNMAP
from pyqsd.block.events import BlockImageCorrupted
from pyqsd.block.graph import Graph
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.compression import unpack
from pyqsd.drivers.formats.qcow2.create import empty_image
from pyqsd.qapi.command import EventBus
from pyqsd.qapi.errors import Error
from tests.drivers.qcow2.support import close, events_of, open_logged, opened, run
from tests.support import images

MiB = 1 << 20


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small image with some of everything."""
    path = images.create(tmp_path_factory.mktemp("sound") / "disk", 2 * MiB, options="cluster_size=4k")
    images.io(path, "write -P 1 0 256k", "write -z 64k 16k", "write -c -P 3 512k 4k", "write -P 4 1M 64k")
    images.peers.run("qemu-img", "snapshot", "-c", "one", path)
    images.io(path, "write -P 5 0 16k")
    return path.read_bytes()


async def exercise(image: bytes, rnd: random.Random, **options: Any) -> None:
    """Open, use and close; only the errors that users understand may come out."""
    try:
        node, _ = await open_logged(image, **options)
    except (Error, OSError):
        return
    try:
        for _ in range(12):
            offset = rnd.randrange(0, max(1, min(node.length, 4 * MiB)), 512) if node.length else 0
            length = min(rnd.choice((512, 4096, 70_000)), node.length - offset)
            if length <= 0:
                break
            try:
                match rnd.randrange(6):
                    case 0 | 1:
                        await node.pread(offset, length)
                    case 2:
                        await node.pwrite(offset, bytes(length))
                    case 3:
                        await node.pwrite_zeroes(offset, length, rnd.choice((0, MAY_UNMAP)))
                    case 4:
                        await node.pdiscard(offset, length)
                    case 5:
                        await node.block_status_above(None, offset, length)
                if rnd.random() < 0.2:
                    await node.flush()
            except OSError:
                pass
        node.driver.image_info()
        node.driver.format_specific()
    finally:
        await close(node)


def test_random_damage(sound: bytes) -> None:
    """Bytes of the header, the tables and the refcounts are overwritten at random."""

    async def main() -> None:
        rnd = random.Random(11)
        for _ in range(500):
            image = bytearray(sound)
            for _ in range(rnd.choice((1, 1, 2, 6))):
                at = rnd.choice(
                    (rnd.randrange(160), rnd.randrange(16) * 4096 + rnd.randrange(600), rnd.randrange(65_536))
                )
                size = rnd.choice((1, 2, 4, 8))
                value = rnd.choice((bytes(size), b"\xff" * size, rnd.randbytes(size), b"\x80" + bytes(size - 1)))
                image[at : at + size] = value
            await exercise(bytes(image), rnd, read_only=rnd.random() < 0.3)

    run(main())


def test_every_header_field(sound: bytes) -> None:
    """Each field of the header gets each of the values that programs get wrong."""
    fields = [(4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8), (56, 4), (60, 4), (64, 8)]
    fields += [(72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1), (112, 4), (116, 4)]

    async def main() -> None:
        rnd = random.Random(5)
        for at, size in fields:
            top = 1 << (8 * size)
            for value in (0, 1, 7, 511, 512, 4095, 4096, len(sound), len(sound) + 4096, top >> 1, top - 1, top - 4096):
                image = bytearray(sound)
                image[at : at + size] = (value % top).to_bytes(size, "big")
                await exercise(bytes(image), rnd)

    run(main())


@pytest.mark.parametrize("length", [0, 3, 71, 72, 103, 112, 4095, 4096, 8192, 12_288, 20_000, 40_000])
def test_truncated(sound: bytes, length: int) -> None:
    run(exercise(sound[:length], random.Random(length)))


def test_huge_claims_take_no_memory(tmp_path: Path) -> None:
    """A header that claims the largest tables costs what QEMU's limits allow, and no more."""
    import resource

    image = bytearray(empty_image(MiB))
    struct.pack_into(">Q", image, 24, 1 << 51)
    struct.pack_into(">I", image, 36, headers.MAX_L1_BYTES // 8)
    struct.pack_into(">I", image, 56, headers.MAX_REFTABLE_BYTES >> 16)
    # Every entry of the L1 table refers to something.
    at = _l1(image)
    image[at:] = (1 << 63 | 1 << 20).to_bytes(8, "big") * (headers.MAX_L1_BYTES // 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(exercise(bytes(image), random.Random(1)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10


# --- what is found while the image is in use ----------------------------------------------------------------------


def _l1(image: bytes) -> int:
    return int.from_bytes(image[40:48], "big")


def _l2(image: bytes) -> int:
    at = _l1(image)
    return int.from_bytes(image[at : at + 8], "big") & 0x00FFFFFFFFFFFE00


def _entry(image: bytearray, index: int, change: Callable[[int], int]) -> None:
    at = _l2(image) + index * 8
    image[at : at + 8] = change(int.from_bytes(image[at : at + 8], "big")).to_bytes(8, "big")


def _plain() -> bytes:
    """1 MiB, the first 64 KiB of it written, 4 KiB clusters."""

    async def main() -> bytes:
        node, below = await open_logged(empty_image(MiB, cluster_size=4096))
        await node.pwrite(0, b"\1" * 65_536)
        await close(node)
        return bytes(below.data)

    return run(main())


def _find(image: bytes, read_only: bool, action: str) -> tuple[list[BlockImageCorrupted], bytes, int | None]:
    """Do something with the image: the corruption events, the image afterwards, the errno."""

    async def main() -> tuple[list[BlockImageCorrupted], bytes, int | None]:
        graph = Graph(EventBus())
        events = events_of(graph)
        node, below = await open_logged(image, graph, read_only=read_only)
        number = None
        try:
            if action == "read":
                await node.pread(4096, 512)
            elif action == "write":
                await node.pwrite(4096, b"x" * 512)
            elif action == "allocate":
                await node.pwrite(512 * 1024, b"x" * 512)
            elif action == "discard":
                await node.pdiscard(4096, 4096)
        except OSError as exc:
            number = exc.errno
            if node.driver.image.broken:  # type: ignore[attr-defined]
                with pytest.raises(OSError):
                    await node.pread(0, 512)
                with pytest.raises(OSError):
                    await node.pwrite(0, b"y" * 512)
        await close(node)
        return [event for event in events if isinstance(event, BlockImageCorrupted)], bytes(below.data), number

    return run(main())


UNALIGNED = "Cluster allocation offset {host:#x} unaligned (L2 offset: {l2:#x}, L2 index: 0x1)"


@pytest.mark.parametrize("action", ["read", "write", "discard"])
def test_unaligned_cluster(capsys: pytest.CaptureFixture[str], action: str) -> None:
    image = bytearray(_plain())
    _entry(image, 1, lambda entry: entry | 512)
    at = _l2(image) + 8
    host = int.from_bytes(image[at : at + 8], "big") & 0x00FFFFFFFFFFFE00
    events, after, number = _find(bytes(image), False, action)
    assert number == 5
    message = UNALIGNED.format(host=host, l2=_l2(image))
    assert [(e.msg, e.fatal, e.node_name, e.device, e.offset) for e in events] == [(message, True, "q1", "", None)]
    assert after[79] & headers.INCOMPAT_CORRUPT
    assert f"qcow2: Marking image as corrupt: {message}; further corruption events" in capsys.readouterr().err
    # A marked image is not opened for writing any more, but can be read.
    with pytest.raises(Error, match="qcow2: Image is corrupt; cannot be opened read/write"):
        run(open_logged(after))
    _find(after, True, "none")


def test_read_only_image_is_not_marked() -> None:
    image = bytearray(_plain())
    _entry(image, 1, lambda entry: entry | 512)
    events, after, number = _find(bytes(image), True, "read")
    assert number == 5
    assert [event.fatal for event in events] == [False]
    assert after == image


def test_unaligned_table() -> None:
    image = bytearray(_plain())
    at = _l1(image)
    image[at + 6] |= 2
    table = int.from_bytes(image[at : at + 8], "big") & 0x00FFFFFFFFFFFE00
    events, after, number = _find(bytes(image), False, "read")
    assert number == 5
    assert [event.msg for event in events] == [f"L2 table offset {table:#x} unaligned (L1 index: 0)"]
    assert after[79] & headers.INCOMPAT_CORRUPT


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (0, "qcow2_header"),
        (40, "active L1 table"),
        (48, "refcount table"),
        (-1, "active L2 table"),
        (-2, "refcount block"),
    ],
)
def test_write_to_metadata(where: int, name: str) -> None:
    """An entry that refers to a table: the write is refused, and the table stays as it was."""
    image = bytearray(_plain())
    if where == 0:
        # Offset 0 would be "unallocated": the cluster is free according to its refcount instead.
        block = int.from_bytes(image[(at := int.from_bytes(image[48:56], "big")) : at + 8], "big")
        image[block : block + 2] = bytes(2)
        action, target = "allocate", 0
    else:
        action = "write"
        if where == -1:
            target = _l2(image)
        elif where == -2:
            table = int.from_bytes(image[48:56], "big")
            target = int.from_bytes(image[table : table + 8], "big")
        else:
            target = int.from_bytes(image[where : where + 8], "big")
        _entry(image, 1, lambda entry: target | 1 << 63)
    events, after, number = _find(bytes(image), False, action)
    assert number == 5
    assert [e.msg for e in events] == [f"Preventing invalid write on metadata (overlaps with {name})"]
    assert [(e.offset, e.size, e.fatal) for e in events] == [(target, 4096, True)]
    assert after[target + 80 : target + 4096] == image[target + 80 : target + 4096]


@pytest.mark.parametrize("check", ["cached", "none"])
def test_header_looks_free(check: str) -> None:
    """Whatever the refcounts and the options say, nothing new goes into the first cluster."""
    image = bytearray(_plain())
    table = int.from_bytes(image[48:56], "big")
    block = int.from_bytes(image[table : table + 8], "big")
    image[block : block + 2] = bytes(2)

    async def main(offset: int) -> list[str]:
        graph = Graph(EventBus())
        events = events_of(graph)
        node, below = await open_logged(bytes(image), graph, overlap_check=check)
        with pytest.raises(OSError):
            await node.pwrite(offset, b"x" * 4096)
        assert below.data[:72] == image[:72]
        await close(node)
        return [event.msg for event in events if isinstance(event, BlockImageCorrupted)]

    assert run(main(512 * 1024)) == ["Preventing invalid write on metadata (overlaps with qcow2_header)"]
    # Without a table yet, it is the table that would go there.
    image[_l1(image) : _l1(image) + 8] = bytes(8)
    assert run(main(0)) == ["Preventing invalid allocation of L2 table at offset 0"]


def test_checks_can_be_switched_off() -> None:
    image = bytearray(_plain())
    target = _l2(image)
    _entry(image, 1, lambda entry: target | 1 << 63)

    async def main() -> bytes:
        node, below = await open_logged(bytes(image), overlap_check="none")
        await node.pwrite(4096, b"x" * 512)
        data = bytes(below.data)
        await close(node)
        return data

    assert run(main())[target : target + 512] == b"x" * 512


def test_zero_cluster_in_version_2() -> None:
    async def main() -> bytes:
        node, below = await open_logged(empty_image(MiB, cluster_size=4096, version=2))
        await node.pwrite(0, b"\1" * 65_536)
        await close(node)
        return bytes(below.data)

    image = bytearray(run(main()))
    _entry(image, 1, lambda entry: entry | 1)
    events, _, number = _find(bytes(image), False, "read")
    assert number == 5
    text = f"Zero cluster entry found in pre-v3 image (L2 offset: {_l2(image):#x}, L2 index: 0x1)"
    assert [event.msg for event in events] == [text]


def test_unaligned_refcount_block() -> None:
    image = bytearray(_plain())
    at = int.from_bytes(image[48:56], "big")
    image[at + 6] |= 2
    offset = int.from_bytes(image[at : at + 8], "big")
    events, _, number = _find(bytes(image), False, "allocate")
    assert number == 5
    assert [event.msg for event in events] == [f"Refblock offset {offset:#x} unaligned (reftable index: 0)"]


# --- compressed data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [headers.COMPRESSION_ZLIB, headers.COMPRESSION_ZSTD])
def test_compressed_garbage(kind: int) -> None:
    rnd = random.Random(kind)
    for _ in range(200):
        with pytest.raises(OSError):
            unpack(kind, rnd.randbytes(rnd.randrange(600)), 65_536)


def test_compression_bomb() -> None:
    """Only one cluster is unpacked, whatever more there is: zlib's is used, zstd's refused, as QSD does."""
    import zlib

    from backports import zstd

    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    bomb = packer.compress(bytes(64 * MiB)) + packer.flush()
    assert unpack(headers.COMPRESSION_ZLIB, bomb, 4096) == bytes(4096)
    for too_much in (4097, 64 * MiB):
        with pytest.raises(OSError, match="damaged"):
            unpack(headers.COMPRESSION_ZSTD, zstd.compress(bytes(too_much)), 4096)
    assert unpack(headers.COMPRESSION_ZSTD, zstd.compress(bytes(4096)) + b"garbage", 4096) == bytes(4096)


def test_compressed_data_may_end_with_the_file(tmp_path: Path) -> None:
    """The last sector of compressed data need not be whole in the file."""
    path = images.create(tmp_path / "disk", MiB)
    images.io(path, "write -c -P 9 0 64k")
    data = path.read_bytes()
    end = len(data)
    while data[end - 1] == 0:
        end -= 1
    path.write_bytes(data[:end])

    async def main() -> bytearray:
        async with opened(path, read_only=True) as node:
            return await node.pread(0, 65_536)

    assert run(main()) == b"\t" * 65_536
