"""Checking and repairing images that do not open otherwise; the judge is qemu-img check."""

from __future__ import annotations

import errno
import json
import random
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block.graph import Graph
from pyqsd.block.image_check import CheckResult
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.create import empty_image
from pyqsd.drivers.formats.qcow2.options import Options
from pyqsd.drivers.protocols.file import Options as FileOptions
from pyqsd.qapi.command import EventBus
from pyqsd.qapi.errors import Error
from tests.support import images, peers

from . import encrypted, mangled, test_check_repair, unopenable
from .crash import after_kill, after_power_cut
from .support import logged, opened, run

Sound = Callable[[str], bytes]

FIELDS = (
    "corruptions",
    "leaks",
    "check-errors",
    "corruptions-fixed",
    "leaks-fixed",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
)


def checked(path: Path, repair: str = "none", **options: Any) -> CheckResult:
    """Check an image that is opened only for that. Raises Error, OSError."""

    async def check() -> CheckResult:
        graph = Graph(EventBus())
        file = FileOptions(filename=str(path))
        try:
            async with graph.opened_for_check(Options(file=file, **options), repair != "none") as node:
                return await node.driver.check(repair)
        finally:
            assert not graph.nodes

    return run(check())


def numbers(found: CheckResult) -> dict[str, int]:
    """As qemu-img has them."""
    return {name: getattr(found, name.replace("-", "_")) for name in FIELDS}


def judged(path: Path, *args: str) -> dict[str, int] | str:
    """What qemu-img finds; or says, if it cannot look."""
    done = peers.run("qemu-img", "check", *args, "--output=json", "-f", "qcow2", path, ok=(0, 1, 2, 3))
    if not done.stdout.startswith("{"):
        return done.stderr
    found = json.loads(done.stdout)
    return {name: found.get(name, 0) for name in FIELDS}


def damaged(sound: Sound, path: Path, case: tuple[str, unopenable.Patch]) -> bytes:
    """Write a damaged image to `path`; its bytes."""
    kind, patch = case
    data = bytearray(sound(kind))
    patch(data)
    path.write_bytes(data)
    return bytes(data)


def assert_repaired(path: Path, sound: bytes, scratch: Path) -> None:
    """Everybody opens the image, nothing is wrong with it, and it has the content of the one that was sound."""
    images.assert_clean(path)
    before = scratch / "before.qcow2"
    before.write_bytes(sound)
    assert images.read_all(path, "qcow2", scratch / "raw") == images.read_all(before, "qcow2", scratch / "raw")

    async def use() -> None:
        async with opened(path) as node:
            found = bytes(await node.pread(0, node.length))
            # Also where the old tables were, now.
            await node.pwrite(0, found)
            await node.pwrite(node.length - 65536, b"x" * 65536)

    run(use())
    peers.run("qemu-io", "-f", "qcow2", "-c", "write 0 64k", path)
    images.assert_clean(path)


@pytest.mark.parametrize("name", unopenable.LIKE_QEMU_IMG)
def test_same_numbers_as_qemu_img(name: str, sound: Sound, tmp_path: Path) -> None:
    """What it repairs, and what it says that it has."""
    case = unopenable.LIKE_QEMU_IMG[name]
    path, other = tmp_path / "disk.qcow2", tmp_path / "other.qcow2"
    data = damaged(sound, path, case)
    right = judged(path)
    if isinstance(right, str):
        for repair in ("none", "leaks"):
            with pytest.raises(Error) as caught:
                checked(path, repair)
            assert caught.value.errno == errno.EFBIG
            said = caught.value.desc.removeprefix("Check failed: ").removesuffix('; "all" repairs that')
            assert said.lower() in right.lower() and "File too large" in right
            assert path.read_bytes() == data
    else:
        assert numbers(checked(path)) == right
        assert path.read_bytes() == data
    other.write_bytes(data)
    right = judged(other, "-r", "all")
    found = checked(path, "all")
    assert isinstance(right, dict)
    assert numbers(found) == right
    mine, theirs = images.info(path), images.info(other)
    assert mine.get("snapshots") == theirs.get("snapshots")
    assert mine["format-specific"] == theirs["format-specific"]
    assert_repaired(path, sound(case[0]), tmp_path)


