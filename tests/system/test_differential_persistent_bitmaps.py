"""Differential: dirty bitmaps that are stored in the image, over restarts, and of images that the other one made."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.daemon import DaemonProcess
from tests.support.nbd import NbdClient
from tests.system.differential import Context, Do, Session, add, check_session, cmd, delete
from tests.system.test_differential_bitmaps import MERGE, NBD_START, bitmap, dirty, export, sha, without_export, write


def stored(name: str) -> Do:
    """What qemu-img finds in the image."""

    def run(context: Context) -> Any:
        info = json.loads(images.peers.run("qemu-img", "info", "-U", "--output=json", name, cwd=context.workdir).stdout)
        return info["format-specific"]["data"].get("bitmaps")

    return Do(f"stored in {name}", run)


def tool(*argv: str) -> Do:
    return Do(" ".join(argv), lambda context: images.peers.run(*argv, cwd=context.workdir, ok=()).stdout)


def make(name: str, size: str = "8M", *bitmaps: str, options: str = "") -> Do:
    """An image; `bitmaps` are arguments of ``qemu-img bitmap --add``."""

    def run(context: Context) -> None:
        path = images.create(context.workdir / name, size, options=options)
        for one in bitmaps:
            images.peers.run("qemu-img", "bitmap", "--add", *one.split()[:-1], path, one.split()[-1])

    return Do(f"make {name}", run)


def shown(context: Context) -> Any:
    nodes = context.daemon.qmp.execute("query-named-block-nodes", flat=True)
    return {
        node["node-name"]: (
            node.get("dirty-bitmaps"),
            node["image"].get("format-specific", {}).get("data", {}).get("bitmaps"),
        )
        for node in nodes
        if not node["node-name"].startswith("#")
    }


SHOWN = Do("shown", shown)


def qcow2(name: str, file: str = "a.qcow2", **more: Any) -> dict[str, Any]:
    return add(driver="qcow2", node_name=name, file={"driver": "file", "filename": file}, **more)


def reopen(name: str, file: str = "a.qcow2", **more: Any) -> dict[str, Any]:
    options = {"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": file}}
    return cmd("blockdev-reopen", options=[options | {key.replace("_", "-"): value for key, value in more.items()}])


WRITES = write("e", lambda c: c.pwrite(99999, b"x"), lambda c: c.pwrite(4 << 20, b"y" * 70000), lambda c: c.zero(0, 1))
#: A table of bitmaps, each broken in one way: (offset in the first entry, or None for its table; bytes).
BROKEN: dict[str, tuple[int | None, bytes]] = {
    "same name": (32 + 24, b"x"),
    "reserved bits": (None, struct.pack(">Q", 2)),
    "ones": (None, struct.pack(">Q", 1)),
    "ones with a cluster": (None, struct.pack(">Q", 65537)),
    "a cluster out of line": (None, struct.pack(">Q", 512)),
    "beyond the end": (None, struct.pack(">Q", 1 << 40)),
    "entries": (8, struct.pack(">I", 2)),
    "no entries": (8, struct.pack(">I", 0)),
    "many entries": (8, struct.pack(">I", 1 << 31)),
    "type": (16, b"\2"),
    "flags": (15, b"\4"),
    "granularity": (17, b"\x08"),
    "larger granularity": (17, b"\x11"),
    "extra data": (20, struct.pack(">I", 8)),
    "name size": (18, struct.pack(">H", 0)),
    "long name": (18, struct.pack(">H", 4000)),
    "in use": (15, b"\3"),
    "not text": (24, b"\xff"),
}


def broken(what: str) -> Do:
    def run(context: Context) -> None:
        source, path = context.workdir / "a.qcow2", context.workdir / "broken.qcow2"
        data = bytearray(source.read_bytes())
        at = data.index(b"\x23\x85\x28\x75") + 24
        directory = int.from_bytes(data[at : at + 8], "big")
        where, content = BROKEN[what]
        place = int.from_bytes(data[directory : directory + 8], "big") if where is None else directory + where
        data[place : place + len(content)] = content
        path.write_bytes(data)

    return Do(f"broken: {what}", run)


SESSIONS = [
    Session(
        "persistent-life",
        [
            make("a.qcow2", "8M", "x", "-g 512 --disable y"),
            qcow2("n"),
            SHOWN,
            stored("a.qcow2"),
            bitmap("add", "z", persistent=True, granularity=4096),
            bitmap("add", "z", persistent=True),
            bitmap("add", "", persistent=True),
            bitmap("add", "n" * 1024, persistent=True),
            bitmap("add", "n" * 1023, persistent=True),
            bitmap("remove", "n" * 1023),
            bitmap("add", "large", persistent=True, granularity=1 << 31),
            bitmap("add", "memory"),
            NBD_START,
            export("e", "n", writable=True, bitmaps=["x", "z", "memory"]),
            WRITES,
            dirty("e", "x"),
            dirty("e", "z"),
            bitmap("remove", "x"),
            without_export("e"),
            SHOWN,
            stored("a.qcow2"),
            bitmap("disable", "z"),
            bitmap("enable", "y"),
            cmd(MERGE, node="n", target="y", bitmaps=["x"]),
            bitmap("remove", "x"),
            stored("a.qcow2"),
            cmd("block_resize", node_name="n", size=16 << 20),
            cmd("block_resize", node_name="n", size=8 << 20),
            *(sha(name) for name in ("y", "z", "large", "memory")),
            reopen("n", read_only=True),
            SHOWN,
            stored("a.qcow2"),
            *(bitmap(action, "z") for action in ("clear", "enable", "disable", "remove")),
            cmd(MERGE, node="n", target="z", bitmaps=["y"]),
            bitmap("add", "more", persistent=True),
            export("e", "n", bitmaps=["y", "z"]),
            dirty("e", "y"),
            dirty("e", "z"),
            without_export("e"),
            reopen("n"),
            SHOWN,
            stored("a.qcow2"),
            *(bitmap(action, "z") for action in ("enable", "disable")),
            delete("n"),
            stored("a.qcow2"),
            tool("qemu-img", "check", "a.qcow2"),
            qcow2("n", read_only=True),
            SHOWN,
            *(sha(name) for name in ("y", "z", "large", "more")),
            export("e", "n", bitmaps=["y"]),
            dirty("e", "y"),
        ],
    ),
    Session(
        "persistent-limits",
        [
            make("v2.qcow2", options="compat=0.10"),
            make("big.qcow2", "16T"),
            qcow2("v2", "v2.qcow2"),
            qcow2("big", "big.qcow2"),
            add(driver="raw", node_name="above", file="big"),
            add(driver="null-co", node_name="null"),
            *(bitmap("add", "b", node, persistent=True) for node in ("v2", "above", "null")),
            *(
                bitmap("add", f"b{granularity}", "big", persistent=True, granularity=granularity)
                for granularity in (512, 4096, 32768)
            ),
            SHOWN,
        ],
    ),
    Session(
        "persistent-inconsistent",
        [
            make("a.qcow2", "8M", "x", "-g 512 --disable y", "z"),
            Do("in use", lambda context: _in_use(context.workdir / "a.qcow2")),
            qcow2("n", read_only=True),
            SHOWN,
            *(bitmap(action, "x") for action in ("clear", "enable", "disable", "remove")),
            delete("n"),
            qcow2("n"),
            SHOWN,
            *(bitmap(action, "x") for action in ("clear", "enable", "disable")),
            cmd(MERGE, node="n", target="x", bitmaps=["y"]),
            cmd(MERGE, node="n", target="z", bitmaps=["y"]),
            sha("x"),
            bitmap("add", "x", persistent=True),
            cmd("block_resize", node_name="n", size=16 << 20),
            NBD_START,
            export("e", "n", bitmaps=["x"]),
            bitmap("add", "new", persistent=True),
            reopen("n", read_only=True),
            SHOWN,
            bitmap("remove", "y"),
            reopen("n"),
            bitmap("remove", "y"),
            stored("a.qcow2"),
            bitmap("remove", "x"),
            bitmap("remove", "z"),
            SHOWN,
            cmd("block_resize", node_name="n", size=16 << 20),
            delete("n"),
            stored("a.qcow2"),
            tool("qemu-img", "check", "a.qcow2"),
        ],
    ),
    Session(
        "persistent-active",
        [
            make("a.qcow2", "8M", "x", "y"),
            qcow2("n"),
            bitmap("add", "z", persistent=True),
            bitmap("add", "memory"),
            cmd("blockdev-set-active", node_name="n", active=False),
            SHOWN,
            stored("a.qcow2"),
            cmd("blockdev-snapshot-internal-sync", device="n", name="s"),
            bitmap("add", "x", persistent=True),
            bitmap("add", "x"),
            cmd("blockdev-set-active", node_name="n", active=True),
            bitmap("remove", "x"),
            cmd("blockdev-set-active", node_name="n", active=True),
        ],
    ),
    *(
        Session(
            f"persistent-broken-{mode}",
            [
                make("a.qcow2", "8M", "x", "y", "z"),
                *(
                    step
                    for what in BROKEN
                    for step in (
                        broken(what),
                        qcow2("n", "broken.qcow2", read_only=mode == "ro"),
                        SHOWN,
                        delete("n"),
                    )
                ),
            ],
        )
        for mode in ("ro", "rw")
    ),
]


def test_an_inactive_image_is_left_alone(tmp_path: Path) -> None:
    """It is somebody else's. (QSD removes the bitmap, and dies of the snapshot.)"""
    path = images.create(tmp_path / "a.qcow2", "8M")
    images.peers.run("qemu-img", "bitmap", "--add", path, "x")
    images.peers.run("qemu-img", "snapshot", "-c", "s", path)
    with DaemonProcess("pyqsd", [], workdir=tmp_path) as daemon:
        qmp = daemon.qmp
        qmp.execute("blockdev-add", driver="qcow2", node_name="n", file={"driver": "file", "filename": str(path)})
        qmp.execute("blockdev-set-active", node_name="n", active=False)
        before = path.read_bytes()
        refused = qmp.command("blockdev-snapshot-delete-internal-sync", device="n", name="s")
        assert refused["error"]["desc"] == "Failed to remove snapshot from snapshot list: Operation not permitted"
        qmp.execute("block-dirty-bitmap-add", node="n", name="x", persistent=True)
        qmp.execute("block-dirty-bitmap-remove", node="n", name="x")
        assert path.read_bytes() == before
        qmp.execute("blockdev-set-active", node_name="n", active=True)
        digest = qmp.execute("x-debug-block-dirty-bitmap-sha256", node="n", name="x")
        assert digest["sha256"]


