"""``make run``: what it prints is true, and it never guesses that an image is raw."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import images, peers
from tests.support.daemon import poll
from tests.support.qmp import QmpClient

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = [sys.executable, str(ROOT / "scripts" / "run.py")]
MiB = 1 << 20


@contextmanager
def serving(directory: Path, *args: str) -> Iterator[tuple[str, str]]:
    """Run it in `directory`; the URI and the QMP socket that it printed."""
    process = subprocess.Popen([*SCRIPT, *args], cwd=directory, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        text = ""
        while "Ctrl-C ends it." not in text:
            line = process.stdout.readline()
            assert line, text
            text += line
        uri, qmp = re.search(r"NBD: (\S+)", text), re.search(r"QMP: (\S+)", text)
        assert uri and qmp
        yield uri[1], qmp[1]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert not Path(qmp[1]).exists()


def refused(directory: Path, *args: str) -> str:
    done = subprocess.run([*SCRIPT, *args], cwd=directory, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode != 0 and done.stdout == ""
    return done.stderr


def test_demonstration(tmp_path: Path) -> None:
    with serving(tmp_path) as (uri, qmp):
        assert json.loads(peers.run("nbdinfo", "--json", uri).stdout)["exports"][0]["export-size"] == 1 << 30
        peers.run("qemu-io", "-f", "raw", "-c", "write -P 42 1M 64k", uri)
        with QmpClient(qmp) as client:
            assert client.execute("query-block-exports")[0]["id"] == "export"
        assert "another `make run`" in refused(tmp_path)
    images.check(tmp_path / ".run" / "demo.qcow2")
    with serving(tmp_path) as (uri, _):
        peers.run("qemu-io", "-f", "raw", "-c", "read -P 42 1M 64k", uri)


def test_image_with_a_difficult_name(tmp_path: Path) -> None:
    directory = tmp_path / "a,b c"
    directory.mkdir()
    images.create(directory / "x,y.qcow2", MiB, "qcow2")
    with serving(directory, "--image", "x,y.qcow2") as (uri, _):
        peers.run("qemu-io", "-f", "raw", "-c", "write -P 42 0 64k", uri)
    images.io(directory / "x,y.qcow2", "read -P 42 0 64k")


def test_directory_too_deep_for_a_socket(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 100)
    directory.mkdir()
    with serving(directory) as (uri, qmp):
        peers.run("nbdinfo", uri)
        assert len(qmp) < 108
    poll(lambda: not Path(qmp).parent.exists(), "the removal of its directory")


def test_raw_only_if_told(tmp_path: Path) -> None:
    images.create(tmp_path / "disk.img", MiB, "raw")
    assert "if it is a raw disk, say so" in refused(tmp_path, "--image", "disk.img")
    (tmp_path / "disk.vmdk").write_bytes(b"KDMV".ljust(1 << 16, b"\0"))
    assert "looks like a VMDK image" in refused(tmp_path, "--image", "disk.vmdk")
    assert "No such file" in refused(tmp_path, "--image", "nosuch")
    with serving(tmp_path, "--image", "disk.img", "--format", "raw") as (uri, _):
        peers.run("qemu-io", "-f", "raw", "-c", "write -P 42 0 64k", uri)
    assert (tmp_path / "disk.img").read_bytes()[:65536] == b"\x2a" * 65536


def test_read_only(tmp_path: Path) -> None:
    images.create(tmp_path / "disk.qcow2", MiB, "qcow2")
    before = (tmp_path / "disk.qcow2").read_bytes()
    with serving(tmp_path, "--image", "disk.qcow2", "--read-only") as (uri, _):
        assert json.loads(peers.run("nbdinfo", "--json", uri).stdout)["exports"][0]["is_read_only"]
    assert (tmp_path / "disk.qcow2").read_bytes() == before