@pytest.mark.parametrize("name", unopenable.BETTER_THAN_QEMU_IMG)
def test_repairs_beyond_qemu_img(name: str, sound: Sound, tmp_path: Path) -> None:
    case = unopenable.BETTER_THAN_QEMU_IMG[name]
    path = tmp_path / "disk.qcow2"
    data = damaged(sound, path, case)
    assert isinstance(judged(path), str)
    with pytest.raises(Error):
        run(open_and_close(path))
    if case[0] == "bitmaps" and not name.startswith("table-"):
        assert checked(path).findings["broken bitmap directories"] == 1
        with pytest.raises(Error, match='only "all" of the image can be repaired'):
            checked(path, "leaks")
    assert path.read_bytes() == data
    found = checked(path, "all")
    assert found.corruptions_fixed and not found.findings
    kept = [one["name"] for one in images.info(path)["format-specific"]["data"].get("bitmaps", [])]
    if case[0] in ("bitmaps", "small"):
        assert kept == unopenable.BITMAPS_LEFT.get(name, ["b0", "b1"])
    assert_repaired(path, sound(case[0]), tmp_path)


async def open_and_close(path: Path, **options: Any) -> None:
    async with opened(path, **options):
        pass


@pytest.mark.parametrize("name", unopenable.HOPELESS)
def test_what_nobody_opens(name: str, sound: Sound, tmp_path: Path) -> None:
    """The error is that of an ordinary open, and of qemu-img."""
    path = tmp_path / "disk.qcow2"
    data = damaged(sound, path, unopenable.HOPELESS[name])
    right = judged(path)
    assert isinstance(right, str)
    with pytest.raises(Error) as ordinary:
        run(open_and_close(path))
    for repair in ("none", "leaks", "all"):
        with pytest.raises(Error) as caught:
            checked(path, repair)
        assert caught.value.desc == ordinary.value.desc
        assert caught.value.desc.lower() in right.lower()
    assert path.read_bytes() == data


def test_extra_data_that_is_kept(sound: Sound, tmp_path: Path) -> None:
    """As much as there may be, byte for byte as qemu-img keeps it."""
    path, other = tmp_path / "disk.qcow2", tmp_path / "other.qcow2"
    other.write_bytes(damaged(sound, path, unopenable.LIKE_QEMU_IMG["extra-kept"]))
    checked(path, "all")
    judged(other, "-r", "all")
    tables = []
    for one in (path, other):
        data = one.read_bytes()
        tables.append(data[unopenable.snapshot_at(data, 0) : unopenable.snapshot_at(data, 3)])
        assert unopenable.u32(data, 60) == 3
    assert tables[0] == tables[1]
    assert len(tables[0]) > 2 * 1024


def test_too_many_snapshots(sound: Sound, tmp_path: Path) -> None:
    """All but as many as there may be go. Entries of nothing but zeroes are snapshots in version 2."""
    data = bytearray(sound("v2"))
    struct.pack_into(">IQ", data, 60, 70000, len(data))
    data += bytes(70000 * 40)
    path, other = tmp_path / "disk.qcow2", tmp_path / "other.qcow2"
    path.write_bytes(data)
    other.write_bytes(data)
    with pytest.raises(Error, match=r'^Check failed: Snapshot table too large; "all" repairs that$'):
        checked(path)
    assert numbers(checked(path, "all")) == judged(other, "-r", "all")
    assert unopenable.u32(path.read_bytes(), 60) == 65536


def test_far_too_many_snapshots(sound: Sound, tmp_path: Path) -> None:
    """Most of which would be beyond the end of the file; qemu-img makes that worse."""
    data = bytearray(sound("snapshots"))
    struct.pack_into(">I", data, 60, 0xFFFFFFFF)
    path = tmp_path / "disk.qcow2"
    path.write_bytes(data)
    found = checked(path, "all")
    # All but three of those that are left are incomplete; and one is the table itself.
    assert (found.corruptions_fixed, found.corruptions) == (0xFFFFFFFF - 3 + 1, 0)
    assert unopenable.u32(path.read_bytes(), 60) == 65536

    async def names() -> list[str]:
        async with opened(path) as node:
            assert await node.pread(0, node.length)
            return [one.name for one in node.driver.snapshot_list()]

    assert run(names()) == ["s0", "s1", "s2", *[""] * 65533]
    images.assert_clean(path)


