"""A Linux guest without a distribution: a kernel, the modules that it needs, and one static program as its init.

`scripts/prepare test` has unpacked the kernel. The guest runs without hardware virtualization; it boots in a few
seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support import peers

TIMEOUT = 110.0
#: Where `scripts/prepare` puts the kernel: beside the Python that runs the tests.
ROOT = Path(os.environ.get("PYQSD_GUEST", Path(sys.prefix) / "guest"))


def kernel() -> Path:
    """The kernel's image."""
    found = sorted((ROOT / "boot").glob("vmlinuz-*"))
    assert found, f"there is no kernel in {ROOT}: run scripts/prepare test"
    return found[-1]


def module(name: str) -> Path:
    """A kernel module's file."""
    found = sorted((ROOT / "lib" / "modules").rglob(f"{name}.ko*"))
    assert found, f"the kernel in {ROOT} has no module {name}"
    return found[-1]


def initrd(path: Path, init_source: Path, modules: list[str]) -> None:
    """Write an initial file system (cpio, "newc"): ``/init``, compiled from `init_source`, and the modules as
    ``/NAME.ko``."""
    binary = path.with_suffix(".init")
    peers.run("gcc", "-O1", "-static", "-o", binary, init_source)
    archive = b""
    files = [("dev", 0o040755, b""), ("sys", 0o040755, b""), ("init", 0o100755, binary.read_bytes())]
    files += [(f"{name}.ko", 0o100644, module(name).read_bytes()) for name in modules]
    files.append(("TRAILER!!!", 0, b""))
    for number, (name, mode, data) in enumerate(files, 1):
        encoded = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        head = b"070701" + b"".join(b"%08x" % value for value in fields) + encoded
        archive += head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
    path.write_bytes(archive)


def run(initial: Path, *arguments: str, memory: int = 256, processors: int = 2) -> list[str]:
    """Boot a guest with more `arguments` for QEMU until it switches itself off; the lines it prints that begin with
    ``GUEST ``, without that. Its memory (MiB) is shared."""
    argv = [
        peers.require("qemu-system-x86_64"),
        *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(processors), "-m", str(memory)),
        *("-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"),
        *("-object", f"memory-backend-memfd,id=mem,size={memory}M,share=on", "-machine", "q35,memory-backend=mem"),
        *("-kernel", str(kernel()), "-initrd", str(initial), "-append", "console=ttyS0 quiet panic=-1"),
        *arguments,
    ]
    done = subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT, check=False)
    text = done.stdout.decode("utf-8", "replace")
    assert done.returncode == 0, f"{text}\n{done.stderr.decode('utf-8', 'replace')}"
    return [line.split("GUEST ", 1)[1].strip() for line in text.splitlines() if "GUEST " in line]
