"""Opening: each mistake in an image or its options has the words of the real daemon, which is asked here."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block.graph import Graph
from pyqsd.block.options import BlockdevOptions
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.create import empty_image
from pyqsd.drivers.formats.qcow2.driver import Qcow2
from pyqsd.drivers.formats.qcow2.options import Options
from pyqsd.drivers.protocols.file import Options as FileOptions
from pyqsd.qapi.command import EventBus
from pyqsd.qapi.convert import convert
from pyqsd.qapi.errors import Error
from tests.drivers.qcow2 import unopenable
from tests.drivers.qcow2.support import close, opened, run
from tests.support import images

MiB = 1 << 20
EXT = 112
Case = tuple[str, bytes, dict[str, Any]]


def number(value: int, size: int) -> bytes:
    return (value % (1 << 8 * size)).to_bytes(size, "big")


def patched(image: bytes, *patches: tuple[int, bytes]) -> bytes:
    copy = bytearray(image)
    for at, data in patches:
        copy[at : at + len(data)] = data
    return bytes(copy)


def bitmaps(count: int, reserved: int, size: int, offset: int) -> bytes:
    data = number(count, 4) + number(reserved, 4) + number(size, 8) + number(offset, 8)
    return number(headers.EXT_BITMAPS, 4) + number(24, 4) + data + bytes(64)


def header_cases(v3: bytes, v2: bytes) -> list[Case]:
    found: list[Case] = []

    def add(name: str, image: bytes, *patches: tuple[int, bytes]) -> None:
        for read_only in (False, True):
            found.append((name, patched(image, *patches), {"read-only": read_only}))

    add("sound", v3)
    add("sound v2", v2)
    add("magic", v3, (0, b"QFX\xfb"))
    for at, size, name, values in (
        (4, 4, "version", (0, 1, 4, -1)),
        (20, 4, "cluster_bits", (0, 8, 9, 22, -1)),
        (24, 8, "size", (0, 1000, 1 << 62, (1 << 63) - 1, 1 << 63, -1)),
        (32, 4, "crypt_method", (3, -1)),
        (36, 4, "l1_size", (0, 1, 4194304, 4194305, -1)),
        (40, 8, "l1_offset", (0, 1, 512, 1 << 40, 1 << 63, -65536)),
        (48, 8, "refcount_table_offset", (0, 1, 512, 65537, 1 << 40, 1 << 63, -65536)),
        (56, 4, "refcount_table_clusters", (0, 16, 127, 128, 129, -1)),
        (60, 4, "nb_snapshots", (1, 65536, 65537, -1)),
        (72, 8, "incompatible", (2, 8, 16, 1 << 5, 1 << 63, 1 << 6 | 1 << 7, 2 | 1 << 40)),
        (88, 8, "autoclear", (1, 2, 1 << 20)),
        (96, 4, "refcount_order", (0, 6, 7, 64, -1)),
        (100, 4, "header_length", (0, 72, 103, 105, 112, 120, 65536, 65540, 65544, -1)),
        (104, 1, "compression_type", (1, 2, 255)),
        (8, 8, "backing_file_offset", (65536, 65537, 1 << 40, -1)),
    ):
        for value in values:
            add(f"{name} {value}", v3, (at, number(value, size)))
    for value in (1, 512, 1 << 63):
        add(f"snapshots_offset {value}", v3, (60, number(1, 4)), (64, number(value, 8)))
    for value in (1024, -1):
        add(f"backing_file_size {value}", v3, (8, number(600, 8)), (16, number(value, 4)))
    add("backing name beyond the cluster", v3, (8, number(65530, 8)), (16, number(100, 4)))
    add("zstd marked", v3, (104, b"\1"), (72, number(8, 8)))
    add("unknown type marked", v3, (104, b"\7"), (72, number(8, 8)))
    for length in (-1, 65536 - EXT - 8, 65536 - EXT - 7):
        add(f"extension {length}", v3, (EXT, number(0x12345678, 4) + number(length, 4)))
    add("backing format 16", v3, (EXT, number(headers.EXT_BACKING_FORMAT, 4) + number(16, 4)))
    add("crypto", v3, (EXT, number(headers.EXT_CRYPTO, 4) + number(16, 4)))
    consistent = (88, number(1, 8))
    for name, data in (
        ("none", bitmaps(0, 0, 0, 0)),
        ("reserved", bitmaps(1, 1, 0, 0)),
        ("many", bitmaps(65536, 0, 0, 0)),
        ("unaligned", bitmaps(1, 0, 32, 1)),
        ("large", bitmaps(1, 0, 1 << 40, 65536)),
        ("empty", bitmaps(1, 0, 32, 65536 * 4)),
    ):
        add(f"bitmaps {name}", v3, consistent, (EXT, data))
        add(f"inconsistent bitmaps {name}", v3, (EXT, data))
    for length in (0, 4, 71, 72, 104, 112, 600, 65536, 70000, 131072, 196608):
        for read_only in (False, True):
            found.append((f"cut at {length}", v3[:length], {"read-only": read_only}))
    add("v2 without refcounts", v2, (56, number(0, 4)))
    return found


def option_cases(v3: bytes, v2: bytes) -> list[Case]:
    options: list[dict[str, Any]] = [
        {"cache-size": 1, "l2-cache-size": 1, "refcount-cache-size": 1},
        {"cache-size": 1, "l2-cache-size": 2},
        {"cache-size": 1, "refcount-cache-size": 2},
        {"cache-size": 0},
        *({"l2-cache-entry-size": value} for value in (511, 512, 1000, 131072, 0, -1)),
        *({"l2-cache-size": value} for value in (0, -1, 1 << 62)),
        *({"refcount-cache-size": value} for value in (0, -1, 1 << 60)),
        *({"cache-clean-interval": value} for value in (-1, 1 << 32, 0)),
        {"lazy-refcounts": True},
        {"discard-no-unref": True},
        {"overlap-check": "all"},
        {"overlap-check": {"template": "none", "main-header": True}},
    ]
    return [(f"{which} {one}", image, one) for one in options for which, image in (("v3", v3), ("v2", v2))]


def ask_qsd(paths: list[Path], cases: list[Case]) -> list[str]:
    """What the real daemon says to each case: "OK" or the description of the error."""
    lines = [{"execute": "qmp_capabilities"}]
    for number_, (path, (_, _, options)) in enumerate(zip(paths, cases, strict=True)):
        node = {"driver": "qcow2", "node-name": "q", "file": {"driver": "file", "filename": str(path)}, **options}
        lines.append({"execute": "blockdev-add", "arguments": node, "id": number_})  # type: ignore[dict-item]
        lines.append({"execute": "blockdev-del", "arguments": {"node-name": "q"}})  # type: ignore[dict-item]
    lines.append({"execute": "quit"})
    done = subprocess.run(
        ["qemu-storage-daemon", "--chardev", "stdio,id=c", "--monitor", "c"],
        input="".join(json.dumps(line) + "\n" for line in lines),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    answers = {reply["id"]: reply.get("error", {}).get("desc", "OK") for reply in replies if "id" in reply}
    return [answers[index] for index in range(len(cases))]


def ask_ours(path: Path, options: dict[str, Any]) -> str:
    from pyqsd.drivers.formats.qcow2.options import Qcow2OverlapCheckFlags, Qcow2OverlapCheckMode

    values = {key.replace("-", "_"): value for key, value in options.items()}
    check = values.get("overlap_check")
    if isinstance(check, dict):
        values["overlap_check"] = Qcow2OverlapCheckFlags(template=Qcow2OverlapCheckMode.NONE, main_header=True)

    async def main() -> str:
        graph = Graph(EventBus())
        try:
            node = await graph.add(Options(node_name="q", file=FileOptions(filename=str(path)), **values))
        except Error as exc:
            return exc.desc
        await close(node)
        return "OK"

    return run(main())


@pytest.mark.parametrize("cases", [header_cases, option_cases])
def test_same_words(tmp_path: Path, cases: Callable[[bytes, bytes], list[Case]]) -> None:
    v3 = images.create(tmp_path / "v3", 64 * MiB).read_bytes()
    v2 = images.create(tmp_path / "v2", 64 * MiB, options="compat=0.10").read_bytes()
    chosen = cases(v3, v2)
    paths = []
    for index, (_, image, _) in enumerate(chosen):
        path = tmp_path / str(index)
        path.write_bytes(image)
        paths.append(path)
    theirs = ask_qsd(paths, chosen)
    different = []
    for path, (name, image, options), expected in zip(paths, chosen, theirs, strict=True):
        path.write_bytes(image)
        answer = ask_ours(path, options)
        if answer != expected:
            different.append((name, options, expected, answer))
    assert different == []


def test_named_feature(tmp_path: Path) -> None:
    """The image's own table of names says which feature is unknown."""
    table = bytes([0, 9]) + b"time travel".ljust(46, b"\0")
    extension = number(headers.EXT_FEATURE_TABLE, 4) + number(len(table), 4) + table
    image = patched(empty_image(MiB), (72, number(1 << 9 | 1 << 20, 8)), (EXT, extension + bytes(8)))
    path = tmp_path / "disk"
    path.write_bytes(image)
    expected = "Unsupported qcow2 feature(s): time travel, Unknown incompatible feature: 100000"
    assert ask_ours(path, {}) == expected
    assert ask_qsd([path], [("", image, {})]) == [expected]


