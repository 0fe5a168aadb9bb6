"""Mirrors of images with backing files, and the active commit, while users write."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.jobs.block_job import BlockdevOnError
from pyqsd.jobs.mirror import start_active_commit
from pyqsd.qapi.errors import Error
from tests.block.inprocess import Commands, run
from tests.support import images, peers
from tests.support.images import KiB

SIZE = 1024 * KiB


class Users:
    """Users of one node, each with a part of the disk; `model` is what is to be read."""

    def __init__(self, commands: Commands, node: str, seed: int, count: int = 3) -> None:
        self.rng = random.Random(seed)
        self.graph = commands.graph
        self.model = bytearray(SIZE)
        self.ends = False
        self.backends: list[BlockBackend] = []
        for _ in range(count):
            backend = BlockBackend(self.graph, "a test", perms.CONSISTENT_READ | perms.WRITE, perms.ALL & ~perms.RESIZE)
            backend.insert(self.graph.find(node))
            self.backends.append(backend)

    async def start(self) -> None:
        await self.backends[0].preadv(0, SIZE, [memoryview(self.model)])
        loop = asyncio.get_running_loop()
        self.tasks = [loop.create_task(self._use(number)) for number in range(len(self.backends))]

    async def _use(self, number: int) -> None:
        rng, backend = random.Random(self.rng.random()), self.backends[number]
        part = SIZE // len(self.backends)
        while not self.ends:
            length = rng.choice((1, 512, 4096, 70000))
            at = number * part + rng.randrange(part - length)
            if rng.random() < 0.6:
                at = at // 512 * 512
            view = memoryview(self.model)[at : at + length]
            match rng.randrange(5):
                case 0:
                    got = bytearray(length)
                    await backend.preadv(at, length, [memoryview(got)])
                    assert got == view
                case 1:
                    await backend.pwrite_zeroes(at, length)
                    view[:] = bytes(length)
                case 2:
                    await backend.flush()
                case _:
                    data = rng.randbytes(length)
                    await backend.pwritev(at, length, [memoryview(data)])
                    view[:] = data
            for _ in range(rng.randrange(30)):
                await asyncio.sleep(0)

    async def stop(self, node: str) -> None:
        """They stop, and read what they have written, from the node `node`."""
        self.ends = True
        await asyncio.gather(*self.tasks)
        assert {backend.node.name for backend in self.backends} == {node}
        got = bytearray(SIZE)
        await self.backends[0].preadv(0, SIZE, [memoryview(got)])
        assert got == self.model
        for backend in self.backends:
            backend.remove()


def told(commands: Commands, name: str) -> Callable[[], bool]:
    return lambda: name in [event.NAME for event in commands.events]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        # Nothing announces it.
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def chain(commands: Commands, root: Path, *sizes: int, cluster: int = 64 * KiB) -> None:
    """base ← … ← top, images of these sizes with something in each; those below the top are read-only."""
    below: Path | None = None
    options: dict[str, Any] | None = None
    for number, size in enumerate(sizes):
        path = images.create(root / f"{number}", size, "qcow2", f"cluster_size={cluster}", below)
        at = number * 100 * KiB
        images.io(path, f"write -P {number + 1} {at} 200k", f"write -z {at + 150 * KiB} 64k")
        named = {"driver": "qcow2", "node-name": f"n{number}", "file": {"driver": "file", "filename": str(path)}}
        options = {**named, **({} if options is None else {"backing": {**options, "read-only": True}})}
        below = path
    assert options is not None
    await commands("blockdev-add", **options)


def compare(image: Path, model: bytes, root: Path) -> None:
    """What the real program reads in the image, and whether it is in order."""
    images.check(image)
    raw = root / "model"
    raw.write_bytes(model)
    peers.run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, raw)


@pytest.mark.parametrize(
    "mode,granularity", [("background", 4096), ("write-blocking", 4096), ("write-blocking", 65536)]
)
@pytest.mark.parametrize("sync", ["full", "top", "none"])
def test_drive_mirror_of_a_chain(sync: str, mode: str, granularity: int, tmp_path: Path) -> None:
    """With ``top`` and ``none`` the target has no backing file until the end, and clusters of 64 KiB, of which users
    write parts."""
    users: Users | None = None

    async def test(c: Commands) -> None:
        nonlocal users
        await chain(c, tmp_path, SIZE, SIZE, cluster=4096)
        users = Users(c, "n1", granularity)
        await users.start()
        await c(
            "drive-mirror",
            job_id="j",
            device="n1",
            target=str(tmp_path / "target"),
            node_name="target",
            sync=sync,
            granularity=granularity,
            copy_mode=mode,
        )
        await until(told(c, "BLOCK_JOB_READY"))
        await asyncio.sleep(0.05)
        await c("job-complete", id="j")
        await until(told(c, "BLOCK_JOB_COMPLETED"))
        await asyncio.sleep(0.02)
        await users.stop("target")

    run(test)
    assert users is not None
    compare(tmp_path / "target", users.model, tmp_path)


@pytest.mark.parametrize("end", ["complete", "soft", "cancel"])
@pytest.mark.parametrize("sizes", [(SIZE, SIZE), (SIZE, SIZE, SIZE), (300 * KiB, 700 * KiB, SIZE)])
def test_active_commit(sizes: tuple[int, ...], end: str, tmp_path: Path) -> None:
    users: Users | None = None
    top = f"n{len(sizes) - 1}"

    async def test(c: Commands) -> None:
        nonlocal users
        await chain(c, tmp_path, *sizes)
        users = Users(c, top, len(sizes))
        await users.start()
        graph = c.graph
        await start_active_commit(c.daemon.jobs, graph, "j", graph.find(top), graph.find("n0"))
        assert not graph.find("n0").read_only
        if end == "cancel":
            await asyncio.sleep(0.003)
            await c("job-cancel", id="j")
        else:
            await until(told(c, "BLOCK_JOB_READY"))
            await asyncio.sleep(0.03)
            if end == "complete":
                await c("job-complete", id="j")
            else:
                await c("block-job-cancel", device="j")
        await until(lambda: not graph.block_jobs)
        assert graph.find("n0").read_only is (end == "cancel")
        await asyncio.sleep(0.01)
        await users.stop("n0" if end == "complete" else top)
        assert set(graph.nodes) >= {top} and graph.find(top).op_blockers == graph.find("n0").op_blockers == []

    run(test)
    assert users is not None
    compare(tmp_path / ("0" if end == "complete" else f"{len(sizes) - 1}"), users.model, tmp_path)


def test_active_commit_that_cannot_begin(tmp_path: Path) -> None:
    async def test(c: Commands) -> None:
        await chain(c, tmp_path, SIZE, SIZE)
        graph = c.graph
        with pytest.raises(Error, match="Invalid job ID"):
            await start_active_commit(c.daemon.jobs, graph, "#", graph.find("n1"), graph.find("n0"))
        assert graph.find("n0").read_only
        with pytest.raises(Error, match="Invalid node-name: '#'"):
            await start_active_commit(
                c.daemon.jobs, graph, "j", graph.find("n1"), graph.find("n0"), filter_node_name="#"
            )
        assert graph.find("n0").read_only and not graph.block_jobs
        job = await start_active_commit(
            c.daemon.jobs, graph, "j", graph.find("n1"), graph.find("n0"), on_error=BlockdevOnError.STOP
        )
        await until(told(c, "BLOCK_JOB_READY"))
        assert await c.refused("block-job-change", id="j", type="mirror", copy_mode="write-blocking") == (
            "Job type does not support change"
        )
        job.cancel()
        await until(lambda: not graph.block_jobs)

    run(test)
