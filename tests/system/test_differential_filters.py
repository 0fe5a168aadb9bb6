"""Differential: filter drivers. What they answer, what requests come to through them, and what is in the files then."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import peers
from tests.support.nbd import NbdClient, NbdError
from tests.system.differential import Context, Do, Session, add, check_session, cmd, delete

K = 1024
NODES = cmd("query-named-block-nodes")
GRAPH = cmd("x-debug-query-block-graph")
NBD_START = cmd("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
FILE = {"driver": "file", "filename": "raw.img", "discard": "unmap"}

#: Command flags of NBD. A read that may not be sent in pieces can fail without the end of the connection with QSD.
FUA, NO_HOLE, DF, FAST = 1, 2, 4, 16


def blkdebug(**more: Any) -> dict[str, Any]:
    return {"driver": "blkdebug", **{"image": FILE, **{k.replace("_", "-"): v for k, v in more.items()}}}


def export(node: str, **more: Any) -> dict[str, Any]:
    return cmd("block-export-add", type="nbd", id=f"e-{node}", node_name=node, writable=True, **more)


def unexport(node: str) -> Any:
    """The export goes once its last connection does, which the daemon may not have noticed yet."""

    def run(context: Context) -> Any:
        context.daemon.qmp.execute("block-export-del", id=f"e-{node}", mode="hard")
        context.daemon.qmp.wait_event("BLOCK_EXPORT_DELETED")

    return Do(f"unexport {node}", run)


Request = tuple[Any, ...]


def requests(label: str, node: str, *wanted: Request) -> Do:
    """Each request's outcome: an error number, or what was read."""

    def one(client: NbdClient, name: str, *arguments: Any) -> Any:
        try:
            result = getattr(client, name)(*arguments)
        except NbdError as exc:
            return exc.number
        if isinstance(result, bytes):
            return hashlib.sha256(result).hexdigest()[:16]
        return result

    def run(context: Context) -> Any:
        with NbdClient(context.workdir / "nbd.sock", node) as client:
            results = [one(client, *request) for request in wanted]
            client.disconnect()
        return results

    return Do(label, run)


