"""Differential: images with an external data file, by the names that they have in their header, and what is wrong
with them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.system.differential import Context, Do, Session, add, check_session, delete
from tests.system.test_differential_filters import GRAPH, NBD_START, NODES, export, requests, unexport

K = 1024
DATA_FILE = 0x44415441
QCOW2 = {"driver": "qcow2", "node_name": "q", "file": {"driver": "file", "filename": "disk.qcow2"}, "discard": "unmap"}


def make(options: str = "data_file=data.raw", *commands: str) -> Do:
    def run(context: Context) -> None:
        for old in ("disk.qcow2", "data.raw"):
            (context.workdir / old).unlink(missing_ok=True)
        images.create("disk.qcow2", "1M", options=options, cwd=context.workdir)
        images.io("disk.qcow2", *(commands or ("write -P 1 0 100k", "write -z 256k 64k")), cwd=context.workdir)

    return Do(f"make {options} {commands}", run)


def change(label: str, patch: Any) -> Do:
    def run(context: Context) -> None:
        path = context.workdir / "disk.qcow2"
        data = bytearray(path.read_bytes())
        patch(data, context)
        path.write_bytes(data)

    return Do(label, run)


def named(label: str, name: bytes | None, shown: int | None = None) -> Do:
    """The header names this data file; WORK in it is the working directory. `shown`: the length that it says."""

    def patch(data: bytearray, context: Context) -> None:
        at = struct.unpack_from(">I", data, 100)[0]
        data[at:4096] = bytes(4096 - at)
        if name is not None:
            full = name.replace(b"WORK", bytes(context.workdir))
            struct.pack_into(">II", data, at, DATA_FILE, len(full) if shown is None else shown)
            data[at + 8 : at + 8 + len(full)] = full

    return change(f"name: {label}", patch)


NAMES: dict[str, bytes | None] = {
    "none": None,
    "empty": b"",
    "relative": b"data.raw",
    "dotted": b"./data.raw",
    "absolute": b"WORK/data.raw",
    "missing": b"nosuch.raw",
    "missing folder": b"no/such.raw",
    "folder": b".",
    "absolute folder": b"WORK",
    "itself": b"disk.qcow2",
    "nul": b"data.raw\0nosuch",
    "only nul": b"\0",
    "file:": b"file:data.raw",
    "json:": b'json:{"driver":"file","filename":"data.raw"}',
    "json: raw": b'json:{"driver":"raw","file":{"driver":"file","filename":"data.raw"}}',
    "json: null": b'json:{"driver":"null-co","size":1048576}',
    "json: bad": b"json:{",
    "json: name": b'json:{"driver":"file","filename":"data.raw","node-name":"q"}',
    "protocol": b"nosuch:data.raw",
    "long": b"x" * 300,
    "longest": b"x" * 1100,
    "a qcow2 image": b"plain.qcow2",
}

READ = requests("read", "q", ("pread", 0, 128 * K), ("pread", 256 * K, 64 * K))


def put(at: int, mask: int) -> Any:
    def patch(data: bytearray, context: Context) -> None:
        data[at] ^= mask

    return patch


def entry(index: int, value: int, second: int | None = None) -> Any:
    def patch(data: bytearray, context: Context) -> None:
        l1 = struct.unpack_from(">Q", data, 40)[0]
        l2 = struct.unpack_from(">Q", data, l1)[0] & 0x00FFFFFFFFFFFE00
        struct.pack_into(">Q", data, l2 + 8 * index, value)

    return patch


COPIED = 1 << 63
ENTRIES: dict[str, Any] = {
    "elsewhere": entry(1, COPIED | 3 * 64 * K),
    "elsewhere, not copied": entry(1, 3 * 64 * K),
    "first": entry(1, COPIED),
    "beyond the end": entry(1, COPIED | 1 << 40),
    "unaligned": entry(1, COPIED | 64 * K + 512),
    "not copied": entry(1, 64 * K),
    "zero, elsewhere": entry(1, COPIED | 3 * 64 * K | 1),
    "zero, in place": entry(1, COPIED | 64 * K | 1),
    "zero, copied": entry(0, COPIED | 1),
    "compressed": entry(1, 1 << 62 | 5 * 64 * K),
    "both": entry(1, COPIED | 1 << 62 | 64 * K),
}


def shown(context: Context) -> Any:
    """The data file, and whether the image is marked as corrupt."""
    disk = (context.workdir / "disk.qcow2").read_bytes()
    return [zlib.crc32((context.workdir / "data.raw").read_bytes()), disk[79]]


SESSIONS = [
    Session(
        "data-file-names",
        [
            make(),
            *(step for label, name in NAMES.items() for step in (named(label, name), add(**QCOW2), NODES, delete("q"))),
            named("longer than said", b"data.raw.x", 8),
            add(**QCOW2),
            GRAPH,
            delete("q"),
            named("beyond the cluster", b"data.raw", 70000),
            add(**QCOW2),
        ],
        images=("plain.qcow2",),
    ),
    Session(
        "data-file-features",
        [
            make(),
            change("raw", put(95, 2)),
            add(**QCOW2),
            NODES,
            delete("q"),
            change("raw without a data file", put(79, 4)),
            add(**QCOW2),
            change("a name alone", put(95, 2)),
            add(**QCOW2),
            NODES,
            delete("q"),
            add(**QCOW2, data_file={"driver": "file", "filename": "data.raw"}),
            add(**QCOW2, data_file={"driver": "file", "filename": "disk.qcow2"}),
        ],
    ),
    Session(
        # Other requests are not compared: QSD writes zeroes over such entries, or puts data where they say.
        "data-file-entries",
        [
            NBD_START,
            *(
                step
                for label, patch in ENTRIES.items()
                for step in (
                    make(),
                    change(label, patch),
                    add(**QCOW2),
                    export("q"),
                    requests(
                        f"{label}: read", "q", ("pread", 64 * K, 4 * K, 4), ("flush",), ("pread", 512 * K, 512, 4)
                    ),
                    unexport("q"),
                    delete("q"),
                    Do(f"{label}: afterwards", shown),
                )
            ),
        ],
    ),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, image_set: Path, tmp_path: Path) -> None:
    check_session(session, image_set, tmp_path)
