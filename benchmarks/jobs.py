"""Block jobs: how long each takes, from the command to its completion, and how long a client waits meanwhile.

The disks are one of 1 GiB with data in every other MiB, and one of 8 GiB with 64 KiB of data in every 8 MiB; all of it
is in the page cache. A backup, and a mirror, go to a new qcow2 image; a commit goes to an empty one below, from a layer
below the one that the client uses; a stream goes to an empty overlay.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.servers import EXPORT, NbdClient, Qmp, Running, Server
from benchmarks.workloads import Images, MiB, Run, Workload

KiB = 1024
GiB = 1024 * MiB
_ENDS = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_READY", "BLOCK_JOB_CANCELLED")


@dataclass(frozen=True)
class Disk:
    """`piece` bytes of data at every `step` bytes of a disk of `size` bytes."""

    name: str
    size: int
    piece: int
    step: int

    def made(self, images: Images, name: str, backing: Path | None = None) -> Path:
        """A qcow2 image with this content, made once."""
        path = images.root / f"{self.name.replace(' ', '')}-{name}.qcow2"
        if not path.exists():
            create(path, self.size, backing)
            lines = "".join(
                f"write -q -P {at // self.step % 255 + 1} {at} {self.piece}\n" for at in range(0, self.size, self.step)
            )
            subprocess.run(
                ["qemu-io", "-f", "qcow2", str(path)], input=lines, text=True, check=True, stdout=subprocess.DEVNULL
            )
            images.settle(path)
        return path


DISKS = (Disk("1 GiB", GiB, MiB, 2 * MiB), Disk("8 GiB", 8 * GiB, 64 * KiB, 8 * MiB))


def create(path: Path, size: int, backing: Path | None = None) -> Path:
    """A new, empty qcow2 image."""
    path.unlink(missing_ok=True)
    argv = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if backing is not None:
        argv += ["-b", str(backing), "-F", "qcow2"]
    subprocess.run([*argv, str(path), str(size)], check=True)
    return path


def node(server: Server, name: str, path: Path, backing: str | None = None) -> dict[str, object]:
    """A qcow2 node on a file."""
    file: dict[str, object] = {"driver": "file", "filename": str(path)}
    if server.aio:
        file["aio"] = server.aio
    return {"driver": "qcow2", "node-name": name, "file": file, "backing": backing}


@dataclass
class Plan:
    """The nodes of one run, the command that starts the job, and the files that are in the way afterwards."""

    nodes: list[dict[str, object]]
    command: tuple[str, dict[str, Any]]
    rest: list[Path]


def backup(run: Run, disk: Disk) -> Plan:
    source, target = disk.made(run.images, "full"), create(run.images.root / "target.qcow2", disk.size)
    nodes = [node(run.server, "target", target), node(run.server, EXPORT, source)]
    return Plan(nodes, ("blockdev-backup", {"device": EXPORT, "target": "target", "sync": "full"}), [target])


def mirror(run: Run, disk: Disk) -> Plan:
    plan = backup(run, disk)
    plan.command = ("blockdev-mirror", {"device": EXPORT, "target": "target", "sync": "full"})
    return plan


def stream(run: Run, disk: Disk) -> Plan:
    source = disk.made(run.images, "full")
    top = create(run.images.root / "top.qcow2", disk.size, source)
    nodes = [node(run.server, "source", source) | {"read-only": True}, node(run.server, EXPORT, top, "source")]
    return Plan(nodes, ("block-stream", {"device": EXPORT}), [top])


def commit(run: Run, disk: Disk) -> Plan:
    base = create(run.images.root / "base.qcow2", disk.size)
    # Its file has the name of its backing file for good, the content of which is made anew each time.
    middle = disk.made(run.images, "layer", base)
    top = create(run.images.root / "top.qcow2", disk.size, middle)
    nodes = [
        node(run.server, "base", base) | {"read-only": True},
        node(run.server, "middle", middle, "base") | {"read-only": True},
        node(run.server, EXPORT, top, "middle"),
    ]
    return Plan(nodes, ("block-commit", {"device": EXPORT, "top-node": "middle", "base-node": "base"}), [base, top])


JOBS: dict[str, Callable[[Run, Disk], Plan]] = {"backup": backup, "mirror": mirror, "stream": stream, "commit": commit}


def ended(qmp: Qmp, event: dict[str, Any]) -> bool:
    """Whether `event` is the end of the job; one that is ready is told to end."""
    if event["event"] == "BLOCK_JOB_READY":
        qmp.command("job-complete", id="job")
        return False
    if event["event"] != "BLOCK_JOB_COMPLETED" or "error" in event["data"]:
        raise RuntimeError(f"the job has failed: {event['data']}")
    return True


def duration(name: str, disk: Disk) -> Callable[[Run], float]:
    """Milliseconds from the command to the event that tells of the end."""

    def measure(run: Run) -> float:
        with started(name, disk, run) as (_, qmp, begin):
            while not ended(qmp, qmp.event(*_ENDS) or {}):
                pass
            return (time.perf_counter() - begin) * 1e3

    return measure


@contextmanager
def started(name: str, disk: Disk, run: Run) -> Iterator[tuple[NbdClient, Qmp, float]]:
    """A daemon with the job started just now: a client of the disk, a QMP session, and when that was."""
    plan = JOBS[name](run, disk)
    for path in plan.rest:
        run.images.settle(path)
    for path in run.images.root.glob("*.qcow2"):
        run.images.heat(path)
    try:
        with Running(run.server, plan.nodes, run.workdir, qmp=True) as running:
            assert running.qmp is not None
            with running.client() as client, Qmp(running.qmp) as qmp:
                client.read(0, 4096)
                command, arguments = plan.command
                begin = time.perf_counter()
                qmp.command(command, job_id="job", **arguments)
                yield client, qmp, begin
    finally:
        for path in plan.rest:
            path.unlink()


class Latencies:
    """What a client waits while a job runs: 4 KiB reads and writes in turns, one at a time, at random places. One run
    gives all figures of a server; each is given away once."""

    def __init__(self, name: str, disk: Disk) -> None:
        self._name = name
        self._disk = disk
        self._left: dict[str, dict[str, float]] = {}

    def figure(self, name: str) -> Callable[[Run], float]:
        """The figure `name`: "read p50", …, in microseconds."""

        def measure(run: Run) -> float:
            left = self._left.setdefault(run.server.name, {})
            if name not in left:
                left.update(self._measured(run))
            return left.pop(name)

        return measure

    def _measured(self, run: Run) -> dict[str, float]:
        rng = random.Random(1)
        disk = self._disk
        clock = time.perf_counter
        took: dict[str, list[float]] = {"read": [], "write": []}
        data = b"\xa5" * 4096
        with started(self._name, disk, run) as (client, qmp, _):
            while True:
                event = qmp.event(*_ENDS, wait=False)
                if event is not None and ended(qmp, event):
                    break
                # Only where there is data, so that the image does not grow from run to run.
                at = rng.randrange(disk.size // disk.step) * disk.step + rng.randrange(disk.piece // 4096) * 4096
                begin = clock()
                client.read(at, 4096)
                took["read"].append(clock() - begin)
                begin = clock()
                client.write(at, data)
                took["write"].append(clock() - begin)
        figures = {}
        for kind, values in took.items():
            points = statistics.quantiles(values, n=100)
            figures[f"{kind} p50"] = points[49] * 1e6
            figures[f"{kind} p99"] = points[98] * 1e6
        return figures


def _workloads() -> list[Workload]:
    found = [
        Workload(f"{job} of {disk.name}", "ms", duration(job, disk), smaller_is_better=True)
        for job in JOBS
        for disk in DISKS
    ]
    for job in JOBS:
        latencies = Latencies(job, DISKS[0])
        found += [
            Workload(f"{job}: client's 4k {figure}", "µs", latencies.figure(figure), smaller_is_better=True)
            for figure in ("read p50", "read p99", "write p50", "write p99")
        ]
    return found


WORKLOADS = _workloads()
