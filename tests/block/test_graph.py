"""The graph: names, children, inheritance, permissions, removal, reopening."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.graph import Graph
from pyqsd.block.options import BlockdevCacheOptions, BlockdevOptions
from pyqsd.qapi.command import EventBus
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import NULL

from .memory_driver import Layer, LayerOptions, MemoryOptions, memory_drivers


def run(test: Callable[[Graph], Awaitable[None]]) -> None:
    """Run `test` with an empty graph that can open the test drivers."""

    async def main() -> None:
        graph = Graph(EventBus())
        with memory_drivers():
            await test(graph)

    asyncio.run(main())


async def refused(action: Awaitable[object]) -> str:
    with pytest.raises(Error) as info:
        await action
    return info.value.desc


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "'node-name' must be specified for the root node"),
        ("1bad", "Invalid node-name: '1bad'"),
        ("", "Invalid node-name: ''"),
        ("#block1", "Invalid node-name: '#block1'"),
        ("a" * 32, "Node name too long"),
        ("taken", "Duplicate nodes with node-name='taken'"),
    ],
)
def test_node_names(name: str | None, message: str) -> None:
    async def test(graph: Graph) -> None:
        await graph.add(MemoryOptions(node_name="taken"))
        assert await refused(graph.add(MemoryOptions(node_name=name))) == message
        assert list(graph.nodes) == ["taken"]

    run(test)


def test_inline_children_inherit_and_go_with_their_parent() -> None:
    async def test(graph: Graph) -> None:
        top = await graph.add(
            LayerOptions(
                node_name="top",
                cache=BlockdevCacheOptions(direct=True, no_flush=True),
                file=MemoryOptions(),
                backing=MemoryOptions(node_name="base"),
            )
        )
        file, backing = (child.node for child in top.children)
        assert file.name.startswith("#block")
        assert (file.cache_direct, file.no_flush, file.read_only, file.discard_unmap) == (True, True, False, True)
        assert (backing.name, backing.read_only) == ("base", True)
        assert await refused(graph.remove("base")) == "Node 'base' is busy: node is used as backing hd of 'top'"
        assert await refused(graph.remove(file.name)) == f"Node {file.name} is not owned by the monitor"
        driver = top.driver
        await graph.remove("top")
        assert isinstance(driver, Layer)
        assert driver.closed
        assert graph.nodes == {}

    run(test)


def test_referenced_children_stay() -> None:
    async def test(graph: Graph) -> None:
        await graph.add(MemoryOptions(node_name="mem"))
        await graph.add(LayerOptions(node_name="top", file="mem"))
        assert await refused(graph.remove("mem")) == "Block device mem is in use"
        await graph.remove("top")
        assert list(graph.nodes) == ["mem"]
        await graph.remove("mem")
        assert await refused(graph.remove("mem")) == "Failed to find node with node-name='mem'"

    run(test)


def test_a_failed_open_leaves_nothing_behind() -> None:
    async def test(graph: Graph) -> None:
        message = await refused(graph.add(LayerOptions(node_name="top", file=MemoryOptions(), backing="nosuch")))
        assert message == "Cannot find device='nosuch' nor node-name='nosuch'"
        assert graph.nodes == {}

    run(test)


def test_writer_below_a_format_is_refused() -> None:
    async def test(graph: Graph) -> None:
        mem = await graph.add(MemoryOptions(node_name="mem"))
        await graph.add(LayerOptions(node_name="top", file="mem"))
        message = await refused(graph.add(LayerOptions(node_name="top2", file="mem")))
        assert message.startswith("Permission conflict on node 'mem': permissions 'write, resize' are both required by")
        assert [edge.parent for edge in mem.parents] == [graph.nodes["top"]]
        user = BlockBackend(graph, "an unnamed block device", perms.CONSISTENT_READ | perms.WRITE, perms.ALL)
        with pytest.raises(Error, match="Permission conflict on node 'mem': permissions 'write'"):
            user.insert(mem)
        reader = BlockBackend(graph, "an unnamed block device", perms.CONSISTENT_READ, perms.ALL)
        reader.insert(mem)
        reader.remove()

    run(test)


def test_read_only_node_refuses_writers() -> None:
    async def test(graph: Graph) -> None:
        node = await graph.add(MemoryOptions(node_name="mem", read_only=True))
        user = BlockBackend(graph, "an unnamed block device", perms.WRITE, perms.ALL)
        with pytest.raises(Error, match=r"^Block node is read-only$"):
            user.insert(node)
        assert await refused(graph.add(LayerOptions(node_name="top", file="mem"))) == "Block node is read-only"

    run(test)


def test_block_status_through_layers() -> None:
    async def test(graph: Graph) -> None:
        from pyqsd.block.extents import ALLOCATED, DATA, ZERO

        base = await graph.add(LayerOptions(node_name="base", file=MemoryOptions()))
        assert isinstance(base.driver, Layer)
        base.driver.allocated, base.driver.size = {1, 2}, 3 * 4096
        base.length = 3 * 4096
        top = await graph.add(LayerOptions(node_name="top", file=MemoryOptions(), backing="base"))
        assert isinstance(top.driver, Layer)
        top.driver.allocated, top.driver.zero = {2}, {4}
        seen = []
        for cluster in range(6):
            (n, flags, _, _), depth = await top.block_status_above(None, cluster * 4096, 4096)
            seen.append((n, flags & (DATA | ZERO | ALLOCATED), depth))
        nowhere = (4096, ZERO, 0)
        beyond = (4096, ZERO | ALLOCATED, 2)
        assert seen == [
            nowhere,
            (4096, DATA | ALLOCATED, 2),
            (4096, DATA | ALLOCATED, 1),
            beyond,
            (4096, ZERO | ALLOCATED, 1),
            beyond,
        ]
        user = BlockBackend(graph, "an unnamed block device", perms.CONSISTENT_READ, perms.ALL)
        user.insert(top)
        with pytest.raises(OSError, match="out of range"):
            await user.block_status_above(None, top.length, 1)

    run(test)


def test_reads_go_down_the_chain() -> None:
    async def test(graph: Graph) -> None:
        base = await graph.add(LayerOptions(node_name="base", file=MemoryOptions()))
        await base.pwrite(4096, b"b" * 8192)
        top = await graph.add(LayerOptions(node_name="top", file=MemoryOptions(), backing="base"))
        await top.pwrite(8192, b"t" * 4096)
        assert await top.pread(0, 16384) == bytes(4096) + b"b" * 4096 + b"t" * 4096 + bytes(4096)

    run(test)


def test_reopen_changes_all_or_nothing() -> None:
    async def test(graph: Graph) -> None:
        await graph.add(MemoryOptions(node_name="a"))
        await graph.add(MemoryOptions(node_name="b"))
        top = await graph.add(LayerOptions(node_name="top", file="a"))

        def entry(**members: object) -> BlockdevOptions:
            return LayerOptions(node_name="top", **members)  # type: ignore[arg-type]

        await graph.reopen([entry(file="a", backing="b")])
        assert top.driver.backing is not None
        assert top.driver.backing.node.name == "b"
        assert await refused(graph.reopen([entry(file="a")])) == "backing is missing for 'top'"
        assert await refused(graph.reopen([entry(file="a", backing="top")])) == (
            "Making 'top' a backing child of 'top' would create a cycle"
        )
        message = await refused(
            graph.reopen([entry(file="a", backing=NULL), MemoryOptions(node_name="a", read_only=True)])
        )
        assert message == "Read-only block node 'a' cannot support read-write users"
        assert top.driver.backing is not None
        assert not graph.nodes["a"].read_only
        await graph.reopen(
            [entry(file="a", backing=NULL, read_only=True), MemoryOptions(node_name="a", read_only=True)]
        )
        assert top.driver.backing is None
        assert top.read_only
        assert graph.nodes["a"].read_only
        await graph.reopen([entry(file="b", backing=NULL)])
        assert not top.read_only
        assert [child.node.name for child in top.children] == ["b"]
        await graph.remove("a")

    run(test)


def test_reopen_waits_for_requests_and_holds_back_new_ones() -> None:
    async def test(graph: Graph) -> None:
        from .memory_driver import Memory

        node = await graph.add(MemoryOptions(node_name="mem"))
        assert isinstance(node.driver, Memory)
        user = BlockBackend(graph, "an unnamed block device", perms.CONSISTENT_READ, perms.ALL)
        user.insert(node)
        node.driver.gate = asyncio.Event()
        read = asyncio.ensure_future(user.preadv(0, 8, [memoryview(bytearray(8))]))
        await asyncio.sleep(0)
        reopen = asyncio.ensure_future(graph.reopen([MemoryOptions(node_name="mem", read_only=True)]))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not reopen.done()
        node.driver.gate.set()
        await asyncio.gather(read, reopen)
        assert node.read_only

    run(test)


def test_close_all_closes_parents_first() -> None:
    async def test(graph: Graph) -> None:
        await graph.add(MemoryOptions(node_name="mem"))
        top = await graph.add(LayerOptions(node_name="top", file="mem"))
        await top.pwrite(0, b"x" * 4096)
        await graph.close_all()
        assert graph.nodes == {}
        assert isinstance(top.driver, Layer)
        assert top.driver.closed

    run(test)