def content(filename: str = "raw.img") -> Do:
    """What is in the file. (How much space it takes is the file system's business, and differs now and then.)"""

    def run(context: Context) -> Any:
        with open(context.workdir / filename, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()

    return Do(f"content of {filename}", run)


def data(byte: int, length: int) -> bytes:
    return bytes([byte]) * length


#: Writes, zero writes and discards that no alignment likes.
AWKWARD: tuple[Request, ...] = (
    ("pwrite", 0, data(1, 256 * K)),
    ("pwrite", 1000, data(2, 3000)),
    ("pwrite", 4096, data(3, 512)),
    ("pwrite", 8191, data(4, 2), FUA),
    ("pwrite", 10 * K, data(5, 100 * K + 7)),
    ("zero", 12 * K + 100, 300),
    ("zero", 16 * K - 100, 200, FUA),
    ("zero", 20 * K + 512, 40 * K),
    ("zero", 70 * K + 1, 30 * K + 5, NO_HOLE),
    ("zero", 0, 100, FAST),
    ("zero", 104 * K, 8 * K, FAST),
    ("zero", 112 * K + 512, 8 * K, FAST | FUA),
    ("trim", 130 * K + 100, 50 * K),
    ("trim", 200 * K, 512),
    ("trim", 210 * K, 4096),
    ("trim", 215 * K, 33 * K + 1),
    ("pwrite", 300 * K + 5, data(6, 5)),
    ("zero", 1 * K * K - 700, 700),
    ("trim", 1 * K * K - 5000, 5000),
    ("pread", 0, 300 * K),
    ("flush",),
)

LIMITS: dict[str, dict[str, int]] = {
    "none": {},
    "align-512": {"align": 512},
    "align-4096": {"align": 4096},
    "align-64k": {"align": 64 * K},
    "max-transfer": {"align": 512, "max_transfer": 8192},
    "zeroes": {"align": 512, "opt_write_zero": 4096, "max_write_zero": 16384},
    "zeroes-large": {"align": 512, "opt_write_zero": 32 * K, "max_write_zero": 64 * K, "max_transfer": 2048},
    "discard": {"align": 512, "opt_discard": 4096, "max_discard": 8192},
    "discard-large": {"align": 512, "opt_discard": 32 * K},
    "uneven": {"align": 512, "opt_write_zero": 3 * 512, "opt_discard": 15 * 512, "max_transfer": 7 * 512},
}


def limits_session(name: str, limits: dict[str, int]) -> Session:
    # QSD divides by an alignment for discards that was not given, and dies.
    awkward = [request for request in AWKWARD if request[0] != "trim" or "opt_discard" in limits]
    return Session(
        f"blkdebug-limits-{name}",
        [
            NBD_START,
            add(node_name="d", discard="unmap", **blkdebug(**limits)),
            export("d"),
            requests("awkward", "d", *awkward),
            content(),
            unexport("d"),
            delete("d"),
            add(driver="raw", node_name="r", file=blkdebug(**limits), discard="unmap", detect_zeroes="unmap"),
            export("r"),
            requests("through raw", "r", *awkward),
            requests(
                "zeroes as data",
                "r",
                ("pwrite", 400 * K, data(9, 64 * K)),
                ("pwrite", 404 * K, bytes(8 * K)),
                ("pwrite", 420 * K + 100, bytes(1000)),
                ("pwrite", 430 * K + 100, bytes(9000)),
                ("pwrite", 450 * K, bytes(4096) + data(1, 1)),
            ),
            content(),
        ],
        images=("raw.img",),
    )


#: Rules, and a request or two for each that they could be about. Not here: errors while a block is read to be modified.
#: QSD takes no notice of them, and writes something else than there was around the data.
RULES: dict[str, dict[str, Any]] = {
    "read": {"inject_error": [{"event": "read_aio", "errno": 28}]},
    "write-once": {"inject_error": [{"event": "write_aio", "errno": 28, "once": True}]},
    "none": {"inject_error": [{"event": "none", "iotype": "write", "immediately": True}]},
    "flush": {"inject_error": [{"event": "flush_to_disk", "errno": 5, "once": True}]},
    "flush-os": {"inject_error": [{"event": "flush_to_os", "errno": 28}]},
    "sector": {"inject_error": [{"event": "none", "sector": 20}]},
    "status": {"inject_error": [{"event": "none", "iotype": "block-status"}]},
    "discard": {"inject_error": [{"event": "none", "iotype": "discard", "errno": 1}]},
    "zeroes": {"inject_error": [{"event": "none", "iotype": "write-zeroes", "errno": 12}]},
    "zeroes-unsupported": {"inject_error": [{"event": "none", "iotype": "write-zeroes", "errno": 95}]},
    "pwritev": {"inject_error": [{"event": "pwritev", "errno": 28, "once": True, "sector": 0}]},
    "pwritev-done": {"inject_error": [{"event": "pwritev_done", "errno": 28}]},
    "pwritev-zero": {"inject_error": [{"event": "pwritev_zero", "errno": 28}]},
    "rmw-after-tail": {"align": 4096, "inject_error": [{"event": "pwritev_rmw_after_tail", "errno": 28, "once": True}]},
    "states": {
        "set_state": [
            {"event": "write_aio", "state": 1, "new_state": 2},
            {"event": "write_aio", "state": 2, "new_state": 5},
            {"event": "write_aio", "state": 2, "new_state": 6},
        ],
        "inject_error": [
            {"event": "write_aio", "state": 2, "errno": 28},
            {"event": "read_aio", "state": 5, "errno": 5},
            {"event": "flush_to_disk", "state": 5, "errno": 28, "iotype": "read"},
        ],
    },
    "two": {
        "inject_error": [
            {"event": "none", "iotype": "read", "errno": 12, "once": True},
            {"event": "none", "iotype": "read", "errno": 28, "once": True},
            {"event": "write_aio", "iotype": "read", "errno": 1, "once": True},
        ],
    },
    "config": {"config": "rules.ini"},
    "no-error": {"inject_error": [{"event": "none", "errno": 0, "once": True}, {"event": "read_aio"}]},
    "middle": {"align": 512, "max_transfer": 4096, "inject_error": [{"event": "none", "sector": 25, "errno": 28}]},
}

MIXED: tuple[Request, ...] = (
    ("pread", 0, 4096, DF),
    ("pwrite", 0, data(1, 4096)),
    ("pwrite", 8192, data(2, 16384)),
    ("pread", 9000, 3000, DF),
    ("flush",),
    ("pwrite", 100, data(3, 9000)),
    ("pwrite", 9000, data(4, 100)),
    ("flush",),
    ("zero", 4096, 8192),
    ("zero", 30000, 10),
    ("trim", 8192, 8192),
    ("trim", 65536, 65536),
    ("pwrite", 50000, data(5, 4096), FUA),
    ("pread", 0, 65536, DF),
    ("flush",),
    ("pread", 0, 65536, DF),
)


def write_rules(context: Context) -> None:
    (context.workdir / "rules.ini").write_text(
        '# comment\n[inject-error]\nevent = "write_aio"\nerrno = "28"\nsector = "0x10"\nonce = "on"\n\n'
        '[set-state]\nevent = "read_aio"\nstate = "1"\nnew_state = "2"\n'
        '[inject-error "named"]\nevent = "flush_to_disk"\nstate = "2"\nimmediately = "on"\n'
    )


def rules_session(name: str, rules: dict[str, Any]) -> Session:
    return Session(
        f"blkdebug-rules-{name}",
        [
            Do("rules", write_rules),
            NBD_START,
            add(driver="raw", node_name="r", discard="unmap", file=blkdebug(opt_discard=4096, **rules)),
            export("r"),
            requests("requests", "r", *MIXED),
            content(),
        ],
        images=("raw.img",),
    )


def text(name: str, value: str) -> Do:
    return Do(f"write {name}", lambda context: (context.workdir / name).write_text(value))


CONFIGS = (
    '[nosuch]\nevent = "read_aio"\n',
    '[inject-error]\nevent = "nosuch"\n',
    '[inject-error]\nerrno = "5"\n',
    "garbage\n",
    "[inject-error]\nevent = read_aio\n",
    '[inject-error]\nevent="read_aio"\n',
    '[inject-error]\nevent = "read_aio"\nfoo = "5"\n',
    '[inject-error]\nevent = "read_aio"\nerrno = "abc"\n',
    '[inject-error]\nevent = "read_aio"\nerrno = ""\n',
    '[inject-error]\nevent = "read_aio"\nerrno = "99999999999999999999999"\n',
    '[inject-error]\nevent = "read_aio"\nsector = "-4"\n',
    '[inject-error]\nevent = "read_aio"\nonce = "maybe"\n',
    '[inject-error]\nevent = "read_aio"\niotype = "maybe"\n',
    'event = "read_aio"\n',
    '[set-state]\nevent = "read_aio"\n',
    '[set-state]\nevent = "read_aio"\nerrno = "5"\n',
    '  [set-state]\nevent = "read_aio"\n',
    '[set-state]\nevent = "read_aio" trailing\n',
    '[set-state\nevent = "read_aio"\n',
    '[set-state "1"]\nevent = "read_aio"\n',
    '[set-state "a"]\nevent = "read_aio"\n[set-state "a"]\nevent = "read_aio"\n',
    "\t\n[inject-error]\n",
)

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    *({"align": value} for value in (0, 1, 256, 513, -512, 1 << 30, 1 << 31)),
    *({"max_transfer": value} for value in (4096, 4097, -1, 0, 1 << 31)),
    {"max_transfer": 512, "align": 4096},
    *({"opt_write_zero": value} for value in (1, -4096, 1536)),
    {"opt_write_zero": 512, "align": 4096},
    {"max_write_zero": 12288, "opt_write_zero": 8192},
    {"max_discard": 4096, "opt_discard": 8192},
    {"max_discard": 512, "align": 4096},
    {"config": "nosuch"},
    {"config": ""},
    {"config": "."},
    *({"inject_error": value} for value in ("x", [], [{"event": "nosuch"}], [{}], [{"event": "none", "iotype": "x"}])),
    {"set_state": [{"event": "none"}]},
    {"set_state": [{"event": "none", "new-state": 2}]},
    {"take_child_perms": ["nosuch"]},
    {"take_child_perms": []},
)

