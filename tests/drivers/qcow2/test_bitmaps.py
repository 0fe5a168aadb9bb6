"""Dirty bitmaps in the image: over reopening, with qemu-img, when the disk is full, and after a crash."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block import action
from pyqsd.block.bitmap_commands import (
    BlockDirtyBitmap,
    BlockDirtyBitmapAdd,
    block_dirty_bitmap_add,
    block_dirty_bitmap_remove,
)
from pyqsd.block.dirty_bitmap import DirtyBitmap
from pyqsd.block.graph import Graph
from pyqsd.block.internal_snapshots import InternalSnapshotAction, goto_snapshot, listed
from pyqsd.block.node import Node
from pyqsd.drivers.formats.qcow2 import bitmap_format as fmt
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.create import empty_image
from pyqsd.drivers.formats.qcow2.driver import Qcow2
from pyqsd.qapi.command import EventBus
from pyqsd.qapi.errors import Error
from tests.drivers.qcow2.crash import after_kill, after_power_cut
from tests.drivers.qcow2.support import NO_SPACE, close, open_logged, opened, run
from tests.support import images

MiB = 1 << 20


async def add(node: Node, name: str, granularity: int = 65536, *, disabled: bool = False) -> DirtyBitmap:
    options = BlockDirtyBitmapAdd(
        node=node.name, name=name, granularity=granularity, persistent=True, disabled=disabled
    )
    await block_dirty_bitmap_add(node.graph, options)
    return node.dirty_bitmaps[name]


async def remove(node: Node, name: str) -> None:
    await block_dirty_bitmap_remove(node.graph, BlockDirtyBitmap(node=node.name, name=name))


def on_disk(path: Path) -> dict[str, list[str]]:
    return {one["name"]: one["flags"] for one in images.info(path, "-U")["format-specific"]["data"].get("bitmaps", [])}


def granules(bitmap: DirtyBitmap) -> set[int]:
    size = bitmap.granularity
    return {at // size for start, length in bitmap.areas() for at in range(start // size * size, start + length, size)}


@pytest.mark.parametrize("creation", [{}, {"cluster_size": 512}, {"cluster_size": 16384, "extended_l2": True}])
def test_against_a_model(tmp_path: Path, creation: dict[str, Any]) -> None:
    """Random writes, bitmaps that come and go, and the image closed and opened in between."""
    size = 8 * MiB
    rnd = random.Random(len(creation))
    path = tmp_path / "disk"
    path.write_bytes(empty_image(size, **creation))
    model: dict[str, tuple[int, bool, set[int]]] = {}

    async def main() -> None:
        for number in range(12):
            async with opened(path) as node:
                assert (list(node.dirty_bitmaps) and set(node.dirty_bitmaps) == set(model)) or not model
                for name, (granularity, enabled, dirty) in model.items():
                    bitmap = node.dirty_bitmaps[name]
                    assert (bitmap.granularity, bitmap.enabled, granules(bitmap)) == (granularity, enabled, dirty), name
                    assert bitmap.persistent and not bitmap.readonly and not bitmap.inconsistent
                assert all("in-use" in flags for flags in on_disk(path).values())
                if rnd.random() < 0.7 and len(model) < 6:
                    granularity = rnd.choice((512, 4096, 65536, 1 << 20))
                    disabled = rnd.random() < 0.3
                    await add(node, f"b{number}", granularity, disabled=disabled)
                    model[f"b{number}"] = (granularity, not disabled, set())
                if rnd.random() < 0.2 and model:
                    gone = rnd.choice(sorted(model))
                    await remove(node, gone)
                    del model[gone]
                for _ in range(rnd.randrange(6)):
                    length = rnd.choice((512, 4096, 300_032, 3 * MiB))
                    offset = rnd.randrange(0, size - length, 512)
                    if rnd.random() < 0.8:
                        await node.pwrite(offset, b"x" * length)
                    else:
                        await node.pwrite_zeroes(offset, length)
                    for granularity, enabled, dirty in model.values():
                        if enabled:
                            dirty.update(range(offset // granularity, (offset + length - 1) // granularity + 1))
                for name in model:
                    if rnd.random() < 0.1:
                        granularity, enabled, dirty = model[name]
                        node.dirty_bitmaps[name].enabled = not enabled
                        model[name] = (granularity, not enabled, dirty)
                    if rnd.random() < 0.1:
                        node.dirty_bitmaps[name].clear()
                        model[name][2].clear()
            images.assert_clean(path)
            assert on_disk(path) == {name: ["auto"] if enabled else [] for name, (_, enabled, _) in model.items()}

    run(main())


def test_with_qemu_img(tmp_path: Path) -> None:
    """Ours are merged, enabled and removed by qemu-img, and theirs are used by us."""
    path = images.create(tmp_path / "disk", 64 * MiB)
    images.peers.run("qemu-img", "bitmap", "--add", path, "theirs")
    images.io(path, "write 0 1M", "write 33M 100k")

    async def first() -> None:
        async with opened(path) as node:
            assert granules(node.dirty_bitmaps["theirs"]) == {*range(16), 528, 529}
            await add(node, "ours")
            await add(node, "all", 4096)
            await node.pwrite(8 * MiB, b"x" * 65536)
            node.dirty_bitmaps["all"].mark(0, 64 * MiB)

    run(first())
    images.assert_clean(path)
    images.peers.run("qemu-img", "bitmap", "--merge", "ours", path, "theirs")
    images.peers.run("qemu-img", "bitmap", "--disable", path, "ours")
    images.peers.run("qemu-img", "bitmap", "--add", path, "fresh", "--merge", "all", "-g", "1M")
    images.assert_clean(path)

    async def second() -> None:
        async with opened(path, read_only=True, discard="ignore") as node:
            found = node.dirty_bitmaps
            assert granules(found["theirs"]) == {*range(16), 128, 528, 529}
            assert granules(found["ours"]) == {128}
            assert not found["ours"].enabled
            assert found["all"].count == 64 * MiB
            assert len(granules(found["fresh"])) == 64
            assert all(one.readonly for one in found.values())
            with pytest.raises(Error, match="is readonly and cannot be modified"):
                await remove(node, "ours")

    run(second())


def test_all_ones_and_all_zeroes_need_no_space(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", "4G", options="cluster_size=4k")

    async def main() -> None:
        async with opened(path) as node:
            bitmap = await add(node, "b", 512)
            bitmap.mark(0, 2 << 30)
            bitmap.mark((3 << 30) + 512, 512)

    run(main())
    images.assert_clean(path)
    data = path.read_bytes()
    header = headers.decode(data[:4096])
    headers.decode_extensions(header, data[:4096])
    assert header.bitmaps is not None
    at = header.bitmaps.directory_offset
    (one,) = fmt.decode_directory(data[at : at + header.bitmaps.directory_size], 1, 4096, 4 << 30)
    table = fmt.decode_table(data[one.table_offset : one.table_offset + one.table_entries * 8], 4096)
    assert one.table_entries == 256
    assert list(table[:128]) == [fmt.ALL_ONES] * 128
    assert sum(entry != 0 for entry in table[128:]) == 1

    async def again() -> None:
        async with opened(path) as node:
            assert list(node.dirty_bitmaps["b"].areas()) == [(0, 2 << 30), ((3 << 30) + 512, 512)]

    run(again())


def test_other_autoclear_bits_are_still_cleared(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", MiB)
    images.peers.run("qemu-img", "bitmap", "--add", path, "b")
    data = bytearray(path.read_bytes())
    data[88:96] = (int.from_bytes(data[88:96], "big") | 1 << 40).to_bytes(8, "big")
    path.write_bytes(data)

    async def main() -> None:
        async with opened(path) as node:
            await node.pwrite(0, b"x" * 512)

    run(main())
    assert int.from_bytes(path.read_bytes()[88:96], "big") == headers.AUTOCLEAR_BITMAPS
    assert on_disk(path) == {"b": ["auto"]}


def test_inconsistent_ones(tmp_path: Path) -> None:
    """After a crash they are shown, refuse everything, stay as they are, and can be removed."""
    path = images.create(tmp_path / "disk", 4 * MiB)

    async def crash() -> None:
        async with opened(path) as node:
            await add(node, "a")
            await add(node, "b")
        async with opened(path) as node:
            await node.pwrite(0, b"x" * 65536)
            await node.flush()
            (tmp_path / "crashed").write_bytes(path.read_bytes())

    run(crash())
    path = tmp_path / "crashed"
    images.assert_clean(path)

    async def main() -> None:
        async with opened(path) as node:
            for name in ("a", "b"):
                assert node.dirty_bitmaps[name].inconsistent
            with pytest.raises(Error, match="is inconsistent and cannot be used"):
                await node.truncate(8 * MiB)
            with pytest.raises(Error, match="Bitmap already exists: a"):
                await add(node, "a")
            await add(node, "new")
            await node.pwrite(0, b"y" * 65536)
        assert on_disk(path) == {"b": ["in-use", "auto"], "a": ["in-use", "auto"], "new": ["auto"]}
        async with opened(path) as node:
            await remove(node, "a")
            assert set(on_disk(path)) == {"b", "new"}
            await remove(node, "b")
            await node.truncate(8 * MiB)
        assert on_disk(path) == {"new": ["auto"]}
        async with opened(path) as node:
            assert node.dirty_bitmaps["new"].size == 8 * MiB
            assert granules(node.dirty_bitmaps["new"]) == {0}
            await remove(node, "new")
            assert on_disk(path) == {}

    run(main())
    images.assert_clean(path)
    assert path.read_bytes()[88:96] == bytes(8)


def test_resize_and_snapshots(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", 4 * MiB)

    async def main() -> None:
        async with opened(path) as node:
            await add(node, "b")
            await node.pwrite(3 * MiB, b"x" * MiB)
            await action.run(InternalSnapshotAction(node.graph, node.name, "s"))
            with pytest.raises(Error, match="Device has active dirty bitmaps"):
                await goto_snapshot(node.graph, node, listed(node)[0])
            await node.truncate(3 * MiB + 65536)
        async with opened(path) as node:
            assert granules(node.dirty_bitmaps["b"]) == {48}
            await node.truncate(16 * MiB)
            await node.pwrite(15 * MiB, b"x")
        async with opened(path) as node:
            assert granules(node.dirty_bitmaps["b"]) == {48, 240}

    run(main())
    images.assert_clean(path)


def test_full_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What cannot be stored is not lost without a word, and the image stays sound."""
    path = tmp_path / "disk"

    async def main(fail_at: int) -> tuple[bytes, bool]:
        node, below = await open_logged(empty_image(4 * MiB, cluster_size=4096))
        await add(node, "old", 512)
        await node.pwrite(0, b"x" * 8192)
        image = bytes(below.data)
        await close(node)
        image = bytes(below.data)
        node, below = await open_logged(image)
        await add(node, "new", 512)
        await node.pwrite(MiB, b"y" * 4096)
        await node.flush()
        left = fail_at
        failed = False

        def fault(kind: str) -> None:
            nonlocal left, failed
            if kind == "write":
                left -= 1
                if left == 0:
                    failed = True
                    raise OSError(NO_SPACE.errno, NO_SPACE.strerror)

        below.fault = fault
        try:
            await close(node)
        except (Error, OSError):
            pass
        return bytes(below.data), failed

    for fail_at in range(1, 60):
        data, failed = run(main(fail_at))
        said = "Lost persistent bitmaps during inactivation of node" in capfd.readouterr().err
        path.write_bytes(data)
        result = images.check(path)
        assert not result.get("corruptions") and not result.get("check-errors")
        flags = on_disk(path)
        assert images.read_all(path, "qcow2", tmp_path / "raw")[MiB : MiB + 4096] == b"y" * 4096
        if said:
            assert flags == {"old": ["in-use", "auto"]}
        else:
            assert flags == {"old": ["auto"], "new": ["auto"]}, fail_at
        if not failed:
            break
    else:
        raise AssertionError("it never succeeds")


