"""The same option texts to the real daemon and to `pyqsd.qapi`: same words."""

from __future__ import annotations

import asyncio
import os
import subprocess

import pytest

from pyqsd.qapi.convert import convert
from pyqsd.qapi.errors import Error
from pyqsd.qapi.keyval import parse_option
from tests.qapi import sample
from tests.qapi.cases import BLOCKDEV, SIZES
from tests.support import peers

#: An option that always fails: it ends the daemon when the one before it was accepted.
SENTINEL = ("--blockdev", "driver=nosuch-sentinel")


def theirs(option: str, text: str) -> str:
    """What the real daemon says about an option; "" if nothing."""
    argv = [peers.require("qemu-storage-daemon"), option, text, *SENTINEL]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False)
    assert done.returncode == 1
    message = done.stderr.removesuffix(b"\n").removeprefix(b"qemu-storage-daemon: ")
    prefix = os.fsencode(f"{option} {text}: ")
    if not message.startswith(prefix):
        assert b"nosuch-sentinel" in message
        return ""
    return message.removeprefix(prefix).replace(b"\xc0\x80", b"\0").decode("utf-8", "surrogateescape")


def ours_blockdev(text: str) -> str:
    try:
        value, keyval = parse_option(text, "driver")
        asyncio.run(sample.blockdev_add(convert(value, sample.Blockdev, keyval=keyval)))
    except Error as exc:
        return exc.desc
    return ""


@pytest.mark.parametrize("text", BLOCKDEV, ids=lambda text: ascii(text)[:80])
def test_blockdev(text: str) -> None:
    assert ours_blockdev(text) == theirs("--blockdev", text)


@pytest.mark.parametrize("size", SIZES, ids=ascii)
def test_size(size: str) -> None:
    text = f"vhost-user-blk,id=x,node-name=n,addr.type=unix,addr.path=x,logical-block-size={size}"
    try:
        value, keyval = parse_option(text, "type")
        assert keyval
        convert(value, sample.Export, keyval=True)
        ours = "Cannot find device='' nor node-name='n'"
    except Error as exc:
        ours = exc.desc
    assert ours == theirs("--export", text)


@pytest.mark.parametrize("size", ["1.3k", "0.1k", "1.7k", "0.999999k", "2.0005k", "0.0004882k", "0.00048829k", "1.1m"])
def test_size_value(size: str) -> None:
    """Fractions are rounded as QEMU's programs do (qemu-io prints the number of bytes)."""
    done = peers.run("qemu-io", "--image-opts", "-c", f"read 0 {size}", "driver=null-co,size=4194304")
    value, _ = parse_option(
        f"logical-block-size={size},type=vhost-user-blk,id=x,node-name=n,addr.type=unix,addr.path=p", None
    )
    export = convert(value, sample.Export, keyval=True)
    assert isinstance(export, sample.VhostUserBlk)
    assert f"read {export.logical_block_size}/{export.logical_block_size} bytes" in done.stdout
