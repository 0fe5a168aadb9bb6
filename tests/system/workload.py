"""A seeded random workload over NBD and QMP, checked against a bytearray.

The list of steps depends only on the seed and the size, so that the same steps can be given to both daemons.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import nbd
from tests.support.daemon import DaemonProcess
from tests.support.nbd import NbdClient

KiB = 1024
MiB = 1024 * KiB


@dataclass(frozen=True)
class Step:
    kind: str
    offset: int = 0
    length: int = 0
    flags: int = 0
    seed: int = 0


def pattern(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def make_steps(
    seed: int, count: int, size: int, max_size: int, resize_unit: int = 512, resizes: float = 1
) -> list[Step]:
    """Random steps; offsets and lengths of all alignments, and often at cluster and sector edges.

    New sizes are multiples of `resize_unit`: qcow2 leaves it open what is behind the end in the last cluster. One step
    in a hundred is a resize, or `resizes`.
    """
    rng = random.Random(seed)
    steps: list[Step] = []

    def span(longest: int) -> tuple[int, int]:
        unit = rng.choice((1, 1, 512, 4096, 65536))
        length = min(rng.randint(1, max(1, longest // unit)) * unit, size)
        offset = rng.randrange(0, size - length + 1)
        offset -= offset % unit
        return offset, length

    while len(steps) < count:
        kind = rng.choices(
            ("read", "write", "zero", "trim", "flush", "cache", "status", "resize", "reopen", "restart", "burst"),
            (25, 35, 10, 10, 4, 1, 4, resizes, 1, 0.7, 6),
        )[0]
        if kind in ("read", "write", "zero", "trim", "cache", "status", "burst"):
            longest = rng.choice((512, 4 * KiB, 64 * KiB, 300 * KiB))
            offset, length = span(longest)
            flags = 0
            if kind in ("write", "zero", "trim") and rng.random() < 0.1:
                flags |= nbd.F_FUA
            if kind == "zero" and rng.random() < 0.4:
                flags |= nbd.F_NO_HOLE
            if kind == "read" and rng.random() < 0.2:
                flags |= nbd.F_DF
            steps.append(Step(kind, offset, length, flags, rng.getrandbits(30)))
        elif kind == "resize":
            size = rng.randrange(max_size // 2 // resize_unit * resize_unit, max_size + 1, resize_unit)
            steps.append(Step(kind, length=size))
        else:
            steps.append(Step(kind, seed=rng.getrandbits(30)))
    return steps


class Runner:
    """Runs steps on a daemon and checks every byte that it answers."""

    def __init__(
        self, kind: str, workdir: Path, image: dict[str, Any], model: bytearray, *, extended: bool = False
    ) -> None:
        """`image`: the options of the file node under `file`, the format as `driver` with its own options under
        `format`; and if there are any: options of the backing file's node under `backing`, of objects under `objects`,
        of nodes that the format node refers to under `nodes`, of a filter above it under `filter`."""
        self.workdir = workdir
        self.image = image
        self.model = model
        self.extended = extended
        self.daemon = DaemonProcess(kind, ["--nbd-server", "addr.type=unix,addr.path=nbd.sock"], workdir=workdir)
        self.client: NbdClient | None = None
        self.index = -1

    def node_options(self) -> dict[str, Any]:
        options = {"driver": self.image["driver"], "node-name": "disk", "file": "file", **self.image.get("format", {})}
        if "backing" in self.image:
            options["backing"] = "base"
        if "filter" in self.image:
            options["node-name"] = "format"
        return options

    def open(self) -> None:
        qmp = self.daemon.qmp
        for options in self.image.get("objects", ()):
            qmp.execute("object-add", **options)
        for options in self.image.get("nodes", ()):
            qmp.execute("blockdev-add", **options)
        if "backing" in self.image:
            qmp.execute("blockdev-add", **{"node-name": "base", "read-only": True, **self.image["backing"]})
        qmp.execute("blockdev-add", **{"driver": "file", "node-name": "file", **self.image["file"]})
        qmp.execute("blockdev-add", **self.node_options())
        if "filter" in self.image:
            qmp.execute("blockdev-add", **{"node-name": "disk", "file": "format", **self.image["filter"]})
        self.export()

    def export(self) -> None:
        self.daemon.qmp.execute("block-export-add", type="nbd", id="export", node_name="disk", writable=True)
        self.client = NbdClient(
            self.workdir / "nbd.sock", "disk", extended=self.extended, contexts=("base:allocation",)
        )
        assert self.client.size == len(self.model)

    def unexport(self) -> None:
        assert self.client is not None
        self.client.disconnect()
        self.daemon.qmp.execute("block-export-del", id="export", mode="hard")
        self.daemon.qmp.wait_event("BLOCK_EXPORT_DELETED")

    def close(self) -> None:
        self.unexport()
        nodes = ["disk", *(["format"] if "filter" in self.image else []), "file"]
        for name in [*nodes, *(options["node-name"] for options in self.image.get("nodes", ()))]:
            self.daemon.qmp.execute("blockdev-del", node_name=name)

    def run(self, steps: list[Step]) -> None:
        with self.daemon:
            self.open()
            try:
                for self.index, step in enumerate(steps):
                    getattr(self, f"do_{step.kind}")(step)
            except BaseException as exc:
                exc.add_note(
                    f"in step {self.index}: {steps[self.index]} (before: {steps[max(0, self.index - 3) : self.index]})"
                )
                raise
            self.check(0, len(self.model))
            self.close()

    @property
    def nbd(self) -> NbdClient:
        assert self.client is not None
        return self.client

    def expect(self, offset: int, data: bytes) -> None:
        want = self.model[offset : offset + len(data)]
        if data != want:
            first = next(i for i in range(len(want)) if want[i] != data[i])
            raise AssertionError(
                f"wrong data at {offset + first}: {data[first : first + 16].hex()} instead of "
                f"{want[first : first + 16].hex()} (read {offset}+{len(data)})"
            )

    def check(self, offset: int, length: int) -> None:
        while length:
            part = min(length, 4 * MiB)
            self.expect(offset, self.nbd.pread(offset, part))
            offset += part
            length -= part

    def do_read(self, step: Step) -> None:
        self.expect(step.offset, self.nbd.pread(step.offset, step.length, step.flags))

    def do_write(self, step: Step) -> None:
        data = pattern(step.seed, step.length)
        self.nbd.pwrite(step.offset, data, step.flags)
        self.model[step.offset : step.offset + step.length] = data

    def do_zero(self, step: Step) -> None:
        self.nbd.zero(step.offset, step.length, step.flags)
        self.model[step.offset : step.offset + step.length] = bytes(step.length)

    def do_trim(self, step: Step) -> None:
        """What a trim leaves is the old data or zeroes, byte for byte, and only inside."""
        self.nbd.trim(step.offset, step.length, step.flags)
        before = self.model[step.offset : step.offset + step.length]
        after = self.nbd.pread(step.offset, step.length)
        if after != bytes(step.length) and after != before:
            for index, (old, new) in enumerate(zip(before, after, strict=True)):
                if new not in (old, 0):
                    raise AssertionError(f"trim of {step.offset}+{step.length} left {new} at {step.offset + index}")
        self.model[step.offset : step.offset + step.length] = after

    def do_flush(self, step: Step) -> None:
        self.nbd.flush()

    def do_cache(self, step: Step) -> None:
        self.nbd.cache(step.offset, step.length)

    def do_status(self, step: Step) -> None:
        """What is said to be zero reads as zero."""
        offset = step.offset
        for length, flags in self.nbd.block_status(step.offset, step.length)["base:allocation"]:
            if flags & 2 and any(self.model[offset : min(offset + length, len(self.model))]):
                raise AssertionError(f"block status says zero at {offset}+{length}, which is not")
            offset += length

    def do_burst(self, step: Step) -> None:
        """Many requests in flight at once, none over another."""
        rng = random.Random(step.seed)
        length = min(rng.choice((512, 4 * KiB, 20 * KiB)), len(self.model) // 32)
        starts = rng.sample(range(len(self.model) // length), 16)
        expected: dict[int, tuple[int, bytes | None]] = {}
        for number, start in enumerate(starts):
            offset = start * length
            if number % 3:
                data = pattern(step.seed + number, length)
                expected[self.nbd.send(nbd.CMD_WRITE, offset, length, 0, data)] = (offset, data)
            else:
                expected[self.nbd.send(nbd.CMD_READ, offset, length)] = (offset, None)
        for _ in starts:
            reply = self.nbd.receive()
            assert not reply.error, reply
            offset, written = expected.pop(reply.cookie)
            if written is None:
                self.expect(offset, NbdClient.assemble(reply, offset, length))
            else:
                self.model[offset : offset + length] = written

    def do_resize(self, step: Step) -> None:
        self.unexport()
        self.daemon.qmp.execute("block_resize", node_name="disk", size=step.length)
        if step.length <= len(self.model):
            del self.model[step.length :]
        else:
            self.model.extend(bytes(step.length - len(self.model)))
        self.export()

    def do_reopen(self, step: Step) -> None:
        """With other options than before, while the client stays connected."""
        rng = random.Random(step.seed)
        cache = {"direct": rng.random() < 0.5, "no-flush": rng.random() < 0.2}
        file = {**self.image["file"], "driver": "file", "node-name": "file", "cache": cache}
        self.daemon.qmp.execute("blockdev-reopen", options=[file])
        options = {**self.node_options(), "detect-zeroes": rng.choice(("off", "on"))}
        if self.image["driver"] == "qcow2":
            options["l2-cache-size"] = rng.choice((64 * KiB, MiB))
        self.daemon.qmp.execute("blockdev-reopen", options=[options])

    def do_restart(self, step: Step) -> None:
        """A decent end of the daemon, and a new one."""
        if step.seed % 2:
            self.daemon.qmp.execute("quit")
            assert self.daemon.wait() == 0
        else:
            assert self.daemon.terminate() == 0
        self.daemon.check_stderr()
        self.nbd.close()
        self.daemon.start()
        self.open()
