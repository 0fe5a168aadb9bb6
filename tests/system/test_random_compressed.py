"""Random requests through the compress filter over NBD: every byte as the model says, and an image that qemu-img finds
sound and reads the same.

The real daemon gets its share without what it has a mistake in: once the host cluster is free that its next compressed
cluster would go to, it writes over whatever is there then. So there no compressed cluster is discarded, zeroed or
replaced; but both daemons give the same answers, and go on with each other's images.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import images, nbd
from tests.support.nbd import NbdError
from tests.system.workload import KiB, MiB, Runner, Step, make_steps

SIZE = 4 * MiB
MAX_SIZE = 6 * MiB
STEPS = 400
CALM_STEPS = 200


@dataclass(frozen=True)
class Kind:
    options: str = ""
    cluster: int = 64 * KiB
    backing: bool = False
    direct: bool = False


KINDS = {
    "zlib": Kind(),
    "zstd": Kind("compression_type=zstd"),
    "4k": Kind("cluster_size=4k", 4 * KiB),
    "512-direct": Kind("cluster_size=512", 512, direct=True),
    "2M": Kind("cluster_size=2M,compression_type=zstd", 2 * MiB),
    "extended": Kind("extended_l2=on"),
    "backing": Kind("cluster_size=16k", 16 * KiB, backing=True),
    "extended-backing-direct": Kind("extended_l2=on,cluster_size=32k", 32 * KiB, backing=True, direct=True),
    "v2": Kind("compat=0.10", backing=True),
    "refcount-1": Kind("refcount_bits=1,cluster_size=8k", 8 * KiB),
    "refcount-64-lazy": Kind("refcount_bits=64,lazy_refcounts=on", direct=True),
}


def filler(seed: int, length: int) -> bytes:
    """Something that becomes smaller, or not, or nothing."""
    rng = random.Random(seed)
    what = rng.random()
    if what < 0.2:
        return rng.randbytes(length)
    if what < 0.3:
        return bytes(length)
    if what < 0.4:
        return bytes([rng.randrange(1, 256)]) * length
    words = [rng.randbytes(rng.randrange(2, 9)) for _ in range(40)]
    return b"".join(rng.choices(words, k=length // 2 + 1))[:length]


class Packer(Runner):
    """Runs steps through the filter; `answers` has how each write ended, by the number of its step."""

    def __init__(self, kind: str, workdir: Path, spec: Kind, model: bytearray, *, extended: bool) -> None:
        file: dict[str, Any] = {"filename": "disk.qcow2", "discard": "unmap"}
        if spec.direct:
            file["cache"] = {"direct": True}
        image: dict[str, Any] = {
            "driver": "qcow2",
            "format": {"discard": "unmap"},
            "file": file,
            "filter": {"driver": "compress", "discard": "unmap"},
        }
        if spec.backing:
            image["backing"] = {"driver": "qcow2", "file": {"driver": "file", "filename": "base.qcow2"}}
        super().__init__(kind, workdir, image, model, extended=extended)
        self.cluster = spec.cluster
        self.answers: list[tuple[int, int]] = []

    def do_write(self, step: Step) -> None:
        """Half of the writes are whole clusters."""
        offset, length = step.offset, step.length
        if step.seed % 2:
            offset -= offset % self.cluster
            length = min(-(-length // self.cluster) * self.cluster, len(self.model) - offset)
        data = filler(step.seed, length)
        self.attempt(offset, data, lambda: self.nbd.pwrite(offset, data, step.flags))

    def do_zero(self, step: Step) -> None:
        """What is not a whole cluster is written."""
        self.attempt(step.offset, bytes(step.length), lambda: self.nbd.zero(step.offset, step.length, step.flags))

    def attempt(self, offset: int, data: bytes, action: Callable[[], object]) -> None:
        """A request that is to leave `data` there. If it is refused, each cluster has that or what it had."""
        answer = 0
        try:
            action()
        except NbdError as exc:
            answer = exc.number
            assert answer == errno.EIO
            found = self.nbd.pread(offset, len(data))
            at = 0
            while at < len(data):
                end = min(((offset + at) // self.cluster + 1) * self.cluster - offset, len(data))
                assert found[at:end] in (data[at:end], self.model[offset + at : offset + end]), hex(offset + at)
                at = end
            data = found
        self.model[offset : offset + len(data)] = data
        self.answers.append((self.index, answer))

    def do_burst(self, step: Step) -> None:
        """The same request twice, one after the other: what does not become smaller may be written again."""
        self.do_write(step)
        self.do_write(step)


class Calm(Packer):
    """The steps as they are."""

    def do_write(self, step: Step) -> None:
        data = filler(step.seed, step.length)
        self.attempt(step.offset, data, lambda: self.nbd.pwrite(step.offset, data, step.flags))


def new_image(root: Path, spec: Kind) -> bytearray:
    """Made by qemu-img, with something compressed in it already; its content."""
    root.mkdir()
    model = bytearray(SIZE)
    if spec.backing:
        images.create(root / "base.qcow2", 2 * MiB, "qcow2")
        images.io(root / "base.qcow2", "write -P 0x5a 0 700k", "write -P 0x77 1500k 300k")
        model[: 700 * KiB] = b"\x5a" * (700 * KiB)
        model[1500 * KiB : 1800 * KiB] = b"\x77" * (300 * KiB)
    at = 0 if spec.cluster == 2 * MiB else 2 * MiB
    backing = "base.qcow2" if spec.backing else None
    images.create(root / "disk.qcow2", SIZE, "qcow2", spec.options, backing=backing, cwd=root)
    images.io(root / "disk.qcow2", f"write -c -P 0x11 {at} {spec.cluster}", "write -P 0x12 3M 64k")
    model[at : at + spec.cluster] = b"\x11" * spec.cluster
    model[3 * MiB : 3 * MiB + 64 * KiB] = b"\x12" * (64 * KiB)
    return model


def judge(root: Path, model: bytearray) -> list[tuple[int, int]]:
    """The image is sound and has this content. Returns its compressed extents."""
    images.assert_clean(root / "disk.qcow2")
    assert images.read_all(root / "disk.qcow2", "qcow2", root / "scratch.raw") == model
    found = [(entry["start"], entry["length"]) for entry in images.mapping(root / "disk.qcow2") if entry["compressed"]]
    merged: list[tuple[int, int]] = []
    for start, length in found:
        if merged and sum(merged[-1]) == start:
            start, length = merged[-1][0], merged.pop()[1] + length
        merged.append((start, length))
    return merged


def run_workload(root: Path, name: str, seed: int, steps: int) -> list[tuple[int, int]]:
    """Random steps on a new image in the new directory `root`. Returns how writes ended."""
    spec = KINDS[name]
    model = new_image(root, spec)
    runner = Packer("pyqsd", root, spec, model, extended=seed % 2 == 0)
    runner.run(make_steps(seed, steps, SIZE, MAX_SIZE, spec.cluster))
    judge(root, model)
    return runner.answers


@pytest.mark.parametrize("name", KINDS)
def test_compressed_workload(name: str, tmp_path: Path) -> None:
    answers = run_workload(tmp_path / "ours", name, 100 + list(KINDS).index(name), STEPS)
    assert {0, errno.EIO} == {answer for _, answer in answers}


def calm_steps(rng: random.Random, spec: Kind, used: dict[int, str]) -> list[Step]:
    """Steps whose outcome is defined, and nothing that frees a compressed cluster. `used`: what has been written to a
    cluster, which stays."""
    steps = []
    while len(steps) < CALM_STEPS:
        first = rng.randrange(SIZE // spec.cluster)
        count = min(rng.choice((1, 1, 1, 2, 5)), SIZE // spec.cluster - first)
        fresh = not any(cluster in used for cluster in range(first, first + count))
        if count > 1 and not fresh:
            # Which of several clusters are written when one is refused is left open.
            count = 1
        offset, length = first * spec.cluster, count * spec.cluster
        if rng.random() < 0.4:
            offset += rng.randrange(spec.cluster)
            length = rng.randrange(1, first * spec.cluster + length - offset + 1)
        seed = rng.getrandbits(30)
        kind = rng.choice(("write", "write", "write", "read", "status", "flush", "restart"))
        if kind == "restart" and rng.random() < 0.9:
            continue
        if kind == "write":
            noise = random.Random(seed).random() < 0.2
            if noise and "packed" in (used.get(cluster) for cluster in range(first, first + count)):
                continue
            for cluster in range(first, first + count):
                used.setdefault(cluster, "noise" if noise and length == count * spec.cluster else "packed")
        steps.append(Step(kind, offset, length, rng.choice((0, 0, 0, nbd.F_FUA)) if kind == "write" else 0, seed))
    return steps


@pytest.mark.parametrize("name", ["zlib", "zstd", "4k", "512-direct", "extended-backing-direct", "v2"])
def test_same_as_qsd(name: str, tmp_path: Path) -> None:
    spec = KINDS[name]
    rng = random.Random(name)
    # As `new_image` left it.
    used = {
        2 * MiB // spec.cluster: "packed",
        **{at // spec.cluster: "noise" for at in range(3 * MiB, 3 * MiB + 64 * KiB, 512)},
    }
    models = {kind: new_image(tmp_path / kind, spec) for kind in ("pyqsd", "qsd")}
    for swapped in (False, True):
        steps = calm_steps(rng, spec, used)
        answers = {}
        for daemon, image in (("pyqsd", "qsd"), ("qsd", "pyqsd")) if swapped else (("qsd", "qsd"), ("pyqsd", "pyqsd")):
            runner = Calm(daemon, tmp_path / image, spec, models[image], extended=swapped)
            runner.run(steps)
            answers[daemon] = runner.answers
        packed = [judge(tmp_path / image, models[image]) for image in models]
        assert answers["pyqsd"] == answers["qsd"]
        assert models["pyqsd"] == models["qsd"]
        assert packed[0] == packed[1] != []
        assert {0, errno.EIO} == {answer for _, answer in answers["qsd"]}
