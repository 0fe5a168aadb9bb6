"""The same bytes to the real qemu-storage-daemon and to ours: the same bytes back."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.exports import rawnbd as raw
from tests.exports.rawnbd import RawClient
from tests.exports.service import Service
from tests.support import images, peers
from tests.support.daemon import DaemonProcess

MiB = 1 << 20

Command = Callable[[str, dict[str, Any]], Any]


def make_image(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(4 * MiB)
        file.seek(MiB)
        file.write(b"a" * 65536)
        file.seek(3 * MiB)
        file.write(bytes(range(256)) * 16)


def set_up(directory: Path, command: Command) -> str:
    """The same nodes and exports in either daemon; the path of the NBD socket."""
    directory.mkdir()
    make_image(directory / "disk.img")
    make_image(directory / "work.img")
    images.create(directory / "base.qcow2", 4 * MiB, "qcow2", "", None, None, directory)
    images.io(directory / "base.qcow2", "write -P 7 0 256k", "write -z 1M 64k", cwd=directory)
    images.create(directory / "top.qcow2", 4 * MiB, "qcow2", "", "base.qcow2", "qcow2", directory)
    images.io(directory / "top.qcow2", "write -P 9 64k 64k", "write -z 128k 64k", cwd=directory)

    def file(name: str) -> dict[str, Any]:
        return {"driver": "file", "filename": str(directory / name)}

    path = str(directory / "nbd.sock")
    for name, arguments in (
        ("blockdev-add", {"driver": "raw", "node-name": "r", "file": file("disk.img")}),
        ("blockdev-add", {"driver": "raw", "node-name": "w", "file": file("work.img")}),
        ("blockdev-add", {"driver": "qcow2", "node-name": "q", "file": file("top.qcow2")}),
        ("blockdev-add", {"driver": "null-co", "node-name": "big", "size": 1 << 40, "read-zeroes": True}),
        ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}}),
        ("block-export-add", {"type": "nbd", "id": "r", "node-name": "r", "writable": True, "allocation-depth": True}),
        ("block-export-add", {"type": "nbd", "id": "w", "node-name": "w", "writable": True}),
        ("block-export-add", {"type": "nbd", "id": "ro", "node-name": "r", "name": "ro", "description": "for readers"}),
        ("block-export-add", {"type": "nbd", "id": "q", "node-name": "q", "allocation-depth": True}),
        ("block-export-add", {"type": "nbd", "id": "big", "node-name": "big", "writable": True, "name": "größe"}),
    ):
        reply = command(name, arguments)
        assert reply == {"return": {}}, (name, arguments, reply)
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The sockets of QSD and of ours."""
    root = tmp_path_factory.mktemp("pair")
    with DaemonProcess("qsd", workdir=root) as qsd, Service(root) as ours:
        theirs = set_up(
            root / "qsd", lambda name, arguments: qsd.qmp.raw_command({"execute": name, "arguments": arguments})
        )
        yield theirs, set_up(root / "ours", ours.qmp)


def both(pair: tuple[str, str], session: Callable[[RawClient], Any]) -> None:
    results = []
    for path in pair:
        with RawClient(path) as client:
            results.append(session(client))
    assert results[1] == results[0]


