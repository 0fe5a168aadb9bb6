"""``null-co``: an image that keeps nothing."""

from __future__ import annotations

import errno
import time
from typing import Any

import pytest

from pyqsd.block.driver import FUA, MAY_UNMAP, NO_FALLBACK
from pyqsd.block.extents import DATA, ZERO
from pyqsd.qapi.errors import Error
from tests.drivers.opening import add, graph, read, run, use, write

DRIVER = "null-co"


@pytest.mark.parametrize(("wire", "length"), [({}, 1 << 30), ({"size": 1000}, 1024), ({"size": 0}, 0)])
def test_size(wire: dict[str, Any], length: int) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver=DRIVER, **wire)
            assert node.length == length
            assert node.driver.allocated_size() == 0
            assert node.driver.exact_filename() == ("" if wire else f"{DRIVER}://")
            with pytest.raises(Error, match="Image format driver does not support resize"):
                await node.truncate(512)

    run(main)


@pytest.mark.parametrize(
    ("wire", "message"),
    [
        ({"size": -1}, "size must not be negative"),
        ({"size": (1 << 63) - 1}, "Could not refresh total sector count: File too large"),
        ({"latency_ns": 1 << 63}, "latency-ns is invalid"),
    ],
)
def test_impossible_options(wire: dict[str, Any], message: str) -> None:
    async def main() -> None:
        async with graph() as g:
            with pytest.raises(Error, match=message):
                await add(g, driver=DRIVER, **wire)

    run(main)


@pytest.mark.parametrize("read_zeroes", [False, True])
def test_forgets_what_is_written(read_zeroes: bool) -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver=DRIVER, size=65536, read_zeroes=read_zeroes, discard="unmap")
            user = use(g, node)
            await write(user, 100, b"gone")
            await write(user, 100, b"gone", FUA)
            await user.pwrite_zeroes(0, 4096, MAY_UNMAP)
            await user.pdiscard(0, 4096)
            await user.flush()
            # Never what the buffer held before, which may be somebody else's.
            assert await read(user, 0, 65536) == bytes(65536)
            (n, flags, _, _), _ = await user.block_status_above(None, 0, 65536)
            assert n == 65536 and bool(flags & ZERO) == read_zeroes and not flags & DATA
            with pytest.raises(OSError) as caught:
                await user.pwrite_zeroes(0, 4096, NO_FALLBACK)
            assert caught.value.errno == errno.ENOTSUP
            with pytest.raises(OSError):
                await read(user, 65536, 1)

    run(main)


def test_latency() -> None:
    async def main() -> None:
        async with graph() as g:
            node = await add(g, driver=DRIVER, size=65536, latency_ns=20_000_000)
            user = use(g, node)
            buffer = [memoryview(bytearray(512))]
            assert not user.read_now(0, 512, buffer) and not user.write_now(0, 512, buffer)
            for action in (read(user, 0, 512), write(user, 0, b"x" * 512), user.flush(), user.pwrite_zeroes(0, 512)):
                begin = time.monotonic()
                await action
                assert time.monotonic() - begin >= 0.02

    run(main)


def test_answers_at_once() -> None:
    async def main() -> None:
        async with graph() as g:
            user = use(g, await add(g, driver=DRIVER, size=65536))
            buffer = bytearray(b"old" * 100)
            assert user.read_now(0, 300, [memoryview(buffer)])
            assert buffer == bytes(300)
            assert user.write_now(0, 300, [memoryview(buffer)])
            # And without a suspension otherwise.
            with pytest.raises(StopIteration):
                user.node.driver.preadv(0, 300, [memoryview(buffer)]).send(None)

    run(main)
