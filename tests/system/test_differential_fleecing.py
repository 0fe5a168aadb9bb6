"""Differential: ``copy-before-write`` and ``snapshot-access``, the graph that they make, and what clients get there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import peers
from tests.system.differential import Context, Do, Session, add, check_session, cmd, delete
from tests.system.test_differential_filters import (
    FAST,
    FUA,
    GRAPH,
    NBD_START,
    K,
    data,
    export,
    requests,
    unexport,
)

FULL: dict[str, Any] = {"event": "write_aio", "errno": 28, "iotype": "write"}


def make(context: Context) -> None:
    run = {"cwd": context.workdir}
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "s.qcow2", "1M", **run)  # type: ignore[arg-type]
    peers.run("qemu-io", "-c", "write -P 7 0 512k", "-c", "write -z 128k 64k", "s.qcow2", **run)  # type: ignore[arg-type]
    for name, size in (("t", "1M"), ("small", "512k"), ("large", "2M")):
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", f"{name}.qcow2", size, **run)  # type: ignore[arg-type]


def image(name: str, **more: Any) -> dict[str, Any]:
    return add(driver="qcow2", node_name=name, file={"driver": "file", "filename": f"{name}.qcow2"}, **more)


def failing(name: str, *rules: dict[str, Any]) -> dict[str, Any]:
    below = {"driver": "file", "filename": f"{name}.qcow2"}
    return add(driver="qcow2", node_name=name, file={"driver": "blkdebug", "image": below, "inject-error": list(rules)})


def cbw(**more: Any) -> dict[str, Any]:
    return add(**{"driver": "copy-before-write", "node_name": "c", "file": "s", "target": "t", **more})


def access(name: str = "a", **more: Any) -> dict[str, Any]:
    return add(**{"driver": "snapshot-access", "node_name": name, "file": "c", **more})


def reading(node: str) -> dict[str, Any]:
    return cmd("block-export-add", type="nbd", id=f"e-{node}", node_name=node)


def bitmap(node: str, name: str, **more: Any) -> dict[str, Any]:
    return cmd("block-dirty-bitmap-add", node=node, name=name, **more)


def allocation(node: str) -> Do:
    """What base:allocation says, or that it fails."""

    def run(context: Context) -> Any:
        uri = f"nbd+unix:///{node}?socket=nbd.sock"
        done = peers.run("nbdinfo", "--json", "--map", uri, cwd=context.workdir, ok=())
        return done.returncode, done.stdout

    return Do(f"map of {node}", run)


def _told(context: Context) -> Any:
    """What is told of the nodes, but for how large their files are."""
    nodes = context.daemon.qmp.execute("query-named-block-nodes", flat=True)
    for node in nodes:
        node["image"].pop("actual-size", None)
    return [node for node in nodes if not node["node-name"].startswith("#") and node["drv"] != "qcow2"]


NODES = Do("nodes", _told)
START = [Do("make", make), NBD_START]
PAIR = [*START, image("s", discard="unmap"), image("t", discard="unmap")]
SET_ACTIVE = "blockdev-set-active"

#: From the point in time on.
WRITES: tuple[Any, ...] = (
    ("pwrite", 100, data(1, 200)),
    ("pwrite", 60 * K, data(2, 8 * K), FUA),
    ("zero", 200 * K, 30 * K),
    ("zero", 600 * K, 1, FAST),
    ("zero", 704 * K, 64 * K, FAST),
    ("trim", 300 * K, 100 * K),
    ("pwrite", 900 * K, data(3, 124 * K)),
    ("flush",),
    ("pwrite", 110, data(4, 200)),
)
READS: tuple[Any, ...] = (
    ("pread", 0, 300),
    ("pread", 0, 1024 * K),
    ("pread", 70 * K, 300 * K),
    ("pread", 1024 * K - 1, 1),
)

SESSIONS = [
    Session(
        "cbw-options",
        [
            *PAIR,
            image("small"),
            image("large"),
            add(driver="null-co", node_name="n", size=1024 * K),
            bitmap("s", "b"),
            bitmap("large", "b"),
            bitmap("t", "b", granularity=512),
            *(
                step
                for more in (
                    {},
                    {"target": "large"},
                    {"target": "s"},
                    {"target": "n"},
                    {"file": "n"},
                    {"bitmap": {"node": "s", "name": "b"}},
                    {"bitmap": {"node": "t", "name": "b"}},
                    {"on_cbw_error": "break-snapshot", "cbw_timeout": 5},
                    {"min_cluster_size": 1 << 20},
                    {"min_cluster_size": 1024},
                    {"read_only": True},
                    {"auto_read_only": True, "detect_zeroes": "on", "discard": "unmap"},
                    {"active": False},
                    {"file": {"driver": "null-co", "size": 512}, "target": {"driver": "null-co", "size": 512}},
                )
                for step in (cbw(**more), NODES, GRAPH, delete("c"))
            ),
            add(driver="copy-before-write", node_name="c", file="s"),
            add(driver="copy-before-write", node_name="c", target="t"),
            cbw(file="nosuch"),
            cbw(target="nosuch"),
            cbw(bitmap={"node": "nosuch", "name": "b"}, target="nosuch"),
            cbw(bitmap={"node": "nosuch", "name": "b"}, min_cluster_size=5),
            cbw(bitmap={"node": "s", "name": "nosuch"}),
            cbw(bitmap={"node": "large", "name": "b"}),
            cbw(bitmap={"node": "large", "name": "b"}, min_cluster_size=5),
            cbw(bitmap={"node": "s"}),
            cbw(bitmap="b"),
            cbw(on_cbw_error="report"),
            cbw(cbw_timeout=-1),
            cbw(cbw_timeout=1 << 32),
            cbw(min_cluster_size=3 << 16),
            cbw(min_cluster_size=1 << 63),
            cbw(min_cluster_size=(1 << 64) - 1),
            cbw(min_cluster_size="1M"),
            cbw(speed=1),
            image("nosuch"),
            add(driver="qcow2", node_name="ro", read_only=True, file={"driver": "file", "filename": "small.qcow2"}),
            cbw(target="small", file="small"),
            cbw(target="ro"),
            export("t"),
            export("s"),
            cbw(),
            GRAPH,
            export("c", name="c"),
        ],
    ),
    Session(
        "cbw-graph",
        [
            *PAIR,
            image("large"),
            cbw(),
            add(driver="raw", node_name="r", file="c", read_only=True),
            GRAPH,
            delete("c"),
            delete("t"),
            delete("r"),
            access(),
            access("b", read_only=True),
            access("d", file="s"),
            access("e", file="nosuch"),
            add(driver="snapshot-access", node_name="e"),
            GRAPH,
            NODES,
            delete("c"),
            export("a"),
            export("b"),
            reading("b"),
            reading("d"),
            export("c"),
            GRAPH,
            export("s"),
            *(cmd("block_resize", node_name=name, size=2048 * K) for name in ("a", "c", "s", "t", "d")),
            *(bitmap(name, "x", persistent=True) for name in ("a", "c")),
            *(bitmap(name, "y") for name in ("a", "c")),
            cmd("block-dirty-bitmap-remove", node="c", name=""),
            NODES,
            *(
                cmd("blockdev-reopen", options=[{"node-name": name, **options}])
                for name, options in (
                    ("c", {"driver": "copy-before-write", "file": "s", "target": "t"}),
                    ("c", {"driver": "copy-before-write", "file": "s", "target": "t", "min-cluster-size": 1 << 20}),
                    ("a", {"driver": "snapshot-access", "file": "c"}),
                    ("a", {"driver": "snapshot-access", "file": "s"}),
                )
            ),
            cmd("blockdev-snapshot", node="c", overlay="large"),
            GRAPH,
        ],
    ),
    Session(
        "cbw-inactive",
        [
            *PAIR,
            cbw(),
            access(),
            cmd(SET_ACTIVE, node_name="c", active=False),
            cmd(SET_ACTIVE, node_name="a", active=False),
            GRAPH,
            cmd(SET_ACTIVE, node_name="c", active=False),
            cmd(SET_ACTIVE, node_name="t", active=False),
            cmd(SET_ACTIVE, node_name="s", active=False),
            GRAPH,
            cmd(SET_ACTIVE, node_name="s", active=True),
            cmd(SET_ACTIVE, node_name="c", active=True),
            GRAPH,
        ],
    ),
    Session(
        "fleecing",
        [
            *PAIR,
            cbw(discard="unmap"),
            access(discard="unmap"),
            access("d", file="s"),
            export("c"),
            export("a"),
            reading("d"),
            requests("before", "a", *READS),
            allocation("a"),
            requests("writes", "c", *WRITES),
            NODES,
            requests("past", "a", *READS),
            requests("present", "c", *READS),
            allocation("a"),
            allocation("c"),
            requests("writes to the past", "a", ("pwrite", 0, b"x"), ("zero", 0, 64 * K), ("zero", 0, 64 * K, FAST)),
            requests("what has no past", "d", ("pread", 0, 100)),
            allocation("d"),
            requests("too little", "a", ("trim", 1, 64 * K), ("trim", 64 * K, 64 * K - 1)),
            NODES,
            allocation("a"),
            requests("done with", "a", ("trim", 0, 130 * K), ("trim", 400 * K, 200 * K)),
            NODES,
            requests("past again", "a", *READS, ("pread", 130 * K, 100 * K)),
            requests("more writes", "c", ("pwrite", 0, data(9, 1024 * K))),
            NODES,
            requests("still", "a", ("pread", 130 * K, 260 * K), ("pread", 600 * K, 424 * K)),
            allocation("a"),
            unexport("a"),
            unexport("c"),
            requests("without", "d", ("pread", 0, 1)),
            cmd("block_resize", node_name="c", size=2048 * K),
            NODES,
        ],
    ),
    Session(
        "fleecing-bitmap",
        [
            *PAIR,
            bitmap("s", "b", granularity=4096),
            export("s"),
            requests("changes", "s", ("pwrite", 70 * K, data(5, 10)), ("pwrite", 300 * K, data(6, 100 * K))),
            unexport("s"),
            cbw(bitmap={"node": "s", "name": "b"}),
            cmd("block-dirty-bitmap-clear", node="s", name="b"),
            access(),
            export("c"),
            reading("a"),
            NODES,
            requests("writes", "c", *WRITES),
            NODES,
            requests("past", "a", *READS, ("pread", 64 * K, 64 * K), ("pread", 256 * K, 256 * K - 1)),
            requests("beyond", "a", ("pread", 0, 1), ("pread", 127 * K, 2 * K)),
        ],
    ),
    *(
        Session(
            f"fleecing-{policy}",
            [
                *START,
                image("s", discard="unmap"),
                failing("t", {**FULL, "once": True}),
                cbw(on_cbw_error=policy),
                access(),
                export("c"),
                reading("a"),
                requests("fails", "c", ("pwrite", 0, data(1, 200))),
                NODES,
                requests("writes", "c", *WRITES),
                NODES,
                requests("past", "a", ("pread", 0, 1), ("pread", 130 * K, 100 * K)),
                requests("present", "c", *READS),
            ],
        )
        for policy in ("break-guest-write", "break-snapshot")
    ),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, tmp_path: Path) -> None:
    check_session(session, tmp_path, tmp_path)
