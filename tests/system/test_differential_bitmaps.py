"""Differential: dirty bitmaps in memory, their commands, and what NBD clients see of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.nbd import NbdClient
from tests.system.differential import Context, Do, Session, add, check_session, cmd

NODES = cmd("query-named-block-nodes", flat=True)
NBD_START = cmd("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
MERGE = "block-dirty-bitmap-merge"


def bitmap(action: str, name: str, node: str = "n", /, **more: Any) -> dict[str, Any]:
    return cmd(f"block-dirty-bitmap-{action}", node=node, name=name, **more)


def sha(name: str, node: str = "n") -> dict[str, Any]:
    return cmd("x-debug-block-dirty-bitmap-sha256", node=node, name=name)


def write(export: str, *actions: Callable[[NbdClient], Any]) -> Do:
    def run(context: Context) -> None:
        with NbdClient(context.workdir / "nbd.sock", export) as client:
            for action in actions:
                action(client)
            client.disconnect()

    return Do("write", run)


def dirty(export: str, name: str) -> Do:
    """The bitmap's context, from end to end."""

    def run(context: Context) -> Any:
        context_name = f"qemu:dirty-bitmap:{name}"
        with NbdClient(context.workdir / "nbd.sock", export, contexts=(context_name,)) as client:
            found = client.block_map(context_name)
            client.disconnect()
        return found

    return Do(f"dirty {name}", run)


def without_export(name: str) -> Do:
    """Delete the export and wait until it is gone."""

    def run(context: Context) -> Any:
        qmp = context.daemon.qmp
        qmp.execute("block-export-del", id=name)
        return qmp.wait_event("BLOCK_EXPORT_DELETED")["data"]

    return Do(f"delete export {name}", run)


def export(name: str, node: str, /, **more: Any) -> dict[str, Any]:
    return cmd("block-export-add", type="nbd", id=name, name=name, node_name=node, **more)


WRITES = write(
    "e",
    lambda c: c.pwrite(99999, b"x"),
    lambda c: c.pwrite(4096, b"y" * 10),
    lambda c: c.trim(8192, 512),
    lambda c: c.zero(0, 1),
    lambda c: c.pread(20000, 100),
)

