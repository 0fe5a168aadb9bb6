"""Checks of images: what is found is what qemu-img finds."""

from __future__ import annotations

import asyncio
import errno
import json
import random
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqsd.block.graph import Graph
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2 import refcounts
from pyqsd.drivers.formats.qcow2.check import arrays
from pyqsd.drivers.formats.qcow2.check.references import CHUNK_BITS, References
from pyqsd.drivers.formats.qcow2.create import empty_image
from pyqsd.qapi.command import EventBus
from pyqsd.qapi.errors import Error
from tests.support import images, peers
from tests.system import mangle

from . import encrypted, mangled
from .support import opened, run

FIELDS = (
    "image-end-offset",
    "corruptions",
    "leaks",
    "check-errors",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
)


def theirs(path: Path) -> dict[str, int] | None:
    """What qemu-img finds; None if it cannot look."""
    done = peers.run("qemu-img", "check", "--output=json", "-f", "qcow2", path, ok=(0, 1, 2, 3))
    if not done.stdout.startswith("{"):
        return None
    found = json.loads(done.stdout)
    return {name: found.get(name, 0) for name in FIELDS}


def ours(path: Path) -> dict[str, int] | None:
    """What we find; None if the image does not open, or cannot be looked at."""

    async def check() -> dict[str, int] | None:
        try:
            async with opened(path, Graph(EventBus()), read_only=True) as node:
                found = await node.driver.check()
        except (OSError, Error):
            return None
        return {name: getattr(found, name.replace("-", "_")) for name in FIELDS}

    return run(check())


def compare(path: Path, what: str) -> bool:
    """Whether both can look at the image; if they do, they find the same."""
    mine, right = ours(path), theirs(path)
    if mine is None or right is None:
        # It opens images that no daemon does; and refuses some whose bitmaps are broken, which we look at.
        return False
    assert mine == right, what
    return True


@pytest.mark.parametrize("kind", mangled.KINDS)
def test_same_as_qemu_img(kind: str, sound: Any, tmp_path: Path) -> None:
    """A sound image, and some damaged ones (the soak test does more of them)."""
    path = tmp_path / "image.qcow2"
    path.write_bytes(sound(kind))
    assert compare(path, "sound")
    looked = 0
    for seed in range(8):
        data = bytearray(sound(kind))
        what = mangled.damage(data, seed)
        path.write_bytes(data)
        looked += compare(path, f"seed {seed}: {what}")
    assert looked >= 4


