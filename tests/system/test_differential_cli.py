"""Differential: command lines. Those that end by themselves (mistakes, help) and those that start a daemon."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support.daemon import DaemonProcess, poll, run_to_end
from tests.support.nbd import NbdClient
from tests.system.differential import Do, Session, check_command_line, check_session, cmd

NBD = ["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]
FILE = ["--blockdev", "file,node-name=f,filename=raw.img"]

# A mistake each: the same line after the program's name, the same exit status.
MISTAKES: dict[str, list[str]] = {
    "unknown-option": ["--nosuch"],
    "unknown-short-option": ["-x"],
    "positional": ["disk.img"],
    "positional-after-option": [*FILE, "disk.img"],
    "blockdev-no-value": ["--blockdev"],
    "blockdev-empty": ["--blockdev", ""],
    "blockdev-only-driver": ["--blockdev", "null-co"],
    "blockdev-no-driver": ["--blockdev", "node-name=a"],
    "blockdev-unknown-driver": ["--blockdev", "nosuch,node-name=a"],
    "blockdev-unknown-option": ["--blockdev", "null-co,node-name=a,nosuch=1"],
    "blockdev-unknown-nested": ["--blockdev", "raw,node-name=a,file.driver=null-co,file.nosuch=1"],
    "blockdev-missing": ["--blockdev", "file,node-name=a"],
    "blockdev-bool": ["--blockdev", "null-co,node-name=a,read-only=maybe"],
    "blockdev-bool-yes": ["--blockdev", "null-co,node-name=a,read-only=yes", "--nosuch"],
    "blockdev-int": ["--blockdev", "null-co,node-name=a,size=big"],
    "blockdev-int-suffix": ["--blockdev", "null-co,node-name=a,size=1Q"],
    "blockdev-int-empty": ["--blockdev", "null-co,node-name=a,size="],
    "blockdev-negative-latency": ["--blockdev", "null-co,node-name=a,latency-ns=-1"],
    "blockdev-bad-key": ["--blockdev", "null-co,1x=2"],
    "blockdev-empty-key": ["--blockdev", "null-co,=2"],
    "blockdev-dotted-end": ["--blockdev", "null-co,a.=2"],
    "blockdev-no-equals": ["--blockdev", "null-co,node-name"],
    "blockdev-key-both": ["--blockdev", "raw,node-name=a,file=x,file.driver=null-co"],
    "blockdev-key-both-reversed": ["--blockdev", "raw,node-name=a,file.driver=null-co,file=x"],
    "blockdev-twice": ["--blockdev", "null-co,node-name=a,node-name=1b"],
    "blockdev-comma": ["--blockdev", "null-co,node-name=a,,b"],
    "blockdev-trailing-comma": ["--blockdev", "null-co,node-name=1a,"],
    "blockdev-help": ["--blockdev", "help"],
    "blockdev-help-late": ["--blockdev", "null-co,help"],
    "blockdev-question": ["--blockdev", "?"],
    "blockdev-json": ["--blockdev", '{"driver": "null-co"}'],
    "blockdev-json-broken": ["--blockdev", '{"driver": "null-co"'],
    "blockdev-json-tail": ["--blockdev", '{"driver": "null-co", "node-name": "a"} x'],
    "blockdev-json-typed": ["--blockdev", '{"driver": "null-co", "node-name": "a", "size": "1"}'],
    "blockdev-json-list": ["--blockdev", "[]"],
    "blockdev-json-unicode": ["--blockdev", '{"driver": "null-co", "node-name": "\\ud800"}'],
    "blockdev-duplicate": ["--blockdev", "null-co,node-name=a", "--blockdev", "null-co,node-name=a"],
    "blockdev-no-file": ["--blockdev", "file,node-name=a,filename=nosuch.img"],
    "blockdev-list": ["--blockdev", "qcow2,node-name=a,file.0=x"],
    "blockdev-deep": ["--blockdev", "raw,node-name=a,file.driver=raw,file.file.driver=raw,file.file.file=x"],
    "blockdev-qcow2-backing-null": ["--blockdev", "qcow2,node-name=a,file=f,backing="],
    "blockdev-overlap": ["--blockdev", "qcow2,node-name=a,file=f,overlap-check.template=nosuch"],
    "blockdev-long-key": ["--blockdev", "null-co," + "x" * 200 + "=1"],
    "export-no-value": ["--export"],
    "export-empty": ["--export", ""],
    "export-unknown-type": ["--export", "nosuch,id=e,node-name=f"],
    "export-no-id": [*FILE, *NBD, "--export", "nbd,node-name=f"],
    "export-no-node": [*FILE, *NBD, "--export", "nbd,id=e"],
    "export-unknown-node": [*NBD, "--export", "nbd,id=e,node-name=nosuch"],
    "export-no-server": [*FILE, "--export", "nbd,id=e,node-name=f"],
    "export-bool": [*FILE, *NBD, "--export", "nbd,id=e,node-name=f,writable=maybe"],
    "export-unexpected": [*FILE, *NBD, "--export", "nbd,id=e,node-name=f,nosuch=1"],
    "export-bad-id": [*FILE, *NBD, "--export", "nbd,id=1,node-name=f"],
    "export-order": [*NBD, "--export", "nbd,id=e,node-name=f", *FILE],
    "export-twice": [*FILE, *NBD, "--export", "nbd,id=e,node-name=f", "--export", "nbd,id=e,node-name=f"],
    "export-bitmaps": [*FILE, *NBD, "--export", "nbd,id=e,node-name=f,bitmaps.0=nosuch"],
    "export-bitmaps-gap": [*FILE, *NBD, "--export", "nbd,id=e,node-name=f,bitmaps.1=nosuch"],
    "nbd-no-value": ["--nbd-server"],
    "nbd-empty": ["--nbd-server", ""],
    "nbd-no-type": ["--nbd-server", "addr.path=x"],
    "nbd-bad-type": ["--nbd-server", "addr.type=nosuch"],
    "nbd-bad-dir": ["--nbd-server", "addr.type=unix,addr.path=nodir/x"],
    "nbd-no-port": ["--nbd-server", "addr.type=inet,addr.host=127.0.0.1"],
    "nbd-data": ["--nbd-server", "addr.type=unix,addr.data.path=x"],
    "nbd-twice": [*NBD, *NBD],
    "nbd-max-connections": [*NBD[:1], "addr.type=unix,addr.path=nbd.sock,max-connections=x"],
    "nbd-max-connections-big": [*NBD[:1], "addr.type=unix,addr.path=nbd.sock,max-connections=4294967296"],
    "nbd-fd": ["--nbd-server", "addr.type=fd,addr.str=99"],
    "nbd-fd-name": ["--nbd-server", "addr.type=fd,addr.str=nosuch"],
    "nbd-implied": ["--nbd-server", "unix"],
    "object-no-value": ["--object"],
    "object-empty": ["--object", ""],
    "object-unknown": ["--object", "nosuch,id=a"],
    "object-no-id": ["--object", "authz-simple"],
    "object-bad-id": ["--object", "authz-simple,id=1,identity=x"],
    "object-unexpected": ["--object", "authz-simple,id=a,identity=x,nosuch=1"],
    "object-bool": ["--object", "authz-list-file,id=a,filename=x,refresh=maybe"],
    "object-twice": ["--object", "secret,id=a,data=x", "--object", "secret,id=a,data=y"],
    "object-secret": ["--object", "secret,id=s"],
    "object-secret-file": ["--object", "secret,id=s,file=nosuch"],
    "object-json": ["--object", '{"qom-type": "secret"}'],
    "object-help-authz-list": ["--object", "authz-list,help"],
    "object-help-authz-list-file": ["--object", "authz-list-file,help"],
    "object-help-authz-simple": ["--object", "authz-simple,help"],
    "object-help-secret-keyring": ["--object", "secret_keyring,help"],
    "object-help-secret": ["--object", "secret,help"],
    "object-help-with-id": ["--object", "secret,id=a,help"],
    "chardev-no-value": ["--chardev"],
    "chardev-empty": ["--chardev", ""],
    "chardev-unknown": ["--chardev", "nosuch,id=c"],
    "chardev-no-id": ["--chardev", "null"],
    "chardev-bad-id": ["--chardev", "null,id=1"],
    "chardev-unexpected": ["--chardev", "null,id=c,nosuch=1"],
    "chardev-twice": ["--chardev", "null,id=c", "--chardev", "null,id=c"],
    "chardev-file-no-path": ["--chardev", "file,id=c"],
    "chardev-socket-nothing": ["--chardev", "socket,id=c"],
    "chardev-socket-both": ["--chardev", "socket,id=c,path=x,host=y,port=1"],
    "chardev-socket-no-port": ["--chardev", "socket,id=c,host=y"],
    "chardev-socket-wait-client": ["--chardev", "socket,id=c,path=x,server=off,wait=on"],
    "chardev-socket-refused": ["--chardev", "socket,id=c,path=nosuch.sock"],
    "chardev-socket-bool": ["--chardev", "socket,id=c,path=c.sock,server=maybe"],
    "chardev-socket-dir": ["--chardev", "socket,id=c,path=nodir/c.sock,server=on,wait=off"],
    "chardev-pipe": ["--chardev", "pipe,id=c,path=nosuch"],
    "chardev-ringbuf-size": ["--chardev", "ringbuf,id=c,size=1000"],
    "chardev-fd": ["--chardev", "socket,id=c,fd=99"],
    "monitor-no-value": ["--monitor"],
    "monitor-empty": ["--monitor", ""],
    "monitor-unknown-chardev": ["--monitor", "chardev=nosuch"],
    "monitor-implied": ["--monitor", "nosuch"],
    "monitor-no-chardev": ["--monitor", "mode=control"],
    "monitor-readline": ["--chardev", "null,id=c", "--monitor", "chardev=c,mode=readline"],
    "monitor-bad-mode": ["--chardev", "null,id=c", "--monitor", "chardev=c,mode=nosuch"],
    "monitor-unexpected": ["--chardev", "null,id=c", "--monitor", "chardev=c,nosuch=1"],
    "monitor-pretty": ["--chardev", "null,id=c", "--monitor", "chardev=c,pretty=maybe"],
    "monitor-order": ["--monitor", "chardev=c", "--chardev", "null,id=c"],
    "monitor-shared-chardev": ["--chardev", "null,id=c", "--monitor", "c", "--monitor", "c"],
    "pidfile-no-value": ["--pidfile"],
    "pidfile-dir": ["--pidfile", "nodir/pid"],
    "daemonize-value": ["--daemonize=x"],
    "trace-no-file": ["--trace", "events=nosuch"],
    "abbreviated": ["--blockd", "nosuch"],
    "equals": ["--blockdev=nosuch"],
    "mistake-before-daemonize": ["--blockdev", "nosuch", "--daemonize"],
    "daemonize-mistake": ["--daemonize", "--blockdev", "nosuch"],
    "json-monitor": ["--monitor", '{"chardev": "nosuch"}'],
    "json-export": ["--export", '{"type": "nbd", "id": "e", "node-name": "nosuch"}'],
    "json-nbd": ["--nbd-server", '{"addr": {"type": "nosuch"}}'],
    "json-chardev": ["--chardev", '{"id": "c", "backend": {"type": "nosuch", "data": {}}}'],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name: str, image_set: Path, tmp_path: Path) -> None:
    check_command_line(f"cli-{name}", MISTAKES[name], image_set, ["raw.img"], tmp_path)


@pytest.mark.parametrize("option", ["--version", "-V", "-Vx"])
def test_version(option: str, tmp_path: Path) -> None:
    theirs = run_to_end("qsd", [option], workdir=tmp_path)
    ours = run_to_end("pyqsd", [option], workdir=tmp_path)
    assert ours.returncode == theirs.returncode == 0
    assert "version 10.0.2" in theirs.stdout
    assert "version 10.0.2" in ours.stdout  # tools that ask which daemon this is look for this
    assert ours.stderr == theirs.stderr == ""


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(option: str, tmp_path: Path) -> None:
    """The same options in the same order; the text is our own."""

    def options(text: str) -> list[str]:
        return [line.split()[0].rstrip(",") for line in text.splitlines() if line.lstrip().startswith("-")]

    theirs = run_to_end("qsd", [option], workdir=tmp_path)
    ours = run_to_end("pyqsd", [option], workdir=tmp_path)
    assert ours.returncode == theirs.returncode == 0
    assert ours.stderr == theirs.stderr == ""
    assert len(options(theirs.stdout)) > 10
    assert set(options(theirs.stdout)) <= set(options(ours.stdout))


def test_help_after_a_mistake(tmp_path: Path) -> None:
    """--help is seen before anything is done."""
    theirs = run_to_end("qsd", ["--blockdev", "nosuch", "--help"], workdir=tmp_path)
    ours = run_to_end("pyqsd", ["--blockdev", "nosuch", "--help"], workdir=tmp_path)
    assert (ours.returncode, ours.stderr) == (theirs.returncode, theirs.stderr) == (0, "")
    assert ours.stdout == run_to_end("pyqsd", ["--help"], workdir=tmp_path).stdout


def test_object_help(tmp_path: Path) -> None:
    """Every type that pyqsd has is one of QSD's, and those of this release are there."""
    theirs = run_to_end("qsd", ["--object", "help"], workdir=tmp_path)
    ours = run_to_end("pyqsd", ["--object", "help"], workdir=tmp_path)
    assert ours.returncode == theirs.returncode == 0
    mine = ours.stdout.splitlines()
    assert mine[0] == theirs.stdout.splitlines()[0]
    assert set(mine) <= set(theirs.stdout.splitlines())
    assert {"  authz-list", "  authz-list-file", "  authz-simple", "  secret", "  secret_keyring"} <= set(mine)


