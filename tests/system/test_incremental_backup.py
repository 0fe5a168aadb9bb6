"""The life of incremental backups with a real daemon: full, increments, restarts, a crash, and the restored disks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.support import peers
from tests.support.daemon import DaemonProcess
from tests.support.nbd import NbdClient

SIZE = 16 << 20


class Vm:
    """A daemon with a disk, a guest that writes to it, and a record of what there is."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.rnd = random.Random(seed)
        self.content = bytearray(SIZE)
        self.daemon = DaemonProcess("pyqsd", workdir=directory)
        self._open()

    def _open(self) -> None:
        qmp = self.daemon.qmp
        qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
        file = {"driver": "file", "filename": "disk.qcow2"}
        qmp.execute("blockdev-add", driver="qcow2", node_name="disk", file=file)
        qmp.execute("block-export-add", type="nbd", id="guest", node_name="disk", writable=True)

    def restart(self) -> None:
        self.daemon.terminate()
        self.daemon.start()
        self._open()

    def guest(self) -> NbdClient:
        return NbdClient(self.directory / "nbd.sock", "disk")

    def write_some(self, nbd: NbdClient, count: int = 12) -> None:
        for _ in range(count):
            length = self.rnd.choice((512, 4096, 65536, 300_000))
            at = self.rnd.randrange(SIZE - length)
            if self.rnd.random() < 0.2:
                nbd.zero(at, length)
                self.content[at : at + length] = bytes(length)
            else:
                data = self.rnd.randbytes(length)
                nbd.pwrite(at, data)
                self.content[at : at + length] = data

    def change(self) -> None:
        with self.guest() as nbd:
            self.write_some(nbd)
            nbd.disconnect()

    def backup(self, target: str, backing: str | None = None, **options: Any) -> bytes:
        """Copy the disk as it is now, while the guest writes; returns what it is now."""
        qmp = self.daemon.qmp
        more = ["-b", backing, "-F", "qcow2"] if backing else []
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", *more, target, str(SIZE), cwd=self.directory)
        # The backing file is left alone: only what is written matters.
        node = {"driver": "qcow2", "node_name": "target", "file": {"driver": "file", "filename": target}}
        qmp.execute("blockdev-add", **node)
        with self.guest() as nbd:
            self.write_some(nbd, 3)
            now = bytes(self.content)
            qmp.execute("blockdev-backup", job_id="j", device="disk", target="target", **options)
            self.write_some(nbd)
            nbd.disconnect()
        end = qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
        assert "error" not in end
        assert end["offset"] == end["len"]
        qmp.wait_event("JOB_STATUS_CHANGE", match=lambda event: event["data"]["status"] == "null")
        qmp.execute("blockdev-del", node_name="target")
        return now

    def bitmap(self) -> dict[str, Any]:
        nodes = self.daemon.qmp.execute("query-named-block-nodes", flat=True)
        (bitmap,) = next(node["dirty-bitmaps"] for node in nodes if node["node-name"] == "disk")
        return dict(bitmap)


@pytest.fixture
def vm(tmp_path: Path) -> Vm:
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "disk.qcow2", str(SIZE), cwd=tmp_path)
    return Vm(tmp_path, 1)


def restored(directory: Path, name: str) -> bytes:
    peers.run("qemu-img", "check", "-q", directory / name)
    peers.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", directory / name, directory / "restored")
    return (directory / "restored").read_bytes()