@pytest.mark.parametrize("kinds", [("qsd", "pyqsd"), ("pyqsd", "qsd"), ("pyqsd", "pyqsd")], ids="-".join)
def test_killed(tmp_path: Path, kinds: tuple[str, str]) -> None:
    """Whoever finds the bitmaps of a daemon that was killed says that they are inconsistent."""
    path = images.create(tmp_path / "a.qcow2", "8M")
    images.peers.run("qemu-img", "bitmap", "--add", path, "x")
    node = {"driver": "qcow2", "node_name": "n", "file": {"driver": "file", "filename": str(path)}}
    (tmp_path / "one").mkdir()
    with DaemonProcess(kinds[0], [], workdir=tmp_path / "one") as daemon:
        daemon.qmp.execute("blockdev-add", **node)
        daemon.qmp.execute("block-dirty-bitmap-add", node="n", name="y", persistent=True)
        daemon.kill()
    images.assert_clean(path)
    (tmp_path / "two").mkdir()
    with DaemonProcess(kinds[1], [], workdir=tmp_path / "two") as daemon:
        daemon.qmp.execute("blockdev-add", **node)
        (found,) = daemon.qmp.execute("query-named-block-nodes", flat=True)[0]["dirty-bitmaps"]
        assert found["name"] == "x" and found["inconsistent"] and found["persistent"] and not found["recording"]
        daemon.qmp.execute("block-dirty-bitmap-remove", node="n", name="x")
        assert daemon.terminate() == 0
    images.assert_clean(path)


