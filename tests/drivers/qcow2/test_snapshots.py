"""Internal snapshots: taken, deleted and gone back to: against a model, judged by qemu-img, and after a crash."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block import action
from pyqsd.block.graph import Graph
from pyqsd.block.internal_snapshots import InternalSnapshotAction, delete_snapshot, goto_snapshot, listed
from pyqsd.block.node import Node
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.create import empty_image
from pyqsd.drivers.formats.qcow2.driver import Qcow2
from pyqsd.qapi.command import EventBus
from pyqsd.qapi.errors import Error
from tests.drivers.qcow2.crash import after_kill, after_power_cut
from tests.drivers.qcow2.support import Model, close, open_logged, opened, run
from tests.support import images

MiB = 1 << 20


async def take(node: Node, name: str) -> None:
    await action.run(InternalSnapshotAction(node.graph, node.name, name))


async def drop(node: Node, name: str) -> None:
    await delete_snapshot(node.graph, node, next(one for one in listed(node) if one.name == name))


async def back(node: Node, name: str) -> None:
    await goto_snapshot(node.graph, node, next(one for one in listed(node) if one.name == name))


def content_at(path: Path, name: str, scratch: Path) -> bytes:
    """What qemu-img says that a snapshot holds."""
    images.peers.run("qemu-img", "convert", "-l", f"snapshot.name={name}", "-f", "qcow2", "-O", "raw", path, scratch)
    return scratch.read_bytes()


async def shown(path: Path, name: str) -> bytes:
    """What our own option shows."""
    async with opened(path, backing=None, read_only=True, discard="ignore", x_snapshot=name) as node:
        return bytes(await node.pread(0, node.length))


VARIANTS: dict[str, dict[str, Any]] = {
    "64k": {},
    "512": {"cluster_size": 512},
    "4k": {"cluster_size": 4096},
    "v2": {"version": 2, "cluster_size": 4096},
    "extended": {"cluster_size": 16384, "extended_l2": True},
    "lazy": {"lazy_refcounts": True, "cluster_size": 4096},
    "2bit": {"refcount_bits": 2, "cluster_size": 4096},
    "4bit": {"refcount_bits": 4, "cluster_size": 4096},
    "8bit": {"refcount_bits": 8, "cluster_size": 4096},
    "32bit": {"refcount_bits": 32, "cluster_size": 4096},
    "64bit": {"refcount_bits": 64, "cluster_size": 4096},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_against_a_model(tmp_path: Path, name: str) -> None:
    """Random requests, and snapshots taken, deleted and gone back to in between."""
    creation = VARIANTS[name]
    size = 2 * MiB
    most = 2 if name == "2bit" else 4

    async def main() -> tuple[bytes, dict[str, bytes], bytes]:
        node, below = await open_logged(empty_image(size, **creation), l2_cache_size=16384, refcount_cache_size=16384)
        model = Model(node, len(name))
        taken: dict[str, bytes] = {}
        rnd = random.Random(name)
        number = 0
        for _ in range(14):
            await model.workload(16, 2, 100_000)
            action = rnd.random()
            if (action < 0.5 or not taken) and len(taken) < most:
                number += 1
                await take(node, f"s{number}")
                taken[f"s{number}"] = bytes(model.content)
            elif action < 0.75:
                gone = rnd.choice(sorted(taken))
                await drop(node, gone)
                del taken[gone]
            elif len(taken) < most + (name != "2bit"):
                chosen = rnd.choice(sorted(taken))
                await back(node, chosen)
                model.content[:] = taken[chosen]
            await model.verify()
        await close(node)
        return bytes(below.data), taken, bytes(model.content)

    image, taken, content = run(main())
    path = tmp_path / "disk"
    path.write_bytes(image)
    images.assert_clean(path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == content
    assert {one["name"] for one in images.info(path).get("snapshots", [])} == set(taken)
    for one, expected in taken.items():
        assert content_at(path, one, tmp_path / "raw") == expected, one
        assert run(shown(path, one)) == expected, one
    for one in taken:
        images.peers.run("qemu-img", "snapshot", "-d", one, path)
        images.assert_clean(path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == content


def test_with_those_of_qemu(tmp_path: Path) -> None:
    """Compressed, zero and preallocated clusters; snapshots made by one, deleted and applied by the other."""
    path = images.create(tmp_path / "disk", 4 * MiB, options="cluster_size=4k")
    images.io(path, "write -P 1 0 1M", "write -z 64k 64k", "write -c -P 3 2M 16k", "write -c -P 9 3M 4k")
    images.peers.run("qemu-img", "snapshot", "-c", "theirs", path)
    first = images.read_all(path, "qcow2", tmp_path / "raw")
    images.io(path, "write -P 2 512k 1M", "discard 128k 64k", "write -P 7 2M 4k")
    second = images.read_all(path, "qcow2", tmp_path / "raw")

    async def main() -> bytes:
        async with opened(path) as node:
            await take(node, "ours")
            await node.pwrite(0, b"x" * 300_000)
            await node.pdiscard(MiB, MiB)
            third = bytes(await node.pread(0, node.length))
            await take(node, "third")
            await back(node, "theirs")
            assert await node.pread(0, node.length) == first
            await node.pwrite(2 * MiB, b"y" * 65536)
            await back(node, "third")
            assert await node.pread(0, node.length) == third
            return third

    third = run(main())
    images.assert_clean(path)
    for name, content in (("theirs", first), ("ours", second), ("third", third)):
        assert content_at(path, name, tmp_path / "raw") == content
        assert run(shown(path, name)) == content
    images.peers.run("qemu-img", "snapshot", "-a", "ours", path)
    images.peers.run("qemu-img", "snapshot", "-d", "third", path)
    images.assert_clean(path)

    async def end() -> None:
        async with opened(path) as node:
            assert await node.pread(0, node.length) == second
            await drop(node, "theirs")
            await drop(node, "ours")
            assert await node.pread(0, node.length) == second
            assert listed(node) == []

    run(end())
    images.assert_clean(path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == second
    assert int.from_bytes(path.read_bytes()[60:64], "big") == 0


def test_disk_sizes(tmp_path: Path) -> None:
    """A snapshot has a size of its own."""
    path = images.create(tmp_path / "disk", MiB, options="cluster_size=512")
    images.io(path, "write -P 1 0 1M")

    async def main() -> None:
        async with opened(path) as node:
            await take(node, "small")
            await node.truncate(20 * MiB)
            await node.pwrite(19 * MiB, b"z" * 4096)
            await take(node, "large")
            await node.truncate(MiB // 2)
            await back(node, "large")
            assert node.length == 20 * MiB
            assert await node.pread(19 * MiB, 4096) == b"z" * 4096
            assert await node.pread(0, MiB) == b"\1" * (MiB // 2) + b"\1" * (MiB // 2)
            await back(node, "small")
            assert node.length == MiB
            assert await node.pread(0, MiB) == b"\1" * MiB
        assert len(await shown(path, "large")) == 20 * MiB
        assert await shown(path, "2") == await shown(path, "large")

    run(main())
    images.assert_clean(path)
    images.peers.run("qemu-img", "snapshot", "-a", "large", path)
    images.io(path, "read -P 0x7a 19M 4k")
    images.assert_clean(path)


def test_what_an_entry_says(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", MiB)
    image = bytearray(path.read_bytes())
    path.write_bytes(image)
    for name in ("a", "b"):
        images.peers.run("qemu-img", "snapshot", "-c", name, path)
    data = bytearray(path.read_bytes())
    at = int.from_bytes(data[64:72], "big")
    # The state of a machine, and a value for icount.
    data[at + 32 : at + 36] = (4096).to_bytes(4, "big")
    data[at + 40 : at + 48] = (1 << 40).to_bytes(8, "big")
    data[at + 56 : at + 64] = (77).to_bytes(8, "big")
    path.write_bytes(data)

    async def main() -> None:
        async with opened(path) as node:
            await take(node, "x" * 300)
            await drop(node, "b")
            await take(node, "näme")

    run(main())
    found = images.info(path)["snapshots"]
    assert [(one["id"], one["name"], one["vm-state-size"], one.get("icount")) for one in found] == [
        ("1", "a", 1 << 40, 77),
        ("3", "x" * 255, 0, None),
        ("4", "näme", 0, None),
    ]
    images.assert_clean(path)


def test_one_bit_is_not_enough(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", 4 * MiB, options="refcount_bits=1,cluster_size=4k")
    images.io(path, "write -P 1 0 3M")

    async def main() -> None:
        async with opened(path) as node:
            with pytest.raises(Error, match="Failed to create snapshot 's' on device 'q': Invalid argument"):
                await take(node, "s")
            assert listed(node) == []
            await node.pwrite(MiB, b"2" * MiB)

    run(main())
    images.assert_clean(path)
    assert not images.info(path)["dirty-flag"]
    images.io(path, "read -P 1 0 1M", "read -P 0x32 1M 1M")


def test_a_count_that_would_be_too_large_in_a_later_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was raised before is lowered again."""
    from pyqsd.drivers.formats.qcow2 import bulk

    monkeypatch.setattr(bulk, "_BATCH", 16)
    path = images.create(tmp_path / "disk", 4 * MiB, options="refcount_bits=2,cluster_size=4k")
    images.io(path, "write -P 1 0 3M")

    async def main() -> None:
        async with opened(path) as node:
            await take(node, "one")
            await node.pwrite(0, b"a" * 2 * MiB)
            await take(node, "two")
            with pytest.raises(Error, match="Invalid argument"):
                await take(node, "three")
            await drop(node, "one")
            await take(node, "three")

    run(main())
    images.assert_clean(path)


