"""Random requests against a model, on images of every kind, checked by qemu-img."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.drivers.qcow2.support import Model, opened, run
from tests.support import images

MiB = 1 << 20

VARIANTS: dict[str, tuple[str, dict[str, Any], int]] = {
    # name: (creation options, node options, disk size)
    "default": ("", {}, 24 * MiB),
    "v2": ("compat=0.10", {}, 16 * MiB),
    "cluster-512": ("cluster_size=512", {}, 4 * MiB + 1536),
    "cluster-4k": ("cluster_size=4k", {}, 16 * MiB),
    "cluster-2m": ("cluster_size=2M", {}, 64 * MiB),
    **{f"refcount-{1 << n}": (f"refcount_bits={1 << n},cluster_size=512", {}, 4 * MiB) for n in range(7)},
    "refcount-1-64k": ("refcount_bits=1", {}, 16 * MiB),
    "lazy": ("lazy_refcounts=on", {}, 16 * MiB),
    "tiny-caches": (
        "cluster_size=4k",
        {"l2_cache_size": 8192, "l2_cache_entry_size": 512, "refcount_cache_size": 16384},
        24 * MiB,
    ),
    "small-slices": ("", {"l2_cache_entry_size": 512}, 48 * MiB),
    "no-unref": ("", {"discard_no_unref": True}, 16 * MiB),
    "no-discard-passed": ("", {"pass_discard_request": False, "pass_discard_snapshot": False}, 16 * MiB),
    "discard-passed": ("cluster_size=4k", {"pass_discard_other": True}, 16 * MiB),
    "metadata": ("preallocation=metadata", {}, 16 * MiB),
    "full": ("preallocation=falloc,cluster_size=16k", {}, 8 * MiB),
    "extended": ("extended_l2=on", {}, 16 * MiB),
    "extended-16k": ("extended_l2=on,cluster_size=16k", {"l2_cache_entry_size": 512, "l2_cache_size": 32768}, 8 * MiB),
    "extended-2m": ("extended_l2=on,cluster_size=2M,lazy_refcounts=on", {}, 64 * MiB),
    "extended-metadata": ("extended_l2=on,preallocation=metadata", {}, 8 * MiB),
    "extended-no-unref": ("extended_l2=on,cluster_size=16k", {"discard_no_unref": True}, 8 * MiB),
    "data-file": ("data_file=DIR/data", {}, 16 * MiB),
    "data-file-512": ("data_file=DIR/data,cluster_size=512", {}, 2 * MiB + 1536),
    "data-file-2m": ("data_file=DIR/data,cluster_size=2M,lazy_refcounts=on", {}, 32 * MiB),
    "data-file-no-unref": ("data_file=DIR/data", {"discard_no_unref": True}, 8 * MiB),
    "data-file-extended": ("data_file=DIR/data,extended_l2=on,cluster_size=32k", {}, 8 * MiB),
    "data-file-raw": ("data_file=DIR/data,data_file_raw=on", {}, 8 * MiB),
    "data-file-raw-kept": (
        "data_file=DIR/data,data_file_raw=on,extended_l2=on,cluster_size=16k",
        {"pass_discard_request": False},
        8 * MiB,
    ),
    "all-checks": ("cluster_size=1k", {"overlap_check": "all"}, 4 * MiB),
    "no-checks": ("cluster_size=1k", {"overlap_check": "none"}, 4 * MiB),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("lanes", [1, 6])
def test_workload(tmp_path: Path, name: str, lanes: int) -> None:
    create_options, node_options, size = VARIANTS[name]
    path = images.create(tmp_path / "disk", size, options=create_options.replace("DIR", str(tmp_path)))

    async def main() -> bytearray:
        async with opened(path, **node_options) as node:
            model = Model(node, lanes)
            await model.workload(240, lanes, 300_000)
            await model.verify()
        async with opened(path, **node_options) as node:
            model.node = node
            await model.verify()
            await model.workload(120, lanes, 300_000)
        return model.content

    content = run(main())
    images.assert_clean(path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == content
    if name.startswith("data-file-raw"):
        assert (tmp_path / "data").read_bytes() == content


@pytest.mark.parametrize("options", ["compat=0.10", "compat=1.1", "extended_l2=on", "extended_l2=on,cluster_size=16k"])
@pytest.mark.parametrize("lanes", [1, 5])
def test_overlay(tmp_path: Path, options: str, lanes: int) -> None:
    """Copy-on-write from a backing file that is a little shorter than the disk."""
    size = 6 * MiB
    base = images.create(tmp_path / "base", size - 100 * 512)
    images.io(base, "write -P 17 0 2M", "write -P 18 4M 1M", "write -z 3M 64k", f"write -P 19 {size - 65536} 14336")
    path = images.create(tmp_path / "disk", size, options=options, backing=base)
    before = images.read_all(path, "qcow2", tmp_path / "raw")

    async def main() -> bytearray:
        async with opened(path) as node:
            assert node.driver.backing is not None
            model = Model(node, lanes, v2=options == "compat=0.10", initial=before)
            await model.workload(300, lanes, 200_000)
            await model.verify()
        return model.content

    content = run(main())
    images.assert_clean(path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == content


@pytest.mark.parametrize(
    "options", ["", "cluster_size=512", "compression_type=zstd", "cluster_size=2M", "extended_l2=on"]
)
def test_compressed(tmp_path: Path, options: str) -> None:
    """Compressed clusters are read, and overwritten without harm to their neighbours."""
    size = 4 * MiB
    raw = tmp_path / "plain"
    pattern = b"".join(bytes([i % 251]) * 700 for i in range(size // 700 + 1))[:size]
    raw.write_bytes(pattern)
    path = tmp_path / "disk"
    argv = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2"]
    images.peers.run(*argv, *(["-o", options] if options else []), raw, path)

    async def main() -> bytearray:
        async with opened(path) as node:
            model = Model(node, 3, initial=pattern)
            await model.verify()
            await model.workload(200, 4, 100_000)
            await model.verify()
        return model.content

    content = run(main())
    images.assert_clean(path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == content


@pytest.mark.parametrize("options", ["cluster_size=4k", "cluster_size=16k,extended_l2=on"])
def test_internal_snapshot(tmp_path: Path, options: str) -> None:
    """Writes leave a snapshot as it was."""
    size = 6 * MiB
    path = images.create(tmp_path / "disk", size, options=options)
    images.io(path, "write -P 1 0 3M", "write -z 1M 256k")
    images.peers.run("qemu-img", "snapshot", "-c", "one", path)
    before = images.read_all(path, "qcow2", tmp_path / "raw")

    async def main() -> bytearray:
        async with opened(path) as node:
            model = Model(node, 8, initial=before)
            await model.workload(300, 4, 100_000)
            await model.verify()
        return model.content

    content = run(main())
    images.assert_clean(path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == content
    images.peers.run("qemu-img", "snapshot", "-a", "one", path)
    assert images.read_all(path, "qcow2", tmp_path / "raw") == before
    images.peers.run("qemu-img", "snapshot", "-d", "one", path)
    images.assert_clean(path)
