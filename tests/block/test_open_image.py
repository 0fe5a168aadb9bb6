"""Opening images by the names that stand in other images, in-process; the live comparison is in tests/system."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyqsd.block import filenames
from pyqsd.block.open_image import resolve, to_options
from pyqsd.block.options import BlockdevOptions
from pyqsd.monitor.daemon import Daemon
from pyqsd.qapi.errors import Error

from .overlays import BY_NAME, CASES, Case, overlay, prepare, shape, top


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(test: Callable[[Daemon], Awaitable[None]]) -> None:
    async def main() -> None:
        async with Daemon() as daemon:
            await test(daemon)

    asyncio.run(main())


async def refused(action: Awaitable[object]) -> str:
    with pytest.raises(Error) as info:
        await action
    return info.value.desc


async def node(daemon: Daemon, name: str) -> Any:
    return next(n for n in await daemon.qmp("query-named-block-nodes") if n["node-name"] == name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.fmt}")
def test_names(case: Case, workdir: Path) -> None:
    overlay(workdir / "top.qcow2", case.name, case.fmt)

    async def test(daemon: Daemon) -> None:
        await daemon.qmp("blockdev-add", BY_NAME)
        before = set(daemon.graph.nodes)
        if isinstance(case.result, str):
            message = await refused(daemon.qmp("blockdev-add", top("top.qcow2")))
            assert message == "Could not open backing file: " + case.result
        else:
            await daemon.qmp("blockdev-add", top("top.qcow2"))
            graph = await daemon.qmp("x-debug-query-block-graph")
            nodes = await daemon.qmp("query-named-block-nodes")
            assert shape(graph, nodes) == case.result
            shown = next(n for n in nodes if n["node-name"] == "top")
            # What the image names is not an option of the user's.
            assert shown["file"] == "top.qcow2"
            assert shown["backing_file"] == case.result[0][1]
            assert shown["image"]["backing-filename"] == case.name
            assert shown["image"].get("backing-filename-format") == case.fmt
            assert all(n["ro"] for n in nodes)
            await daemon.qmp("blockdev-del", node_name="top")
        assert set(daemon.graph.nodes) == before

    run(test)


def test_a_name_that_is_not_utf8(workdir: Path) -> None:
    (workdir / os.fsdecode(b"\xff\xfe.img")).write_bytes(bytes(512))
    overlay(workdir / "top.qcow2", b"\xff\xfe.img", "raw")

    async def test(daemon: Daemon) -> None:
        await daemon.qmp("blockdev-add", top("top.qcow2"))
        assert (await daemon.graph.find("top").pread(0, 512)) == bytes(512)

    run(test)


def test_relative_to_the_overlay(workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    async def test(daemon: Daemon) -> None:
        os.chdir(elsewhere)
        path = f"{workdir}/sub/rel2.qcow2"
        await daemon.qmp("blockdev-add", top(path))
        image = (await node(daemon, "top"))["image"]
        assert image["full-backing-filename"] == f"{workdir}/sub/rel.qcow2"
        assert image["backing-image"]["full-backing-filename"] == f"{workdir}/sub/../a.img"
        assert (await daemon.graph.find("top").pread(0, 16)) == b"\x11" * 16

    run(test)


def test_relative_to_the_file_below_other_options(workdir: Path) -> None:
    # An overlay without a plain filename still knows its directory.
    async def test(daemon: Daemon) -> None:
        file = {"driver": "raw", "offset": 0, "file": {"driver": "file", "filename": "sub/rel.qcow2"}}
        await daemon.qmp("blockdev-add", {"driver": "qcow2", "node-name": "top", "read-only": True, "file": file})
        shown = await node(daemon, "top")
        assert shown["file"].startswith("json:")
        assert shown["backing_file"] == "sub/../a.img"

    run(test)


def test_no_directory_to_be_relative_to() -> None:
    class Driver:
        name = "odd"
        is_protocol = True

        def exact_filename(self) -> str:
            return ""

    class Odd:
        driver = Driver()
        children: list[Any] = []

        def explicit(self) -> Odd:
            return self

    with pytest.raises(ValueError, match=r"^Cannot generate a base directory for odd nodes$"):
        filenames.full_backing_filename(Odd(), "a.img")  # type: ignore[arg-type]
    assert filenames.full_backing_filename(Odd(), "/a.img") == "/a.img"  # type: ignore[arg-type]


@pytest.mark.parametrize("fmt", ["qcow2", None])
@pytest.mark.parametrize("read_only", [True, False])
def test_loops_end(fmt: str | None, read_only: bool, workdir: Path) -> None:
    overlay(workdir / "self.qcow2", "self.qcow2", fmt)
    overlay(workdir / "one.qcow2", "two.qcow2", fmt)
    overlay(workdir / "two.qcow2", "./sub/../one.qcow2", fmt)
    os.symlink("../link.qcow2", workdir / "sub" / "link.qcow2")
    overlay(workdir / "link.qcow2", f"{workdir}/sub/link.qcow2", fmt)

    async def test(daemon: Daemon) -> None:
        for name in ("self.qcow2", "one.qcow2", "link.qcow2"):
            message = await refused(daemon.qmp("blockdev-add", {**top(name), "read-only": read_only}))
            assert message.startswith("Could not open backing file: ")
            assert len(message) < 400
            if read_only:
                assert message.endswith("has a loop")
        assert not daemon.graph.nodes

    run(test)


def test_the_same_file_may_be_there_twice_in_different_ways(workdir: Path) -> None:
    part = f'json:{{"driver":"raw","size":65536,"file":{{"driver":"file","filename":"{workdir}/a.img"}}}}'
    overlay(workdir / "one.qcow2", part, None)
    overlay(workdir / "two.qcow2", "one.qcow2", "qcow2")

    async def test(daemon: Daemon) -> None:
        await daemon.qmp("blockdev-add", top("two.qcow2"))
        await daemon.qmp("blockdev-add", {**top("one.qcow2"), "node-name": "another"})

    run(test)


def test_a_long_chain(workdir: Path) -> None:
    length = 150
    for number in range(length):
        overlay(workdir / f"c{number}.qcow2", f"c{number + 1}.qcow2", "qcow2")
    overlay(workdir / f"c{length}.qcow2", "a.img", "raw")

    async def test(daemon: Daemon) -> None:
        await daemon.qmp("blockdev-add", top("c0.qcow2"))
        assert (await node(daemon, "top"))["backing_file_depth"] == length + 1
        assert (await daemon.graph.find("top").pread(0, 16)) == b"\x11" * 16
        await daemon.qmp("blockdev-del", node_name="top")
        assert not daemon.graph.nodes

    run(test)


def test_what_is_inherited(workdir: Path) -> None:
    overlay(workdir / "top.qcow2", "a.img", "raw")

    async def test(daemon: Daemon) -> None:
        options = {**top("top.qcow2"), "read-only": False, "cache": {"no-flush": True}, "detect-zeroes": "on"}
        await daemon.qmp("blockdev-add", options)
        for shown in await daemon.qmp("query-named-block-nodes"):
            below = shown["node-name"] != "top" and shown["file"] == "a.img"
            assert shown["ro"] == below
            assert shown["cache"] == {"writeback": True, "direct": False, "no-flush": True}
            assert shown["detect_zeroes"] == ("on" if shown["node-name"] == "top" else "off")

    run(test)


def test_nothing_is_left_open_when_it_fails(workdir: Path) -> None:
    overlay(workdir / "top.qcow2", "q.qcow2", "raw")
    overlay(workdir / "q.qcow2", "sub/nosuch", None)
    overlay(workdir / "broken.qcow2", "q.qcow2", None)

    async def test(daemon: Daemon) -> None:
        await daemon.qmp("blockdev-add", {"driver": "null-co", "node-name": "warm"})
        before = len(os.listdir("/proc/self/fd"))
        message = await refused(daemon.qmp("blockdev-add", top("broken.qcow2")))
        assert message == (
            "Could not open backing file: Could not open backing file: "
            "Could not open 'sub/nosuch': No such file or directory"
        )
        assert list(daemon.graph.nodes) == ["warm"]
        assert len(os.listdir("/proc/self/fd")) == before

    run(test)


def test_numbers_with_suffixes(workdir: Path) -> None:
    name = 'json:{"driver":"raw","size":"64k","offset":"1M","file":{"driver":"file","filename":"a.img"}}'
    overlay(workdir / "top.qcow2", name.replace("1M", "1k"))

    async def test(daemon: Daemon) -> None:
        await daemon.qmp("blockdev-add", top("top.qcow2"))
        backing = (await node(daemon, "top"))["image"]["backing-image"]
        assert backing["virtual-size"] == 65536
        assert backing["filename"].startswith('json:{"offset": 1024, "driver": "raw", "size": 65536, ')

    run(test)
    overlay(workdir / "top.qcow2", name)

    async def too_far(daemon: Daemon) -> None:
        message = await refused(daemon.qmp("blockdev-add", top("top.qcow2")))
        assert message.startswith("Could not open backing file: The sum of offset (1048576) and size (65536)")

    run(too_far)


KEYS = ["driver", "file", "filename", "backing", "size", "offset", "cache", "direct", "node-name", "0", "read-only", ""]
WORDS = ["raw", "qcow2", "file", "null-co", "a.img", "on", "64k", "1e9", "-1", "\0", "json:{}", ""]
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(WORDS), st.text(max_size=5))
keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=3).map(".".join)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(
    name=st.one_of(
        trees.map(lambda tree: "json:" + json.dumps(tree)),
        st.text(max_size=30),
        st.text(max_size=30).map(lambda text: "json:" + text),
        st.text(max_size=10).map(lambda text: "host_device:" + text),
    ),
    fmt=st.sampled_from([None, None, "raw", "file", "null-co", "qcow2", "nosuch", "\0"]),
)
@example(name='json:{"driver":"qcow2","file":{"driver":"raw","file":{"driver":"qcow2","file":"a"}}}', fmt=None)
@example(name='json:{"driver":"raw","file":{"driver":null}}', fmt=None)
def test_any_name_gives_options_or_an_error(name: str, fmt: str | None) -> None:
    try:
        tree = resolve(name, fmt)
        tree.setdefault("driver", "raw")
        options = to_options(tree)
    except Error as exc:
        assert exc.desc
    else:
        assert isinstance(options, BlockdevOptions)
