"""``raw``: the whole of a file and parts of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqsd.block import permissions as perms
from pyqsd.block.driver import FUA, MAY_UNMAP, ROLE_DATA, ROLE_FILTERED, ROLE_PRIMARY
from pyqsd.block.extents import DATA, ZERO
from pyqsd.block.node import Node
from pyqsd.qapi.errors import Error
from tests.drivers import opening
from tests.drivers.opening import add, graph, read, run, use, write
from tests.support import peers

SIZE = 1 << 16


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


async def add_raw(g: Any, path: Path, file: dict[str, Any] | None = None, **wire: Any) -> Node:
    return await add(g, driver="raw", file={"driver": "file", "filename": str(path), **(file or {})}, **wire)


def error_of(path: Path, **wire: Any) -> str:
    found: list[str] = []

    async def main() -> None:
        async with graph() as g:
            with pytest.raises(Error) as caught:
                await add_raw(g, path, **wire)
            found.append(caught.value.desc)
            assert not g.nodes

    run(main)
    return found[0]


def test_errors_of_opening(image: Path) -> None:
    assert error_of(image, offset=-1) == "Value '-1' is out of range for parameter 'offset'"
    assert error_of(image, size=-1) == "Value '-1' is out of range for parameter 'size'"
    assert error_of(image, size=511) == "Specified size is not multiple of 512"
    assert (
        error_of(image, offset=SIZE + 1)
        == f"Offset ({SIZE + 1}) cannot be greater than size of the containing file ({SIZE})"
    )
    assert (
        error_of(image, offset=512, size=SIZE)
        == f"The sum of offset (512) and size ({SIZE}) has to be smaller or equal to the  actual size of the "
        f"containing file ({SIZE})"
    )
    assert error_of(image.parent / "none.img").endswith("none.img': No such file or directory")


@pytest.mark.parametrize(
    ("wire", "start", "length", "role"),
    [
        ({}, 0, SIZE, ROLE_FILTERED),
        ({"offset": 0}, 0, SIZE, ROLE_FILTERED),
        ({"offset": 4096}, 4096, SIZE - 4096, ROLE_DATA),
        ({"size": 1024}, 0, 1024, ROLE_DATA),
        ({"offset": 1024, "size": 2048}, 1024, 2048, ROLE_DATA),
        ({"offset": SIZE}, SIZE, 0, ROLE_DATA),
        ({"offset": 511}, 511, SIZE, ROLE_DATA),
        ({"offset": 100, "size": 512}, 100, 512, ROLE_DATA),
    ],
)
def test_part_of_the_file(image: Path, wire: dict[str, Any], start: int, length: int, role: int) -> None:
    content = image.read_bytes()

    async def main() -> None:
        async with graph() as g:
            node = await add_raw(g, image, read_only=True, **wire)
            assert node.length == length
            assert node.driver.file is not None and node.driver.file.role == role | ROLE_PRIMARY
            user = use(g, node, opening.READ)
            assert await read(user, 0, length) == content[start : start + length].ljust(length, b"\0")
            with pytest.raises(OSError):
                await read(user, length, 1)

    run(main)


@pytest.mark.parametrize("direct", [False, True])
@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["write", "fua", "now", "read", "zero", "unmap", "discard", "status", "flush"]),
            st.integers(0, SIZE - 1),
            st.integers(1, 20000),
        ),
        max_size=25,
    ),
    offset=st.sampled_from([0, 100, 512, 4096, 5000]),
    size=st.sampled_from([None, 512, 32768]),
)
def test_matches_a_bytearray(
    tmp_path_factory: pytest.TempPathFactory,
    direct: bool,
    steps: list[tuple[str, int, int]],
    offset: int,
    size: int | None,
) -> None:
    path = tmp_path_factory.mktemp("raw") / "disk.img"
    before = os.urandom(SIZE)
    path.write_bytes(before)
    length = -(-(SIZE - offset) // 512) * 512 if size is None else size
    model = bytearray(before[offset : offset + length].ljust(length, b"\0"))

    async def main() -> None:
        async with graph() as g:
            wire = {} if size is None else {"size": size}
            node = await add_raw(g, path, discard="unmap", cache={"direct": direct}, offset=offset, **wire)
            user = use(g, node)
            assert node.length == length
            for number, (what, at, n) in enumerate(steps):
                at = min(at, length)
                n = min(n, length - at)
                data = bytes([number + 1]) * n
                if what in ("write", "fua"):
                    await write(user, at, data, FUA if what == "fua" else 0)
                    model[at : at + n] = data
                elif what == "now":
                    if user.write_now(at, n, [memoryview(data)]):
                        model[at : at + n] = data
                elif what == "read":
                    assert await read(user, at, n) == model[at : at + n]
                elif what in ("zero", "unmap"):
                    await user.pwrite_zeroes(at, n, MAY_UNMAP if what == "unmap" else 0)
                    model[at : at + n] = bytes(n)
                elif what == "discard":
                    await user.pdiscard(at, n)
                    # How much of it goes depends on the alignments: what stays, stays as it was.
                    after = await read(user, at, n)
                    assert all(new in (0, old) for new, old in zip(after, model[at : at + n], strict=True))
                    model[at : at + n] = after
                elif what == "status" and n:
                    (m, flags, _, _), _ = await user.block_status_above(None, at, n)
                    assert 0 < m <= n
                    if flags & ZERO:
                        assert not any(model[at : at + m])
                elif what == "flush":
                    await user.flush()
                assert node.length == length
            assert await read(user, 0, length) == model

    run(main)
    after = path.read_bytes()
    # What is before and behind our part is untouched.
    assert after[:offset] == before[:offset]
    end = min(offset + length, len(after))
    assert after[offset:end] == model[: end - offset] and not any(model[end - offset :])
    if size is not None:
        assert after[offset + size :] == before[offset + size :]


def test_nothing_is_written_behind_a_fixed_size(image: Path) -> None:
    """Not even by a driver above that would let its file grow."""
    before = image.read_bytes()

    async def main() -> None:
        async with graph() as g:
            node = await add_raw(g, image, size=1024, discard="unmap")
            use(g, node, perms.ALL)
            for offset, length in ((1024, 512), (512, 1024), (0, 4096)):
                assert not node.write_now(offset, length, [memoryview(bytes(length))])
                for action in (
                    node.pwritev(offset, length, [memoryview(bytes(length))]),
                    node.pwrite_zeroes(offset, length),
                ):
                    with pytest.raises(OSError) as caught:
                        await action
                    assert caught.value.errno == errno.ENOSPC
            assert node.length == 1024

    run(main)
    assert image.read_bytes() == before


def test_grows_and_shrinks_with_its_file(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add_raw(g, image, offset=4096)
            sizes: list[int] = []
            user = use(g, node, perms.ALL)
            user.on_resize = lambda: sizes.append(user.length)
            await user.truncate(SIZE)
            assert node.length == SIZE == user.length and os.stat(image).st_size == SIZE + 4096
            assert await read(user, SIZE - 4096, 4096) == bytes(4096)
            await user.truncate(512)
            assert node.length == 512 and os.stat(image).st_size == 4096 + 512
            # A write beyond the end does it as well.
            await node.pwritev(1000, 24, [memoryview(b"x" * 24)])
            assert node.length == 1024 and os.stat(image).st_size == 4096 + 1024
            assert sizes == [SIZE, 512, 1024]
            with pytest.raises(Error, match="Disk size too large for the chosen offset"):
                await node.truncate((1 << 63) - 512)

    run(main)


def test_fixed_size_cannot_be_changed(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add_raw(g, image, size=1024)
            for size in (512, 2048):
                with pytest.raises(Error, match="Cannot resize fixed-size raw disks"):
                    await node.truncate(size)
            assert node.length == 1024 and os.stat(image).st_size == SIZE

    run(main)


def test_block_status_is_the_files(tmp_path: Path) -> None:
    path = tmp_path / "sparse.img"
    with open(path, "wb") as file:
        file.truncate(SIZE)
        file.seek(16384)
        file.write(b"x" * 4096)

    async def main() -> None:
        async with graph() as g:
            node = await add_raw(g, path, offset=8192)
            user = use(g, node, opening.READ)
            found = []
            at = 0
            while at < node.length:
                (n, flags, where, file_offset), depth = await user.block_status_above(None, at, node.length - at)
                assert node.driver.file is not None and where is node.driver.file.node
                assert file_offset == at + 8192 and depth == 1
                found.append((at, n, flags & (DATA | ZERO)))
                at += n
            assert found == [(0, 8192, ZERO), (8192, 4096, DATA), (12288, SIZE - 20480, ZERO)]

    run(main)


def test_reopen(image: Path) -> None:
    content = image.read_bytes()

    async def main() -> None:
        async with graph() as g:
            await add(g, driver="file", filename=str(image), node_name="file")
            wire: dict[str, Any] = {"driver": "raw", "node_name": "node", "file": "file"}
            node = await g.add(opening.options(**wire))
            user = use(g, node, opening.READ)
            assert user.length == SIZE
            await g.reopen([opening.options(**wire, offset=4096, size=512)])
            assert user.length == node.length == 512
            assert await read(user, 0, 512) == content[4096:4608]
            for change, message in (
                ({"offset": 1 << 30, "size": 512}, "cannot be greater than size of the containing file"),
                ({"offset": 0, "size": 100}, "Specified size is not multiple of 512"),
                ({"offset": 0, "size": -512}, "is out of range"),
            ):
                with pytest.raises(Error, match=message):
                    await g.reopen([opening.options(**wire, **change)])
                assert user.length == 512
                assert await read(user, 0, 512) == content[4096:4608]

            await g.reopen([opening.options(**wire)])
            assert user.length == SIZE and await read(user, 0, SIZE) == content

    run(main)


def test_flush_and_fua_reach_the_file(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add_raw(g, image)
            user = use(g, node)
            assert node.driver.file is not None
            file: Any = node.driver.file.node.driver
            flags_seen: list[int] = []
            syncs: list[int] = []
            real_write, real_sync = file.engine.pwritev, file.engine.fdatasync

            def pwritev(fd: int, iov: list[memoryview], offset: int, length: int, flags: int) -> Any:
                flags_seen.append(flags)
                return real_write(fd, iov, offset, length, flags)

            def fdatasync(fd: int) -> Any:
                syncs.append(fd)
                return real_sync(fd)

            monkeypatch.setattr(file.engine, "pwritev", pwritev)
            monkeypatch.setattr(file.engine, "fdatasync", fdatasync)
            await write(user, 0, b"data", FUA)
            assert flags_seen == [os.RWF_DSYNC] and syncs == []
            await user.flush()
            assert len(syncs) == 1

    run(main)


def test_filename(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            assert (await add_raw(g, image, node_name="a")).driver.exact_filename() == str(image)
            other = await add_raw(g, image, node_name="b", offset=0)
            assert other.driver.exact_filename() == ""

    run(main)


def test_same_content_as_qemu_sees(image: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add_raw(g, image, offset=4096, size=8192)
            user = use(g, node)
            await write(user, 1000, b"\x77" * 5000)
            await user.flush()

    run(main)
    out = tmp_path / "out.img"
    peers.run(
        "qemu-img",
        "convert",
        "-O",
        "raw",
        "--image-opts",
        f"driver=raw,offset=4096,size=8192,file.driver=file,file.filename={image}",
        str(out),
    )
    content = image.read_bytes()
    assert out.read_bytes() == content[4096:12288]
    assert content[5096:10096] == b"\x77" * 5000
