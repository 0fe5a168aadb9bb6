"""Two daemons, ours and the real one, have the same image open and hand it over to each other (blockdev-set-active)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.daemon import DaemonProcess
from tests.support.images import KiB, MiB
from tests.support.nbd import NbdClient, NbdError
from tests.support.qmp import QmpError

SIZE = 4 * MiB

# name → (format, qemu-img options, whether there is a backing file, options of the node)
KINDS: dict[str, tuple[str, str, bool, str]] = {
    "raw": ("raw", "", False, ""),
    "64k": ("qcow2", "", True, ""),
    "4k-small-cache": ("qcow2", "cluster_size=4k", False, ",l2-cache-size=4096,refcount-cache-size=16384"),
    "lazy": ("qcow2", "lazy_refcounts=on", False, ""),
    "subclusters": ("qcow2", "extended_l2=on", False, ""),
}


class Side:
    """One of the daemons, in a directory of its own beside the image."""

    def __init__(self, kind: str, number: int, root: Path, spec: tuple[str, str, bool, str], active: bool) -> None:
        fmt, _, _, options = spec
        workdir = root / str(number)
        workdir.mkdir()
        self.socket = workdir / "nbd.sock"
        state = "on" if active else "off"
        # QSD's file node stays active without its own option, and so keeps the length that the file has now.
        node = (
            f"{fmt},node-name=disk,discard=unmap{options},active={state},file.active={state if kind == 'qsd' else 'on'}"
        )
        self.daemon = DaemonProcess(
            kind,
            [
                *("--blockdev", f"{node},file.driver=file,file.filename=../disk"),
                *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
                *("--export", "nbd,id=e,node-name=disk,writable=on,allow-inactive=on"),
            ],
            workdir=workdir,
        )

    def set_active(self, active: bool) -> None:
        self.daemon.qmp.execute("blockdev-set-active", node_name="disk", active=active)

    def connect(self) -> NbdClient:
        return NbdClient(self.socket, "disk")


def hand_over(kinds: tuple[str, str], name: str, root: Path, rounds: int = 6) -> None:
    spec = KINDS[name]
    fmt, options, backing, _ = spec
    rng = random.Random(f"{kinds} {name}")
    model = bytearray(SIZE)
    if backing:
        images.create("base.qcow2", SIZE, cwd=root)
        images.io("base.qcow2", "write -P 0xbb 0 1M", cwd=root)
        model[:MiB] = b"\xbb" * MiB
    images.create("disk", SIZE, fmt, options, backing=str(root / "base.qcow2") if backing else None, cwd=root)
    sides = [Side(kind, number, root, spec, number == 0) for number, kind in enumerate(kinds)]
    try:
        for turn in range(rounds):
            writer, other = sides[turn % 2], sides[1 - turn % 2]
            if turn:
                if fmt != "raw":  # the guests of a raw image may share it
                    with pytest.raises(QmpError, match="lock"):
                        writer.set_active(True)
                other.set_active(False)
                writer.set_active(True)
            with writer.connect() as client:
                assert client.size == len(model)
                content = b"".join(client.pread(at, MiB) for at in range(0, len(model), MiB))
                assert content == model, f"turn {turn}"
                change(client, model, rng, turn)
                client.disconnect()
            with other.connect() as client:
                with pytest.raises(NbdError, match="1"):
                    client.pwrite(0, b"!" * 512)
                client.disconnect()
    finally:
        for side in sides:
            side.daemon.terminate()
    if fmt == "qcow2":
        images.assert_clean(root / "disk")
    assert images.read_all(root / "disk", fmt, root / "out") == model


def change(client: NbdClient, model: bytearray, rng: random.Random, turn: int) -> None:
    for number in range(40):
        length = rng.choice((512, 4 * KiB, 64 * KiB, 200 * KiB))
        offset = rng.randrange(0, len(model) - length, 512)
        data: Any = bytes(length)
        what = rng.random()
        if what < 0.2:
            client.zero(offset, length)
        elif what < 0.25:
            client.flush()
            continue
        else:
            data = bytes([turn + 1, number]) * (length // 2)
            client.pwrite(offset, data)
        model[offset : offset + length] = data


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kinds", [("pyqsd", "qsd"), ("qsd", "pyqsd"), ("pyqsd", "pyqsd")], ids="-".join)
def test_hand_over(kinds: tuple[str, str], name: str, tmp_path: Path) -> None:
    hand_over(kinds, name, tmp_path)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_size_after_hand_over(fmt: str, tmp_path: Path) -> None:
    """Who becomes active sees the size that the other one has given the image."""
    images.create("disk", SIZE, fmt, cwd=tmp_path)
    spec = (fmt, "", False, "")
    sides = [Side("qsd", 0, tmp_path, spec, True), Side("pyqsd", 1, tmp_path, spec, False)]
    try:
        for size, before, after in ((8 * MiB, 0, 1), (16 * MiB, 1, 0), (2 * MiB, 0, 1)):
            qmp, theirs = sides[before].daemon.qmp, sides[after].daemon.qmp
            for side in sides:
                if any(export["id"] == "e" for export in side.daemon.qmp.execute("query-block-exports")):
                    side.daemon.qmp.execute("block-export-del", id="e")
                    side.daemon.qmp.wait_event("BLOCK_EXPORT_DELETED")
            qmp.execute("block_resize", node_name="disk", size=size)
            sides[before].set_active(False)
            sides[after].set_active(True)
            nodes = theirs.execute("query-named-block-nodes")
            assert [node["image"]["virtual-size"] for node in nodes if node["node-name"] == "disk"] == [size]
    finally:
        for side in sides:
            side.daemon.terminate()
    if fmt == "qcow2":
        images.assert_clean(tmp_path / "disk")