def test_table_that_is_too_big(sound: Sound, tmp_path: Path) -> None:
    """Names of 64 KiB, up to more than 64 MiB of them; the last ones go, with all that they have."""
    data = bytearray(sound("plain"))
    start = len(data)
    assert start % 65536 == 0
    entry = struct.pack(">QIHHIIQII", 0, 0, 0xFFFF, 0xFFFF, 1, 2, 3, 0, 1024) + bytes(16)
    size = -(-(40 + 1024 + 2 * 0xFFFF) // 8) * 8
    count = (64 << 20) // size + 3
    struct.pack_into(">IQ", data, 60, count, start)
    path, other = tmp_path / "disk.qcow2", tmp_path / "other.qcow2"
    for one in (path, other):
        with one.open("wb") as file:
            file.write(data)
            for index in range(count):
                file.seek(start + index * size)
                file.write(entry)
            file.truncate(start + count * size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Error, match=r'^Check failed: Snapshot table is too big; "all" repairs that$'):
        checked(path)
    found = checked(path, "all")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10
    right = judged(other, "-r", "all")
    assert numbers(found) == right
    assert unopenable.u32(path.read_bytes()[60:64], 0) == unopenable.u32(other.read_bytes()[60:64], 0) == count - 3
    assert_repaired(path, sound("plain"), tmp_path)


def test_backing_file_is_not_needed(tmp_path: Path) -> None:
    base, path = images.create(tmp_path / "base.qcow2", "1M"), tmp_path / "top.qcow2"
    peers.run("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "qcow2", path)
    images.io(path, "write 0 64k")
    base.unlink()
    with path.open("r+b") as file:
        # A refcount that is too high.
        file.seek(0x20000 + 2 * 4)
        file.write(b"\0\2")
    found = checked(path)
    assert (found.leaks, found.corruptions) == (1, 1)
    found = checked(path, "leaks")
    assert (found.leaks, found.corruptions, found.leaks_fixed) == (0, 0, 1)
    assert images.info(path)["backing-filename"] == str(base)
    with pytest.raises(Error, match="No such file or directory"):
        checked(path, backing=FileOptions(filename=str(base)))


@pytest.mark.parametrize("method", encrypted.METHODS)
def test_key_is_not_needed(method: str, tmp_path: Path) -> None:
    path = encrypted.make(tmp_path / "secret.qcow2", 4 << 20, method)
    with path.open("r+b") as file:
        file.seek(56)
        file.write(bytes(4))
    found = checked(path, "all")
    assert found.corruptions_fixed and not found.findings
    assert not encrypted.check(path, method).get("corruptions")


def test_while_others_have_it(sound: Sound, tmp_path: Path) -> None:
    """Nobody may write while it is checked, nor read what is being repaired."""
    path = tmp_path / "disk.qcow2"
    path.write_bytes(sound("plain"))

    async def main() -> None:
        theirs, mine = Graph(EventBus()), Graph(EventBus())
        file = FileOptions(filename=str(path))
        await theirs.add(Options(node_name="q", file=file))
        with pytest.raises(Error, match='Failed to get shared "write" lock'):
            async with mine.opened_for_check(Options(file=file), repairs=False):
                pass
        async with mine.opened_for_check(Options(file=file, force_share=True), repairs=False) as node:
            assert not (await node.driver.check()).findings
        with pytest.raises(Error, match="force-share=on can only be used with read-only images"):
            async with mine.opened_for_check(Options(file=file, force_share=True), repairs=True):
                pass
        await theirs.close_all()
        await theirs.add(Options(node_name="q", file=file, read_only=True))
        async with mine.opened_for_check(Options(file=file), repairs=False) as node:
            assert not (await node.driver.check()).findings
        async with mine.opened_for_check(Options(file=file), repairs=True) as node:
            with pytest.raises(Error, match='Failed to get "write" lock'):
                await node.driver.check("all")
        await theirs.close_all()
        async with mine.opened_for_check(Options(file=file, read_only=True), repairs=True) as node:
            with pytest.raises(Error, match="Block node is read-only"):
                await node.driver.check("all")
        assert not mine.nodes

    run(main())
    assert path.read_bytes() == sound("plain")


def test_nobody_else_finds_it(sound: Sound, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(sound("plain"))

    async def main() -> None:
        graph = Graph(EventBus())
        file = FileOptions(filename=str(path))
        async with graph.opened_for_check(Options(node_name="q", file=file), repairs=True):
            assert graph.get("q") is None
            with pytest.raises(Error, match="Cannot find device='q' nor node-name='q'"):
                graph.find("q")
            with pytest.raises(Error, match="Duplicate nodes with node-name='q'"):
                await graph.add(Options(node_name="q", file=file))
        assert not graph.nodes

    run(main())


CRASHES = {
    name: {**unopenable.LIKE_QEMU_IMG, **unopenable.BETTER_THAN_QEMU_IMG}[name]
    for name in ("extra-second", "extra-huge", "extra-kept", "extra-v2", "no-reftable-snapshots", "count-1", "count-0")
} | {name: unopenable.BETTER_THAN_QEMU_IMG[name] for name in ("table-entry", "small-count")}


@pytest.mark.parametrize("name", CRASHES)
def test_crash_while_repairing(name: str, sound: Sound, tmp_path: Path) -> None:
    """Whatever is left either does not open, or has nothing wrong with it but leaks; and a second repair brings what
    the first one would have."""
    path = tmp_path / "disk.qcow2"
    image = damaged(sound, path, CRASHES[name])

    async def repair() -> list[tuple[Any, ...]]:
        graph = Graph(EventBus())
        below = logged(graph, image)
        async with graph.opened_for_check(Options(file=below.node.name), repairs=True) as node:
            assert not (await node.driver.check("all")).findings
        return list(below.log)

    log = run(repair())
    path.write_bytes(after_kill(image, log, len(log)))
    images.assert_clean(path)
    wanted = images.info(path)
    before = images.read_all(path, "qcow2", tmp_path / "raw")
    rnd = random.Random(name)
    for cut in sorted({*rnd.sample(range(len(log) + 1), min(len(log) + 1, 12)), len(log)}):
        for crashed in (after_kill(image, log, cut), after_power_cut(image, log, cut, rnd)):
            path.write_bytes(crashed)
            try:
                run(open_and_close(path))
            except Error:
                pass
            else:
                found = judged(path)
                assert isinstance(found, dict) and not found["corruptions"] and not found["check-errors"], cut
            path.write_bytes(crashed)
            assert not checked(path, "all").findings, cut
            images.assert_clean(path)
            assert images.read_all(path, "qcow2", tmp_path / "raw") == before
            now = images.info(path)
            assert now.get("snapshots") == wanted.get("snapshots")
            assert now["format-specific"] == wanted["format-specific"]


@pytest.mark.parametrize("name", ["extra-second", "count-1"])
def test_errors_while_repairing(name: str, sound: Sound, tmp_path: Path) -> None:
    """Every seventh request in turn fails; the repair then says so, and another one does it."""
    path = tmp_path / "disk.qcow2"
    image = damaged(sound, path, CRASHES[name])

    async def repair(nth: int) -> tuple[bytes, int, bool]:
        """The image, how many requests there were, and whether it was done."""
        count = 0

        def fault(kind: str) -> None:
            nonlocal count
            count += 1
            if count == nth:
                raise OSError(errno.EIO, "Input/output error")

        graph = Graph(EventBus())
        below = logged(graph, image)
        below.fault = fault
        done = True
        try:
            async with graph.opened_for_check(Options(file=below.node.name), repairs=True) as node:
                await node.driver.check("all")
        except (Error, OSError) as exc:
            assert exc.errno == errno.EIO
            done = False
        return bytes(below.data), count, done

    _, requests, done = run(repair(0))
    assert done
    failed = 0
    for nth in range(1, requests, 7):
        left, _, done = run(repair(nth))
        failed += not done
        path.write_bytes(left)
        assert not checked(path, "all").findings
        images.assert_clean(path)
    assert failed >= 5


def test_hostile_snapshots_and_bitmaps(tmp_path: Path) -> None:
    """Tens of thousands of tables that are all in the same place: the real program would read terabytes."""
    path = tmp_path / "disk.qcow2"
    size = 24 << 20
    header = headers.decode(empty_image(1 << 20))
    l1, table = 1 << 20, 16 << 20
    snapshot = struct.pack(">QIHHIIQII", l1, 1 << 20, 0, 0, 1, 2, 3, 0, 24) + bytes(24)
    bitmap = struct.pack(">QIIBBHI", table, 8192, 1, 1, 16, 6, 0)
    for many in ("snapshots", "bitmaps"):
        data = bytearray(empty_image(1 << 20)).ljust(size, b"\0")
        if many == "snapshots":
            count = 65536
            entries = snapshot * count
            header.nb_snapshots, header.snapshots_offset = count, table
        else:
            count = 65535
            entries = b"".join(bitmap + b"%06d\0\0" % number for number in range(count))
            header.nb_snapshots = header.snapshots_offset = 0
            header.bitmaps = headers.BitmapsExtension(count, len(entries), l1)
            header.autoclear = headers.AUTOCLEAR_BITMAPS
        at = table if many == "snapshots" else l1
        data[at : at + len(entries)] = entries
        area = headers.encode(header)
        data[: len(area)] = area
        path.write_bytes(data)
        began = time.process_time()
        with pytest.raises(OSError, match="too many tables"):
            checked(path, "all")
        if many == "snapshots":
            run(open_and_close(path, read_only=True))
        # A bound for a loaded machine: it takes three seconds.
        assert time.process_time() - began < 60
        assert path.read_bytes() == data


@pytest.mark.parametrize("seed", range(12))
def test_random_damage(seed: int, sound: Sound, tmp_path: Path) -> None:
    check_random_damage(tmp_path, sound, seed)


def check_random_damage(root: Path, sound: Sound, seed: int) -> None:
    """An image that does not open, with more that is wrong: the numbers are those of qemu-img, what is repaired is what
    we say, and what can be read before reads the same afterwards."""
    rnd = random.Random(seed)
    path = root / "disk.qcow2"
    name, (kind, patch) = rnd.choice(list((unopenable.LIKE_QEMU_IMG | unopenable.BETTER_THAN_QEMU_IMG).items()))
    data = bytearray(sound(kind))
    what = f"seed {seed}: {name}"
    areas, length = metadata_areas(data), len(data)
    if rnd.random() < 0.6:
        what += f"; {mangled.damage(data, seed)}"
    # It may have cut the file.
    cut = len(data)
    data += bytes(length - cut)
    patch(data)
    for _ in range(rnd.randrange(4)):
        start, stop = rnd.choice(areas)
        at = rnd.randrange(start, stop)
        old = data[at] if at < len(data) else 0
        data[at : at + 1] = bytes([rnd.choice((0, 1, 255, old ^ 1 << rnd.randrange(8), rnd.randrange(256)))])
        what += f"; byte {at:#x} was {old}"
    if cut < length:
        del data[cut:]
    path.write_bytes(data)
    try:
        found = numbers(checked(path))
    except (Error, OSError):
        found = None
    assert path.read_bytes() == data, what
    right = judged(path)
    if isinstance(right, dict):
        assert found == right, what
    try:
        before = test_check_repair.content(path)
    except (Error, OSError):
        before = {}
    try:
        repaired = checked(path, "all")
    except (Error, OSError):
        return
    after = judged(path)
    if not repaired.findings:
        assert isinstance(after, dict), what
        run(open_and_close(path))
    if isinstance(after, dict):
        assert (after["corruptions"], after["leaks"]) == (repaired.corruptions, repaired.leaks), what
        content = test_check_repair.content(path)
        assert all(content[at] == before[at] for at in content.keys() & before.keys()), what


def metadata_areas(data: bytes | bytearray) -> list[tuple[int, int]]:
    """Where the header of a sound image has its fields, and its tables of snapshots and bitmaps."""
    # But for the kind of encryption, which only takes a key.
    areas = [(24, 32), (36, 104)]
    if unopenable.u32(data, 60):
        areas.append((unopenable.snapshot_at(data, 0), unopenable.snapshot_at(data, unopenable.u32(data, 60))))
    if unopenable.u32(data, 4) >= 3 and data[95] & headers.AUTOCLEAR_BITMAPS:
        extension, directory = unopenable.extension_at(data, unopenable.BITMAPS), unopenable.directory_at(data)
        areas += [(extension - 8, extension + 24), (directory, directory + 64)]
    return areas