DESCRIBED: tuple[dict[str, Any], ...] = (
    {},
    {"config": "rules.ini"},
    {"align": 512},
    {"take_child_perms": ["write"]},
    {"unshare_child_perms": ["resize", "consistent-read"]},
    {
        "config": "rules.ini",
        "max_transfer": 4096,
        "inject_error": [{"event": "write_aio", "errno": 5, "sector": 3, "once": False, "immediately": True}],
        "set_state": [{"event": "write_aio", "state": 2, "new_state": 4}],
    },
)


def reopen(**options: Any) -> dict[str, Any]:
    return cmd("blockdev-reopen", options=[{k.replace("_", "-"): v for k, v in options.items()}])


SESSIONS = [
    *(limits_session(name, limits) for name, limits in LIMITS.items()),
    *(rules_session(name, rules) for name, rules in RULES.items()),
    Session(
        "blkdebug-options",
        [
            *(step for o in OPTIONS for step in (add(node_name="d", **blkdebug(**o)), delete("d"))),
            *(
                step
                for number, value in enumerate(CONFIGS)
                for step in (
                    text(f"{number}.ini", value),
                    add(node_name="d", **blkdebug(config=f"{number}.ini")),
                    delete("d"),
                )
            ),
        ],
        images=("raw.img",),
    ),
    Session(
        "blkdebug-described",
        [
            Do("rules", write_rules),
            *(
                step
                for o in DESCRIBED
                for step in (add(node_name="d", **blkdebug(**o)), NODES, GRAPH, cmd("query-blockstats"), delete("d"))
            ),
            add(driver="raw", node_name="r", file=blkdebug(), read_only=True),
            NODES,
            GRAPH,
            delete("r"),
            add(driver="file", node_name="f", filename="raw.img"),
            add(driver="null-co", node_name="n"),
            add(driver="blkdebug", node_name="d", image="f"),
            *(
                reopen(driver="blkdebug", node_name="d", **{"image": "f", **o})
                for o in (
                    {"image": "n"},
                    {"align": 4096},
                    {"config": "rules.ini"},
                    {"read_only": True},
                    {"inject-error": [{"event": "none"}]},
                    {"take-child-perms": ["write"]},
                    {},
                )
            ),
            NODES,
            delete("f"),
            cmd("block_resize", node_name="d", size=2 * K * K),
            NODES,
        ],
        images=("raw.img",),
    ),
]


