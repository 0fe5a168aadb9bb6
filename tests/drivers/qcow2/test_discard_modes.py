"""Discards and zero writes leave the same image behind as QEMU's driver does: the same map, and the same holes in the
files. qemu-io is the judge, with the same requests on an image made in the same way."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block.driver import MAY_UNMAP
from tests.drivers.qcow2.support import opened, run
from tests.support import images

MiB = 1 << 20
Request = tuple[str, int, int, int]

#: How an image is made (``DIR``: its directory); the options of the node.
IMAGES = {
    "v2": "compat=0.10",
    "v3": "",
    "v3-4k": "cluster_size=4k",
    "extended": "extended_l2=on,cluster_size=128k",
    "data-file": "data_file=DIR/data",
    "data-file-4k": "data_file=DIR/data,cluster_size=4k",
    "data-file-extended": "data_file=DIR/data,extended_l2=on,cluster_size=128k",
    "data-file-raw": "data_file=DIR/data,data_file_raw=on",
    "data-file-raw-extended": "data_file=DIR/data,data_file_raw=on,extended_l2=on,cluster_size=128k",
}
MODES: dict[str, dict[str, str]] = {
    "unmap": {"discard": "unmap"},
    "ignore": {"discard": "ignore"},
    "request-off": {"discard": "unmap", "pass-discard-request": "off", "pass-discard-other": "on"},
    "ignore-request-on": {"discard": "ignore", "pass-discard-request": "on"},
    "no-unref": {"discard": "unmap", "discard-no-unref": "on"},
    "no-unref-request-off": {"discard": "unmap", "discard-no-unref": "on", "pass-discard-request": "off"},
}


def _requests(seed: str, size: int, unit: int) -> list[Request]:
    rnd = random.Random(seed)
    found = []
    for _ in range(40):
        kind = rnd.choice(("write", "write", "zero", "unmap", "discard", "discard"))
        length = rnd.choice((512, unit, 3 * unit, 7 * unit, rnd.randrange(1, 10 * unit // 512) * 512))
        length = min(length, size)
        offset = rnd.randrange(0, (size - length) // 512 + 1) * 512
        if rnd.random() < 0.7:
            offset -= offset % unit
        if rnd.random() < 0.1:
            length = size - offset
        found.append((kind, offset, length, rnd.randrange(1, 255)))
    return found


def _peer(path: Path, requests: list[Request], options: dict[str, str]) -> None:
    verbs = {"write": "write -P {}", "zero": "write -z", "unmap": "write -z -u", "discard": "discard"}
    commands = [f"{verbs[kind].format(value)} {offset} {length}" for kind, offset, length, value in requests]
    given = ",".join(f"{name}={value}" for name, value in options.items())
    images.io(path, *commands, options=f"driver=qcow2,file.driver=file,file.filename={path},{given}")


async def _ours(path: Path, requests: list[Request], options: dict[str, str]) -> None:
    given: dict[str, Any] = {name.replace("-", "_"): value for name, value in options.items()}
    for name, value in given.items():
        if name != "discard":
            given[name] = value == "on"
    async with opened(path, **given) as node:
        for kind, offset, length, value in requests:
            if kind == "write":
                await node.pwrite(offset, bytes([value]) * length)
            elif kind == "discard":
                await node.pdiscard(offset, length)
            else:
                await node.pwrite_zeroes(offset, length, MAY_UNMAP if kind == "unmap" else 0)


def holes(path: Path, start: int, end: int) -> list[tuple[int, int]]:
    """The holes of a file in a range, relative to its start."""
    found = []
    with path.open("rb") as stream:
        fd = stream.fileno()
        at = start
        while at < end:
            hole = min(os.lseek(fd, at, os.SEEK_HOLE) if at < os.fstat(fd).st_size else at, end)
            if hole >= end:
                break
            try:
                at = min(os.lseek(fd, hole, os.SEEK_DATA), end)
            except OSError as exc:
                assert exc.errno == errno.ENXIO
                at = end
            found.append((hole - start, at - start))
    return found


def empty(path: Path, start: int, end: int) -> list[tuple[int, int]]:
    """Like `holes`, of all zero blocks."""
    found: list[tuple[int, int]] = []
    with path.open("rb") as stream:
        stream.seek(start)
        for at in range(0, end - start, 4096):
            if not any(stream.read(min(4096, end - start - at))):
                if found and found[-1][1] == at:
                    found[-1] = (found[-1][0], at + 4096)
                else:
                    found.append((at, at + 4096))
    return found


def picture(path: Path, cluster: int, given_back: bool) -> list[Any]:
    """What qemu-img map says, where data is empty, and where there is no space behind zeroes.

    Whether zeroes that are written to a place with data become a hole depends on what ext4 has in its caches, and what
    is behind zeroes in an image file on what was there before a cluster was used again; so only holes of
    whole clusters count (`cluster` bytes), and only where these keep their place and space is `given_back`."""
    data = path.parent / "data"
    external = data.exists()
    merged: list[Any] = []
    for extent in images.mapping(path):
        where = data if external else path
        offset = extent.get("offset")
        # What is data is looked through for zeroes by a guess that depends on how full the image file is.
        zero = extent["zero"] and not extent["data"]
        kind = [extent["present"], zero, extent["data"], extent["compressed"], offset is not None]
        start, end = extent["start"], extent["start"] + extent["length"]
        missing = []
        if offset is not None and (given_back or not zero):
            look = holes if zero else empty
            missing = [(start + a, start + b) for a, b in look(where, offset, offset + extent["length"])]
            if zero:
                whole = [(-(-a // cluster) * cluster, b // cluster * cluster) for a, b in missing]
                missing = [(a, b) for a, b in whole if a < b]
        if merged and merged[-1][0] == kind and merged[-1][2] == start:
            # Where clusters are in the image file is everybody's own business.
            merged[-1][2] = end
            merged[-1][3] += missing
        else:
            merged.append([kind, start, end, missing])
    for one in merged:
        joined: list[tuple[int, int]] = []
        for a, b in one[3]:
            if joined and joined[-1][1] == a:
                joined[-1] = (joined[-1][0], b)
            else:
                joined.append((a, b))
        one[3] = joined
    return merged


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", IMAGES)
def test_same_as_qemu(tmp_path: Path, name: str, mode: str) -> None:
    if name == "v2" and "no-unref" in mode:
        # Not for version 2.
        mode = "unmap"
    creation, options = IMAGES[name], MODES[mode]
    unit = 4096 if "4k" in name else 65536
    size = 20 * unit + 5 * 512 + (MiB if unit == 65536 else 0)
    requests = _requests(f"{name} {mode}", size, unit)
    passed = mode in ("unmap", "no-unref") or (mode == "ignore-request-on" and "data-file" in name)
    pictures = []
    for who in ("peer", "ours"):
        place = tmp_path / who
        place.mkdir()
        path = images.create(place / "disk", size, options=creation.replace("DIR", str(place)))
        if who == "peer":
            _peer(path, requests, options)
        else:
            run(_ours(path, requests, options))
        images.assert_clean(path)
        kept = passed and "raw" not in name and ("data-file" in name or "no-unref" in mode)
        pictures.append(picture(path, 2 * unit if "extended" in name else unit, kept))
    if "raw" in name and not passed:
        # What QEMU leaves behind in a raw data file when discards are not passed on, we zero.
        pictures = [[extent[:3] for extent in one] for one in pictures]
    assert pictures[1] == pictures[0]
    content = images.read_all(tmp_path / "ours" / "disk", "qcow2", tmp_path / "raw")
    if name != "v2":
        assert content == images.read_all(tmp_path / "peer" / "disk", "qcow2", tmp_path / "raw")
    if "raw" in name:
        assert (tmp_path / "ours" / "data").read_bytes()[:size] == content
    data = tmp_path / "ours" / "data"
    if data.exists():
        # Not only where the tables say so.
        if "raw" not in name or passed:
            assert empty(data, 0, size) == empty(tmp_path / "peer" / "data", 0, size)
        assert data.stat().st_size == (tmp_path / "peer" / "data").stat().st_size
    elif mode == "unmap":
        # What is free has no space.
        blocks = [(tmp_path / who / "disk").stat().st_blocks for who in ("peer", "ours")]
        assert blocks[1] <= blocks[0] + 2 * unit // 512
