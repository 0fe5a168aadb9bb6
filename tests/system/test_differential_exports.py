"""Differential: block-export-*, query-block-exports, nbd-server-*; and what NBD clients see of them."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.support import nbd, peers
from tests.support.nbd import NbdClient, NbdError
from tests.system.differential import Context, Do, Event, Session, add, check_session, cmd, delete
from tests.system.test_differential_blockdev import NBD_START, export, null, qcow2, raw

LIST = cmd("query-block-exports")


def inet(**more: Any) -> dict[str, Any]:
    return {"type": "inet", "data": {"host": "127.0.0.1", "port": "0", **more}}


def nbdinfo(*args: str, name: str = "", label: str = "") -> Do:
    """nbdinfo on an export, without what names the socket."""

    def run(context: Context) -> Any:
        uri = f"nbd+unix:///{name}?socket={context.workdir / 'nbd.sock'}"
        done = peers.run("nbdinfo", *args, uri, ok=())
        text = done.stdout.replace(str(context.workdir), "WORKDIR")
        if "--json" in args and done.returncode == 0:
            return [done.returncode, json.loads(text)]
        return [done.returncode, text.splitlines(), done.stderr.replace(str(context.workdir), "WORKDIR").splitlines()]

    return Do(label or f"nbdinfo {' '.join(args)} {name}", run)


def client(label: str, action: Any, export_name: str | None = None, **options: Any) -> Do:
    """Something done with a raw client connection; an NBD error is a result, too."""

    def run(context: Context) -> Any:
        try:
            with NbdClient(context.workdir / "nbd.sock", export_name, **options) as connection:
                return action(connection)
        except NbdError as error:
            return {"nbd error": error.number, "text": error.text}
        except (EOFError, ConnectionError) as error:
            return {"closed": type(error).__name__}

    return Do(label, run)


def hexed(replies: list[tuple[int, bytes]]) -> list[Any]:
    return [[kind, payload.hex()] for kind, payload in replies]


def texted(replies: list[tuple[int, bytes]]) -> list[Any]:
    return [[kind, payload.decode("latin1")] for kind, payload in replies]


def attempt(connection: NbdClient, *args: Any, **kwargs: Any) -> Any:
    """One request: what it means, in whatever pieces it came. With NBD_CMD_FLAG_DF that is one piece."""
    cookie = connection.send(*args, **kwargs)
    reply = connection.receive()
    assert reply.cookie == cookie
    command, offset, length, flags = (*args, 0)[:4]
    answer: dict[str, Any] = {"error": reply.error, "text": reply.text}
    if command == nbd.CMD_BLOCK_STATUS:
        answer["extents"] = {str(number): extents for number, extents in reply.extents.items()}
    if command == nbd.CMD_READ and not reply.error:
        answer["crc"] = zlib.crc32(NbdClient.assemble(reply, offset, length))
        if flags & nbd.F_DF:
            answer["pieces"] = len(reply.data) + len(reply.holes)
    return answer


def pieces(*requests: tuple[Any, ...]) -> Any:
    """Of several reads, the pieces that the answers came in."""

    def run(connection: NbdClient) -> Any:
        result = []
        for request in requests:
            connection.send(*request)
            reply = connection.receive()
            result.append([[at, len(data)] for at, data in sorted(reply.data.items())] + [["holes", reply.holes]])
        return result

    return run


def each(*requests: tuple[Any, ...]) -> Any:
    """Several requests on one connection, each with its answer."""

    def run(connection: NbdClient) -> Any:
        return [[repr(request)[:80], attempt(connection, *request)] for request in requests]

    return run


READ, WRITE, FLUSH, TRIM, CACHE, ZERO, STATUS = (
    nbd.CMD_READ,
    nbd.CMD_WRITE,
    nbd.CMD_FLUSH,
    nbd.CMD_TRIM,
    nbd.CMD_CACHE,
    nbd.CMD_WRITE_ZEROES,
    nbd.CMD_BLOCK_STATUS,
)
MiB = 1 << 20
ALL_INFO = (nbd.INFO_EXPORT, nbd.INFO_NAME, nbd.INFO_DESCRIPTION, nbd.INFO_BLOCK_SIZE)

# Requests that a server has to refuse, or that are at the edge; for a 4 MiB export.
EDGES = (
    (READ, 0, 0),
    (READ, 0, 1),
    (READ, 4 * MiB - 1, 1),
    (READ, 4 * MiB - 1, 2),
    (READ, 4 * MiB, 1),
    (READ, 4 * MiB, 0),
    (READ, 1 << 63, 512),
    (READ, (1 << 64) - 512, 512),
    (READ, (1 << 64) - 1, 2),
    (READ, 0, 32 * MiB + 1),
    (READ, 0, 0xFFFFFFFF),
    (READ, 0, 512, nbd.F_FUA),
    (READ, 0, 512, nbd.F_DF),
    (READ, 0, 512, nbd.F_NO_HOLE),
    (READ, 0, 512, nbd.F_REQ_ONE),
    (READ, 0, 512, nbd.F_FAST_ZERO),
    (READ, 0, 512, 0x8000),
    (WRITE, 4 * MiB - 1, 2, 0, b"ab"),
    (WRITE, 4 * MiB, 1, 0, b"a"),
    (WRITE, 1 << 63, 2, 0, b"ab"),
    (WRITE, 0, 2, nbd.F_NO_HOLE, b"ab"),
    (WRITE, 0, 2, nbd.F_DF, b"ab"),
    (WRITE, 0, 2, nbd.F_FUA, b"ab"),
    (WRITE, 0, 0, 0, b""),
    (FLUSH, 0, 0),
    (FLUSH, 0, 0, nbd.F_FUA),
    (FLUSH, 512, 512),
    (TRIM, 0, 0),
    (TRIM, 0, 512),
    (TRIM, 4 * MiB, 512),
    (TRIM, 4 * MiB - 512, 1024),
    (TRIM, 0, 512, nbd.F_FUA),
    (TRIM, 0, 512, nbd.F_NO_HOLE),
    (TRIM, 0, 0xFFFFFFFF),
    (ZERO, 0, 0),
    (ZERO, 1, 1),
    (ZERO, 4 * MiB, 512),
    (ZERO, 4 * MiB - 512, 1024),
    (ZERO, 0, 512, nbd.F_FUA),
    (ZERO, 0, 512, nbd.F_NO_HOLE),
    (ZERO, 0, 512, nbd.F_FUA | nbd.F_NO_HOLE),
    (ZERO, 0, 512, nbd.F_DF),
    (ZERO, 0, 0xFFFFFFFF),
    (CACHE, 0, 0),
    (CACHE, 0, 512),
    (CACHE, 0, 512, nbd.F_FUA),
    (CACHE, 4 * MiB, 1),
    (CACHE, 0, 33 * MiB),
    (STATUS, 0, 512),
    (STATUS, 0, 4 * MiB, nbd.F_REQ_ONE),
    (42, 0, 512),
    (0xFFFF, 0, 0),
    (READ, 0, 512),
)

READS = (
    (READ, 0, 4 * MiB),
    (READ, 0, 4 * MiB, nbd.F_DF),
    (READ, 65536, 200000),
    (READ, 100, 131072),
    (READ, MiB - 100, 70000),
    (READ, 2 * MiB, 65536),
    (READ, 3 * MiB, 512),
)


def query(name: str, *queries: str) -> bytes:
    return NbdClient.meta_query(name, queries)


HANDSHAKE = [
    client("greeting flags", lambda c: c.server_flags),
    client("list", lambda c: c.list_exports()),
    client("list with data", lambda c: hexed(c.option(nbd.OPT_LIST, b"x"))),
    client("unknown option", lambda c: texted(c.option(99, b"abc"))),
    client("peek exchange option", lambda c: texted(c.option(4, b""))),
    client("starttls", lambda c: texted(c.option(nbd.OPT_STARTTLS))),
    client("starttls with data", lambda c: texted(c.option(nbd.OPT_STARTTLS, b"x"))),
    client("structured", lambda c: hexed(c.option(nbd.OPT_STRUCTURED_REPLY))),
    client(
        "structured twice",
        lambda c: hexed(c.option(nbd.OPT_STRUCTURED_REPLY)) + texted(c.option(nbd.OPT_STRUCTURED_REPLY)),
    ),
    client("structured with data", lambda c: texted(c.option(nbd.OPT_STRUCTURED_REPLY, b"x"))),
    client("extended", lambda c: hexed(c.option(nbd.OPT_EXTENDED_HEADERS))),
    client("extended with data", lambda c: texted(c.option(nbd.OPT_EXTENDED_HEADERS, b"x"))),
    client(
        "extended then structured",
        lambda c: texted(c.option(nbd.OPT_EXTENDED_HEADERS)) + texted(c.option(nbd.OPT_STRUCTURED_REPLY)),
    ),
    client(
        "structured then extended",
        lambda c: texted(c.option(nbd.OPT_STRUCTURED_REPLY)) + texted(c.option(nbd.OPT_EXTENDED_HEADERS)),
    ),
    client(
        "extended twice",
        lambda c: texted(c.option(nbd.OPT_EXTENDED_HEADERS)) + texted(c.option(nbd.OPT_EXTENDED_HEADERS)),
    ),
    client("abort", lambda c: [hexed(c.option(nbd.OPT_ABORT)), c.wait_closed().hex()]),
    client("abort with data", lambda c: hexed(c.option(nbd.OPT_ABORT, b"x"))),
    client("info", lambda c: hexed(c.option(nbd.OPT_INFO, c.info_request("q", ALL_INFO)))),
    client("info nothing asked", lambda c: hexed(c.option(nbd.OPT_INFO, c.info_request("q")))),
    client("info default name", lambda c: texted(c.option(nbd.OPT_INFO, c.info_request("")))),
    client("info no such export", lambda c: texted(c.option(nbd.OPT_INFO, c.info_request("nosuch")))),
    client("info unknown type", lambda c: hexed(c.option(nbd.OPT_INFO, c.info_request("q", (77, 3))))),
    client("info described", lambda c: hexed(c.option(nbd.OPT_INFO, c.info_request("described", ALL_INFO)))),
    client("info empty", lambda c: texted(c.option(nbd.OPT_INFO, b""))),
    client("info short", lambda c: texted(c.option(nbd.OPT_INFO, b"\0\0\0\1q"))),
    client("info trailing", lambda c: texted(c.option(nbd.OPT_INFO, c.info_request("q") + b"xx"))),
    client("info odd count", lambda c: texted(c.option(nbd.OPT_INFO, c.info_request("q")[:-2] + b"\0\5"))),
    client("info name too long", lambda c: texted(c.option(nbd.OPT_INFO, struct.pack(">I", 5000) + b"x" * 5000))),
    client("info name length lies", lambda c: texted(c.option(nbd.OPT_INFO, struct.pack(">I", 0xFFFFFFFF) + b"q\0\0"))),
    client("info after info", lambda c: [hexed(c.option(nbd.OPT_INFO, c.info_request("q"))) for _ in range(2)]),
    client("go", lambda c: hexed(c.option(nbd.OPT_GO, c.info_request("q", ALL_INFO)))),
    client("go read-only", lambda c: hexed(c.option(nbd.OPT_GO, c.info_request("ro", ALL_INFO)))),
    client("go no such export", lambda c: texted(c.option(nbd.OPT_GO, c.info_request("nosuch")))),
    client(
        "go after a failed go",
        lambda c: (
            texted(c.option(nbd.OPT_GO, c.info_request("nosuch"))) + hexed(c.option(nbd.OPT_GO, c.info_request("q")))
        ),
    ),
    client("export name", lambda c: [c.export_name("q"), c.size, c.flags, c.pread(0, 4).hex()]),
    client("export name unknown", lambda c: [c.send_option(nbd.OPT_EXPORT_NAME, b"nosuch"), c.wait_closed().hex()]),
    client("export name empty", lambda c: [c.send_option(nbd.OPT_EXPORT_NAME, b""), c.wait_closed().hex()]),
    client(
        "export name too long",
        lambda c: [c.send_option(nbd.OPT_EXPORT_NAME, b"x" * 5000), c.wait_closed().hex()],
    ),
    client(
        "with zeroes",
        lambda c: [c.read_greeting(nbd.FLAG_FIXED_NEWSTYLE), c.export_name("q", no_zeroes=False), c.pread(0, 4).hex()],
        greet=False,
    ),
    client(
        "no client flags",
        lambda c: [c.read_greeting(0), c.export_name("q", no_zeroes=False), c.pread(0, 4).hex()],
        greet=False,
    ),
    client(
        "no client flags, other option",
        lambda c: [c.read_greeting(0), c.send_option(nbd.OPT_LIST), c.wait_closed().hex()],
        greet=False,
    ),
    client("unknown client flags", lambda c: [c.read_greeting(0x80 | 3), c.wait_closed().hex()], greet=False),
    client("bad option magic", lambda c: [c.send_raw(b"x" * 16), c.wait_closed().hex()]),
    client(
        "huge option",
        lambda c: [c.send_raw(struct.pack(">QII", nbd.IHAVEOPT, nbd.OPT_INFO, 0xFFFFFFFF)), c.wait_closed().hex()],
    ),
    client("list contexts", lambda c: [c.option(nbd.OPT_STRUCTURED_REPLY)[0][0], c.list_meta_contexts("q")]),
    client("list contexts without structured", lambda c: texted(c.option(nbd.OPT_LIST_META_CONTEXT, query("q")))),
    *(
        client(
            f"{title} {queries} of {name}",
            lambda c, option=option, name=name, queries=queries: [
                c.option(nbd.OPT_STRUCTURED_REPLY)[0][0],
                texted(c.option(option, query(name, *queries))),
            ],
        )
        for title, option in (("list", nbd.OPT_LIST_META_CONTEXT), ("set", nbd.OPT_SET_META_CONTEXT))
        for name in ("q", "nosuch")
        for queries in (
            ("base:",),
            ("base:allocation",),
            ("base:nosuch",),
            ("qemu:",),
            ("qemu:allocation-depth",),
            ("qemu:dirty-bitmap:",),
            ("qemu:dirty-bitmap:nosuch",),
            ("qemu:nosuch",),
            ("nosuch:",),
            ("",),
            ("nocolon",),
            ("base:allocation", "qemu:allocation-depth"),
            ("base:allocation", "base:allocation"),
            ("x" * 5000,),
        )
    ),
    client(
        "set contexts without structured", lambda c: texted(c.option(nbd.OPT_SET_META_CONTEXT, query("q", "base:")))
    ),
    client(
        "set then other export",
        lambda c: [
            c.option(nbd.OPT_STRUCTURED_REPLY)[0][0],
            texted(c.option(nbd.OPT_SET_META_CONTEXT, query("q", "base:allocation"))),
            c.go("ro"),
            setattr(c, "structured", True),
            attempt(c, STATUS, 0, 65536),
        ][-1],
    ),
    client(
        "set none",
        lambda c: [
            c.option(nbd.OPT_STRUCTURED_REPLY)[0][0],
            texted(c.option(nbd.OPT_SET_META_CONTEXT, query("q"))),
        ],
    ),
    client(
        "contexts cut short",
        lambda c: [
            c.option(nbd.OPT_STRUCTURED_REPLY)[0][0],
            *(
                texted(c.option(nbd.OPT_SET_META_CONTEXT, query("q", "base:allocation")[:n]))
                for n in (0, 3, 4, 5, 8, 9, 12)
            ),
        ],
    ),
    client(
        "contexts with a tail",
        lambda c: [
            c.option(nbd.OPT_STRUCTURED_REPLY)[0][0],
            texted(c.option(nbd.OPT_SET_META_CONTEXT, query("q", "base:allocation") + b"x")),
        ],
    ),
]

SERVED = [
    NBD_START,
    qcow2("q", "plain.qcow2", discard="unmap"),
    raw("ro"),
    null("zero", size=4 * MiB, read_zeroes=True),
    export("q", "q", writable=True),
    export("ro", "ro"),
    export("d", "zero", writable=True, name="described", description="what it is"),
]

SESSIONS = [
    Session(
        "nbd-server-start",
        [
            LIST,
            cmd("nbd-server-stop"),
            cmd("nbd-server-add", device="x"),
            cmd("nbd-server-remove", name="x"),
            cmd("nbd-server-start"),
            cmd("nbd-server-start", addr={}),
            cmd("nbd-server-start", addr={"type": "nosuch"}),
            cmd("nbd-server-start", addr={"type": "unix"}),
            cmd("nbd-server-start", addr={"type": "unix", "data": {}}),
            cmd("nbd-server-start", addr={"type": "unix", "path": "nbd.sock"}),
            cmd("nbd-server-start", addr={"type": "unix", "data": {"path": "nodir/nbd.sock"}}),
            cmd("nbd-server-start", addr={"type": "unix", "data": {"path": "x" * 200}}),
            cmd("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1"}}),
            cmd("nbd-server-start", addr=inet(port=10809)),
            cmd("nbd-server-start", addr=inet(port="nosuchservice")),
            cmd("nbd-server-start", addr=inet(port="70000")),
            cmd("nbd-server-start", addr=inet(ipv4=False, ipv6=False)),
            cmd("nbd-server-start", addr={"type": "fd", "data": {"str": "nosuch"}}),
            cmd("nbd-server-start", addr={"type": "fd", "data": {"str": "999"}}),
            cmd("nbd-server-start", addr={"type": "fd", "data": {"str": "-1"}}),
            cmd("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}}, max_connections=-1),
            cmd("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}}, max_connections="1"),
            cmd("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}}, tls_creds="nosuch"),
            cmd("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}}, nosuch=1),
            NBD_START,
            NBD_START,
            cmd("nbd-server-stop"),
            Do("the socket is gone", lambda c: (c.workdir / "nbd.sock").exists()),
            cmd("nbd-server-stop"),
            cmd("nbd-server-start", addr=inet()),
            cmd("nbd-server-stop"),
            cmd("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": "0", "to": 100}}),
            cmd("nbd-server-stop"),
            cmd("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}}, max_connections=0),
            cmd("nbd-server-stop"),
        ],
    ),
    Session(
        "export-add-errors",
        [
            null("n", size=65536),
            null("ro", size=65536, read_only=True),
            export("e", "n"),
            NBD_START,
            cmd("block-export-add"),
            cmd("block-export-add", type="nbd"),
            cmd("block-export-add", id_="e", node_name="n"),
            cmd("block-export-add", type="nosuch", id_="e", node_name="n"),
            cmd("block-export-add", type="nbd", id_="e"),
            cmd("block-export-add", type="nbd", node_name="n"),
            cmd("block-export-add", type=1, id_="e", node_name="n"),
            export("1e", "n"),
            export("", "n"),
            export("a b", "n"),
            export("e", "nosuch"),
            export("e", ""),
            export("e", "n", nosuch=1),
            export("e", "n", writable="on"),
            export("e", "n", writethrough=1),
            export("e", "n", name=1),
            export("e", "n", name="x" * 4096),
            export("e", "n", name="x" * 4097),
            cmd("block-export-del", id_="e"),
            Event("BLOCK_EXPORT_DELETED"),
            export("e", "n", description="x" * 4097),
            export("e", "n", description=1),
            export("e", "n", bitmaps=["nosuch"]),
            export("e", "n", bitmaps="nosuch"),
            export("e", "n", bitmaps=[{"node": "n", "name": "nosuch"}]),
            export("e", "n", bitmaps=[{"node": "nosuch", "name": "b"}]),
            export("e", "n", bitmaps=[{"node": "n"}]),
            export("e", "n", bitmaps=[1]),
            export("e", "n", allocation_depth="on"),
            export("e", "n", iothread="nosuch"),
            export("e", "n", iothread=1),
            export("e", "n", fixed_iothread=True),
            export("e", "ro", writable=True),
            LIST,
            export("e", "n"),
            export("e", "n"),
            export("e2", "n"),
            export("e2", "n", name="other"),
            export("e3", "ro", name="other"),
            export("e3", "ro", name=""),
            LIST,
            delete("n"),
            cmd("block-export-del"),
            cmd("block-export-del", id_="nosuch"),
            cmd("block-export-del", id_=1),
            cmd("block-export-del", id_="e", mode="nosuch"),
            cmd("block-export-del", id_="e", mode="safe"),
            Event("BLOCK_EXPORT_DELETED"),
            cmd("block-export-del", id_="e"),
            cmd("block-export-del", id_="e2", mode="hard"),
            Event("BLOCK_EXPORT_DELETED"),
            LIST,
            cmd("nbd-server-stop"),
            Event("BLOCK_EXPORT_DELETED"),
            LIST,
            delete("n"),
        ],
    ),
    Session(
        "export-del-modes",
        [
            NBD_START,
            null("n", size=65536),
            export("e", "n"),
            Do("connect", lambda c: c.keep.update(nbd=NbdClient(c.workdir / "nbd.sock", "n"))),
            cmd("block-export-del", id_="e"),
            cmd("block-export-del", id_="e", mode="safe"),
            LIST,
            Do("still served", lambda c: len(c.keep["nbd"].pread(0, 512))),
            cmd("block-export-del", id_="e", mode="hard"),
            Event("BLOCK_EXPORT_DELETED"),
            Do("cut", lambda c: c.keep["nbd"].wait_closed().hex()),
            LIST,
            export("e", "n"),
            Do("connect again", lambda c: c.keep.update(nbd=NbdClient(c.workdir / "nbd.sock", "n"))),
            cmd("nbd-server-stop"),
            Do("cut by stop", lambda c: c.keep["nbd"].wait_closed().hex()),
            LIST,
        ],
    ),
    Session(
        "nbd-server-add-remove",
        [
            NBD_START,
            null("n", size=65536),
            cmd("nbd-server-add"),
            cmd("nbd-server-add", device="nosuch"),
            cmd("nbd-server-add", device="n", bitmap="nosuch"),
            cmd("nbd-server-add", device="n", name="x" * 5000),
            cmd("nbd-server-add", device="n"),
            cmd("nbd-server-add", device="n"),
            cmd("nbd-server-add", device="n", name="second", writable=True, description="text"),
            LIST,
            client("list", lambda c: c.list_exports()),
            cmd("nbd-server-remove"),
            cmd("nbd-server-remove", name="nosuch"),
            cmd("nbd-server-remove", name="n", mode="nosuch"),
            cmd("nbd-server-remove", name="n"),
            Event("BLOCK_EXPORT_DELETED"),
            cmd("nbd-server-remove", name="n"),
            cmd("nbd-server-remove", name="second", mode="hard"),
            Event("BLOCK_EXPORT_DELETED"),
            LIST,
        ],
    ),
    Session("nbd-handshake", [*SERVED, *HANDSHAKE], images=("plain.qcow2", "raw.img")),
    Session(
        "nbd-requests",
        [
            *SERVED,
            client("edges simple", each(*EDGES), "q", structured=False),
            client("edges structured", each(*EDGES), "q"),
            client("edges extended", each(*EDGES), "q", extended=True),
            client("edges structured context", each(*EDGES), "q", contexts=("base:allocation",)),
            client(
                "edges read-only", each((WRITE, 0, 2, 0, b"ab"), (TRIM, 0, 512), (ZERO, 0, 512), (READ, 0, 1)), "ro"
            ),
            client("reads simple", each(*READS), "q", structured=False),
            client("reads structured", each(*READS), "q"),
            client("reads extended", each(*READS), "q", extended=True),
            client("read null", each((READ, 0, 65536), (ZERO, 0, 65536, nbd.F_FAST_ZERO)), "described"),
            client("fast zero", each((ZERO, 0, 65536, nbd.F_FAST_ZERO), (ZERO, 1, 5, nbd.F_FAST_ZERO)), "q"),
            client("bad magic", lambda c: [c.send_raw(b"\1" * 28), c.wait_closed().hex()], "q"),
            client(
                "too long a write",
                lambda c: [c.send_raw(c.pack_request(WRITE, 0, 33 * MiB)), c.wait_closed().hex()],
                "q",
            ),
            client("disconnect", lambda c: [c.send_raw(c.pack_request(nbd.CMD_DISC)), c.wait_closed().hex()], "q"),
            "query-block-exports",
        ],
        images=("plain.qcow2", "raw.img"),
    ),
    Session(
        "nbd-pieces",
        [
            *SERVED,
            client("tables come to memory", each((READ, 0, 512)), "q"),
            client("nothing but zeroes", pieces((READ, 2 * MiB, 65536), (READ, 3 * MiB, MiB)), "q"),
            client("nothing but data", pieces((READ, 0, 131072), (READ, 4096, 4096), (READ, MiB, 65536)), "q"),
            client("null", pieces((READ, 0, 65536)), "described"),
            client("mixed", pieces(*READS), "q"),
            client("mixed, extended", pieces(*READS), "q", extended=True),
            client("small zeroes", pieces((READ, MiB // 2, 4096), (READ, 3 * MiB, 512), (READ, 4 * MiB - 1, 1)), "q"),
        ],
        images=("plain.qcow2", "raw.img"),
    ),
    Session(
        "nbd-block-status",
        [
            NBD_START,
            qcow2("top", "top.qcow2", discard="unmap"),
            qcow2("plain", "plain.qcow2"),
            qcow2("zstd", "zstd.qcow2"),
            raw("r"),
            null("n", size=MiB),
            null("z", size=MiB, read_zeroes=True),
            raw("part", "odd.img"),
            *(
                export(f"e-{name}", name, allocation_depth=True)
                for name in ("top", "plain", "zstd", "r", "n", "z", "part")
            ),
            *(
                nbdinfo(*args, name=name)
                for name in ("top", "plain", "zstd", "r", "n", "z", "part", "nosuch")
                for args in (
                    ("--json", "--no-content") if name == "n" else ("--json",),  # null-co: whatever is in memory
                    ("--map",),
                    ("--map=qemu:allocation-depth",),
                    ("--map", "--json"),
                    ("--map=nosuch:x",),
                )
            ),
            nbdinfo("--list", "--json"),
            *(
                client(
                    f"status {name} {'extended' if extended else ''}",
                    each(
                        (STATUS, 0, MiB),
                        (STATUS, 0, MiB, nbd.F_REQ_ONE),
                        (STATUS, 100, 1),
                        (STATUS, 65536, 1),
                        (STATUS, 65535, 100000),
                        (STATUS, MiB - 512, 512),
                        (STATUS, 0, 0),
                        (STATUS, 0, MiB, nbd.F_FUA),
                    ),
                    name,
                    extended=extended,
                    contexts=("base:allocation", "qemu:allocation-depth"),
                )
                for name in ("top", "plain", "r", "z")
                for extended in (False, True)
            ),
        ],
        images=("base.qcow2", "mid.qcow2", "top.qcow2", "plain.qcow2", "zstd.qcow2", "raw.img", "odd.img"),
    ),
    Session(
        "nbd-max-connections",
        [
            null("n", size=65536, read_zeroes=True),
            cmd("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}}, max_connections=1),
            export("e", "n"),
            client("first", each((READ, 0, 512)), "n"),
            client("second", each((READ, 0, 512)), "n"),
            client("flags", lambda c: c.flags, "n"),
        ],
    ),
    Session(
        "nbd-flags",
        [
            NBD_START,
            raw("a", discard="unmap"),
            raw("b", "other.img"),
            raw("c", "small.img", read_only=True),
            add(driver="file", node_name="odd", filename="odd.img"),
            export("a", "a", writable=True),
            export("b", "b", writable=True, writethrough=True),
            export("c", "c"),
            export("o", "odd"),
            *(client(f"flags {name}", lambda c: [c.size, c.flags], name) for name in ("a", "b", "c", "odd")),
            *(nbdinfo("--json", name=name) for name in ("a", "b", "c", "odd")),
            client("odd tail", each((READ, 512, 512), (READ, 1000, 24)), "odd"),
        ],
        images=("raw.img", "other.img", "small.img", "odd.img"),
    ),
    Session(
        "export-writethrough",
        [
            NBD_START,
            raw("a"),
            export("a", "a", writable=True, writethrough=True),
            client("write", each((WRITE, 0, 4, 0, b"abcd")), "a"),
            cmd("query-blockstats", query_nodes=True),
        ],
        images=("raw.img",),
    ),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, image_set: Path, tmp_path: Path) -> None:
    check_session(session, image_set, tmp_path)