# --- preallocate -----------------------------------------------------------------------------------------------------


def size_of(filename: str) -> Do:
    return Do(f"size of {filename}", lambda context: (context.workdir / filename).stat().st_size)


def blocks_of(filename: str) -> Do:
    """The space that it takes, in MiB, which hides how the file system rounds it."""
    return Do(f"space of {filename}", lambda context: (context.workdir / filename).stat().st_blocks >> 11)


def lengths(context: Context) -> Any:
    reply = context.daemon.qmp.execute("query-named-block-nodes", flat=True)
    return {node["node-name"]: node["image"]["virtual-size"] for node in reply}


LENGTHS = Do("lengths", lengths)
SIZE = size_of("grows.qcow2")


def make_growing(context: Context) -> None:
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", "grows.qcow2", "64M", cwd=context.workdir)


def growing(**more: Any) -> list[Any]:
    return [
        Do("make", make_growing),
        NBD_START,
        add(driver="file", node_name="f", filename="grows.qcow2"),
        add(node_name="p", driver="preallocate", file="f", **more),
        add(driver="qcow2", node_name="q", file="p", discard="unmap"),
    ]


def looked_at(*steps: Any) -> list[Any]:
    """The size of the file, and what the nodes say, after each step."""
    return [more for step in steps for more in (step, SIZE, LENGTHS, GRAPH)]


def fill(*wanted: Request) -> Do:
    return requests(f"fill {wanted[0][:2]}", "q", *wanted)


def prealloc_reopen(**options: Any) -> dict[str, Any]:
    return reopen(driver="preallocate", node_name="p", file="f", **options)


