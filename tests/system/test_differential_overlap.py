"""Differential: `overlap-check`. A guest cluster whose L2 entry refers to a table of the image is written to, for every
kind of table and every set of checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import images, nbd, peers
from tests.support.images import KiB
from tests.support.nbd import NbdClient
from tests.system.differential import Context, Do, Event, Session, check_session, cmd, delete
from tests.system.test_differential_blockdev import NBD_START, export, qcow2

CLUSTER = 4 * KiB
#: The guest cluster whose entry is bent.
VICTIM = 5

FLAGS = (
    "main-header",
    "active-l1",
    "active-l2",
    "refcount-table",
    "refcount-block",
    "snapshot-table",
    "inactive-l1",
    "inactive-l2",
    "bitmap-directory",
)
#: Name → value of the option.
CHECKS: dict[str, Any] = {
    "default": None,
    "none": "none",
    "constant": "constant",
    "cached": "cached",
    "all": "all",
    **{f"only-{flag}": {"template": "none", flag: True} for flag in FLAGS},
    **{f"without-{flag}": {"template": "all", flag: False} for flag in FLAGS},
}


def number(image: bytes | bytearray, offset: int, size: int = 8) -> int:
    return int.from_bytes(image[offset : offset + size], "big")


def tables(image: bytes) -> dict[str, int]:
    """Where a table of each kind is (QEMU docs/interop/qcow2)."""
    mask = 0x00FFFFFFFFFFFE00
    snapshots = number(image, 64)
    found = {
        "active-l1": number(image, 40),
        "refcount-table": number(image, 48),
        "snapshot-table": snapshots,
        "inactive-l1": number(image, snapshots),
    }
    found["active-l2"] = number(image, found["active-l1"]) & mask
    found["inactive-l2"] = number(image, found["inactive-l1"]) & mask
    found["refcount-block"] = number(image, found["refcount-table"])
    at = number(image, 100, 4)
    while kind := number(image, at, 4):
        length = number(image, at + 4, 4)
        if kind == 0x23852875:
            found["bitmap-directory"] = number(image, at + 8 + 16)
        at += 8 + (length + 7 & ~7)
    return found


@pytest.fixture(scope="module")
def bent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image for each kind of table, called after it."""
    root = tmp_path_factory.mktemp("overlap")
    path = images.create(root / "whole", 1 << 20, options=f"cluster_size={CLUSTER}")
    images.io(path, "write -P 1 0 64k")
    peers.run("qemu-img", "snapshot", "-c", "one", path)
    images.io(path, "write -P 2 0 32k")
    peers.run("qemu-img", "bitmap", "--add", path, "map")
    whole = path.read_bytes()
    found = tables(whole)
    assert len(set(found.values())) == len(found) == len(FLAGS) - 1
    for name, target in found.items():
        image = bytearray(whole)
        at = found["active-l2"] + VICTIM * 8
        image[at : at + 8] = (target | 1 << 63).to_bytes(8, "big")
        (root / name).write_bytes(image)
    # Offset 0 in an entry is no cluster; but the first one is taken for a new cluster when its refcount is 0.
    image = bytearray(whole)
    image[found["refcount-block"] : found["refcount-block"] + 2] = bytes(2)
    (root / "main-header").write_bytes(image)
    return root


def write(name: str, offset: int) -> Do:
    def action(context: Context) -> Any:
        with NbdClient(context.workdir / "nbd.sock", name) as client:
            client.send(nbd.CMD_WRITE, offset, CLUSTER, 0, b"\x99" * CLUSTER)
            return client.receive().error

    return Do(f"write to {name}", action)


def marked(name: str) -> Do:
    """Whether the image is marked as corrupt, and how much was written."""

    def action(context: Context) -> Any:
        image = (context.workdir / name).read_bytes()
        # A refcount block that was overwritten may be written again from the cache.
        return [image[79] & 2, "refcount-block" in name or image.count(b"\x99" * CLUSTER)]

    return Do(f"what is in {name}", action)


@pytest.mark.parametrize("table", FLAGS)
def test_overlap(table: str, bent: Path, tmp_path: Path) -> None:
    steps: list[Any] = [NBD_START]
    names = []
    for check, value in CHECKS.items():
        if table == "main-header" and check not in ("default", "only-main-header", "all"):
            # Without its check QSD overwrites the header, which pyqsd never does.
            continue
        name = f"{check}-{table}"
        (bent / name).write_bytes((bent / table).read_bytes())
        names.append(name)
        options = {} if value is None else {"overlap_check": value}
        offset = 512 * KiB if table == "main-header" else VICTIM * CLUSTER
        node = f"n{len(names)}"
        steps += [qcow2(node, name, **options), export(f"e{len(names)}", node, writable=True)]
        steps += [write(node, offset), cmd("block-export-del", id=f"e{len(names)}", mode="hard")]
        steps += [Event("BLOCK_EXPORT_DELETED"), delete(node), marked(name)]
    check_session(Session(f"overlap-{table}", steps, images=tuple(names)), bent, tmp_path)