SESSIONS = [
    Session(
        "bitmap-commands",
        [
            add(driver="null-co", node_name="n", size=100000),
            add(driver="null-co", node_name="big", size=1 << 40),
            bitmap("add", "b0"),
            bitmap("add", "b0"),
            bitmap("add", ""),
            bitmap("add", "b", "nosuch"),
            bitmap("add", "b", ""),
            bitmap("add", "a" * 1023),
            bitmap("remove", "a" * 1023),
            bitmap("add", "a" * 1024),
            bitmap("add", "é" * 512),
            *(bitmap("add", "g", granularity=g) for g in (0, 256, 511, 513, 1 << 32, -1, "512")),
            bitmap("add", "b1", granularity=512),
            bitmap("add", "b2", granularity=1 << 31),
            bitmap("add", "p", persistent=True),
            bitmap("add", "p", persistent=False),
            bitmap("add", "b3", disabled=True),
            bitmap("add", "b3", nosuch=1),
            NODES,
            *(
                bitmap(action, name, node)
                for action in ("remove", "clear", "enable", "disable")
                for name, node in (("nosuch", "n"), ("nosuch", "nosuch"), ("", "n"))
            ),
            sha("nosuch"),
            sha("b0", "nosuch"),
            *(sha(name) for name in ("b0", "b1", "b2", "b3")),
            cmd(MERGE, node="n", target="b0", bitmaps=["b1"]),
            cmd(MERGE, node="n", target="b0", bitmaps=["nosuch"]),
            cmd(MERGE, node="n", target="nosuch", bitmaps=["b1"]),
            cmd(MERGE, node="nosuch", target="b0", bitmaps=["b1"]),
            cmd(MERGE, node="n", target="b0", bitmaps=[{"node": "nosuch", "name": "b"}]),
            cmd(MERGE, node="n", target="b0", bitmaps=[{"node": "big", "name": "b"}]),
            cmd(MERGE, node="n", target="b0", bitmaps=[{"node": "big"}]),
            cmd(MERGE, node="n", target="b0", bitmaps=[5]),
            cmd(MERGE, node="n", target="b0", bitmaps="b1"),
            bitmap("add", "g", "big"),
            cmd(MERGE, node="big", target="g", bitmaps=[{"node": "n", "name": "b0"}]),
            bitmap("remove", "b0"),
            bitmap("remove", "b0"),
            NODES,
            cmd("blockdev-del", node_name="n"),
        ],
    ),
    Session(
        "bitmap-granularity",
        [
            *(
                step
                for name in ("c4k", "c2m", "plain", "v2")
                for step in (
                    add(driver="qcow2", node_name=name, file={"driver": "file", "filename": f"{name}.qcow2"}),
                    add(driver="raw", node_name=f"{name}-raw", file=name),
                    bitmap("add", "b", name),
                    bitmap("add", "b", f"{name}-raw"),
                )
            ),
            add(driver="raw", node_name="raw", file={"driver": "file", "filename": "raw.img"}),
            bitmap("add", "b", "raw"),
            NODES,
        ],
        images=("c4k.qcow2", "c2m.qcow2", "plain.qcow2", "v2.qcow2", "raw.img"),
    ),
    Session(
        "bitmap-recording",
        [
            NBD_START,
            add(driver="file", node_name="f", filename="raw.img", discard="unmap"),
            add(driver="raw", node_name="n", file="f", discard="unmap"),
            bitmap("add", "b0"),
            bitmap("add", "b1", granularity=512),
            bitmap("add", "off", disabled=True),
            bitmap("add", "below", "f", granularity=4096),
            export("e", "n", writable=True),
            WRITES,
            NODES,
            *(sha(name) for name in ("b0", "b1", "off")),
            sha("below", "f"),
            bitmap("enable", "off"),
            bitmap("enable", "off"),
            bitmap("disable", "b1"),
            write("e", lambda c: c.pwrite(700000, b"z" * 100000)),
            *(sha(name) for name in ("b0", "b1", "off")),
            bitmap("clear", "b0"),
            sha("b0"),
            cmd(MERGE, node="n", target="b0", bitmaps=["b1", {"node": "n", "name": "off"}]),
            sha("b0"),
            # A merge that fails changes nothing.
            bitmap("clear", "b0"),
            cmd(MERGE, node="n", target="b0", bitmaps=["b1", "nosuch"]),
            sha("b0"),
            NODES,
            without_export("e"),
            *(
                step
                for size in (2 << 20, 100352, 1 << 20, 512, 0)
                for step in (
                    cmd("block_resize", node_name="n", size=size),
                    *(sha(name) for name in ("b1", "off")),
                    NODES,
                )
            ),
        ],
        images=("raw.img",),
    ),
    Session(
        "bitmap-merge",
        [
            NBD_START,
            # Neither is a multiple of all granularities.
            *(add(driver="null-co", node_name=name, size=(9 << 20) + 512) for name in ("n", "other")),
            add(driver="null-co", node_name="longer", size=(9 << 20) + 1024),
            *(bitmap("add", f"g{bits}", granularity=1 << bits) for bits in (9, 12, 16, 20)),
            *(bitmap("add", f"o{bits}", "other", granularity=1 << bits) for bits in (9, 16)),
            bitmap("add", "long", "longer"),
            export("e", "n", writable=True),
            WRITES,
            write("e", lambda c: c.pwrite(9 << 20, b"e" * 512), lambda c: c.zero((3 << 20) - 5, 70000)),
            *(
                step
                for target in (9, 12, 16, 20)
                for source in (9, 12, 16, 20)
                for step in (
                    bitmap("add", "t", granularity=1 << target),
                    cmd(MERGE, node="n", target="t", bitmaps=[f"g{source}"]),
                    sha("t"),
                    NODES,
                    bitmap("remove", "t"),
                )
            ),
            *(
                step
                for target in (9, 16)
                for step in (
                    cmd(
                        MERGE,
                        node="other",
                        target=f"o{target}",
                        bitmaps=[{"node": "n", "name": f"g{bits}"} for bits in (20, 9)],
                    ),
                    sha(f"o{target}", "other"),
                )
            ),
            # A bitmap may be merged into itself, and more than once.
            cmd(MERGE, node="n", target="g9", bitmaps=["g9"]),
            cmd(MERGE, node="n", target="g9", bitmaps=["g12", "g9", "g12", {"node": "n", "name": "g16"}]),
            sha("g9"),
            bitmap("disable", "g12"),
            cmd(MERGE, node="n", target="g12", bitmaps=["g20"]),
            sha("g12"),
            cmd(MERGE, node="n", target="g9", bitmaps=["g20", {"node": "longer", "name": "long"}]),
            cmd(MERGE, node="n", target="g9", bitmaps=[{"node": "longer", "name": "long"}, "nosuch"]),
            cmd(MERGE, node="n", target="g9", bitmaps=["nosuch", {"node": "longer", "name": "long"}]),
            cmd(MERGE, node="n", target="nosuch", bitmaps=["nosuch"]),
            cmd(MERGE, node="n", target="g9", bitmaps=[{"node": "n", "name": "o9"}]),
            cmd(MERGE, node="n", target="g9", bitmaps=[{"node": "n", "name": "o9", "x": 1}]),
            cmd(MERGE, node="n", target="g9"),
            sha("g9"),
            NODES,
        ],
    ),
    Session(
        "bitmap-busy",
        [
            NBD_START,
            add(driver="null-co", node_name="n", size=1 << 20),
            *(bitmap("add", name) for name in ("b0", "b1", "b2")),
            bitmap("disable", "b1"),
            export("e", "n", writable=True),
            WRITES,
            export("e0", "n", bitmaps=["b0"]),
            export("e1", "n", bitmaps=["b1"]),
            export("e2", "n", bitmaps=["b0"], writable=True),
            export("e3", "n", bitmaps=["b0"], writable=True),
            export("e4", "n", bitmaps=[{"node": "n", "name": "b2"}], writable=True),
            NODES,
            *(bitmap(action, name) for action in ("remove", "clear", "enable", "disable") for name in ("b0", "b1")),
            cmd(MERGE, node="n", target="b1", bitmaps=["b2"]),
            cmd(MERGE, node="n", target="b2", bitmaps=["b1"]),
            bitmap("add", "free"),
            cmd(MERGE, node="n", target="free", bitmaps=["b1"]),
            sha("b0"),
            dirty("e1", "b1"),
            dirty("e2", "b0"),
            WRITES,
            dirty("e1", "b1"),
            dirty("e2", "b0"),
            without_export("e1"),
            bitmap("clear", "b1"),
            NODES,
        ],
    ),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, image_set: Path, tmp_path: Path) -> None:
    check_session(session, image_set, tmp_path)
