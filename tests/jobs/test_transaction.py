"""``transaction``: whichever action fails, and wherever it is, everything is as it was before."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block import permissions as perms
from pyqsd.block.action import Action, Transaction, TransactionAction
from pyqsd.block.action import run as run_actions
from pyqsd.block.backend import BlockBackend
from pyqsd.block.bitmap_commands import BlockDirtyBitmapAdd, BlockDirtyBitmapAddWrapper
from pyqsd.block.internal_snapshots import BlockdevSnapshotInternal, BlockdevSnapshotInternalWrapper
from pyqsd.jobs.job import JobGroup, JobStatus, JobStatusChange
from pyqsd.jobs.transaction import JobTransaction, job_transaction, transaction
from pyqsd.qapi.errors import Error
from tests.block.inprocess import Commands, run
from tests.jobs.test_job import Fake
from tests.support import images

MiB = 1 << 20
SIZE = 4 * MiB


def act(kind: str, /, **data: Any) -> dict[str, Any]:
    return {"type": kind, "data": {key.replace("_", "-"): value for key, value in data.items()}}


def bitmap(action: str, name: str, node: str = "a", /, **more: Any) -> dict[str, Any]:
    return act(f"block-dirty-bitmap-{action}", node=node, name=name, **more)


ABORT = act("abort")


def good(directory: Path, number: int) -> dict[str, dict[str, Any]]:
    """One action of each type that works; those with different numbers get along with each other, if they do not need
    the same thing."""
    return {
        "add": bitmap("add", f"new{number}"),
        "add persistent": bitmap("add", f"kept{number}", persistent=True, granularity=4096),
        "remove": bitmap("remove", "memory"),
        "remove persistent": bitmap("remove", "stored"),
        "remove inconsistent": bitmap("remove", "broken"),
        "clear": bitmap("clear", "stored"),
        "enable": bitmap("enable", "off"),
        "disable": bitmap("disable", "memory"),
        "merge": act(
            "block-dirty-bitmap-merge",
            node="a",
            target="off",
            bitmaps=["stored", {"node": "b", "name": "other"}, "memory"],
        ),
        "snapshot": act("blockdev-snapshot", node="a", overlay="over"),
        "snapshot-sync": act(
            "blockdev-snapshot-sync",
            node_name="b",
            snapshot_file=str(directory / f"sync{number}.qcow2"),
            snapshot_node_name=f"sync{number}",
        ),
        "internal": act("blockdev-snapshot-internal-sync", device="a", name=f"internal{number}"),
        "backup": act("blockdev-backup", job_id=f"job{number}", device="a", target=f"target{number}", sync="full"),
        "backup with a bitmap": act(
            "blockdev-backup",
            job_id=f"job{number}",
            device="a",
            target=f"target{number}",
            sync="bitmap",
            bitmap="stored",
            bitmap_mode="always",
        ),
        "drive-backup": act(
            "drive-backup",
            job_id=f"job{number}",
            device="b",
            target=str(directory / f"sync{number}.qcow2"),
            sync="top",
        ),
    }


def bad(directory: Path) -> dict[str, dict[str, Any]]:
    """One of each type that fails, as late as it can."""
    return {
        "abort": ABORT,
        "add": bitmap("add", "stored", persistent=True),
        "remove": bitmap("remove", "nosuch"),
        "clear": bitmap("clear", "broken"),
        "enable": bitmap("enable", "broken"),
        "disable": bitmap("disable", "", "b"),
        "merge": act("block-dirty-bitmap-merge", node="a", target="off", bitmaps=["stored", "broken"]),
        "snapshot": act("blockdev-snapshot", node="b", overlay="a"),
        "snapshot-sync": act(
            "blockdev-snapshot-sync",
            node_name="b",
            snapshot_file=str(directory / "nosuch" / "x.qcow2"),
            snapshot_node_name="x",
        ),
        "internal": act("blockdev-snapshot-internal-sync", device="a", name="taken"),
        "backup": act(
            "blockdev-backup",
            job_id="x",
            device="a",
            target="target9",
            sync="incremental",
            bitmap="stored",
            x_perf={"max-chunk": 4096},
        ),
        "drive-backup": act(
            "drive-backup", job_id="x", device="b", target=str(directory / "nosuch" / "x.qcow2"), sync="full"
        ),
    }


class Scene:
    """Nodes with everything that the actions need, users of two of them, and what is to be the same afterwards."""

    def __init__(self, commands: Commands, directory: Path) -> None:
        self.qmp = commands
        self.directory = directory
        self.users: list[BlockBackend] = []

    async def build(self) -> None:
        qmp, directory = self.qmp, self.directory
        for name in ("a", "b", "over"):
            images.create(directory / f"{name}.qcow2", str(SIZE))
        path = directory / "a.qcow2"
        for name in ("stored", "broken"):
            images.peers.run("qemu-img", "bitmap", "--add", path, name)
        data = bytearray(path.read_bytes())
        at = data.index(b"\x23\x85\x28\x75") + 24
        data[int.from_bytes(data[at : at + 8], "big") + 32 + 15] |= 1
        path.write_bytes(data)
        for name in ("a", "b", "over"):
            more = {"backing": None} if name == "over" else {}
            file = {"driver": "file", "filename": str(directory / f"{name}.qcow2")}
            await qmp("blockdev-add", driver="qcow2", node_name=name, file=file, **more)
        for number in (1, 2, 3, 9):
            await qmp("blockdev-add", driver="null-co", node_name=f"target{number}", size=SIZE)
        await qmp("block-dirty-bitmap-add", node="a", name="memory", granularity=512)
        await qmp("block-dirty-bitmap-add", node="a", name="off", disabled=True)
        await qmp("block-dirty-bitmap-add", node="b", name="other", granularity=4096)
        await qmp("blockdev-snapshot-internal-sync", device="a", name="taken")
        for name in ("a", "b"):
            user = BlockBackend(qmp.graph, "a test", perms.CONSISTENT_READ | perms.WRITE, perms.ALL)
            user.insert(qmp.graph.find(name))
            self.users.append(user)
            await user.pwritev(MiB, 70_000, [memoryview(bytearray(b"x" * 70_000))])

    async def state(self) -> Any:
        qmp = self.qmp
        nodes = await qmp("query-named-block-nodes")
        graph = await qmp("x-debug-query-block-graph")
        bits = {
            (node.name, name): [node.dirty_bitmaps[name].sha256(), node.dirty_bitmaps[name].busy]
            for node in qmp.graph.nodes.values()
            for name in node.dirty_bitmaps
        }
        content = [await user.node.pread(0, SIZE) for user in self.users]
        using = [user.node.name for user in self.users]
        assert not any(user.quiesced for user in self.users)
        return _plain(nodes), _names(graph), bits, content, using, len(qmp.graph.backends)

    async def refused(self, *actions: dict[str, Any]) -> str:
        return await self.qmp.refused("transaction", actions=list(actions))

    def tidy(self) -> None:
        """The files of overlays stay, as in QSD."""
        for path in self.directory.glob("sync*.qcow2"):
            path.unlink()

    async def end(self) -> None:
        for user in self.users:
            user.remove()


def _plain(value: Any) -> Any:
    """Without the sizes of files, which may have grown, and the order of bitmaps, which backups may change."""
    if isinstance(value, dict):
        if "dirty-bitmaps" in value:
            value = {**value, "dirty-bitmaps": sorted(value["dirty-bitmaps"], key=lambda one: one.get("name", ""))}
        return {key: _plain(item) for key, item in value.items() if key not in ("actual-size", "vm-clock-nsec")}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _names(graph: Any) -> Any:
    names = {node["id"]: (node["type"], node["name"]) for node in graph["nodes"]}
    return [
        (names[edge["parent"]], names[edge["child"]], edge["name"], edge["perm"], edge["shared-perm"])
        for edge in graph["edges"]
    ]


def check_images(directory: Path) -> None:
    for name in ("a", "b", "over"):
        images.assert_clean(directory / f"{name}.qcow2")


GOOD = list(good(Path(), 0))
BAD = list(bad(Path()))


@pytest.mark.parametrize("failing", BAD)
def test_everything_is_undone(tmp_path: Path, failing: str) -> None:
    """Each type fails behind each other one, before it, and behind two."""

    async def test(qmp: Commands) -> None:
        scene = Scene(qmp, tmp_path)
        await scene.build()
        before = await scene.state()
        wrong = bad(tmp_path)[failing]
        expected = await scene.refused(wrong)
        assert await scene.state() == before
        for one in GOOD:
            action = good(tmp_path, 1)[one]
            # (It may fail for another reason then.)
            await scene.refused(action, wrong)
            assert await scene.state() == before, one
            scene.tidy()
            assert await scene.refused(wrong, action) == expected, one
            assert await scene.state() == before, one
        await scene.end()

    run(test)
    check_images(tmp_path)


def test_everything_is_undone_of_two_and_three(tmp_path: Path) -> None:
    dice = random.Random(12)

    async def test(qmp: Commands) -> None:
        scene = Scene(qmp, tmp_path)
        await scene.build()
        before = await scene.state()
        for first, second in itertools.product(GOOD, repeat=2):
            actions = [good(tmp_path, 1)[first], good(tmp_path, 2)[second]]
            if dice.random() < 0.3:
                actions.append(good(tmp_path, 3)[dice.choice(GOOD)])
            await scene.refused(*actions, bad(tmp_path)[dice.choice(BAD)])
            assert await scene.state() == before, (first, second)
            scene.tidy()
        await scene.end()

    run(test)
    check_images(tmp_path)


@pytest.mark.parametrize("one", GOOD)
def test_each_works_alone_and_after_it_was_undone(tmp_path: Path, one: str) -> None:
    async def test(qmp: Commands) -> None:
        scene = Scene(qmp, tmp_path)
        await scene.build()
        before = await scene.state()
        await scene.refused(good(tmp_path, 1)[one], ABORT)
        scene.tidy()
        await qmp("transaction", actions=[good(tmp_path, 1)[one]])
        after = await scene.state()
        assert after != before and after[3] == before[3]
        for user in scene.users:
            await user.pwritev(0, 5, [memoryview(bytearray(b"later"))])
            assert await user.node.pread(0, 5) == b"later"
        await scene.end()

    run(test)
    check_images(tmp_path)


def test_it_is_one_point_in_time(tmp_path: Path) -> None:
    """What is written while a transaction works on it comes after all of it."""

    async def test(qmp: Commands) -> None:
        scene = Scene(qmp, tmp_path)
        await scene.build()
        (user, _) = scene.users
        written = asyncio.Event()

        async def write() -> None:
            for n in range(200):
                await user.pwritev(n * 512, 512, [memoryview(bytearray([n] * 512))])
                written.set()
                await asyncio.sleep(0)

        task = asyncio.create_task(write())
        await written.wait()
        # The second bitmap is added long after the first.
        sync = good(tmp_path, 1)["snapshot-sync"]
        first, second = (bitmap("add", name, granularity=512) for name in ("first", "second"))
        await qmp("transaction", actions=[first, sync, good(tmp_path, 1)["internal"], second])
        assert not task.done()
        await task
        bitmaps = qmp.graph.find("a").dirty_bitmaps
        assert 0 < bitmaps["first"].count < 200 * 512
        assert list(bitmaps["first"].areas()) == list(bitmaps["second"].areas())
        await scene.end()

    run(test)
    check_images(tmp_path)


def test_a_transaction_that_nobody_waits_for_any_more(tmp_path: Path) -> None:
    """It is done as a whole or not at all, and users go on."""
    dice = random.Random(3)

    async def test(qmp: Commands) -> None:
        scene = Scene(qmp, tmp_path)
        await scene.build()
        outcomes = set()
        for n in range(40):
            actions: list[TransactionAction] = [
                BlockDirtyBitmapAddWrapper(data=BlockDirtyBitmapAdd(node="a", name=f"x{n}")),
                BlockDirtyBitmapAddWrapper(data=BlockDirtyBitmapAdd(node="a", name=f"y{n}", persistent=True)),
                BlockdevSnapshotInternalWrapper(data=BlockdevSnapshotInternal(device="a", name=f"internal{n}")),
            ]
            busy = asyncio.create_task(scene.users[0].pwritev(0, 512, [memoryview(bytearray(512))]))
            task = asyncio.create_task(transaction(qmp.graph, qmp.daemon.jobs, actions=actions))
            for _ in range(dice.randrange(40)):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, busy, return_exceptions=True)
            node = qmp.graph.find("a")
            there = {
                f"x{n}" in node.dirty_bitmaps,
                f"y{n}" in node.dirty_bitmaps,
                any(one.name == f"internal{n}" for one in node.driver.snapshot_list()),
            }
            assert len(there) == 1
            outcomes |= there
            assert not scene.users[0].quiesced
        assert outcomes == {True, False}
        await scene.end()

    run(test)
    check_images(tmp_path)


# --- jobs ------------------------------------------------------------------------------------------------------------


class JobAction(Action):
    """Starts a job as ``blockdev-backup`` does."""

    def __init__(self, transaction: Transaction, name: str) -> None:
        self._shared = job_transaction(transaction)
        self._name = name
        self.job: Fake | None = None

    async def prepare(self) -> None:
        self.job = Fake(self._shared.jobs, id=self._name, group=self._shared.group)

    async def commit(self) -> None:
        assert self.job is not None
        self.job.start()

    async def abort(self) -> None:
        assert self.job is not None
        self.job.cancel()
        await self.job.wait()


class Fails(Action):
    async def prepare(self) -> None:
        raise Error("no")


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_jobs(grouped: bool, position: int) -> None:
    """They are started at the end, the last one first, or end without having begun."""

    async def test(qmp: Commands) -> None:
        shared = JobTransaction(qmp.graph, qmp.daemon.jobs, JobGroup() if grouped else None)
        jobs = [JobAction(shared, f"j{n}") for n in (1, 2)]
        actions: list[Action] = [*jobs, Fails()][:3]
        actions.insert(position, actions.pop())
        if position == 3:
            del actions[-1]
            await run_actions(*actions)
            assert all(job.job is not None for job in jobs)
            for action in jobs:
                assert action.job is not None
                await action.job.wait()
                assert action.job.log == ["run", "prepare", "commit", "clean"]
            started = [e.id for e in qmp.events if isinstance(e, JobStatusChange) and e.status is JobStatus.RUNNING]
            assert started == ["j2", "j1"]
            return
        with pytest.raises(Error, match="no"):
            await run_actions(*actions)
        made = [action.job for action in jobs if action.job is not None]
        assert len(made) == position
        assert all(job.log == ["abort", "clean"] and job.status is JobStatus.NULL for job in made)
        assert await qmp("query-jobs") == []

    run(test)
