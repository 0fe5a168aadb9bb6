"""Rewriting the header: as QEMU lays it out, nothing lost, and the old or the new one after a crash."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.create import empty_image
from pyqsd.drivers.formats.qcow2.driver import Qcow2
from pyqsd.qapi.errors import Error
from tests.drivers.qcow2.crash import after_kill, after_power_cut
from tests.drivers.qcow2.support import close, open_logged, run
from tests.support import images

UNKNOWN = 0x12345678


def parsed(image: bytes) -> headers.Header:
    bits = int.from_bytes(image[20:24], "big")
    first = image[: 1 << bits]
    header = headers.decode(first)
    headers.decode_extensions(header, first)
    headers.decode_backing_file(header, first)
    return header


@pytest.mark.parametrize("options", ["", "compat=0.10", "cluster_size=4k", "lazy_refcounts=on,compression_type=zstd"])
def test_as_qemu_does(tmp_path: Path, options: str) -> None:
    images.create(tmp_path / "base", 1 << 20)
    path = images.create(tmp_path / "disk", None, backing="base", options=options, cwd=tmp_path)
    plain = path.read_bytes()
    assert headers.encode(parsed(plain)) == plain[: parsed(plain).cluster_size].rstrip(b"\0")
    if "0.10" not in options:
        images.peers.run("qemu-img", "bitmap", "--add", path, "one")
        marked = path.read_bytes()
        assert headers.encode(parsed(marked)) == marked[: parsed(marked).cluster_size].rstrip(b"\0")
        assert parsed(marked).bitmaps is not None


def rewritten(image: bytes, *changes: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The log of a file whose header is rewritten once with each of `changes`."""

    async def main() -> list[tuple[Any, ...]]:
        node, below = await open_logged(image, backing=None, read_only=False)
        driver = node.driver
        assert isinstance(driver, Qcow2)
        for change in changes:
            await driver.image.rewrite_header(**change)
        await close(node)
        return below.log

    return run(main())


@pytest.mark.parametrize("power", [False, True], ids=["kill", "power"])
@pytest.mark.parametrize(
    "creation",
    [{}, {"cluster_size": 4096}, {"version": 2, "cluster_size": 4096}, {"cluster_size": 512}],
    ids=["64k", "4k", "v2", "512"],
)
def test_old_or_new(tmp_path: Path, creation: dict[str, Any], power: bool) -> None:
    image = empty_image(1 << 20, backing_file=None, **creation)
    small = creation.get("cluster_size") == 512
    steps: list[tuple[bytes | None, str | None]] = [
        (b"", None),
        (bytes(range(100)), None),
        (bytes(200), "file:" + "x" * 700),
        (b"short", "file:y"),
        (None, "file:" + "z" * 1000),
        (b"again" * 50, None),
    ]
    if small:
        steps = [(b"", None), (b"1234", None), (bytes(300), "file:y"), (b"", "file:z")]
    known = parsed(image).extensions
    changes = [
        {"extensions": known + ([] if data is None else [(UNKNOWN, data)]), "backing_file": name}
        for data, name in steps
    ]
    log = rewritten(image, *changes)
    rnd = random.Random(power)
    reached = -1
    for cut in range(len(log) + 1):
        crashed = after_power_cut(image, log, cut, rnd) if power else after_kill(image, log, cut)
        header = parsed(crashed)
        found = header.extension(UNKNOWN), header.backing_file
        assert found in [(None, None), *steps], cut
        where = steps.index(found) if found in steps else -1
        # Never back to an older one once it is done.
        assert power or where >= reached or found == (None, None), cut
        reached = max(reached, where)
        path = tmp_path / "crashed"
        path.write_bytes(crashed)
        info = images.info(path)
        assert info.get("backing-filename") == found[1]
    assert (header.extension(UNKNOWN), header.backing_file) == steps[-1]
    assert header.header_length == (72 if creation.get("version") == 2 else 112)
    assert header.unknown_fields == b""


def test_what_is_unknown_survives() -> None:
    image = bytearray(empty_image(1 << 20))
    header = parsed(bytes(image))
    header.unknown_fields = b"a" * 24
    header.extensions = [(UNKNOWN, b"one"), (headers.EXT_BACKING_FORMAT, b"raw"), (UNKNOWN + 1, b"two")]
    first = headers.encode(header)
    image[: len(first)] = first
    log = rewritten(bytes(image), {"compatible": 0, "extensions": [*header.extensions, (UNKNOWN + 2, b"three" * 99)]})
    after = parsed(after_kill(bytes(image), log, len(log)))
    assert after.unknown_fields == b"a" * 24
    assert [magic for magic, _ in after.extensions] == [
        headers.EXT_BACKING_FORMAT,
        headers.EXT_FEATURE_TABLE,
        UNKNOWN,
        UNKNOWN + 1,
        UNKNOWN + 2,
    ]
    assert after.extension(UNKNOWN) == b"one"


def test_without_room_nothing_changes() -> None:
    image = empty_image(1 << 20, cluster_size=512)

    async def main() -> None:
        node, below = await open_logged(image)
        driver = node.driver
        assert isinstance(driver, Qcow2)
        before = bytes(below.data)
        with pytest.raises(Error, match="Could not update qcow2 header: No space left on device"):
            await driver.image.rewrite_header(extensions=[(UNKNOWN, bytes(500))])
        assert driver.image.header.extension(UNKNOWN) is None

        def full(kind: str) -> None:
            if kind == "write":
                raise OSError(5, "Input/output error")

        below.fault = full
        with pytest.raises(OSError, match="Input/output error"):
            await driver.image.rewrite_header(extensions=[(UNKNOWN, b"x")])
        below.fault = None
        assert driver.image.header.extension(UNKNOWN) is None
        assert driver.image.header.header_length == 112
        assert bytes(below.data) == before
        await close(node)

    run(main())
