"""Encrypted images against a model, and against qemu-img and qemu-io with the key."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block.driver import WRITE_COMPRESSED
from pyqsd.block.extents import ALLOCATED, DATA, OFFSET_VALID, ZERO
from pyqsd.drivers.formats.qcow2.driver import Qcow2
from pyqsd.drivers.formats.qcow2.options import Options
from pyqsd.drivers.protocols.file import Options as FileOptions
from pyqsd.qapi.errors import Error
from tests.drivers.qcow2 import encrypted
from tests.drivers.qcow2.support import Model, close, open_logged, opened, run
from tests.support import images, peers

MiB = 1 << 20

VARIANTS: dict[str, tuple[str, dict[str, Any], int]] = {
    # name: (method, creation, disk size)
    "luks": ("luks", {}, 12 * MiB),
    "luks-512": ("luks", {"cluster_size": 512}, 2 * MiB + 1536),
    "luks-2m": ("luks", {"cluster_size": 2 * MiB}, 16 * MiB),
    "luks-v2": ("luks", {"version": 2, "cluster_size": 4096}, 8 * MiB),
    "luks-lazy": ("luks", {"lazy_refcounts": True}, 8 * MiB),
    "luks-extended": ("luks", {"extended_l2": True}, 12 * MiB),
    "luks-extended-16k": ("luks", {"extended_l2": True, "cluster_size": 16384}, 8 * MiB),
    "aes": ("aes", {}, 12 * MiB),
    "aes-v2-512": ("aes", {"version": 2, "cluster_size": 512}, 2 * MiB),
    "aes-extended": ("aes", {"extended_l2": True}, 8 * MiB),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_workload(tmp_path: Path, name: str) -> None:
    method, creation, size = VARIANTS[name]
    path = encrypted.make(tmp_path / "disk", size, method, **creation)
    v2 = creation.get("version") == 2

    async def main() -> bytearray:
        graph = await encrypted.graph_with_secret()
        async with opened(path, graph, encrypt=encrypted.key(method)) as node:
            assert node.limits.request_alignment == 512
            model = Model(node, 5, v2=v2)
            await model.workload(240, 5, 1_500_000)
            await model.verify()
        async with opened(path, graph, encrypt=encrypted.key(method)) as node:
            model.node = node
            await model.verify()
            await model.workload(100, 5, 300_000)
        return model.content

    content = run(main())
    encrypted.assert_clean(path, method)
    assert encrypted.read_all(path, method, tmp_path / "raw") == content


@pytest.mark.parametrize("method", ["luks", "aes"])
def test_qemu_creates_and_writes(tmp_path: Path, method: str) -> None:
    path = tmp_path / "disk"
    options = f"encrypt.format={method},encrypt.key-secret=s,extended_l2=on"
    if method == "luks":
        options += ",encrypt.iter-time=10"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", *encrypted.SECRET, "-o", options, path, "4M")
    opts = encrypted.image_opts(path, method)
    commands = ("write -P 1 0 100k", "write -P 2 1M 700k", "write -z 1200k 64k", "write -c -P 3 3M 64k")
    flags = [word for command in commands for word in ("-c", command)]
    peers.run("qemu-io", *encrypted.SECRET, "--image-opts", opts, *flags)
    before = encrypted.read_all(path, method, tmp_path / "raw")
    assert before[0] == 1 and before[3 * MiB] == 3

    async def main() -> bytearray:
        graph = await encrypted.graph_with_secret()
        async with opened(path, graph, encrypt=encrypted.key(method)) as node:
            assert await node.pread(0, node.length) == before
            model = Model(node, 8, initial=before)
            # Into the compressed cluster, which is not encrypted: what is written there is.
            model.content[3 * MiB + 1000 : 3 * MiB + 3000] = b"x" * 2000
            await node.pwrite(3 * MiB + 1000, b"x" * 2000)
            await model.workload(100, 1, 200_000)
            await model.verify()
        return model.content

    content = run(main())
    encrypted.assert_clean(path, method)
    assert encrypted.read_all(path, method, tmp_path / "raw") == content


@pytest.mark.parametrize("method", ["luks", "aes"])
@pytest.mark.parametrize("base_encrypted", [False, True])
def test_overlay(tmp_path: Path, method: str, base_encrypted: bool) -> None:
    size = 4 * MiB
    base = tmp_path / "base"
    if base_encrypted:
        encrypted.make(base, size, "luks")
    else:
        images.create(base, size)
        images.io(base, "write -P 17 0 2M", "write -P 18 3M 300k")
    creation: dict[str, Any] = {} if base_encrypted else {"backing_file": str(base), "backing_format": "qcow2"}
    path = encrypted.make(tmp_path / "disk", size, method, **creation)

    async def write(seed: int, initial: bytes | None) -> bytes:
        graph = await encrypted.graph_with_secret()
        options: dict[str, Any] = {}
        if base_encrypted:
            options["backing"] = Options(file=FileOptions(filename=str(base)), encrypt=encrypted.key("luks"))
        async with opened(path, graph, encrypt=encrypted.key(method), **options) as node:
            before = bytes(await node.pread(0, size)) if initial is None else initial
            model = Model(node, seed, initial=before)
            await model.verify()
            await model.workload(80, 4, 100_000)
            await model.verify()
            return bytes(model.content)

    first = run(write(1, None))
    second = run(write(2, first))
    assert first != second
    encrypted.assert_clean(path, method)
    if not base_encrypted:
        assert encrypted.read_all(path, method, tmp_path / "raw") == second


@pytest.mark.parametrize("method", ["luks", "aes"])
def test_shared_clusters_are_copied(tmp_path: Path, method: str) -> None:
    """A snapshot has the same clusters: with luks, what is copied is encrypted for its new place."""
    path = encrypted.make(tmp_path / "disk", 2 * MiB, method, cluster_size=4096)
    opts = encrypted.image_opts(path, method)
    peers.run("qemu-io", *encrypted.SECRET, "--image-opts", opts, "-c", "write -P 7 0 1M")
    peers.run("qemu-img", "snapshot", *encrypted.SECRET, "-c", "one", "--image-opts", opts)

    async def main() -> bytearray:
        graph = await encrypted.graph_with_secret()
        async with opened(path, graph, encrypt=encrypted.key(method)) as node:
            model = Model(node, 3, initial=b"\7" * MiB + bytes(MiB))
            await model.workload(150, 3, 20_000)
            await model.verify()
        return model.content

    content = run(main())
    encrypted.assert_clean(path, method)
    assert encrypted.read_all(path, method, tmp_path / "raw") == content
    peers.run("qemu-img", "snapshot", *encrypted.SECRET, "-a", "one", "--image-opts", opts)
    assert encrypted.read_all(path, method, tmp_path / "raw") == b"\7" * MiB + bytes(MiB)


@pytest.mark.parametrize("method", ["luks", "aes"])
def test_nothing_plain_reaches_the_file(tmp_path: Path, method: str) -> None:
    path = encrypted.make(tmp_path / "disk", 8 * MiB, method, extended_l2=method == "luks")
    marker = b"a secret that nobody may find in the file"
    pattern = (marker + bytes(64 - len(marker))) * 16384
    rnd = random.Random(9)

    async def main() -> None:
        graph = await encrypted.graph_with_secret()
        async with opened(path, graph, encrypt=encrypted.key(method)) as node:
            for length in (41, 512, 1000, 4096, 70_000, 300_000, MiB):
                for _ in range(4):
                    offset = rnd.randrange(node.length - length)
                    await node.pwritev(
                        offset, length, [memoryview(pattern)[: length // 2], memoryview(pattern)[length // 2 : length]]
                    )
                    await node.pwrite(offset & ~511, pattern[: length & ~511])
            await node.pwrite(2 * MiB, pattern[:65536], WRITE_COMPRESSED)
            await node.pwrite_zeroes(MiB, 700)
            await node.truncate(9 * MiB, preallocation="full")
            await node.pwrite(9 * MiB - 50, marker)

    run(main())
    data = path.read_bytes()
    assert marker[:16] not in data and marker[8:24] not in data
    assert marker in encrypted.read_all(path, method, tmp_path / "raw")
    assert encrypted.PASSPHRASE.encode() not in data


def test_status(tmp_path: Path) -> None:
    """Nobody is told where encrypted data is in the file."""
    path = encrypted.make(tmp_path / "disk", MiB, "luks")

    async def main() -> None:
        graph = await encrypted.graph_with_secret()
        async with opened(path, graph, encrypt=encrypted.key("luks")) as node:
            await node.pwrite(0, b"x" * 131072)
            await node.pwrite_zeroes(65536, 65536)
            n, flags, _, _ = await node.block_status(0, MiB)
            assert (n, flags & (DATA | ZERO | ALLOCATED | OFFSET_VALID)) == (65536, DATA | ALLOCATED)
            n, flags, _, _ = await node.block_status(65536, MiB)
            assert (n, flags & (DATA | ZERO | ALLOCATED | OFFSET_VALID)) == (65536, ZERO | ALLOCATED)
            n, flags, _, _ = await node.block_status(131072, MiB)
            assert flags & (DATA | ZERO | OFFSET_VALID) == ZERO

    run(main())
    opts = encrypted.image_opts(path, "luks")
    shown = peers.run("qemu-img", "map", "--output=json", *encrypted.SECRET, "--image-opts", opts).stdout
    assert '"offset"' not in shown


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("creation", [{}, {"version": 2}, {"extended_l2": True}], ids=("v3", "v2", "extended"))
def test_preallocated_space_reads_as_zeroes(tmp_path: Path, preallocation: str, creation: dict[str, Any]) -> None:
    path = encrypted.make(tmp_path / "disk", MiB, "luks", **creation)

    async def main() -> bytes:
        graph = await encrypted.graph_with_secret()
        async with opened(path, graph, encrypt=encrypted.key("luks")) as node:
            await node.pwrite(MiB - 4096, b"x" * 4096)
            await node.truncate(3 * MiB, preallocation=preallocation)
            assert await node.pread(MiB, 2 * MiB) == bytes(2 * MiB)
            await node.pwrite(2 * MiB + 100, b"in the middle")
            await node.truncate(2 * MiB + 65536)
            await node.truncate(4 * MiB, preallocation=preallocation)
            content = bytes(await node.pread(0, node.length))
        return content

    content = run(main())
    expected = bytearray(4 * MiB)
    expected[MiB - 4096 : MiB] = b"x" * 4096
    expected[2 * MiB + 100 : 2 * MiB + 113] = b"in the middle"
    assert content == expected
    encrypted.assert_clean(path, "luks")
    assert encrypted.read_all(path, "luks", tmp_path / "raw") == expected


def test_refcounts_are_rebuilt_with_the_header(tmp_path: Path) -> None:
    """A dirty image is repaired when it is opened: the LUKS header stays in use."""
    path = encrypted.make(tmp_path / "disk", 2 * MiB, "luks", lazy_refcounts=True)
    with path.open("r+b") as file:
        file.seek(72 + 7)
        file.write(b"\1")

    async def main() -> None:
        graph = await encrypted.graph_with_secret()
        async with opened(path, graph, encrypt=encrypted.key("luks")) as node:
            await node.pwrite(0, b"x" * 65536)

    run(main())
    encrypted.assert_clean(path, "luks")
    assert encrypted.read_all(path, "luks", tmp_path / "raw")[:65536] == b"x" * 65536


def test_keys_go_when_the_node_does(tmp_path: Path) -> None:
    path = encrypted.make(tmp_path / "disk", MiB, "luks")

    async def main() -> None:
        graph = await encrypted.graph_with_secret()
        async with opened(path, graph, encrypt=encrypted.key("luks")) as node:
            driver = node.driver
            assert isinstance(driver, Qcow2) and driver._encryption is not None
            cipher = driver._encryption.cipher
            held = cipher._key
            assert any(held)
            await node.pwrite(0, b"x" * 4096)
        assert not any(held) and driver._encryption is None
        kind = type(encrypted.key("luks"))
        with pytest.raises(Error, match="Invalid password, cannot unlock any keyslot"):
            async with opened(path, graph, encrypt=kind(key_secret="wrong")):
                pass
        assert not graph.nodes

    run(main())


def test_cancelled_requests(tmp_path: Path) -> None:
    """Whoever gives up in the middle of a large request leaves its buffer to itself, and the image whole."""
    path = encrypted.make(tmp_path / "disk", 8 * MiB, "luks")

    async def main() -> None:
        graph = await encrypted.graph_with_secret()
        async with opened(path, graph, encrypt=encrypted.key("luks")) as node:
            rnd = random.Random(4)
            await node.pwrite(4 * MiB, b"k" * MiB)
            for _ in range(20):
                buffer = bytearray(2 * MiB)
                tasks = [
                    asyncio.ensure_future(node.preadv(4 * MiB, MiB, [memoryview(buffer)[:MiB]])),
                    asyncio.ensure_future(node.pwrite(rnd.randrange(4) * 512000, b"w" * 700_000)),
                ]
                for _ in range(rnd.randrange(8)):
                    await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                seen = bytes(buffer)
                await asyncio.sleep(0)
                assert bytes(buffer) == seen
            assert await node.pread(4 * MiB, MiB) == b"k" * MiB

    run(main())
    encrypted.assert_clean(path, "luks")


def test_the_luks_header_is_not_overwritten(tmp_path: Path) -> None:
    """An image whose refcounts say that the clusters of its LUKS header are free keeps them."""
    path = encrypted.make(tmp_path / "disk", 2 * MiB, "luks")
    data = bytearray(path.read_bytes())
    at = data.index(b"\x05\x37\xbe\x77")
    area = int.from_bytes(data[at + 8 : at + 16], "big")
    block = int.from_bytes(data[65536:65544], "big")
    first = area >> 16
    data[block + 2 * first : block + 2 * (first + 32)] = bytes(64)
    path.write_bytes(data)
    before = data[area : area + len(encrypted.region())]

    async def main() -> None:
        graph = await encrypted.graph_with_secret()
        async with opened(path, graph, encrypt=encrypted.key("luks")) as node:
            with pytest.raises(OSError, match=r"Preventing invalid write on metadata \(overlaps with qcow2_header\)"):
                await node.pwrite(0, b"x" * MiB)

    run(main())
    assert path.read_bytes()[area : area + len(before)] == before


@pytest.mark.parametrize("method", ["luks", "aes"])
def test_random_damage(tmp_path: Path, method: str) -> None:
    """A clear error or an I/O error, never anything else."""
    path = encrypted.make(tmp_path / "disk", MiB, method, cluster_size=4096)
    opts = encrypted.image_opts(path, method)
    peers.run("qemu-io", *encrypted.SECRET, "--image-opts", opts, "-c", "write -P 7 0 256k", "-c", "write -z 64k 64k")
    sound = path.read_bytes()
    rnd = random.Random(method)
    area = 0
    if method == "luks":
        at = sound.index(b"\x05\x37\xbe\x77")
        area = int.from_bytes(sound[at + 8 : at + 16], "big")
    # Iterations are honoured, however many.
    endless = {area + 164 + n for n in range(4)} | {area + 212 + n for n in range(4)}

    async def main() -> int:
        graph = await encrypted.graph_with_secret()
        refused = 0
        for _ in range(120):
            data = bytearray(sound)
            for _ in range(rnd.randrange(1, 4)):
                place = rnd.choice((0, area, area)) + rnd.randrange(600)
                if place not in endless and (place + 1) not in endless:
                    data[place : place + 2] = rnd.choice((b"\0\0", b"\xff\xff", rnd.randbytes(2)))
            try:
                node, _ = await open_logged(bytes(data), graph, encrypt=encrypted.key(method))
            except Error:
                refused += 1
                for name in list(graph.nodes):
                    del graph.nodes[name]
                continue
            for _ in range(4):
                offset = rnd.randrange(0, max(512, min(node.length, MiB)), 512)
                try:
                    await node.pread(offset, min(70_000, node.length - offset) if offset < node.length else 0)
                    await node.pwrite(offset, bytes(512))
                except OSError:
                    pass
            try:
                await close(node)
            except OSError:
                pass
        return refused

    assert run(main()) > 20


@pytest.mark.parametrize("creation", ["data_file_raw=on", "extended_l2=on"])
def test_data_file(tmp_path: Path, creation: str) -> None:
    """An encrypted image whose clusters are in another file."""
    path, data = tmp_path / "disk", tmp_path / "data"
    options = f"encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,data_file={data},{creation}"
    peers.run("qemu-img", "create", "-q", "-f", "qcow2", *encrypted.SECRET, "-o", options, path, "3M")

    async def main() -> bytearray:
        graph = await encrypted.graph_with_secret()
        async with opened(path, graph, encrypt=encrypted.key("luks")) as node:
            # What is new in a raw data file is anything.
            await node.pwrite_zeroes(0, node.length)
            model = Model(node, 6)
            await model.workload(120, 4, 300_000)
            await node.truncate(5 * MiB, preallocation="metadata")
            model.content += bytes(2 * MiB)
            await model.verify()
            await node.pwrite(4 * MiB, b"plain text " * 100)
            model.content[4 * MiB : 4 * MiB + 1100] = b"plain text " * 100
            await model.workload(60, 1, 100_000)
            await model.verify()
        return model.content

    content = run(main())
    encrypted.assert_clean(path, "luks")
    assert encrypted.read_all(path, "luks", tmp_path / "raw") == content
    assert b"plain text plain" not in data.read_bytes()
