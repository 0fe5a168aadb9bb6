"""What every driver owes, checked for each one in the registry: the day a driver is added, it is tested here.

A driver needs an entry in `MAKERS`: how to make an empty image of `SIZE` bytes for it, and the options to open that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyqsd.block import permissions as perms
from pyqsd.block import registry
from pyqsd.block.backend import BlockBackend
from pyqsd.block.driver import MAY_UNMAP
from pyqsd.block.extents import ZERO
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevOptions
from pyqsd.drivers.formats.qcow2.create import empty_image
from pyqsd.qapi.command import EventBus
from pyqsd.qapi.convert import convert
from pyqsd.qapi.errors import Error

SIZE = 1 << 20


def _raw_file(path: Path) -> dict[str, Any]:
    path.write_bytes(bytes(SIZE))
    return {"driver": "file", "filename": str(path)}


def _qcow2(path: Path) -> dict[str, Any]:
    path.write_bytes(empty_image(SIZE, cluster_size=4096))
    return {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}


def _raw(path: Path) -> dict[str, Any]:
    path.write_bytes(bytes(SIZE + 8192))
    return {"driver": "raw", "offset": 4096, "size": SIZE, "file": {"driver": "file", "filename": str(path)}}


def _blkdebug(path: Path) -> dict[str, Any]:
    # Rules that never match, so that every request is looked at, and limits that split every one.
    return {
        "driver": "blkdebug",
        "image": _raw_file(path),
        "align": 512,
        "max-transfer": 8192,
        "opt-write-zero": 4096,
        "max-write-zero": 16384,
        "opt-discard": 4096,
        "max-discard": 16384,
        "inject-error": [{"event": "none", "sector": 1 << 40}],
    }


def _copy_on_read(path: Path) -> dict[str, Any]:
    return {"driver": "copy-on-read", "file": {**_qcow2(path), "read-only": False}}


def _copy_before_write(path: Path) -> dict[str, Any]:
    copies = path.with_name("copies")
    copies.write_bytes(empty_image(SIZE, cluster_size=4096))
    target = {"driver": "qcow2", "read-only": False, "file": {"driver": "file", "filename": str(copies)}}
    return {"driver": "copy-before-write", "file": _raw_file(path), "target": target}


#: Driver → how to make an image at a path, and its options.
MAKERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "file": _raw_file,
    "raw": _raw,
    "blkdebug": _blkdebug,
    "compress": lambda path: {"driver": "compress", "file": _qcow2(path)},
    "copy-before-write": _copy_before_write,
    "copy-on-read": _copy_on_read,
    "preallocate": lambda path: {"driver": "preallocate", "file": _raw_file(path), "prealloc-size": 8192},
    "qcow2": _qcow2,
    "null-co": lambda path: {"driver": "null-co", "size": SIZE, "read-zeroes": True},
    "null-aio": lambda path: {"driver": "null-aio", "size": SIZE, "read-zeroes": True},
    "snapshot-access": lambda path: {"driver": "snapshot-access", "file": _copy_before_write(path)},
}
#: They need a block device, which a test machine need not have; their own tests look for one.
NEEDS_A_DEVICE = {"host_device"}
#: They keep nothing that is written.
FORGETS = {"null-co", "null-aio"}
#: Their images cannot be resized, or keep the size that their options say.
FIXED_SIZE = {"null-co", "null-aio", "raw", "snapshot-access"}
#: They cannot be written to.
NEVER_WRITES = {"snapshot-access"}

drivers = pytest.mark.parametrize("name", sorted(MAKERS))
#: What was written cannot be overwritten.
WRITES_ONCE = {"compress"}
overwriters = pytest.mark.parametrize("name", sorted(set(MAKERS) - FORGETS - WRITES_ONCE - NEVER_WRITES))


def test_every_driver_is_here() -> None:
    assert set(registry.driver_names()) == set(MAKERS) | NEEDS_A_DEVICE


@pytest.mark.parametrize("name", registry.driver_names())
def test_names_agree(name: str) -> None:
    driver = registry.driver_class(name)
    assert driver.name == name
    assert driver.Options.__struct_config__.tag == name
    assert driver.__doc__
    assert driver.mutable_options <= set(driver.Options.__struct_fields__)


async def _open(graph: Graph, options: dict[str, Any], **more: Any) -> Node:
    return await graph.add(convert({**options, "node-name": "node", **more}, BlockdevOptions))


def _user(graph: Graph, node: Node, perm: int = perms.CONSISTENT_READ | perms.WRITE) -> BlockBackend:
    backend = BlockBackend(graph, "an unnamed block device", perm, perms.ALL)
    backend.insert(node)
    return backend


step = st.tuples(
    st.sampled_from(["write", "write", "zero", "unmap", "discard", "read", "flush", "status", "reopen"]),
    st.integers(0, SIZE - 1),
    st.one_of(st.integers(1, 9000), st.sampled_from([4096, 65536, 1 << 18])),
    st.booleans(),
)


@overwriters
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(step, max_size=40))
def test_content_matches_a_bytearray(name: str, steps: list[tuple[str, int, int, bool]], tmp_path: Path) -> None:
    options = MAKERS[name](tmp_path / "image")
    model = bytearray(SIZE)
    #: Discarded bytes read as whatever the driver likes.
    unknown: set[int] = set()

    async def check_status(backend: BlockBackend) -> None:
        at = 0
        while at < SIZE:
            (n, flags, _, _), _ = await backend.block_status_above(None, at, SIZE - at)
            assert 0 < n <= SIZE - at
            if flags & ZERO:
                data = bytearray(n)
                await backend.preadv(at, n, [memoryview(data)])
                assert not any(data), f"status says that {at}+{n} is zero"
            at += n

    async def run() -> None:
        graph = Graph(EventBus())
        node = await _open(graph, options, discard="unmap")
        backend = _user(graph, node)
        for number, (what, offset, length, aligned) in enumerate(steps):
            if aligned:
                offset &= ~4095
                length = -(-length // 4096) * 4096
            length = min(length, SIZE - offset)
            if what == "write":
                data = bytes([number % 255 + 1]) * length
                if not (number & 1 and backend.write_now(offset, length, [memoryview(data)])):
                    await backend.pwritev(offset, length, [memoryview(data[:7]), memoryview(data[7:])])
                model[offset : offset + length] = data
                unknown.difference_update(range(offset, offset + length))
            elif what in ("zero", "unmap"):
                await backend.pwrite_zeroes(offset, length, MAY_UNMAP if what == "unmap" else 0)
                model[offset : offset + length] = bytes(length)
                unknown.difference_update(range(offset, offset + length))
            elif what == "discard":
                await backend.pdiscard(offset, length)
                unknown.update(range(offset, offset + length))
            elif what == "read":
                await compare(backend, offset, length)
            elif what == "flush":
                await backend.flush()
            elif what == "status":
                await check_status(backend)
            else:
                backend.remove()
                await graph.remove("node")
                node = await _open(graph, options, discard="unmap")
                backend = _user(graph, node)
        backend.remove()
        await graph.remove("node")
        node = await _open(graph, options, **{"read-only": True})
        backend = _user(graph, node, perms.CONSISTENT_READ)
        await compare(backend, 0, SIZE)
        await check_status(backend)
        backend.remove()
        await graph.close_all()

    async def compare(backend: BlockBackend, offset: int, length: int) -> None:
        slow = bytearray(length)
        await backend.preadv(offset, length, [memoryview(slow)[: length // 2], memoryview(slow)[length // 2 :]])
        if slow != model[offset : offset + length]:
            wrong = [i for i in range(length) if slow[i] != model[offset + i] and offset + i not in unknown]
            assert not wrong, f"{len(wrong)} bytes differ, the first at {offset + wrong[0]}"
        quick = bytearray(length)
        if backend.read_now(offset, length, [memoryview(quick)]):
            assert quick == slow

    asyncio.run(run())


@overwriters
def test_concurrent_writes(name: str, tmp_path: Path) -> None:
    options = MAKERS[name](tmp_path / "image")

    async def run() -> None:
        graph = Graph(EventBus())
        backend = _user(graph, await _open(graph, options))
        model = bytes(i // 1000 % 250 + 1 for i in range(100_000))
        pieces = [(at, model[at : at + 1000]) for at in range(0, 100_000, 1000)]
        await asyncio.gather(
            *[backend.pwritev(at, 1000, [memoryview(data)]) for at, data in reversed(pieces)], backend.flush()
        )
        data = bytearray(len(model))
        await backend.preadv(0, len(model), [memoryview(data)])
        assert data == (bytes(len(model)) if name in FORGETS else model)
        assert backend.in_flight == 0
        assert all(node.in_flight == 0 for node in graph.nodes.values())
        backend.remove()
        await graph.close_all()

    asyncio.run(run())


@drivers
def test_reads_of_zero_length_and_past_the_end(name: str, tmp_path: Path) -> None:
    options = MAKERS[name](tmp_path / "image")

    async def run() -> None:
        graph = Graph(EventBus())
        node = await _open(graph, options)
        backend = _user(graph, node)
        await backend.preadv(SIZE, 0, [])
        if name not in NEVER_WRITES:
            await backend.pwritev(SIZE, 0, [])
        for offset, length in ((SIZE - 1, 2), (SIZE, 1), (-1, 1), (1 << 62, 1), (0, 1 << 62)):
            with pytest.raises(OSError, match="out of range"):
                await backend.preadv(offset, length, [memoryview(bytearray(1))])
            assert not backend.read_now(offset, length, [memoryview(bytearray(1))])
            assert not backend.write_now(offset, length, [memoryview(bytearray(1))])
        backend.remove()
        await graph.close_all()

    asyncio.run(run())


@drivers
def test_read_only_nodes_refuse_writers(name: str, tmp_path: Path) -> None:
    options = MAKERS[name](tmp_path / "image")

    async def run() -> None:
        graph = Graph(EventBus())
        node = await _open(graph, options, **{"read-only": True})
        with pytest.raises(Error, match="Block node is read-only"):
            _user(graph, node)
        backend = _user(graph, node, perms.CONSISTENT_READ)
        data = bytearray(b"x" * 512)
        await backend.preadv(0, 512, [memoryview(data)])
        assert not any(data)
        backend.remove()
        await graph.close_all()

    asyncio.run(run())


@drivers
def test_resize(name: str, tmp_path: Path) -> None:
    options = MAKERS[name](tmp_path / "image")

    async def run() -> None:
        graph = Graph(EventBus())
        node = await _open(graph, options)
        backend = _user(graph, node, perms.CONSISTENT_READ | perms.WRITE | perms.RESIZE)
        if name in FIXED_SIZE:
            with pytest.raises(Error):
                await backend.truncate(2 * SIZE)
            assert node.length == SIZE
        else:
            await backend.pwritev(SIZE - 5, 5, [memoryview(b"first")])
            await backend.truncate(2 * SIZE)
            assert node.length == 2 * SIZE
            data = bytearray(10)
            await backend.preadv(SIZE - 5, 10, [memoryview(data)])
            assert data == b"first\0\0\0\0\0"
            await backend.pwritev(2 * SIZE - 4, 4, [memoryview(b"last")])
            await backend.truncate(SIZE)
            await backend.truncate(2 * SIZE)
            await backend.preadv(2 * SIZE - 10, 10, [memoryview(data)])
            assert not any(data)
        backend.remove()
        await graph.close_all()

    asyncio.run(run())


@drivers
def test_what_it_tells_about_itself(name: str, tmp_path: Path) -> None:
    options = MAKERS[name](tmp_path / "image")

    async def run() -> None:
        from pyqsd.block.queries import query_named_block_nodes

        graph = Graph(EventBus())
        await _open(graph, options)
        told = {info.node_name: info for info in await query_named_block_nodes(graph)}
        assert told["node"].drv == name
        assert told["node"].image.virtual_size == SIZE
        await graph.close_all()
        assert graph.nodes == {}

    asyncio.run(run())


def test_a_failed_child_leaves_no_open_files(tmp_path: Path) -> None:
    """A format that does not like what it finds lets go of the file below."""
    path = tmp_path / "image"
    path.write_bytes(b"QFI\xfb" + bytes(4092))

    async def run() -> None:
        graph = Graph(EventBus())
        for _ in range(3):
            with pytest.raises(Error):
                await _open(graph, {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}})
        assert graph.nodes == {}
        links = [link for link in Path("/proc/self/fd").iterdir() if link.exists() and link.resolve() == path]
        assert links == []

    asyncio.run(run())
