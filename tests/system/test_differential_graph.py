"""Differential: commands that change the graph (snapshots, set-active, x-blockdev-change, change-backing-file)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import images, peers
from tests.support.nbd import NbdClient, NbdError
from tests.system.differential import Context, Do, Event, Session, add, check_session, cmd, delete
from tests.system.test_differential_blockdev import NBD_START, export, file, null, qcow2, raw

GRAPH = cmd("x-debug-query-block-graph")


def nodes(context: Context) -> Any:
    """All nodes, but for how large image files are: that depends on when tables are written."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            left_out = {"actual-size", "virtual-size"} if value.get("format") == "file" else {"actual-size"}
            return {key: strip(item) for key, item in value.items() if key not in left_out}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return strip(context.daemon.qmp.execute("query-named-block-nodes", flat=True))


NODES = Do("nodes", nodes)
SHOW = (GRAPH, NODES)


def snap(node: str, overlay: str) -> dict[str, Any]:
    return cmd("blockdev-snapshot", node=node, overlay=overlay)


def sync(**arguments: Any) -> dict[str, Any]:
    return cmd("blockdev-snapshot-sync", **arguments)


def change(**arguments: Any) -> dict[str, Any]:
    return cmd("x-blockdev-change", **arguments)


def rename(device: str, node: str, name: str) -> dict[str, Any]:
    return cmd("change-backing-file", device=device, image_node_name=node, backing_file=name)


def active(state: bool, node: str | None = None) -> dict[str, Any]:
    return cmd("blockdev-set-active", active=state, **({} if node is None else {"node_name": node}))


def reopen(*options: dict[str, Any]) -> dict[str, Any]:
    return cmd("blockdev-reopen", options=list(options))


def connect(label: str, name: str) -> Do:
    """A connection that stays open."""

    def run(context: Context) -> Any:
        context.keep[label] = NbdClient(context.workdir / "nbd.sock", name)
        return context.keep[label].size

    return Do(f"connect {label}", run)


def use(label: str, what: str, action: Any) -> Do:
    def run(context: Context) -> Any:
        try:
            return action(context.keep[label])
        except NbdError as exc:
            return str(exc)

    return Do(f"{label}: {what}", run)


def once(name: str, what: str, action: Any) -> Do:
    def run(context: Context) -> Any:
        with NbdClient(context.workdir / "nbd.sock", name) as client:
            try:
                result = action(client)
            except NbdError as exc:
                result = str(exc)
            client.disconnect()
        return result

    return Do(f"{name}: {what}", run)


def write(fill: bytes, offset: int = 0) -> Any:
    return lambda client: client.pwrite(offset, fill * 512)


def read(offset: int = 0, length: int = 512) -> Any:
    return lambda client: client.pread(offset, length).hex()


def overwrite(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)


def make_bitmaps(context: Context) -> None:
    path = context.workdir / "bitmaps.qcow2"
    images.create(path, 4 << 20)
    for options in (("b0",), ("--disable", "b1")):
        peers.run("qemu-img", "bitmap", "--add", *options[:-1], path, options[-1])
    images.io(path, "write -P 1 0 200k")


def make_data_file(context: Context) -> None:
    path = context.workdir / "names.qcow2"
    images.create(path, 4 << 20, "qcow2", "data_file=data.raw", cwd=context.workdir)
    images.io(path, "write -P 5 0 128k", cwd=context.workdir)