STARTED = [
    Session(
        "cli-keyval",
        [
            cmd("query-named-block-nodes"),
            cmd("query-block-exports"),
            cmd("query-chardev"),
            cmd("qom-list", path="/objects"),
            cmd("x-debug-query-block-graph"),
            Do("served", lambda c: NbdClient(c.workdir / "nbd.sock", "disk").size),
        ],
        args=[
            "--object",
            "secret,id=t,data=x",
            "--blockdev",
            "driver=file,node-name=f,filename=raw.img,cache.direct=off,discard=unmap",
            "--blockdev",
            "raw,node-name=r,file=f,offset=4096,size=65536",
            "--blockdev",
            "qcow2,node-name=q,file.driver=file,file.filename=plain.qcow2,l2-cache-size=1048576,cache-clean-interval=0x10",
            "--blockdev",
            "null-co,node-name=n,size=1073741824,read-zeroes=on",
            "--chardev",
            "ringbuf,id=ring,size=2K",
            "--nbd-server",
            "addr.type=unix,addr.path=nbd.sock,max-connections=3",
            "--export",
            "nbd,id=e,node-name=r,name=disk,writable=on,description=a,,b",
            "--export",
            "type=nbd,id=e2,node-name=n",
        ],
        images=("raw.img", "plain.qcow2"),
    ),
    Session(
        "cli-json",
        [
            cmd("query-named-block-nodes"),
            cmd("query-block-exports"),
            cmd("query-chardev"),
            cmd("qom-list", path="/objects"),
        ],
        args=[
            "--object",
            '{"qom-type": "authz-simple", "id": "t", "identity": "x"}',
            "--blockdev",
            '{"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": "raw.img"}, "offset": 512}',
            "--nbd-server",
            '{"addr": {"type": "unix", "path": "nbd.sock"}}',
            "--export",
            '{"type": "nbd", "id": "e", "node-name": "r", "writable": true}',
        ],
        images=("raw.img",),
    ),
    Session(
        "cli-accepted",
        ["query-chardev", Do("pidfiles", lambda c: [(c.workdir / name).exists() for name in ("a", "b")])],
        args=[
            *("--chardev", "socket,id=c,path=c.sock,server=on,wait=off,reconnect-ms=5"),
            *("--pidfile", "a", "--pidfile", "b"),
        ],
    ),
    Session("cli-trace-unknown", ["query-chardev"], args=["--trace", "nosuch"]),
    Session(
        "cli-monitor-same-id",
        ["query-chardev"],
        args=[
            *("--chardev", "null,id=c", "--chardev", "null,id=d"),
            *("--monitor", "chardev=c,id=m", "--monitor", "chardev=d,id=m"),
        ],
    ),
    Session(
        "cli-start-failure",
        ["query-version"],
        args=["--blockdev", "qcow2,node-name=q,file.driver=file,file.filename=raw.img"],
        images=("raw.img",),
        may_fail_to_start=True,
    ),
]


