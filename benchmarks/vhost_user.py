"""vhost-user-blk exports, with a front-end in C (`vhost_user_client.c`): a virtual machine would measure itself."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from benchmarks.servers import EXPORT, Image, Qmp, Running
from benchmarks.workloads import KINDS, Images, Run, Workload

_SOURCE = Path(__file__).with_name("vhost_user_client.c")


def client(images: Images) -> Path:
    """The compiled front-end, made once."""
    path = images.root / "vhost_user_client"
    if not path.exists():
        subprocess.run(["gcc", "-O2", "-o", str(path), str(_SOURCE)], check=True)
    return path


def random_4k(kind: str, what: str, depth: int) -> Callable[[Run], float]:
    """Requests per second of 4 KiB each, `depth` at a time; `what`: read or write."""

    def measure(run: Run) -> float:
        make, opened = KINDS[kind]
        image = Image(make(run.images), **opened)
        with Running(run.server, image, run.workdir, qmp=True) as running:
            assert running.qmp is not None
            path = run.workdir / "vhost-user.sock"
            with Qmp(running.qmp) as qmp:
                address = {"type": "unix", "path": str(path)}
                qmp.command(
                    "block-export-add", type="vhost-user-blk", id="v", node_name=EXPORT, writable=True, addr=address
                )
            argv = [str(client(run.images)), str(path), what, str(depth), str(run.seconds), str(run.images.size)]
            done = subprocess.run(argv, capture_output=True, text=True, timeout=run.seconds + 60, check=False)
            if done.returncode:
                raise RuntimeError(f"the front-end: {done.stderr}")
            return float(done.stdout)

    return measure


WORKLOADS = [
    Workload(f"vhost-user {kind} rand{what} 4k qd{depth}", "IOPS", random_4k(kind, what, depth))
    for kind in ("raw", "qcow2")
    for what, depth in (("read", 1), ("read", 32), ("write", 1), ("write", 32))
]
