"""A Linux guest with a vhost-user-blk disk: the drivers that this is for."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support import guest
from tests.support.daemon import DaemonProcess

MIB = 1 << 20
SIZE = 24 * MIB
INIT = Path(__file__).with_name("guest_init.c")
MODULES = ["virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk"]


def content(unit: int) -> bytes:
    """What the guest writes to this MiB."""
    seed = unit + 1
    data = bytearray(MIB)
    for i in range(MIB):
        seed = (seed * 1103515245 + 12345) & 0xFFFFFFFF
        data[i] = seed >> 16 & 0xFF
    return bytes(data)


def test_a_linux_guest_uses_its_disk(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
    guest.initrd(tmp_path / "initrd", INIT, MODULES)
    args = [
        *("--blockdev", f"qcow2,node-name=q,file.driver=file,file.filename={image},discard=unmap"),
        *("--export", "vhost-user-blk,id=e,node-name=q,addr.type=unix,addr.path=vu.sock,writable=on,num-queues=2"),
    ]
    with DaemonProcess("pyqsd", args, workdir=tmp_path):
        told = guest.run(
            tmp_path / "initrd",
            *("-chardev", f"socket,id=c,path={tmp_path / 'vu.sock'}"),
            *("-device", "vhost-user-blk-pci,chardev=c,num-queues=2"),
        )
    assert told == [
        f"size: {SIZE}",
        "serial: vhost_user_blk",
        "cache: write back",
        "discard: 16777216",
        "done",
    ]
    subprocess.run(["qemu-img", "check", "-q", image], check=True)
    raw = tmp_path / "disk.raw"
    subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True)
    found = raw.read_bytes()
    for unit in (0, 1, 11, 23):
        assert found[unit * MIB : (unit + 1) * MIB] == content(unit), unit
    assert found[5 * MIB : 7 * MIB] == bytes(2 * MIB)
