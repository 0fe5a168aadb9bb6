"""Block status and information are those of the peers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pyqsd.block.driver import MAY_UNMAP
from pyqsd.block.extents import COMPRESSED, DATA, OFFSET_VALID, ZERO
from pyqsd.block.internal_snapshots import listed
from pyqsd.block.node import Node
from tests.drivers.qcow2.support import opened, run
from tests.support import images, peers

MiB = 1 << 20


async def mapping(node: Node) -> list[dict[str, Any]]:
    """What `qemu-img map` says, from our block status."""
    found: list[dict[str, Any]] = []
    at = 0
    while at < node.length:
        (n, flags, where, offset), depth = await node.block_status_above(None, at, node.length - at)
        chain = node
        for _ in range(depth - 1):
            below = chain.below()
            assert below is not None
            chain = below
        layer = chain.driver.file
        has_offset = bool(flags & OFFSET_VALID) and layer is not None and where is layer.node
        entry = {
            "start": at,
            "length": n,
            "depth": depth - 1 if depth else -1,
            "zero": bool(flags & ZERO),
            "data": bool(flags & DATA),
            "compressed": bool(flags & COMPRESSED),
        }
        if has_offset:
            entry["offset"] = offset
        last = found[-1] if found else None
        same = ("depth", "zero", "data", "compressed")
        if (
            last is not None
            and all(last[key] == entry[key] for key in same)
            and ("offset" in last) == has_offset
            and (not has_offset or last["offset"] + last["length"] == offset)
        ):
            last["length"] += n
        else:
            found.append(entry)
        at += n
    return found


def expected(path: Path) -> list[dict[str, Any]]:
    """What `qemu-img map` says."""
    found = images.mapping(path)
    for entry in found:
        del entry["present"]
    assert isinstance(found, list)
    return found


IMAGES = {
    "plain": ("", ["write -P 1 0 1M", "write -P 1 3M 100", "write -z 5M 1M", "write -z -u 7M 1M"]),
    "4k": ("cluster_size=4k", ["write -P 1 0 1M", "write -z 64k 8k", "discard 128k 64k", "write -P 2 7M 4k"]),
    "512": ("cluster_size=512", ["write -P 1 100k 100k", "write -z 120k 5k"]),
    "v2": ("compat=0.10", ["write -P 1 0 1M", "discard 64k 64k", "write -P 3 7M 1M"]),
    "metadata": ("preallocation=metadata", ["write -P 1 1M 64k", "write -z 3M 64k"]),
    "falloc": ("preallocation=falloc", ["write -P 1 1M 64k"]),
    "extended": (
        "extended_l2=on,cluster_size=32k",
        ["write -P 1 0 1M", "write -P 2 3M 100", "write -z 16k 3k", "discard 128k 64k", "write -P 2 7M 4k"],
    ),
    "compressed": ("", ["write -c -P 1 0 64k", "write -c -P 2 64k 64k", "write -P 4 192k 64k"]),
}


def _normal(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the depth of zeroes that no layer stores."""
    found: list[dict[str, Any]] = []
    for entry in entries:
        if entry["zero"] and not entry["data"] and "offset" not in entry:
            entry["depth"] = None
        last = found[-1] if found else None
        if last is not None and last["depth"] is None and entry["depth"] is None:
            last["length"] += entry["length"]
        else:
            found.append(entry)
    return found


@pytest.mark.parametrize("name", IMAGES)
def test_map(tmp_path: Path, name: str) -> None:
    options, commands = IMAGES[name]
    path = images.create(tmp_path / "disk", 8 * MiB, options=options)
    images.io(path, *commands)

    async def main() -> list[dict[str, Any]]:
        async with opened(path, read_only=True) as node:
            return await mapping(node)

    theirs = expected(path)
    if name == "extended":
        # QEMU also tells where subclusters would be that are not stored.
        for entry in theirs:
            if entry["zero"] and not entry["data"] and "offset" in entry:
                del entry["offset"]
        ours = run(main())
        for entry in ours:
            if entry["zero"] and not entry["data"]:
                entry.pop("offset", None)
        assert _normal(ours) == _normal(theirs)
    else:
        assert _normal(run(main())) == _normal(theirs)


def test_map_of_chain(tmp_path: Path) -> None:
    base = images.create(tmp_path / "base", 3 * MiB)
    images.io(base, "write -P 1 0 1M", "write -z 1M 512k", "write -P 2 2M 200k")
    middle = images.create(tmp_path / "middle", 6 * MiB, backing=base, options="cluster_size=4k")
    images.io(middle, "write -P 3 512k 4k", "write -z 768k 16k", "discard 4k 64k", "write -P 9 5M 64k")
    top = images.create(tmp_path / "top", 8 * MiB, backing=middle)
    images.io(top, "write -P 4 64k 64k", "write -z 2M 64k", "write -P 4 7M 64k")

    async def main() -> list[dict[str, Any]]:
        async with opened(top, read_only=True) as node:
            return await mapping(node)

    assert _normal(run(main())) == _normal(expected(top))