BAD_PREALLOC: tuple[dict[str, Any], ...] = (
    *({"prealloc_align": value} for value in (-1, 1, 513, (1 << 63) - 1, 1 << 63, "1M")),
    *({"prealloc_size": value} for value in (-1, 1 << 63, "1M")),
    {"prealloc_align": 513, "prealloc_size": -1},
    {"file": "nosuch", "prealloc_align": 513},
)

SESSIONS += [
    Session(
        "preallocate-grow",
        [
            *growing(prealloc_size=4 * K * K),
            *looked_at(
                export("q"),
                fill(("pwrite", 0, data(1, 64 * K))),
                fill(("flush",)),
                fill(("pwrite", 3 * K * K, data(2, 64 * K))),
                fill(("pwrite", 10 * K * K, data(3, 5 * K * K))),
            ),
            blocks_of("grows.qcow2"),
            *looked_at(
                fill(("zero", 20 * K * K, 5 * K * K), ("zero", 20 * K * K, 5 * K * K, NO_HOLE), ("flush",)),
                fill(("pwrite", 16 * K * K, data(4, 64 * K), FUA), ("pread", 9 * K * K, 8 * K * K)),
                unexport("q"),
                cmd("block_resize", node_name="q", size=100 * K * K),
                cmd("block_resize", node_name="q", size=10 * K * K),
                delete("q"),
                delete("p"),
            ),
        ],
    ),
    Session(
        "preallocate-inline",
        [
            Do("make", make_growing),
            NBD_START,
            add(
                driver="qcow2",
                node_name="q",
                file={"driver": "preallocate", "node-name": "p", "file": {**FILE, "filename": "grows.qcow2"}},
            ),
            NODES,
            export("q"),
            fill(("pwrite", 0, data(1, 64 * K))),
            SIZE,
            blocks_of("grows.qcow2"),
            unexport("q"),
            delete("q"),
            SIZE,
        ],
    ),
    Session(
        "preallocate-reopen",
        [
            *growing(prealloc_size=2 * K * K),
            export("q"),
            *looked_at(
                fill(("pwrite", 0, data(1, 64 * K))),
                prealloc_reopen(prealloc_size=1 * K * K, prealloc_align=512),
                prealloc_reopen(prealloc_size=1 * K * K, prealloc_align=513),
                prealloc_reopen(prealloc_size=-1, prealloc_align=512),
                prealloc_reopen(prealloc_size=1 * K * K),
                prealloc_reopen(),
                fill(("pwrite", 4 * K * K, data(2, 5 * K * K))),
                unexport("q"),
                reopen(driver="qcow2", node_name="q", file="p", read_only=True),
                prealloc_reopen(prealloc_size=8 * K * K, prealloc_align=512, read_only=True),
                prealloc_reopen(prealloc_size=8 * K * K, prealloc_align=512),
                reopen(driver="qcow2", node_name="q", file="p", discard="unmap"),
                export("q"),
                fill(("pwrite", 14 * K * K, data(2, 5 * K * K))),
            ),
        ],
    ),
    *(
        Session(
            f"preallocate-size-{size}-{align}",
            [
                *growing(prealloc_size=size, prealloc_align=align),
                export("q"),
                fill(("pwrite", 0, data(1, 64 * K))),
                SIZE,
                fill(("pwrite", 1 * K * K, data(1, 64 * K))),
                SIZE,
                unexport("q"),
                delete("q"),
                SIZE,
            ],
        )
        for size, align in (
            (0, 1 << 20),
            (1, 512),
            (513, 3 * 512),
            (1 << 62, 512),
            ((1 << 63) - 1, 1 << 20),
        )
    ),
    Session(
        "preallocate-plain",
        [
            NBD_START,
            add(driver="file", node_name="f", filename="raw.img"),
            *(add(**{"node_name": "p", "driver": "preallocate", "file": "f", **o}) for o in BAD_PREALLOC),
            add(driver="preallocate", node_name="p", file="f"),
            NODES,
            GRAPH,
            export("p"),
            GRAPH,
            requests("at the end", "p", ("pwrite", K * K - 4096, data(1, 4096)), ("zero", K * K - 512, 512)),
            size_of("raw.img"),
            unexport("p"),
            cmd("block_resize", node_name="p", size=4 * K * K),
            size_of("raw.img"),
            add(driver="raw", node_name="r", file="p"),
            GRAPH,
            cmd("block_resize", node_name="r", size=3 * K * K),
            size_of("raw.img"),
            LENGTHS,
            export("r"),
            GRAPH,
            requests("at the end of raw", "r", ("pwrite", 3 * K * K - 4096, data(1, 4096)), ("flush",)),
            size_of("raw.img"),
        ],
        images=("raw.img",),
    ),
]


