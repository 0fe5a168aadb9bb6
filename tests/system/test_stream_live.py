"""block-stream under a client that writes, over random chains: nothing is lost or mixed up, however the job ends.

A client writes to the top of a chain of three to five images of different sizes and formats, while a job streams some
of its layers, is told this and that, and comes to its end, is cancelled, or dies with the daemon. A model knows what
every sector may hold.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest

from tests.support import images, peers
from tests.support.daemon import DaemonProcess
from tests.support.images import KiB
from tests.support.nbd import NbdClient

SECTOR = 512
ENDS = ("completes", "cancelled", "killed", "quits")


class Chain:
    """Images ``l0`` (the base) to the top, made at random."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        self.root = root
        self.names = [f"l{number}" for number in range(rng.randint(3, 5))]
        self.files: dict[str, str] = {}
        self.formats: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        for number, name in enumerate(self.names):
            fmt = "raw" if not number and rng.random() < 0.5 else "qcow2"
            self.formats[name], self.files[name] = fmt, f"{name}.{fmt}"
            size = self.sizes[name] = rng.randrange(400 * KiB, 3000 * KiB, SECTOR)
            options = ""
            if fmt == "qcow2":
                cluster = rng.choice((512, 4 * KiB, 64 * KiB, 256 * KiB))
                options = f"cluster_size={cluster}"
                if cluster >= 16 * KiB and rng.random() < 0.3:
                    options += ",extended_l2=on"
            below = self.names[number - 1] if number else None
            images.create(
                self.files[name],
                size,
                fmt,
                options,
                self.files[below] if below else None,
                self.formats[below] if below else None,
                root,
            )
            commands = []
            for count in range(rng.randint(1, 8)):
                length = rng.randrange(SECTOR, min(size, 300 * KiB), SECTOR)
                at = rng.randrange(0, size - length, SECTOR)
                zero = fmt == "qcow2" and rng.random() < 0.3
                commands.append(f"write {'-z' if zero else f'-P {10 * number + count + 1}'} {at} {length}")
            images.io(self.files[name], *commands, fmt=fmt, cwd=root)
        self.top = self.names[-1]

    def content(self, name: str) -> bytearray:
        """What is read from the image, by qemu-img; it is whole."""
        if self.formats[name] == "qcow2":
            images.assert_clean(self.root / self.files[name], leaks=True)
        raw = "content.raw"
        peers.run("qemu-img", "convert", "-f", self.formats[name], "-O", "raw", self.files[name], raw, cwd=self.root)
        data = bytearray((self.root / raw).read_bytes())
        return data

    def sums(self) -> dict[str, str]:
        return {name: hashlib.sha256((self.root / file).read_bytes()).hexdigest() for name, file in self.files.items()}

    def argv(self) -> list[str]:
        argv = []
        for number, name in enumerate(self.names):
            options = f"{self.formats[name]},node-name={name},discard=unmap,file.driver=file"
            options += f",file.filename={self.files[name]}"
            if self.formats[name] == "qcow2" and number:
                options += f",backing={self.names[number - 1]}"
            if name != self.top:
                options += ",read-only=on"
            argv += ["--blockdev", options]
        argv += ["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]
        return [*argv, "--export", f"nbd,id=e,name=e,node-name={self.top},writable=on"]


class Model:
    """What each sector of the disk may hold: what was there at the last flush, and what was written since."""

    def __init__(self, content: bytearray) -> None:
        self.now = content
        self.possible: dict[int, list[bytes]] = {}

    def write(self, offset: int, data: bytes) -> None:
        first, last = offset // SECTOR, (offset + len(data) - 1) // SECTOR
        for sector in range(first, last + 1):
            self.possible.setdefault(sector, [self.sector(sector)])
        self.now[offset : offset + len(data)] = data
        for sector in range(first, last + 1):
            self.possible[sector].append(self.sector(sector))

    def sector(self, number: int) -> bytes:
        return bytes(self.now[number * SECTOR : (number + 1) * SECTOR])

    def flushed(self) -> None:
        self.possible.clear()

    def check(self, content: bytearray, after_crash: bool) -> None:
        assert len(content) == len(self.now)
        for number in range(len(content) // SECTOR):
            data = bytes(content[number * SECTOR : (number + 1) * SECTOR])
            if data != self.sector(number):
                assert after_crash and data in self.possible.get(number, []), f"sector {number}"


def arguments(chain: Chain, rng: random.Random) -> tuple[dict[str, Any], str, str | None]:
    """Of block-stream; the device, and the base that it has afterwards."""
    index = len(chain.names) - 1 if rng.random() < 0.6 else rng.randint(1, len(chain.names) - 1)
    device = chain.names[index]
    found: dict[str, Any] = {"device": device}
    base: int | None = None
    if (kind := rng.random()) < 0.3 and index >= 2:
        base = rng.randrange(index - 1)
        found["base-node"] = chain.names[base]
    elif kind < 0.6:
        bottom = rng.randrange(index)
        found["bottom"] = chain.names[bottom]
        base = bottom - 1 if bottom else None
    if rng.random() < 0.3:
        found["filter-node-name"] = "filter"
    return found, device, None if base is None else chain.names[base]


def told(rng: random.Random, speeds: tuple[int, ...]) -> dict[str, Any]:
    """A command about the job."""
    kind = rng.choice(("pause", "resume", "set-speed", "query"))
    if kind == "set-speed":
        return {"execute": "block-job-set-speed", "arguments": {"device": "j", "speed": rng.choice(speeds)}}
    if kind == "query":
        return {"execute": rng.choice(("query-block-jobs", "query-named-block-nodes", "x-debug-query-block-graph"))}
    return {"execute": f"block-job-{kind}", "arguments": {"device": "j"}}


def one_request(client: NbdClient, model: Model, rng: random.Random, unit: int) -> None:
    size = len(model.now)
    length = rng.choice((1, 1, 4, 16, 100)) * rng.randint(1, 3) * unit
    at = rng.randrange(0, size - length, unit)
    kind = rng.random()
    if kind < 0.5:
        data = rng.randbytes(min(length, SECTOR)) * (length // min(length, SECTOR))
        data = data.ljust(length, b"\x77")
        client.pwrite(at, data)
        model.write(at, data)
    elif kind < 0.65:
        client.zero(at, length)
        model.write(at, bytes(length))
    elif kind < 0.7:
        client.flush()
        model.flushed()
    else:
        assert client.pread(at, length) == model.now[at : at + length]


def ended(daemon: DaemonProcess) -> bool:
    """Whether an event has told so."""
    qmp = daemon.qmp
    try:
        while True:
            qmp.events.append(qmp.message(0))
    except TimeoutError:
        pass
    return any(event["event"] in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED") for event in qmp.events)


def live(root: Path, seed: int, end: str) -> str:
    """One run; what was done."""
    rng = random.Random(seed)
    root.mkdir()
    chain = Chain(root, rng)
    model = Model(chain.content(chain.top))
    before = chain.sums()
    wanted, device, base = arguments(chain, rng)
    unit = SECTOR if end == "killed" else rng.choice((1, SECTOR))
    with DaemonProcess("pyqsd", chain.argv(), workdir=root) as daemon:
        qmp = daemon.qmp
        with NbdClient(root / "nbd.sock", "e") as client:
            for _ in range(rng.randrange(10)):
                one_request(client, model, rng, unit)
            speeds = (0, 1 << 20, 8 << 20) if end == "completes" else (1 << 17, 1 << 20)
            qmp.execute("block-stream", job_id="j", speed=rng.choice(speeds), **wanted)
            stop_at, number = rng.randint(20, 150), 0
            while not ended(daemon):
                number += 1
                one_request(client, model, rng, unit)
                if number == stop_at and end != "completes":
                    break
                if number > 150:
                    # Enough: let it come to its end.
                    qmp.command("block-job-resume", device="j")
                    qmp.command("block-job-set-speed", device="j", speed=0)
                elif rng.random() < 0.1:
                    qmp.raw_command(told(rng, speeds))
            if end == "cancelled":
                qmp.command("block-job-cancel", device="j", force=True)
                while not ended(daemon):
                    one_request(client, model, rng, unit)
            if end in ("completes", "cancelled"):
                for _ in range(10):
                    one_request(client, model, rng, unit)
                assert not [job for job in qmp.execute("query-block-jobs") if job["status"] != "concluded"]
                nodes = {node["node-name"] for node in qmp.execute("query-named-block-nodes")}
                assert "filter" not in nodes and nodes >= set(chain.names)
                client.disconnect()
            elif end == "killed":
                daemon.kill()
            else:
                assert daemon.terminate() == 0
        events = [event for event in qmp.events if event["event"].startswith("BLOCK_JOB")]
    if end == "completes":
        assert [(event["event"], event["data"].get("error")) for event in events] == [("BLOCK_JOB_COMPLETED", None)]
    completed = any(event["event"] == "BLOCK_JOB_COMPLETED" for event in events)
    check(chain, model, before, device, base, end, completed)
    return f"{wanted}, {end}" + (" (had completed)" if completed and end != "completes" else "")


def check(
    chain: Chain, model: Model, before: dict[str, str], device: str, base: str | None, end: str, completed: bool
) -> None:
    after = chain.sums()
    for name in chain.names:
        if name not in (device, chain.top):
            assert after[name] == before[name], f"{name} was changed"
    model.check(chain.content(chain.top), end == "killed")
    if completed:
        named = images.info(chain.root / chain.files[device]).get("backing-filename")
        assert named == (None if base is None else chain.files[base])
        # The layers that were streamed are needed no more.
        index = chain.names.index(device)
        last = -1 if base is None else chain.names.index(base)
        for name in chain.names[last + 1 : index]:
            (chain.root / chain.files[name]).unlink()
        model.check(chain.content(chain.top), end == "killed")


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_client_writes_meanwhile(tmp_path: Path, seed: int, end: str) -> None:
    live(tmp_path / "live", seed * len(ENDS) + ENDS.index(end), end)