@pytest.mark.parametrize("name", ["plain", "4k", "v2", "metadata", "compressed", "extended"])
@pytest.mark.parametrize("backing", [False, True])
def test_same_requests_leave_the_same_map(tmp_path: Path, name: str, backing: bool) -> None:
    """Zero writes and discards do to the tables what QEMU does to them."""
    options, commands = IMAGES[name]
    if backing and name == "metadata":
        options = ""
    base = images.create(tmp_path / "base", 8 * MiB)
    images.io(base, "write -P 7 0 8M")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for path in (ours, theirs):
        images.create(path, 8 * MiB, options=options, backing=base if backing else None)
        images.io(path, *commands)
    requests: list[tuple[str, int, int]] = [
        ("write -z", 0, 65536),
        ("write -z -u", 65536, 131072),
        ("discard", 262144, 65536),
        ("discard", 5 * MiB, 65536),
        ("discard", 6 * MiB, 65536),
        ("write -z -u", 5 * MiB + 65536, 65536),
        ("write -z", 4 * MiB, 65536),
        ("write -z -u", 4 * MiB + 65536, 65536),
        ("discard", 7 * MiB + 4096, 200_000),
        ("write -z", 7 * MiB + 512, 1024),
        ("write -z -u", 3 * MiB, 512),
        ("discard", 8 * MiB - 65536, 65536),
    ]
    opts = f"driver=qcow2,discard=unmap,file.driver=file,file.filename={theirs}"
    images.io(theirs, *(f"{what} {at} {n}" for what, at, n in requests), options=opts)

    async def main() -> None:
        async with opened(ours) as node:
            for what, at, n in requests:
                if what == "discard":
                    await node.pdiscard(at, n)
                else:
                    await node.pwrite_zeroes(at, n, MAY_UNMAP if what.endswith("-u") else 0)

    run(main())
    assert [{k: v for k, v in e.items() if k != "offset"} for e in expected(ours)] == [
        {k: v for k, v in e.items() if k != "offset"} for e in expected(theirs)
    ]
    images.assert_clean(ours)
    images.compare(ours, "qcow2", theirs, "qcow2")


def _query(path: Path, **options: Any) -> dict[str, Any]:
    """``query-named-block-nodes`` of the real daemon."""
    node = {"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": str(path)}, **options}
    commands = ["qmp_capabilities", "query-named-block-nodes", "quit"]
    argv = ["qemu-storage-daemon", "--chardev", "stdio,id=c", "--monitor", "c", "--blockdev", json.dumps(node)]
    text = "".join(json.dumps({"execute": name}) + "\n" for name in commands)
    done = subprocess.run(argv, input=text, capture_output=True, text=True, check=True, timeout=60)
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    (nodes,) = [reply["return"] for reply in replies if isinstance(reply.get("return"), list)]
    (image,) = [entry["image"] for entry in nodes if entry.get("node-name") == "q"]
    assert isinstance(image, dict)
    return image


@pytest.mark.parametrize(
    "options",
    [
        "",
        "compat=0.10",
        "lazy_refcounts=on,refcount_bits=64",
        "compression_type=zstd,cluster_size=1M",
        "refcount_bits=1",
        "extended_l2=on",
        "snapshots",
        "bitmaps",
    ],
)
def test_information(tmp_path: Path, options: str) -> None:
    special = options if options in ("snapshots", "bitmaps") else ""
    path = images.create(tmp_path / "disk", 10 * MiB, options="" if special else options)
    if special == "snapshots":
        peers.run("qemu-img", "snapshot", "-c", "first", path)
        images.io(path, "write 0 64k")
        peers.run("qemu-img", "snapshot", "-c", "sécond", path)
    elif special == "bitmaps":
        peers.run("qemu-img", "bitmap", "--add", path, "one")
        peers.run("qemu-img", "bitmap", "--add", "-g", "4096", path, "two")
        peers.run("qemu-img", "bitmap", "--disable", path, "two")
    theirs = _query(path, **{"read-only": True})

    async def main() -> dict[str, Any]:
        async with opened(path, read_only=True) as node:
            specific = node.driver.format_specific()
            found = {"format-specific": specific, **node.driver.image_info()}
            if special == "snapshots":
                found["snapshots"] = listed(node)
            return dict(msgspec.json.decode(msgspec.json.encode(found)))

    ours = {key.replace("_", "-"): value for key, value in run(main()).items()}
    assert ours["format-specific"] == theirs["format-specific"]
    for key in ("cluster-size", "dirty-flag", "snapshots"):
        assert ours.get(key) == theirs.get(key), key


def test_information_of_dirty_image(tmp_path: Path) -> None:
    """With lazy refcounts the image is dirty from the first write until it is closed."""
    path = images.create(tmp_path / "disk", MiB, options="lazy_refcounts=on")

    async def main() -> None:
        async with opened(path) as node:
            assert node.driver.image_info()["dirty_flag"] is False
            await node.pwrite(0, b"x" * 512)
            assert node.driver.image_info()["dirty_flag"] is True
            await node.flush()
            assert images.info(path, "-U")["dirty-flag"] is True

    run(main())
    assert images.info(path)["dirty-flag"] is False
    images.assert_clean(path)