def test_making_it_read_only_fails_when_the_disk_is_full() -> None:
    from pyqsd.block.reopen import set_read_only

    async def main() -> None:
        node, below = await open_logged(empty_image(4 * MiB, cluster_size=4096))
        bitmap = await add(node, "b", 512)
        await node.pwrite(0, b"x" * 8192)
        await node.flush()

        def fault(kind: str) -> None:
            if kind == "write":
                raise OSError(NO_SPACE.errno, NO_SPACE.strerror)

        below.fault = fault
        with pytest.raises(Error, match="Failed to write bitmap 'b' to file: No space left on device"):
            await set_read_only(node.graph, node, True)
        below.fault = None
        assert not node.read_only and not bitmap.readonly
        await node.pwrite(65536, b"x")
        await set_read_only(node.graph, node, True)
        assert bitmap.readonly
        driver = node.driver
        assert isinstance(driver, Qcow2)
        assert [one.flags for one in driver.image.bitmaps] == [fmt.FLAG_AUTO]
        await set_read_only(node.graph, node, False)
        assert not bitmap.readonly
        assert [one.flags for one in driver.image.bitmaps] == [fmt.FLAG_AUTO | fmt.FLAG_IN_USE]
        await node.pwrite(MiB, b"x")
        await close(node)
        again, _ = await open_logged(bytes(below.data))
        assert granules(again.dirty_bitmaps["b"]) == {*range(16), 128, 2048}
        await close(again)

    run(main())


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_crash(tmp_path: Path, cluster_size: int, power: bool) -> None:
    """The log of a life with bitmaps is cut everywhere: each is either right, or says that it is not."""
    size = 2 * MiB
    states: list[tuple[int, dict[str, set[int]]]] = []

    async def main() -> tuple[bytes, list[tuple[Any, ...]]]:
        from pyqsd.block.reopen import set_read_only

        initial = empty_image(size, cluster_size=cluster_size)
        node, below = await open_logged(initial)

        def note() -> None:
            states.append(
                (len(below.log), {one.name: granules(one.with_successor()) for one in node.dirty_bitmaps.values()})
            )

        rnd = random.Random(1)
        for step in range(7):
            note()
            if step < 3:
                await add(node, f"b{step}", 512 << step)
            if step == 3:
                await remove(node, "b1")
                note()
            if step == 4:
                # As in a transaction that fails.
                put_back = await node.driver.remove_bitmap("b2")
                note()
                await put_back()
                note()
            if step == 5:
                node.dirty_bitmaps.freeze(node.dirty_bitmaps["b0"])
                node.dirty_bitmaps.freeze(node.dirty_bitmaps["b2"])
            if step == 6:
                node.dirty_bitmaps.reclaim(node.dirty_bitmaps["b0"])
                node.dirty_bitmaps.abdicate(node.dirty_bitmaps["b2"])
                note()
            for _ in range(4):
                await node.pwrite(rnd.randrange(0, size - 65536, 512), rnd.randbytes(rnd.randrange(1, 65536)))
            await node.flush()
            note()
            await set_read_only(node.graph, node, True)
            note()
            await set_read_only(node.graph, node, False)
            note()
        await close(node)
        return initial, below.log

    image, log = run(main())
    rnd = random.Random(f"{cluster_size}{power}")
    path = tmp_path / "crashed"

    async def load(cut: int) -> None:
        async with opened(path, read_only=True, discard="ignore") as node:
            for name, bitmap in node.dirty_bitmaps.items():
                if bitmap.inconsistent:
                    continue
                # It holds what one of the states around the cut had.
                near = [index for index, (position, _) in enumerate(states) if position <= cut]
                window = states[max(near[-1] - 1, 0) : near[-1] + 3]
                assert granules(bitmap) in [state.get(name) for _, state in window], (cut, name)

    for cut in [*sorted(rnd.sample(range(1, len(log)), 40)), len(log)]:
        crashed = after_power_cut(image, log, cut, rnd) if power else after_kill(image, log, cut)
        path.write_bytes(crashed)
        result = images.check(path)
        assert not result.get("corruptions") and not result.get("check-errors"), (cut, result)
        run(load(cut))
    images.assert_clean(path)
    assert on_disk(path) == {"b0": ["auto"], "b2": ["auto"]}


