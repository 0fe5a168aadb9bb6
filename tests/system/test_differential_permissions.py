"""Differential: permissions and file locks in graphs of all kinds, with the whole graph after each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.system.differential import Event, Session, add, check_session, cmd, delete
from tests.system.test_differential_blockdev import NBD_START, export, file
from tests.system.test_differential_graph import GRAPH, NODES


def file_node(name: str, filename: str, **more: Any) -> dict[str, Any]:
    return add(driver="file", node_name=name, filename=filename, **more)


def raw_on(name: str, below: Any, **more: Any) -> dict[str, Any]:
    return add(driver="raw", node_name=name, file=below, **more)


def qcow2_on(name: str, below: Any, backing: str | None = None, **more: Any) -> dict[str, Any]:
    return add(driver="qcow2", node_name=name, file=below, backing=backing, **more)


SESSIONS = [
    Session(
        "perm-shared-backing",
        [
            qcow2_on("b", file("base.qcow2"), read_only=True),
            GRAPH,
            qcow2_on("m1", file("mid.qcow2"), "b"),
            qcow2_on("m2", file("c4k.qcow2"), "b"),
            GRAPH,
            NBD_START,
            export("e1", "m1", writable=True),
            GRAPH,
            export("e2", "m2"),
            GRAPH,
            export("e3", "b"),
            GRAPH,
            export("e4", "m1", name="z"),
            GRAPH,
            cmd("block-export-del", id="e1"),
            GRAPH,
            qcow2_on("t", file("plain.qcow2"), "m1"),
            GRAPH,
            export("e5", "t", writable=True),
            GRAPH,
            export("e6", "m1", name="y", writable=True),
            GRAPH,
            export("e7", "m1", name="yy"),
            GRAPH,
        ],
        images=("base.qcow2", "mid.qcow2", "c4k.qcow2", "plain.qcow2"),
    ),
    Session(
        "perm-rw-backing",
        [
            qcow2_on("b", file("base.qcow2")),
            GRAPH,
            qcow2_on("m1", file("mid.qcow2"), "b"),
            GRAPH,
            NBD_START,
            export("eb", "b", writable=True),
            GRAPH,
            export("em", "m1", writable=True),
            GRAPH,
            export("em2", "m1", name="q"),
            GRAPH,
            raw_on("r", "b"),
            GRAPH,
            export("er", "r"),
            GRAPH,
            raw_on("r3", "b", offset=512),
            GRAPH,
            export("e3", "r3", writable=True),
            GRAPH,
            raw_on("r4", "r3", size=65536),
            export("e4", "r4"),
            GRAPH,
            cmd("block_resize", node_name="b", size=8 << 20),
            cmd("block_resize", node_name="m1", size=8 << 20),
        ],
        images=("base.qcow2", "mid.qcow2"),
    ),
    Session(
        "perm-raw",
        [
            file_node("f", "raw.img"),
            raw_on("a", "f"),
            raw_on("b", "f", offset=4096),
            raw_on("c", "f", size=65536),
            GRAPH,
            NBD_START,
            export("ea", "a", writable=True),
            GRAPH,
            export("eb", "b", writable=True),
            GRAPH,
            export("ec", "c"),
            GRAPH,
            qcow2_on("q", "a"),
            qcow2_on("q", "c"),
            GRAPH,
            cmd("block_resize", node_name="f", size=1 << 21),
            cmd("block_resize", node_name="a", size=1 << 21),
            raw_on("d", "c", read_only=True),
            GRAPH,
            export("ed", "d"),
            GRAPH,
            raw_on("rr", "f", read_only=True),
            export("x", "rr", writable=True),
            GRAPH,
        ],
        images=("raw.img",),
    ),
    Session(
        "perm-same-file",
        [
            qcow2_on("a", file("plain.qcow2")),
            qcow2_on("b", file("plain.qcow2")),
            qcow2_on("c", file("plain.qcow2", locking="off")),
            GRAPH,
            delete("c"),
            qcow2_on("b", file("plain.qcow2"), read_only=True),
            qcow2_on("b", file("plain.qcow2"), read_only=True, force_share=True),
            GRAPH,
            delete("b"),
            file_node("f", "c4k.qcow2"),
            qcow2_on("x", "f"),
            qcow2_on("y", "f"),
            GRAPH,
            qcow2_on("y", "f", read_only=True),
            GRAPH,
            delete("x"),
            qcow2_on("y", "f", read_only=True),
            GRAPH,
            qcow2_on("x", "f", read_only=True),
            GRAPH,
            qcow2_on("z", "f"),
            GRAPH,
            file_node("g", "c4k.qcow2", force_share=True),
            file_node("g", "c4k.qcow2", force_share=True, read_only=True),
            qcow2_on("z", "g"),
            qcow2_on("z", "g", read_only=True),
            GRAPH,
            raw_on("rf", "f"),
            GRAPH,
            NBD_START,
            export("e", "rf", writable=True),
            export("e", "rf"),
            GRAPH,
        ],
        images=("plain.qcow2", "c4k.qcow2"),
    ),
    Session(
        "perm-ro",
        [
            file_node("f", "plain.qcow2", auto_read_only=True),
            qcow2_on("q", "f", auto_read_only=True),
            GRAPH,
            NODES,
            NBD_START,
            export("e", "q"),
            GRAPH,
            NODES,
            export("e2", "q", name="w", writable=True),
            GRAPH,
            NODES,
            file_node("ff", "raw.img", auto_read_only=True),
            raw_on("r", "ff"),
            GRAPH,
            NODES,
            export("er", "r"),
            GRAPH,
            export("er2", "r", name="rw", writable=True),
            GRAPH,
            NODES,
            cmd("block-export-del", id="er2"),
            Event("BLOCK_EXPORT_DELETED"),
            GRAPH,
            file_node("n", "rb1.qcow2", read_only=True),
            qcow2_on("nn", "n"),
            qcow2_on("nn", "n", auto_read_only=True),
            GRAPH,
        ],
        images=("plain.qcow2", "raw.img", "rb1.qcow2"),
    ),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, image_set: Path, tmp_path: Path) -> None:
    check_session(session, image_set, tmp_path)
