"""The same command lines to the real qemu-storage-daemon and to pyqsd: same stderr after the program's name, same exit
status."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cli.command_lines import OBJECTS, RIGHT, SENTINEL, WRONG
from tests.support import images
from tests.support.daemon import run_to_end

TIMEOUT = 30.0

#: Lists whose length says how far pyqsd has come: ours has to be part of theirs.
LISTS = (["-T", "help"], ["--chardev", "help"], ["--chardev", "?"])


class Outcome(NamedTuple):
    """What a command line led to."""

    status: object
    stdout: str
    stderr: str


def outcome(status: object, stdout: str, stderr: str, program: str) -> Outcome:
    """With what has to differ taken out: getopt's own messages start with the path of the program, others with its
    name."""
    return Outcome(status, stdout, re.sub(rf"(?m)^(\S*/)?{program}:", "PROGRAM:", stderr))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("template")
    images.create(directory / "raw.img", 1 << 20, "raw")
    images.create(directory / "disk.qcow2", 1 << 20, "qcow2")
    (directory / "events").write_text("blk_root_attach\n# a comment\n\nnosuch_event\n-blk_root_attach\n  nbd_*\n")
    return directory


def run(kind: str, argv: Sequence[str], cwd: Path) -> Outcome:
    done = run_to_end(kind, argv, workdir=cwd, timeout=TIMEOUT)
    return outcome(done.returncode, done.stdout, done.stderr, {"qsd": "qemu-storage-daemon"}.get(kind, kind))


def both(argv: Sequence[str], template: Path, tmp_path: Path) -> tuple[Outcome, Outcome]:
    shutil.copytree(template, tmp_path / "theirs")
    shutil.copytree(template, tmp_path / "ours")
    return run("qsd", argv, tmp_path / "theirs"), run("pyqsd", argv, tmp_path / "ours")


def name(argv: list[str]) -> str:
    return " ".join(argv)[:100] or "nothing"


@pytest.mark.parametrize("argv", WRONG + OBJECTS, ids=name)
def test_wrong(argv: list[str], template: Path, tmp_path: Path) -> None:
    theirs, ours = both(argv, template, tmp_path)
    if argv in LISTS:
        assert ours.stdout.strip()
        assert set(ours.stdout.splitlines()) <= set(theirs.stdout.splitlines())
        ours = ours._replace(stdout=theirs.stdout)
    assert ours == theirs


@pytest.mark.parametrize("argv", RIGHT, ids=name)
def test_right(argv: list[str], template: Path, tmp_path: Path) -> None:
    theirs, ours = both(argv + SENTINEL, template, tmp_path)
    assert theirs.status == 1 and "does not accept value 'nosuch-sentinel'" in theirs.stderr
    assert ours == theirs
    # What stays behind is a daemon's own business only where it ends in order: no sockets, no process ID file.
    for left in ("n.sock", "q.sock", "p", "q"):
        assert not (tmp_path / "ours" / left).exists()
