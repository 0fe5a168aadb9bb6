"""Differential: names of images inside images, and what nodes are called."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.block.overlays import BY_NAME, CASES, overlay, prepare, shape, top
from tests.system.differential import Context, Do, Session, add, check_session, cmd, delete

NODES = cmd("query-named-block-nodes")


@pytest.fixture(scope="module")
def overlays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("overlays")
    prepare(root)
    for number, case in enumerate(CASES):
        overlay(root / f"case{number}.qcow2", case.name, case.fmt)
    return root


def expect(number: int) -> Do:
    """What the case's table says is what both daemons do."""

    def run(context: Context) -> Any:
        qmp = context.daemon.qmp
        graph = qmp.execute("x-debug-query-block-graph")
        found = shape(graph, qmp.execute("query-named-block-nodes"))
        assert found == CASES[number].result, f"{context.daemon}: {found}"
        return found

    return Do(f"case {number}: {CASES[number].name} {CASES[number].fmt}", run)


def steps_of(numbers: range) -> list[Any]:
    steps: list[Any] = [cmd("blockdev-add", **BY_NAME)]
    for number in numbers:
        steps.append(cmd("blockdev-add", **top(f"case{number}.qcow2")))
        if not isinstance(CASES[number].result, str):
            steps += [expect(number), NODES, delete("top")]
    return [*steps, NODES]


# Several sessions, so that a failure is easy to find.
SIZE = 10
PARTS = [range(start, min(start + SIZE, len(CASES))) for start in range(0, len(CASES), SIZE)]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.start}-{part.stop - 1}")
def test_names_in_images(part: range, overlays: Path, tmp_path: Path) -> None:
    names = tuple(path.name for path in overlays.iterdir())
    session = Session(f"names-{part.start}", steps_of(part), images=names)
    check_session(session, overlays, tmp_path)


def file(filename: str, **more: Any) -> dict[str, Any]:
    return {"driver": "file", "filename": filename, **more}


def readable(name: str, driver: str, **more: Any) -> dict[str, Any]:
    return add(driver=driver, node_name=name, read_only=True, **more)


REL2 = file("sub/rel2.qcow2")
#: What nodes are called that users describe in all kinds of ways.
FILENAMES = [
    readable("f1", "file", filename="./sub/../a.img"),
    readable("f2", "file", filename="a.img", aio="threads", locking="off", discard="unmap"),
    readable("f3", "file", filename="file:a.img"),
    add(driver="file", node_name="f4", filename="a:b.img", auto_read_only=True),
    readable("r1", "raw", file=file("a.img")),
    readable("r2", "raw", file="f1"),
    readable("r3", "raw", file="f1", offset=0),
    readable("r4", "raw", file="f1", size=1024),
    readable("r5", "raw", file="r2"),
    readable("r6", "raw", file="r4"),
    readable("q1", "qcow2", file=REL2),
    readable("q2", "qcow2", file=REL2, backing=None),
    readable("q3", "qcow2", file=REL2, backing="f1"),
    readable("q4", "qcow2", file=REL2, backing={"driver": "qcow2", "file": file("sub/rel.qcow2")}),
    readable("q5", "qcow2", file=file("q.qcow2"), backing="f1"),
    readable("q6", "qcow2", file=file("q.qcow2"), backing=None),
    readable("q7", "qcow2", file=file("q.qcow2"), lazy_refcounts=False, cache_size=1 << 20),
    readable("q8", "qcow2", file={"driver": "raw", "file": file("q.qcow2")}),
    readable("q9", "qcow2", file={"driver": "raw", "offset": 0, "file": file("q.qcow2")}),
    readable("q10", "qcow2", file=file("o.qcow2"), backing={"driver": "raw", "file": file("a.img")}),
    readable("q11", "qcow2", file=file("o.qcow2"), backing="r1"),
    readable("q12", "qcow2", file=file("o.qcow2"), backing="f1"),
    add(driver="null-co", node_name="n1"),
    add(driver="null-co", node_name="n2", size=1 << 30),
    add(driver="null-co", node_name="n3", latency_ns=5),
    add(driver="null-aio", node_name="n4", read_zeroes=False, size=512),
    readable("r7", "raw", file="n1"),
    readable("r8", "raw", file="n2"),
]


def test_filenames(overlays: Path, tmp_path: Path) -> None:
    graph = "x-debug-query-block-graph"
    nodes = cmd("query-named-block-nodes", flat=True)
    steps = list(itertools.chain.from_iterable((step, NODES) for step in FILENAMES))
    names = tuple(path.name for path in overlays.iterdir() if not path.name.startswith("case"))
    check_session(Session("filenames", [*steps, graph, nodes], images=names), overlays, tmp_path)


def test_very_long_names(overlays: Path, tmp_path: Path) -> None:
    long = "./" * 2040 + "a.img"
    steps = [
        readable("f", "file", filename=long),
        readable("r", "raw", file="f", offset=512),
        readable("q", "qcow2", file=file("o.qcow2"), backing={"driver": "raw", "offset": 0, "file": file(long)}),
        cmd("query-named-block-nodes", flat=True),
        NODES,
    ]
    check_session(Session("long-names", steps, images=("a.img", "o.qcow2")), overlays, tmp_path)