def test_probe() -> None:
    assert Qcow2.probe(empty_image(MiB)[:512], "x") == 100
    assert Qcow2.probe(empty_image(MiB, version=2)[:512], "x") == 100
    assert Qcow2.probe(b"QFI\xfb\0\0\0\1" + bytes(504), "x") == 0
    assert Qcow2.probe(b"QFI", "x") == 0
    assert Qcow2.probe(bytes(512), "x.qcow2") == 0


# --- header features ------------------------------------------------------------------------------------------------


def test_unknown_features_are_kept(tmp_path: Path) -> None:
    """Unknown extensions, compatible features and additional fields survive writing; unknown autoclear bits do not."""
    extension = number(0x99887766, 4) + number(11, 4) + b"hello world" + bytes(5)
    image = bytearray(empty_image(MiB))
    image[100:104] = number(120, 4)
    image[112:120] = b"\0\0FUTURE"
    image[120 : 120 + len(extension) + 8] = extension + bytes(8)
    image[80:88] = number(1 << 33, 8)
    image[88:96] = number(1 << 5, 8)
    path = tmp_path / "disk"
    path.write_bytes(image)

    async def look() -> None:
        async with opened(path) as node:
            await node.pread(0, 512)

    async def write() -> None:
        async with opened(path) as node:
            await node.pwrite(0, b"x")
            await node.truncate(900 * MiB)

    run(look())
    assert path.read_bytes() == image
    run(write())
    after = path.read_bytes()
    assert after[80:88] == number(1 << 33, 8)
    assert after[88:96] == bytes(8)
    assert after[100:104] == number(120, 4)
    assert after[112 : 120 + len(extension)] == image[112 : 120 + len(extension)]
    images.assert_clean(path)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"version": 2},
        {"cluster_size": 512, "refcount_bits": 64},
        {"cluster_size": 512, "refcount_bits": 1},
        {"cluster_size": 2 * MiB},
        {"lazy_refcounts": True},
        {"compression_type": headers.COMPRESSION_ZSTD},
        {"extended_l2": True, "cluster_size": 16384},
    ],
)
@pytest.mark.parametrize("size", [0, 512, 10 * MiB + 1536, 900 * MiB])
def test_created_image(tmp_path: Path, how: dict[str, Any], size: int) -> None:
    path = tmp_path / "disk"
    path.write_bytes(empty_image(size, **how))
    images.assert_clean(path)
    shown = images.info(path)
    assert shown["virtual-size"] == size
    assert shown["cluster-size"] == how.get("cluster_size", 65536)
    data = shown["format-specific"]["data"]
    assert data["compat"] == ("0.10" if how.get("version") == 2 else "1.1")
    assert data["refcount-bits"] == how.get("refcount_bits", 16)
    assert data["compression-type"] == ("zstd" if "compression_type" in how else "zlib")
    assert data.get("lazy-refcounts", False) == how.get("lazy_refcounts", False)


