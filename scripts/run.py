"""``make run``: serve an image over NBD and say how to reach it, until interrupted.

Without an image, a demonstration disk is made in ``.run/`` and kept there.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

#: What the first bytes of other formats look like, so that nobody serves the container as if it were the disk.
OTHER_FORMATS = {
    b"KDMV": "VMDK",
    b"COWD": "VMDK",
    b"conectix": "VHD",
    b"vhdxfile": "VHDX",
    b"QED\0": "QED",
    b"LUKS\xba\xbe": "LUKS",
    b"WithoutFreeSpace": "Parallels",
    b"# Disk Descriptor": "VMDK",
}
DEMO_SIZE = 1 << 30


def main() -> int:
    parser = argparse.ArgumentParser(prog="make run", description=__doc__)
    parser.add_argument("--image", help="the image to serve (IMAGE=)")
    parser.add_argument("--format", choices=("raw", "qcow2"), help="its format (FORMAT=)")
    parser.add_argument("--read-only", action="store_true", help="do not let clients write (READONLY=1)")
    args = parser.parse_args()
    run_dir = Path(".run").absolute()
    run_dir.mkdir(exist_ok=True)
    # One at a time; the lock is kept for as long as this process lives.
    lock = os.open(run_dir / "lock", os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return fail(f"another `make run` is serving from {run_dir} already")
    if args.image is None:
        image, image_format = demo_image(run_dir), "qcow2"
    else:
        image = Path(args.image).absolute()
        try:
            image_format = args.format or detect(image)
        except (OSError, ValueError) as exc:
            return fail(str(exc))
    with contextlib.ExitStack() as stack:
        # A socket's path has room for 107 bytes.
        sockets = run_dir
        if len(os.fsencode(run_dir / "qmp.sock")) > 107:
            sockets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pyqsd-")))
        return serve(image, image_format, args.read_only, run_dir / "pid", sockets / "nbd.sock", sockets / "qmp.sock")


def fail(text: str) -> int:
    print(f"make run: {text}", file=sys.stderr)
    return 1


def detect(image: Path) -> str:
    """The format of `image`. A raw disk is never guessed: whoever can write to it could make it look like any format,
    with references to any file of the host. Raises OSError, ValueError."""
    with open(image, "rb") as file:
        start = file.read(64)
    if start.startswith(b"QFI\xfb"):
        return "qcow2"
    for magic, name in OTHER_FORMATS.items():
        if start.startswith(magic):
            raise ValueError(f"{image} looks like a {name} image, which is not supported yet")
    raise ValueError(f"{image} is no qcow2 image; if it is a raw disk, say so: make run IMAGE={image} FORMAT=raw")


def demo_image(run_dir: Path) -> Path:
    """A qcow2 image to play with; it is kept from one run to the next."""
    path = run_dir / "demo.qcow2"
    if not path.exists():
        from pyqsd.drivers.formats.qcow2.create import empty_image

        new = path.with_suffix(".new")
        new.write_bytes(empty_image(DEMO_SIZE))
        new.rename(path)
    return path


def serve(image: Path, image_format: str, read_only: bool, pidfile: Path, nbd: Path, qmp: Path) -> int:
    """Run the daemon until it ends; returns its exit status."""
    node = f"driver={image_format},node-name=disk"
    if read_only:
        node += ",read-only=on"
    pidfile.unlink(missing_ok=True)
    daemon = subprocess.Popen(
        [
            *(sys.executable, "-m", "pyqsd"),
            *("--chardev", f"socket,id=qmp,path={escape(qmp)},server=on,wait=off", "--monitor", "chardev=qmp"),
            *("--blockdev", f"{node},file.driver=file,file.filename={escape(image)}"),
            *("--nbd-server", f"addr.type=unix,addr.path={escape(nbd)}"),
            *("--export", f"type=nbd,id=export,node-name=disk,name=disk,writable={'off' if read_only else 'on'}"),
            *("--pidfile", str(pidfile)),
        ]
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # From the terminal, Ctrl-C reaches the daemon as well; a second signal does it no harm.
        signal.signal(number, lambda number, frame: daemon.send_signal(number))
    while not pidfile.exists():
        if daemon.poll() is not None:
            return daemon.returncode
        time.sleep(0.01)
    uri = f"nbd+unix:///disk?socket={quote(str(nbd))}"
    print(
        f"pyqsd serves {image} ({image_format}, {'read-only' if read_only else 'writable'})\n"
        f"  NBD: {uri}\n"
        f"  QMP: {qmp}\n"
        "\n"
        "try: nbdinfo '" + uri + "'\n"
        f"     qemu-img info '{uri}'\n"
        f"     qemu-io -f raw -c 'write -P 42 1M 64k' -c 'read -P 42 1M 64k' '{uri}'\n"
        """     printf '{"execute":"qmp_capabilities"}{"execute":"query-block-exports"}' | """
        f"socat -t1 - UNIX-CONNECT:{qmp}\n"
        "\n"
        "Ctrl-C ends it.",
        flush=True,
    )
    return daemon.wait()


def escape(path: Path) -> str:
    """`path` as a value in key=value options, where a comma is written twice."""
    return str(path).replace(",", ",,")


if __name__ == "__main__":
    sys.exit(main())
