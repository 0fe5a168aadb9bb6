"""What is measured. Every workload is one number per run: the bigger the better, unless it says otherwise."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.servers import Image, Running, Server

MiB = 1 << 20


class Images:
    """The images, made once in `root`; `size` bytes of guest data each, all of it random and in the page cache."""

    def __init__(self, root: Path, size: int) -> None:
        self.root = root
        self.size = size

    def _made(self, name: str, *argv: str) -> Path:
        path = self.root / name
        if not path.exists():
            subprocess.run(["qemu-img", *argv, str(path)], check=True, stdout=subprocess.DEVNULL)
        return path

    def raw(self) -> Path:
        path = self.root / "disk.img"
        if not path.exists():
            with open("/dev/urandom", "rb") as source, open(path, "wb") as target:
                for _ in range(self.size // MiB):
                    target.write(source.read(MiB))
        return path

    def qcow2(self) -> Path:
        return self._made("disk.qcow2", "convert", "-f", "raw", "-O", "qcow2", str(self.raw()))

    def fresh(self) -> Path:
        """Nothing allocated yet; made anew each time."""
        (self.root / "fresh.qcow2").unlink(missing_ok=True)
        path = self.root / "fresh.qcow2"
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(self.size)]
        subprocess.run(argv, check=True)
        return path

    def overlay(self) -> Path:
        """An empty overlay on the raw image; made anew each time."""
        path = self.root / "overlay.qcow2"
        path.unlink(missing_ok=True)
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(self.raw()), "-F", "raw", str(path)]
        subprocess.run(argv, check=True)
        return path

    def heat(self, path: Path) -> None:
        """Into the page cache."""
        with open(path, "rb", buffering=0) as stream:
            buffer = bytearray(MiB)
            while stream.readinto(buffer):
                pass

    def settle(self, path: Path) -> None:
        """What was written before is written back now, and not during a measurement."""
        subprocess.run(["sync", str(path)], check=True)


@dataclass
class Run:
    """What a measurement is given."""

    server: Server
    images: Images
    workdir: Path
    seconds: float


@dataclass(frozen=True)
class Workload:
    name: str
    unit: str
    measure: Callable[[Run], float]
    smaller_is_better: bool = False


def fio(running: Running, seconds: float, rw: str, bs: str, depth: int, jobs: int = 1, *extra: str) -> dict[str, float]:
    """One run of fio's nbd engine: IOPS and bytes/s of what it did."""
    argv = ["fio", "--name=bench", "--ioengine=nbd", f"--uri={running.uri}", f"--rw={rw}", f"--bs={bs}"]
    argv += [f"--iodepth={depth}", f"--numjobs={jobs}", "--group_reporting", "--output-format=json", *extra]
    if seconds:
        argv += ["--time_based", f"--runtime={seconds}", "--ramp_time=0.3"]
    if jobs > 1:
        argv.append("--thread")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds + 120, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"fio: {done.stdout[-2000:]} {done.stderr[-2000:]}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    if job["error"]:
        raise RuntimeError(f"fio: error {job['error']}")
    side = job["write" if "write" in rw else "read"]
    return {"iops": side["iops"], "bytes": side["bw_bytes"]}


def hot(fmt: str, rw: str, bs: str, depth: int, jobs: int = 1, direct: bool = False) -> Callable[[Run], float]:
    """A timed run on an image that is in the page cache (or, with `direct`, passes it by)."""

    def measure(run: Run) -> float:
        path = run.images.raw() if fmt == "raw" else run.images.qcow2()
        run.images.settle(path)
        if not direct:
            run.images.heat(path)
        with Running(run.server, Image(path, fmt, direct), run.workdir) as running:
            result = fio(running, run.seconds, rw, bs, depth, jobs, f"--size={run.images.size}")
        return result["bytes"] / 1e6 if bs == "1m" else result["iops"]

    return measure


def fill(bs: str) -> Callable[[Run], float]:
    """A new qcow2 image written once from beginning to end."""

    def measure(run: Run) -> float:
        path = run.images.fresh()
        run.images.settle(path)
        with Running(run.server, Image(path, "qcow2"), run.workdir) as running:
            result = fio(running, 0, "write", bs, 8, 1, f"--size={run.images.size}")
        path.unlink()
        return result["bytes"] / 1e6

    return measure


def copy_on_write(run: Run) -> float:
    """4 KiB into every cluster of an empty overlay, in random order: each write copies the rest of its cluster."""
    run.images.heat(run.images.raw())
    path = run.images.overlay()
    run.images.settle(path)
    with Running(run.server, Image(path, "qcow2"), run.workdir) as running:
        total = f"--io_size={run.images.size // 16}"
        result = fio(running, 0, "randwrite", "4k", 16, 1, f"--size={run.images.size}", "--blockalign=64k", total)
    path.unlink()
    return result["iops"]


def start(run: Run) -> float:
    """Milliseconds from the start of the process to the first reply to a read."""
    path = run.images.raw()
    with Running(run.server, Image(path, "raw"), run.workdir) as running:
        return running.started * 1000


def resident(run: Run) -> float:
    """MiB of resident memory with one export (and, where there is one, one monitor) that has been read from."""
    path = run.images.raw()
    qmp = run.server.argv(Image(path, "raw"), "", "x") is not None
    with Running(run.server, Image(path, "raw"), run.workdir, qmp=qmp) as running:
        fio(running, 0.5, "randread", "4k", 32, 1, f"--size={run.images.size}")
        return running.rss() / MiB


def qmp(run: Run) -> float:
    """QMP commands per second."""
    with Running(run.server, Image(run.images.raw(), "raw"), run.workdir, qmp=True) as running:
        return running.qmp_commands(min(run.seconds, 2))


def _hot_set(fmt: str) -> list[Workload]:
    return [
        Workload(f"{fmt} randread 4k qd1", "IOPS", hot(fmt, "randread", "4k", 1)),
        Workload(f"{fmt} randread 4k qd32", "IOPS", hot(fmt, "randread", "4k", 32)),
        Workload(f"{fmt} randwrite 4k qd1", "IOPS", hot(fmt, "randwrite", "4k", 1)),
        Workload(f"{fmt} randwrite 4k qd32", "IOPS", hot(fmt, "randwrite", "4k", 32)),
        Workload(f"{fmt} randread 64k qd16", "IOPS", hot(fmt, "randread", "64k", 16)),
        Workload(f"{fmt} read 1m qd8", "MB/s", hot(fmt, "read", "1m", 8)),
        Workload(f"{fmt} write 1m qd8", "MB/s", hot(fmt, "write", "1m", 8)),
        Workload(f"{fmt} randread 4k qd16, 4 connections", "IOPS", hot(fmt, "randread", "4k", 16, 4)),
    ]


WORKLOADS = [
    *_hot_set("raw"),
    *_hot_set("qcow2"),
    Workload("qcow2 fill 1m", "MB/s", fill("1m")),
    Workload("qcow2 fill 64k", "MB/s", fill("64k")),
    Workload("overlay copy-on-write 4k", "IOPS", copy_on_write),
    Workload("raw O_DIRECT randread 4k qd32", "IOPS", hot("raw", "randread", "4k", 32, direct=True)),
    Workload("raw O_DIRECT randwrite 4k qd32", "IOPS", hot("raw", "randwrite", "4k", 32, direct=True)),
    Workload("start to first reply", "ms", start, smaller_is_better=True),
    Workload("resident memory, one export", "MiB", resident, smaller_is_better=True),
    Workload("QMP commands", "1/s", qmp),
]
