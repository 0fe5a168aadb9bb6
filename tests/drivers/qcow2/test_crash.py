"""An image is sound after every write: the log of all writes is cut everywhere, and qemu-img is the judge.

Two ways to go down: the process dies (what was written is there), and the power fails (of what was written after the
last flush of the file, any part may be missing).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block.driver import MAY_UNMAP, WRITE_COMPRESSED
from pyqsd.block.node import Node
from pyqsd.drivers.formats.qcow2.create import empty_image
from tests.drivers.qcow2 import encrypted
from tests.drivers.qcow2.crash import after_kill, after_power_cut
from tests.drivers.qcow2.support import LogFile, close, never_pause, open_logged, run
from tests.support import images

SECTOR = 512


class History:
    """What each sector may contain after a crash: everything that was written to it since the last completed flush, and
    what it had then. Positions are those in the log of the file."""

    def __init__(self, size: int, initial: bytes | None = None) -> None:
        self.now = bytearray(size if initial is None else initial)
        #: (position in the log when the request began, first byte, new content)
        self.writes: list[tuple[int, int, bytes]] = []
        #: (position when it had completed, number of writes that were complete when it began)
        self.flushes: list[tuple[int, int]] = [(0, 0)]
        self.initial = bytes(self.now)

    def check(self, content: bytes, cut: int) -> None:
        """`content` is a possible one after the first `cut` entries of the log."""
        flushed = max(count for position, count in self.flushes if position <= cut)
        base = bytearray(self.initial)
        for _, at, data in self.writes[:flushed]:
            base[at : at + len(data)] = data
        if content == base:
            return
        later = [write for write in self.writes[flushed:] if write[0] <= cut]
        for at in range(0, len(base), SECTOR):
            piece = content[at : at + SECTOR]
            if piece == base[at : at + SECTOR]:
                continue
            possible = set()
            for _, start, data in later:
                if start < at + SECTOR and at < start + len(data):
                    possible.add(data[at - start : at - start + SECTOR])
            assert piece in possible, f"sector {at:#x} is neither what was flushed nor what was written later"


async def _requests(node: Node, below: LogFile, history: History, seed: int, count: int, largest: int) -> None:
    rnd = random.Random(seed)
    size = node.length

    async def one() -> None:
        length = min(rnd.choice((SECTOR, 4096, 16384, largest)), size) // SECTOR * SECTOR
        offset = rnd.randrange(0, (size - length) // SECTOR + 1) * SECTOR
        if rnd.random() < 0.4:
            offset &= ~(node.limits.pdiscard_alignment - 1)
        length = min(length, size - offset)
        began = len(below.log)
        action = rnd.random()
        if action < 0.65:
            data = rnd.randbytes(length)
            history.writes.append((began, offset, data))
            await node.pwrite(offset, data)
        elif action < 0.85:
            history.writes.append((began, offset, bytes(length)))
            await node.pwrite_zeroes(offset, length, rnd.choice((0, MAY_UNMAP)))
        else:
            align = node.limits.pdiscard_alignment
            first, last = -(-offset // align) * align, (offset + length) // align * align
            if first < last:
                history.writes.append((began, first, bytes(last - first)))
                await node.pdiscard(offset, length)

    for _ in range(count):
        await one()
        if rnd.random() < 0.15:
            complete = len(history.writes)
            await node.flush()
            history.flushes.append((len(below.log), complete))


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], int, int]] = {
    # name: (creation, node options, disk size, largest request)
    "512": ({"cluster_size": 512}, {}, 1 << 20, 40_960),
    "512-64bit": ({"cluster_size": 512, "refcount_bits": 64}, {}, 1 << 20, 40_960),
    "4k": ({"cluster_size": 4096}, {}, 2 << 20, 65_536),
    "64k": ({}, {}, 4 << 20, 200_704),
    "v2": ({"version": 2, "cluster_size": 4096}, {}, 2 << 20, 65_536),
    "lazy": ({"lazy_refcounts": True, "cluster_size": 4096}, {}, 2 << 20, 65_536),
    "extended": ({"cluster_size": 16384, "extended_l2": True}, {}, 4 << 20, 65_536),
    "tiny-caches": (
        {"cluster_size": 1024},
        {"l2_cache_size": 2048, "l2_cache_entry_size": 512, "refcount_cache_size": 4096},
        2 << 20,
        65_536,
    ),
}


def _judge(
    tmp_path: Path, name: str, image: bytes, history: History, cut: int, *, dirty_ok: bool, method: str = ""
) -> None:
    path = tmp_path / "crashed"
    path.write_bytes(image)
    if method:
        result = encrypted.check(path, method)
        assert not result.get("corruptions") and not result.get("check-errors"), (name, cut, result)
        history.check(encrypted.read_all(path, method, tmp_path / "raw"), cut)
        return
    result = images.check(path)
    if dirty_ok and images.info(path).get("dirty-flag"):
        # With lazy refcounts the counts are wrong by intention; whoever opens the image repairs them first.
        images.peers.run("qemu-img", "check", "-q", "-r", "all", path, ok=(0, 2, 3))
        result = images.check(path)
    assert not result.get("corruptions") and not result.get("check-errors"), (name, cut, result)
    history.check(images.read_all(path, "qcow2", tmp_path / "raw"), cut)


#: How many writes take no waiting: see `Writer.write_now`.
_INLINE = 0.8
_WAYS = [*((name, 0.0) for name in VARIANTS), *((name, _INLINE) for name in ("64k", "lazy", "extended", "tiny-caches"))]


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize(("name", "inline"), _WAYS)
def test_every_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, inline: float, power: bool) -> None:
    never_pause(monkeypatch)
    creation, options, size, largest = VARIANTS[name]
    image = empty_image(size, **creation)
    history = History(size)

    async def main() -> list[tuple[Any, ...]]:
        node, below = await open_logged(image, **options)
        below.inline = inline
        await _requests(node, below, history, len(name), 60, largest)
        complete = len(history.writes)
        await close(node)
        history.flushes.append((len(below.log), complete))
        return below.log

    log = run(main())
    rnd = random.Random(f"{name}{power}")
    cuts = sorted(rnd.sample(range(1, len(log)), min(24, len(log) - 1)))
    for cut in [*cuts, len(log)]:
        crashed = after_power_cut(image, log, cut, rnd) if power else after_kill(image, log, cut)
        _judge(tmp_path, name, crashed, history, cut, dirty_ok=name == "lazy")
    final = tmp_path / "final"
    final.write_bytes(after_kill(image, log, len(log)))
    images.assert_clean(final)


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize("options", ["cluster_size=4k", "extended_l2=on,cluster_size=64k"])
def test_overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, power: bool) -> None:
    """What is copied without waiting is there before the clusters are."""
    never_pause(monkeypatch)
    size = 1 << 20
    base = tmp_path / "base"
    base.write_bytes(random.Random(1).randbytes(size - 5 * SECTOR))
    before = base.read_bytes() + bytes(5 * SECTOR)
    path = images.create(tmp_path / "disk", size, options=options, backing=base, backing_format="raw")
    image = path.read_bytes()
    history = History(size, before)

    async def main() -> list[tuple[Any, ...]]:
        node, below = await open_logged(image)
        below.inline = _INLINE
        await _requests(node, below, history, 3, 60, 20_480)
        complete = len(history.writes)
        await close(node)
        history.flushes.append((len(below.log), complete))
        assert below.inline_writes > 10
        return below.log

    log = run(main())
    rnd = random.Random(f"{options}{power}")
    for cut in [*sorted(rnd.sample(range(1, len(log)), 16)), len(log)]:
        crashed = after_power_cut(image, log, cut, rnd) if power else after_kill(image, log, cut)
        _judge(tmp_path, options, crashed, history, cut, dirty_ok=False)


@pytest.mark.parametrize("inline", [0.0, _INLINE])
@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize(
    ("method", "creation"),
    [("luks", {"cluster_size": 4096}), ("luks", {"cluster_size": 16384, "extended_l2": True}), ("aes", {})],
    ids=["luks", "luks-extended", "aes"],
)
def test_encrypted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    creation: dict[str, Any],
    power: bool,
    inline: float,
) -> None:
    """What surrounds a write in its cluster is there and encrypted before the cluster is."""
    never_pause(monkeypatch)
    size = 1 << 20
    image = encrypted.make(tmp_path / "disk", size, method, **creation).read_bytes()
    history = History(size)

    async def main() -> list[tuple[Any, ...]]:
        graph = await encrypted.graph_with_secret()
        node, below = await open_logged(image, graph, encrypt=encrypted.key(method))
        below.inline = inline
        await _requests(node, below, history, len(method), 50, 300_032)
        complete = len(history.writes)
        await close(node)
        history.flushes.append((len(below.log), complete))
        return below.log

    log = run(main())
    rnd = random.Random(f"{method}{power}")
    for cut in [*sorted(rnd.sample(range(1, len(log)), 12)), len(log)]:
        crashed = after_power_cut(image, log, cut, rnd) if power else after_kill(image, log, cut)
        _judge(tmp_path, method, crashed, history, cut, dirty_ok=False, method=method)


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
def test_snapshot_survives(tmp_path: Path, power: bool) -> None:
    """Copying tables and clusters that a snapshot shares leaves it whole at every moment."""
    size = 1 << 20
    path = images.create(tmp_path / "disk", size, options="cluster_size=1k")
    images.io(path, "write -P 1 0 700k")
    images.peers.run("qemu-img", "snapshot", "-c", "one", path)
    before = images.read_all(path, "qcow2", tmp_path / "raw")
    image = path.read_bytes()
    history = History(size, before)

    async def main() -> list[tuple[Any, ...]]:
        node, below = await open_logged(image)
        await _requests(node, below, history, 5, 50, 20_480)
        complete = len(history.writes)
        await close(node)
        history.flushes.append((len(below.log), complete))
        return below.log

    log = run(main())
    rnd = random.Random(power)
    for cut in sorted(rnd.sample(range(1, len(log)), 16)):
        crashed = after_power_cut(image, log, cut, rnd) if power else after_kill(image, log, cut)
        _judge(tmp_path, "snapshot", crashed, history, cut, dirty_ok=False)
        images.peers.run("qemu-img", "snapshot", "-a", "one", tmp_path / "crashed")
        assert images.read_all(tmp_path / "crashed", "qcow2", tmp_path / "raw") == before


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize("options", ["cluster_size=4k", "data_file_raw=on,cluster_size=4k", "extended_l2=on"])
def test_data_file(tmp_path: Path, options: str, power: bool) -> None:
    """Two files, each with its own flushes: no table refers to what is not in the data file yet."""
    size = 1 << 20
    path = images.create(tmp_path / "crashed", size, options=f"data_file={tmp_path / 'data'},{options}")
    image, data = path.read_bytes(), (tmp_path / "data").read_bytes()
    history = History(size)

    async def main() -> list[tuple[Any, ...]]:
        node, below = await open_logged(image, data=data)
        await _requests(node, below, history, len(options), 60, 40_960)
        complete = len(history.writes)
        await close(node)
        history.flushes.append((len(below.log), complete))
        return below.log

    log = run(main())
    here = [("other",) if entry[0] == "data" else entry for entry in log]
    there = [entry[1] if entry[0] == "data" else ("other",) for entry in log]
    assert any(entry[0] == "flush" for entry in there)
    rnd = random.Random(f"{options}{power}")
    for cut in [*sorted(rnd.sample(range(1, len(log)), 24)), len(log)]:
        if power:
            crashed, crashed_data = (
                after_power_cut(image, here, cut, rnd),
                after_power_cut(data, there, cut, rnd),
            )
        else:
            crashed, crashed_data = after_kill(image, here, cut), after_kill(data, there, cut)
        (tmp_path / "data").write_bytes(crashed_data)
        _judge(tmp_path, options, crashed, history, cut, dirty_ok=False)
        if "raw" in options:
            history.check(crashed_data[:size], cut)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == (tmp_path / "data").read_bytes()[:size] or (
        "raw" not in options
    )
    images.assert_clean(path)


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize("bits", [1, 2, 16])
def test_compressed_writes(tmp_path: Path, bits: int, power: bool) -> None:
    """Compressed clusters that share host clusters, with counts that have little room."""
    size, cluster = 1 << 20, 4096
    image = empty_image(size, cluster_size=cluster, refcount_bits=bits)
    history = History(size)
    rnd = random.Random(f"{bits}{power}")

    async def main() -> list[tuple[Any, ...]]:
        node, below = await open_logged(image)
        used = set()
        for _ in range(90):
            at = rnd.randrange(size // cluster) * cluster
            began = len(below.log)
            if at in used:
                history.writes.append((began, at, bytes(cluster)))
                await node.pdiscard(at, cluster)
            else:
                data = rnd.randbytes(rnd.choice((100, 1000))).ljust(cluster, b"x")
                history.writes.append((began, at, data))
                await node.pwrite(at, data, WRITE_COMPRESSED)
            used ^= {at}
            if rnd.random() < 0.15:
                complete = len(history.writes)
                await node.flush()
                history.flushes.append((len(below.log), complete))
        complete = len(history.writes)
        await close(node)
        history.flushes.append((len(below.log), complete))
        return below.log

    log = run(main())
    for cut in [*sorted(rnd.sample(range(1, len(log)), 20)), len(log)]:
        crashed = after_power_cut(image, log, cut, rnd) if power else after_kill(image, log, cut)
        _judge(tmp_path, "compressed", crashed, history, cut, dirty_ok=False)
    images.assert_clean(tmp_path / "crashed")


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
def test_resize(tmp_path: Path, power: bool) -> None:
    """Growing and shrinking, with the L1 table moving."""
    image = empty_image(1 << 20, cluster_size=512)

    async def main() -> list[tuple[Any, ...]]:
        node, below = await open_logged(image)
        rnd = random.Random(3)
        for size in (4 << 20, 9 << 20, 2 << 20, 12 << 20, 1 << 20):
            for _ in range(4):
                await node.pwrite(rnd.randrange(node.length // 512 - 80) * 512, rnd.randbytes(40_960))
            await node.truncate(size)
            await node.flush()
        await close(node)
        return below.log

    log = run(main())
    rnd = random.Random(power)
    for cut in [*sorted(rnd.sample(range(1, len(log)), 40)), len(log)]:
        crashed = after_power_cut(image, log, cut, rnd) if power else after_kill(image, log, cut)
        path = tmp_path / "crashed"
        path.write_bytes(crashed)
        result = images.check(path)
        assert not result.get("corruptions") and not result.get("check-errors"), (cut, result)
    images.assert_clean(path)