def test_limits() -> None:
    async def main() -> None:
        node, _ = await open_logged(empty_image(16 << 40))
        driver = node.driver
        assert isinstance(driver, Qcow2)
        prefix = f"Can't make bitmap 'b' persistent in '{node.name}': "

        async def refused(text: str, granularity: int = 65536) -> None:
            with pytest.raises(Error) as caught:
                await driver.check_new_bitmap("b", granularity)
            assert caught.value.desc == prefix + text

        await refused("Too much space will be occupied by the bitmap. Use larger granularity", 512)
        driver.image.bitmaps = [fmt.StoredBitmap(f"{number}", 16, 65536, 1, 0) for number in range(65535)]
        await refused("Maximum number of persistent bitmaps is already reached")
        long = [f"{number}".ljust(1023, "x") for number in range(65000)]
        driver.image.bitmaps = [fmt.StoredBitmap(name, 16, 65536, 1, 0) for name in long]
        await refused("Not enough space in the bitmap directory")
        driver.image.bitmaps = []
        await close(node)
        old, _ = await open_logged(empty_image(MiB, version=2))
        with pytest.raises(Error, match="Cannot store dirty bitmaps in qcow2 v2 files"):
            await old.driver.check_new_bitmap("b", 65536)
        await close(old)

    run(main())