@pytest.mark.parametrize("kind", ["write", "flush", "read"])
def test_faults(tmp_path: Path, kind: str) -> None:
    """Whichever request fails, nothing is worse than leaked, and the content stays."""
    image = empty_image(MiB, cluster_size=4096)
    path = tmp_path / "disk"

    async def main(fail_at: int, operation: str) -> tuple[bytes, bool]:
        node, below = await open_logged(image)
        await node.pwrite(0, b"1" * 300_000)
        await take(node, "one")
        await node.pwrite(100_000, b"2" * 300_000)
        await node.flush()
        left = fail_at

        def fault(what: str) -> None:
            nonlocal left
            if what == kind:
                left -= 1
                if left == 0:
                    raise OSError(errno.EIO, "Input/output error")

        below.fault = fault
        failed = False
        try:
            await {"take": take, "drop": drop, "back": back}[operation](node, "two" if operation == "take" else "one")
        except (Error, OSError):
            failed = True
        below.fault = None
        if operation != "back":
            assert await node.pread(0, 400_000) == b"1" * 100_000 + b"2" * 300_000
        await node.pwrite(500_000, b"3" * 4096)
        await node.flush()
        await close(node)
        return bytes(below.data), failed

    for operation in ("take", "drop", "back"):
        for fail_at in range(1, 200):
            data, failed = run(main(fail_at, operation))
            if not failed:
                break
            path.write_bytes(data)
            result = images.check(path)
            # Flags that disagree with their counts cost a copy; nothing else may be wrong.
            images.peers.run("qemu-img", "check", "-q", "-r", "all", path, ok=(0, 2, 3))
            images.assert_clean(path)
            assert not result.get("check-errors"), (operation, fail_at, result)
            content = images.read_all(path, "qcow2", tmp_path / "raw")
            assert content[500_000:504_096] == b"3" * 4096
            if operation != "back":
                assert content[:400_000] == b"1" * 100_000 + b"2" * 300_000
            if operation == "take":
                assert content_at(path, "one", tmp_path / "raw")[:400_000] == b"1" * 300_000 + bytes(100_000)
        else:
            raise AssertionError("it never succeeds")


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize("name", ["4k", "512", "v2", "extended"])
def test_crash(tmp_path: Path, name: str, power: bool) -> None:
    """The log of taking, deleting and going back is cut everywhere."""
    creation = VARIANTS[name]
    image = empty_image(MiB, **creation)
    states: list[tuple[int, dict[str, bytes], bytes]] = []

    async def main() -> list[tuple[Any, ...]]:
        node, below = await open_logged(image)
        model = Model(node, 3)
        taken: dict[str, bytes] = {}

        def done() -> None:
            states.append((len(below.log), dict(taken), bytes(model.content)))

        done()
        for step in ("take a", "take b", "back a", "take c", "drop a", "drop c", "back b", "drop b"):
            await model.workload(6, 1, 60_000, 0)
            await node.flush()
            done()
            action, which = step.split()
            await {"take": take, "drop": drop, "back": back}[action](node, which)
            if action == "take":
                taken[which] = bytes(model.content)
            elif action == "drop":
                del taken[which]
            else:
                model.content[:] = taken[which]
            done()
        await close(node)
        done()
        return below.log

    log = run(main())
    rnd = random.Random(f"{name}{power}")
    operations = [
        n for (start, _, _), (end, _, _) in zip(states[1::2], states[2::2], strict=False) for n in range(start, end)
    ]
    path = tmp_path / "crashed"
    for cut in [*sorted(rnd.sample(operations, 30)), len(log)]:
        crashed = after_power_cut(image, log, cut, rnd) if power else after_kill(image, log, cut)
        path.write_bytes(crashed)
        if images.info(path).get("dirty-flag"):
            images.peers.run("qemu-img", "check", "-q", "-r", "all", path, ok=(0, 2, 3))
        result = images.check(path)
        if name != "v2":
            assert not result.get("corruptions"), (cut, result)
        assert not result.get("check-errors"), (cut, result)
        # Either what was before the operation, or what was after it.
        content = images.read_all(path, "qcow2", tmp_path / "raw")
        number = max(index for index, (start, _, _) in enumerate(states) if start <= cut)
        names = {one["name"] for one in images.info(path).get("snapshots", [])}
        possible = [state for state in states[number : number + 2] if set(state[1]) == names and state[2] == content]
        assert possible, (cut, number, names)
        for one, expected in possible[0][1].items():
            assert content_at(path, one, tmp_path / "raw") == expected, (cut, one)
        # Life goes on after it, on the image as it is.
        images.io(path, "write -P 5 0 512k")
        for one, expected in possible[0][1].items():
            assert content_at(path, one, tmp_path / "raw") == expected, (cut, one)