def _in_use(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.index(b"\x23\x85\x28\x75") + 24
    directory = int.from_bytes(data[at : at + 8], "big")
    for entry in (0, 32, 64):
        data[directory + entry + 15] |= 1
    path.write_bytes(data)


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, tmp_path: Path) -> None:
    check_session(session, tmp_path, tmp_path)


@pytest.mark.parametrize("options", ["", "cluster_size=4k", "extended_l2=on"])
def test_over_each_other(tmp_path: Path, options: str) -> None:
    """The two take turns on one image, and find what the other one stored."""
    path = images.create(tmp_path / "a.qcow2", "1G", options=options)
    expected: dict[str, str] = {}

    def turn(kind: str, number: int) -> None:
        workdir = tmp_path / f"turn{number}"
        workdir.mkdir()
        with DaemonProcess(kind, [], workdir=workdir) as daemon:
            qmp = daemon.qmp
            qmp.execute("blockdev-add", driver="qcow2", node_name="n", file={"driver": "file", "filename": str(path)})
            for name, digest in expected.items():
                found = qmp.execute("x-debug-block-dirty-bitmap-sha256", node="n", name=name)
                assert found["sha256"] == digest, (kind, name)
            for granularity in (512, 65536):
                qmp.execute(
                    "block-dirty-bitmap-add",
                    node="n",
                    name=f"{kind}{number}-{granularity}",
                    persistent=True,
                    granularity=granularity,
                )
            qmp.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(workdir / "nbd.sock")}})
            qmp.execute("block-export-add", type="nbd", id="e", name="e", node_name="n", writable=True)
            with NbdClient(workdir / "nbd.sock", "e") as client:
                client.pwrite(number * 50_000_000, b"x" * 1_000_000)
                client.zero(number << 20, 1 << 20)
                client.pwrite(number * 512 + 700_000_000, b"y" * 512)
                client.disconnect()
            qmp.execute("block-export-del", id="e", mode="hard")
            qmp.wait_event("BLOCK_EXPORT_DELETED")
            nodes = qmp.execute("query-named-block-nodes", flat=True)
            names = [one["name"] for node in nodes if node["node-name"] == "n" for one in node["dirty-bitmaps"]]
            expected.clear()
            for name in names:
                expected[name] = qmp.execute("x-debug-block-dirty-bitmap-sha256", node="n", name=name)["sha256"]
            assert daemon.terminate() == 0
        images.assert_clean(path)
        shutil.rmtree(workdir)

    for number, kind in enumerate(("qsd", "pyqsd", "qsd", "pyqsd", "pyqsd", "qsd")):
        turn(kind, number)
    assert len(expected) == 12