GO = (raw.OPT_GO, raw.info("r"))
OPTIONS: dict[str, list[tuple[int, bytes]]] = {
    "list": [(3, b""), (3, b"x"), (2, b"")],
    "abort with data": [(2, b"xyz")],
    "starttls": [(5, b""), (5, b"x")],
    "unknown": [(4, b"xx"), (99, b""), (0, b""), (12, b"abc"), (0xFFFFFFFF, b"q" * 1000)],
    "modes": [(8, b"x"), (8, b""), (8, b""), (11, b"1"), (11, b""), (11, b""), (8, b"")],
    **{
        f"info {name}": [
            (6, raw.info(name)),
            (6, raw.info(name, 3)),
            (6, raw.info(name, 0, 1, 2, 3, 77, 3)),
            (7, raw.info(name, 1)),
        ]
        for name in ("r", "ro", "q", "größe", "nosuch", "", "x" * 79, "x" * 80, "x" * 4096)
    },
    "structured flags": [(8, b""), GO],
    "extended flags": [(11, b""), GO],
    "extended flags in info": [(11, b""), (6, raw.info("r")), (10, raw.meta("r", "base:allocation")), GO],
    "extended flags with context": [(11, b""), (10, raw.meta("r", "base:allocation")), GO],
    "extended flags with another's context": [(11, b""), (10, raw.meta("ro", "base:allocation")), GO],
    "bad info": [
        (6, b""),
        (6, b"\0\0\0"),
        (6, b"\0\0\0\0"),
        (6, b"\0\0\0\5ab"),
        (6, b"\0\0\0\1r\0\1"),
        (6, b"\0\0\0\1r\0\1\0\3zz"),
        (6, b"\0\0\0\1r\0\0z"),
        (6, raw.info("x" * 4097)),
        (6, raw.info(b"\xff")),
        (6, raw.info(b"\xff\0")),
        (7, raw.info(b"r\0")),
    ],
    "contexts without structured replies": [(9, raw.meta("r")), (10, raw.meta("r", "base:allocation")), (10, b"")],
    "list contexts": [(8, b"")]
    + [
        (9, raw.meta(name, *queries))
        for name in ("r", "ro", "q")
        for queries in (
            (),
            ("base:",),
            ("qemu:",),
            ("base:allocation", "qemu:allocation-depth"),
            ("qemu:allocation-depth", "base:allocation"),
            ("base:allocation", "base:allocation"),
            ("qemu:dirty-bitmap:",),
            ("qemu:dirty-bitmap:b0",),
            ("foo:bar", "base:"),
            ("", "base", "qemu", "base:x", "qemu:all", ":", "qemu:dirty-bitmap"),
            ("x" * 5000,),
        )
    ],
    "set contexts": [(8, b"")]
    + [
        (10, raw.meta("r", *queries))
        for queries in (
            (),
            ("base:",),
            ("qemu:",),
            ("base:allocation", "qemu:allocation-depth"),
            ("qemu:allocation-depth", "base:allocation"),
            ("qemu:dirty-bitmap:",),
            ("foo:bar",),
            ("x" * 5000, "base:allocation"),
        )
    ],
    "bad contexts": [
        (8, b""),
        (9, raw.meta("nosuch")),
        (10, raw.meta("nosuch", "base:allocation")),
        (9, raw.meta("x" * 100)),
        (9, b""),
        (9, raw.string("r")),
        (9, raw.string("r") + b"\0\0\0\1"),
        (9, raw.string("r") + b"\0\0\0\1\0\0\0\7ab"),
        (10, raw.string("r") + b"\xff\xff\xff\xff"),
        (9, raw.meta("x" * 4097)),
    ],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(pair: tuple[str, str], name: str) -> None:
    both(pair, lambda client: [client.greet(), *(client.option(*step) for step in OPTIONS[name])])


@pytest.mark.parametrize("flags", [0, 1, 2, 3, 4, 0xFFFFFFFF])
def test_client_flags(pair: tuple[str, str], flags: int) -> None:
    both(pair, lambda client: [client.greet(flags), client.option(3), client.option(7, raw.info("r"))])


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["r", "ro", "nosuch", "x" * 4097])
def test_export_name(pair: tuple[str, str], flags: int, name: str) -> None:
    def session(client: RawClient) -> Any:
        client.greet(flags)
        try:
            found = client.export_name(name, zeroes=not flags & 2)
        except raw.Closed:
            return "closed"
        return found, client.ask(raw.READ, MiB, 10)

    both(pair, session)


def test_export_name_after_extended_headers(pair: tuple[str, str]) -> None:
    def session(client: RawClient) -> Any:
        client.greet()
        client.option(raw.OPT_EXTENDED_HEADERS)
        with pytest.raises(raw.Closed):
            client.export_name("r")
        return True

    both(pair, session)


def test_oversized_option(pair: tuple[str, str]) -> None:
    both(pair, lambda client: [client.greet(), client.option(3, b"", (32 << 20) + 1)])


