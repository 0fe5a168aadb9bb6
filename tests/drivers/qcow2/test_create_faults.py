"""Making an image over another one: cut short at every request, with errors, cancelled, refused."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block.create import create_image
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.create import create, empty_image
from pyqsd.drivers.formats.qcow2.create_options import CreateOptions
from pyqsd.drivers.protocols.file import Options as FileOptions
from pyqsd.qapi.command import EventBus
from pyqsd.qapi.errors import Error
from tests.block import inprocess
from tests.drivers.qcow2.support import LogFile, logged, run
from tests.drivers.qcow2.test_crash import after_kill, after_power_cut
from tests.support import images

MiB = 1 << 20
#: An image with tables all over the place, and what else a file may have.
OLD = (empty_image(64 * MiB, cluster_size=4096) + b"\xff" * (3 * MiB)).ljust(4 * MiB, b"\xee")

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"size": MiB},
    "metadata": {"size": MiB, "preallocation": "metadata", "cluster_size": 4096},
    "falloc": {"size": MiB, "preallocation": "falloc", "cluster_size": 16384, "extended_l2": True},
    "short": {"size": 512, "cluster_size": 512, "version": "v2"},
}


def target(graph: Graph) -> tuple[Node, LogFile]:
    below = logged(graph, OLD)
    below.node.monitor_owned = True
    return below.node, below


async def whole(how: dict[str, Any]) -> bytes:
    """What comes out when nothing goes wrong."""
    graph = Graph(EventBus())
    node, below = target(graph)
    await recreate(graph, node.name, how)
    return bytes(below.data)


async def recreate(graph: Graph, name: str, how: dict[str, Any]) -> None:
    await create(graph, CreateOptions(file=name, **how))


def judge(crashed: bytes, final: bytes, what: Any) -> None:
    """The old image, none, or the new one."""
    if crashed[: len(OLD)] != OLD and headers.probe(crashed[:8]):
        assert crashed == final, what


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
def test_cut_short(way: str, power: bool, tmp_path: Path) -> None:
    async def main() -> tuple[list[tuple[Any, ...]], bytes]:
        graph = Graph(EventBus())
        node, below = target(graph)
        await recreate(graph, node.name, WAYS[way])
        assert not node.parents
        return below.log, bytes(below.data)

    log, final = run(main())
    rnd = random.Random(way)
    for cut in range(len(log) + 1):
        for _ in range(4 if power else 1):
            crashed = after_power_cut(OLD, log, cut, rnd) if power else after_kill(OLD, log, cut)
            judge(crashed, final, cut)
    assert headers.probe(final[:8])
    path = tmp_path / "new"
    path.write_bytes(final)
    images.assert_clean(path)
    # Nothing of the old file shows through.
    assert not images.read_all(path, "qcow2", tmp_path / "raw").strip(b"\0")


@pytest.mark.parametrize("way", WAYS)
def test_error_at_every_request(way: str) -> None:
    """Whatever fails, it is said, what is there is no mixture, and the next attempt works."""

    async def main() -> None:
        final = await whole(WAYS[way])
        number, failed = 0, True
        while failed:
            graph = Graph(EventBus())
            node, below = target(graph)
            left = number

            def fault(kind: str) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise OSError(errno.EIO, "injected")

            below.fault = fault
            failed = False
            try:
                await recreate(graph, node.name, WAYS[way])
            except (Error, OSError) as exc:
                failed = True
                assert isinstance(exc, Error) or exc.errno == errno.EIO
                assert "Input/output error" in str(exc) or isinstance(exc, OSError)
            assert not node.parents and not graph.backends
            below.fault = None
            crashed = bytes(below.data)
            await recreate(graph, node.name, WAYS[way])
            judge(crashed, final, number)
            number += 1
        assert number > 5

    run(main())


@pytest.mark.parametrize("way", WAYS)
def test_cancelled_at_every_turn(way: str) -> None:
    async def main() -> None:
        final = await whole(WAYS[way])
        after = 0
        while True:
            graph = Graph(EventBus())
            node, below = target(graph)
            task = asyncio.create_task(recreate(graph, node.name, WAYS[way]))
            for _ in range(after):
                await asyncio.sleep(0)
            ended = task.done()
            task.cancel()
            await asyncio.wait([task])
            assert not node.parents and not graph.backends and not node.in_flight
            crashed = bytes(below.data)
            await recreate(graph, node.name, WAYS[way])
            judge(crashed, final, after)
            if ended:
                break
            after += 1
        assert after > 5

    run(main())


@pytest.mark.parametrize("turns", range(0, 12, 2))
def test_cancelled_with_its_own_node(turns: int, tmp_path: Path) -> None:
    """A node that was opened for it goes with it."""
    path = tmp_path / "disk"
    path.touch()

    async def main() -> None:
        graph = Graph(EventBus())
        options = CreateOptions(file=FileOptions(filename=str(path)), size=MiB)
        task = asyncio.create_task(create(graph, options))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert not graph.nodes and not graph.backends
        await create(graph, options)

    run(main())
    images.assert_clean(path)


@pytest.mark.parametrize(
    "how",
    [
        {"size": 513},
        {"size": 1 << 62},
        {"size": (1 << 63) - 512},
        {"cluster_size": 1000},
        {"refcount_bits": 3},
        {"version": "v2", "lazy_refcounts": True},
        {"backing_file": "x" * 1024},
        {"backing_file": "x" * 500, "cluster_size": 512},
        {"backing_file": "x", "preallocation": "full"},
        {"size": 1 << 60, "preallocation": "metadata", "cluster_size": 2 * MiB},
        {"data_file": "log0"},
        {"data_file": "nosuch"},
        {"data_file_raw": True},
    ],
    ids=str,
)
def test_what_is_refused_leaves_the_old_image(how: dict[str, Any]) -> None:
    async def main() -> None:
        graph = Graph(EventBus())
        node, below = target(graph)
        with pytest.raises(Error):
            await recreate(graph, node.name, {"size": MiB, **how})
        assert not below.log and not node.parents

    run(main())


def test_data_and_tables_in_one_file(tmp_path: Path) -> None:
    """Also not by way of two nodes."""
    path = tmp_path / "disk"
    path.write_bytes(OLD)
    file = FileOptions(filename=str(path))

    async def main() -> None:
        with pytest.raises(Error, match="Failed to get"):
            await create(Graph(EventBus()), CreateOptions(file=file, data_file=file, size=MiB))

    run(main())
    assert path.read_bytes() == OLD


def test_end_of_the_daemon_while_an_image_is_made(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(OLD)
    states: list[str] = []

    async def main() -> None:
        async with inprocess.Daemon() as daemon:
            daemon.on_event(lambda event: states.append(event.get("data", {}).get("status", "")))
            options = {"driver": "qcow2", "size": 1 << 43, "preallocation": "metadata"}
            options["file"] = {"driver": "file", "filename": str(path)}
            await daemon.qmp("blockdev-create", job_id="j", options=options)
            # It is at work: the old header is gone.
            for _ in range(1000):
                if not headers.probe(path.open("rb").read(8)):
                    break
                await asyncio.sleep(0.01)
            (job,) = await daemon.qmp("query-jobs")
            assert (job["status"], job["current-progress"], job["total-progress"]) == ("running", 0, 1)
            assert await daemon.qmp("query-named-block-nodes")

    asyncio.run(main())
    assert states == ["created", "running", "aborting", "concluded", "null"]
    assert not headers.probe(path.open("rb").read(8))


def test_cancelled_and_paused_by_command(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.touch()

    async def test(commands: inprocess.Commands) -> None:
        file = {"driver": "file", "filename": str(path), "node-name": "inline"}
        options = {"driver": "qcow2", "size": 1 << 43, "preallocation": "metadata", "file": file}
        await commands("blockdev-create", job_id="j", options=options)
        await commands("job-pause", id="j")
        assert await commands.refused("job-pause", id="j") == "Job is already paused"
        assert "cannot accept command verb 'dismiss'" in await commands.refused("job-dismiss", id="j")
        await commands("job-resume", id="j")
        await commands("job-cancel", id="j")
        await commands.daemon.jobs.find("j").wait()
        (job,) = await commands("query-jobs")
        assert job["error"] == "Operation canceled"
        assert await commands("query-named-block-nodes") == []
        await commands("job-dismiss", id="j")

    inprocess.run(test)


def test_create_image(tmp_path: Path) -> None:
    """The short way, for snapshots and the like."""

    async def main() -> None:
        graph = Graph(EventBus())
        base, overlay, raw = (str(tmp_path / name) for name in ("base", "overlay", "raw"))
        await create_image(graph, "qcow2", base, MiB)
        await create_image(graph, "qcow2", overlay, MiB, base, "qcow2")
        await create_image(graph, "qcow2", overlay, 2 * MiB, base, "qcow2")  # over the first one
        await create_image(graph, "raw", raw, MiB)
        for fmt, words in (
            ("nosuch", "Unknown file format 'nosuch'"),
            ("null-co", "Format driver 'null-co' does not support image creation"),
        ):
            with pytest.raises(Error, match=words):
                await create_image(graph, fmt, base, MiB)
        with pytest.raises(Error, match="Backing file not supported for file format 'raw'"):
            await create_image(graph, "raw", raw, MiB, base)
        with pytest.raises(Error, match="Protocol driver 'null-co' does not support image creation"):
            await create_image(graph, "qcow2", "null-co://", MiB)
        with pytest.raises(Error, match="Could not create '/no/such': No such file or directory"):
            await create_image(graph, "qcow2", "/no/such", MiB)
        assert not graph.nodes

    run(main())
    info = images.info(tmp_path / "overlay")
    assert (info["virtual-size"], info["backing-filename"], info["backing-filename-format"]) == (
        2 * MiB,
        str(tmp_path / "base"),
        "qcow2",
    )
    images.assert_clean(tmp_path / "overlay")
    assert (tmp_path / "raw").stat().st_size == MiB
