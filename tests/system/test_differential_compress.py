"""Differential: the compress filter. What writes through it give, what is refused, and what it looks like."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.support import images, peers
from tests.system.differential import Context, Do, Session, add, check_session, cmd, delete
from tests.system.test_differential_filters import (
    FAST,
    FILE,
    FUA,
    GRAPH,
    NBD_START,
    NO_HOLE,
    NODES,
    Request,
    export,
    reopen,
    requests,
    unexport,
)

K = 1024
CLUSTER = 64 * K


def filler(seed: int, length: int) -> bytes:
    """Something that becomes smaller, but not much smaller."""
    rnd = random.Random(seed)
    words = [rnd.randbytes(5) for _ in range(50)]
    return b"".join(rnd.choices(words, k=length // 5 + 1))[:length]


NOISE = random.Random(9).randbytes(3 * CLUSTER)

#: Clusters of 64 KiB: 0 and 1 are allocated, 2 is compressed, 3 is a zero cluster with space, 4 one without.
COMMANDS = ("write -P 1 0 128k", "write -c -P 2 128k 64k", "write -P 3 192k 64k", "write -z 192k 128k")

WRITES: tuple[Request, ...] = (
    # Allocated clusters are not overwritten, not even partly, and nothing is written of what is refused.
    ("pwrite", 0, filler(1, CLUSTER)),
    ("pwrite", 1000, filler(2, 100)),
    ("pwrite", 128 * K, filler(3, CLUSTER)),
    ("pwrite", 130 * K, filler(3, 512), FUA),
    ("pwrite", 192 * K, filler(4, CLUSTER)),
    ("pwrite", 256 * K, filler(5, CLUSTER)),
    ("pread", 0, 320 * K),
    # What does not become smaller is stored as it is, over anything.
    ("pwrite", 64 * K, NOISE[:CLUSTER]),
    ("pwrite", 128 * K, NOISE[:CLUSTER]),
    # New clusters, of all alignments.
    ("pwrite", 512 * K, filler(6, CLUSTER)),
    ("pwrite", 512 * K, filler(7, CLUSTER)),
    ("pwrite", 640 * K, filler(8, 3 * CLUSTER), FUA),
    ("pwrite", 832 * K + 1, filler(9, 1)),
    ("pwrite", 896 * K + 700, filler(10, CLUSTER)),
    ("pwrite", 1024 * K + 512, filler(11, 3 * CLUSTER - 1024)),
    ("pwrite", 1280 * K, bytes(2 * CLUSTER)),
    ("pwrite", 1408 * K, NOISE),
    ("pwrite", 1664 * K, filler(12, CLUSTER) + NOISE[:CLUSTER] + bytes(CLUSTER)),
    ("pwrite", 2048 * K - 5, filler(13, 5)),
    ("pread", 0, 1024 * K),
    ("pread", 1024 * K, 1024 * K),
    ("flush",),
    # Zeroes and holes, and what is written there again.
    ("zero", 512 * K, CLUSTER),
    ("zero", 640 * K, CLUSTER, NO_HOLE),
    ("zero", 704 * K + 100, 300),
    ("zero", 768 * K, CLUSTER, FAST),
    ("zero", 1280 * K + 5, CLUSTER),
    ("trim", 1408 * K, CLUSTER),
    ("trim", 1472 * K + 10, CLUSTER),
    ("pwrite", 512 * K, filler(14, CLUSTER)),
    ("pwrite", 640 * K, filler(15, CLUSTER)),
    ("pwrite", 1408 * K, filler(16, CLUSTER)),
    ("pread", 0, 1024 * K),
    ("pread", 1024 * K, 1024 * K),
    ("flush",),
)


def make(name: str, size: str, options: str, *commands: str) -> Do:
    def run(context: Context) -> None:
        images.create(name, size, options=options, cwd=context.workdir)
        if commands:
            images.io(name, *commands, cwd=context.workdir)

    return Do(f"make {name}", run)


def below(**more: Any) -> dict[str, Any]:
    return {
        "driver": "qcow2",
        "node-name": "q",
        "file": {"driver": "file", "filename": "disk.qcow2"},
        "discard": "unmap",
        **more,
    }


def over(file: Any = "q", **more: Any) -> dict[str, Any]:
    return add(driver="compress", node_name="c", file=file, discard="unmap", **more)


def mapped(context: Context) -> Any:
    """Which clusters are compressed; and the image is sound."""
    images.assert_clean(context.workdir / "disk.qcow2")
    done = peers.run("qemu-img", "map", "--output=json", "disk.qcow2", cwd=context.workdir)
    found: list[list[Any]] = []
    for extent in json.loads(done.stdout):
        kind = [extent[name] for name in ("zero", "data", "compressed")]
        # Where ordinary clusters happen to be decides what is one extent.
        if found and found[-1][1] == kind:
            found[-1][0] += extent["length"]
        else:
            found.append([extent["length"], kind])
    return found


MAPPED = Do("map", mapped)


def writes_session(name: str, options: str) -> Session:
    return Session(
        f"compress-writes-{name}",
        [
            make("disk.qcow2", "2M", options, *COMMANDS),
            NBD_START,
            add(**below()),
            over(),
            export("c"),
            requests("writes", "c", *WRITES),
            unexport("c"),
            delete("c"),
            delete("q"),
            MAPPED,
        ],
    )


def direct_session(name: str, options: str, *, copy_on_read: bool = False) -> Session:
    """Past the page cache, with requests that neither the file nor a cluster is aligned to."""
    file = {"driver": "file", "filename": "disk.qcow2", "cache": {"direct": True}}
    q = add(**below(file=file, cache={"direct": True}))
    if copy_on_read:
        q = add(driver="copy-on-read", node_name="q", file={**below(file=file), "node-name": "q0"})
    return Session(
        f"compress-direct-{name}",
        [
            make("disk.qcow2", "2M", options, *COMMANDS),
            NBD_START,
            q,
            over(cache={"direct": True}),
            export("c"),
            requests(
                "unaligned",
                "c",
                ("pwrite", 512 * K + 1, filler(1, 1)),
                ("pwrite", 576 * K + 511, filler(2, 1026)),
                ("pwrite", 640 * K + 700, filler(3, CLUSTER - 700)),
                ("pwrite", 704 * K + 3, filler(4, 2 * CLUSTER)),
                ("pwrite", 1024 * K, filler(5, 4096 + 17), FUA),
                ("pwrite", 1088 * K - 1, filler(6, 1)),
                ("pwrite", 1856 * K - 1, filler(6, 2)),
                ("pwrite", 1152 * K + 9, NOISE[: CLUSTER + 100]),
                ("pwrite", 1408 * K + 9, NOISE[:1000]),
                ("pwrite", 2048 * K - 600, filler(7, 600)),
                ("zero", 1536 * K + 1, CLUSTER),
                ("pread", 500 * K + 1, 600 * K),
                ("pread", 1088 * K - 3, 900 * K),
                ("flush",),
            ),
            unexport("c"),
            delete("c"),
            delete("q"),
            MAPPED,
            add(**below(file=file)),
            export("q"),
            requests("without the filter", "q", ("pread", 0, 1024 * K), ("pread", 1024 * K, 1024 * K)),
        ],
    )


SESSIONS = [
    direct_session("zlib", ""),
    direct_session("zstd", "compression_type=zstd"),
    direct_session("extended", "extended_l2=on"),
    direct_session("copy-on-read", "", copy_on_read=True),
    writes_session("zlib", ""),
    writes_session("zstd", "compression_type=zstd"),
    writes_session("extended", "extended_l2=on"),
    Session(
        "compress-uneven",
        [
            # The last cluster is not whole: nothing can be written through the filter.
            make("disk.qcow2", "2097664", "", *COMMANDS),
            NBD_START,
            over(below()),
            NODES,
            export("c"),
            cmd("block-export-add", type="nbd", id="e-c", node_name="c"),
            requests("reads", "c", ("pread", 0, 256 * K), ("pread", 2048 * K, 512)),
        ],
    ),
    Session(
        "compress-options",
        [
            make("disk.qcow2", "1M", ""),
            make("other.qcow2", "1M", "cluster_size=4k"),
            make("external.qcow2", "1M", "data_file=data.raw"),
            NBD_START,
            add(driver="compress", node_name="c"),
            over("nosuch"),
            over(dict(FILE)),
            over({"driver": "raw", "file": FILE}),
            over({"driver": "null-co"}),
            over({"driver": "copy-on-read", "file": below()}),
            NODES,
            export("c"),
            requests("through copy-on-read", "c", ("pwrite", 0, filler(1, CLUSTER)), ("pwrite", 100, filler(1, 50))),
            unexport("c"),
            delete("c"),
            make("disk.qcow2", "1M", ""),
            over({"driver": "copy-on-read", "file": FILE}),
            export("c"),
            requests("copy-on-read, raw", "c", ("pwrite", 0, filler(1, 512)), ("zero", 0, 512), ("pread", 0, 512)),
            unexport("c"),
            delete("c"),
            over({"driver": "compress", "file": below()}),
            over({"driver": "blkdebug", "image": below()}),
            add(driver="compress", node_name="c", read_only=True, file=dict(FILE)),
            over(below(), nosuch=1),
            over(below(), read_only=True),
            GRAPH,
            delete("c"),
            over(below(**{"read-only": True})),
            over({"driver": "qcow2", "read-only": True, "file": below()["file"]}, read_only=True),
            NODES,
            GRAPH,
            delete("c"),
            over(below()),
            NODES,
            GRAPH,
            "query-block",
            cmd("query-blockstats", query_nodes=True),
            delete("q"),
            export("c"),
            export("q"),
            cmd("block_resize", node_name="c", size=2 * K * K),
            NODES,
            unexport("c"),
            cmd("block_resize", node_name="c", size=2 * K * K),
            cmd("block_resize", node_name="q", size=2 * K * K + 512),
            NODES,
            delete("c"),
            over({"driver": "qcow2", "file": {"driver": "file", "filename": "external.qcow2"}}),
            NODES,
            export("c"),
            requests(
                "over a data file",
                "c",
                ("pwrite", 0, filler(1, CLUSTER)),
                ("pwrite", 100, filler(1, 100)),
                ("pwrite", 0, NOISE[:CLUSTER]),
                ("zero", 0, CLUSTER),
                ("pread", 0, CLUSTER),
            ),
        ],
        images=("raw.img",),
    ),
    Session(
        "compress-reopen",
        [
            make("disk.qcow2", "1M", ""),
            make("other.qcow2", "1M", "cluster_size=4k"),
            NBD_START,
            add(**below()),
            add(**{**below(**{"node-name": "o"}), "file": {"driver": "file", "filename": "other.qcow2"}}),
            add(driver="raw", node_name="r", file=FILE),
            over(),
            export("c"),
            *(
                reopen(driver="compress", node_name="c", **more)
                for more in (
                    {},
                    {"file": "q", "read_only": True},
                    {"file": "r"},
                    {"file": "o", "discard": "unmap"},
                )
            ),
            GRAPH,
            requests(
                "writes", "c", ("pwrite", 0, filler(1, 4096)), ("pwrite", 8192, filler(1, 512)), ("pread", 0, 8192)
            ),
            reopen(driver="compress", node_name="c", file="q", detect_zeroes="unmap", discard="unmap"),
            requests("zeroes", "c", ("pwrite", 0, bytes(2 * CLUSTER)), ("pwrite", 0, filler(1, CLUSTER))),
            unexport("c"),
            reopen(driver="compress", node_name="c", file="q", read_only=True),
            GRAPH,
            export("c"),
            reopen(**below(**{"read-only": True})),
            reopen(driver="compress", node_name="c", file="q"),
        ],
        images=("raw.img",),
    ),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, image_set: Path, tmp_path: Path) -> None:
    check_session(session, image_set, tmp_path)
