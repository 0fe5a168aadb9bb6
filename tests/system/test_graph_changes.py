"""The graph changes under a client that writes: nothing is lost, nothing is mixed up, nobody waits forever.

One client keeps requests to disjoint sectors in flight while commands replace children, reopen nodes, put overlays on
top, and make nodes inactive and active again. A model knows what each sector may hold. In the end the content is
compared through the export and with `qemu-img`, and every image is checked.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.support import images, nbd, peers
from tests.support.daemon import DaemonProcess, poll
from tests.support.images import KiB, MiB
from tests.support.nbd import NbdClient

SECTOR = 512
SIZE = 3 * MiB
DEPTH = 16


class Changes:
    """Makes random commands that fit the graph as it is. The top node is `top`; `refused` counts the errors."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        self.root = root
        self.rng = rng
        self.overlays = 0
        self.top = "disk"
        self.files = {"disk": "disk-file"}
        self.backing = {"disk": "base"}
        self.inactive = False

    def options(self, node: str, **more: Any) -> dict[str, Any]:
        """Of the qcow2 node `node`."""
        rng = self.rng
        found: dict[str, Any] = {
            "driver": "qcow2",
            "node-name": node,
            "file": self.files[node],
            "backing": self.backing[node],
            "discard": "unmap",
            "lazy-refcounts": rng.random() < 0.3,
            "l2-cache-entry-size": rng.choice((512, 2048, 4096)),
        }
        if node != self.top:
            found["read-only"] = True
        return {**found, **more}

    def file_options(self, node: str) -> dict[str, Any]:
        name = f"{node}-file"
        return {
            "driver": "file",
            "node-name": name,
            "filename": f"{node}.qcow2",
            "discard": "unmap",
            "read-only": node != self.top and self.rng.random() < 0.5,
            "cache": {"direct": self.rng.random() < 0.5},
        }

    def commands(self) -> list[dict[str, Any]]:
        """The next commands, to be sent one after the other."""
        rng, top = self.rng, self.top
        kind = rng.choice(
            ("reopen", "reopen", "file", "file", "filter", "backing", "several", "overlay", "active", "name")
        )
        if self.inactive or kind == "active":
            self.inactive = not self.inactive
            return [command("blockdev-set-active", **{"node-name": top, "active": not self.inactive})]
        if kind == "reopen":
            return [command("blockdev-reopen", options=[self.options(rng.choice(list(self.files)))])]
        if kind == "file":
            return [command("blockdev-reopen", options=[self.file_options(top)])]
        if kind == "filter":
            # A raw node between the format and its file, or away again.
            node = rng.choice(list(self.files))
            plain = self.files[node] == f"{node}-file"
            self.files[node] = f"{node}-raw" if plain else f"{node}-file"
            return [command("blockdev-reopen", options=[self.options(node)])]
        if kind == "backing":
            if top != "disk":
                return []
            self.backing[top] = "base" if self.backing[top] == "base-raw" else "base-raw"
            return [command("blockdev-reopen", options=[self.options(top)])]
        if kind == "several":
            bad = {**self.options(top), "cluster-size": 1} if rng.random() < 0.5 else self.options(top, file="nosuch")
            last = bad if rng.random() < 0.5 else self.options(top)
            return [command("blockdev-reopen", options=[self.file_options(top), last])]
        if kind == "name":
            below = self.backing[top].removesuffix("-raw")
            name = str(self.root / f"{below}.qcow2") if rng.random() < 0.5 else f"{below}.qcow2"
            arguments = {"device": top, "image-node-name": top, "backing-file": name}
            return [command("change-backing-file", **arguments)]
        if self.overlays == 3:
            return []
        self.overlays += 1
        name = f"overlay{self.overlays}"
        images.create(
            f"{name}.qcow2", None, "qcow2", f"cluster_size={rng.choice(('4k', '64k'))}", f"{top}.qcow2", cwd=self.root
        )
        made = [
            command("blockdev-add", **{**file_node(name)}),
            command("blockdev-add", **raw_node(name)),
            command(
                "blockdev-add",
                driver="qcow2",
                discard="unmap",
                file=f"{name}-file",
                backing=None,
                **{"node-name": name},
            ),
            command("blockdev-snapshot", node=top, overlay=name),
        ]
        self.files[name] = f"{name}-file"
        self.backing[name] = top
        self.top = name
        return made


