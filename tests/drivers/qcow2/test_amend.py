"""``x-blockdev-amend`` on qcow2 images: what changes, what must not, and what a crash in between leaves."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from pyqsd import Daemon
from pyqsd.block.dirty_bitmap import DirtyBitmap
from pyqsd.block.driver import MAY_UNMAP
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.drivers.formats.qcow2.amend_options import AmendOptions
from pyqsd.qapi.command import EventBus
from pyqsd.qapi.convert import convert
from pyqsd.qapi.errors import Error
from tests.drivers.qcow2 import crash
from tests.drivers.qcow2.support import Model, close, open_logged, opened, run
from tests.support import images, peers

MiB = 1 << 20


async def amend(node: Node, **options: Any) -> None:
    wire = {name.replace("_", "-"): value for name, value in options.items()}
    changed = convert({"driver": "qcow2", **wire}, AmendOptions)
    await node.driver.amend(changed, False)


def amend_file(path: Path, **options: Any) -> None:
    async def main() -> None:
        async with opened(path) as node:
            await amend(node, **options)

    run(main())


def described(path: Path) -> dict[str, Any]:
    info = images.info(path)
    names = ("virtual-size", "cluster-size", "backing-filename", "backing-filename-format", "dirty-flag")
    return {"specific": info["format-specific"]["data"], **{name: info.get(name) for name in names}}


#: (creation with qemu-img, our options, qemu-img amend's options)
CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("compat=0.10", {"version": "v3"}, "compat=1.1"),
    (
        "compat=0.10",
        {"version": "v3", "lazy_refcounts": True, "refcount_bits": 64},
        "compat=1.1,lazy_refcounts=on,refcount_bits=64",
    ),
    ("", {"version": "v2"}, "compat=0.10"),
    ("lazy_refcounts=on", {"version": "v2"}, "compat=0.10"),
    ("refcount_bits=1,cluster_size=4k", {"version": "v2", "refcount_bits": 16}, "compat=0.10,refcount_bits=16"),
    ("compression_type=zstd", {"version": "v2"}, "compat=0.10"),
    *(("cluster_size=4k", {"refcount_bits": bits}, f"refcount_bits={bits}") for bits in (1, 2, 4, 8, 32, 64)),
    ("refcount_bits=1,extended_l2=on,cluster_size=16k", {"refcount_bits": 64}, "refcount_bits=64"),
    ("", {"lazy_refcounts": True}, "lazy_refcounts=on"),
    ("lazy_refcounts=on", {"lazy_refcounts": False}, "lazy_refcounts=off"),
    ("", {"size": 6 * MiB}, "size=6M"),
    ("", {"size": MiB}, "size=1M"),
    ("", {"size": 8 * MiB, "version": "v2"}, "size=8M,compat=0.10"),
]


@pytest.mark.parametrize(("creation", "ours", "theirs"), CHANGES)
def test_same_as_qemu_img(creation: str, ours: dict[str, Any], theirs: str, tmp_path: Path) -> None:
    path = images.create(tmp_path / "ours", 4 * MiB, options=creation)
    images.io(path, "write -P 1 0 300k", "write -P 2 900k 70k", "write -z 64k 64k", "write -z -u 192k 64k")
    before = images.read_all(path, "qcow2", tmp_path / "raw")
    other = tmp_path / "theirs"
    other.write_bytes(path.read_bytes())
    amend_file(path, **ours)
    peers.run("qemu-img", "amend", "-q", "-f", "qcow2", "-o", theirs, other)
    assert described(path) == described(other)
    images.assert_clean(path)
    content = images.read_all(path, "qcow2", tmp_path / "raw")
    assert content[: len(before)] == before[: len(content)]

    # And the image lives on.
    async def live() -> None:
        async with opened(path) as node:
            model = Model(node, 1, v2=ours.get("version") == "v2", initial=content)
            await model.workload(60, 2, 100_000)
            await model.verify()

    run(live())
    images.assert_clean(path)


def test_names(tmp_path: Path) -> None:
    images.create(tmp_path / "base", MiB, "raw")
    path = images.create(tmp_path / "disk", MiB, backing=tmp_path / "base", backing_format="raw")
    amend_file(path, backing_file="other.qcow2", backing_fmt="qcow2")
    info = described(path)
    assert (info["backing-filename"], info["backing-filename-format"]) == ("other.qcow2", "qcow2")
    peers.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", tmp_path / "base", "-F", "raw", path)
    amend_file(path, backing_file="")
    assert described(path)["backing-filename"] is None
    images.assert_clean(path)


@pytest.mark.parametrize("raw", ["on", "off"])
def test_data_file(raw: str, tmp_path: Path) -> None:
    """The flag and the name change as qemu-img changes them, and the node goes by the flag at once."""
    data = tmp_path / "data"
    images.create(tmp_path / "ours", 4 * MiB, options=f"data_file={data},data_file_raw={raw}")
    images.io(tmp_path / "ours", "write -P 1 0 300k", "write -z 64k 64k")
    (tmp_path / "theirs").write_bytes((tmp_path / "ours").read_bytes())
    moved = tmp_path / "moved"
    moved.write_bytes(data.read_bytes())

    async def main() -> None:
        async with opened(tmp_path / "ours") as node:
            await amend(node, data_file=str(moved), data_file_raw=False)
            assert node.driver.format_specific().data.data_file_raw is False  # type: ignore[union-attr]
            with pytest.raises(Error, match="data-file-raw cannot be set on existing images"):
                await amend(node, data_file_raw=True)
            # The file that is open goes on being used; it need not be the disk by itself any more.
            await node.pwrite_zeroes(0, 65536, MAY_UNMAP)
            await node.flush()
            assert await node.pread(0, 65536) == bytes(65536)

    run(main())
    peers.run(
        "qemu-img", "amend", "-q", "-f", "qcow2", "-o", f"data_file={moved},data_file_raw=off", tmp_path / "theirs"
    )
    assert described(tmp_path / "ours") == described(tmp_path / "theirs")
    images.assert_clean(tmp_path / "ours")


ERRORS: list[tuple[str, dict[str, Any], str]] = [
    ("refcount_bits=8", {"version": "v2"}, "version=v2 requires refcount-bits=16"),
    ("extended_l2=on", {"version": "v2"}, "Cannot downgrade an image with incompatible features 0x10 set"),
    (
        "compat=0.10",
        {"lazy_refcounts": True},
        "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
    ),
    (
        "compat=0.10",
        {"refcount_bits": 8},
        "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
    ),
    ("", {"refcount_bits": 3}, "Refcount width must be a power of two and may not exceed 64 bits"),
    ("", {"refcount_bits": 128}, "Refcount width must be a power of two and may not exceed 64 bits"),
    ("", {"data_file": "x"}, "data-file can only be set for images that use an external data file"),
    ("", {"data_file_raw": True}, "data-file-raw cannot be set on existing images"),
    ("", {"backing_fmt": "raw"}, "Backing format cannot be used without backing file"),
    ("", {"backing_file": "x" * 1024}, "Backing file name too long"),
    ("", {"size": 3}, "The new size must be a multiple of 512"),
    ("", {"encrypt": {"format": "qcow"}}, "image is not encrypted, can't amend"),
    ("", {"encrypt": {"format": "luks", "state": "active"}}, "image is not encrypted, can't amend"),
]


@pytest.mark.parametrize(("creation", "options", "message"), ERRORS)
def test_refused(creation: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = images.create(tmp_path / "disk", MiB, options=creation)
    before = described(path)
    with pytest.raises(Error) as caught:
        amend_file(path, **options)
    assert caught.value.desc == message
    assert described(path) == before
    images.assert_clean(path)


def test_refused_for_what_is_in_the_image(tmp_path: Path) -> None:
    path = images.create(tmp_path / "packed", MiB, options="compression_type=zstd")
    images.io(path, "write -c 0 64k")
    with pytest.raises(Error, match="zstd compression type and existing compressed clusters"):
        amend_file(path, version="v2")
    images.assert_clean(path)
    path = images.create(tmp_path / "snapshot", MiB)
    images.io(path, "write 0 64k")
    peers.run("qemu-img", "snapshot", "-c", "one", path)
    with pytest.raises(Error, match=r"Cannot decrease .* to 1 bits: Cluster at offset 0x.* has a refcount of 2"):
        amend_file(path, refcount_bits=1)
    images.assert_clean(path)
    peers.run("qemu-img", "resize", "-q", path, "2M")
    with pytest.raises(Error, match="Internal snapshots prevent downgrade of image"):
        amend_file(path, version="v2")
    path = images.create(tmp_path / "bitmap", MiB)
    peers.run("qemu-img", "bitmap", "--add", path, "map")
    with pytest.raises(Error, match="Cannot downgrade an image with persistent bitmaps"):
        amend_file(path, version="v2")
    images.assert_clean(path)


def snapshot_content(path: Path, name: str, scratch: Path) -> bytes:
    peers.run("qemu-img", "convert", "-l", f"snapshot.name={name}", "-f", "qcow2", "-O", "raw", path, scratch)
    return scratch.read_bytes()


@pytest.mark.parametrize("backing", [False, True])
def test_downgrade_expands_zero_clusters_everywhere(backing: bool, tmp_path: Path) -> None:
    """Also those that only snapshots have, and those whose space a snapshot still uses as data."""
    base = None
    if backing:
        base = images.create(tmp_path / "base", MiB)
        images.io(base, "write -P 9 0 900k")
    path = images.create(tmp_path / "disk", MiB, options="cluster_size=4k", backing=base)
    images.io(path, "write -P 1 0 100k", "write -z 0 8k", "write -z -u 8k 8k", "write -z 200k 32k")
    peers.run("qemu-img", "snapshot", "-c", "one", path)
    images.io(path, "write -z 16k 16k", "write -P 2 204k 4k", "write -z 500k 4k")
    peers.run("qemu-img", "snapshot", "-c", "two", path)
    peers.run("qemu-img", "snapshot", "-c", "three", path)
    images.io(path, "write -z -u 40k 16k", "write -z 600k 100k", "write -c -P 3 720k 4k")
    before = [snapshot_content(path, name, tmp_path / "raw") for name in ("one", "two", "three")]
    active = images.read_all(path, "qcow2", tmp_path / "raw")
    amend_file(path, version="v2")
    assert described(path)["specific"]["compat"] == "0.10"
    images.assert_clean(path)
    assert [snapshot_content(path, name, tmp_path / "raw") for name in ("one", "two", "three")] == before
    assert images.read_all(path, "qcow2", tmp_path / "raw") == active


def test_downgrade_of_an_encrypted_image(tmp_path: Path) -> None:
    """Zeroes in the file are no zeroes for the guest."""
    base = images.create(tmp_path / "base", MiB, "raw")
    images.io(base, "write -P 9 0 900k", fmt="raw")
    path = tmp_path / "disk"
    secret = ("--object", "secret,id=key,data=key")
    luks = "encrypt.format=luks,encrypt.key-secret=key"
    create = ("qemu-img", "create", "-q", *secret, "-f", "qcow2", "-b", base, "-F", "raw")
    peers.run(*create, "-o", f"encrypt.iter-time=10,cluster_size=4k,{luks}", path)
    opts = f"driver=qcow2,file.driver=file,file.filename={path},{luks}"
    peers.run("qemu-io", *secret, "--image-opts", "-c", "write -P 1 0 64k", "-c", "write -z 8k 16k", opts)
    peers.run("qemu-img", "snapshot", *secret, "--image-opts", "-c", "one", opts)
    peers.run("qemu-io", *secret, "--image-opts", "-c", "write -P 2 12k 4k", "-c", "write -z 400k 8k", opts)

    async def main() -> None:
        async with Daemon() as daemon:
            await daemon.qmp("object-add", qom_type="secret", id="key", data="key")
            file = {"driver": "file", "filename": str(path)}
            encrypt = {"format": "luks", "key-secret": "key"}
            await daemon.qmp("blockdev-add", driver="qcow2", node_name="disk", file=file, encrypt=encrypt)
            options = {"driver": "qcow2", "version": "v2"}
            concluded = asyncio.Event()
            daemon.on_event(lambda event: concluded.set() if event["data"].get("status") == "concluded" else None)
            await daemon.qmp("x-blockdev-amend", job_id="job", node_name="disk", options=options)
            await concluded.wait()
            (job,) = await daemon.qmp("query-jobs")
            assert "error" not in job

    run(main())
    reads = ["read -P 1 0 8k", "read -P 0 8k 4k", "read -P 2 12k 4k", "read -P 0 400k 8k", "read -P 9 408k 4k"]
    peers.run("qemu-img", "check", "-q", *secret, "--image-opts", opts)
    done = peers.run("qemu-io", *secret, "--image-opts", *(arg for read in reads for arg in ("-c", read)), opts)
    assert "verification failed" not in done.stdout
    peers.run("qemu-img", "snapshot", *secret, "--image-opts", "-a", "one", opts)
    done = peers.run("qemu-io", *secret, "--image-opts", "-c", "read -P 0 8k 16k", "-c", "read -P 9 400k 8k", opts)
    assert "verification failed" not in done.stdout


def test_downgrade_with_a_new_persistent_bitmap(tmp_path: Path) -> None:
    """It is in memory only, and version 2 has no place for it."""
    path = images.create(tmp_path / "disk", MiB)

    async def main() -> None:
        async with opened(path) as node:
            node.dirty_bitmaps.add(DirtyBitmap("new", node.length, 65536, persistent=True))
            with pytest.raises(Error, match="Cannot downgrade an image with persistent bitmaps"):
                await amend(node, version="v2")

    run(main())
    assert [one["name"] for one in described(path)["specific"]["bitmaps"]] == ["new"]


AMENDMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "upgrade": ("compat=0.10,cluster_size=4k", {"version": "v3", "lazy_refcounts": True}),
    "downgrade": ("cluster_size=4k", {"version": "v2"}),
    "refcounts": ("cluster_size=512", {"refcount_bits": 64}),
    "narrow": ("cluster_size=4k,refcount_bits=32", {"refcount_bits": 2}),
    "names": ("cluster_size=512", {"backing_file": "n" * 300, "backing_fmt": "raw"}),
}


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize("name", AMENDMENTS)
def test_every_cut(name: str, power: bool, tmp_path: Path) -> None:
    creation, options = AMENDMENTS[name]
    path = images.create(tmp_path / "disk", MiB, options=creation)
    images.io(path, "write -P 1 0 100k", "write -P 2 300k 60k")
    if name != "names":
        peers.run("qemu-img", "snapshot", "-c", "one", path)
    if name in ("downgrade", "refcounts", "narrow"):
        images.io(path, "write -z 8k 16k", "write -z -u 40k 8k", "write -P 3 60k 20k")
    before = images.read_all(path, "qcow2", tmp_path / "raw")
    image = path.read_bytes()

    async def main() -> list[tuple[Any, ...]]:
        node, below = await open_logged(image, Graph(EventBus()))
        await amend(node, **options)
        await node.flush()
        await close(node)
        return below.log

    log = run(main())
    rnd = random.Random(f"{name}{power}")
    cuts = sorted(rnd.sample(range(1, len(log)), min(12, len(log) - 1)))
    for cut in [*cuts, len(log)]:
        crashed = crash.after_power_cut(image, log, cut, rnd) if power else crash.after_kill(image, log, cut)
        path.write_bytes(crashed)
        peers.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", path)
        result = images.check(path)
        assert not result.get("corruptions") and not result.get("check-errors"), (cut, result)
        assert images.read_all(path, "qcow2", tmp_path / "raw") == before
        if name != "names":
            snapshot_content(path, "one", tmp_path / "raw")