def test_bad_option_magic(pair: tuple[str, str]) -> None:
    def session(client: RawClient) -> Any:
        client.greet()
        client.send(b"x" * 16)
        return client.at_eof()

    both(pair, session)


# --- transmission ---

MODES: dict[str, dict[str, Any]] = {"simple": {"structured": False}, "structured": {}, "extended": {"extended": True}}

REQUESTS: list[tuple[Any, ...]] = [
    (raw.READ, MiB - 4096, 8192),
    (raw.READ, MiB - 4096, 8192, b"", raw.DF),
    (raw.READ, 0, 8192),
    (raw.READ, MiB + 10, 20),
    (raw.READ, 3 * MiB + 255, 600),
    (raw.READ, 0, 4 * MiB),
    (raw.READ, 0, 4 * MiB, b"", raw.DF),
    (raw.READ, 4 * MiB - 10, 20),
    (raw.READ, 4 * MiB, 0),
    (raw.READ, 4 * MiB + 1, 0),
    (raw.READ, 0, 0),
    (raw.READ, 1 << 63, 10),
    (raw.READ, (1 << 64) - 5, 10),
    (raw.READ, 0, (32 << 20) + 1),
    (raw.READ, 0, 0xFFFFFFFF),
    (raw.READ, 0, 16, b"", raw.FUA),
    (raw.READ, 0, 16, b"", raw.DF | raw.REQ_ONE),
    (raw.READ, 0, 16, b"", 0x8000),
    (raw.WRITE, 0, 0),
    (raw.WRITE, 0, 0, b"", raw.FUA),
    (raw.WRITE, 4 * MiB - 1, 2, b"zz"),
    (raw.WRITE, 1 << 62, 2, b"zz"),
    (raw.WRITE, 0, 4, b"abcd", raw.NO_HOLE),
    (raw.WRITE, 0, 100000, b"z" * 100000, 0x8000),
    (raw.WRITE, 0, 4, b"abcd"),
    (raw.WRITE, 1000, 4, b"abcd", raw.FUA),
    (raw.WRITE, 5, 300000, b"w" * 300000),
    (raw.READ, 0, 310000),
    (raw.FLUSH,),
    (raw.FLUSH, 1, 1),
    (raw.FLUSH, 1 << 50, 0),
    (raw.FLUSH, 0, 0, b"", raw.FUA),
    (raw.FLUSH, 0, 0, b"", raw.DF),
    (raw.TRIM, 4 * MiB, 1),
    (raw.TRIM, 2 * MiB, 0),
    (raw.TRIM, 2 * MiB, 65536, b"", raw.FUA),
    (raw.TRIM, 1, 10),
    (raw.TRIM, 0, 16, b"", raw.NO_HOLE),
    (raw.CACHE, 0, 1000),
    (raw.CACHE, 0, 0),
    (raw.CACHE, 0, 4 * MiB),
    (raw.CACHE, 4 * MiB, 1),
    (raw.CACHE, 0, 33 * MiB),
    (raw.CACHE, 0, 16, b"", raw.FUA),
    (raw.CACHE, 0, 16, b"", raw.DF),
    (raw.WRITE_ZEROES, 0, 100),
    (raw.READ, 0, 8192),
    (raw.WRITE_ZEROES, 4 * MiB, 1),
    (raw.WRITE_ZEROES, 0, 4096, b"", raw.NO_HOLE),
    (raw.WRITE_ZEROES, 8192, 4096, b"", raw.NO_HOLE | raw.FUA),
    (raw.WRITE_ZEROES, 0, 65536, b"", raw.FAST_ZERO),
    (raw.WRITE_ZEROES, 0, 65536, b"", raw.DF),
    (raw.WRITE_ZEROES, 0, 0),
    (raw.READ, 0, 310000),
    (raw.BLOCK_STATUS, 0, 4096),
    (raw.BLOCK_STATUS, 0, 0),
    (raw.BLOCK_STATUS, 4 * MiB, 1),
    (raw.BLOCK_STATUS, 4 * MiB, 0),
    (raw.BLOCK_STATUS, 0, 10, b"", raw.NO_HOLE),
    (8, 0, 0),
    (77, 0, 10, b"", raw.FUA),
    (77, 1 << 62, 10),
    (0x100, 0, 10),
    (0xFFFF, 0, 10, b"", 0xFFDF),
]


