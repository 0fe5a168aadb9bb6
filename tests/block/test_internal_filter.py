"""Filters that jobs put over a node, and take away again."""

from __future__ import annotations

from typing import Any

import pytest

from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.child import Child
from pyqsd.block.internal_filter import InternalFilter, insert_above, lead_away
from pyqsd.block.options import BlockdevOptions
from pyqsd.block.replace import Change
from pyqsd.qapi.errors import Error

from .inprocess import Commands, run
from .test_changes import picture


class Plain(InternalFilter):
    name = "plain"

    class Options(BlockdevOptions, tag="plain"):
        pass


class Greedy(Plain):
    """Always writes."""

    name = "greedy"

    def child_perms(self, child: Child, role: int, perm: int, shared: int) -> tuple[int, int]:
        return perm | perms.WRITE, 0


async def user(commands: Commands, node: str, perm: int = perms.CONSISTENT_READ | perms.WRITE) -> BlockBackend:
    backend = BlockBackend(commands.graph, "a test", perm, perms.ALL & ~perms.RESIZE)
    backend.insert(commands.graph.find(node))
    return backend


def test_over_a_node_and_away(tmp_path: Any) -> None:
    (tmp_path / "a").write_bytes(bytes(1 << 20))

    async def test(commands: Commands) -> None:
        await commands.add("file", "a", filename=str(tmp_path / "a"))
        await commands.add("null-co", "b", size=1 << 20, read_zeroes=True)
        graph = commands.graph
        backend = await user(commands, "a")
        before = picture(graph)
        top = await insert_above(graph.find("a"), Plain, "top")
        assert backend.node is top and top.length == 1 << 20
        await backend.pwritev(0, 3, [memoryview(b"abc")])
        assert bytes(await graph.find("a").pread(0, 4)) == b"abc\0"
        shown = await commands.node("top")
        assert (shown["drv"], shown["file"], shown["ro"]) == ("plain", str(tmp_path / "a"), False)
        edges = (await commands("x-debug-query-block-graph"))["edges"]
        assert [edge["name"] for edge in edges] == ["backing", "root"]
        assert await commands.refused("blockdev-del", node_name="top") == "Node top is in use"

        change = Change()
        async with graph.drained(top):
            lead_away(change, top, graph.find("a"))
            change.check()
            change.commit()
            await graph.unref(top)
        assert picture(graph) == before and "top" not in graph.nodes

        # To another node than the one below.
        top = await insert_above(graph.find("a"), Plain, None)
        assert top.name.startswith("#block")
        change = Change()
        async with graph.drained(top):
            lead_away(change, top, graph.find("b"))
            change.check()
            change.commit()
            await graph.unref(top)
        assert backend.node is graph.find("b")
        backend.remove()
        await commands("blockdev-del", node_name="a")

    run(test)


def test_nothing_changes_when_it_cannot_be() -> None:
    async def test(commands: Commands) -> None:
        await commands.add("null-co", "a", size=1 << 20, read_zeroes=True)
        graph = commands.graph
        backend = await user(commands, "a")
        before = picture(graph)
        for name, words in (
            ("a", "Duplicate nodes with node-name='a'"),
            ("#a", "Invalid node-name: '#a'"),
            ("n" * 32, "Node name too long"),
        ):
            with pytest.raises(Error) as info:
                await insert_above(graph.find("a"), Plain, name)
            assert info.value.desc == words
            assert picture(graph) == before
        # What it needs of the node is not to be had.
        await commands.add("null-co", "ro", size=1 << 20, read_zeroes=True, read_only=True)
        before = picture(graph)
        other = BlockBackend(graph, "a test", 0, perms.ALL)
        other.insert(graph.find("ro"))
        with pytest.raises(Error, match="Block node is read-only"):
            await insert_above(graph.find("ro"), Greedy, "top")
        assert other.node is graph.find("ro") and "top" not in graph.nodes
        other.remove()
        assert picture(graph) == before
        backend.remove()

    run(test)
