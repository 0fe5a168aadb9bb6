"""Differential and abuse: images with one thing wrong. The same refusal or the same data as from the real daemon, the
other export is served all the time, and nothing crashes."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from tests.support import nbd
from tests.support.nbd import NbdClient, is_alive
from tests.system import mangle
from tests.system.differential import Context, Do, Session, check_session, cmd, run_session
from tests.system.test_differential_blockdev import NBD_START, export, qcow2, raw

MiB = 1 << 20
STEP = 64 * 1024
KILLS_QSD = ("l1-header",)  # when it is opened for writing
REACH = 4 * MiB  # how far into a (perhaps enormous) image is looked


def use(writable: bool) -> Any:
    """Reads the node through an export; with `writable`, writes to places of all kinds as well.

    The reads of a read-only node are compared between the daemons. Where a broken image is written to, the outcome
    depends on where clusters happen to be allocated: there it is enough that every request is answered, and that the
    other export goes on.
    """

    def run(context: Context) -> Any:
        qmp = context.daemon.qmp
        reply = qmp.command("block-export-add", **{"type": "nbd", "id": "e", "node-name": "m", "writable": writable})
        if "error" in reply:
            return reply
        answers: list[Any] = []
        with NbdClient(context.workdir / "nbd.sock", "m", timeout=10, structured=False) as client:
            size = client.size
            answers.append(["size", size])

            def ask(command: int, offset: int, length: int, payload: bytes = b"") -> None:
                cookie = client.send(command, offset, length, 0, payload)
                got = client.receive()
                assert got.cookie == cookie
                data = "" if got.error or command else zlib.crc32(NbdClient.assemble(got, offset, length))
                answers.append([command, offset, length, got.error, data])

            places = [*range(0, min(size, REACH), STEP), *([size - 512] if size > REACH else [])]
            for offset in places:
                ask(nbd.CMD_READ, offset, min(STEP, size - offset))
            if writable:
                for offset in [place for place in (0, STEP, 3 * STEP, MiB, 2 * MiB, 3 * MiB) if place + 512 <= size]:
                    ask(nbd.CMD_WRITE, offset, 512, b"w" * 512)
                if size >= 2 * STEP:
                    ask(nbd.CMD_WRITE_ZEROES, STEP, STEP)
                    ask(nbd.CMD_TRIM, 0, STEP)
                ask(nbd.CMD_FLUSH, 0, 0)
                for offset in places[:8]:
                    ask(nbd.CMD_READ, offset, min(STEP, size - offset))
            client.disconnect()
        is_alive(context.workdir / "nbd.sock", "other", b"\x11" * 512)
        qmp.execute("block-export-del", id="e", mode="hard")
        qmp.wait_event("BLOCK_EXPORT_DELETED")
        return len(answers) if writable else answers

    return run


def node_info(context: Context) -> Any:
    """What is said of the node, without its size on the host (that is a matter of allocation)."""
    reply = context.daemon.qmp.command("query-named-block-nodes", flat=True)
    if "error" in reply:
        return reply
    for node in reply["return"]:
        if node["node-name"] == "m":
            node["image"].pop("actual-size", None)
            return node
    return None


def steps_of(name: str, patch: mangle.Patch, read_only: bool) -> list[Any]:
    def build(context: Context) -> None:
        mangle.write(context.workdir / "m.qcow2", (context.workdir / "plain.qcow2").read_bytes(), patch)

    return [
        Do(f"{name}: build", build),
        Do(
            f"{name}: open",
            lambda c: c.daemon.qmp.raw_command(qcow2("m", "m.qcow2", read_only=read_only, discard="unmap")),
        ),
        Do(f"{name}: info", node_info),
        Do(f"{name}: use", use(not read_only)),
        Do(f"{name}: close", lambda c: c.daemon.qmp.raw_command(cmd("blockdev-del", node_name="m"))),
    ]


def session(group: str, read_only: bool) -> Session:
    steps: list[Any] = [NBD_START, raw("other", read_only=True), export("o", "other")]
    for name, patch in mangle.GROUPS[group].items():
        if name in KILLS_QSD and not read_only:
            continue
        steps += steps_of(name, patch, read_only)
    name = f"mangled-{group}-{'ro' if read_only else 'rw'}"
    return Session(name, steps, images=("plain.qcow2", "raw.img"), compare_events=read_only)


@pytest.mark.parametrize("read_only", [True, False], ids=["ro", "rw"])
@pytest.mark.parametrize("group", list(mangle.GROUPS))
def test_mangled(group: str, read_only: bool, image_set: Path, tmp_path: Path) -> None:
    check_session(session(group, read_only), image_set, tmp_path)


@pytest.mark.parametrize("name", KILLS_QSD)
def test_mangled_beyond_qsd(name: str, image_set: Path, tmp_path: Path) -> None:
    """What makes the real daemon abort is an error here, and the other export goes on."""
    patch = next(patches[name] for patches in mangle.GROUPS.values() if name in patches)
    for image in ("plain.qcow2", "raw.img"):
        (tmp_path / image).write_bytes((image_set / image).read_bytes())
    steps = [NBD_START, raw("other", read_only=True), export("o", "other"), *steps_of(name, patch, False)]
    results = dict(run_session("pyqsd", Session("alone", steps), tmp_path))
    assert results["exit status"] == 0
    assert results[f"{name}: close"] in ({"return": {}}, {"error": ANY})


SESSIONS = [session(group, read_only) for group in mangle.GROUPS for read_only in (True, False)]