def content(replies: list[Any], request: tuple[Any, ...]) -> Any:
    """Replies with data: the data and how it ends, for a hole and zeroes in a data chunk mean the same."""
    if request[0] != raw.READ or any(reply[0] == "closed" for reply in replies):
        return replies
    if replies[0][0] == "simple" or replies[-1][2] & 0x8000 or not request[2]:
        return replies
    out = bytearray(request[2])
    for _, _, chunk, payload, *_ in replies:
        start = struct.unpack(">Q", payload[:8])[0] - request[1]
        if chunk == 1:
            out[start : start + len(payload) - 8] = payload[8:]
        else:
            assert chunk == 2
    return replies[0][0], bytes(out), len(replies) if len(request) > 4 and request[4] & raw.DF else None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["ro", "w"])
def test_requests(pair: tuple[str, str], name: str, mode: str) -> None:
    def session(client: RawClient) -> Any:
        client.go(name, **MODES[mode])
        return [(request[:3], content(client.ask(*request), request)) for request in REQUESTS]

    both(pair, session)


STATUS: list[tuple[Any, ...]] = [
    (raw.BLOCK_STATUS, 0, 4096),
    (raw.BLOCK_STATUS, 0, 0),
    (raw.BLOCK_STATUS, 0, 4 * MiB),
    (raw.BLOCK_STATUS, 0, 4 * MiB, b"", raw.REQ_ONE),
    (raw.BLOCK_STATUS, 100, 4 * MiB - 100),
    (raw.BLOCK_STATUS, 100, 4 * MiB - 100, b"", raw.REQ_ONE | raw.FUA),
    (raw.BLOCK_STATUS, 65536, 65536),
    (raw.BLOCK_STATUS, 65537, 65536),
    (raw.BLOCK_STATUS, MiB + 1, 1),
    (raw.BLOCK_STATUS, 4 * MiB, 1),
    (raw.BLOCK_STATUS, 0, 10, b"", raw.NO_HOLE),
    (raw.BLOCK_STATUS, 0, 10, b"", raw.PAYLOAD_LEN << 1),
]


@pytest.mark.parametrize("mode", ["structured", "extended"])
@pytest.mark.parametrize("contexts", [("base:allocation",), ("qemu:allocation-depth", "base:allocation")])
@pytest.mark.parametrize("name", ["q", "r"])
def test_block_status(pair: tuple[str, str], name: str, contexts: tuple[str, ...], mode: str) -> None:
    def session(client: RawClient) -> Any:
        client.go(name, contexts=contexts, **MODES[mode])
        return client.contexts, client.flags, [client.ask(*request) for request in STATUS]

    both(pair, session)


def payload(length: int, *ids: int) -> bytes:
    return struct.pack(f">Q{len(ids)}I", length, *ids)


def test_block_status_payloads(pair: tuple[str, str]) -> None:
    payloads = [
        payload(4 * MiB, 0),
        payload(4 * MiB, 1),
        payload(4 * MiB, 7),
        payload(4 * MiB, 1, 0),
        payload(4 * MiB, 1, 1),
        payload(4 * MiB),
        payload(4 * MiB) + b"x",
        payload(4 * MiB + 1, 0),
        payload(1 << 63, 0),
        payload(0, 0),
        b"",
        payload(1, *range(2000)),
    ]

    def session(client: RawClient) -> Any:
        client.go("q", extended=True, contexts=("qemu:allocation-depth", "base:allocation"))
        out = [client.ask(raw.BLOCK_STATUS, 0, len(data), data, raw.PAYLOAD_LEN) for data in payloads]
        for kind in (raw.READ, raw.TRIM, raw.FLUSH, 77):
            out.append(client.ask(kind, 0, 4, b"abcd", raw.PAYLOAD_LEN))
        return out, client.ask(raw.READ, 0, 4)[0][0]

    both(pair, session)