@pytest.mark.parametrize("group", ["l1", "l2", "refcount", "cut"])
def test_single_faults(group: str, sound: Any, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    looked = 0
    for name, patch in mangle.GROUPS[group].items():
        mangle.write(path, sound("plain"), patch)
        looked += compare(path, name)
    assert looked >= 5


def test_preallocated_tables(tmp_path: Path) -> None:
    """Tables that are an unbroken run of clusters, and some that nearly are."""
    path = images.create(tmp_path / "p.qcow2", "1G", "qcow2", "preallocation=metadata,cluster_size=4k")
    assert compare(path, "untouched")
    with path.open("r+b") as file:
        layout = mangled.Layout(file.read(8 << 20))
        table = layout.l2[0]
        file.seek(table + 8 * 7)
        entry = int.from_bytes(file.read(8), "big")
        file.seek(table + 8 * 7)
        file.write((entry ^ 1 << 63).to_bytes(8, "big"))
    assert compare(path, "a flag")
    with path.open("r+b") as file:
        file.seek(table + 8 * 9)
        file.write((entry).to_bytes(8, "big"))
    assert compare(path, "shared")


@pytest.mark.parametrize("method", encrypted.METHODS)
def test_encrypted(method: str, tmp_path: Path) -> None:
    """The header of the encryption takes clusters, too."""
    path = encrypted.make(tmp_path / "secret.qcow2", 4 << 20, method, cluster_size=4096)
    peers.run("qemu-io", *encrypted.SECRET, "--image-opts", encrypted.image_opts(path, method), "-c", "write 0 100k")
    with path.open("r+b") as file:
        file.seek(48)
        file.seek(int.from_bytes(file.read(8), "big"))
        block = int.from_bytes(file.read(8), "big")
        # Of the encryption header, where there is one, and of others.
        file.seek(block + 2 * 5)
        file.write(bytes(80))

    def judge() -> dict[str, int]:
        found = encrypted.check(path, method)
        return {name: found.get(name, 0) for name in FIELDS}

    async def look(repair: str) -> dict[str, int]:
        graph = await encrypted.graph_with_secret()
        async with opened(path, graph, encrypt=encrypted.key(method)) as node:
            found = await node.driver.check(repair)
            return {name: getattr(found, name.replace("-", "_")) for name in FIELDS}

    assert run(look("none")) == judge()
    assert judge()["corruptions"] > 20
    assert run(look("all")) == judge()
    assert not judge()["corruptions"]


def test_others_are_served_meanwhile(tmp_path: Path) -> None:
    path = images.create(tmp_path / "large.qcow2", "64G", "qcow2", "preallocation=metadata")
    other = images.create(tmp_path / "other.qcow2", "1M")

    async def main() -> None:
        graph = Graph(EventBus())
        async with opened(path, graph, read_only=True) as node, opened(other, graph, node_name="other") as second:
            checking = asyncio.create_task(node.driver.check())
            served = 0
            while not checking.done():
                await second.pwrite(0, b"x" * 4096)
                await asyncio.sleep(0)
                served += 1
            assert served > 20
            assert checking.result().allocated_clusters == 1 << 20
            # One that is given up does no harm.
            given_up = asyncio.create_task(node.driver.check())
            for _ in range(5):
                await asyncio.sleep(0)
            given_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await given_up
            assert not (await node.driver.check()).findings

    run(main())


def test_hostile_tables(tmp_path: Path) -> None:
    """A million L1 entries for one L2 table, all of whose entries are for one cluster; every refcount block is the
    same. That is eight billion references; the real program counts them one by one."""
    tables, entries = 1 << 20, 8192
    image = bytearray(empty_image(0))
    l1, table, block = 0x100000, 0x2000000, int.from_bytes(image[0x10000:0x10008], "big")
    header = headers.decode(image)
    header.size, header.l1_size, header.l1_offset = tables << 29, tables, l1
    area = headers.encode(header)
    image[: len(area)] = area
    image[0x10000:0x20000] = block.to_bytes(8, "big") * entries
    path = tmp_path / "hostile.qcow2"
    with path.open("wb") as file:
        file.write(image)
        file.seek(l1)
        file.write((1 << 63 | table).to_bytes(8, "big") * tables)
        file.seek(table)
        file.write((1 << 63 | table + 65536).to_bytes(8, "big") * entries)
        file.truncate(table + 2 * 65536)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    async def check() -> None:
        async with opened(path, read_only=True) as node:
            found = await node.driver.check()
            assert found.allocated_clusters == tables * entries
            assert found.findings["references that are too many for the refcount width"] > tables * entries - 131072
            assert found.findings["refcount blocks that are not the only user of their cluster"] == entries - 1

    run(check())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10


def test_file_too_large(tmp_path: Path) -> None:
    path = images.create(tmp_path / "large.qcow2", "1M", "qcow2", "cluster_size=512")
    with path.open("r+b") as file:
        file.truncate((1 << 40) + (1 << 20))

    async def check() -> None:
        async with opened(path, read_only=True) as node:
            with pytest.raises(OSError) as caught:
                await node.driver.check()
            assert caught.value.errno == errno.EFBIG

    run(check())
    assert "Check failed: File too large" in peers.run("qemu-img", "check", path, ok=(1,)).stderr


def test_while_it_is_written(tmp_path: Path) -> None:
    """What is in memory only comes to disk before the check."""
    path = images.create(tmp_path / "w.qcow2", "64M")

    async def check() -> None:
        async with opened(path, lazy_refcounts=True) as node:
            for _ in range(3):
                await node.pwrite(random.randrange(0, 64 << 20) & ~511, b"x" * 512)
                found = await node.driver.check()
                assert not found.findings and not found.check_errors
            assert found.allocated_clusters >= 1

    run(check())
    images.assert_clean(path)


# --- the parts ------------------------------------------------------------------------------------


@given(st.integers(0, 6), st.data())
def test_counts_both_ways(order: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, (1 << (1 << order)) - 1), min_size=8, max_size=64))
    values = values[: len(values) // 8 * 8]
    slow = refcounts.new_counts(order, len(values))
    for index, value in enumerate(values):
        slow.set(index, value)
    packed = slow.encode(0, len(values))
    assert arrays.decode_counts(packed, order).tolist() == values
    assert arrays.encode_counts(np.array(values, np.uint64), order) == packed


class SlowReferences:
    """The same as `References`, one by one."""

    def __init__(self, order: int, bits: int, length: int) -> None:
        self.maximum = (1 << (1 << order)) - 1
        self.bits, self.length = bits, length
        self.counts: dict[int, int] = {}
        self.overflows = self.beyond = 0

    def add_bytes(self, offset: int, length: int, times: int) -> None:
        for _ in range(times):
            if length and offset + length - self.length >= 1 << self.bits:
                self.beyond += 1
            elif length:
                for cluster in range(offset >> self.bits, ((offset + length - 1) >> self.bits) + 1):
                    if self.counts.get(cluster, 0) == self.maximum:
                        self.overflows += 1
                    else:
                        self.counts[cluster] = self.counts.get(cluster, 0) + 1


CLUSTERS = 3 << CHUNK_BITS
ADDS = st.lists(
    st.tuples(
        st.booleans(),
        st.integers(1, 3),
        st.lists(
            st.tuples(
                st.one_of(st.integers(0, 40), st.integers(CLUSTERS - 40, CLUSTERS + 3), st.integers(0, CLUSTERS)),
                st.integers(0, 511),
                st.integers(1, 1600),
            ),
            min_size=1,
            max_size=12,
        ),
    ),
    max_size=6,
)


@settings(deadline=None)
@given(st.sampled_from((0, 1, 2, 3, 4, 5)), ADDS)
def test_references_are_those_of_a_slow_model(order: int, adds: list[Any]) -> None:
    length = (CLUSTERS << 9) - 100
    fast, slow = References(order, 9, length), SlowReferences(order, 9, length)
    for together, times, spans in adds:
        for cluster, within, size in spans:
            slow.add_bytes(cluster * 512 + within, size, times)
            if not together:
                fast.add_bytes(cluster * 512 + within, size, times)
        if together:
            offsets = np.array([cluster * 512 + within for cluster, within, _ in spans])
            fast.add_spans(offsets, np.array([size for _, _, size in spans]), times)
    assert (fast.overflows, fast.beyond) == (slow.overflows, slow.beyond)
    counts = fast.run(0, fast.end)
    assert {int(at): int(counts[at]) for at in np.flatnonzero(counts)} == slow.counts
    some = np.array(sorted({0, *slow.counts}))
    assert fast.get(some).tolist() == [slow.counts.get(int(at), 0) for at in some]
    assert fast.last() == max(slow.counts, default=0)
    for block_bits in (3, CHUNK_BITS, CHUNK_BITS + 1):
        assert fast.used_blocks(block_bits) == sorted({at >> block_bits for at in slow.counts})