def test_our_own_option_is_read_only(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", MiB)
    images.peers.run("qemu-img", "snapshot", "-c", "one", path)

    async def fails(message: str, **options: Any) -> None:
        with pytest.raises(Error, match=message):
            async with opened(path, **options):
                pass

    async def main() -> None:
        await fails("can only be used with read-only=on", x_snapshot="one")
        await fails("Can't find snapshot 'two'", x_snapshot="two", read_only=True)
        async with opened(path, x_snapshot="1", auto_read_only=True) as node:
            assert node.read_only
            with pytest.raises(Error):
                await take(node, "x")

    run(main())


@pytest.mark.parametrize("seed", range(6))
def test_hostile(tmp_path: Path, seed: int) -> None:
    """Mangled snapshot tables, L1 and L2 tables: an error that users understand, never anything else."""
    path = images.create(tmp_path / "disk", MiB, options="cluster_size=1k")
    images.io(path, "write -P 1 0 700k", "write -c -P 2 800k 8k")
    for name in ("one", "two"):
        images.peers.run("qemu-img", "snapshot", "-c", name, path)
        images.io(path, "write -P 3 100k 100k")
    sound = path.read_bytes()
    header = headers.decode(sound[:1024])
    rnd = random.Random(seed)

    async def main() -> None:
        for _ in range(25):
            image = bytearray(sound)
            spots = [
                header.snapshots_offset,
                header.l1_offset,
                int.from_bytes(sound[header.snapshots_offset :][:8], "big"),
            ]
            spots.append(int.from_bytes(sound[header.l1_offset :][:8], "big") & 0xFFFFFFFFFFFE00)
            for _ in range(rnd.randrange(1, 4)):
                at = rnd.choice(spots) + rnd.randrange(160)
                image[at] = rnd.choice((0, 1, 0x40, 0x80, 0xFF, rnd.randrange(256)))
            try:
                node, _ = await open_logged(bytes(image), Graph(EventBus()))
            except (Error, OSError):
                continue
            for _ in range(4):
                names = [one.name for one in listed(node)]
                try:
                    match rnd.randrange(3):
                        case 0:
                            await take(node, f"n{rnd.random()}")
                        case 1 if names:
                            await drop(node, rnd.choice(names))
                        case 2 if names:
                            await back(node, rnd.choice(names))
                    await node.pwrite(rnd.randrange(0, 600_000, 512), bytes(4096))
                except (Error, OSError):
                    pass
            try:
                await close(node)
            except (Error, OSError):
                pass

    run(main())


def test_in_a_running_image_caches_are_right() -> None:
    """What is in memory of tables that are shared now is not written in place."""

    async def main() -> None:
        node, _ = await open_logged(empty_image(MiB, cluster_size=4096))
        driver = node.driver
        assert isinstance(driver, Qcow2)
        await node.pwrite(0, b"a" * 65536)
        assert driver.map_write(0, 4096) is not None
        await take(node, "one")
        assert driver.map_write(0, 4096) is None
        await node.pwrite(0, b"b" * 65536)
        assert driver.map_write(0, 4096) is not None
        await drop(node, "one")
        assert await node.pread(0, 65536) == b"b" * 65536
        await node.pwrite(0, b"c" * 4096)
        await close(node)

    run(main())


@pytest.mark.parametrize("after", range(0, 120, 17))
def test_cancelled(tmp_path: Path, after: int) -> None:
    """Whoever is cancelled leaves only when the operation is over, so that no request comes in between."""

    async def main() -> bytes:
        node, below = await open_logged(empty_image(MiB, cluster_size=4096))
        model = Model(node, 1)
        await model.workload(10, 1, 60_000)
        task = asyncio.get_running_loop().create_task(take(node, "one"))
        for _ in range(after):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        ended = len(below.log)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(below.log) == ended
        await model.workload(10, 1, 60_000)
        await model.verify()
        await close(node)
        return bytes(below.data)

    path = tmp_path / "disk"
    path.write_bytes(run(main()))
    images.assert_clean(path)


def test_as_part_of_a_group(tmp_path: Path) -> None:
    """It is gone again if something else in the group fails."""
    path = images.create(tmp_path / "disk", MiB)
    images.io(path, "write -P 1 0 1M")

    async def main() -> None:
        async with opened(path) as node:
            await take(node, "kept")
            with pytest.raises(Error, match="Snapshot with name 'a' already exists on device 'q'"):
                await action.run(*(InternalSnapshotAction(node.graph, "q", name) for name in ("a", "b", "a")))
            assert [one.name for one in listed(node)] == ["kept"]
            await node.pwrite(0, b"x" * 4096)
            await action.run(*(InternalSnapshotAction(node.graph, "q", name) for name in ("a", "b")))
            assert [one.name for one in listed(node)] == ["kept", "a", "b"]
            await node.pwrite(0, b"y" * 4096)

    run(main())
    images.assert_clean(path)
    for name, byte in (("kept", b"\1"), ("a", b"x"), ("b", b"x")):
        assert content_at(path, name, tmp_path / "raw")[:4096] == byte * 4096


def test_deletions_at_once(tmp_path: Path) -> None:
    """Of the same snapshot, and with a new table in between: what is shared loses one reference, not two."""
    path = images.create(tmp_path / "disk", MiB)
    images.io(path, "write -P 1 0 1M")

    async def main() -> list[str]:
        async with opened(path) as node:
            for name in ("one", "two"):
                await take(node, name)
            gone = [one for one in listed(node) if one.name == "one"] * 2
            other = [one for one in listed(node) if one.name == "two"]
            results = await asyncio.gather(
                *(node.driver.snapshot_delete(one.id, one.name) for one in gone + other), return_exceptions=True
            )
            await node.pwrite(0, b"\2" * MiB)
            return [str(result) for result in results if result is not None]

    assert run(main()) == ["Can't find the snapshot"]
    images.assert_clean(path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == b"\2" * MiB
