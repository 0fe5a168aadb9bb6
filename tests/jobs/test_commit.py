"""Commits of random chains, with users who write meanwhile, faults, pauses and cancellations; daemons that die."""

from __future__ import annotations

import asyncio
import errno
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.jobs.job import JobStatus
from tests.block.inprocess import Commands, run
from tests.support import images, peers
from tests.support.daemon import DaemonProcess
from tests.support.images import KiB, MiB
from tests.support.nbd import NbdClient

SHARED = perms.ALL & ~perms.RESIZE


class Chain:
    """Images on each other, the lowest first, and what is read at each of them."""

    def __init__(self, root: Path, seed: int, layers: int, *, equal: bool = False) -> None:
        rng = self.rng = random.Random(seed)
        self.root = root
        self.names: list[str] = []
        self.formats: list[str] = []
        self.models: list[bytearray] = []
        below: str | None = None
        for index in range(layers):
            fmt = "raw" if index == 0 and rng.random() < 0.3 else "qcow2"
            size = 6 * MiB if equal else rng.choice((4, 5, 6, 7)) * MiB + rng.choice((0, 0, 64 * KiB, 512))
            name = f"l{index}.{fmt}"
            options = ""
            if fmt == "qcow2":
                options = rng.choice(("", "cluster_size=4k", "cluster_size=2M", "extended_l2=on,cluster_size=128k"))
            images.create(name, size, fmt, options, below, self.formats[-1] if below else "raw", root)
            model = bytearray(size)
            if self.models:
                low = self.models[-1][:size]
                model[: len(low)] = low
            commands = []
            for _ in range(rng.randrange(2, 9)):
                offset = rng.randrange(size // 4096) * 4096
                length = min(rng.choice((4096, 65536, 300 * KiB, MiB)), size - offset) // 512 * 512
                kind = rng.choice(("write", "write", "zero", "discard"))
                if kind == "write":
                    value = rng.randrange(1, 256)
                    commands.append(f"write -P {value} {offset} {length}")
                    model[offset : offset + length] = bytes([value]) * length
                elif fmt == "qcow2" and kind == "zero":
                    commands.append(f"write -z {offset} {length}")
                    model[offset : offset + length] = bytes(length)
                elif fmt == "qcow2":
                    # Whole clusters become zeroes, the rest may be anything: so this is of whole ones of any size.
                    offset = offset // (2 * MiB) * 2 * MiB
                    if offset + 2 * MiB <= size:
                        commands.append(f"discard {offset} {2 * MiB}")
                        model[offset : offset + 2 * MiB] = bytes(2 * MiB)
            images.io(name, *commands, fmt=fmt, cwd=root)
            self.names.append(name)
            self.formats.append(fmt)
            self.models.append(model)
            below = name

    def options(self, index: int, **more: Any) -> dict[str, Any]:
        top = index == len(self.names) - 1
        file: dict[str, Any] = {"driver": "file", "filename": str(self.root / self.names[index])}
        file = more.pop("wrap", lambda file: file)(file)
        options = {"driver": self.formats[index], "node-name": f"n{index}", "file": file, "read-only": not top, **more}
        if self.formats[index] == "qcow2":
            options["backing"] = f"n{index - 1}" if index else None
        return options

    async def open(self, commands: Commands, **faulty: Any) -> None:
        """`faulty`: for the node of this name, what to make of the options of its file."""
        for index in range(len(self.names)):
            wrap = faulty.get(f"n{index}")
            await commands("blockdev-add", **self.options(index, **({"wrap": wrap} if wrap else {})))

    def check(self, index: int) -> None:
        """The image, with its chain, is in order and has the content of its model."""
        name, fmt, model = self.names[index], self.formats[index], self.models[index]
        if fmt == "qcow2":
            images.assert_clean(self.root / name, leaks=True)
        raw = self.root / "raw"
        peers.run("qemu-img", "convert", "-f", fmt, "-O", "raw", name, raw, cwd=self.root)
        assert raw.read_bytes() == model, f"{name} differs"
        raw.unlink()


async def scribble(backend: BlockBackend, model: bytearray, rng: random.Random, stop: asyncio.Event) -> int:
    """A user who writes, zeroes, discards and reads at the top until he is stopped. Reads are compared."""
    done = 0
    while not stop.is_set() or done < 20:
        offset = rng.randrange(len(model) // 512) * 512
        length = min(rng.choice((512, 4096, 65536, 200 * KiB)), len(model) - offset)
        match rng.randrange(5):
            case 0:
                await backend.pwrite_zeroes(offset, length)
                model[offset : offset + length] = bytes(length)
            case 1:
                data = bytearray(length)
                await backend.preadv(offset, length, [memoryview(data)])
                assert data == model[offset : offset + length], f"read of {offset}, {length}"
            case _:
                data = bytearray(rng.randbytes(length))
                await backend.pwritev(offset, length, [memoryview(data)])
                model[offset : offset + length] = data
        done += 1
        await asyncio.sleep(0)
        if done > 20 and done % 8 == 0:
            # Somebody who never rests would keep the mirror from its end on a slow machine.
            await asyncio.sleep(0.002)
    return done


async def until(commands: Commands, *statuses: JobStatus) -> JobStatus:
    job = commands.daemon.jobs.find("j")
    while job.status not in statuses:  # noqa: ASYNC110 (it is told by an event, which comes too early for some)
        await asyncio.sleep(0.001)
    return job.status


def user(commands: Commands, node: str) -> BlockBackend:
    backend = BlockBackend(commands.graph, "user", perms.CONSISTENT_READ | perms.WRITE, SHARED)
    backend.insert(commands.graph.nodes[node])
    return backend


async def commit(commands: Commands, **arguments: Any) -> None:
    await commands("block-commit", **{"job_id": "j", "auto_dismiss": False, **arguments})


@pytest.mark.parametrize("seed", range(8))
def test_layers_go_down_while_the_top_is_written_to(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    layers = rng.randrange(3, 6)
    chain = Chain(tmp_path, seed, layers)
    top = rng.randrange(1, layers - 1)
    base = rng.randrange(top)
    sizes = [len(model) for model in chain.models]

    async def test(commands: Commands) -> None:
        await chain.open(commands)
        backend, stop = user(commands, f"n{layers - 1}"), asyncio.Event()
        writer = asyncio.create_task(scribble(backend, chain.models[-1], rng, stop))
        for status in "pause", "resume":
            if status == "pause":
                await commit(
                    commands, device=f"n{layers - 1}", top_node=f"n{top}", base_node=f"n{base}", speed=64 * MiB
                )
            if commands.daemon.jobs.find("j").status in (JobStatus.RUNNING, JobStatus.PAUSED):
                await commands(f"job-{status}", id="j")
            await asyncio.sleep(0)
        await until(commands, JobStatus.CONCLUDED)
        assert commands.daemon.jobs.find("j").error is None
        await commands("job-dismiss", id="j")
        stop.set()
        await writer
        backend.remove()
        above = commands.graph.nodes[f"n{top + 1}"]
        assert above.below() is commands.graph.nodes[f"n{base}"]
        # What is out of the chain can go.
        for index in range(top, base, -1):
            await commands("blockdev-del", node_name=f"n{index}")

    run(test)
    for index in range(base + 1, top + 1):
        (tmp_path / chain.names[index]).unlink()
    for index in range(top + 1, layers):
        chain.check(index)
    # The base may be longer than all above it: there it is as it was.
    length, end = len(chain.models[top]), len(chain.models[top + 1])
    chain.models[base] = chain.models[top] + bytes(max(0, end - length)) + chain.models[base][max(length, end) :]
    del chain.models[base][max(length, sizes[base]) :]
    chain.check(base)


@pytest.mark.parametrize("seed", range(8))
def test_the_top_goes_down_while_it_is_written_to(tmp_path: Path, seed: int) -> None:
    rng = random.Random(100 + seed)
    layers = rng.randrange(2, 5)
    chain = Chain(tmp_path, 100 + seed, layers)
    base = rng.randrange(layers - 1)
    size = len(chain.models[-1])

    async def test(commands: Commands) -> None:
        await chain.open(commands)
        backend, stop = user(commands, f"n{layers - 1}"), asyncio.Event()
        writer = asyncio.create_task(scribble(backend, chain.models[-1], rng, stop))
        await commit(commands, device=f"n{layers - 1}", base_node=f"n{base}")
        await until(commands, JobStatus.READY)
        await commands("job-complete", id="j")
        await until(commands, JobStatus.CONCLUDED)
        assert commands.daemon.jobs.find("j").error is None
        assert backend.node is commands.graph.nodes[f"n{base}"]
        stop.set()
        await writer
        backend.remove()

    run(test)
    for index in range(base + 1, layers):
        (tmp_path / chain.names[index]).unlink()
    chain.models[base] = chain.models[-1] + chain.models[base][size:]
    chain.check(base)


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_cancelled_at_any_moment(tmp_path: Path, seed: int, active: bool) -> None:
    rng = random.Random(200 + seed)
    layers = 4
    chain = Chain(tmp_path, 200 + seed, layers)

    async def test(commands: Commands) -> None:
        await chain.open(commands)
        graph = commands.graph
        backend, stop = user(commands, "n3"), asyncio.Event()
        writer = asyncio.create_task(scribble(backend, chain.models[-1], rng, stop))
        which = {} if active else {"top_node": "n2"}
        await commit(commands, device="n3", base_node="n0", auto_finalize=bool(seed % 2), **which)
        for _ in range(rng.choice((0, 1, 3, 10, 50, 300))):
            await asyncio.sleep(0)
        job = commands.daemon.jobs.find("j")
        if job.status is not JobStatus.CONCLUDED:
            await commands("job-cancel", id="j")
            await until(commands, JobStatus.CONCLUDED)
        stop.set()
        await writer
        cancelled = job.error is not None
        if cancelled:
            assert job.error is not None
            assert job.error.errno == errno.ECANCELED
            assert graph.nodes["n3"].below() is graph.nodes["n2"]
            assert graph.nodes["n0"].read_only
        else:
            assert not active
        assert not any(child.frozen for node in graph.nodes.values() for child in node.children)
        assert not any(node.op_blockers for node in graph.nodes.values()) or not cancelled
        await commands("job-dismiss", id="j")
        assert not any(node.op_blockers for node in graph.nodes.values())
        assert sorted(graph.nodes, key=str) == sorted(graph.nodes)
        backend.remove()

    run(test)
    chain.check(3)


STEPS = [
    ("n2", "read_aio", errno.EIO),
    ("n1", "read_aio", errno.EIO),
    ("n2", "l2_load", errno.EIO),
    ("n0", "write_aio", errno.ENOSPC),
    ("n0", "write_aio", errno.EIO),
    ("n0", "cluster_alloc_bytes", errno.EIO),
    ("n0", "l2_update", errno.EIO),
    ("n0", "refblock_update_part", errno.EIO),
    ("n0", "flush_to_disk", errno.EIO),
    ("n0", "l1_grow_write_table", errno.EIO),
]


@pytest.mark.parametrize("policy", ["report", "ignore", "stop", "enospc"])
@pytest.mark.parametrize(("node", "event", "number"), STEPS)
@pytest.mark.parametrize("active", [False, True])
def test_faults(tmp_path: Path, node: str, event: str, number: int, policy: str, active: bool) -> None:
    """A request fails twice, and then not any more. The chain is right whatever becomes of the job."""
    chain = Chain(tmp_path, 7, 4)
    rng = random.Random(1)

    def wrap(file: dict[str, Any]) -> dict[str, Any]:
        rule = {"event": event, "errno": number, "once": True}
        return {"driver": "blkdebug", "image": file, "inject-error": [rule, rule]}

    async def test(commands: Commands) -> str:
        await chain.open(commands, **{node: wrap})
        backend, stop = user(commands, "n3"), asyncio.Event()
        stop.set()
        which = {} if active else {"top_node": "n2"}
        await commit(commands, device="n3", base_node="n0", on_error=policy, **which)
        job = commands.daemon.jobs.find("j")
        ends = (JobStatus.CONCLUDED, JobStatus.READY)
        resumed = 0
        while await until(commands, *ends, JobStatus.PAUSED, JobStatus.STANDBY) not in ends:
            if job.user_paused:
                assert policy in ("stop", "enospc")
                await commands("job-resume", id="j")
                resumed += 1
            await asyncio.sleep(0.001)
        assert resumed <= 4
        if not job.error:
            # In these layers the fault is in what is read through the top, too.
            if node == "n0" or not active:
                try:
                    await scribble(backend, chain.models[-1], rng, stop)
                except OSError:
                    assert active
            if job.status is JobStatus.READY:
                await commands("job-complete", id="j")
                while await until(commands, JobStatus.CONCLUDED, JobStatus.STANDBY) is JobStatus.STANDBY:
                    if job.user_paused:
                        await commands("job-resume", id="j")
                    await asyncio.sleep(0.001)
        errors = [e for e in commands.events if type(e).__name__ == "BlockJobError"]
        outcome = "failed" if job.error else "done"
        if active and event == "l2_load":
            # What there is to be copied is found out in the beginning, without a second try, as in QSD.
            assert outcome == "failed"
        elif policy in ("ignore", "stop"):
            assert outcome == "done", job.error
        if errors and (policy == "report" or (policy == "enospc" and number != errno.ENOSPC)):
            assert outcome == "failed"
        await commands("job-dismiss", id="j")
        backend.remove()
        return outcome

    results: list[str] = []

    async def kept(commands: Commands) -> None:
        results.append(await test(commands))

    run(kept)
    if results == ["done"] and active:
        chain.models[0] = chain.models[3] + chain.models[0][len(chain.models[3]) :]
        chain.check(0)
    else:
        chain.check(3)


def test_a_header_that_cannot_be_written(tmp_path: Path) -> None:
    """Two overlays, and the second cannot be made writable for its header: both keep the layer as backing file."""
    chain = Chain(tmp_path, 3, 3)
    shutil.copy(tmp_path / chain.names[2], tmp_path / "fork.qcow2")

    async def test(commands: Commands) -> None:
        await chain.open(commands)
        file = {"driver": "file", "filename": str(tmp_path / "fork.qcow2"), "read-only": True, "node-name": "file"}
        await commands("blockdev-add", **file)
        await commands.add("qcow2", "fork", file="file", backing="n1", read_only=True)
        await commit(commands, device="n2", top_node="n1", base_node="n0")
        await until(commands, JobStatus.CONCLUDED)
        job = commands.daemon.jobs.find("j")
        assert job.error is not None
        assert job.error.desc == "Block node is read-only"
        for name in ("n2", "fork"):
            assert commands.graph.nodes[name].below() is commands.graph.nodes["n1"]
        assert commands.graph.nodes["n0"].read_only

    run(test)
    for name in (chain.names[2], "fork.qcow2"):
        assert images.info(tmp_path / name)["backing-filename"] == chain.names[1]
    chain.check(2)


def test_the_daemon_ends_with_jobs(tmp_path: Path) -> None:
    chain = Chain(tmp_path, 4, 4)

    async def test(commands: Commands) -> None:
        await chain.open(commands)
        await commit(commands, device="n3", top_node="n2", base_node="n0", speed=1)

    run(test)
    chain.check(3)


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_killed(tmp_path: Path, seed: int, active: bool) -> None:
    """kill -9 in the middle: the chain has all that was flushed."""
    chain = Chain(tmp_path, 300 + seed, 4, equal=True)
    rng = random.Random(seed)
    model = chain.models[3]
    daemon = DaemonProcess("pyqsd", workdir=tmp_path)
    for index in range(4):
        daemon.qmp.execute("blockdev-add", **chain.options(index))
    daemon.qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
    daemon.qmp.execute("block-export-add", type="nbd", id="e", node_name="n3", writable=True)
    which = {} if active else {"top_node": "n2"}
    daemon.qmp.execute("block-commit", job_id="j", device="n3", base_node="n0", speed=8 * MiB, **which)
    with NbdClient(tmp_path / "nbd.sock", "n3") as client:
        for _ in range(20 + 40 * seed):
            offset = rng.randrange(len(model) // 4096) * 4096
            data = rng.randbytes(4096)
            client.pwrite(offset, data)
            model[offset : offset + 4096] = data
        client.flush()
        daemon.kill()
    chain.check(3)


@pytest.mark.parametrize("seed", range(4))
def test_killed_while_overlays_get_another_backing_file(tmp_path: Path, seed: int) -> None:
    """Whichever name is in the header then, what is read is the same."""
    chain = Chain(tmp_path, 400 + seed, 4, equal=True)
    daemon = DaemonProcess("pyqsd", workdir=tmp_path)
    for index in range(4):
        daemon.qmp.execute("blockdev-add", **chain.options(index))
    names = {"device": "n3", "top_node": "n2", "base_node": "n0"}
    daemon.qmp.execute("block-commit", job_id="j", auto_finalize=False, **names)
    daemon.qmp.wait_event("BLOCK_JOB_PENDING")
    daemon.qmp.send({"execute": "job-finalize", "arguments": {"id": "j"}})
    # As good as at once, and when so many states have been told of.
    for _ in range(seed):
        daemon.qmp.message()
    daemon.kill()
    chain.check(3)
