"""Repairs: what qemu-img finds afterwards, what the content is, and what a crash leaves."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block.graph import Graph
from pyqsd.block.image_check import CheckResult
from pyqsd.block.node import Node
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.check import repairing
from pyqsd.drivers.formats.qcow2.create import empty_image
from pyqsd.drivers.formats.qcow2.driver import Qcow2
from pyqsd.drivers.formats.qcow2.options import Options
from pyqsd.drivers.protocols.file import Options as FileOptions
from pyqsd.qapi.command import EventBus
from pyqsd.qapi.errors import Error
from tests.support import images, peers

from . import mangled
from .crash import after_kill, after_power_cut
from .support import LogFile, Model, close, open_logged, opened, run

#: qemu-img loses the snapshots of an image with bitmaps when it repairs it.
COMPARABLE = [kind for kind, spec in mangled.KINDS.items() if not (spec[3] and spec[4])]


async def open_to_repair(path: Path) -> Node:
    """A read-only node over a file that may be written to, as for images that do not open otherwise."""
    graph = Graph(EventBus())
    await graph.add(FileOptions(node_name="f", filename=str(path)))
    try:
        return await graph.add(Options(node_name="q", file="f", read_only=True))
    except BaseException:
        await graph.close_all()
        raise


def repaired(path: Path, what: str) -> CheckResult | None:
    """Repair an image; None if it does not open, or cannot be checked."""

    async def repair() -> CheckResult | None:
        try:
            node = await open_to_repair(path)
        except Error:
            return None
        try:
            return await node.driver.check(what)
        except (OSError, Error):
            return None
        finally:
            await node.graph.close_all()

    return run(repair())


def content(path: Path) -> dict[int, bytes]:
    """What is read at each offset, where it can be, and where that is not metadata."""

    async def read() -> dict[int, bytes]:
        found = {}
        async with opened(path, read_only=True, overlap_check="all") as node:
            assert isinstance(node.driver, Qcow2)
            image = node.driver.image
            step = min(image.cluster_size, 65536)
            # The header may say that it is huge.
            for at in range(0, min(node.length, 32 << 20), step):
                try:
                    _, _, below, host = await node.driver.load_map(at, step)
                    if below is not None and image.meta.hit(host >> image.cluster_bits, 1):
                        continue
                    found[at] = bytes(await node.pread(at, step))
                except OSError:
                    continue
        return found

    return run(read())


def judged(path: Path, *args: str) -> dict[str, Any] | None:
    """What qemu-img says; None if it cannot check the image."""
    done = peers.run("qemu-img", "check", *args, "--output=json", "-f", "qcow2", path, ok=(0, 1, 2, 3))
    return json.loads(done.stdout) if done.stdout.startswith("{") else None


def check_repair(root: Path, kind: str, image: bytes, seed: int, what: str) -> bool:
    """Damage an image, repair it, and let qemu-img repair a copy. Returns whether it could be repaired."""
    data = bytearray(image)
    damage = f"seed {seed}: {mangled.damage(data, seed)}"
    mine, other = root / "mine.qcow2", root / "other.qcow2"
    mine.write_bytes(data)
    other.write_bytes(data)
    found = repaired(mine, what)
    if found is None:
        return False
    after = judged(mine)
    if after is None:
        return False
    assert after.get("corruptions", 0) == found.corruptions, damage
    assert after.get("leaks", 0) == found.leaks, damage
    assert after["check-errors"] == found.check_errors, damage
    if what == "all":
        # Other tables of the same image may be broken beyond repair; refcounts are not.
        assert not found.findings["clusters with a refcount that is too low"], damage
    if what == "all" or not found.check_errors:
        assert not found.leaks, damage
    if not found.corruptions and not found.check_errors:
        assert not mine.read_bytes()[79] & 3 or data[7] < 3, damage
    other_content = root / "before.qcow2"
    other_content.write_bytes(data)
    old, new = content(other_content), content(mine)
    for at in old.keys() & new.keys():
        assert old[at] == new[at], f"{damage}: content at {at:#x}"
    theirs = judged(other, "-r", what)
    if kind in COMPARABLE and theirs is not None and not found.findings.keys() & NOT_REPAIRED:
        assert found.corruptions <= theirs.get("corruptions", 0), damage
        assert found.check_errors <= theirs["check-errors"], damage
    return True


#: What we leave alone, and qemu-img does not always: tables that look like somebody's data.
NOT_REPAIRED = {
    "L2 tables that are not aligned to clusters",
    "wrong flags COPIED in L2 tables",
}


@pytest.mark.parametrize("kind", mangled.KINDS)
def test_repaired_as_well_as_by_qemu_img(kind: str, sound: Any, tmp_path: Path) -> None:
    image = sound(kind)
    assert sum(check_repair(tmp_path, kind, image, seed, "all") for seed in range(100, 105)) >= 2


@pytest.mark.parametrize("kind", ["plain", "snapshots", "four-bits", "small"])
def test_leaks(kind: str, sound: Any, tmp_path: Path) -> None:
    """Counts go down, and flags follow them where nothing else is wrong."""
    image = sound(kind)
    assert sum(check_repair(tmp_path, kind, image, seed, "leaks") for seed in range(200, 207)) >= 2


def test_broken_refcount_blocks_are_not_written_to(sound: Any, tmp_path: Path) -> None:
    """The L1 table is not taken for a refcount block with leaks."""
    image = bytearray(sound("snapshots"))
    image[(at := int.from_bytes(image[48:56], "big")) : at + 8] = image[40:48]
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)

    async def repair() -> None:
        node = await open_to_repair(path)
        with pytest.raises(Error, match='only "all" can be repaired'):
            await node.driver.check("leaks")
        await node.graph.close_all()

    run(repair())
    assert path.read_bytes() == image
    before = content(path)
    found = repaired(path, "all")
    assert found is not None and not found.corruptions and not found.leaks
    images.assert_clean(path)
    assert content(path) == before


def test_numbers_of_a_repair(sound: Any, tmp_path: Path) -> None:
    """A count that is too low, one that is too high, and a wrong flag: fixed as qemu-img does."""
    data = bytearray(sound("plain"))
    block = int.from_bytes(data[(table := int.from_bytes(data[48:56], "big")) : table + 8], "big")
    struct.pack_into(">H", data, block + 2 * 5, 0)
    struct.pack_into(">H", data, block + 2 * 6, 2)
    struct.pack_into(">H", data, block + 2 * 100, 1)
    l2 = mangled.Layout(bytes(data)).l2[3]
    data[l2] ^= 0x80
    results = []
    for name in ("mine", "other"):
        (tmp_path / name).write_bytes(data)
    found = repaired(tmp_path / "mine", "all")
    assert found is not None
    results.append((found.corruptions, found.leaks, found.leaks_fixed))
    theirs = images.check(tmp_path / "other", "qcow2", "-r", "all")
    results.append((theirs.get("corruptions", 0), theirs.get("leaks", 0), theirs["leaks-fixed"]))
    assert results[0] == results[1] == (0, 0, 1)
    assert found.corruptions_fixed == 2
    images.assert_clean(tmp_path / "mine")
    assert images.read_all(tmp_path / "mine", "qcow2", tmp_path / "r") == images.read_all(
        tmp_path / "other", "qcow2", tmp_path / "r"
    )


def test_incomplete_snapshot_table(sound: Any, tmp_path: Path) -> None:
    """Entries without the size of the disk get one, in a new table."""
    image = bytearray(sound("snapshots"))
    table = int.from_bytes(image[64:72], "big")
    entries = bytearray()
    at = table
    for _ in range(int.from_bytes(image[60:64], "big")):
        id_size, name_size = struct.unpack_from(">HH", image, at + 12)
        extra = int.from_bytes(image[at + 36 : at + 40], "big")
        struct.pack_into(">I", image, at + 36, 8)
        names = image[at + 40 + extra : at + 40 + extra + id_size + name_size]
        entry = image[at : at + 48] + names
        entries += entry + bytes(-len(entry) % 8)
        at += -(-(40 + extra + id_size + name_size) // 8) * 8
    image[table : table + 4096] = entries.ljust(4096, b"\0")
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    assert judged(path) is not None
    other = tmp_path / "other.qcow2"
    other.write_bytes(image)
    theirs = judged(other, "-r", "all")
    assert theirs is not None
    found = repaired(path, "all")
    assert found is not None
    assert (found.corruptions, found.corruptions_fixed) == (0, 3) == (0, theirs["corruptions-fixed"])
    images.assert_clean(path)
    assert [one["name"] for one in images.info(path)["snapshots"]] == ["s0", "s1", "s2"]
    for name in ("s0", "s2"):
        peers.run("qemu-img", "snapshot", "-a", name, path)
    images.assert_clean(path)


def test_image_marked_as_corrupt(sound: Any, tmp_path: Path) -> None:
    """It opens read-only; repaired over a file that may be written to it loses the mark, and opens again."""
    path = tmp_path / "corrupt.qcow2"
    data = bytearray(damaged(sound, "plain", "in-place"))
    data[79] |= headers.INCOMPAT_CORRUPT
    path.write_bytes(data)

    async def read_only_file() -> None:
        graph = Graph(EventBus())
        with pytest.raises(Error, match="Image is corrupt; cannot be opened read/write"):
            await graph.add(Options(node_name="q", file=FileOptions(filename=str(path))))
        node = await graph.add(Options(node_name="q", file=FileOptions(filename=str(path)), read_only=True))
        with pytest.raises(Error, match="read-only"):
            await node.driver.check("all")
        assert (await node.driver.check()).corruptions
        await graph.close_all()

    run(read_only_file())
    assert path.read_bytes() == data
    found = repaired(path, "all")
    assert found is not None and not found.corruptions
    assert not path.read_bytes()[79] & headers.INCOMPAT_CORRUPT
    images.assert_clean(path)

    async def write() -> None:
        async with opened(path) as node:
            await node.pwrite(0, b"new" * 1000)

    run(write())
    images.assert_clean(path)


@pytest.mark.parametrize("kind", ["snapshots", "bitmaps", "subclusters"])
@pytest.mark.parametrize("how", ["rebuild", "in-place"])
def test_node_goes_on_after_a_repair(kind: str, how: str, sound: Any, tmp_path: Path) -> None:
    """What it has in memory is that of the repaired image."""
    path = tmp_path / "disk.qcow2"
    path.write_bytes(damaged(sound, kind, how))

    async def use() -> None:
        async with opened(path) as node:
            before = bytes(await node.pread(0, node.length))
            found = await node.driver.check("all")
            assert found.corruptions_fixed and not found.corruptions
            model = Model(node, 3, initial=before)
            await model.workload(80, 4, 100_000)
            await model.verify()
            assert not (await node.driver.check("all")).findings

    run(use())
    images.assert_clean(path)
    found = images.info(path)
    assert [one["name"] for one in found.get("snapshots", [])] == [f"s{n}" for n in range(mangled.KINDS[kind][3])]
    bitmaps = found["format-specific"]["data"].get("bitmaps", [])
    assert sorted(one["name"] for one in bitmaps) == [f"b{n}" for n in range(mangled.KINDS[kind][4])]
    assert not any("in-use" in one["flags"] for one in bitmaps)
    for one in found.get("snapshots", []):
        peers.run("qemu-img", "snapshot", "-a", one["name"], path)


# --- crashes ----------------------------------------------------------------------------------------


def damaged(sound: Any, kind: str, how: str) -> bytes:
    """An image whose refcounts must be made anew, or are wrong in place."""
    data = bytearray(sound(kind))
    table = int.from_bytes(data[48:56], "big")
    block = int.from_bytes(data[table : table + 8], "big")
    if how == "rebuild":
        data[table : table + 8] = bytes(8)
    else:
        rnd = random.Random(1)
        for at in range(block + 1, block + 64):
            data[at] = rnd.choice((0, data[at], 255))
    return bytes(data)


@pytest.mark.parametrize("how", ["rebuild", "in-place"])
@pytest.mark.parametrize("kind", ["snapshots", "small", "one-bit", "subclusters"])
def test_crash_while_repairing(kind: str, how: str, sound: Any, tmp_path: Path) -> None:
    """Whatever is left can be repaired again, and the content is there."""
    image = damaged(sound, kind, how)
    path = tmp_path / "disk.qcow2"

    async def repair() -> list[tuple[Any, ...]]:
        node, below = await open_logged(image)
        assert not (await node.driver.check("all")).findings
        await close(node)
        return list(below.log)

    log = run(repair())
    assert [entry for entry in log if entry[0] == "write"]
    path.write_bytes(image)
    before = content(path)
    rnd = random.Random(5)
    cuts = sorted({*rnd.sample(range(len(log) + 1), min(len(log) + 1, 8)), len(log)})
    for cut in cuts:
        for crashed in (after_kill(image, log, cut), after_power_cut(image, log, cut, rnd)):
            path.write_bytes(crashed)
            assert content(path) == before
            found = repaired(path, "all")
            assert found is not None and not found.corruptions and not found.leaks, cut
            images.assert_clean(path)
            assert content(path) == before


# --- refcounts of another width -----------------------------------------------------------------------


def filled(**how: Any) -> tuple[bytes, bytes]:
    """An image and its content."""

    async def make() -> tuple[bytes, bytes]:
        node, below = await open_logged(empty_image(2 << 20, **how))
        model = Model(node, 7)
        await model.workload(60, 2, 100_000)
        await close(node)
        return bytes(below.data), bytes(model.content)

    return run(make())


async def change_width(image: bytes, order: int) -> LogFile:
    node, below = await open_logged(image)
    assert isinstance(node.driver, Qcow2)
    await repairing.change_refcount_width(node.driver.image, order)
    # It can be used at once.
    await node.pwrite(1 << 20, b"after" * 1000)
    await node.flush()
    await close(node)
    return below


@pytest.mark.parametrize("order", range(7))
@pytest.mark.parametrize("old", [0, 4, 6])
def test_change_refcount_width(old: int, order: int, tmp_path: Path) -> None:
    how = {"cluster_size": 512} if order % 2 else {"cluster_size": 4096}
    image, plain = filled(refcount_bits=1 << old, **how)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(run(change_width(image, order)).data)
    assert images.info(path)["format-specific"]["data"]["refcount-bits"] == 1 << order
    images.assert_clean(path)
    wanted = bytearray(plain)
    wanted[1 << 20 : (1 << 20) + 5000] = b"after" * 1000
    assert images.read_all(path, "qcow2", tmp_path / "raw") == wanted
    # The judge does the same, and there and back.
    peers.run("qemu-img", "amend", "-f", "qcow2", "-o", "refcount_bits=16", path)
    images.assert_clean(path)


@pytest.mark.parametrize(("kind", "order"), [("snapshots", 0), ("snapshots", 1), ("v2", 3)])
def test_width_that_is_refused(kind: str, order: int, sound: Any, tmp_path: Path) -> None:
    image = sound(kind)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    judge = peers.run("qemu-img", "amend", "-f", "qcow2", "-o", f"refcount_bits={1 << order}", path, ok=(1,))

    async def main() -> str:
        node, below = await open_logged(image)
        assert isinstance(node.driver, Qcow2)
        with pytest.raises(Error) as caught:
            await repairing.change_refcount_width(node.driver.image, order)
        assert not below.log
        await close(node)
        return caught.value.desc

    assert judge.stderr == f"qemu-img: {run(main())}\n"


def test_crash_while_the_width_changes(tmp_path: Path) -> None:
    image, plain = filled(cluster_size=512)
    path = tmp_path / "disk.qcow2"

    async def change() -> list[tuple[Any, ...]]:
        node, below = await open_logged(image)
        assert isinstance(node.driver, Qcow2)
        await repairing.change_refcount_width(node.driver.image, 6)
        return list(below.log)

    log = run(change())
    rnd = random.Random(2)
    widths = set()
    for cut in {*rnd.sample(range(len(log)), min(len(log), 10)), len(log)}:
        for crashed in (after_kill(image, log, cut), after_power_cut(image, log, cut, rnd)):
            path.write_bytes(crashed)
            images.assert_clean(path)
            assert images.read_all(path, "qcow2", tmp_path / "raw") == plain
            widths.add(images.info(path)["format-specific"]["data"]["refcount-bits"])
    assert widths == {16, 64}
