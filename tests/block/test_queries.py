"""What is told about nodes. tests/system compares the replies with QSD's; this is the order and the arithmetic."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.extents import RAW
from pyqsd.block.filenames import has_protocol

from .inprocess import Commands, run
from .overlays import overlay, prepare


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def file(filename: str) -> dict[str, Any]:
    return {"driver": "file", "filename": filename}


async def three_layers(qmp: Commands) -> None:
    await qmp.add("file", "f", filename="a.img", read_only=True)
    await qmp.add("qcow2", "top", file=file("sub/rel2.qcow2"))


def test_order_is_that_of_opening() -> None:
    # Newest first; a file before the format that it is for, backing files after their overlay.
    async def test(qmp: Commands) -> None:
        await three_layers(qmp)
        shown = [(n["drv"], n["file"]) for n in await qmp("query-named-block-nodes")]
        assert shown == [
            ("raw", "sub/../a.img"),
            ("file", "sub/../a.img"),
            ("qcow2", "sub/rel.qcow2"),
            ("file", "sub/rel.qcow2"),
            ("qcow2", "sub/rel2.qcow2"),
            ("file", "sub/rel2.qcow2"),
            ("file", "a.img"),
        ]
        stats = [s["node-name"] for s in await qmp("query-blockstats", query_nodes=True)]
        assert stats == [n["node-name"] for n in reversed(await qmp("query-named-block-nodes"))]

    run(test)


def test_the_whole_of_one_node() -> None:
    async def test(qmp: Commands) -> None:
        await three_layers(qmp)
        top = await qmp.node("top")
        image = top.pop("image")
        assert top == {
            "active": True,
            "backing_file": "sub/rel.qcow2",
            "backing_file_depth": 2,
            "bps": 0,
            "bps_rd": 0,
            "bps_wr": 0,
            "cache": {"writeback": True, "direct": False, "no-flush": False},
            "detect_zeroes": "off",
            "drv": "qcow2",
            "encrypted": False,
            "file": "sub/rel2.qcow2",
            "iops": 0,
            "iops_rd": 0,
            "iops_wr": 0,
            "node-name": "top",
            "ro": False,
            "write_threshold": 0,
        }
        below = image.pop("backing-image")
        status = os.stat("sub/rel2.qcow2")
        assert image == {
            "actual-size": status.st_blocks * 512,
            "backing-filename": "rel.qcow2",
            "backing-filename-format": "qcow2",
            "cluster-size": 65536,
            "dirty-flag": False,
            "filename": "sub/rel2.qcow2",
            "format": "qcow2",
            "format-specific": {
                "type": "qcow2",
                "data": {
                    "compat": "1.1",
                    "compression-type": "zlib",
                    "corrupt": False,
                    "extended-l2": False,
                    "lazy-refcounts": False,
                    "refcount-bits": 16,
                },
            },
            "full-backing-filename": "sub/rel.qcow2",
            "virtual-size": 1 << 20,
        }
        assert below["backing-image"]["format"] == "raw"
        assert "backing-image" not in below["backing-image"]

    run(test)


def test_flat() -> None:
    async def test(qmp: Commands) -> None:
        await three_layers(qmp)
        for node in await qmp("query-named-block-nodes", flat=True):
            assert node["backing_file_depth"] == 0
            assert "backing-image" not in node["image"]
        top = next(n for n in await qmp("query-named-block-nodes", flat=True) if n["node-name"] == "top")
        assert top["backing_file"] == "sub/rel.qcow2"

    run(test)


def test_a_changed_backing_file_is_part_of_the_name() -> None:
    async def test(qmp: Commands) -> None:
        await three_layers(qmp)
        options = {"driver": "qcow2", "node-name": "top", "file": qmp.graph.find("top").children[0].node.name}
        await qmp("blockdev-reopen", options=[{**options, "backing": "f"}])
        top = await qmp.node("top")
        assert top["file"] == (
            'json:{"backing": {"driver": "file", "filename": "a.img"}, "driver": "qcow2", '
            '"file": {"driver": "file", "filename": "sub/rel2.qcow2"}}'
        )
        assert top["backing_file"] == "a.img"
        assert top["image"]["backing-filename"] == "rel.qcow2"
        assert top["image"]["full-backing-filename"] == "sub/rel.qcow2"

    run(test)


def test_devices_are_none() -> None:
    async def test(qmp: Commands) -> None:
        await three_layers(qmp)
        user = BlockBackend(qmp.graph, "a test", 0, perms.ALL)
        user.insert(qmp.graph.find("top"))
        assert await qmp("query-block") == []
        assert await qmp("query-blockstats") == []
        user.remove()

    run(test)


def test_statistics() -> None:
    async def test(qmp: Commands) -> None:
        await qmp.add("file", "f", filename="a.img", discard="unmap")
        await qmp.add("raw", "r", file="f", discard="unmap")
        user = BlockBackend(qmp.graph, "a test", perms.CONSISTENT_READ | perms.WRITE, perms.ALL)
        user.insert(qmp.graph.find("r"))
        await user.pwritev(1000, 100, [memoryview(bytes(100))])
        await user.pdiscard(65536, 65536)
        by_name = {s["node-name"]: s for s in await qmp("query-blockstats", query_nodes=True)}
        raw, below = by_name["r"], by_name["f"]
        assert raw["stats"]["wr_highest_offset"] == 1100
        assert raw["parent"] == below
        assert below["driver-specific"] == {
            "driver": "file",
            "discard-nb-ok": 1,
            "discard-nb-failed": 0,
            "discard-bytes-ok": 65536,
        }
        assert "driver-specific" not in raw
        others = {name: value for name, value in raw["stats"].items() if name != "wr_highest_offset"}
        assert not any(others.values())
        user.remove()

    run(test)


def test_debug_graph() -> None:
    async def test(qmp: Commands) -> None:
        await three_layers(qmp)
        user = BlockBackend(qmp.graph, "a test", perms.CONSISTENT_READ, perms.ALL & ~perms.RESIZE)
        user.insert(qmp.graph.find("f"))
        graph = await qmp("x-debug-query-block-graph")
        kinds = {vertex["id"]: (vertex["type"], vertex["name"]) for vertex in graph["nodes"]}
        assert len(kinds) == 8
        assert kinds[1] == ("block-backend", "")
        assert kinds[2] == ("block-driver", "f")
        root = next(edge for edge in graph["edges"] if edge["parent"] == 1)
        assert root == {
            "parent": 1,
            "child": 2,
            "name": "root",
            "perm": ["consistent-read"],
            "shared-perm": ["write-unchanged", "write", "consistent-read"],
        }
        assert sorted(edge["name"] for edge in graph["edges"]) == ["backing", "backing", "file", "file", "file", "root"]
        assert all(edge["parent"] in kinds and edge["child"] in kinds for edge in graph["edges"])
        user.remove()

    run(test)


def test_names_that_json_must_escape(workdir: Path) -> None:
    name = 'a"b\\c\x01é\x7f😀.img'
    (workdir / name).write_bytes(bytes(512))

    async def test(qmp: Commands) -> None:
        await qmp.add("raw", "r", file=file(name), offset=0)
        assert (await qmp.node("r"))["file"] == (
            'json:{"offset": 0, "driver": "raw", "file": {"driver": "file", "filename": '
            r'"a\"b\\c\u0001\u00E9\u007F\uD83D\uDE00.img"}}'
        )

    run(test)


def test_long_names_are_cut(workdir: Path) -> None:
    name = "./" * 2040 + "a.img"

    async def test(qmp: Commands) -> None:
        await qmp.add("raw", "r", file=file(name), offset=0)
        shown = (await qmp.node("r"))["file"]
        assert len(shown) == 4095
        assert shown.startswith('json:{"offset": 0, "driver": "raw", "file": {"driver": "file", "filename": "././')
        assert shown.endswith("/./...")

    run(test)


@pytest.mark.parametrize(
    ("name", "answer"), [("a:b", True), ("./a:b", False), ("a/b:c", False), ("", False), (":", True), ("/a:b", False)]
)
def test_has_protocol(name: str, answer: bool) -> None:
    assert has_protocol(name) is answer


def test_a_chain_of_raw_parts(workdir: Path) -> None:
    # Every kind of name in one chain, as one JSON name.
    overlay(workdir / "top.qcow2", "a.img", "raw")
    part = {"driver": "raw", "size": 65536, "file": file("a.img")}

    async def test(qmp: Commands) -> None:
        await qmp.add("qcow2", "top", read_only=True, file=file("top.qcow2"), backing=part)
        assert (await qmp.node("top"))["file"] == (
            'json:{"backing": {"driver": "raw", "size": 65536, "file": {"driver": "file", "filename": "a.img"}}, '
            '"driver": "qcow2", "file": {"driver": "file", "filename": "top.qcow2"}}'
        )
        top = qmp.graph.find("top")
        assert (await top.pread(0, 4)) == b"\x11" * 4
        assert (await top.pread(65536, 4)) == bytes(4)
        assert (await top.block_status(0, 512))[1] & RAW == 0

    run(test)
