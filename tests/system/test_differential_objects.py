"""Differential: object-*, qom-*, chardev-*."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.system.differential import Context, Do, Session, Subset, check_session, cmd

OBJECTS = cmd("qom-list", path="/objects")


def obj(qom_type: str, name: str, **more: Any) -> dict[str, Any]:
    return cmd("object-add", qom_type=qom_type, id_=name, **more)


def remove(name: str) -> dict[str, Any]:
    return cmd("object-del", id_=name)


def get(path: str, name: str) -> dict[str, Any]:
    return cmd("qom-get", path=path, property=name)


def put(path: str, name: str, value: Any) -> dict[str, Any]:
    return cmd("qom-set", path=path, property=name, value=value)


def chardev(name: str, kind: str, /, **data: Any) -> dict[str, Any]:
    fixed = {key.rstrip("_").replace("_", "-"): value for key, value in data.items()}
    return cmd("chardev-add", id_=name, backend={"type": kind, "data": fixed})


def unix(path: str) -> dict[str, Any]:
    return {"type": "unix", "data": {"path": path}}


SESSIONS = [
    Session(
        "object-add-errors",
        [
            cmd("object-add"),
            cmd("object-add", qom_type="iothread"),
            cmd("object-add", id_="a"),
            obj("nosuch", "a"),
            obj("object", "a"),
            obj("container", "a"),
            obj("memory-backend-ram", "a", size=1),
            cmd("object-add", qom_type=1, id_="a"),
            cmd("object-add", qom_type="iothread", id_=1),
            obj("iothread", "1a"),
            obj("iothread", ""),
            obj("iothread", "a b"),
            obj("iothread", "a/b"),
            obj("iothread", "a", nosuch=1),
            obj("iothread", "a", poll_max_ns="x"),
            obj("iothread", "a", poll_max_ns=-1),
            obj("iothread", "a", aio_max_batch=-1),
            obj("iothread", "a", thread_pool_min=100, thread_pool_max=10),
            obj("iothread", "a", thread_pool_max=-1),
            obj("iothread", "a", poll_max_ns=1000, poll_grow=2, poll_shrink=3),
            obj("iothread", "a"),
            obj("throttle-group", "a"),
            remove("nosuch"),
            remove(""),
            cmd("object-del"),
            cmd("object-del", id_=1),
            OBJECTS,
            remove("a"),
            remove("a"),
            OBJECTS,
        ],
    ),
    Session(
        "secret",
        [
            obj("secret", "s"),
            obj("secret", "s", data="x", file="y"),
            obj("secret", "s", file="nosuch"),
            obj("secret", "s", data="x", format="nosuch"),
            obj("secret", "s", data="!!", format="base64"),
            obj("secret", "s", data="x", keyid="nosuch"),
            obj("secret", "s", data="x", keyid="nosuch", iv="AAAA"),
            obj("secret", "s", data=1),
            obj("secret", "s", data="letmein"),
            get("/objects/s", "data"),
            get("/objects/s", "format"),
            get("/objects/s", "loaded"),
            get("/objects/s", "file"),
            get("/objects/s", "type"),
            get("s", "format"),
            put("/objects/s", "loaded", True),
            put("/objects/s", "loaded", False),
            put("/objects/s", "data", "other"),
            put("/objects/s", "format", "nosuch"),
            put("/objects/s", "format", 1),
            put("/objects/s", "type", "x"),
            obj("secret", "b", data="bGV0bWVpbg==", format="base64"),
            get("/objects/b", "data"),
            cmd("qom-list", path="/objects/s"),
            cmd("qom-list-properties", typename="secret"),
            remove("s"),
            remove("b"),
        ],
    ),
    Session(
        "iothread",
        [
            obj("iothread", "t"),
            cmd("qom-list", path="/objects/t"),
            *(
                get("/objects/t", name)
                for name in (
                    "poll-max-ns",
                    "poll-grow",
                    "poll-shrink",
                    "aio-max-batch",
                    "thread-pool-min",
                    "thread-pool-max",
                    "nosuch",
                )
            ),
            put("/objects/t", "poll-max-ns", 100),
            put("/objects/t", "poll-max-ns", -1),
            put("/objects/t", "poll-max-ns", "100"),
            put("/objects/t", "poll-max-ns", None),
            put("/objects/t", "poll-max-ns", True),
            put("/objects/t", "poll-max-ns", 1.5),
            put("/objects/t", "nosuch", 1),
            get("/objects/t", "poll-max-ns"),
            put("/objects/t", "thread-pool-max", 0),
            put("/objects/t", "aio-max-batch", 5),
            get("/objects/t", "aio-max-batch"),
            cmd("qom-list-properties", typename="iothread"),
            remove("t"),
        ],
    ),
    Session(
        "throttle-group",
        [
            obj("throttle-group", "g", limits={"iops-total": 100}),
            get("/objects/g", "limits"),
            put("/objects/g", "limits", {"iops-total": 200}),
            get("/objects/g", "limits"),
            put("/objects/g", "limits", {"iops-total": 200, "iops-read": 5}),
            put("/objects/g", "limits", {"iops-total": -1}),
            put("/objects/g", "limits", {"nosuch": 1}),
            put("/objects/g", "limits", 1),
            put("/objects/g", "x-iops-total", 10),
            get("/objects/g", "x-iops-total"),
            obj("throttle-group", "h", limits={"bps-total": 10, "bps-read": 10}),
            obj("throttle-group", "h", limits={"iops-total": 10, "iops-total-max": 5}),
            obj("throttle-group", "h", limits={"iops-total-max": 5}),
            obj("throttle-group", "h", limits={"nosuch": 5}),
            obj("throttle-group", "h", x_iops_total=5),
            get("/objects/h", "limits"),
            cmd("qom-list", path="/objects/g"),
            cmd("qom-list-properties", typename="throttle-group"),
            remove("g"),
            remove("h"),
        ],
    ),
    Session(
        "qom-paths",
        [
            obj("iothread", "t"),
            cmd("qom-list"),
            cmd("qom-list", path="/"),
            cmd("qom-list", path="/objects"),
            cmd("qom-list", path="objects"),
            cmd("qom-list", path="/nosuch"),
            cmd("qom-list", path="nosuch"),
            cmd("qom-list", path=""),
            cmd("qom-list", path="//objects//t"),
            cmd("qom-list", path="t"),
            cmd("qom-list", path=1),
            cmd("qom-get"),
            cmd("qom-get", path="/objects/t"),
            cmd("qom-get", path="/", property="type"),
            get("/objects", "type"),
            get("/objects/t", "type"),
            get("t", "type"),
            get("/objects/nosuch", "type"),
            get("/objects", "t"),
            get("/", "objects"),
            cmd("qom-set", path="/objects/t", property="poll-max-ns"),
            put("/nosuch", "a", 1),
            cmd("qom-list-properties"),
            cmd("qom-list-properties", typename="nosuch"),
            cmd("qom-list-properties", typename="object"),
            cmd("qom-list-properties", typename="container"),
            Subset("qom-list-types", "name", ("iothread", "secret", "throttle-group", "container")),
            Subset(
                cmd("qom-list-types", implements="user-creatable"), "name", ("iothread", "secret", "throttle-group")
            ),
            Subset(
                cmd("qom-list-types", implements="user-creatable", abstract=True),
                "name",
                ("iothread", "secret", "throttle-group"),
            ),
            cmd("qom-list-types", implements="nosuch"),
            cmd("qom-list-types", implements="iothread"),
            cmd("qom-list-types", abstract="x"),
        ],
    ),
    Session(
        "objects-from-the-command-line",
        [OBJECTS, get("/objects/t", "poll-max-ns"), get("/objects/s", "format"), remove("t"), remove("s")],
        args=["--object", "iothread,id=t,poll-max-ns=5", "--object", "secret,id=s,data=x,format=raw"],
    ),
    Session(
        "chardev-errors",
        [
            cmd("chardev-add"),
            cmd("chardev-add", id_="c"),
            cmd("chardev-add", id_="c", backend={}),
            cmd("chardev-add", id_="c", backend={"type": "nosuch", "data": {}}),
            cmd("chardev-add", id_="c", backend={"type": "null"}),
            cmd("chardev-add", id_="c", backend={"type": "null", "data": 1}),
            cmd("chardev-add", backend={"type": "null", "data": {}}),
            chardev("1c", "null"),
            chardev("", "null"),
            chardev("a b", "null"),
            chardev("c", "null", nosuch=1),
            chardev("c", "file"),
            chardev("c", "file", out="nodir/x"),
            chardev("c", "file", out="x", in_="nosuch"),
            chardev("c", "file", out=1),
            chardev("c", "pipe", device="nosuch"),
            chardev("c", "pipe"),
            chardev("c", "ringbuf", size=0),
            chardev("c", "ringbuf", size=1000),
            chardev("c", "ringbuf", size="x"),
            chardev("c", "ringbuf", size=-1),
            chardev("c", "socket"),
            chardev("c", "socket", addr=unix("nodir/x")),
            chardev("c", "socket", addr=unix("nosuch.sock"), server=False),
            chardev("c", "socket", addr=unix("c.sock"), server=True, reconnect_ms=1000),
            chardev("c", "socket", addr=unix("c.sock"), server=False, wait=True),
            chardev("c", "socket", addr=unix("c.sock"), server=True, wait=False, tls_creds="nosuch"),
            chardev("c", "socket", addr=unix("c.sock"), server=True, wait=False, telnet=True, tn3270=True),
            chardev("c", "socket", addr=unix("c.sock"), server=True, wait=False, telnet=True, websocket=True),
            chardev("c", "socket", addr=unix("c.sock"), reconnect=1, reconnect_ms=1000, server=False),
            chardev("c", "socket", addr={"type": "nosuch"}),
            chardev("c", "socket", addr={"type": "fd", "data": {"str": "nosuch"}}),
            chardev("c", "socket", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": "1"}}, server=False),
            chardev("c", "parallel", device="x"),
            chardev("c", "serial", device="/dev/nosuch"),
            chardev("c", "msmouse"),
            cmd("chardev-remove"),
            cmd("chardev-remove", id_="nosuch"),
            cmd("chardev-remove", id_=1),
            cmd("chardev-remove", id_="qmp0"),
            cmd("query-chardev"),
            cmd("query-chardev", nosuch=1),
        ],
    ),
    Session(
        "chardevs",
        [
            chardev("n", "null"),
            chardev("n", "null"),
            chardev("f", "file", out="out.txt"),
            chardev("fa", "file", out="out.txt", append=True),
            chardev("r", "ringbuf", size=1024),
            chardev("r2", "ringbuf"),
            chardev("s", "socket", addr=unix("s.sock"), server=True, wait=False),
            chardev("c", "socket", addr=unix("s.sock"), server=False),
            chardev("a", "socket", addr={"type": "unix", "data": {"path": "abs", "abstract": True}}, wait=False),
            chardev("logged", "null", logfile="log.txt", logappend=True),
            cmd("query-chardev"),
            Do("files", lambda c: sorted(p.name for p in Path(c.workdir).iterdir() if not p.name.startswith("stderr"))),
            cmd("chardev-remove", id_="c"),
            cmd("chardev-remove", id_="s"),
            cmd("chardev-remove", id_="s"),
            Do("socket removed", lambda c: (c.workdir / "s.sock").exists()),
            cmd("chardev-remove", id_="n"),
            cmd("chardev-remove", id_="f"),
            cmd("chardev-remove", id_="r"),
            cmd("query-chardev"),
            Subset("query-chardev-backends", "name", ("socket", "stdio", "file", "pipe", "pty", "null", "ringbuf")),
        ],
    ),
    Session(
        "chardev-pty",
        [
            Do(
                "pty",
                lambda c: (
                    lambda reply: [sorted(reply), reply.get("error"), reply.get("return", {}).get("pty", "")[:9]]
                )(c.daemon.qmp.raw_command(chardev("p", "pty"))),
            ),
            Do("query", lambda c: _without_pts(c)),
            cmd("chardev-remove", id_="p"),
            cmd("query-chardev"),
        ],
    ),
    Session(
        "chardevs-from-the-command-line",
        ["query-chardev"],
        args=[
            "--chardev",
            "null,id=n",
            "--chardev",
            "file,id=f,path=out.txt,append=on",
            "--chardev",
            "ringbuf,id=r,size=4k",
            "--chardev",
            "socket,id=s,host=127.0.0.1,port=0,server=on,wait=off",
        ],
    ),
]


def _without_pts(context: Context) -> Any:
    """query-chardev with the number of the pseudo terminal and the port hidden."""
    result = context.daemon.qmp.execute("query-chardev")
    for entry in result:
        if entry["filename"].startswith("pty:/dev/pts/"):
            entry["filename"] = "pty:/dev/pts/N"
    return result


for _session in SESSIONS:
    if _session.name == "chardevs-from-the-command-line":

        def _without_port(context: Context) -> Any:
            import re

            result = context.daemon.qmp.execute("query-chardev")
            for entry in result:
                entry["filename"] = re.sub(r":\d+,", ":PORT,", entry["filename"])
            return result

        _session.steps = [Do("query-chardev without the port", _without_port)]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, image_set: Path, tmp_path: Path) -> None:
    check_session(session, image_set, tmp_path)