SESSIONS = [
    Session(
        "x-blockdev-change",
        [
            change(),
            change(parent="nosuch"),
            raw("r"),
            null("n"),
            qcow2("q", "top.qcow2"),
            change(parent="r"),
            change(parent="r", child="file"),
            change(parent="r", child="nosuch"),
            change(parent="r", node="n"),
            change(parent="r", node="nosuch"),
            change(parent="r", node=""),
            change(parent="r", child="file", node="n"),
            change(parent="r", child="nosuch", node="nosuch"),
            change(parent="q", child="backing"),
            change(parent="q", child="file"),
            change(parent="q", node="n"),
            change(parent="n", node="r"),
            change(parent="n", child="x"),
            *SHOW,
        ],
        images=("raw.img", "base.qcow2", "mid.qcow2", "top.qcow2"),
    ),
    Session(
        "change-backing-file",
        [
            cmd("change-backing-file"),
            rename("nosuch", "nosuch", "x"),
            raw("r"),
            null("n"),
            qcow2("top", "top.qcow2"),
            qcow2("p", "plain.qcow2"),
            rename("top", "nosuch", "x"),
            rename("r", "r", "x"),
            rename("p", "p", "x"),
            rename("p", "top", "x"),
            rename("top", "p", "x"),
            rename("n", "n", "x"),
            rename("top", "top", ""),
            NODES,
            rename("top", "top", "x" * 1023),
            NODES,
            rename("top", "top", "json:{}"),
            NODES,
            rename("top", "top", "./mid.qcow2"),
            NODES,
            rename("top", "top", "mid.qcow2"),
            *SHOW,
            qcow2("ro", "mid.qcow2", read_only=True),
            rename("ro", "ro", "base.qcow2"),
            NBD_START,
            export("e", "top", writable=True),
            once("top", "write", write(b"x")),
            rename("top", "top", "raw.img"),
            once("top", "read", read(0, 1024)),
            NODES,
        ],
        images=("raw.img", "plain.qcow2", "base.qcow2", "mid.qcow2", "top.qcow2"),
    ),
    Session(
        "change-backing-file-below",
        [
            add(driver="qcow2", node_name="b", file=file("base.qcow2"), read_only=True),
            add(driver="qcow2", node_name="m", file=file("mid.qcow2"), read_only=True, backing="b"),
            add(driver="qcow2", node_name="t", file=file("top.qcow2"), backing="m"),
            rename("t", "m", "/abs/base.qcow2"),
            *SHOW,
            rename("t", "t", "/abs/base.qcow2"),
            *SHOW,
            rename("t", "b", "x"),
            rename("m", "m", "x"),
            Do("info", lambda c: images.info(c.workdir / "mid.qcow2")["backing-filename"]),
        ],
        images=("base.qcow2", "mid.qcow2", "top.qcow2"),
    ),
    Session(
        "snapshot",
        [
            cmd("blockdev-snapshot"),
            snap("a", "b"),
            qcow2("b", "base.qcow2"),
            snap("b", "nosuch"),
            snap("b", "b"),
            add(driver="qcow2", node_name="o", file=file("plain.qcow2"), backing=None),
            snap("nosuch", "o"),
            *SHOW,
            snap("b", "o"),
            *SHOW,
            snap("b", "o"),
            snap("b", "nosuch"),
            delete("b"),
            delete("o"),
            *SHOW,
            delete("b"),
        ],
        images=("base.qcow2", "plain.qcow2"),
    ),
    Session(
        "snapshot-checks",
        [
            raw("r"),
            null("n", size=1048576),
            qcow2("withb", "top.qcow2"),
            qcow2("ro", "plain.qcow2", read_only=True),
            qcow2("q", "c4k.qcow2"),
            snap("r", "withb"),
            snap("r", "n"),
            snap("q", "q"),
            NBD_START,
            export("eq", "q"),
            snap("r", "q"),
            cmd("block-export-del", id="eq"),
            Event("BLOCK_EXPORT_DELETED"),
            export("e", "r", writable=True),
            snap("r", "ro"),
            *SHOW,
            once("r", "write", write(b"x")),
            snap("n", "ro"),
            *SHOW,
            snap("n", "q"),
            snap("ro", "n"),
            snap("r", "q"),
            *SHOW,
            cmd("query-block-exports"),
            add(driver="raw", node_name="above", file="q"),
            qcow2("q2", "rb1.qcow2"),
            add(driver="raw", node_name="above2", file="q2"),
            snap("q", "q2"),
            *SHOW,
            snap("above", "q2"),
            snap("above", "above2"),
            qcow2("z", "zlib.qcow2"),
            snap("z", "r"),
            snap("z", "withb"),
        ],
        images=(
            "raw.img",
            "base.qcow2",
            "mid.qcow2",
            "top.qcow2",
            "plain.qcow2",
            "c4k.qcow2",
            "rb1.qcow2",
            "zlib.qcow2",
        ),
    ),
    Session(
        "snapshot-exported",
        [
            raw("r"),
            add(driver="qcow2", node_name="o", file=file("rawback.qcow2"), backing=None),
            cmd("block-dirty-bitmap-add", node="r", name="bitmap"),
            NBD_START,
            export("e", "r", writable=True),
            connect("c", "r"),
            use("c", "write", write(b"1")),
            snap("r", "o"),
            *SHOW,
            use("c", "write on", write(b"2", 512)),
            use("c", "read", read(0, 1024)),
            cmd("query-block-exports"),
            *SHOW,
            export("e2", "r", name="below"),
            export("e3", "r", name="e3", writable=True),
            GRAPH,
            once("below", "read", read(0, 1024)),
            cmd("block-export-del", id="e", mode="hard"),
            Event("BLOCK_EXPORT_DELETED"),
            cmd("block-export-del", id="e2"),
            Event("BLOCK_EXPORT_DELETED"),
            *SHOW,
            delete("o"),
            delete("r"),
        ],
        images=("raw.img", "rawback.qcow2"),
    ),
    Session(
        "snapshot-read-only",
        [
            raw("r", read_only=True),
            qcow2("o", "plain.qcow2"),
            qcow2("o2", "c4k.qcow2", read_only=True),
            NBD_START,
            export("e", "r"),
            snap("r", "o"),
            *SHOW,
            snap("o", "o2"),
            *SHOW,
        ],
        images=("raw.img", "plain.qcow2", "c4k.qcow2"),
    ),
    Session(
        "snapshot-sync-checks",
        [
            sync(),
            sync(snapshot_file="x.qcow2"),
            sync(node_name="nosuch", snapshot_file="x.qcow2"),
            sync(device="nosuch", snapshot_file="x.qcow2"),
            raw("r"),
            null("n"),
            sync(device="r", snapshot_file="x.qcow2"),
            sync(node_name="r", snapshot_file="x.qcow2"),
            sync(node_name="r", snapshot_file="x.qcow2", snapshot_node_name="r"),
            sync(node_name="r", snapshot_file="x.qcow2", snapshot_node_name="1r"),
            sync(node_name="r", snapshot_file="x.qcow2", snapshot_node_name="s", format="nosuch"),
            sync(node_name="r", snapshot_file="x.raw", snapshot_node_name="s", format="raw"),
            sync(node_name="r", snapshot_file="nodir/x.qcow2", snapshot_node_name="s"),
            sync(node_name="r", snapshot_file="x.qcow2", snapshot_node_name="s", mode="nosuch"),
            sync(node_name="r", snapshot_file="nosuch.qcow2", snapshot_node_name="s", mode="existing"),
            sync(node_name="r", snapshot_file="garbage.qcow2", snapshot_node_name="s", mode="existing"),
            sync(node_name="r", snapshot_file="plain.qcow2", snapshot_node_name="s", mode="existing", format="nosuch"),
            sync(node_name="r", snapshot_file="plain.qcow2", snapshot_node_name="s", mode="existing", format="raw"),
            *SHOW,
            sync(node_name="r", snapshot_file="plain.qcow2", snapshot_node_name="s", mode="existing"),
            *SHOW,
            delete("s"),
            sync(node_name="n", snapshot_file="x4.qcow2", snapshot_node_name="s5"),
            *SHOW,
            raw("second", "other.img"),
            active(False, "second"),
            sync(node_name="second", snapshot_file="x5.qcow2", snapshot_node_name="s6"),
            *SHOW,
        ],
        images=("raw.img", "other.img", "plain.qcow2", "garbage.qcow2"),
    ),
    Session(
        "snapshot-sync",
        [
            raw("r", cache={"direct": True, "no-flush": True}, discard="unmap", detect_zeroes="unmap"),
            NBD_START,
            export("e", "r", writable=True),
            connect("c", "r"),
            cmd("block-dirty-bitmap-add", node="r", name="bitmap"),
            sync(node_name="r", snapshot_file="x1.qcow2", snapshot_node_name="s1"),
            *SHOW,
            use("c", "write", write(b"1")),
            sync(node_name="s1", snapshot_file="x2.qcow2", snapshot_node_name="s2", format="qcow2"),
            *SHOW,
            use("c", "write", write(b"2", 512)),
            sync(node_name="s2", snapshot_file="rawback.qcow2", snapshot_node_name="s3", mode="existing"),
            *SHOW,
            use("c", "read", read(0, 1024)),
            sync(
                node_name="s3",
                snapshot_file='json:{"driver": "qcow2", "file": {"driver": "file", "filename": "plain.qcow2"}}',
                snapshot_node_name="s4",
                mode="existing",
            ),
            *SHOW,
            sync(node_name="s2", snapshot_file="x9.qcow2", snapshot_node_name="s9"),
            delete("s1"),
            delete("r"),
            cmd("query-block-exports"),
            cmd("block-export-del", id="e", mode="hard"),
            Event("BLOCK_EXPORT_DELETED"),
            *SHOW,
            Do("chain", lambda c: [images.info(c.workdir / f"x{i}.qcow2")["backing-filename"] for i in (1, 2)]),
            Do("format", lambda c: [images.info(c.workdir / f"x{i}.qcow2")["format-specific"] for i in (1, 2)]),
        ],
        images=("raw.img", "plain.qcow2", "rawback.qcow2"),
    ),
    Session(
        "snapshot-sync-read-only",
        [
            raw("r", read_only=True),
            raw("a", "other.img", auto_read_only=True, offset=65536, size=131072),
            NBD_START,
            export("e", "r"),
            export("e2", "a"),
            sync(node_name="r", snapshot_file="x1.qcow2", snapshot_node_name="s1"),
            *SHOW,
            sync(node_name="a", snapshot_file="x2.qcow2", snapshot_node_name="s2"),
            *SHOW,
        ],
        images=("raw.img", "other.img"),
    ),
    Session(
        "set-active",
        [
            cmd("blockdev-set-active"),
            active(True),
            active(False),
            active(False, "nosuch"),
            raw("r"),
            null("n"),
            active(False, "r"),
            *SHOW,
            active(False, "r"),
            active(True, "r"),
            *SHOW,
            active(True, "r"),
            NBD_START,
            export("e", "r", writable=True),
            active(False, "r"),
            active(False),
            *SHOW,
            cmd("block-export-del", id="e"),
            Event("BLOCK_EXPORT_DELETED"),
            export("e", "r"),
            active(False),
            *SHOW,
            once("r", "read", read()),
            export("e2", "r", name="e2"),
            *SHOW,
            export("w", "r", name="w", allow_inactive=True, writable=True),
            connect("w", "w"),
            use("w", "write", write(b"1")),
            active(False, "r"),
            *SHOW,
            use("w", "write to inactive", write(b"2")),
            use("w", "read from inactive", read()),
            export("w2", "r", name="w2", allow_inactive=True, writable=True),
            GRAPH,
            once("w2", "write to inactive", write(b"2")),
            cmd("block_resize", node_name="r", size=1 << 21),
            active(True),
            *SHOW,
            use("w", "write again", write(b"3")),
            use("w", "read again", read()),
        ],
        images=("raw.img",),
    ),
    Session(
        "set-active-chain",
        [
            qcow2("b", "base.qcow2", read_only=True),
            add(driver="file", node_name="mf", filename="mid.qcow2"),
            add(driver="qcow2", node_name="m", file="mf", backing="b"),
            active(False, "mf"),
            active(False, "b"),
            *SHOW,
            active(False, "m"),
            *SHOW,
            active(True, "mf"),
            *SHOW,
            active(True, "m"),
            *SHOW,
            active(False),
            *SHOW,
            active(True),
            *SHOW,
            active(False),
            cmd("block_resize", node_name="m", size=8 << 20),
            reopen({"driver": "qcow2", "node-name": "m", "file": "mf", "backing": "b", "lazy-refcounts": True}),
            cmd("block-dirty-bitmap-add", node="m", name="x"),
            *SHOW,
            delete("m"),
        ],
        images=("base.qcow2", "mid.qcow2"),
    ),
    Session(
        "add-inactive",
        [
            qcow2("m", "mid.qcow2", active=False),
            *SHOW,
            add(driver="raw", node_name="above", file="m"),
            add(driver="raw", node_name="above", file="m", active=False),
            *SHOW,
            active(True, "m"),
            *SHOW,
            delete("above"),
            add(driver="qcow2", node_name="q", file=file("plain.qcow2", active=False)),
            add(driver="qcow2", node_name="q1", file=file("plain.qcow2"), active=False),
            add(driver="qcow2", node_name="q2", file=file("plain.qcow2"), active=False),
            *SHOW,
            active(True, "q1"),
            active(True, "q2"),
            *SHOW,
            active(False, "q1"),
            active(True, "q2"),
            *SHOW,
            delete("m"),
            qcow2("b", "base.qcow2", active=False),
            add(driver="qcow2", node_name="m", file=file("mid.qcow2"), backing="b"),
            add(
                driver="qcow2",
                node_name="m",
                file=file("mid.qcow2"),
                backing={"driver": "qcow2", "active": False, "file": file("base.qcow2")},
            ),
            add(driver="raw", node_name="r", file=file("raw.img"), active=False),
            NBD_START,
            export("e", "r", writable=True),
            *SHOW,
            reopen({"driver": "raw", "node-name": "r", "file": file("raw.img")}),
        ],
        images=("raw.img", "plain.qcow2", "base.qcow2", "mid.qcow2"),
    ),
    Session(
        "inactive-filter",
        [
            add(driver="blkdebug", node_name="bd", image=file("raw.img"), active=False),
            *SHOW,
            active(True, "bd"),
            *SHOW,
            add(driver="raw", node_name="x", file="bd", active=False),
            *SHOW,
            active(False, "bd"),
            active(True, "x"),
            *SHOW,
            active(False),
            *SHOW,
        ],
        images=("raw.img",),
    ),
    Session(
        "activate-what-is-no-image",
        [
            qcow2("q", "plain.qcow2", active=False),
            Do("overwrite", lambda c: overwrite(c.workdir / "plain.qcow2", b"XXXX")),
            active(True, "q"),
        ],
        images=("plain.qcow2",),
    ),
    Session(
        "filters-between",
        [
            add(driver="file", node_name="f", filename="plain.qcow2"),
            add(driver="blkdebug", node_name="bd", image="f"),
            add(driver="qcow2", node_name="q", file="bd"),
            *SHOW,
            change(parent="bd", child="image"),
            change(parent="bd", node="f"),
            reopen({"driver": "qcow2", "node-name": "q", "file": "f"}),
            *SHOW,
            reopen({"driver": "qcow2", "node-name": "q", "file": "bd"}),
            *SHOW,
            null("n", size=1 << 20),
            reopen({"driver": "blkdebug", "node-name": "bd", "image": "bd"}),
            reopen({"driver": "blkdebug", "node-name": "bd", "image": "n"}),
            reopen({"driver": "blkdebug", "node-name": "bd", "image": "f", "align": 512}),
            reopen({"driver": "blkdebug", "node-name": "bd", "image": "f", "read-only": True}),
            reopen({"driver": "blkdebug", "node-name": "bd", "image": "f", "config": "x"}),
            *SHOW,
        ],
        images=("plain.qcow2",),
    ),
    Session(
        "snapshot-of-filter",
        [
            add(driver="file", node_name="f", filename="raw.img"),
            add(driver="blkdebug", node_name="bd", image="f"),
            NBD_START,
            export("e", "bd", writable=True),
            add(driver="qcow2", node_name="o", file=file("rawback.qcow2"), backing=None),
            snap("bd", "o"),
            *SHOW,
            qcow2("o2", "rb1.qcow2"),
            add(driver="blkdebug", node_name="bd2", image="o2"),
            snap("o", "bd2"),
            snap("o", "o2"),
            *SHOW,
            cmd("block_resize", node_name="o", size=8 << 20),
            cmd("block_resize", node_name="bd", size=8 << 20),
            sync(node_name="o2", snapshot_file="x.qcow2", snapshot_node_name="x"),
            *SHOW,
        ],
        images=("raw.img", "rawback.qcow2", "rb1.qcow2"),
    ),
    Session(
        "inactive-bitmaps",
        [
            Do("make", make_bitmaps),
            qcow2("q", "bitmaps.qcow2", active=False),
            *SHOW,
            active(True, "q"),
            *SHOW,
            active(False, "q"),
            *SHOW,
            active(True, "q"),
            cmd("block-dirty-bitmap-add", node="q", name="b2", persistent=True),
            cmd("block-dirty-bitmap-add", node="q", name="t"),
            NBD_START,
            export("e", "q", writable=True, allow_inactive=True),
            once("q", "write", write(b"x", 1 << 20)),
            active(False, "q"),
            *SHOW,
            active(True, "q"),
            *SHOW,
            cmd("block-export-del", id="e"),
            Event("BLOCK_EXPORT_DELETED"),
            delete("q"),
            qcow2("q", "bitmaps.qcow2"),
            qcow2("o", "plain.qcow2"),
            snap("q", "o"),
            *SHOW,
            delete("o"),
            active(False, "q"),
            *SHOW,
            active(True, "q"),
            *SHOW,
            delete("q"),
            Do("check", lambda c: images.check(c.workdir / "bitmaps.qcow2")["check-errors"]),
        ],
        images=("plain.qcow2",),
    ),
    Session(
        "snapshot-of-children",
        [
            Do("make", make_data_file),
            add(driver="file", node_name="d", filename="data.raw"),
            add(driver="qcow2", node_name="q", file=file("names.qcow2"), data_file="d"),
            add(driver="file", node_name="f", filename="plain.qcow2"),
            add(driver="qcow2", node_name="p", file="f"),
            add(driver="qcow2", node_name="od", file=file("c4k.qcow2"), backing=None),
            add(driver="qcow2", node_name="of", file=file("rb1.qcow2"), backing=None),
            NBD_START,
            export("eq", "q", writable=True),
            export("ep", "p", writable=True),
            snap("d", "od"),
            snap("f", "of"),
            GRAPH,
            once("q", "write", write(b"x", 1 << 20)),
            once("p", "write", write(b"y", 3 << 20)),
            once("q", "read", read(1 << 20)),
            once("q", "read below", read(100 << 10)),
            once("p", "read", read(3 << 20)),
            once("p", "read below", read(0)),
            Do("data file", lambda c: (c.workdir / "data.raw").read_bytes()[1 << 20 :][:512].hex()),
            GRAPH,
        ],
        images=("plain.qcow2", "c4k.qcow2", "rb1.qcow2"),
    ),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, image_set: Path, tmp_path: Path) -> None:
    check_session(session, image_set, tmp_path)