FILE_TOP = {"driver": "file", "filename": "top.qcow2"}

# --- copy-on-read ----------------------------------------------------------------------------------------------------


def make_chain(context: Context) -> None:
    """A chain of three with data, zeroes and holes in every layer; the top is extended L2 or not, and larger."""

    def image(name: str, size: str, *commands: str, options: str = "cluster_size=64k") -> None:
        below = {"top.qcow2": ("qcow2", "mid.qcow2"), "mid.qcow2": ("raw", "raw.img")}[name]
        create = ["create", "-q", "-f", "qcow2", "-o", options, "-F", below[0], "-b", below[1], name, size]
        peers.run("qemu-img", *create, cwd=context.workdir)
        peers.run("qemu-io", *(part for c in commands for part in ("-c", c)), name, cwd=context.workdir)

    image("mid.qcow2", "1M", "write -P 40 128k 64k", "write -z 512k 32k", "write -P 41 700k 3k")
    image("top.qcow2", "1100k", "write -P 50 192k 10k", "write -z 640k 64k", options="cluster_size=64k,extended_l2=on")


def layers(context: Context) -> Any:
    """Which layer has what."""
    done = peers.run("qemu-img", "map", "-U", "--output=json", "top.qcow2", cwd=context.workdir)
    return [[e["start"], e["length"], e["depth"], e["zero"], e["data"]] for e in json.loads(done.stdout)]


def overlay(**file: Any) -> dict[str, Any]:
    middle = {
        "driver": "qcow2",
        "node-name": "mid",
        "file": {"driver": "file", "filename": "mid.qcow2"},
        "backing": {"driver": "raw", "node-name": "base", "file": {"driver": "file", "filename": "raw.img"}},
    }
    below = file or {"driver": "file", "filename": "top.qcow2"}
    return {"driver": "qcow2", "node-name": "top", "file": below, "backing": middle}


READS: tuple[Request, ...] = (
    ("pread", 10, 100, 4),
    ("pread", 60 * K, 4 * K, 4),
    ("pread", 130 * K, 1, 4),
    ("pread", 190 * K, 30 * K, 4),
    ("pread", 500 * K, 40 * K, 4),
    ("pwrite", 701 * K, b"x" * 100),
    ("pread", 690 * K, 40 * K, 4),
    ("pread", 1000 * K, 100 * K, 4),
    ("flush",),
)


def copy_on_read_session(name: str, expose: bool = False, **more: Any) -> Session:
    file = more.pop("below", None)
    return Session(
        f"copy-on-read-{name}",
        [
            Do("make", make_chain),
            NBD_START,
            add(**overlay(**(file or {}))),
            add(driver="copy-on-read", node_name="c", file="top", **more),
            export("c") if not expose else cmd("block-export-add", type="nbd", id="e-c", node_name="c"),
            # With a bottom node, QSD leaves what is beyond its end as it was in memory.
            requests("reads", "c", *(READS if "bottom" not in more else [r for r in READS if r[1:2] != (1000 * K,)])),
            GRAPH,
            unexport("c"),
            delete("c"),
            delete("top"),
            Do("layers", layers),
        ],
        images=("raw.img",),
    )