def test_full_and_increments_over_restarts(vm: Vm) -> None:
    with vm.daemon:
        with vm.guest() as nbd:
            vm.content[:] = vm.rnd.randbytes(SIZE)
            nbd.pwrite(0, vm.content)
            nbd.disconnect()
        # The bitmap records from the point in time of the full backup on.
        target = {"driver": "file", "filename": "full.qcow2"}
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", "full.qcow2", str(SIZE), cwd=vm.directory)
        qmp = vm.daemon.qmp
        qmp.execute("blockdev-add", driver="qcow2", node_name="target", file=target)
        full = bytes(vm.content)
        add = {"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": "b", "persistent": True}}
        job = {"job-id": "j", "device": "disk", "target": "target", "sync": "full"}
        qmp.execute("transaction", actions=[add, {"type": "blockdev-backup", "data": job}])
        vm.change()
        assert "error" not in qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
        qmp.wait_event("JOB_STATUS_CHANGE", match=lambda event: event["data"]["status"] == "null")
        qmp.execute("blockdev-del", node_name="target")
        points = [full]
        names = ["full.qcow2"]
        for number in range(1, 4):
            vm.restart()
            assert vm.bitmap()["persistent"] and vm.bitmap()["recording"] and vm.bitmap()["count"]
            vm.change()
            name = f"inc{number}.qcow2"
            options = {"compress": True} if number == 2 else {}
            points.append(vm.backup(name, names[-1], sync="incremental", bitmap="b", **options))
            names.append(name)
        for name, point in zip(names, points, strict=True):
            assert restored(vm.directory, name) == point
        # An increment has what has changed, and not much more.
        assert (vm.directory / "inc1.qcow2").stat().st_size < (vm.directory / "full.qcow2").stat().st_size
    assert restored(vm.directory, "disk.qcow2") == vm.content


def test_a_crash_while_a_backup_runs(vm: Vm) -> None:
    """The disk has all that was flushed, and nobody takes its bitmap for a true record."""
    with vm.daemon:
        vm.change()
        qmp = vm.daemon.qmp
        qmp.execute("block-dirty-bitmap-add", node="disk", name="b", persistent=True)
        vm.restart()
        vm.change()
        qmp = vm.daemon.qmp
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", "t.qcow2", str(SIZE), cwd=vm.directory)
        qmp.execute("blockdev-add", driver="qcow2", node_name="t", file={"driver": "file", "filename": "t.qcow2"})
        with vm.guest() as nbd:
            qmp.execute(
                "blockdev-backup", job_id="j", device="disk", target="t", sync="bitmap", bitmap="b",
                bitmap_mode="on-success", speed=1
            )  # fmt: skip
            vm.write_some(nbd)
            nbd.flush()
            vm.daemon.kill()
        vm.daemon.start()
        vm._open()
        assert vm.bitmap()["inconsistent"]
        with vm.guest() as nbd:
            assert nbd.pread(0, SIZE) == vm.content
            nbd.disconnect()
    peers.run("qemu-img", "check", "-q", vm.directory / "disk.qcow2", ok=(0, 3))
    peers.run("qemu-img", "check", "-q", vm.directory / "t.qcow2", ok=(0, 3))


def test_the_end_of_the_daemon_while_a_backup_runs(vm: Vm) -> None:
    """The bitmap is as if the job had not been, and has what was written meanwhile."""
    with vm.daemon:
        vm.change()
        base = bytes(vm.content)
        vm.daemon.qmp.execute("block-dirty-bitmap-add", node="disk", name="b", persistent=True)
        vm.change()
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", "t.qcow2", str(SIZE), cwd=vm.directory)
        qmp = vm.daemon.qmp
        qmp.execute("blockdev-add", driver="qcow2", node_name="t", file={"driver": "file", "filename": "t.qcow2"})
        job = {"job_id": "j", "device": "disk", "target": "t", "sync": "incremental", "bitmap": "b", "speed": 1}
        qmp.execute("blockdev-backup", **job)
        vm.change()
        vm.restart()
        (vm.directory / "base.raw").write_bytes(base)
        peers.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "base.raw", "full.qcow2", cwd=vm.directory)
        point = vm.backup("inc.qcow2", "full.qcow2", sync="incremental", bitmap="b")
    assert restored(vm.directory, "inc.qcow2") == point
    assert restored(vm.directory, "disk.qcow2") == vm.content
