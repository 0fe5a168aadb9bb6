"""The same chardev commands and command lines to the real qemu-storage-daemon and to pyqsd."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import run_to_end
from tests.system.differential import (
    Context,
    Do,
    Session,
    Step,
    Subset,
    cmd,
    label_of,
    pretty,
    program_text,
    run_session,
    subset_problem,
)

# The names of abstract sockets are the whole machine's.
ABSTRACT = f"pyqsd-differential-{os.getpid()}"

# --- comparing --------------------------------------------------------------------------------------------------------


def normalise(value: Any, ports: dict[str, str]) -> Any:
    """Lists in one order, and port numbers by their first appearance."""

    def ordered(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: ordered(item) for key, item in value.items()}
        if isinstance(value, list):
            return sorted((ordered(item) for item in value), key=lambda item: json.dumps(item, sort_keys=True))
        return value

    text = json.dumps(ordered(value), sort_keys=True)
    text = re.sub(
        r"(?<=1:|\]:)[0-9]{4,5}|(?<=\"port\": \")[0-9]{4,5}",
        lambda match: ports.setdefault(match[0], f"PORT{len(ports)}"),
        text,
    )
    return json.loads(text)


def compare(session: Session, tmp_path: Path) -> None:
    results: dict[str, list[tuple[str, Any]]] = {}
    for kind in ("qsd", "pyqsd"):
        workdir = tmp_path / "work"
        workdir.mkdir()
        (workdir / "text").write_text("some text\n")
        ports: dict[str, str] = {}
        results[kind] = [(label, normalise(value, ports)) for label, value in run_session(kind, session, workdir)]
        shutil.rmtree(workdir)
    assert [label for label, _ in results["qsd"]] == [label for label, _ in results["pyqsd"]]
    subsets = {label_of(step): step for step in session.steps if isinstance(step, Subset)}
    for position, (label, theirs) in enumerate(results["qsd"]):
        if label in subsets:
            ours = results["pyqsd"][position][1]
            assert subset_problem(subsets[label], theirs, ours) is None
            results["pyqsd"][position] = (label, theirs)
    problems = [
        f"{label}\n  QSD:   {' '.join(pretty(theirs))}\n  pyqsd: {' '.join(pretty(ours))}"
        for (label, theirs), (_, ours) in zip(results["qsd"], results["pyqsd"], strict=True)
        if theirs != ours
    ]
    assert not problems, "\n".join(problems)
    assert not [label for label, value in results["qsd"] if "BROKEN" in str(value)]


# --- steps ------------------------------------------------------------------------------------------------------------


def add(label: str, kind: str, **data: Any) -> dict[str, Any]:
    wire = {key.rstrip("_").replace("_", "-"): value for key, value in data.items()}
    return cmd("chardev-add", id_=label, backend={"type": kind, "data": wire})


def remove(label: str) -> dict[str, Any]:
    return cmd("chardev-remove", id_=label)


def unix(path: str = "s", **members: Any) -> dict[str, Any]:
    return {"type": "unix", "data": {"path": path, **members}}


def inet(host: str = "127.0.0.1", port: str = "0", **members: Any) -> dict[str, Any]:
    return {
        "type": "inet",
        "data": {"host": host, "port": port, **{k.replace("_", "-"): v for k, v in members.items()}},
    }


def tried(*steps: Step) -> list[Step]:
    """Each step, what is there then, and everything away again."""
    result: list[Step] = []
    for step in steps:
        label = step["arguments"]["id"]
        result += [step, "query-chardev", cmd("qom-list", path=f"/chardevs/{label}"), remove(label)]
    return result


def shown(context: Context, label: str) -> str:
    infos: list[dict[str, Any]] = context.daemon.qmp.execute("query-chardev")
    return next(str(info["filename"]) for info in infos if info["label"] == label)


def connect(label: str, name: Callable[[Context], Any], family: int = socket.AF_UNIX, key: str = "peer") -> Do:
    """Connect to where `name` says, and wait until that shows."""

    def action(context: Context) -> str:
        peer = socket.socket(family)
        peer.connect(name(context))
        context.keep[key] = peer
        return wait(context, label, "disconnected:", False)

    return Do(f"connect to {label} ({key})", action)


def disconnect(label: str, key: str = "peer", then: str = "disconnected:") -> Do:
    def action(context: Context) -> str:
        context.keep.pop(key).close()
        return wait(context, label, then, True)

    return Do(f"disconnect {key} from {label}", action)


def wait(context: Context, label: str, prefix: str, wanted: bool) -> str:
    deadline = time.monotonic() + 10
    while True:
        text = shown(context, label)
        if text.startswith(prefix) == wanted:
            return text
        assert time.monotonic() < deadline, text
        time.sleep(0.005)


def get(path: str, *names: str) -> list[dict[str, Any]]:
    return [cmd("qom-get", path=path, property=name) for name in names]


# --- sessions ---------------------------------------------------------------------------------------------------------

SIMPLE = Session(
    "simple chardevs",
    [
        "query-chardev",
        cmd("chardev-add", id_="x", backend={"type": "null"}),
        cmd("chardev-add", id_="x", backend={"type": "nosuch", "data": {}}),
        cmd("chardev-add", id_="x", backend={"data": {}}),
        cmd("chardev-add", id_="x"),
        cmd("chardev-add", backend={"type": "null", "data": {}}),
        cmd("chardev-add", id_="x", backend={"type": "null", "data": {"foo": 1}}),
        cmd("chardev-add", id_="x", backend={"type": "null", "data": {}, "foo": 1}),
        cmd("chardev-add", id_="x", backend={"type": "null", "data": {"logappend": "on"}}),
        *tried(
            add("x", "null"),
            add("1 x", "null"),
            add("x", "null", logfile="log", logappend=True),
            add("x", "null", logfile="/nonexistent/log"),
            add("x", "ringbuf"),
            add("x", "memory"),
            add("x", "ringbuf", size=3),
            add("x", "ringbuf", size=0),
            add("x", "ringbuf", size=-4),
            add("x", "memory", size=8192),
            add("x", "file", out="f"),
            add("x", "file", out="f", in_="text", append=True),
            add("x", "file", out="f", in_="nonexistent"),
            add("x", "file", out="/nonexistent/f"),
            add("x", "file", in_="text"),
            add("x", "pipe", device="f"),
            add("x", "pipe", device="nonexistent"),
            add("x", "pty", path="/nonexistent/f"),
            add("x", "pty", path="text"),
        ),
        add("type", "null"),
        add("x", "null"),
        add("x", "null"),
        add("y", "ringbuf", size=8),
        *get("/chardevs", "x", "y", "type", "z"),
        *get("/chardevs/x", "type", "nosuch"),
        cmd("qom-set", path="/chardevs/x", property="nosuch", value=1),
        cmd("qom-list", path="/chardevs"),
        cmd("chardev-change", id_="x", backend={"type": "memory", "data": {}}),
        cmd("chardev-change", id_="nosuch", backend={"type": "null", "data": {}}),
        cmd("chardev-change", id_="qmp0", backend={"type": "null", "data": {}}),
        "query-chardev",
        cmd("chardev-send-break", id_="x"),
        cmd("chardev-send-break", id_="nosuch"),
        remove("x"),
        remove("x"),
        remove("qmp0"),
        remove(""),
        cmd("ringbuf-write", device="y", data="hällo wörld"),
        cmd("ringbuf-read", device="y", size=3),
        cmd("ringbuf-read", device="y", size=100),
        cmd("ringbuf-read", device="y", size=100),
        cmd("ringbuf-read", device="y", size=0),
        cmd("ringbuf-read", device="y", size=-1),
        cmd("ringbuf-write", device="y", data="aGVs\nbG8=", format="base64"),
        cmd("ringbuf-read", device="y", size=3, format="base64"),
        cmd("ringbuf-read", device="y", size=3, format="nosuch"),
        cmd("ringbuf-write", device="y", data="a*", format="base64"),
        cmd("ringbuf-write", device="y", data="QUL/", format="base64"),
        cmd("ringbuf-read", device="y", size=100),
        cmd("ringbuf-read", device="qmp0", size=1),
        cmd("ringbuf-write", device="nosuch", data="x"),
        cmd("ringbuf-read", device="nosuch", size=1),
    ],
)

SOCKETS = Session(
    "socket chardevs",
    [
        cmd("chardev-add", id_="x", backend={"type": "socket", "data": {}}),
        cmd("chardev-add", id_="x", backend={"type": "socket", "data": {"addr": {}}}),
        cmd("chardev-add", id_="x", backend={"type": "socket", "data": {"addr": {"type": "unix"}}}),
        cmd("chardev-add", id_="x", backend={"type": "socket", "data": {"addr": {"type": "x", "data": {}}}}),
        *tried(
            add("x", "socket", addr=unix()),
            add("x", "socket", addr=unix(), wait=False, server=True),
            add("x", "socket", addr=unix("none"), server=False),
            add("x", "socket", addr=unix("none"), server=False, wait=False),
            add("x", "socket", addr=unix("none"), server=True, reconnect=1),
            add("x", "socket", addr=unix("none"), server=True, reconnect_ms=1),
            add("x", "socket", addr=unix("none"), server=False, reconnect=1, reconnect_ms=1),
            add("x", "socket", addr=unix(), tls_creds="nosuch"),
            add("x", "socket", addr=unix(), tls_authz="nosuch"),
            add("x", "socket", addr=unix("none"), server=False, websocket=True),
            add("x", "socket", addr=unix(ABSTRACT, abstract=True)),
            add("x", "socket", addr=unix(ABSTRACT, abstract=True, tight=False)),
            add("x", "socket", addr=unix("s", tight=True)),
            add("x", "socket", addr=unix("", abstract=True)),
            add("x", "socket", addr=unix("a" * 109)),
            add("x", "socket", addr=unix("a" * 107, abstract=True)),
            add("x", "socket", addr=unix("a" * 108, abstract=True)),
            add("x", "socket", addr=unix("/nonexistent/s")),
            add("x", "socket", addr=unix("/")),
            add("x", "socket", addr=inet()),
            add("x", "socket", addr=inet(keep_alive=True, numeric=True), nodelay=True),
            add("x", "socket", addr=inet(to=1)),
            add("x", "socket", addr=inet(port="17001", to=17000)),
            add("x", "socket", addr=inet("localhost", ipv4=True)),
            add("x", "socket", addr=inet("localhost", ipv4=True, ipv6=True)),
            add("x", "socket", addr=inet("::1", ipv6=True)),
            add("x", "socket", addr=inet("::1", ipv4=True)),
            add("x", "socket", addr=inet("::1", ipv4=False)),
            add("x", "socket", addr=inet(ipv4=False, ipv6=False)),
            add("x", "socket", addr=inet("", "")),
            add("x", "socket", addr=inet(port="nosuch")),
            add("x", "socket", addr=inet("192.0.2.1")),
            add("x", "socket", addr=inet(port="1"), server=False),
            add("x", "socket", addr=inet(port=""), server=False),
            add("x", "socket", addr=inet("", "1"), server=False),
            add("x", "socket", addr=inet("", ""), server=False),
            add("x", "socket", addr={"type": "fd", "data": {"str": "0"}}),
            add("x", "socket", addr={"type": "fd", "data": {"str": "0"}}, server=False),
        ),
        add("u", "socket", addr=unix()),
        *get("/chardevs/u", "addr", "connected", "type"),
        connect("u", lambda context: str(context.workdir / "s")),
        *get("u", "addr", "connected"),
        disconnect("u"),
        *get("u", "addr", "connected"),
        cmd("qom-set", path="u", property="addr", value={}),
        Do("the socket", lambda context: (context.workdir / "s").is_socket()),
        remove("u"),
        Do("the socket is gone", lambda context: (context.workdir / "s").exists()),
        add("a", "socket", addr=unix(ABSTRACT, abstract=True)),
        connect("a", lambda context: "\0" + ABSTRACT),
        *get("a", "addr", "connected"),
        disconnect("a"),
        add("i", "socket", addr=inet()),
        *get("i", "addr"),
        connect("i", lambda context: ("127.0.0.1", port_of(context, "i")), socket.AF_INET, "i"),
        *get("i", "addr", "connected"),
        add("j", "socket", addr=inet("::1")),
        connect("j", lambda context: ("::1", port_of(context, "j")), socket.AF_INET6, "j"),
        *get("j", "addr", "connected"),
        add("s", "socket", addr=unix("t")),
        add("c", "socket", addr=unix("t"), server=False),
        *get("c", "addr", "connected"),
        Do("the client", lambda context: wait(context, "s", "disconnected:", False)),
        remove("c"),
        Do("the client is gone", lambda context: wait(context, "s", "disconnected:", True)),
        add("c", "socket", addr=unix("t"), server=False, reconnect_ms=10),
        Do("the client comes", lambda context: wait(context, "c", "disconnected:", False)),
        "query-chardev",
        remove("s"),
        Do("the server is gone", lambda context: wait(context, "c", "disconnected:", True)),
        *get("c", "addr", "connected"),
        remove("c"),
    ],
)


def port_of(context: Context, label: str) -> int:
    return int(context.daemon.qmp.execute("qom-get", path=f"/chardevs/{label}", property="addr")["port"])


@pytest.mark.parametrize("session", [SIMPLE, SOCKETS], ids=lambda session: session.name)
def test_session(session: Session, tmp_path: Path) -> None:
    compare(session, tmp_path)


# --- command lines ----------------------------------------------------------------------------------------------------

#: One after the other on one command line: the first mistake ends it.
MISTAKES = [
    "socket,id=x,path=",
    "id=x",
    "socket,id=x,path=s,server=ON",
    "socket,id=x,path=s,server=on,wait=off,nosuch=1",
    "socket,id=x,host=localhost",
    "socket,id=x,port=1",
    "socket,id=x,host=localhost,port=1,path=s",
    "socket,id=x,host=localhost,port=1",
    "socket,id=x,fd=foo",
    "socket,id=x,fd=0",
    "socket,id=x,fd=99999999999",
    "socket,id=x,fd=3,path=s",
    "socket,id=x,path=" + "a" * 120 + ",server=on,wait=off",
    "socket,id=x,path=s,reconnect=1,reconnect-ms=5",
    "socket,id=x,path=s,reconnect=1,server=on",
    "socket,id=x,path=s,reconnect-ms=abc",
    "socket,id=x,path=s,wait=off",
    "socket,id=x,path=s,server=on,wait=off,tls-creds=x",
    "socket,id=x,path=s,server=on,wait=off,tls-authz=x",
    "socket,id=x,path=s,websocket=on",
    "socket,id=x,path=s,server=on,wait=off,delay=off,nodelay=on",
    "socket,id=x,path=s,,t",
    "stdio,id=x,signal=foo",
    "file,id=x,path=f,input-path=nonexistent",
    "pipe,id=x",
    "null,id=x,logfile=/nonexistent/log",
    "ringbuf,id=x,size=-1",
    "ringbuf,id=x,size=1.5",
    "null,id=x,mux=foo",
    "null,help",
    "null,id=1y,id=x",
    "null,id=type",
    "null,,id=x",
    "null,nofoo",
    "null,id=x,=y",
    "socket,id=x,help=on",
    "pty,id=x,path=/nonexistent/x",
]


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: text[:60])
def test_mistake(text: str, tmp_path: Path) -> None:
    results = []
    for kind in ("qsd", "pyqsd"):
        done = run_to_end(kind, ["--chardev", text], workdir=tmp_path)
        # QSD says where the terminal is although it then takes it away again.
        stdout = re.sub(r"char device redirected to .*\n", "", done.stdout)
        results.append((done.returncode, stdout, program_text(done.stderr)))
    assert results[0] == results[1]