def test_created_overlay(tmp_path: Path) -> None:
    base = images.create(tmp_path / "base", MiB)
    images.io(base, "write -P 7 0 1M")
    path = tmp_path / "disk"
    path.write_bytes(empty_image(MiB, backing_file="base", backing_format="qcow2"))
    shown = images.info(path)
    assert (shown["backing-filename"], shown["backing-filename-format"]) == ("base", "qcow2")
    images.compare(path, "qcow2", base, "qcow2")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"cluster_size": 1000}, "Cluster size must be a power of two between 512 and 2048k"),
        ({"cluster_size": 256}, "Cluster size must be a power of two between 512 and 2048k"),
        ({"refcount_bits": 128}, "Refcount width must be a power of two and may not exceed 64 bits"),
        ({"backing_format": "raw"}, "Backing format cannot be used without backing file"),
        ({"backing_file": "x" * 1024}, "Could not assign backing file 'xxxx"),
        (
            {"version": 2, "lazy_refcounts": True},
            "Lazy refcounts only supported with compatibility level 1.1 and above",
        ),
        ({"cluster_size": 512, "size": 1 << 40}, "Could not resize image: Failed to grow the L1 table: File too large"),
        ({"extended_l2": True, "cluster_size": 8192}, "Extended L2 entries are only supported with cluster sizes of"),
        ({"extended_l2": True, "version": 2}, "Extended L2 entries are only supported with compatibility level 1.1"),
        ({"size": 1000}, "Image size must be a multiple of 512 bytes"),
    ],
)
def test_not_created(how: dict[str, Any], words: str) -> None:
    size = how.pop("size", MiB)
    with pytest.raises(Error) as caught:
        empty_image(size, **how)
    assert caught.value.desc.startswith(words)


