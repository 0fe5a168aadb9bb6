"""Changes of the graph: actions, taking back, drained sections, and permissions that change everywhere or nowhere."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block import action, graph_perms
from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.driver import ROLE_COW
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.block.replace import Change
from pyqsd.block.snapshot import SnapshotAction
from pyqsd.drivers.formats.qcow2.create import empty_image
from pyqsd.qapi.errors import Error

from .inprocess import Commands, run
from .memory_driver import LayerOptions, Memory, MemoryOptions, memory_drivers


def picture(graph: Graph) -> Any:
    """All that a change may touch: edges in order, permissions, effective options, lengths, and the locks on files."""

    def of(node: Node) -> Any:
        locks = getattr(getattr(node.driver, "_file", None), "locks", None)
        return (
            [(child.name, child.node.name, child.perm, child.shared) for child in node.children],
            [(edge.parent.description(), edge.name, edge.perm, edge.shared) for edge in node.parents],
            [child.node.name if child is not None else None for child in (node.driver.file, node.driver.backing)],
            (node.read_only, node.cache_direct, node.no_flush, node.discard_unmap, node.detect_zeroes, node.active),
            node.length,
            node.options,
            (locks.held, locks.unshared) if locks is not None else None,
        )

    return {name: of(node) for name, node in graph.nodes.items()}, [b.quiesced for b in graph.backends]


async def images(commands: Commands, root: Path, *names: str) -> None:
    """Nodes of empty qcow2 images, with their file nodes."""
    for name in names:
        (root / f"{name}.qcow2").write_bytes(empty_image(1 << 20))
        await commands.add("file", f"{name}-file", filename=str(root / f"{name}.qcow2"))
        await commands.add("qcow2", name, file=f"{name}-file")


def use(graph: Graph, name: str, perm: int, shared: int = perms.ALL) -> BlockBackend:
    backend = BlockBackend(graph, f"user of {name}", perm, shared)
    backend.insert(graph.nodes[name])
    return backend


# --- actions ---------------------------------------------------------------------------------------------------------


class Noted(action.Action):
    def __init__(self, name: str, log: list[str], fails: bool = False, gate: asyncio.Event | None = None) -> None:
        self.name, self.log, self.fails, self.gate = name, log, fails, gate

    async def prepare(self) -> None:
        self.log.append(f"prepare {self.name}")
        if self.fails:
            raise Error("no")

    async def commit(self) -> None:
        if self.gate is not None:
            await self.gate.wait()
        self.log.append(f"commit {self.name}")

    async def abort(self) -> None:
        self.log.append(f"abort {self.name}")

    async def clean(self) -> None:
        self.log.append(f"clean {self.name}")


def test_actions_are_committed_together() -> None:
    log: list[str] = []
    asyncio.run(action.run(Noted("a", log), Noted("b", log)))
    assert log == ["prepare a", "prepare b", "commit b", "commit a", "clean b", "clean a"]


def test_one_that_fails_takes_all_back() -> None:
    log: list[str] = []
    with pytest.raises(Error, match="no"):
        asyncio.run(action.run(Noted("a", log), Noted("b", log), Noted("c", log, fails=True), Noted("d", log)))
    assert log == [
        *("prepare a", "prepare b", "prepare c"),
        *("abort b", "abort a"),
        *("clean c", "clean b", "clean a"),
    ]


def test_actions_end_in_spite_of_a_cancellation() -> None:
    async def main() -> None:
        log: list[str] = []
        gate = asyncio.Event()
        task = asyncio.create_task(action.run(Noted("a", log), Noted("b", log, gate=gate)))
        await turns()
        assert log == ["prepare a", "prepare b"]
        task.cancel()
        for _ in range(5):
            await asyncio.sleep(0)
        assert not task.done()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log[2:] == ["commit b", "commit a", "clean b", "clean a"]

    asyncio.run(main())


# --- taking back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("committed", [False, True])
def test_a_change_is_taken_back_exactly(tmp_path: Path, committed: bool) -> None:
    async def test(commands: Commands) -> None:
        graph = commands.graph
        await images(commands, tmp_path, "base", "middle", "top", "other")
        await commands.add("raw", "user", file="base")
        one = use(graph, "base", perms.CONSISTENT_READ | perms.WRITE, perms.ALL)
        two = use(graph, "user", perms.CONSISTENT_READ)
        before = picture(graph)
        change = Change()
        change.add(graph.nodes["top"], "backing", graph.nodes["base"], ROLE_COW)
        change.move_parents(graph.nodes["base"], graph.nodes["top"])
        change.check()
        assert one.node is two.node.driver.file.node is graph.nodes["top"]  # type: ignore[union-attr]
        if committed:
            change.commit()
        assert picture(graph) != before
        change.undo()
        assert picture(graph) == before
        one.remove()
        two.remove()

    run(test)


def test_snapshots_are_taken_back_exactly(tmp_path: Path) -> None:
    """Two snapshots on top of each other are prepared and aborted."""

    async def test(commands: Commands) -> None:
        graph = commands.graph
        await images(commands, tmp_path, "base", "middle", "top")
        backend = use(graph, "base", perms.CONSISTENT_READ | perms.WRITE)
        await backend.pwritev(0, 4, [memoryview(b"data")])
        before = picture(graph)
        actions = [SnapshotAction(graph, "base", "middle"), SnapshotAction(graph, "middle", "top")]
        for one in actions:
            await one.prepare()
        assert backend.node is graph.nodes["top"]
        assert not backend.write_now(0, 4, [memoryview(b"none")])
        waiting = asyncio.create_task(backend.pwritev(4, 4, [memoryview(b"more")]))
        await asyncio.sleep(0)
        for one in reversed(actions):
            await one.abort()
        for one in actions:
            await one.clean()
        await waiting
        assert picture(graph) == before
        assert bytes(await graph.nodes["base"].pread(0, 8)) == b"datamore"
        assert bytes(await graph.nodes["top"].pread(0, 8)) == bytes(8)
        backend.remove()

    run(test)


@pytest.mark.parametrize("bad", range(3))
def test_reopening_fails_at_any_node_and_nothing_has_changed(tmp_path: Path, bad: int) -> None:
    async def test(commands: Commands) -> None:
        graph = commands.graph
        await images(commands, tmp_path, "a", "b", "c", "d")
        await commands.add("raw", "raw", file="d-file")
        before = picture(graph)
        entries: list[dict[str, Any]] = [
            {"driver": "qcow2", "node-name": "a", "file": "raw", "read-only": True, "discard": "unmap"},
            {"driver": "file", "node-name": "b-file", "filename": str(tmp_path / "b.qcow2"), "cache": {"direct": True}},
            {"driver": "qcow2", "node-name": "c", "file": "c-file", "backing": "b", "lazy-refcounts": True},
        ]
        # The driver of the one refuses, the filename of the next cannot change, the last gets a cycle.
        entries[bad] = [
            {**entries[0], "l2-cache-entry-size": 7},
            {**entries[1], "filename": str(tmp_path / "a.qcow2")},
            {**entries[2], "backing": "c"},
        ][bad]
        await commands.refused("blockdev-reopen", options=entries)
        assert picture(graph) == before

    run(test)


def test_random_changes_and_failures(tmp_path: Path) -> None:
    """Whatever is refused has changed nothing; whatever was done can be told from the edges."""

    async def test(commands: Commands) -> None:
        graph = commands.graph
        rng = random.Random(5)
        names = ("a", "b", "c", "d")
        await images(commands, tmp_path, *names)
        users = [use(graph, "a", perms.CONSISTENT_READ | perms.WRITE, perms.ALL & ~perms.RESIZE)]
        users.append(use(graph, "b", perms.CONSISTENT_READ, perms.CONSISTENT_READ | perms.WRITE_UNCHANGED))
        done = refused = 0
        for _ in range(150):
            entries = []
            for name in rng.sample(names, rng.randrange(1, 4)):
                entries.append(
                    {
                        "driver": "qcow2",
                        "node-name": name,
                        "file": f"{rng.choice((name, name, name, 'a'))}-file",
                        "backing": rng.choice((None, *names)),
                        "read-only": rng.random() < 0.5,
                    }
                )
            before = picture(graph)
            try:
                await commands("blockdev-reopen", options=entries)
            except Error:
                refused += 1
                assert picture(graph) == before
            else:
                done += 1
                for entry in entries:
                    driver = graph.nodes[str(entry["node-name"])].driver
                    assert driver.file is not None
                    assert driver.file.node.name == entry["file"]
                    assert (driver.backing.node.name if driver.backing is not None else None) == entry["backing"]
            for node in graph.nodes.values():
                for child in node.children:
                    want = graph_perms.child_perms(node, child, *graph_perms.cumulative(node))
                    assert (child.perm, child.shared) == want
        assert done > 10
        assert refused > 10
        for user in users:
            user.remove()

    run(test)


# --- drained sections ------------------------------------------------------------------------------------------------


async def layered() -> tuple[Graph, Memory, BlockBackend]:
    from pyqsd.qapi.command import EventBus

    graph = Graph(EventBus())
    await graph.add(LayerOptions(node_name="top", file=MemoryOptions(node_name="mem")))
    memory = graph.nodes["mem"].driver
    assert isinstance(memory, Memory)
    backend = use(graph, "top", perms.CONSISTENT_READ | perms.WRITE)
    return graph, memory, backend


async def turns(number: int = 10) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


def drained(test: Any) -> None:
    async def main() -> None:
        with memory_drivers():
            graph, memory, backend = await layered()
            await test(graph, memory, backend)
            assert backend.quiesced == 0
            assert graph._drains == []
            backend.remove()
            await graph.close_all()

    asyncio.run(main())


def write(backend: BlockBackend, fill: bytes) -> asyncio.Task[None]:
    return asyncio.create_task(backend.pwritev(0, 4096, [memoryview(fill * 4096)]))


def test_a_drain_waits_for_what_is_in_flight_and_holds_the_rest_back() -> None:
    async def test(graph: Graph, memory: Memory, backend: BlockBackend) -> None:
        memory.gate = asyncio.Event()
        first = write(backend, b"1")
        await turns()
        inside = asyncio.Event()
        leave = asyncio.Event()

        async def section() -> None:
            async with graph.drained(graph.nodes["mem"]):
                assert first.done()
                inside.set()
                await leave.wait()

        task = asyncio.create_task(section())
        await turns()
        second = write(backend, b"2")
        await turns()
        assert not inside.is_set()
        memory.gate.set()
        await inside.wait()
        await turns()
        assert not second.done()
        assert memory.data[0] == ord("1")
        leave.set()
        await task
        await second
        assert memory.data[0] == ord("2")

    drained(test)


def test_nested_drains() -> None:
    async def test(graph: Graph, memory: Memory, backend: BlockBackend) -> None:
        async with graph.drained(graph.nodes["top"]):
            waiting = write(backend, b"1")
            async with graph.drained(graph.nodes["mem"], graph.nodes["top"]):
                await turns()
                assert backend.quiesced == 2
            await turns()
            assert not waiting.done()
        await waiting

    drained(test)


@pytest.mark.parametrize("when", ["before", "inside"])
def test_a_cancelled_drain_lets_requests_go_on(when: str) -> None:
    async def test(graph: Graph, memory: Memory, backend: BlockBackend) -> None:
        memory.gate = asyncio.Event()
        first = write(backend, b"1")
        await turns()
        if when == "inside":
            memory.gate.set()

        async def section() -> None:
            async with graph.drained(graph.nodes["mem"]):
                await asyncio.Event().wait()

        task = asyncio.create_task(section())
        await turns()
        second = write(backend, b"2")
        await turns()
        assert not second.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        memory.gate.set()
        await asyncio.gather(first, second)

    drained(test)


def test_a_request_that_waits_for_a_drain_can_be_cancelled() -> None:
    async def test(graph: Graph, memory: Memory, backend: BlockBackend) -> None:
        async with graph.drained(graph.nodes["mem"]):
            waiting = write(backend, b"1")
            await turns()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        assert backend.in_flight == 0
        assert not memory.data[0]

    drained(test)


# --- permissions -----------------------------------------------------------------------------------------------------


def test_a_conflict_deep_below_changes_nothing_anywhere(tmp_path: Path) -> None:
    async def test(commands: Commands) -> None:
        graph = commands.graph
        path = tmp_path / "disk"
        path.write_bytes(bytes(1 << 20))
        await commands.add("file", "f", filename=str(path))
        await commands.add("raw", "a", file="f")
        await commands.add("raw", "b", file="a")
        await commands.add("raw", "c", file="b")
        below = use(graph, "f", perms.CONSISTENT_READ, perms.ALL & ~perms.WRITE)
        before = picture(graph)
        for shared in (perms.ALL, perms.CONSISTENT_READ):
            with pytest.raises(Error, match="Permission conflict on node 'f'"):
                use(graph, "c", perms.CONSISTENT_READ | perms.WRITE, shared)
            assert picture(graph) == before
        below.remove()
        use(graph, "c", perms.CONSISTENT_READ | perms.WRITE, perms.CONSISTENT_READ).remove()

    run(test)


def test_a_lock_of_another_program_changes_nothing_anywhere(tmp_path: Path) -> None:
    async def test(commands: Commands) -> None:
        graph = commands.graph
        (tmp_path / "one").write_bytes(bytes(1 << 20))
        # A node of its own is to the file as another program.
        await commands.add("file", "one", filename=str(tmp_path / "one"))
        await commands.add("file", "same", filename=str(tmp_path / "one"))
        await commands.add("raw", "top", file="one")
        await images(commands, tmp_path, "overlay")
        other = use(graph, "same", perms.CONSISTENT_READ | perms.WRITE)
        reader = use(graph, "top", perms.CONSISTENT_READ)
        before = picture(graph)
        with pytest.raises(Error, match="lock"):
            reader.set_perms(perms.CONSISTENT_READ, perms.CONSISTENT_READ)
        assert picture(graph) == before
        other.remove()
        reader.set_perms(perms.CONSISTENT_READ, perms.CONSISTENT_READ)
        reader.remove()

    run(test)


# --- inactive nodes --------------------------------------------------------------------------------------------------


def test_activation_that_fails_can_be_tried_again(tmp_path: Path) -> None:
    async def test(commands: Commands) -> None:
        graph = commands.graph
        await images(commands, tmp_path, "disk")
        backend = BlockBackend(graph, "user", perms.CONSISTENT_READ | perms.WRITE, perms.ALL)
        backend.allow_inactive = True
        backend.insert(graph.nodes["disk"])
        await backend.pwritev(0, 4, [memoryview(b"data")])
        await commands("blockdev-set-active", node_name="disk", active=False)
        before = picture(graph)
        path = tmp_path / "disk.qcow2"
        good = path.read_bytes()
        path.write_bytes(b"X" + good[1:])
        message = await commands.refused("blockdev-set-active", node_name="disk", active=True)
        assert message == "Could not reopen qcow2 layer: Image is not in qcow2 format"
        assert graph.nodes["disk-file"].active
        assert not graph.nodes["disk"].active
        assert backend.suspended
        with pytest.raises(OSError, match="read-only"):
            await backend.pwritev(0, 4, [memoryview(b"more")])
        path.write_bytes(good)
        await commands("blockdev-set-active", node_name="disk-file", active=False)
        assert picture(graph) == before
        await commands("blockdev-set-active", active=True)
        await backend.pwritev(4, 4, [memoryview(b"more")])
        assert bytes(await graph.nodes["disk"].pread(0, 8)) == b"datamore"
        backend.remove()

    run(test)


def test_an_error_while_a_node_becomes_inactive_leaves_it_active(tmp_path: Path) -> None:
    async def test(commands: Commands) -> None:
        graph = commands.graph
        await images(commands, tmp_path, "disk")
        node = graph.nodes["disk"]
        await node.pwrite(0, b"data")
        before = picture(graph)
        flush = node.driver.inactivate

        async def fail() -> None:
            raise OSError(28, "full")

        node.driver.inactivate = fail  # type: ignore[method-assign]
        message = await commands.refused("blockdev-set-active", node_name="disk", active=False)
        assert message == "Failed to inactivate node: No space left on device"
        assert picture(graph) == before
        node.driver.inactivate = flush  # type: ignore[method-assign]
        await commands("blockdev-set-active", node_name="disk", active=False)
        assert not node.active

    run(test)


def test_taking_back_leaves_alone_what_others_did(tmp_path: Path) -> None:
    """While a change could still be taken back, users come, go and are led elsewhere (exports, the end of a job)."""

    async def test(commands: Commands) -> None:
        await images(commands, tmp_path, "base", "top", "other")
        graph = commands.graph
        base, top, other = (graph.nodes[name] for name in ("base", "top", "other"))
        stays, goes, moves = (use(graph, "base", perms.CONSISTENT_READ) for _ in range(3))
        change = Change()
        change.add(top, "backing", base, ROLE_COW)
        change.move_parents(base, top)
        change.check()
        change.commit()
        assert stays.node is goes.node is moves.node is top
        comes = use(graph, "base", perms.CONSISTENT_READ)
        goes.remove()
        later = Change()
        edge = moves.edge
        assert edge is not None
        later._retarget(edge, other)
        later.check()
        later.commit()
        change.undo()
        assert stays.node is base and comes.node is base and moves.node is other and goes.edge is None
        assert {edge.parent for edge in base.parents} == {stays, comes} and not top.parents
        assert [edge.parent for edge in other.parents] == [moves] and top.driver.backing is None
        for backend in (stays, comes, moves):
            backend.remove()

    run(test)
