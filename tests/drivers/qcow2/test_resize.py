"""Growing and shrinking, with qemu-img as the judge of what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyqsd.qapi.errors import Error
from tests.drivers.qcow2.support import Model, opened, run
from tests.support import images

MiB = 1 << 20


@pytest.mark.parametrize(
    "options", ["", "cluster_size=512", "cluster_size=512,refcount_bits=64", "compat=0.10", "extended_l2=on"]
)
def test_grow_and_shrink(tmp_path: Path, options: str) -> None:
    path = images.create(tmp_path / "disk", MiB, options=options)

    async def main() -> bytearray:
        content = bytearray(MiB)
        async with opened(path) as node:
            for step, size in enumerate((3 * MiB, 9 * MiB + 512, 2 * MiB + 1536, 40 * MiB, 5 * MiB, 0, MiB)):
                await node.truncate(size)
                assert node.length == size
                content = content[:size].ljust(size, b"\0")
                model = Model(node, step, initial=bytes(content))
                await model.verify()
                if size:
                    await model.workload(40, 1, 100_000)
                content = model.content
        return content

    content = run(main())
    images.assert_clean(path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == content


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("unit", [65536, 512])
def test_growth_hides_a_longer_backing_file(tmp_path: Path, compat: str, unit: int) -> None:
    base = images.create(tmp_path / "base", 4 * MiB)
    images.io(base, "write -P 7 0 4M")
    path = images.create(tmp_path / "disk", MiB + unit, options=f"compat={compat}", backing=base)

    async def main() -> None:
        async with opened(path) as node:
            await node.pwrite(MiB + unit - 512, b"x" * 512)
            await node.truncate(3 * MiB)
            assert await node.pread(MiB + unit, 3 * MiB - MiB - unit) == bytes(3 * MiB - MiB - unit)
            assert await node.pread(MiB, unit - 512) == b"\7" * (unit - 512)

    run(main())
    images.assert_clean(path)
    content = images.read_all(path, "qcow2", tmp_path / "raw")
    assert content[: MiB + unit - 512] == b"\7" * (MiB + unit - 512)
    assert content[MiB + unit :] == bytes(3 * MiB - MiB - unit)


def test_what_was_cut_off_does_not_come_back(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", 2 * MiB)

    async def main() -> None:
        async with opened(path) as node:
            await node.pwrite(0, b"\5" * (2 * MiB))
            await node.truncate(MiB)
            await node.truncate(2 * MiB)
            assert await node.pread(MiB, MiB) == bytes(MiB)

    run(main())
    images.assert_clean(path)
    assert path.stat().st_size < MiB + 8 * 65536


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("options", ["", "cluster_size=4k", "compat=0.10", "extended_l2=on,cluster_size=16k"])
def test_preallocation(tmp_path: Path, mode: str, options: str) -> None:
    path = images.create(tmp_path / "disk", MiB + 4096, options=options)
    images.io(path, "write -P 9 0 1028k")

    async def main() -> None:
        async with opened(path) as node:
            await node.truncate(6 * MiB, preallocation=mode)
            assert node.length == 6 * MiB
            assert await node.pread(MiB + 4096, 5 * MiB - 4096) == bytes(5 * MiB - 4096)
            await node.pwrite(3 * MiB, b"\3" * MiB)

    run(main())
    images.assert_clean(path)
    content = images.read_all(path, "qcow2", tmp_path / "raw")
    assert content == b"\t" * (MiB + 4096) + bytes(2 * MiB - 4096) + b"\3" * MiB + bytes(2 * MiB)
    assert images.check(path)["allocated-clusters"] == images.check(path)["total-clusters"]
    occupied = path.stat().st_blocks * 512
    assert occupied < 4 * MiB if mode == "metadata" else occupied >= 6 * MiB


@pytest.mark.parametrize(
    ("options", "snapshot", "size", "how", "words"),
    [
        ("", False, 1000, {}, "The new size must be a multiple of 512"),
        ("", False, 512, {"preallocation": "metadata"}, "Preallocation can't be used for shrinking an image"),
        ("compat=0.10", True, 2 * MiB, {}, "Can't resize a v2 image which has snapshots"),
        ("cluster_size=512", False, 1 << 40, {}, "Failed to grow the L1 table: File too large"),
    ],
)
def test_refused(tmp_path: Path, options: str, snapshot: bool, size: int, how: dict[str, Any], words: str) -> None:
    path = images.create(tmp_path / "disk", MiB, options=options)
    if snapshot:
        images.peers.run("qemu-img", "snapshot", "-c", "one", path)

    async def main() -> None:
        async with opened(path) as node:
            with pytest.raises(Error) as caught:
                await node.truncate(size, **how)
            assert caught.value.desc == words
            assert node.length == MiB
            await node.pwrite(0, b"x")

    run(main())
    images.assert_clean(path)


def test_snapshot_keeps_its_size(tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", 2 * MiB, options="cluster_size=4k")
    images.io(path, "write -P 3 0 2M")
    images.peers.run("qemu-img", "snapshot", "-c", "one", path)

    async def main() -> None:
        async with opened(path) as node:
            await node.truncate(MiB)
            await node.pwrite(0, b"\4" * 65536)
            await node.truncate(30 * MiB)

    run(main())
    images.assert_clean(path)
    images.peers.run("qemu-img", "snapshot", "-a", "one", path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == b"\3" * (2 * MiB)