READ_ERRORS = {
    "header": ("snapshots", lambda data: 0),
    "L1 table": ("snapshots", lambda data: unopenable.u64(data, 40)),
    "refcount table": ("snapshots", lambda data: unopenable.u64(data, 48)),
    "snapshot table": ("snapshots", lambda data: unopenable.u64(data, 64)),
    "directory": ("bitmaps", unopenable.directory_at),
    "table of a bitmap": ("bitmaps", lambda data: unopenable.u64(data, unopenable.directory_at(data))),
}


@pytest.mark.parametrize("name", [*READ_ERRORS, "repair"])
def test_errors_below(name: str, sound: Callable[[str], bytes], tmp_path: Path) -> None:
    """What cannot be read, or written, is said with the reason."""
    kind, where = READ_ERRORS.get(name, ("plain", lambda data: 0))
    image = bytearray(sound(kind))
    rule: dict[str, Any] = {"event": "none", "errno": 5, "immediately": True}
    if name == "repair":
        image[79] |= headers.INCOMPAT_DIRTY
        rule["iotype"] = "write"
    else:
        rule |= {"iotype": "read", "sector": where(image) // 512}
    path = tmp_path / "disk.qcow2"
    path.write_bytes(image)
    file = {"driver": "blkdebug", "image": {"driver": "file", "filename": str(path)}, "inject-error": [rule]}
    tree = {"driver": "qcow2", "node-name": "q", "file": file}
    said = images.peers.run("qemu-storage-daemon", "--blockdev", json.dumps(tree), ok=(1,)).stderr

    async def main() -> str:
        with pytest.raises(Error) as caught:
            await Graph(EventBus()).add(convert(tree, BlockdevOptions))
        return caught.value.desc

    desc = run(main())
    assert "Input/output error" in desc
    assert said.endswith(f": {desc}\n")