def command(name: str, /, **arguments: Any) -> dict[str, Any]:
    return {"execute": name, "arguments": arguments}


def file_node(name: str) -> dict[str, Any]:
    return {"driver": "file", "node-name": f"{name}-file", "filename": f"{name}.qcow2", "discard": "unmap"}


def raw_node(name: str) -> dict[str, Any]:
    return {"driver": "raw", "node-name": f"{name}-raw", "file": f"{name}-file", "discard": "unmap"}


def storm(root: Path, seed: int, steps: int, kill: bool = False) -> int:
    """How many commands succeeded. `kill`: the daemon dies by SIGKILL in the midst of further ones."""
    rng = random.Random(seed)
    root.mkdir()
    images.create("base.qcow2", SIZE, cwd=root)
    images.io("base.qcow2", "write -P 0xbb 0 1M", cwd=root)
    images.create("disk.qcow2", None, backing="base.qcow2", cwd=root)
    model = bytearray(b"\xbb" * MiB + bytes(SIZE - MiB))
    changes = Changes(root, rng)
    args = [
        *("--blockdev", "file,node-name=base-file,filename=base.qcow2,read-only=on"),
        *("--blockdev", "qcow2,node-name=base,file=base-file,read-only=on"),
        *("--blockdev", "raw,node-name=base-raw,file=base,read-only=on"),
        *("--blockdev", "file,node-name=disk-file,filename=disk.qcow2,discard=unmap"),
        *("--blockdev", "raw,node-name=disk-raw,file=disk-file,discard=unmap"),
        *("--blockdev", "qcow2,node-name=disk,file=disk-file,backing=base,discard=unmap"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "nbd,id=e,node-name=disk,writable=on,allow-inactive=on"),
    ]
    succeeded = 0
    with DaemonProcess("pyqsd", args, workdir=root) as daemon, NbdClient(root / "nbd.sock", "disk") as client:
        load = Load(client, rng, model)
        for _ in range(steps):
            for message in changes.commands():
                load.go_on(rng.randrange(0, 12))
                daemon.qmp.send(message)
                load.go_on(rng.randrange(0, 24))
                reply = daemon.qmp.reply()
                if "return" in reply:
                    succeeded += 1
                else:
                    expected = ("Cannot find device='' nor node-name='nosuch'", "Parameter 'options[1].cluster-size'")
                    assert reply["error"]["desc"].startswith(expected), (message, reply)
        if changes.inactive:
            daemon.qmp.execute("blockdev-set-active", **{"node-name": changes.top, "active": True})
        load.finish()
        content = b"".join(client.pread(at, MiB) for at in range(0, SIZE, MiB))
        if kill:
            die(daemon, client, load, changes)
            daemon.check_stderr()
        else:
            client.disconnect()
    if kill:
        judge(root, changes, load, bytes(content))
        return succeeded
    for at in range(0, SIZE, SECTOR):
        have, want = content[at : at + SECTOR], model[at : at + SECTOR]
        assert have == want, f"sector {at // SECTOR}: {have[:4].hex()} instead of {want[:4].hex()}"
    for name in changes.files:
        images.assert_clean(root / f"{name}.qcow2")
    assert images.read_all(root / f"{changes.top}.qcow2", "qcow2", root / "out") == content
    return succeeded


def die(daemon: DaemonProcess, client: NbdClient, load: Load, changes: Changes) -> None:
    """Everything is flushed, and then the end comes while commands and requests are on their way."""
    client.flush()
    load.touched.clear()
    for _ in range(3):
        for message in changes.commands():
            daemon.qmp.send(message)
            load.go_on(load.rng.randrange(1, 30))
    daemon.kill()


