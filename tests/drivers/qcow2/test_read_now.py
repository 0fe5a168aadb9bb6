"""Compressed clusters that are read without waiting (`Unpacked.read_now`): that they are, and when they are not."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from pyqsd.block.node import Node
from tests.drivers.qcow2.support import opened, run
from tests.support import images

KiB = 1 << 10
MiB = 1 << 20


def packed(tmp_path: Path, options: str) -> tuple[Path, bytes]:
    """An image in which every cluster is compressed, and what it contains."""
    rnd = random.Random(options)
    content = b"".join(rnd.randbytes(200) + bytes(312) for _ in range(MiB // 512))
    raw, path = tmp_path / "plain", tmp_path / "disk"
    raw.write_bytes(content)
    images.peers.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    return path, content


def now(node: Node, offset: int, length: int, pieces: int = 1) -> bytes | None:
    """What is read without waiting into so many buffers, or None."""
    data = bytearray(length)
    step = -(-length // pieces)
    iov = [memoryview(data)[at : at + step] for at in range(0, length, step)]
    return bytes(data) if node.read_now(offset, length, iov) else None


@pytest.mark.parametrize(
    "options", ["compression_type=zstd", "cluster_size=4k", "compression_type=zstd,extended_l2=on,cluster_size=32k"]
)
def test_reads(tmp_path: Path, options: str) -> None:
    path, content = packed(tmp_path, options)

    async def main() -> None:
        async with opened(path) as node:
            # This brings the tables and the file into memory.
            assert await node.pread(0, MiB - 512) == content[: MiB - 512]
            node.driver._unpacked.forget()  # type: ignore[attr-defined]
            size = node.driver.allocation_unit() if "extended" not in options else 32 * KiB
            for offset, length, pieces in ((0, size, 1), (100, 300, 2), (5 * size - 7, 20, 1), (3 * size + 1, size, 3)):
                for _ in range(2):
                    # The second time it is unpacked already.
                    assert now(node, offset, length, pieces) == content[offset : offset + length]
            await node.pwrite(5 * size, b"new")
            assert (
                now(node, 5 * size - 7, 20)
                == content[5 * size - 7 : 5 * size] + b"new" + content[5 * size + 3 : 5 * size + 13]
            )

    run(main())
    images.assert_clean(path)


def test_left_to_others(tmp_path: Path) -> None:
    """So much that helpers take a share of it is not unpacked while everybody waits."""
    path, content = packed(tmp_path, "cluster_size=64k")

    async def main() -> None:
        async with opened(path) as node:
            assert await node.pread(0, 128 * KiB) == content[: 128 * KiB]
            node.driver._unpacked.forget()  # type: ignore[attr-defined]
            assert now(node, 0, 512) is None
            assert await node.pread(0, 512) == content[:512]

    run(main())


def test_damaged(tmp_path: Path) -> None:
    """The way that waits says what is wrong."""
    path, content = packed(tmp_path, "compression_type=zstd,cluster_size=32k")

    async def main() -> None:
        async with opened(path) as node:
            assert await node.pread(0, MiB - 512) == content[: MiB - 512]
            unpacked = node.driver._unpacked  # type: ignore[attr-defined]
            unpacked.forget()
            entry = node.driver.image.l2.slices[0].entries[2]  # type: ignore[attr-defined]
            with path.open("r+b") as stream:
                stream.seek(entry & 0xFFFFFFFF)
                stream.write(b"\xff" * 64)
            assert now(node, 64 * KiB, 512) is None
            assert now(node, 32 * KiB, 64 * KiB) is None
            with pytest.raises(OSError) as caught:
                await node.pread(64 * KiB, 512)
            assert caught.value.errno == errno.EIO
            assert now(node, 32 * KiB, 32 * KiB) == content[32 * KiB : 64 * KiB]

    run(main())
