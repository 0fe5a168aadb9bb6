"""Differential: object-*, qom-*, chardev-*."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.system.differential import Context, Do, Session, Subset, check_session, cmd

OBJECTS = cmd("qom-list", path="/objects")
ABSTRACT = {"path": f"abs-{os.getpid()}", "abstract": True}  # a name that is the whole machine's


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


def _chardevs(context: Context) -> Any:
    """query-chardev with the number of a pseudo terminal and ports that were chosen hidden, in order of the labels."""
    result = context.daemon.qmp.execute("query-chardev")
    for entry in result:
        entry["filename"] = re.sub(r"/pts/\d+", "/pts/N", re.sub(r":\d+,", ":PORT,", entry["filename"]))
    return sorted(result, key=lambda entry: str(entry["label"]))


SESSIONS = [
    Session(
        "object-add-errors",
        [
            cmd("object-add"),
            cmd("object-add", qom_type="secret"),
            cmd("object-add", id_="a"),
            obj("nosuch", "a"),
            obj("object", "a"),
            obj("container", "a"),
            cmd("object-add", qom_type=1, id_="a"),
            cmd("object-add", qom_type="secret", id_=1),
            obj("authz-simple", "1a", identity="x"),
            obj("authz-simple", "", identity="x"),
            obj("authz-simple", "a b", identity="x"),
            obj("authz-simple", "a/b", identity="x"),
            obj("authz-simple", "a", identity="x", nosuch=1),
            obj("authz-simple", "a", identity="x"),
            obj("secret", "a", data="x"),
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
        "authz",
        [
            obj("authz-simple", "s"),
            obj("authz-simple", "s", identity=1),
            obj("authz-simple", "s", identity="fred"),
            cmd("qom-list", path="/objects/s"),
            get("/objects/s", "identity"),
            put("/objects/s", "identity", "joe"),
            put("/objects/s", "identity", 1),
            put("/objects/s", "identity", None),
            put("/objects/s", "nosuch", 1),
            get("/objects/s", "identity"),
            obj("authz-list", "l", policy="nosuch"),
            obj("authz-list", "l", rules=1),
            obj("authz-list", "l", rules=[{}]),
            obj("authz-list", "l", rules=[{"match": "a", "policy": "nosuch"}]),
            obj("authz-list", "l", rules=[{"match": "a", "policy": "allow", "format": "nosuch"}]),
            obj("authz-list", "l", policy="deny", rules=[{"match": "a*", "policy": "allow", "format": "glob"}]),
            get("/objects/l", "policy"),
            get("/objects/l", "rules"),
            put("/objects/l", "policy", "allow"),
            put("/objects/l", "policy", "nosuch"),
            put("/objects/l", "policy", True),
            put("/objects/l", "rules", []),
            put("/objects/l", "rules", 5),
            get("/objects/l", "rules"),
            obj("authz-list-file", "f"),
            obj("authz-list-file", "f", filename="nosuch"),
            obj("authz-list-file", "f", filename="raw.img", refresh="x"),
            obj("authz-list-file", "f", filename="raw.img"),
            cmd("qom-list-properties", typename="authz-simple"),
            cmd("qom-list-properties", typename="authz-list"),
            cmd("qom-list-properties", typename="authz-list-file"),
            OBJECTS,
            remove("s"),
            remove("l"),
            OBJECTS,
        ],
        images=("raw.img",),
    ),
    Session(
        "qom-paths",
        [
            obj("authz-simple", "t", identity="x"),
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
            cmd("qom-set", path="/objects/t", property="identity"),
            put("/nosuch", "a", 1),
            cmd("qom-list-properties"),
            cmd("qom-list-properties", typename="nosuch"),
            cmd("qom-list-properties", typename="object"),
            cmd("qom-list-properties", typename="container"),
            Subset("qom-list-types", "name", ("secret", "authz-simple", "container")),
            Subset(cmd("qom-list-types", implements="user-creatable"), "name", ("secret", "authz-simple")),
            Subset(
                cmd("qom-list-types", implements="user-creatable", abstract=True),
                "name",
                ("secret", "authz-simple"),
            ),
            cmd("qom-list-types", implements="nosuch"),
            cmd("qom-list-types", implements="secret"),
            cmd("qom-list-types", abstract="x"),
        ],
    ),
    Session(
        "objects-from-the-command-line",
        [OBJECTS, get("/objects/t", "identity"), get("/objects/s", "format"), remove("t"), remove("s")],
        args=["--object", "authz-simple,id=t,identity=x", "--object", "secret,id=s,data=x,format=raw"],
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
            chardev("a", "socket", addr={"type": "unix", "data": ABSTRACT}, wait=False),
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
            Do("query", _chardevs),
            cmd("chardev-remove", id_="p"),
            cmd("query-chardev"),
        ],
    ),
    Session(
        "chardevs-from-the-command-line",
        [Do("query-chardev", _chardevs)],
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


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, image_set: Path, tmp_path: Path) -> None:
    check_session(session, image_set, tmp_path)
