"""Fixtures for vhost-user-blk exports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.exports.vhost_user.frontend import Frontend
from tests.support.daemon import DaemonProcess

MIB = 1 << 20
SIZE = 8 * MIB


class Served:
    """A daemon that exports ``disk.raw`` as ``vu.sock``."""

    def __init__(self, workdir: Path, kind: str = "pyqsd", export: str = "writable=on", file: str = "") -> None:
        self.workdir = workdir
        self.image = workdir / "disk.raw"
        if not self.image.exists():
            with self.image.open("wb") as image:
                image.truncate(SIZE)
        self.path = workdir / "vu.sock"
        self.kind = kind
        args = [
            "--blockdev",
            f"driver=file,node-name=disk,filename={self.image},discard=unmap{file}",
            "--export",
            f"type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={self.path},{export}",
        ]
        self.daemon = DaemonProcess(kind, args, workdir=workdir)

    def connect(self, **more: Any) -> Frontend:
        return Frontend(self.path, **more)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Start daemons; each in a directory of its own."""
    with ExitStack() as stack:
        count = 0

        def start(kind: str = "pyqsd", **more: Any) -> Served:
            nonlocal count
            count += 1
            workdir = tmp_path / f"{kind}{count}"
            workdir.mkdir()
            served = Served(workdir, kind, **more)
            stack.enter_context(served.daemon)
            return served

        yield start


@pytest.fixture(params=["pyqsd", "qsd"])
def served(request: pytest.FixtureRequest, serve: Callable[..., Served]) -> Served:
    """Either daemon, with four queues: what is tested with it holds for both."""
    return serve(request.param, export="writable=on,num-queues=4")
