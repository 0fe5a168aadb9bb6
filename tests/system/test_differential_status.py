"""Differential: block status and allocation depth through chains, raw with offsets, and images of different sizes."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.nbd import NbdClient
from tests.system.differential import Context, Do, Session, add, check_session, cmd
from tests.system.test_differential_blockdev import NBD_START, file, null, qcow2

MAKE = """
qemu-img create -q -f raw d0.raw 1000k
qemu-io -f raw -c 'write -P 1 0 100k' -c 'write -P 2 300k 68k' d0.raw
qemu-img create -q -f qcow2 -b d0.raw -F raw d1 1500k
qemu-io -c 'write -P 3 64k 64k' -c 'write -z 192k 64k' -c 'write -P 3 1200k 64k' d1
qemu-img create -q -f qcow2 -o cluster_size=4k -b d1 -F qcow2 d2 700k
qemu-io -c 'write -P 4 0 5k' -c 'write -z 100k 8k' -c 'write -P 5 600k 4k' d2
qemu-img create -q -f qcow2 -o extended_l2=on -b d2 -F qcow2 d3 3M
qemu-io -c 'write -P 6 10k 3k' -c 'write -z 2M 64k' -c 'write -z 130k 4k' -c 'discard 64k 64k' d3
qemu-img create -q -f qcow2 -o cluster_size=2M -b d3 -F qcow2 d4 5M
qemu-io -c 'write -P 7 4M 512' d4
qemu-img create -q -f qcow2 -o preallocation=metadata d5 2M
qemu-io -c 'write -P 8 512k 64k' d5
qemu-img create -q -f qcow2 -o compat=0.10 -b d5 -F qcow2 d6 2M
qemu-io -c 'write -P 9 640k 64k' d6
qemu-img create -q -f qcow2 -b d6 -F qcow2 -o cluster_size=64k d7 1000000
qemu-io -c 'write -c -P 9 0 64k' -c 'write -P 1 983040 512' d7
"""


def make(context: Context) -> None:
    subprocess.run(["sh", "-ec", MAKE], cwd=context.workdir, check=True, stdout=subprocess.DEVNULL)


def exported(node: str) -> dict[str, Any]:
    return cmd("block-export-add", type="nbd", id=f"e-{node}", node_name=node, allocation_depth=True)


def maps(*exports: str) -> list[Do]:
    """The whole maps of the exports in both contexts."""

    def step(export: str, context_name: str) -> Do:
        def run(context: Context) -> Any:
            with NbdClient(context.workdir / "nbd.sock", export, contexts=(context_name,)) as client:
                found = client.block_map(context_name)
                client.disconnect()
            return found

        return Do(f"{export}: {context_name}", run)

    return [step(export, name) for export in exports for name in ("base:allocation", "qemu:allocation-depth")]


SESSIONS = [
    Session(
        "block-status",
        [
            Do("make", make),
            NBD_START,
            *[x for i in (1, 2, 3, 4, 5, 6, 7) for x in (qcow2(f"n{i}", f"d{i}", read_only=True), exported(f"n{i}"))],
            *maps("n1", "n2", "n3", "n4", "n5", "n6", "n7"),
            add(driver="raw", node_name="r1", file="n4", offset=4096, size=1048576),
            exported("r1"),
            add(driver="raw", node_name="r2", file="n3", offset=66048),
            exported("r2"),
            add(driver="raw", node_name="r3", file="r2", offset=512, size=65536 * 3),
            exported("r3"),
            add(driver="raw", node_name="r4", file="n4"),
            exported("r4"),
            add(driver="raw", node_name="r5", read_only=True, file=file("odd.img")),
            exported("r5"),
            *maps("r1", "r2", "r3", "r4", "r5"),
            null("z", size=1 << 20, read_zeroes=True),
            null("y", size=600 * 1024),
            exported("z"),
            exported("y"),
            add(driver="qcow2", node_name="onz", file=file("c4k.qcow2"), backing="z", read_only=True),
            exported("onz"),
            add(driver="qcow2", node_name="ony", file=file("plain.qcow2"), backing="y", read_only=True),
            exported("ony"),
            add(driver="qcow2", node_name="onr", file=file("rb1.qcow2"), backing="r3", read_only=True),
            exported("onr"),
            add(driver="qcow2", node_name="onraw", file=file("c2m.qcow2"), backing="r4", read_only=True),
            exported("onraw"),
            add(driver="qcow2", node_name="onodd", file=file("rb64.qcow2"), backing="r5", read_only=True),
            exported("onodd"),
            *maps("z", "y", "onz", "ony", "onr", "onraw", "onodd"),
        ],
        images=("odd.img", "c4k.qcow2", "plain.qcow2", "rb1.qcow2", "c2m.qcow2", "rb64.qcow2"),
    ),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, image_set: Path, tmp_path: Path) -> None:
    check_session(session, image_set, tmp_path)
