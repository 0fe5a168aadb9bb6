"""Differential: internal snapshots."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.daemon import DaemonProcess
from tests.support.nbd import NbdClient
from tests.system.differential import Context, Do, Session, add, check_session, cmd, delete

TAKE = "blockdev-snapshot-internal-sync"
DELETE = "blockdev-snapshot-delete-internal-sync"
CREATE = ("qemu-img", "create", "-q", "-f", "qcow2", "-o")
TIMES = ("date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec")


def make(name: str, *commands: str, options: str = "", size: str = "1M", fmt: str = "qcow2") -> Do:
    def run(context: Context) -> None:
        path = images.create(context.workdir / name, size, fmt, options)
        if commands:
            images.io(path, *commands, fmt=fmt)

    return Do(f"make {name}", run)


def file(name: str) -> dict[str, Any]:
    return {"driver": "file", "filename": f"{name}.qcow2"}


def tool(*argv: str) -> Do:
    def run(context: Context) -> str:
        return images.peers.run(*argv, cwd=context.workdir, ok=()).stdout

    return Do(" ".join(argv), run)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def gone(**arguments: Any) -> Do:
    """Delete a snapshot; its times are not the same."""
    return Do(
        f"delete {arguments}", lambda context: without_times(context.daemon.qmp.raw_command(cmd(DELETE, **arguments)))
    )


def shown(context: Context) -> Any:
    nodes = context.daemon.qmp.execute("query-named-block-nodes", flat=True)
    return {
        node["node-name"]: without_times(node["image"].get("snapshots"))
        for node in nodes
        if not node["node-name"].startswith("#")
    }


LIST = Do("list", shown)


def qcow2(name: str, **more: Any) -> dict[str, Any]:
    return add(driver="qcow2", node_name=name, file={"driver": "file", "filename": f"{name}.qcow2"}, **more)


SESSIONS = [
    Session(
        "snapshots-life",
        [
            make("a.qcow2", "write -P 1 0 512k", "write -c -P 2 512k 64k"),
            tool("qemu-img", "snapshot", "-c", "theirs", "a.qcow2"),
            qcow2("a"),
            cmd(TAKE, device="a", name=""),
            cmd(TAKE, device="a", name="theirs"),
            cmd(TAKE, device="a", name="one"),
            cmd(TAKE, device="a", name="one"),
            cmd(TAKE, device="a", name="1"),
            cmd(TAKE, device="a", name="x" * 300),
            cmd(TAKE, device="a", name="é" * 200),
            cmd(TAKE, device="a"),
            cmd(TAKE, name="a"),
            cmd(TAKE, device=1, name="a"),
            LIST,
            gone(device="a"),
            gone(device="a", id=""),
            gone(device="a", name=""),
            gone(device="a", id="", name=""),
            gone(device="a", id="99", name="1"),
            gone(device="a", id="3", name="one"),
            gone(device="a", id="2", name="one"),
            gone(device="a", id="2"),
            gone(device="a", name="x" * 255),
            gone(device="a", name="theirs"),
            LIST,
            cmd(TAKE, device="a", name="again"),
            LIST,
            delete("a"),
            tool("qemu-img", "check", "a.qcow2"),
            qcow2("a", read_only=True),
            cmd(TAKE, device="a", name="x"),
            gone(device="a", name="nothing"),
            LIST,
            # QSD does not list it any more after this, though it is there.
            gone(device="a", name="again"),
        ],
    ),
    Session(
        # The data file has no counts.
        "snapshots-data-file",
        [
            tool(*CREATE, "data_file=a.raw", "a.qcow2", "1M"),
            tool(*CREATE, "data_file=b.raw,data_file_raw=on", "b.qcow2", "1M"),
            tool(*CREATE, "data_file=c.raw,extended_l2=on", "c.qcow2", "1M"),
            tool("qemu-io", "-c", "write -q -P 1 0 512k", "a.qcow2"),
            *(
                step
                for name in ("a", "b", "c")
                for step in (
                    qcow2(name),
                    cmd(TAKE, device=name, name="s"),
                    cmd(TAKE, device=name, name=""),
                    cmd(TAKE, device=name, name="s" * 300),
                    gone(device=name, name="s"),
                    gone(device=name, id="1"),
                    gone(device=name),
                    LIST,
                    delete(name),
                    tool("qemu-img", "check", f"{name}.qcow2"),
                    qcow2(name, read_only=True),
                    cmd(TAKE, device=name, name="s"),
                    gone(device=name, name="s"),
                    delete(name),
                )
            ),
            # Through a filter, and as the file of another node.
            add(driver="copy-on-read", node_name="over", file={"driver": "qcow2", "file": file("a"), "node-name": "q"}),
            cmd(TAKE, device="over", name="s"),
            cmd(TAKE, device="q", name="s"),
            gone(device="over", name="s"),
        ],
    ),
    Session(
        "snapshots-nodes",
        [
            make("a.qcow2"),
            make("b.qcow2"),
            make("c.qcow2"),
            make("one.qcow2", "write 0 64k", options="refcount_bits=1"),
            make("zero.qcow2", size="0"),
            make("raw.img", fmt="raw"),
            qcow2("a"),
            qcow2("one"),
            qcow2("zero"),
            add(driver="raw", node_name="r", file={"driver": "file", "filename": "raw.img", "node-name": "f"}),
            add(driver="raw", node_name="ro", read_only=True, file={"driver": "file", "filename": "b.qcow2"}),
            add(
                driver="raw",
                node_name="over",
                file={"driver": "qcow2", "file": {"driver": "file", "filename": "c.qcow2"}},
            ),
            add(driver="null-co", node_name="null"),
            *(
                step
                for node in ("a", "one", "zero", "r", "f", "ro", "over", "null", "nosuch", "")
                for step in (
                    cmd(TAKE, device=node, name=""),
                    cmd(TAKE, device=node, name="s"),
                    cmd(TAKE, device=node, name="s"),
                )
            ),
            LIST,
            *(
                gone(device=node, name="s", **more)
                for node in ("a", "one", "zero", "r", "f", "ro", "over", "null", "nosuch", "")
                for more in ({}, {"id": "1"})
            ),
            LIST,
        ],
    ),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, tmp_path: Path) -> None:
    check_session(session, tmp_path, tmp_path)


def test_a_snapshot_is_a_point_in_time(tmp_path: Path) -> None:
    """While a client writes one block after the other, a snapshot has all up to one of them, and none after it."""
    block, most = 4096, 1500
    path = images.create(tmp_path / "disk.qcow2", "16M", options="cluster_size=16k")
    written = 0
    with DaemonProcess("pyqsd", [], workdir=tmp_path) as daemon:
        qmp = daemon.qmp
        qmp.execute("blockdev-add", driver="qcow2", node_name="n", file={"driver": "file", "filename": str(path)})
        qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "nbd.sock")}})
        qmp.execute("block-export-add", type="nbd", id="e", name="e", node_name="n", writable=True)
        ready = threading.Event()

        def writer() -> None:
            nonlocal written
            with NbdClient(tmp_path / "nbd.sock", "e") as client:
                for number in range(most):
                    client.pwrite(number * block, (number + 1).to_bytes(4, "big") * (block // 4))
                    written = number + 1
                    if number == 20:
                        ready.set()
                client.disconnect()

        thread = threading.Thread(target=writer)
        thread.start()
        assert ready.wait(30)
        bounds = []
        for number in range(6):
            before = written
            qmp.execute(TAKE, device="n", name=f"s{number}")
            bounds.append((before, written + 1))
            if number == 3:
                qmp.execute(DELETE, device="n", name="s1")
        thread.join(60)
        assert written == most
        assert daemon.terminate() == 0
    images.assert_clean(path)
    for number, (least, largest) in enumerate(bounds):
        if number == 1:
            continue
        name = f"snapshot.name=s{number}"
        images.peers.run("qemu-img", "convert", "-l", name, "-f", "qcow2", "-O", "raw", path, tmp_path / "raw")
        content = (tmp_path / "raw").read_bytes()
        end = 0
        while content[end * block : (end + 1) * block] == (end + 1).to_bytes(4, "big") * (block // 4):
            end += 1
        assert least <= end <= largest, number
        assert not any(content[end * block :])
