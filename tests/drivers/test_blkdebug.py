"""``blkdebug``: rules, states, limits, events of the gate, and its place in names of images.

What it answers and injects is compared with QSD's in tests/system/test_differential_filters.py.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqsd.block import splitting
from pyqsd.block.driver import FUA, MAY_UNMAP, Limits
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.drivers.filters._blkdebug_rules import BlkdebugInjectErrorOptions, parse_config
from pyqsd.qapi.errors import Error

from . import opening
from .opening import graph, read, run, use, write

SIZE = 1 << 20
K = 1024


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(i // 512 % 255 + 1 for i in range(SIZE)))
    return path


async def add(g: Graph, path: Path, **more: Any) -> Node:
    return await opening.add(g, driver="blkdebug", image={"driver": "file", "filename": str(path)}, **more)


def fails(number: int) -> Any:
    return pytest.raises(OSError, check=lambda exc: exc.errno == number)


@pytest.mark.parametrize("where", ["head", "after-head", "tail", "after-tail"])
def test_a_failed_read_of_a_block_that_is_modified_fails_the_write(where: str, image: Path) -> None:
    before = image.read_bytes()
    event = f"pwritev_rmw_{where}".replace("-", "_")

    async def main() -> None:
        async with graph() as g:
            rule = {"event": event, "errno": 28, "once": True}
            user = use(g, await add(g, image, align=4096, inject_error=[rule]))
            with fails(errno.ENOSPC):
                await write(user, 100, b"x" * 9000)
            assert image.read_bytes() == before
            await write(user, 100, b"x" * 9000)
            assert image.read_bytes() == before[:100] + b"x" * 9000 + before[9100:]

    run(main)


def test_quick_ways_do_not_pass_by_a_rule(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            rules = [
                {"event": "none", "iotype": "read", "errno": 5, "sector": 8},
                {"event": "none", "iotype": "write", "errno": 28, "once": True},
            ]
            node = await add(g, image, inject_error=rules)
            top = await opening.add(g, driver="raw", node_name="top", file="node")
            user = use(g, top)
            buffer = [memoryview(bytearray(512))]
            assert not user.read_now(4096, 512, buffer) and not user.write_now(0, 512, buffer)
            with fails(errno.EIO):
                await read(user, 4096, 512)
            await read(user, 4096 + 512, 512)
            with fails(errno.ENOSPC):
                await write(user, 0, b"x")
            await write(user, 0, b"x")
            assert node.in_flight == top.in_flight == 0

    run(main)


def test_without_rules_and_limits_requests_pass_by(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            rule = {"event": "none", "iotype": "write", "errno": 28, "once": True}
            user = use(g, await add(g, image, inject_error=[rule]))
            with fails(errno.ENOSPC):
                await write(user, 0, b"x")
            buffer = [memoryview(bytearray(512))]
            # The only rule is used up.
            assert user.read_now(0, 512, buffer) and user.write_now(0, 512, buffer)

    run(main)


class Trace:
    """Notes what reaches the node below."""

    def __init__(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, int, int]] = []
        below = node.driver.file
        assert below is not None
        driver: Any = below.node.driver

        def noted(name: str, real: Any) -> Any:
            async def call(offset: int, length: int, *rest: Any) -> Any:
                self.seen.append((name, offset, length))
                return await real(offset, length, *rest)

            return call

        monkeypatch.setattr(below.node, "write_now", lambda *_: False)
        monkeypatch.setattr(below.node, "read_now", lambda *_: False)
        for name in ("preadv", "pwritev", "pwrite_zeroes", "pdiscard"):
            monkeypatch.setattr(driver, name, noted(name, getattr(driver, name)))

    def take(self) -> list[tuple[str, int, int]]:
        seen, self.seen = self.seen, []
        return seen


def test_how_requests_are_split(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(
                g,
                image,
                discard="unmap",
                align=512,
                max_transfer=4096,
                opt_write_zero=4096,
                max_write_zero=8192,
                opt_discard=4096,
                max_discard=8192,
            )
            user, trace = use(g, node), Trace(node, monkeypatch)
            await write(user, 512, b"a" * 10 * K)
            assert trace.take() == [("pwritev", 512, 4096), ("pwritev", 4608, 4096), ("pwritev", 8704, 2048)]
            await read(user, 100, 4096)
            assert trace.take() == [("preadv", 0, 4096), ("preadv", 4096, 512)]
            await user.pwrite_zeroes(512, 20 * K, MAY_UNMAP)
            assert trace.take() == [
                ("pwritev", 512, 3584),
                ("pwrite_zeroes", 4096, 8192),
                ("pwrite_zeroes", 12288, 8192),
                ("pwritev", 20480, 512),
            ]
            await user.pdiscard(100, 20 * K)
            assert trace.take() == [
                ("pdiscard", 512, 3584),
                ("pdiscard", 4096, 8192),
                ("pdiscard", 12288, 8192),
            ]
            # Two blocks are read at once, and written at once, if they are all.
            await user.pwrite_zeroes(1000, 100)
            assert trace.take() == [("preadv", 512, 1024), ("pwritev", 512, 1024)]
            await user.pwrite_zeroes(1000, 600)
            assert trace.take() == [
                ("preadv", 512, 512),
                ("preadv", 1536, 512),
                ("pwritev", 512, 512),
                ("pwritev", 1024, 512),
                ("pwritev", 1536, 512),
            ]

    run(main)


def test_an_error_in_the_middle(image: Path) -> None:
    before = image.read_bytes()

    async def main() -> None:
        async with graph() as g:
            rule = {"event": "none", "sector": 16, "errno": 28}
            user = use(g, await add(g, image, align=512, max_transfer=4096, inject_error=[rule]))
            with fails(errno.ENOSPC):
                await write(user, 0, b"z" * 16384)
            # What came before has been written, what comes after has not.
            assert image.read_bytes() == b"z" * 8192 + before[8192:]

    run(main)


def test_one_flush_stands_for_fua(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, image, align=512, max_transfer=4096)
            monkeypatch.setattr(node.driver, "write_flags", 0)
            user = use(g, node)
            flushes: list[int] = []
            real = node.flush

            async def flush() -> None:
                flushes.append(node.driver.file.node._write_generation)  # type: ignore[union-attr]
                await real()

            monkeypatch.setattr(node, "flush", flush)
            await write(user, 0, b"y" * 16384, FUA)
            assert len(flushes) == 1

    run(main)


def test_permissions(image: Path) -> None:
    async def main() -> None:
        async with graph() as g:
            file = await opening.add(g, driver="file", node_name="file", filename=str(image))
            await opening.add(g, driver="blkdebug", image="file", unshare_child_perms=["write"])
            with pytest.raises(Error, match="permissions 'write' are both required"):
                use(g, file)

    run(main)


def test_hostile_config(tmp_path: Path) -> None:
    """Nothing but an error comes of what is no file with rules."""
    import os

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 10)
    image = tmp_path / "image"
    image.write_bytes(bytes(512))

    async def main() -> None:
        async with graph() as g:
            for name in ("binary", "nosuch", "image"):
                with pytest.raises(Error):
                    await add(g, image, config=str(tmp_path / name))
            await add(g, image, config=str(tmp_path / "pipe"))

    run(main)


@given(st.text(alphabet='[]"=# \nabdeginortsv_0x5-', max_size=80))
def test_any_config_text(text: str) -> None:
    try:
        rules = parse_config(text)
    except Error:
        return
    assert isinstance(rules, list)


def test_config() -> None:
    rules = parse_config(
        '[set-state]\nevent = "none"\n[inject-error]\nevent = "l2_load"\nerrno = "0x1c"\nonce = "on"\n'
    )
    # All errors first.
    first = rules[0]
    assert isinstance(first, BlkdebugInjectErrorOptions)
    assert (first.event, first.errno, first.once, first.sector) == ("l2_load", 28, True, None)
    assert len(rules) == 2


powers = st.sampled_from([0, 1, 512, 4096, 65536])


@given(
    offset=st.integers(0, 1 << 20),
    length=st.integers(1, 1 << 20),
    block=st.sampled_from([1, 512, 4096]),
    align=powers,
    times=st.integers(0, 5),
)
def test_pieces_cover_the_range(offset: int, length: int, block: int, align: int, times: int) -> None:
    """Without a gap, in order, each within the limits; and what can be aligned is."""
    limits = Limits()
    limits.request_alignment = block
    limits.pdiscard_alignment = limits.pwrite_zeroes_alignment = align
    best = max(align, block)
    limits.max_pdiscard = limits.max_pwrite_zeroes = times * best
    for piece in (splitting.discard_piece, splitting.zero_piece):
        at, end = offset, offset + length
        if piece is splitting.zero_piece:
            at, end = splitting.aligned(offset, length, block)
        aligned_bytes = 0
        while at < end:
            n = piece(at, end - at, limits)
            assert 0 < n <= (limits.max_pdiscard or n)
            assert at + n <= end
            if at % best == 0 and n % best == 0:
                aligned_bytes += n
            at += n
        first, last = -(-offset // best) * best, (offset + length) // best * best
        assert aligned_bytes >= last - first if last > first else True