@pytest.mark.parametrize("session", STARTED, ids=lambda session: session.name)
def test_started(session: Session, image_set: Path, tmp_path: Path) -> None:
    session.compare_stderr = True
    check_session(session, image_set, tmp_path)


@pytest.mark.parametrize("kind", ["qsd", "pyqsd"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGTERM])
def test_signals(kind: str, number: signal.Signals, image_set: Path, tmp_path: Path) -> None:
    """Each ends it cleanly: status 0, sockets and pidfile gone."""
    raw = image_set / "raw.img"
    args = ["--blockdev", f"file,node-name=f,filename={raw},read-only=on", *NBD, "--export", "nbd,id=e,node-name=f"]
    with DaemonProcess(kind, [*args, "--pidfile", "pid"], workdir=tmp_path) as daemon:
        assert (tmp_path / "pid").read_text() == f"{daemon.pid}\n"
        assert daemon.terminate(number) == 0
    left = {path.name for path in tmp_path.iterdir()}
    if kind == "qsd":
        left -= {"nbd.sock", "qmp.sock"}  # which it leaves behind
    assert left == {f"stderr.{kind}"}


@pytest.mark.parametrize("kind", ["qsd", "pyqsd"])
def test_daemonize(kind: str, image_set: Path, tmp_path: Path) -> None:
    """The parent returns 0 when everything is served; the pidfile names the child."""
    raw = image_set / "raw.img"
    args = ["--blockdev", f"file,node-name=f,filename={raw},read-only=on", *NBD, "--export", "nbd,id=e,node-name=f"]
    done = run_to_end(kind, [*args, "--pidfile", str(tmp_path / "pid"), "--daemonize"], workdir=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = int((tmp_path / "pid").read_text())
    try:
        with NbdClient(tmp_path / "nbd.sock", "f") as client:
            assert client.pread(0, 16) == b"\x11" * 16
        assert os.getsid(pid) not in (os.getsid(0), 0)
    finally:
        os.kill(pid, signal.SIGTERM)
    poll(lambda: not (tmp_path / "pid").exists(), "the pidfile to go")
    if kind == "pyqsd":  # QSD leaves it behind
        poll(lambda: not (tmp_path / "nbd.sock").exists(), "the socket to go")


@pytest.mark.parametrize("kind", ["qsd", "pyqsd"])
def test_pidfile_locked(kind: str, tmp_path: Path) -> None:
    """A second daemon with the same pidfile is refused, with the same words."""
    with DaemonProcess(kind, ["--pidfile", "pid"], workdir=tmp_path):
        done = run_to_end(kind, ["--pidfile", "pid"], workdir=tmp_path)
        assert done.returncode == 1
        assert done.stderr.endswith(
            ": cannot create PID file: Cannot lock pid file: Resource temporarily unavailable\n"
        )
        assert (tmp_path / "pid").exists()
