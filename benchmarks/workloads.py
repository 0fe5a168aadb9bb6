"""What is measured. Every workload is one number per run: the bigger the better, unless it says otherwise."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.servers import PASSPHRASE, Image, Running, Server

MiB = 1 << 20
SUBCLUSTERS = "extended_l2=on,cluster_size=128k"
SECRET = ("--object", f"secret,id=passphrase,data={PASSPHRASE}")
ENCRYPTED = "encrypt.format=luks,encrypt.key-secret=passphrase"


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

    def _converted(self, name: str, source: Path, *options: str) -> Path:
        return self._made(name, "convert", "-f", "raw", "-O", "qcow2", *options, str(source))

    def raw(self) -> Path:
        path = self.root / "disk.img"
        if not path.exists():
            with open("/dev/urandom", "rb") as source, open(path, "wb") as target:
                for _ in range(self.size // MiB):
                    target.write(source.read(MiB))
        return path

    def qcow2(self) -> Path:
        return self._converted("disk.qcow2", self.raw())

    def half_random(self) -> Path:
        """Raw: half of every 4 KiB is random, so that it can be compressed to about half."""
        path = self.root / "half.img"
        if not path.exists():
            with open("/dev/urandom", "rb") as source, open(path, "wb") as target:
                for _ in range(self.size // MiB):
                    pieces = source.read(MiB // 2)
                    target.write(b"".join(pieces[at : at + 2048] + bytes(2048) for at in range(0, MiB // 2, 2048)))
        return path

    def compressed(self, kind: str) -> Path:
        """Every cluster compressed with `kind`."""
        return self._converted(f"{kind}.qcow2", self.half_random(), "-c", "-o", f"compression_type={kind}")

    def subclusters(self) -> Path:
        """Clusters of 128 KiB with subclusters of 4 KiB."""
        return self._converted("subclusters.qcow2", self.raw(), "-o", SUBCLUSTERS)

    def encrypted(self) -> Path:
        """LUKS with the defaults, aes-256-xts."""
        options = [*SECRET, "-o", ",".join(("encrypt.iter-time=10", ENCRYPTED))]
        return self._converted("luks.qcow2", self.raw(), *options)

    def chain(self) -> Path:
        """The top of a chain of five images, of which each has a fifth of the disk, in pieces of 64 KiB in turns."""
        below: Path | None = None
        for level in range(5):
            path = self.root / f"chain{level}.qcow2"
            if not path.exists():
                backing = [] if below is None else ["-b", str(below), "-F", "qcow2"]
                argv = ["qemu-img", "create", "-q", "-f", "qcow2", *backing, str(path), str(self.size)]
                subprocess.run(argv, check=True)
                writes = "".join(f"write -q -P {level + 1} {at} 64k\n" for at in range(level << 16, self.size, 5 << 16))
                subprocess.run(
                    ["qemu-io", "-f", "qcow2", str(path)],
                    input=writes,
                    text=True,
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
            below = path
        assert below is not None
        return below

    def fresh(self, *options: str) -> Path:
        """Nothing allocated yet; made anew each time."""
        path = self.root / "fresh.qcow2"
        path.unlink(missing_ok=True)
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), str(self.size)]
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


#: The images of `hot`: what it is called, how it is made, and how it is opened.
KINDS: dict[str, tuple[Callable[[Images], Path], dict[str, Any]]] = {
    "raw": (Images.raw, {"fmt": "raw"}),
    "raw O_DIRECT": (Images.raw, {"fmt": "raw", "direct": True}),
    "qcow2": (Images.qcow2, {"fmt": "qcow2"}),
    "subclusters": (Images.subclusters, {"fmt": "qcow2"}),
    "luks": (Images.encrypted, {"fmt": "qcow2", "encrypted": True}),
    "zlib": (lambda images: images.compressed("zlib"), {"fmt": "qcow2"}),
    "zstd": (lambda images: images.compressed("zstd"), {"fmt": "qcow2"}),
    "chain of 5": (Images.chain, {"fmt": "qcow2"}),
}


def hot(kind: str, rw: str, bs: str, depth: int, jobs: int = 1) -> Callable[[Run], float]:
    """A timed run on an image that is in the page cache (or, opened with O_DIRECT, passes it by)."""

    def measure(run: Run) -> float:
        make, opened = KINDS[kind]
        path = make(run.images)
        run.images.settle(path)
        if not opened.get("direct"):
            for file in sorted(run.images.root.glob("chain*")) if "chain" in kind else [path]:
                run.images.heat(file)
        with Running(run.server, Image(path, **opened), run.workdir) as running:
            result = fio(running, run.seconds, rw, bs, depth, jobs, f"--size={run.images.size}")
        return result["bytes"] / 1e6 if bs == "1m" else result["iops"]

    return measure


def fill(bs: str, *options: str, rw: str = "write", **opened: Any) -> Callable[[Run], float]:
    """A new qcow2 image, made with `options` of qemu-img, written once: from beginning to end, or a part of it in
    random order."""

    def measure(run: Run) -> float:
        path = run.images.fresh(*options)
        run.images.settle(path)
        with Running(run.server, Image(path, "qcow2", **opened), run.workdir) as running:
            data = ("--refill_buffers", "--buffer_compress_percentage=50") if opened.get("compress") else ()
            part = run.images.size if rw == "write" else run.images.size // 8
            result = fio(running, 0, rw, bs, 8, 1, f"--size={run.images.size}", f"--io_size={part}", *data)
        path.unlink()
        return result["bytes"] / 1e6 if rw == "write" else result["iops"]

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
    Workload("raw O_DIRECT randread 4k qd32", "IOPS", hot("raw O_DIRECT", "randread", "4k", 32)),
    Workload("raw O_DIRECT randwrite 4k qd32", "IOPS", hot("raw O_DIRECT", "randwrite", "4k", 32)),
    Workload("subclusters randread 4k qd32", "IOPS", hot("subclusters", "randread", "4k", 32)),
    Workload("subclusters randwrite 4k qd32", "IOPS", hot("subclusters", "randwrite", "4k", 32)),
    Workload("subclusters new randwrite 4k", "IOPS", fill("4k", "-o", SUBCLUSTERS, rw="randwrite")),
    Workload("luks randread 4k qd32", "IOPS", hot("luks", "randread", "4k", 32)),
    Workload("luks randwrite 4k qd32", "IOPS", hot("luks", "randwrite", "4k", 32)),
    Workload("luks read 1m qd8", "MB/s", hot("luks", "read", "1m", 8)),
    Workload("luks write 1m qd8", "MB/s", hot("luks", "write", "1m", 8)),
    Workload("luks fill 64k", "MB/s", fill("64k", *SECRET, "-o", f"encrypt.iter-time=10,{ENCRYPTED}", encrypted=True)),
    *(Workload(f"{kind} randread 64k qd16", "IOPS", hot(kind, "randread", "64k", 16)) for kind in ("zlib", "zstd")),
    *(Workload(f"{kind} read 1m qd8", "MB/s", hot(kind, "read", "1m", 8)) for kind in ("zlib", "zstd")),
    *(
        Workload(f"{kind} compressed fill 1m", "MB/s", fill("1m", "-o", f"compression_type={kind}", compress=True))
        for kind in ("zlib", "zstd")
    ),
    Workload("chain of 5 randread 4k qd32", "IOPS", hot("chain of 5", "randread", "4k", 32)),
    Workload("chain of 5 read 1m qd8", "MB/s", hot("chain of 5", "read", "1m", 8)),
    Workload("start to first reply", "ms", start, smaller_is_better=True),
    Workload("resident memory, one export", "MiB", resident, smaller_is_better=True),
    Workload("QMP commands", "1/s", qmp),
]
