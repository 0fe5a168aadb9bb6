"""Fixtures of the whole-daemon tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import images
from tests.support.images import KiB, MiB


@pytest.fixture(scope="session")
def image_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of small images, made once; tests copy what they need."""
    root = tmp_path_factory.mktemp("images")

    def qcow2(name: str, size: int = 4 * MiB, options: str = "", *commands: str, backing: str | None = None) -> None:
        images.create(
            name, size, "qcow2", options, backing, "raw" if backing and backing.endswith(".img") else "qcow2", root
        )
        if commands:
            images.io(name, *commands, cwd=root)

    images.create(root / "raw.img", 1 * MiB, "raw")
    images.io(root / "raw.img", "write -P 17 0 64k", "write -P 34 512k 64k", fmt="raw")
    images.create(root / "other.img", 1 * MiB, "raw")
    (root / "odd.img").write_bytes(b"\x55" * 1000)  # not a multiple of the sector size
    (root / "empty.img").write_bytes(b"")
    (root / "small.img").write_bytes(b"\xaa" * 64 * KiB)
    qcow2("plain.qcow2", 4 * MiB, "", "write -P 1 0 128k", "write -P 2 1M 64k", "write -z 2M 64k")
    qcow2("v2.qcow2", 4 * MiB, "compat=0.10", "write -P 1 0 128k")
    qcow2("c4k.qcow2", 4 * MiB, "cluster_size=4k", "write -P 3 0 24k", "write -P 4 2M 4k")
    qcow2("c2m.qcow2", 4 * MiB, "cluster_size=2M", "write -P 3 0 4k")
    qcow2("rb1.qcow2", 4 * MiB, "refcount_bits=1", "write -P 3 0 64k")
    qcow2("rb64.qcow2", 4 * MiB, "refcount_bits=64", "write -P 3 0 64k")
    qcow2("lazy.qcow2", 4 * MiB, "lazy_refcounts=on", "write -P 3 0 64k")
    qcow2("zstd.qcow2", 4 * MiB, "compression_type=zstd", "write -c -P 5 0 64k", "write -P 6 64k 64k")
    qcow2("zlib.qcow2", 4 * MiB, "", "write -c -P 5 0 64k", "write -P 6 64k 64k")
    qcow2("base.qcow2", 4 * MiB, "", "write -P 7 0 256k")
    qcow2("mid.qcow2", 4 * MiB, "", "write -P 8 64k 64k", backing="base.qcow2")
    qcow2("top.qcow2", 8 * MiB, "", "write -P 9 192k 64k", "write -z 0 64k", backing="mid.qcow2")
    qcow2("rawback.qcow2", 1 * MiB, "", "write -P 9 192k 64k", backing="raw.img")
    qcow2("prealloc.qcow2", 2 * MiB, "preallocation=metadata")
    qcow2("data.qcow2", 4 * MiB, "data_file=data.raw")
    images.create(root / "other.raw", 4 * MiB, "raw")
    (root / "garbage.qcow2").write_bytes(b"not an image at all, sorry\n" * 100)
    truncated = (root / "plain.qcow2").read_bytes()[:60]
    (root / "short.qcow2").write_bytes(truncated)
    return root
