"""vhost-user-blk exports over QMP: the same session to qemu-storage-daemon and to ours, the same replies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.exports.vhost_user.conftest import MIB
from tests.support.daemon import DaemonProcess


def session(kind: str, workdir: Path) -> list[Any]:
    workdir.mkdir()
    with (workdir / "disk.raw").open("wb") as image:
        image.truncate(MIB)
    told: list[Any] = []
    with DaemonProcess(kind, workdir=workdir) as daemon:

        def do(command: str, **arguments: Any) -> None:
            members = {name.replace("_", "-"): value for name, value in arguments.items()}
            reply = daemon.qmp.raw_command({"execute": command, "arguments": members})
            told.append((command, members, json.dumps(reply, sort_keys=True)))

        def add(id: str = "e", node: str = "disk", **options: Any) -> None:
            do("block-export-add", type="vhost-user-blk", id=id, node_name=node, **options)

        unix = {"type": "unix", "path": "a.sock"}
        do("blockdev-add", driver="file", node_name="disk", filename="disk.raw")
        do("blockdev-add", driver="file", node_name="ro", filename="disk.raw", read_only=True)
        add()
        add(addr={"type": "inet", "host": "127.0.0.1", "port": "0"})
        add(addr={"type": "vsock", "cid": "1", "port": "2"})
        add(addr={"type": "nosuch"})
        add(addr={"type": "unix"})
        add(addr={"type": "fd", "str": "5"})
        add(addr={"type": "unix", "path": "/nonexistent/a.sock"})
        add(addr=unix, num_queues=0)
        add(addr=unix, num_queues=65536)
        add(addr=unix, num_queues="1")
        for size in (1, 511, 513, 1536, 4 << 20, 1 << 40, -1):
            add(addr=unix, logical_block_size=size)
        add(addr=unix, nosuch=1)
        add(node="nosuch", addr=unix)
        add(node="ro", addr=unix, writable=True)
        add(addr=unix, iothread="nosuch")
        add(id="1", addr=unix)
        do("query-block-exports")
        told.append(sorted(path.name for path in workdir.iterdir() if path.name.endswith(".sock")))
        for options in ({}, {"num_queues": 16}, {"logical_block_size": 4096, "writable": True}, {"writethrough": True}):
            add(addr=unix, **options)
            do("query-block-exports")
            add(addr=unix)
            do("blockdev-del", node_name="disk")
            do("x-debug-query-block-graph")
            # Others may resize the node; QSD 10.0.2 does not survive that here.
            if kind == "pyqsd":
                assert daemon.qmp.execute("block_resize", node_name="disk", size=2 * MIB) == {}
            do("block-export-del", id="e")
            do("block-export-del", id="e")
            told.append([event["event"] for event in daemon.qmp.events if event["event"] == "BLOCK_EXPORT_DELETED"])
        add(node="ro", addr=unix)
        # A socket that is there already is replaced.
        add(id="f", addr=unix)
        do("query-block-exports")
        do("block-export-del", id="f", mode="hard")
        do("block-export-del", id="e", mode="hard")
    told.append(sorted(path.name for path in workdir.iterdir() if path.name.endswith(".sock")))
    return told


def test_the_same_replies_as_qsd(tmp_path: Path) -> None:
    theirs, ours = session("qsd", tmp_path / "qsd"), session("pyqsd", tmp_path / "pyqsd")
    for their, our in zip(theirs, ours, strict=True):
        assert our == their