def test_a_large_disk(tmp_path: Path) -> None:
    """16 TiB with 64 KiB granules: tables are worked on in bulk."""
    path = images.create(tmp_path / "disk", "16T")
    rnd = random.Random(1)
    marks = [(rnd.randrange(0, 16 << 40, 65536), rnd.choice((65536, 1 << 30, 1 << 38))) for _ in range(300)]

    async def main() -> str:
        async with opened(path) as node:
            bitmap = await add(node, "b")
            for offset, length in marks:
                bitmap.mark(offset, min(length, (16 << 40) - offset))
            return bitmap.sha256()

    expected = run(main())
    images.assert_clean(path)

    async def again() -> str:
        async with opened(path, read_only=True, discard="ignore") as node:
            return node.dirty_bitmaps["b"].sha256()

    assert run(again()) == expected


def _entry(offset: int, entries: int, flags: int = 0, bits: int = 9, name: bytes = b"n") -> bytes:
    data = struct.pack(">QIIBBHI", offset, entries, flags, 1, bits, len(name), 0) + name
    return data + bytes(-len(data) % 8)


def test_hostile_claims_take_no_memory(tmp_path: Path) -> None:
    """Thousands of bitmaps that all refer to the same full clusters."""
    path = images.create(tmp_path / "disk", "1G", options="cluster_size=4k")
    images.peers.run("qemu-img", "bitmap", "--add", "-g", "512", path, "n")
    images.io(path, "write 0 8M")
    data = bytearray(path.read_bytes())
    header = headers.decode(data[:4096])
    headers.decode_extensions(header, data[:4096])
    assert header.bitmaps is not None
    count = 20_000
    data += bytes(-len(data) % 4096)
    directory = b"".join(_entry(len(data), 64, name=f"{number}".encode()) for number in range(count))
    at = len(data) + 4096
    assert at % 4096 == 0
    table = struct.pack(">Q", 4096 * 3) * 64
    data += table.ljust(4096, b"\0") + directory
    place = data.index(struct.pack(">I", headers.EXT_BITMAPS)) + 8
    data[place : place + 24] = struct.pack(">IIQQ", count, 0, len(directory), at)
    path.write_bytes(data)

    async def main() -> None:
        with pytest.raises(Error, match="Could not read bitmap"):
            async with opened(path, read_only=True):
                pass

    run(main())


