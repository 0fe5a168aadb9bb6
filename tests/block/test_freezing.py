"""Frozen edges of a backing chain, with QSD's words for what they forbid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyqsd.block import freezing
from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.driver import ROLE_COW
from pyqsd.block.replace import Change
from pyqsd.qapi.errors import Error

from .inprocess import Commands, run
from .test_changes import images, picture


async def chain(commands: Commands, root: Path) -> list[Any]:
    """top → middle → base, of empty images, and the node other."""
    names = ("base", "middle", "top", "other")
    await images(commands, root, *names)
    for upper, lower in (("middle", "base"), ("top", "middle")):
        await commands("blockdev-reopen", options=[entry(upper, lower)])
    return [commands.graph.nodes[name] for name in names]


def entry(name: str, backing: str | None, **more: Any) -> dict[str, Any]:
    return {"driver": "qcow2", "node-name": name, "file": f"{name}-file", "backing": backing, **more}


def test_reopen_of_a_frozen_edge(tmp_path: Path) -> None:
    async def test(commands: Commands) -> None:
        base, middle, top, _ = await chain(commands, tmp_path)
        freezing.freeze(top, base)
        before = picture(commands.graph)
        words = "Cannot change frozen 'backing' link from 'middle' to 'base'"
        for other in (None, "other"):
            refused = await commands.refused("blockdev-reopen", options=[entry("middle", other)])
            assert refused == words
            # Also when it is not the first.
            options = [entry("top", "middle", **{"read-only": True}), entry("middle", other)]
            assert await commands.refused("blockdev-reopen", options=options) == words
            assert picture(commands.graph) == before
        # The same child is no change, and other options may change.
        await commands("blockdev-reopen", options=[entry("middle", "base", discard="unmap")])
        assert middle.discard_unmap
        # What is below is free.
        await commands("blockdev-reopen", options=[entry("base", "other")])
        freezing.thaw(top, base)
        await commands("blockdev-reopen", options=[entry("middle", None)])
        assert middle.driver.backing is None

    run(test)


def test_replacing_a_node_below_a_frozen_edge(tmp_path: Path) -> None:
    async def test(commands: Commands) -> None:
        graph = commands.graph
        _base, middle, top, other = await chain(commands, tmp_path)
        user = BlockBackend(graph, "user", perms.CONSISTENT_READ, perms.ALL)
        user.insert(middle)
        freezing.freeze(top, middle)
        before = picture(graph)
        change = Change()
        change.add(other, "backing", middle, ROLE_COW)
        with pytest.raises(Error) as info:
            change.move_parents(middle, other)
        assert info.value.desc == "Cannot change 'backing' link to 'middle'"
        change.undo()
        assert picture(graph) == before
        freezing.thaw(top, middle)
        change = Change()
        change.add(other, "backing", middle, ROLE_COW)
        change.move_parents(middle, other)
        change.check()
        change.commit()
        assert user.node is top.driver.backing.node is other
        user.remove()

    run(test)


def test_parts_that_overlap(tmp_path: Path) -> None:
    async def test(commands: Commands) -> None:
        base, middle, top, _ = await chain(commands, tmp_path)
        freezing.freeze(middle, base)
        with pytest.raises(Error) as info:
            freezing.freeze(top, base)
        assert info.value.desc == "Cannot change 'backing' link from 'middle' to 'base'"
        # Nothing of it was frozen.
        freezing.freeze(top, middle)
        freezing.thaw(middle, base)
        freezing.check_not_frozen(middle, None)
        with pytest.raises(Error, match="Cannot change 'backing' link from 'top' to 'middle'"):
            freezing.check_not_frozen(top, None)

    run(test)


def test_a_node_that_comes_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(commands: Commands) -> None:
        base, middle, top, _ = await chain(commands, tmp_path)
        monkeypatch.setattr(middle.driver, "never_freeze", True, raising=False)
        with pytest.raises(Error) as info:
            freezing.freeze(top, base)
        assert info.value.desc == "Cannot freeze 'backing' link to 'middle'"
        freezing.freeze(middle, base)

    run(test)


def test_a_node_that_only_a_frozen_chain_needs_is_not_let_go(tmp_path: Path) -> None:
    """The middle of the chain belongs to nobody but the top: it would be closed with the edge to it. (QSD ends with a
    failed assertion here.)"""

    async def test(commands: Commands) -> None:
        graph = commands.graph
        await images(commands, tmp_path, "base", "top")
        (tmp_path / "middle.qcow2").write_bytes((tmp_path / "base.qcow2").read_bytes())
        inner = {"driver": "file", "filename": str(tmp_path / "middle.qcow2")}
        options = {"driver": "qcow2", "node-name": "middle", "file": inner, "backing": "base"}
        await commands("blockdev-del", node_name="top")
        await commands.add("qcow2", "top", file="top-file", backing=options)
        freezing.freeze(graph.nodes["middle"], graph.nodes["base"])
        before = picture(graph)
        for other in (None, "base"):
            assert (
                await commands.refused("blockdev-reopen", options=[entry("top", other)])
                == "Cannot change frozen 'backing' link from 'middle' to 'base'"
            )
            assert picture(graph) == before
        freezing.thaw(graph.nodes["middle"], graph.nodes["base"])
        await commands("blockdev-reopen", options=[entry("top", "base")])
        assert "middle" not in graph.nodes

    run(test)