def judge(root: Path, changes: Changes, load: Load, flushed: bytes) -> None:
    """What was flushed and not written since is there, and no image is corrupt."""
    top = root / f"{changes.top}.qcow2"
    for name in ("base", *changes.files):
        path = root / f"{name}.qcow2"
        poll(lambda path=path: peers.run("qemu-img", "info", path, ok=()).returncode == 0, "the locks to go")
        if images.info(path).get("dirty-flag"):
            # Lazy refcounts: right when the image is next opened for writing.
            images.check(path, "qcow2", "-r", "all")
        images.assert_clean(path, leaks=True)
    content = images.read_all(top, "qcow2", root / "out")
    for sector in range(SIZE // SECTOR):
        at = sector * SECTOR
        if sector not in load.touched:
            have, want = content[at : at + SECTOR], flushed[at : at + SECTOR]
            assert have == want, f"sector {sector}: {have[:4].hex()} instead of {want[:4].hex()}"


class Load:
    """Keeps requests to disjoint sectors in flight. An inactive export refuses writes, and then nothing has changed."""

    def __init__(self, client: NbdClient, rng: random.Random, model: bytearray) -> None:
        self.client = client
        self.rng = rng
        self.model = model
        self.pending: dict[int, tuple[int, int, bytes | None]] = {}
        self.busy: set[int] = set()
        self.touched: set[int] = set()
        self.sent = 0

    def go_on(self, requests: int) -> None:
        """Send that many requests, and take the replies of those that are too many."""
        for _ in range(requests):
            while len(self.pending) >= DEPTH:
                self._receive()
            self._send()

    def finish(self) -> None:
        while self.pending:
            self._receive()

    def _send(self) -> None:
        rng = self.rng
        length = rng.choice((SECTOR, 3 * SECTOR, 4 * KiB, 4 * KiB, 24 * KiB, 100 * KiB))
        offset = rng.randrange(0, SIZE - length, SECTOR)
        sectors = set(range(offset // SECTOR, (offset + length) // SECTOR))
        if sectors & self.busy:
            return
        self.busy |= sectors
        self.sent += 1
        kind = rng.random()
        data: bytes | None = None
        if kind < 0.25:
            cookie = self.client.send(nbd.CMD_READ, offset, length)
        elif kind < 0.3:
            cookie = self.client.send(nbd.CMD_FLUSH)
        elif kind < 0.4:
            data = bytes(length)
            cookie = self.client.send(nbd.CMD_WRITE_ZEROES, offset, length, rng.choice((0, nbd.F_NO_HOLE)))
        else:
            data = self.sent.to_bytes(4, "big") * (length // 4)
            cookie = self.client.send(nbd.CMD_WRITE, offset, length, rng.choice((0, 0, 0, nbd.F_FUA)), data)
        if data is not None:
            self.touched |= sectors
        self.pending[cookie] = (offset, length, data)

    def _receive(self) -> None:
        reply = self.client.receive()
        offset, length, data = self.pending.pop(reply.cookie)
        self.busy -= set(range(offset // SECTOR, (offset + length) // SECTOR))
        if reply.error:
            assert (reply.error, reply.text) == (1, "export is inactive"), reply
        elif data is not None:
            self.model[offset : offset + length] = data
        elif reply.data or reply.holes:
            assert self.client.assemble(reply, offset, length) == self.model[offset : offset + length]


@pytest.mark.parametrize("seed", range(3))
def test_graph_changes_under_load(tmp_path: Path, seed: int) -> None:
    assert storm(tmp_path / "storm", seed, 60) > 20


@pytest.mark.parametrize("seed", range(3))
def test_kill_while_the_graph_changes(tmp_path: Path, seed: int) -> None:
    storm(tmp_path / "storm", seed, 15, kill=True)