@pytest.mark.parametrize("seed", range(4))
def test_hostile(tmp_path: Path, seed: int) -> None:
    """Mangled directories and tables: an error that users understand, never anything else."""
    path = images.create(tmp_path / "disk", MiB, options="cluster_size=1k")
    for name in ("one", "two"):
        images.peers.run("qemu-img", "bitmap", "--add", "-g", "512", path, name)
    images.io(path, "write -P 3 100k 100k")
    sound = path.read_bytes()
    header = headers.decode(sound[:1024])
    headers.decode_extensions(header, sound[:1024])
    assert header.bitmaps is not None
    rnd = random.Random(seed)
    directory = header.bitmaps.directory_offset
    spots = [directory, directory + 32, int.from_bytes(sound[directory : directory + 8], "big")]

    async def main() -> None:
        for _ in range(40):
            image = bytearray(sound)
            for _ in range(rnd.randrange(1, 3)):
                at = rnd.choice(spots) + rnd.randrange(32)
                image[at] = rnd.choice((0, 1, 2, 0x80, 0xFF, rnd.randrange(256)))
            try:
                node, _ = await open_logged(bytes(image), Graph(EventBus()))
            except (Error, OSError):
                continue
            try:
                await node.pwrite(0, b"x" * 4096)
                for name in list(node.dirty_bitmaps)[:1]:
                    await remove(node, name)
            except (Error, OSError):
                pass
            try:
                await close(node)
            except (Error, OSError):
                pass

    run(main())


def test_names_that_are_not_text(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", MiB)
    images.peers.run("qemu-img", "bitmap", "--add", path, "abc")
    data = path.read_bytes().replace(b"abc\0", b"\xff\xfe\xfd\0")
    path.write_bytes(data)

    async def main() -> None:
        async with opened(path) as node:
            (name,) = node.dirty_bitmaps
            assert name == "\ufffd" * 3
            await node.pwrite(0, b"x")
        assert b"\xff\xfe\xfd\0" in path.read_bytes()
        async with opened(path) as node:
            await remove(node, name)

    run(main())
    images.assert_clean(path)
