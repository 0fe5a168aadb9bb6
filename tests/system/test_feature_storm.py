"""The features of qcow2 meet: internal snapshots, bitmaps, encryption, compression, data files, amendments.

A client writes to one image while QMP commands do everything to it that can be done to an image in use, in between with
decent ends, kill -9, and other programs that write. A model knows what each sector may hold, what it held when each
snapshot was taken, and what each bitmap must and may cover.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import images, nbd, peers
from tests.support.daemon import DaemonProcess, poll
from tests.support.images import KiB, MiB
from tests.support.nbd import NbdClient

SECTOR = 512
SIZE = 2 * MiB
LARGEST = 3 * MiB
DEPTH = 12
BACKING = -1
SECRET = ("--object", "secret,id=key,data=storm")


@dataclass(frozen=True)
class Kind:
    """How the image is made (``-o`` of qemu-img), opened, and used."""

    create: str = ""
    backing: bool = False
    luks: bool = False
    data_file: bool = False
    #: Whether everything is written through the filter ``compress``, in units of this many bytes.
    compress: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """Whether an overlay can name it as its backing file, so that others find it."""
        return not self.luks and not self.compress


KINDS = {
    "plain": Kind(),
    "backing": Kind(backing=True),
    "4k-tiny": Kind("cluster_size=4k", options={"l2-cache-size": 8 * KiB, "refcount-cache-size": 8 * KiB}),
    "subclusters": Kind("extended_l2=on,cluster_size=32k", backing=True),
    "luks": Kind("cluster_size=16k", luks=True),
    "luks-subclusters": Kind("extended_l2=on,cluster_size=64k", luks=True, backing=True),
    "data-file": Kind(data_file=True, backing=True),
    "data-file-raw": Kind("data_file_raw=on", data_file=True),
    "compress": Kind("cluster_size=16k", compress=16 * KiB),
    "compress-zstd": Kind("cluster_size=4k,compression_type=zstd", compress=512),
    "compress-subclusters": Kind("cluster_size=16k,extended_l2=on", backing=True, compress=16 * KiB),
    "lazy": Kind("lazy_refcounts=on,cluster_size=8k", backing=True),
    "refcount-1": Kind("refcount_bits=1,cluster_size=4k"),
    "refcount-64": Kind("refcount_bits=64,cluster_size=4k"),
    "v2": Kind("compat=0.10,cluster_size=8k", backing=True),
}

#: What may be refused, and in which words.
REFUSALS = {
    "blockdev-snapshot-internal-sync": (
        "Failed to get a snapshot list: Operation not supported|"
        "Failed to create snapshot '.*' on device '.*': .*(refcount|out of range|Invalid argument)"
    ),
    "blockdev-snapshot-delete-internal-sync": "Need a root block node",
    "block-dirty-bitmap-add": "Cannot store dirty bitmaps in qcow2 v2 files",
    "block_resize": "Can't resize a v2 image which has snapshots|Can't resize an image which has snapshots",
    "x-blockdev-amend": (
        "Cannot downgrade an image|Internal snapshots prevent downgrade|version=v2 requires refcount-bits=16|"
        "Cannot decrease refcount entry width|Different refcount widths than 16 bits|Lazy refcounts only supported|"
        "Can't resize a v2 image which has snapshots|Lazy refcounts require a qcow2|"
        "discard-no-unref is only supported since qcow2 version 3"
    ),
}


def content(token: int, sector: int) -> bytes:
    if token == 0:
        return bytes(SECTOR)
    if token == BACKING:
        return b"\xbb" * SECTOR
    return token.to_bytes(4, "big") * 64 + sector.to_bytes(4, "big") * 64


class Values:
    """What the sectors of a disk may hold."""

    def __init__(self, now: list[int], others: dict[int, set[int]]) -> None:
        self.now = now
        self.others = others

    def settle(self, data: bytes, what: str) -> list[int]:
        """What they do hold. Fails if that is something else."""
        found = []
        for sector, token in enumerate(self.now[: len(data) // SECTOR]):
            have = data[sector * SECTOR : (sector + 1) * SECTOR]
            for possible in (token, *self.others.get(sector, ())):
                if have == content(possible, sector):
                    found.append(possible)
                    break
            else:
                allowed = {token, *self.others.get(sector, ())}
                raise AssertionError(
                    f"{what}: sector {sector} ({sector * SECTOR:#x}) holds {have[:4].hex()}…{have[-4:].hex()}, not one "
                    f"of {sorted(allowed)}"
                )
        return found


@dataclass(eq=False)
class Bitmap:
    name: str
    persistent: bool
    granularity: int
    must: set[int] = field(default_factory=set)
    may: set[int] = field(default_factory=set)


@dataclass
class Request:
    kind: str  # read, write (also of zeroes), trim, settle, flush
    offset: int
    length: int
    token: int = 0
    bitmaps: tuple[Bitmap, ...] = ()

    @property
    def sectors(self) -> range:
        return range(self.offset // SECTOR, (self.offset + self.length) // SECTOR)


class Storm:
    """One image, one daemon after the other."""

    def __init__(self, root: Path, kind: Kind, seed: int) -> None:
        self.root = root
        self.kind = kind
        self.rng = random.Random(seed)
        self.log: list[str] = []
        self.now = [0] * (SIZE // SECTOR)
        #: Since the last flush: what else the disk may hold after a crash.
        self.others: dict[int, set[int]] = {}
        self.pending: dict[int, Request] = {}
        self.unsettled: list[Request] = []
        self.busy: set[int] = set()
        self.bitmaps: dict[str, Bitmap] = {}
        self.snapshots: dict[str, Values] = {}
        #: While a snapshot is being taken: what sectors may get.
        self.recording: dict[int, set[int]] | None = None
        self.overlay: list[int] | None = None  # what the disk held when it got one
        self.inactive = False
        self.leaky = False
        self.tokens = 0
        self.names = 0
        self.done: dict[str, int] = {}
        root.mkdir()
        self.make()
        args = ["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]
        if kind.luks:
            args += list(SECRET)
        self.daemon = DaemonProcess("pyqsd", args, workdir=root, start=False)
        self.client: NbdClient | None = None

    # --- the image ------------------------------------------------------------------------------------------------

    def make(self) -> None:
        kind, root = self.kind, self.root
        options = [kind.create] if kind.create else []
        if kind.data_file:
            options.append(f"data_file={root}/data.raw")
        if kind.luks:
            options.append("encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10")
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", *(SECRET if kind.luks else ())]
        argv += ["-o", ",".join(options)] if options else []
        if kind.backing:
            images.create("base.qcow2", SIZE, cwd=root)
            images.io("base.qcow2", f"write -P 0xbb 0 {SIZE // 2}", cwd=root)
            argv += ["-b", "base.qcow2", "-F", "qcow2"]
            self.now[: len(self.now) // 2] = [BACKING] * (len(self.now) // 2)
        peers.run(*argv, "disk.qcow2", str(SIZE), cwd=root)

    def opts(self, name: str = "disk.qcow2") -> list[str]:
        """The image for qemu-img."""
        more = ",encrypt.format=luks,encrypt.key-secret=key" if self.kind.luks else ""
        return [*(SECRET if self.kind.luks else ()), "--image-opts", f"driver=qcow2,file.filename={name}{more}"]

    def read_offline(self, *args: str) -> bytes:
        peers.run("qemu-img", "convert", *args, "-O", "raw", *self.opts(), "out.raw", cwd=self.root)
        data = (self.root / "out.raw").read_bytes()
        (self.root / "out.raw").unlink()
        return data

    def check_offline(self, *args: str) -> dict[str, Any]:
        done = peers.run("qemu-img", "check", "--output=json", *args, *self.opts(), ok=(0, 2, 3), cwd=self.root)
        found = json.loads(done.stdout)
        assert isinstance(found, dict)
        return found

    def judge_offline(self, *, killed: bool = False) -> None:
        """The image as others see it."""
        if self.overlay is not None:
            # Its backing file is found by its name.
            argv = ("qemu-img", "check", "--output=json", "overlay.qcow2")
            result = json.loads(peers.run(*argv, ok=(0, 2, 3), cwd=self.root).stdout)
            assert not result.get("corruptions") and (killed or not result.get("leaks")), result
            peers.run("qemu-img", "commit", "-q", "-d", "overlay.qcow2", cwd=self.root)
            for bitmap in self.bitmaps.values():
                bitmap.must |= {sector for sector, old in enumerate(self.overlay) if old != self.now[sector]}
                bitmap.may |= set(range(len(self.now)))
            self.overlay = None
        if killed:
            if self.check_offline().get("corruptions") and self.is_dirty():
                # Whoever opens it to write repairs it.
                peers.run("qemu-io", "-c", "read 0 512", *self.opts(), cwd=self.root)
            result = self.check_offline()
            assert not result.get("corruptions") and not result.get("check-errors"), result
            # `qemu-img check -r` loses the snapshots of an image that has bitmaps too.
            if self.rng.random() < 0.5 and not (self.snapshots and self.bitmaps):
                self.check_offline("-r", "leaks")
            else:
                self.leaky = True
        else:
            result = self.check_offline()
            assert not result.get("corruptions") and not result.get("check-errors"), result
            assert self.leaky or not result.get("leaks"), result
        data = self.read_offline()
        assert len(data) == len(self.now) * SECTOR
        self.now = Values(self.now, self.others if killed else {}).settle(data, "offline")
        self.others = {}
        for name, values in self.snapshots.items():
            # qemu-img shows snapshots with the present size.
            data = self.read_offline("-l", f"snapshot.name={name}")
            values.settle(data, f"snapshot {name}")

    def is_dirty(self) -> bool:
        found = json.loads(
            peers.run("qemu-img", "info", "--output=json", *self.opts(), cwd=self.root, ok=(0, 1)).stdout
        )
        return bool(found.get("dirty-flag"))

    def write_offline(self) -> None:
        """Another program writes to the image."""
        length = self.rng.choice((512, 4 * KiB, 64 * KiB))
        offset = self.rng.randrange(0, len(self.now) * SECTOR - length + 1, SECTOR)
        self.tokens += 1
        request = Request("write", offset, length, self.tokens)
        (self.root / "piece").write_bytes(b"".join(content(request.token, sector) for sector in request.sectors))
        peers.run("qemu-io", "-d", "unmap", "-c", f"write -s piece {offset} {length}", *self.opts(), cwd=self.root)
        for sector in request.sectors:
            self.now[sector] = request.token
            self.others.pop(sector, None)
        for bitmap in self.bitmaps.values():
            bitmap.must |= set(request.sectors)
            bitmap.may |= set(request.sectors)

    # --- the daemon -------------------------------------------------------------------------------------------------

    @property
    def top(self) -> str:
        return "overlay" if self.overlay is not None else "packed" if self.kind.compress else "disk"

    def options(self) -> dict[str, Any]:
        kind, rng = self.kind, self.rng
        found: dict[str, Any] = {
            "driver": "qcow2",
            "node-name": "disk",
            "file": "file",
            "discard": rng.choice(("unmap", "unmap", "ignore")),
            "detect-zeroes": rng.choice(("off", "off", "on")),
            "l2-cache-entry-size": rng.choice((512, 4096)),
            "discard-no-unref": rng.random() < 0.2 and not self.is_v2(),
            **kind.options,
        }
        if found["detect-zeroes"] == "on" and found["discard"] == "unmap" and rng.random() < 0.5:
            found["detect-zeroes"] = "unmap"
        if "l2-cache-size" not in found:
            found["l2-cache-size"] = rng.choice((64 * KiB, MiB))
        if kind.backing:
            found["backing"] = "base"
        if kind.data_file:
            found["data-file"] = "data"
        if kind.luks:
            found["encrypt"] = {"format": "luks", "key-secret": "key"}
        return found

    def is_v2(self) -> bool:
        with open(self.root / "disk.qcow2", "rb") as stream:
            return stream.read(8)[7] == 2

    def start(self) -> None:
        self.daemon.start()
        qmp = self.daemon.qmp
        direct = {"direct": self.rng.random() < 0.3}
        if self.kind.backing:
            options = {"driver": "qcow2", "node-name": "base", "read-only": True}
            qmp.execute("blockdev-add", **options, file={"driver": "file", "filename": "base.qcow2"})
        if self.kind.data_file:
            qmp.execute(
                "blockdev-add", driver="file", node_name="data", filename="data.raw", cache=direct, discard="unmap"
            )
        qmp.execute(
            "blockdev-add",
            driver="file",
            node_name="file",
            filename=f"{self.root}/disk.qcow2",
            cache=direct,
            discard="unmap",
        )
        qmp.execute("blockdev-add", **self.options())
        if self.kind.compress:
            qmp.execute("blockdev-add", driver="compress", node_name="packed", file="disk", discard="unmap")
        self.export()

    def export(self) -> None:
        arguments = {"allow-inactive": True, "writable": True, "node-name": self.top, "name": "e"}
        self.daemon.qmp.execute("block-export-add", type="nbd", id="e", **arguments)
        self.client = NbdClient(self.root / "nbd.sock", "e")
        assert self.client.size == len(self.now) * SECTOR

    def unexport(self) -> None:
        self.finish()
        self.nbd.disconnect()
        self.client = None
        self.daemon.qmp.execute("block-export-del", id="e", mode="hard")
        self.daemon.qmp.wait_event("BLOCK_EXPORT_DELETED")

    @property
    def nbd(self) -> NbdClient:
        assert self.client is not None
        return self.client

    # --- requests ---------------------------------------------------------------------------------------------------

    def go_on(self, requests: int) -> None:
        for _ in range(requests):
            while len(self.pending) >= DEPTH:
                self.receive()
            self.request()

    def finish(self) -> None:
        """All requests are over, and it is known what trims have left."""
        while self.pending or (self.unsettled and not self.inactive):
            while self.unsettled and not self.inactive:
                self.send(self.unsettled.pop())
            self.receive()

    def request(self) -> None:
        rng = self.rng
        unit = self.kind.compress or SECTOR
        most = len(self.now) * SECTOR // unit
        length = rng.choice((1, 2, 8, 8, 24, 64, 128, 300)) * SECTOR
        length = min(most, -(-length // unit)) * unit
        offset = rng.randrange(0, most - length // unit + 1) * unit
        if rng.random() < 0.4 and length >= 4 * KiB:
            offset -= offset % min(64 * KiB, length)
        sectors = set(range(offset // SECTOR, (offset + length) // SECTOR))
        if self.kind.compress:
            # Neighbours in the same cluster are read and written again with it.
            align = 32
            sectors = set(range(min(sectors) // align * align, (max(sectors) // align + 1) * align))
        if sectors & self.busy:
            return
        kind = rng.choices(("read", "write", "zero", "trim", "flush"), (20, 50, 12, 15, 3))[0]
        self.tokens += 1
        bitmaps = () if self.overlay is not None else tuple(self.bitmaps.values())
        if kind == "flush":
            self.send(Request("flush", 0, 0))
        elif kind == "read":
            self.send(Request("read", offset, length))
        elif kind == "trim":
            self.send(Request("trim", offset, length, 0, bitmaps))
        else:
            self.send(Request("write", offset, length, 0 if kind == "zero" else self.tokens, bitmaps))

    def send(self, request: Request) -> None:
        rng, client = self.rng, self.nbd
        offset, length = request.offset, request.length
        self.busy |= self.held(request)
        if request.kind in ("write", "trim"):
            for bitmap in self.bitmaps.values():
                bitmap.may |= set(request.sectors)
            for sector in request.sectors:
                self.others.setdefault(sector, set()).update((self.now[sector], request.token))
                if self.recording is not None:
                    self.recording.setdefault(sector, set()).add(request.token)
        if request.kind in ("read", "settle"):
            cookie = client.send(nbd.CMD_READ, offset, length)
        elif request.kind == "flush":
            cookie = client.send(nbd.CMD_FLUSH)
        elif request.kind == "trim":
            cookie = client.send(nbd.CMD_TRIM, offset, length, rng.choice((0, 0, nbd.F_FUA)))
        elif request.token == 0:
            cookie = client.send(nbd.CMD_WRITE_ZEROES, offset, length, rng.choice((0, nbd.F_NO_HOLE, nbd.F_FUA)))
        else:
            data = b"".join(content(request.token, sector) for sector in request.sectors)
            cookie = client.send(nbd.CMD_WRITE, offset, length, rng.choice((0, 0, 0, nbd.F_FUA)), data)
        self.pending[cookie] = request

    def held(self, request: Request) -> set[int]:
        if not self.kind.compress or not request.length:
            return set(request.sectors)
        sectors = request.sectors
        return set(range(sectors[0] // 32 * 32, (sectors[-1] // 32 + 1) * 32))

    def receive(self) -> None:
        reply = self.nbd.receive()
        request = self.pending.pop(reply.cookie)
        sectors = request.sectors
        inactive = reply.error == 1 and reply.text == "export is inactive"
        if reply.error and not inactive:
            # Through `compress` nothing is overwritten.
            assert self.kind.compress and reply.error == 5 and request.kind == "write", (request, reply)
        if request.kind == "settle" or (request.kind == "trim" and not reply.error) or (reply.error and not inactive):
            if request.kind == "settle" and not inactive:
                data = self.nbd.assemble(reply, request.offset, request.length)
                for sector in sectors:
                    have = data[(sector - sectors[0]) * SECTOR :][:SECTOR]
                    if have == content(request.token, sector):
                        self.now[sector] = request.token
                    else:
                        assert have == content(self.now[sector], sector), (sector, request, have[:8], self.now[sector])
            else:
                self.unsettled.append(Request("settle", request.offset, request.length, request.token))
                return
        elif not reply.error:
            if request.kind == "write":
                for sector in sectors:
                    self.now[sector] = request.token
                for bitmap in request.bitmaps:
                    bitmap.must |= set(sectors)
            elif request.kind == "read":
                data = self.nbd.assemble(reply, request.offset, request.length)
                for sector in sectors:
                    have = data[(sector - sectors[0]) * SECTOR :][:SECTOR]
                    assert have == content(self.now[sector], sector), (sector, request, have[:8], self.now[sector])
        self.busy -= self.held(request)

    def flush(self) -> None:
        self.finish()
        assert not self.unsettled
        self.nbd.flush()
        self.others = {}

    # --- commands ---------------------------------------------------------------------------------------------------

    def command(self, name: str, /, **arguments: Any) -> bool:
        """Run a command while requests are in flight; whether it succeeded."""
        self.log.append(f"{name} {arguments}")
        self.go_on(self.rng.randrange(0, 8))
        self.daemon.qmp.send({"execute": name, "arguments": arguments})
        self.go_on(self.rng.randrange(0, 16))
        return self.outcome(name, self.daemon.qmp.reply(timeout=60))

    def outcome(self, name: str, reply: dict[str, Any]) -> bool:
        if "error" not in reply:
            self.done[name] = self.done.get(name, 0) + 1
            self.result = reply["return"]
            return True
        text = reply["error"]["desc"]
        self.log.append(f"→ {text}")
        assert name in REFUSALS and re.search(REFUSALS[name], text), (name, text)
        return False

    def step(self) -> None:
        kinds = {
            "load": 10,
            "snapshot": 5,
            "unsnapshot": 4,
            "bitmap": 4,
            "check": 3,
            "amend": 5,
            "resize": 2,
            "reopen": 4,
            "read_only": 1,
            "active": 3,
            "overlay": 1,
            "name": 1,
            "restart": 1,
            "kill": 1,
            "content": 1,
        }
        name = self.rng.choices(list(kinds), list(kinds.values()))[0]
        getattr(self, f"do_{name}")()

    def do_load(self) -> None:
        self.go_on(60)

    def do_content(self) -> None:
        self.activate()
        self.flush()
        size = len(self.now) * SECTOR
        data = b"".join(self.nbd.pread(at, min(MiB, size - at)) for at in range(0, size, MiB))
        Values(self.now, {}).settle(data, "online")
        self.check_bitmaps()

    def do_snapshot(self) -> None:
        if len(self.snapshots) >= 4 or self.inactive or self.overlay is not None:
            return
        self.names += 1
        name = f"s{self.names}"
        self.recording = {}
        self.finish() if self.rng.random() < 0.3 else self.go_on(4)
        for request in (*self.pending.values(), *self.unsettled):
            if request.kind in ("write", "trim", "settle"):
                for sector in request.sectors:
                    self.recording.setdefault(sector, set()).update((request.token, self.now[sector]))
        now = list(self.now)
        # Requests that `command` sends before it come too late for `now`, and are recorded.
        if self.command("blockdev-snapshot-internal-sync", device=self.top, name=name):
            self.snapshots[name] = Values(now, self.recording)
        self.recording = None

    def do_unsnapshot(self) -> None:
        if self.snapshots and not self.inactive and self.overlay is None:
            name = self.rng.choice(list(self.snapshots))
            assert self.command("blockdev-snapshot-delete-internal-sync", device=self.top, name=name)
            del self.snapshots[name]

    def do_bitmap(self) -> None:
        if self.inactive or self.overlay is not None:
            return
        rng = self.rng
        action = rng.choice(("add", "add", "remove", "clear", "merge", "check"))
        known = list(self.bitmaps.values())
        if action == "add" and len(known) < 4:
            self.names += 1
            made = Bitmap(f"b{self.names}", rng.random() < 0.7, rng.choice((512, 4096, 65536)))
            arguments = {"node": "disk", "name": made.name, "granularity": made.granularity}
            # It may miss the requests until the reply, and may see them.
            self.bitmaps[made.name] = made
            for request in self.pending.values():
                made.may |= set(request.sectors)
            early = Bitmap(made.name, made.persistent, made.granularity)
            self.bitmaps[made.name] = early
            ok = self.command("block-dirty-bitmap-add", **arguments, persistent=made.persistent)
            made.may |= early.may
            self.bitmaps[made.name] = made
            if not ok:
                del self.bitmaps[made.name]
        elif action == "check":
            self.check_bitmaps()
        elif action == "remove" and known:
            one = rng.choice(known)
            assert self.command("block-dirty-bitmap-remove", node="disk", name=one.name)
            del self.bitmaps[one.name]
        elif action == "clear" and known:
            one = rng.choice(known)
            cleared = Bitmap(one.name, one.persistent, one.granularity)
            for request in self.pending.values():
                cleared.may |= set(request.sectors)
            early = self.bitmaps[one.name] = Bitmap(one.name, one.persistent, one.granularity)
            assert self.command("block-dirty-bitmap-clear", node="disk", name=one.name)
            cleared.may |= early.may
            self.bitmaps[one.name] = cleared
        elif action == "merge" and len(known) > 1:
            into, source = rng.sample(known, 2)
            must = set(source.must)
            assert self.command("block-dirty-bitmap-merge", node="disk", target=into.name, bitmaps=[source.name])
            into.must |= must
            # What it has may be coarser.
            into.may |= rounded(source.may, source.granularity)

    def check_bitmaps(self) -> None:
        """They cover all that they must, and nothing that they need not."""
        if self.inactive or self.overlay is not None or not self.bitmaps:
            return
        self.finish()
        qmp = self.daemon.qmp
        arguments = {"node-name": "disk", "writable": True, "name": "bitmaps", "bitmaps": list(self.bitmaps)}
        qmp.execute("block-export-add", type="nbd", id="bitmaps", **arguments)
        contexts = tuple(f"qemu:dirty-bitmap:{name}" for name in self.bitmaps)
        with NbdClient(self.root / "nbd.sock", "bitmaps", contexts=contexts) as client:
            for bitmap in self.bitmaps.values():
                dirty: set[int] = set()
                for start, length, flags in client.block_map(f"qemu:dirty-bitmap:{bitmap.name}"):
                    if flags & 1:
                        dirty |= set(range(start // SECTOR, (start + length) // SECTOR))
                missing = bitmap.must - dirty
                assert not missing, f"bitmap {bitmap} misses sectors {sorted(missing)[:10]}"
                unit = max(bitmap.granularity, 16 * KiB if self.kind.compress else 0)
                more = dirty - rounded(bitmap.may, unit)
                assert not more, f"bitmap {bitmap.name} has sectors {sorted(more)[:10]}"
            client.disconnect()
        qmp.execute("block-export-del", id="bitmaps", mode="hard")
        qmp.wait_event("BLOCK_EXPORT_DELETED")

    def do_check(self) -> None:
        if self.inactive:
            return
        assert self.command("x-blockdev-check", **{"node-name": "disk"})
        result = self.result
        assert not result.get("corruptions") and not result["check-errors"], result
        assert self.leaky or not result.get("leaks"), result

    def do_amend(self) -> None:
        if self.inactive or self.overlay is not None:
            return
        rng = self.rng
        change = rng.choice(("refcount-bits", "lazy-refcounts", "v2", "v3", "size", "several"))
        options: dict[str, Any] = {"driver": "qcow2"}
        if change in ("refcount-bits", "several"):
            options["refcount-bits"] = rng.choice((1, 8, 16, 32, 64))
        if change in ("lazy-refcounts", "several"):
            options["lazy-refcounts"] = rng.random() < 0.5
        if change in ("v2", "v3"):
            options["version"] = change
        size = None
        if change == "size":
            self.unexport()
            size = options["size"] = self.new_size()
        arguments = {"job-id": "job", "node-name": "disk", "options": options}
        self.log.append(f"amend {options}")
        if self.client is not None:
            self.go_on(rng.randrange(8))
        self.daemon.qmp.execute("x-blockdev-amend", **arguments)
        if self.client is not None:
            self.go_on(rng.randrange(20))
        self.daemon.qmp.wait_event(
            "JOB_STATUS_CHANGE", lambda event: event["data"]["status"] == "concluded", timeout=60
        )
        (job,) = self.daemon.qmp.execute("query-jobs")
        self.daemon.qmp.execute("job-dismiss", id="job")
        self.daemon.qmp.events.clear()
        ok = self.outcome("x-blockdev-amend", {"error": {"desc": job["error"]}} if "error" in job else {"return": {}})
        if size is not None:
            if ok:
                self.resized(size)
            self.export()
            self.flush()

    def new_size(self) -> int:
        return self.rng.randrange(MiB, LARGEST + 1, 64 * KiB)

    def resized(self, size: int) -> None:
        old = len(self.now)
        del self.now[size // SECTOR :]
        self.now += [0] * (size // SECTOR - old)
        self.others = {}
        for bitmap in self.bitmaps.values():
            bitmap.must = {sector for sector in bitmap.must if sector < len(self.now)}
            bitmap.may |= set(range(min(old, len(self.now)), len(self.now)))

    def do_resize(self) -> None:
        if self.inactive or self.overlay is not None:
            return
        self.unexport()
        size = self.new_size()
        self.log.append(f"resize {size}")
        reply = self.daemon.qmp.command("block_resize", **{"node-name": self.top, "size": size})
        if self.outcome("block_resize", reply):
            self.resized(size)
        self.export()
        self.flush()

    def do_reopen(self) -> None:
        if self.inactive or self.overlay is not None:
            return
        changed = [self.options()]
        if self.rng.random() < 0.3:
            direct = {"direct": self.rng.random() < 0.5}
            file = {"driver": "file", "node-name": "file", "filename": f"{self.root}/disk.qcow2", "discard": "unmap"}
            changed.insert(0, {**file, "cache": direct})
        assert self.command("blockdev-reopen", options=changed)

    def do_read_only(self) -> None:
        if self.inactive or self.overlay is not None or self.kind.compress:
            return
        self.unexport()
        options = self.options()
        self.log.append("read-only and back")
        self.daemon.qmp.execute("blockdev-reopen", options=[{**options, "read-only": True}])
        result = self.check_offline("-U")
        assert not result.get("corruptions") and (self.leaky or not result.get("leaks")), result
        self.daemon.qmp.execute("blockdev-reopen", options=[options])
        self.export()
        self.others = {}

    def do_active(self) -> None:
        if not self.inactive:
            self.finish()
            names = [name for name, one in self.bitmaps.items() if not one.persistent]
            for name in names:
                # They stay in memory, and do not see what others write.
                self.daemon.qmp.execute("block-dirty-bitmap-remove", node="disk", name=name)
                self.bitmaps.pop(name, None)
            self.go_on(6)
            assert self.command("blockdev-set-active", **{"node-name": self.top, "active": False})
            self.inactive = True
            self.finish()
            self.drop_refused()
            return
        # Reads that are answered before others write.
        self.finish()
        if self.overlay is None and not self.unsettled:
            if self.rng.random() < 0.5:
                self.judge_offline()
            if self.rng.random() < 0.5:
                self.write_offline()
        self.activate()

    def drop_refused(self) -> None:
        self.go_on(4)
        self.finish()

    def activate(self) -> None:
        if self.inactive:
            assert self.command("blockdev-set-active", **{"node-name": self.top, "active": True})
            self.inactive = False
            self.finish()

    def do_overlay(self) -> None:
        if self.inactive or self.overlay is not None or not self.kind.alone:
            return
        self.flush()
        self.log.append("overlay")
        arguments = {
            "node-name": "disk",
            "snapshot-file": str(self.root / "overlay.qcow2"),
            "snapshot-node-name": "overlay",
        }
        before = list(self.now)
        assert self.command("blockdev-snapshot-sync", **arguments)
        self.finish()
        self.overlay = before
        for bitmap in self.bitmaps.values():
            bitmap.may |= set(range(len(self.now)))

    def do_name(self) -> None:
        if self.inactive or self.overlay is not None or not self.kind.backing:
            return
        name = self.rng.choice(("base.qcow2", str(self.root / "base.qcow2")))
        arguments = {"device": self.top, "image-node-name": "disk", "backing-file": name}
        assert self.command("change-backing-file", **arguments)

    def do_restart(self) -> None:
        self.activate()
        self.finish()
        self.nbd.disconnect()
        self.log.append("restart")
        if self.rng.random() < 0.5:
            self.daemon.qmp.execute("quit")
            assert self.daemon.wait() == 0
        else:
            assert self.daemon.terminate() == 0
        self.daemon.check_stderr()
        self.bitmaps = {name: one for name, one in self.bitmaps.items() if one.persistent}
        self.judge_offline()
        if self.rng.random() < 0.5:
            self.write_offline()
        self.start()
        found = self.bitmaps_there()
        assert found == {name: False for name in self.bitmaps}, (found, list(self.bitmaps))
        self.check_bitmaps()

    def bitmaps_there(self) -> dict[str, bool]:
        """The bitmaps that the node has, and whether they are inconsistent."""
        (node,) = (one for one in self.daemon.qmp.execute("query-named-block-nodes") if one["node-name"] == "disk")
        return {one["name"]: one.get("inconsistent", False) for one in node.get("dirty-bitmaps", ())}

    def do_kill(self) -> None:
        if self.inactive:
            self.activate()
        if self.rng.random() < 0.5:
            self.flush()
        self.go_on(self.rng.randrange(60))
        self.log.append("kill")
        self.daemon.kill()
        self.daemon.check_stderr()
        self.nbd.close()
        for request in self.pending.values():
            if request.kind == "settle":
                for sector in request.sectors:
                    self.others.setdefault(sector, set()).add(request.token)
        self.pending, self.unsettled, self.busy = {}, [], set()
        for name in ("disk.qcow2", "overlay.qcow2") if self.overlay is not None else ("disk.qcow2",):
            poll(partial(self.unlocked, name), "the locks to go")
        self.bitmaps = {}
        # Of a backing file they have been stored.
        stored = self.overlay is not None
        self.judge_offline(killed=True)
        self.start()
        for name, inconsistent in self.bitmaps_there().items():
            assert inconsistent or stored, name
            self.daemon.qmp.execute("block-dirty-bitmap-remove", node="disk", name=name)

    def unlocked(self, name: str) -> bool:
        """Whether the kernel has finished with a daemon that was killed."""
        argv = self.opts(name) if name == "disk.qcow2" else [name]
        return peers.run("qemu-img", "check", *argv, ok=(), cwd=self.root).returncode in (0, 2, 3)

    def run(self, steps: int) -> None:
        with self.daemon:
            try:
                self.start()
                for _ in range(steps):
                    self.go_on(self.rng.randrange(20))
                    self.step()
                self.do_restart()
                self.do_content()
                self.nbd.disconnect()
                assert self.daemon.terminate() == 0
                self.bitmaps = {name: one for name, one in self.bitmaps.items() if one.persistent}
                self.judge_offline()
            except BaseException as exc:
                exc.add_note("\n".join(self.log[-25:]))
                raise


def rounded(sectors: set[int], unit: int) -> set[int]:
    per = max(1, unit // SECTOR)
    return {at for granule in {sector // per for sector in sectors} for at in range(granule * per, (granule + 1) * per)}


def storm(root: Path, kind: str, seed: int, steps: int) -> int:
    """How many commands succeeded."""
    one = Storm(root, KINDS[kind], seed)
    one.run(steps)
    return sum(one.done.values())


@pytest.mark.parametrize("kind", KINDS)
def test_feature_storm(tmp_path: Path, kind: str) -> None:
    assert storm(tmp_path / "storm", kind, 1, 15)
