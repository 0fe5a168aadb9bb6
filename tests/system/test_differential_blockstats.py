"""Differential: `query-blockstats` after requests: the same members and counts. Times are compared as what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.system.differential import Context, Do, Session, add, check_session, cmd, delete
from tests.system.test_differential_filters import (
    AWKWARD,
    DF,
    FAST,
    FUA,
    NBD_START,
    Request,
    blkdebug,
    data,
    export,
    reopen,
    requests,
    unexport,
)

K = 1024


def without_times(value: Any) -> Any:
    """Types in place of times, which are no two runs' the same."""
    if isinstance(value, dict):
        return {
            key: f"a time: {type(item).__name__}" if key.endswith("_ns") and item else without_times(item)
            for key, item in value.items()
        }
    return [without_times(item) for item in value] if isinstance(value, list) else value


def stats(**arguments: Any) -> Do:
    return Do(
        f"query-blockstats {arguments}",
        lambda context: without_times(context.daemon.qmp.raw_command(cmd("query-blockstats", **arguments))),
    )


def make(name: str, size: str, options: str = "", *commands: str, backing: str | None = None) -> Do:
    def run(context: Context) -> None:
        images.create(name, size, options=options, backing=backing, cwd=context.workdir)
        if commands:
            images.io(name, *commands, cwd=context.workdir)

    return Do(f"make {name}", run)


STATS = [stats(query_nodes=True), stats()]
#: No request that QSD splits in another way than we may: what is counted is where the highest write ended.
SIMPLE: tuple[Request, ...] = (
    ("pread", 0, 64 * K),
    ("pwrite", 100 * K, data(1, 4 * K)),
    ("pwrite", 0, data(2, 64 * K)),
    ("flush",),
    ("zero", 192 * K, 64 * K),
    ("zero", 400 * K, 4 * K, FAST),
    ("trim", 128 * K, 64 * K),
    ("pwrite", 300 * K + 5, data(3, 70), FUA),
    ("pread", 0, 512 * K),
)


def followed(node: str, *wanted: Request) -> list[Any]:
    """Each request, and the statistics after it."""
    return [
        step
        for number, request in enumerate(wanted)
        for step in (requests(f"{node} {number}: {request[0]}", node, request), stats(query_nodes=True))
    ]


def raw(**more: Any) -> dict[str, Any]:
    return {"driver": "file", "filename": "raw.img", **more}


SESSIONS = [
    Session(
        "stats-raw",
        [
            NBD_START,
            add(node_name="f", **raw(discard="unmap")),
            add(driver="raw", node_name="r", file="f", discard="unmap"),
            *STATS,
            export("r"),
            *followed("r", *SIMPLE),
            *STATS,
            requests("awkward", "r", *AWKWARD),
            *STATS,
            requests("errors", "r", ("pread", 1 << 40, 512), ("pwrite", 1 << 40, b"x"), ("trim", 1 << 40, 512)),
            *STATS,
            unexport("r"),
            *STATS,
            cmd("block_resize", node_name="r", size=100 * K),
            *STATS,
            reopen(**raw(node_name="f", discard="ignore")),
            *STATS,
            delete("r"),
            *STATS,
        ],
        images=("raw.img",),
    ),
    Session(
        "stats-file-discards",
        [
            NBD_START,
            *(
                step
                for discard in ("unmap", "ignore")
                for step in (
                    add(node_name="f", **raw(discard=discard)),
                    export("f"),
                    *followed(
                        "f",
                        ("trim", 0, 64 * K),
                        ("trim", 100 * K, 4 * K),
                        ("trim", 100, 100),
                        ("trim", 1000 * K, 24 * K),
                        ("zero", 0, 4 * K),
                        ("zero", 64 * K, 64 * K, FAST),
                    ),
                    unexport("f"),
                    delete("f"),
                )
            ),
        ],
        images=("raw.img",),
    ),
    Session(
        "stats-raw-offset",
        [
            NBD_START,
            add(driver="raw", node_name="r", file=raw(discard="unmap"), offset=64 * K, size=512 * K, discard="unmap"),
            export("r"),
            *followed("r", *SIMPLE),
        ],
        images=("raw.img",),
    ),
    Session(
        "stats-qcow2",
        [
            make("base.qcow2", "1M", "", "write -P 9 0 1M"),
            make("disk.qcow2", "1M", "", backing="base.qcow2"),
            NBD_START,
            add(driver="file", node_name="f", filename="disk.qcow2", discard="unmap"),
            add(driver="qcow2", node_name="q", file="f", discard="unmap"),
            *STATS,
            export("q"),
            requests("simple", "q", *SIMPLE),
            # Where a format has put something is its own business; of the file it is not compared here.
            Do("the disk", lambda context: shown(context, "q")),
            requests("awkward", "q", *AWKWARD),
            Do("the disk again", lambda context: shown(context, "q")),
            unexport("q"),
            Do("no export", lambda context: shown(context, "q")),
        ],
    ),
    Session(
        "stats-data-file",
        [
            make("disk.qcow2", "1M", "data_file=data.raw"),
            NBD_START,
            add(driver="qcow2", node_name="q", file={"driver": "file", "filename": "disk.qcow2"}, discard="unmap"),
            export("q"),
            requests("simple", "q", *SIMPLE),
            Do("the disk", lambda context: shown(context, "q")),
        ],
    ),
    Session(
        "stats-filters",
        [
            NBD_START,
            add(driver="copy-on-read", node_name="c", file={"driver": "raw", "node-name": "r", "file": raw()}),
            export("c"),
            *followed("c", *SIMPLE),
            unexport("c"),
            delete("c"),
            add(node_name="d", discard="unmap", **blkdebug(inject_error=[{"event": "write_aio", "sector": 200}])),
            add(driver="raw", node_name="r", file="d"),
            export("r"),
            # With QSD a read that may be sent in pieces ends the connection when it fails.
            *followed("r", *SIMPLE[:-1], ("pread", 0, 512 * K, DF)),
        ],
        images=("raw.img",),
    ),
    Session(
        "stats-null",
        [
            NBD_START,
            add(driver="null-co", node_name="n", size=1 << 20, read_zeroes=True),
            export("n"),
            *followed("n", *SIMPLE),
            stats(query_nodes=False),
            stats(query_nodes="yes"),
            stats(nosuch=1),
        ],
    ),
]


def shown(context: Context, name: str) -> Any:
    """The statistics of one node itself."""
    (entry,) = [
        entry
        for entry in context.daemon.qmp.execute("query-blockstats", query_nodes=True)
        if entry.get("node-name") == name
    ]
    entry.pop("parent", None)
    return without_times(entry)


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, image_set: Path, tmp_path: Path) -> None:
    check_session(session, image_set, tmp_path)