SESSIONS += [
    copy_on_read_session("all"),
    copy_on_read_session("read-only-export", expose=True),
    copy_on_read_session("bottom-mid", bottom="mid"),
    copy_on_read_session("bottom-base", bottom="base"),
    copy_on_read_session("bottom-top", bottom="top"),
    copy_on_read_session(
        "disk-full",
        below={
            "driver": "blkdebug",
            "image": {"driver": "file", "filename": "top.qcow2"},
            "inject-error": [{"event": "write_aio", "iotype": "write", "errno": 28, "once": True}],
        },
    ),
    Session(
        "copy-on-read-options",
        [
            Do("make", make_chain),
            add(driver="copy-on-read", node_name="c"),
            add(driver="copy-on-read", node_name="c", file="nosuch"),
            add(driver="copy-on-read", node_name="c", file={"driver": "file", "filename": "top.qcow2"}, bottom="x"),
            add(driver="copy-on-read", node_name="c", read_only=True, file={**FILE}),
            add(driver="copy-on-read", node_name="c", file={**FILE, "read-only": True}, auto_read_only=True),
            add(**overlay()),
            add(driver="copy-on-read", node_name="c", file="top", bottom=""),
            add(driver="copy-on-read", node_name="c", file="top", bottom="base"),
            NODES,
            GRAPH,
            add(driver="copy-on-read", node_name="d", file="c", bottom="c"),
            *(
                reopen(driver="copy-on-read", node_name="c", file="top", **more)
                for more in ({}, {"bottom": "mid"}, {"bottom": "base"}, {"read_only": True})
            ),
            delete("mid"),
            delete("top"),
            cmd("block_resize", node_name="c", size=2 * K * K),
            NODES,
            delete("c"),
        ],
        images=("raw.img",),
    ),
    Session(
        "copy-on-read-frozen",
        [
            Do("make", make_chain),
            add(driver="raw", node_name="base", file={"driver": "file", "filename": "raw.img"}),
            add(driver="qcow2", node_name="mid", file={"driver": "file", "filename": "mid.qcow2"}, backing="base"),
            add(driver="qcow2", node_name="top", file=FILE_TOP, backing="mid"),
            add(driver="copy-on-read", node_name="c", file="top", bottom="mid"),
            add(driver="copy-on-read", node_name="d", file="top", bottom="mid"),
            add(driver="copy-on-read", node_name="d", file="c", bottom="top"),
            *(reopen(driver="qcow2", node_name="top", file=FILE_TOP, backing=name) for name in (None, "base", "mid")),
            cmd("blockdev-snapshot-sync", node_name="top", snapshot_file="s.qcow2", snapshot_node_name="s"),
            cmd("blockdev-snapshot-sync", node_name="mid", snapshot_file="s.qcow2", snapshot_node_name="s"),
            delete("d"),
            delete("c"),
            reopen(driver="qcow2", node_name="top", file=FILE_TOP, backing=None),
        ],
        images=("raw.img",),
    ),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, image_set: Path, tmp_path: Path) -> None:
    check_session(session, image_set, tmp_path)


#: Overlays whose backing file has a name with blkdebug in it.
BACKING: dict[str, Callable[[], list[str]]] = {
    "plain.qcow2": lambda: ["-F", "raw", "-b", "blkdebug::raw.img"],
    "config.qcow2": lambda: ["-F", "raw", "-b", "blkdebug:rules.ini:raw.img"],
    "short.qcow2": lambda: ["-F", "raw", "-b", "blkdebug:raw.img"],
    "itself.qcow2": lambda: ["-F", "blkdebug", "-b", "blkdebug::raw.img"],
    "deep.qcow2": lambda: ["-F", "qcow2", "-b", "blkdebug::plain.qcow2"],
    "json.qcow2": lambda: [
        "-F",
        "raw",
        "-b",
        'json:{"file":{"driver":"blkdebug","align":512,"inject-error":[{"event":"read_aio"}],'
        '"image":{"driver":"file","filename":"raw.img"}}}',
    ],
}


@pytest.mark.parametrize("name", BACKING)
def test_names_in_images(name: str, image_set: Path, tmp_path: Path) -> None:
    def make(context: Context) -> None:
        write_rules(context)
        for wanted in dict.fromkeys(("plain.qcow2", name)):
            peers.run("qemu-img", "create", "-u", "-f", "qcow2", *BACKING[wanted](), wanted, "1M", cwd=context.workdir)

    session = Session(
        f"blkdebug-name-{name}",
        [
            Do("make", make),
            add(driver="qcow2", node_name="q", file={"driver": "file", "filename": name}),
            NODES,
            delete("q"),
        ],
        images=("raw.img",),
    )
    check_session(session, image_set, tmp_path)
