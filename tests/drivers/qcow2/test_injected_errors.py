"""An error at any point of any operation never corrupts an image, and loses nothing that a flush has confirmed.

``blkdebug`` below a qcow2 node injects the errors: at each event that the driver announces and at each kind of request,
once and persistently. Afterwards the image is judged by ``qemu-img check``, and its content by a model that knows for
each sector what it may hold.
"""

from __future__ import annotations

import errno
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block.driver import FUA, MAY_UNMAP
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevOptions
from pyqsd.qapi.command import EventBus
from pyqsd.qapi.convert import convert
from pyqsd.qapi.errors import Error
from tests.support import peers

from .support import close, run

SECTOR = 512
SIZE = 4 << 20
MAX_SIZE = 16 << 20
ZEROES = bytes(SECTOR)

KINDS = {
    "plain": ["-o", "cluster_size=4k"],
    "lazy": ["-o", "cluster_size=4k,lazy_refcounts=on,refcount_bits=64"],
    "subclusters": ["-o", "cluster_size=16k,extended_l2=on"],
    "small": ["-o", "cluster_size=512,refcount_bits=64"],
    "v2": ["-o", "cluster_size=4k,compat=0.10"],
}

EVENTS = (
    *("l1_update", "l1_grow_alloc_table", "l1_grow_write_table", "l1_grow_activate_table", "l1_shrink_write_table"),
    *("l2_load", "l2_update", "l2_alloc_cow_read", "l2_alloc_write"),
    *("read_aio", "read_backing_aio", "read_compressed", "write_aio", "cow_read", "cow_write"),
    *("reftable_load", "reftable_grow", "refblock_load", "refblock_update_part", "refblock_alloc_hookup"),
    *("refblock_alloc_write_blocks", "refblock_alloc_write_table", "refblock_alloc_switch_table"),
    *("cluster_alloc", "cluster_free", "flush_to_os", "flush_to_disk", "pwritev", "pwritev_done"),
)
IO_TYPES = ("read", "write", "discard", "flush")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with data, zeroes, compressed clusters, something below them and an internal snapshot."""
    root = tmp_path_factory.mktemp("images")

    def io(path: Path, *commands: str, fmt: str = "qcow2") -> None:
        arguments = [part for command in commands for part in ("-c", command)]
        peers.run("qemu-io", "-f", fmt, *arguments, str(path))

    base = root / "base.img"
    peers.run("qemu-img", "create", "-f", "raw", str(base), str(SIZE // 2))
    io(base, "write -P 0x11 0 1M", "write -P 0x12 1300k 100k", fmt="raw")
    for name, options in KINDS.items():
        path = root / f"{name}.qcow2"
        peers.run("qemu-img", "create", "-f", "qcow2", *options, "-F", "raw", "-b", str(base), str(path), str(SIZE))
        compressed = "write -P 0x22 512k 64k" if name == "subclusters" else "write -c -P 0x22 512k 64k"
        io(path, "write -P 0x21 64k 200k", compressed, "write -P 0x23 3M 100k", "write -z 300k 64k")
        peers.run("qemu-img", "snapshot", "-c", "first", str(path))
        io(path, "write -P 0x31 100k 32k", "write -P 0x32 2M 64k")
        if name == "small":
            # Nearly all that its first refcount table can count.
            io(path, "write -P 0x33 1M 1000k")
        (root / f"{name}.now").write_bytes(content_of(path))
        (root / f"{name}.first").write_bytes(content_of(path, "-l", "first"))
    return root


def content_of(path: Path, *options: str) -> bytes:
    out = path.with_suffix(".raw")
    peers.run("qemu-img", "convert", *options, "-O", "raw", str(path), str(out))
    return out.read_bytes()


class Model:
    """For each sector what may be read now, and what may be read after the image was closed badly."""

    def __init__(self, content: bytes) -> None:
        # Sets are replaced, never changed, so that both lists can have the same.
        self.now = [{content[at : at + SECTOR]} for at in range(0, len(content), SECTOR)]
        self.later = list(self.now)

    def changed(self, offset: int, length: int, value: bytes, done: bool) -> None:
        for index in range(offset // SECTOR, (offset + length) // SECTOR):
            self.now[index] = {value} if done else self.now[index] | {value}
            self.later[index] = self.later[index] | {value}

    def flushed(self) -> None:
        self.later = list(self.now)

    def resized(self, length: int, lost_from: int) -> None:
        """The size is `length` now; what is from `lost_from` on may have gone."""
        count = length // SECTOR
        for index in range(lost_from // SECTOR, len(self.now)):
            self.now[index] = self.now[index] | {ZEROES}
            self.later[index] = self.later[index] | {ZEROES}
        del self.now[count:]
        self.now += [{ZEROES} for _ in range(count - len(self.now))]
        self.later += [{ZEROES} for _ in range(len(self.now) - len(self.later))]

    @staticmethod
    def check(data: bytes, allowed: list[set[bytes]], start: int, what: str) -> None:
        for at in range(0, len(data), SECTOR):
            index = (start + at) // SECTOR
            if index < len(allowed):
                found = data[at : at + SECTOR]
                assert found in allowed[index], (
                    f"{what}: sector {index} begins with {found[:4].hex()}, "
                    f"allowed is {[value[:4].hex() for value in allowed[index]]}"
                )


async def attempt(action: Any) -> bool:
    """Whether it worked; an error that is none of those that can be injected is a mistake."""
    try:
        await action
    except OSError as exc:
        assert exc.errno in (errno.EIO, errno.ENOSPC), exc
        return False
    except Error as exc:
        refused = "Can't resize a v2 image which has snapshots" in str(exc)
        assert refused or exc.errno in (errno.EIO, errno.ENOSPC), exc
        return False
    return True


async def requests(node: Node, model: Model, rnd: random.Random) -> None:
    number = 0
    for _ in range(28):
        kind = rnd.choice(("write", "write", "write", "fua", "zero", "unmap", "discard", "read", "flush", "resize"))
        length = rnd.choice((1, 8, 30, 128, 400, 1400)) * SECTOR
        offset = min(rnd.choice((0, 1, 100, 128, 200, 1023, 1100, 4095, 6143)) * SECTOR, node.length - length)
        offset += rnd.randrange(16) * SECTOR
        length = min(length, node.length - offset)
        if offset < 0 or length <= 0:
            continue
        number += 1
        value = bytes([0x80 + number]) * SECTOR
        if kind in ("write", "fua"):
            done = await attempt(node.pwrite(offset, value * (length // SECTOR), FUA if kind == "fua" else 0))
            model.changed(offset, length, value, done)
        elif kind in ("zero", "unmap"):
            done = await attempt(node.pwrite_zeroes(offset, length, MAY_UNMAP if kind == "unmap" else 0))
            model.changed(offset, length, ZEROES, done)
        elif kind == "discard":
            await attempt(node.pdiscard(offset, length))
            model.changed(offset, length, ZEROES, False)
        elif kind == "read":
            data = bytearray(length)
            if await attempt(node.preadv(offset, length, [memoryview(data)])):
                model.check(bytes(data), model.now, offset, "read")
        elif kind == "flush":
            if await attempt(node.flush()):
                model.flushed()
        else:
            new = rnd.choice((SIZE // 2, SIZE + 5 * SECTOR, 2 * SIZE, MAX_SIZE))
            old = node.length
            done = await attempt(node.truncate(new))
            assert node.length == new or not done
            model.resized(node.length, min(old, new))


async def work(path: Path, rule: dict[str, Any], model: Model, seed: int) -> bool:
    """Whether the rule was of any consequence."""
    graph = Graph(EventBus())
    below: dict[str, Any] = {
        "driver": "blkdebug",
        "image": {"driver": "file", "filename": str(path)},
        "inject-error": [rule],
    }
    options = {"driver": "qcow2", "node-name": "q", "discard": "unmap", "file": below, "refcount-cache-size": 16384}
    try:
        node = await graph.add(convert(options, BlockdevOptions))
    except (OSError, Error):
        assert not graph.nodes
        return True
    hits: list[int] = []
    count_hits(node, hits)
    await requests(node, model, random.Random(seed))
    if await attempt(node.flush()):
        model.flushed()
    at = 0
    while at < node.length:
        data = bytearray(min(1 << 20, node.length - at))
        if await attempt(node.preadv(at, len(data), [memoryview(data)])):
            model.check(bytes(data), model.now, at, "still open")
        at += len(data)
    await close(node)
    assert not graph.nodes
    return bool(hits)


def count_hits(node: Node, hits: list[int]) -> None:
    assert node.driver.file is not None
    injector: Any = node.driver.file.node.driver
    check = injector._check

    async def counted(*request: Any) -> None:
        try:
            await check(*request)
        except OSError as exc:
            hits.append(exc.errno or 0)
            raise

    injector._check = counted


async def read_all(path: Path) -> bytes:
    graph = Graph(EventBus())
    options = {
        "driver": "qcow2",
        "node-name": "q",
        "read-only": True,
        "file": {"driver": "file", "filename": str(path)},
    }
    node = await graph.add(convert(options, BlockdevOptions))
    data = bytes(await node.pread(0, node.length))
    await close(node)
    return data


def judge(path: Path, model: Model, snapshot: bytes, label: str) -> None:
    done = peers.run("qemu-img", "check", "--output=json", str(path), ok=())
    if done.returncode not in (0, 3):
        # A dirty image has the counts that its lazy refcounts promise only after a repair.
        told = json.loads(done.stdout)
        info = json.loads(peers.run("qemu-img", "info", "--output=json", str(path)).stdout)
        assert info.get("dirty-flag"), f"{label}: {told}"
        peers.run("qemu-img", "check", "-r", "all", str(path), ok=())
        again = json.loads(peers.run("qemu-img", "check", "--output=json", str(path)).stdout)
        assert not again.get("corruptions"), f"{label}: {again}"
    Model.check(run(read_all(path)), model.later, 0, f"{label}, reopened")
    # qemu-img shows it with the size that the disk has now.
    kept = content_of(path, "-l", "first")[: len(snapshot)]
    assert kept == snapshot[: len(kept)], f"{label}: the snapshot has changed"


def run_cases(images: Path, tmp_path: Path, name: str, rules: list[dict[str, Any]]) -> None:
    others = [kind for kind in KINDS if kind != "small"]
    hits = 0
    for number, rule in enumerate(rules):
        # The one with the most metadata, and another one.
        for kind in ("small", others[(len(name) + number) % len(others)]):
            source = images / f"{kind}.qcow2"
            path = tmp_path / "image.qcow2"
            shutil.copyfile(source, path)
            model = Model((images / f"{kind}.now").read_bytes())
            label = f"{name} {kind} {rule}"
            try:
                hits += run(work(path, rule, model, number))
            except AssertionError as exc:
                raise AssertionError(f"{label}: {exc}") from exc
            judge(path, model, (images / f"{kind}.first").read_bytes(), label)
    assert hits, "no error was injected"


@pytest.mark.parametrize("event", EVENTS)
def test_events(event: str, images: Path, tmp_path: Path) -> None:
    rules = [
        {"event": event, "errno": errno.EIO, "once": True},
        {"event": event, "errno": errno.ENOSPC, "once": False},
    ]
    run_cases(images, tmp_path, event, rules)


@pytest.mark.parametrize("iotype", IO_TYPES)
def test_requests_of_a_kind(iotype: str, images: Path, tmp_path: Path) -> None:
    # From some event on, so that the image can be opened.
    rules = [
        {"event": event, "iotype": iotype, "errno": number, "once": once}
        for event in ("write_aio", "flush_to_os")
        for number, once in ((errno.ENOSPC, False), (errno.EIO, True))
    ]
    run_cases(images, tmp_path, iotype, rules)