@pytest.mark.parametrize("mode", MODES)
def test_large_requests(pair: tuple[str, str], mode: str) -> None:
    """Lengths without payload, up to what the mode can say."""
    longest = 1 << 40 if mode == "extended" else 0xFFFFFFFF
    requests: list[tuple[Any, ...]] = [
        (raw.WRITE_ZEROES, 0, longest),
        (raw.TRIM, 0, longest),
        (raw.CACHE, 0, longest),
        (raw.BLOCK_STATUS, 0, longest),
        (raw.BLOCK_STATUS, 0, longest, b"", raw.REQ_ONE),
        (raw.BLOCK_STATUS, 1 << 39, min(longest, 1 << 39), b"", raw.REQ_ONE),
        (raw.READ, 5, 32 << 20),
        (raw.READ, 5, 32 << 20, b"", 0 if mode == "simple" else raw.DF),
    ]

    def session(client: RawClient) -> Any:
        client.go("größe", contexts=("base:allocation",) if mode != "simple" else (), **MODES[mode])
        return [content(client.ask(*request), request) for request in requests]

    both(pair, session)


@pytest.mark.parametrize("mode", MODES)
def test_protocol_violations(pair: tuple[str, str], mode: str) -> None:
    """A wrong magic, an oversized write: told once, then the end."""

    def bad_magic(client: RawClient) -> Any:
        client.go("r", **MODES[mode])
        client.request(raw.READ, 0, 10, magic=0x12345678)
        return client.reply(), client.at_eof()

    def oversized(client: RawClient) -> Any:
        client.go("r", **MODES[mode])
        client.request(raw.WRITE, 0, (32 << 20) + 1)
        return client.reply(), client.at_eof()

    def disconnect(client: RawClient) -> Any:
        client.go("r", **MODES[mode])
        client.request(raw.DISC, 5, 10, flags=raw.DF)
        return client.at_eof()

    for session in (bad_magic, oversized, disconnect):
        both(pair, session)


def test_contexts_are_forgotten(pair: tuple[str, str]) -> None:
    """A later SET_META_CONTEXT replaces the one before, also when it fails; another export has no contexts."""

    def failed(client: RawClient) -> Any:
        client.greet()
        client.option(raw.OPT_STRUCTURED_REPLY)
        client.option(raw.OPT_SET_META_CONTEXT, raw.meta("r", "base:allocation"))
        client.option(raw.OPT_SET_META_CONTEXT, raw.meta("nosuch", "base:allocation"))
        return client.option(raw.OPT_GO, raw.info("r")), client.ask(raw.BLOCK_STATUS, 0, 10)

    def other(client: RawClient) -> Any:
        client.greet()
        client.option(raw.OPT_STRUCTURED_REPLY)
        client.option(raw.OPT_SET_META_CONTEXT, raw.meta("r", "base:allocation"))
        return client.option(raw.OPT_GO, raw.info("ro")), client.ask(raw.BLOCK_STATUS, 0, 10)

    both(pair, failed)
    both(pair, other)


@pytest.mark.parametrize("name", ["r", "ro", "q"])
def test_what_clients_see(pair: tuple[str, str], name: str) -> None:
    outputs = []
    for path in pair:
        uri = f"nbd+unix:///{name}?socket={path}"
        outputs.append(
            [
                peers.run("nbdinfo", *arguments, uri).stdout.replace(path, "SOCKET")
                for arguments in (("--json",), ("--map",), ("--map=qemu:allocation-depth",), ("--size",))
                if name != "ro" or "depth" not in arguments[0]
            ]
        )
        outputs[-1].append(peers.run("qemu-img", "map", "--output=json", "-f", "raw", uri).stdout.replace(path, "S"))
        outputs[-1].append(peers.run("qemu-nbd", "--list", "-k", path).stdout)
    for theirs, ours in zip(*outputs, strict=True):
        assert ours == theirs
