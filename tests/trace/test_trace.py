"""Trace events: names, switching, the log."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyqsd.trace import EVENTS, control
from tests.support import images, peers
from tests.support.daemon import DaemonProcess, run_to_end

MiB = 1 << 20


@pytest.fixture
def all_off() -> Iterator[None]:
    yield
    for event in EVENTS.values():
        event.enabled = False


def on() -> set[str]:
    return {name for name, event in EVENTS.items() if event.enabled}


@pytest.mark.usefixtures("all_off")
def test_patterns() -> None:
    control.enable("nbd_negotiate_begin")
    assert on() == {"nbd_negotiate_begin"}
    control.enable("blk_root_*")
    assert on() == {"nbd_negotiate_begin", "blk_root_attach", "blk_root_detach"}
    control.enable("-*attach")
    assert on() == {"nbd_negotiate_begin", "blk_root_detach"}
    control.enable("-nbd_negotiate_begin")
    control.enable("*[b]*")
    assert on() == {"blk_root_detach"}
    control.enable("*root?d*")
    control.enable("*")
    assert on() == set(EVENTS)
    control.enable("-*")
    assert on() == set()


@pytest.mark.usefixtures("all_off")
def test_file_of_patterns(tmp_path: Path) -> None:
    (tmp_path / "events").write_text("nbd_*\n\n# blk_root_attach\nblk_root_detach\n-nbd_negotiate_success\n")
    control.enable_from_file(str(tmp_path / "events"))
    assert on() == {"nbd_negotiate_begin", "blk_root_detach"}


def test_names_are_those_of_qsd(tmp_path: Path) -> None:
    theirs = run_to_end("qsd", ["--trace", "help"], workdir=tmp_path).stdout.split()
    assert set(control.listing().split()) <= set(theirs)


@pytest.mark.parametrize("kind", ["qsd", "pyqsd"])
def test_log_of_a_session(kind: str, tmp_path: Path) -> None:
    """The same session traced by both: the same events in the same order, with the same words."""
    images.create(tmp_path / "disk.img", MiB, "raw")
    args = ["--trace", "blk_root_*,file=log"]
    for name in ("bdrv_open_common", "nbd_negotiate_begin", "nbd_negotiate_success", "handle_qmp_command"):
        args += ["-T", name]
    args += ["-T", "monitor_qmp_respond", "--blockdev", "file,node-name=n,filename=disk.img"]
    args += ["--nbd-server", "addr.type=unix,addr.path=nbd.sock", "--export", "nbd,id=e,node-name=n"]
    with DaemonProcess(kind, args, workdir=tmp_path) as daemon:
        peers.run("nbdinfo", "--size", "nbd+unix:///n?socket=nbd.sock", cwd=tmp_path)
        daemon.qmp.execute("block-export-del", id="e", mode="hard")
        daemon.qmp.wait_event("BLOCK_EXPORT_DELETED")
    lines = (tmp_path / "log").read_text().splitlines()
    assert re.fullmatch(r'bdrv_open_common bs 0x\w+ filename "[^"]*disk.img" flags 0x\w+ format_name "file"', lines[0])
    assert re.fullmatch(r"blk_root_attach child 0x\w+ blk 0x\w+ bs 0x\w+", lines[1])
    rest = [line for line in lines[2:] if not line.startswith(("handle_qmp", "monitor_qmp"))]
    assert rest[:2] == ["nbd_negotiate_begin Beginning negotiation", "nbd_negotiate_success Negotiation succeeded"]
    assert re.fullmatch(r"blk_root_detach child 0x\w+ blk 0x\w+ bs 0x\w+", rest[-1])
    qmp = [line for line in lines if line.startswith(("handle_qmp", "monitor_qmp"))]
    assert re.match(r'monitor_qmp_respond mon 0x\w+ resp: \{"QMP": ', qmp[0])
    match = re.fullmatch(r"handle_qmp_command mon 0x\w+ req: (.*)", qmp[1])
    assert match and json.loads(match[1])["execute"] == "qmp_capabilities"
    assert re.match(r"monitor_qmp_respond mon 0x\w+ resp: \{\"return\": \{\}", qmp[2])
