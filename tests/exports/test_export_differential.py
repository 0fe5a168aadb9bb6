"""The export and NBD server commands: the same session to qemu-storage-daemon and to ours, the same replies."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.exports.rawnbd import BLOCK_STATUS, FLUSH, PAYLOAD_LEN, REQ_ONE, TRIM, WRITE, WRITE_ZEROES, RawClient
from tests.exports.service import Service
from tests.support import peers
from tests.support.daemon import DaemonProcess

Command = Callable[..., dict[str, Any]]


class Side:
    """One of the two daemons."""

    def __init__(self, directory: Path, raw: Callable[[str, dict[str, Any]], dict[str, Any]]) -> None:
        self.directory = directory
        self.raw = raw
        self.replies: list[Any] = []

    def __call__(self, command: str, **arguments: Any) -> dict[str, Any]:
        members = {name.replace("_", "-"): value for name, value in arguments.items()}
        reply = self.raw(command, members)
        # Paths differ, nothing else.
        self.replies.append((command, json.dumps(reply, sort_keys=True).replace(str(self.directory), "DIR")))
        return reply

    def uri(self, name: str) -> str:
        return f"nbd+unix:///{name}?socket={self.directory}/nbd.sock"

    def unix(self, name: str = "nbd.sock", **members: Any) -> dict[str, Any]:
        return {"type": "unix", "data": {"path": str(self.directory / name), **members}}


@pytest.fixture
def sides(tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    for name in ("qsd", "ours"):
        (tmp_path / name).mkdir()
    with DaemonProcess("qsd", workdir=tmp_path / "qsd") as qsd, Service(tmp_path / "ours") as ours:
        yield (
            Side(tmp_path / "qsd", lambda name, args: qsd.qmp.raw_command({"execute": name, "arguments": args})),
            Side(tmp_path / "ours", ours.qmp),
        )


def same(sides: tuple[Side, Side], session: Callable[[Side], None]) -> None:
    for side in sides:
        session(side)
    for theirs, ours in zip(sides[0].replies, sides[1].replies, strict=True):
        assert ours == theirs


def nodes(do: Side) -> None:
    do("blockdev-add", driver="null-co", node_name="n", size=1 << 20, read_zeroes=True)
    do("blockdev-add", driver="null-co", node_name="ro", size=1 << 20, read_only=True)


def test_without_a_server(sides: tuple[Side, Side]) -> None:
    def session(do: Side) -> None:
        nodes(do)
        do("query-block-exports")
        do("block-export-add", type="nbd", id="e", node_name="n")
        do("block-export-add", type="nbd", id="e", node_name="n", name="n" * 5000, writable=True)
        do("block-export-add", type="nbd", id="e", node_name="ro", writable=True)
        do("block-export-add", type="nbd", id="e", node_name="ro", writable=True, iothread="nosuch")
        do("block-export-add", type="nbd", id="e", node_name="nosuch", iothread="nosuch")
        do("block-export-add", type="nbd", id="9", node_name="nosuch")
        do("nbd-server-stop")
        do("nbd-server-add", device="n")
        do("nbd-server-add", device="nosuch")
        do("nbd-server-remove", name="n")
        do("block-export-del", id="n")
        do("blockdev-del", node_name="n")

    same(sides, session)


def test_addresses(sides: tuple[Side, Side]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        free = str(int(port) + 1 if int(port) < 65000 else int(port) - 1)
        addresses: list[tuple[str, dict[str, Any]]] = [
            ("fd", {"str": "99"}),
            ("fd", {"str": "0"}),
            ("fd", {"str": "foo"}),
            ("inet", {"host": "192.0.2.77", "port": free}),
            ("inet", {"host": "127.0.0.1", "port": port}),
            ("inet", {"host": "localhost", "port": "foo"}),
            ("inet", {"host": "localhost", "port": "-1"}),
            ("inet", {"host": "localhost", "port": "1", "to": 70000}),
            ("inet", {"host": "localhost", "port": "1", "numeric": True}),
            ("inet", {"host": "", "port": free, "ipv4": False, "ipv6": False}),
            ("inet", {"host": "127.0.0.1", "port": free, "ipv6": True}),
            ("inet", {"host": "::1", "port": free, "ipv4": True}),
            ("inet", {"host": "::1", "port": free, "ipv4": True, "ipv6": False}),
            ("inet", {"host": "127.0.0.1", "port": free, "keep-alive": False}),
            ("inet", {"host": "127.0.0.1", "port": free, "keep-alive": True}),
            ("inet", {"host": "127.0.0.1", "port": free, "mptcp": True}),
            ("inet", {"host": "127.0.0.1", "port": "0"}),
            ("inet", {"host": "127.0.0.1", "port": ""}),
            ("inet", {"host": "127.0.0.1", "port": 80}),
            ("inet", {"host": "127.0.0.1"}),
            ("vsock", {"cid": "", "port": "1"}),
            ("vsock", {"cid": "foo", "port": "1"}),
            ("vsock", {"cid": "5", "port": "x"}),
            ("vsock", {"cid": "5", "port": "0x10"}),
            ("vsock", {"cid": "4294967296", "port": "1"}),
            ("vsock", {"cid": "5", "port": "4294967296"}),
            ("unix", {"path": "/nonexistent/nbd.sock"}),
            ("unix", {"path": "/tmp/" + "x" * 104}),
            ("unix", {"path": "x" * 108, "abstract": True}),
            ("unix", {"path": "/proc/x"}),
            ("unix", {"path": "/"}),
            ("unix", {"path": ""}),
            ("unix", {}),
            ("unix", {"path": "x", "foo": 1}),
            ("nosuch", {"path": "x"}),
        ]

        def session(do: Side) -> None:
            for kind, data in addresses:
                do("nbd-server-start", addr={"type": kind, "data": data})
                do("nbd-server-stop")
            do("nbd-server-start", addr={"type": "unix", "path": "x"})
            do("nbd-server-start")
            do("nbd-server-start", addr=do.unix(), max_connections=-1)
            do("nbd-server-start", addr=do.unix(), tls_creds="x")
            do("nbd-server-start", addr={"type": "unix", "data": {"path": "/nonexistent/x"}}, tls_creds="x")
            do("nbd-server-start", addr=do.unix(), tls_authz="x")
            do("nbd-server-start", addr=do.unix("other"))
            do("nbd-server-start", addr={"type": "fd", "data": {"str": "0"}})
            do.replies.append((do.directory / "other").exists())
            do("nbd-server-stop")
            do.replies.append((do.directory / "nbd.sock").exists())

        same(sides, session)


def test_exports(sides: tuple[Side, Side]) -> None:
    def session(do: Side) -> None:
        nodes(do)
        do("nbd-server-start", addr=do.unix())

        def add(**options: Any) -> None:
            do("block-export-add", **{"type": "nbd", **options})

        add(id="e", node_name="nosuch")
        add(id="e", node_name="n")
        add(id="e", node_name="n")
        add(id="e", node_name="nosuch")
        add(id="e2", node_name="n")
        add(id="e2", node_name="n", name="n" * 4096)
        add(id="e3", node_name="n", name="n" * 4097)
        add(id="e3", node_name="n", name="m", description="n" * 4097)
        add(id="e3", node_name="n", name="m", description="n" * 4096)
        for bad in ("", "9bad", "a b", "-x", "ä", "x/y"):
            add(id=bad, node_name="n", name="x")
        add(id="a-._9", node_name="n", name="x" * 10)
        add(id="r", node_name="ro", name="ro", writable=True)
        add(id="r1", node_name="ro", name="ro", writable=False)
        add(id="r2", node_name="ro", name="ro")
        add(id="i", node_name="n", name="i", iothread="t0")
        add(id="i", node_name="n", name="i", fixed_iothread=True)
        add(id="b", node_name="n", name="b", bitmaps=["b0"])
        add(id="b", node_name="n", name="b", bitmaps=[{"node": "nosuch", "name": "b0"}])
        add(id="b", node_name="n", name="b", bitmaps=[{"node": "n", "name": "b0"}])
        add(id="b", node_name="n", name="b", bitmaps=[1])
        add(id="b", node_name="n", name="b", bitmaps="b0")
        add(type="foo", id="f", node_name="n")
        do("block-export-add", id="f", node_name="n")
        add(node_name="n")
        add(id="f")
        add(id="f", node_name="n", foo=True)
        add(id="f", node_name="n", writable="yes")
        add(id="w", node_name="n", name="w", writable=True, writethrough=True)
        add(id="w2", node_name="n", name="w2", writable=True, allow_inactive=True)
        do("query-block-exports")
        do("blockdev-del", node_name="n")
        do("block-export-del", id="nosuch")
        do("block-export-del")
        do("block-export-del", id="w", mode="x")
        do("block-export-del", id="w")
        do("block-export-del", id="w2", mode="hard")
        do("nbd-server-add", device="n")
        do("nbd-server-add", device="n", name="e")
        do("nbd-server-add", device="nosuch")
        do("nbd-server-add", device="ro", name="ro9", writable=True)
        do("nbd-server-add", device="n", name="q", bitmap="b1")
        do("nbd-server-add", device="n", name="bad name")
        do("query-block-exports")
        do("nbd-server-remove", name="nosuch")
        do("nbd-server-remove", name="n")
        do("nbd-server-remove", name="ro9", mode="hard")
        do("block_resize", **{"node-name": "n", "size": 1 << 21})
        do("nbd-server-stop")
        do("query-block-exports")
        do("block_resize", **{"node-name": "n", "size": 1 << 21})
        do("blockdev-del", node_name="n")

    same(sides, session)


def test_removal_with_clients(sides: tuple[Side, Side]) -> None:
    def session(do: Side) -> None:
        nodes(do)
        do("nbd-server-start", addr=do.unix())
        for name in ("a", "b", "c"):
            do("block-export-add", type="nbd", id=name, node_name="n", name=name)
        with RawClient(str(do.directory / "nbd.sock")) as client:
            client.go("b")
            do("block-export-del", id="a")
            do("block-export-del", id="b")
            do("block-export-del", id="b", mode="safe")
            do("nbd-server-remove", name="b")
            do("query-block-exports")
            do("block-export-del", id="b", mode="hard")
            do.replies.append(client.at_eof())
        do("query-block-exports")
        with RawClient(str(do.directory / "nbd.sock")) as client:
            client.go("c")
            do("nbd-server-stop")
            do.replies.append(client.at_eof())
        do("query-block-exports")

    same(sides, session)


def test_dirty_bitmaps(sides: tuple[Side, Side]) -> None:
    """Which bitmaps can be exported, and that nobody else can have them meanwhile."""

    def session(do: Side) -> None:
        nodes(do)
        do("nbd-server-start", addr=do.unix())
        do("block-dirty-bitmap-add", node="n", name="b0")
        do("block-dirty-bitmap-add", node="n", name="b1", disabled=True)
        do("block-dirty-bitmap-add", node="ro", name="br", disabled=True)
        for options in (
            {"bitmaps": ["b0"]},
            {"bitmaps": ["nosuch"]},
            {"bitmaps": ["b1", "b1"]},
            {"id": "x1", "name": "x1", "writable": True, "bitmaps": ["b0", {"node": "ro", "name": "br"}]},
            {"id": "x2", "name": "x2", "writable": True, "bitmaps": ["b0"]},
            {"id": "x3", "name": "x3", "bitmaps": [{"node": "nosuch", "name": "b1"}]},
            {"id": "x4", "name": "x4", "bitmaps": [{"node": "n", "name": "zz"}]},
            {"id": "x5", "name": "x5", "bitmaps": [""]},
        ):
            do("block-export-add", **{"type": "nbd", "id": "x", "node-name": "n", **options})
        do("block-dirty-bitmap-remove", node="n", name="b0")
        do("block-dirty-bitmap-clear", node="n", name="b1")
        do("block-export-del", id="x")
        do("block-export-del", id="x1")
        do("block-dirty-bitmap-clear", node="n", name="b0")
        do("block-export-add", **{"type": "nbd", "id": "x2", "node-name": "n", "writable": True, "bitmaps": ["b0"]})

    same(sides, session)


def test_dirty_bitmap_content(sides: tuple[Side, Side]) -> None:
    """What clients see of bitmaps while they write."""
    size = 4 << 20

    def session(do: Side) -> None:
        rng = random.Random(7)
        path = do.directory / "disk.img"
        with open(path, "wb") as file:
            file.truncate(size)
        do("blockdev-add", driver="file", node_name="f", filename=str(path))
        do("nbd-server-start", addr=do.unix())
        names = ("fine", "coarse", "off")
        do("block-dirty-bitmap-add", node="f", name="fine", granularity=512)
        do("block-dirty-bitmap-add", node="f", name="coarse", granularity=1 << 20)
        do("block-dirty-bitmap-add", node="f", name="off", disabled=True)
        do("block-export-add", type="nbd", id="f", node_name="f", writable=True, bitmaps=list(names))
        contexts = tuple(f"qemu:dirty-bitmap:{name}" for name in names)
        for extended in (False, True):
            with RawClient(str(do.directory / "nbd.sock")) as client:
                client.go("f", extended=extended, contexts=(*contexts, "base:allocation"))
                do.replies.append(client.contexts)
                for _ in range(30):
                    offset = rng.randrange(size - 70000)
                    kind = rng.choice((WRITE, WRITE, WRITE_ZEROES, TRIM))
                    length = rng.randrange(1, 70000)
                    data = bytes([1]) * length if kind == WRITE else b""
                    do.replies.append(client.ask(kind, offset, length, data, PAYLOAD_LEN if data and extended else 0))
                client.ask(FLUSH)
                for offset, length, flags in (
                    (0, size, 0),
                    (0, size, REQ_ONE),
                    (1, size - 1, 0),
                    (rng.randrange(size // 2), size // 2, 0),
                    (rng.randrange(size - 1), 1, 0),
                ):
                    chunks = client.ask(BLOCK_STATUS, offset, length, b"", flags)
                    # What is allocated where is the file system's affair.
                    do.replies.append(chunks[1:])
        for name in names:
            do.replies.append(peers.run("nbdinfo", f"--map=qemu:dirty-bitmap:{name}", do.uri("f")).stdout)
        do.replies.append(peers.run("nbdinfo", "--json", do.uri("f")).stdout.replace(str(do.directory), "DIR"))

    same(sides, session)
