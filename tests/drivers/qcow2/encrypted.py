"""Encrypted images: made here, and looked at by qemu-img with the key."""

from __future__ import annotations

import asyncio
import functools
import json
from pathlib import Path
from typing import Any

from pyqsd.block.graph import Graph
from pyqsd.chardev.chardev import Chardevs
from pyqsd.crypto import luks
from pyqsd.crypto.options import LuksCreateOptions
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.create import empty_image
from pyqsd.drivers.formats.qcow2.driver import Qcow2
from pyqsd.drivers.formats.qcow2.options import (
    BlockdevQcow2Encryption,
    QCryptoBlockOptionsLUKS,
    QCryptoBlockOptionsQCow,
)
from pyqsd.qapi.command import EventBus
from pyqsd.qom.objects import Objects
from pyqsd.qom.secret import SecretFileOptions
from tests.drivers.qcow2.support import opened, run
from tests.support import peers

PASSPHRASE = "sesam öffne dich"
SECRET = ("--object", f"secret,id=s,data={PASSPHRASE}")
METHODS = {"aes": headers.CRYPT_AES, "luks": headers.CRYPT_LUKS}


@functools.cache
def region() -> bytes:
    """A LUKS header that `PASSPHRASE` opens. Its key is the same each time."""
    volume, made = asyncio.run(luks.create(LuksCreateOptions(iter_time=1), PASSPHRASE.encode()))
    volume.close()
    return made


def key(method: str) -> BlockdevQcow2Encryption:
    """The option ``encrypt``."""
    kind = QCryptoBlockOptionsLUKS if method == "luks" else QCryptoBlockOptionsQCow
    return kind(key_secret="s")


async def graph_with_secret() -> Graph:
    """A graph with the objects that a daemon has."""
    graph = Graph(EventBus())
    graph.objects = Objects(Chardevs())
    await graph.objects.add(SecretFileOptions(id="s", data=PASSPHRASE))
    await graph.objects.add(SecretFileOptions(id="wrong", data="simsalabim"))
    return graph


def make(path: Path, size: int, method: str, **creation: Any) -> Path:
    """An empty encrypted image."""
    path.write_bytes(empty_image(size, **creation))
    data = region()

    async def encrypt() -> None:
        async with opened(path) as node:
            assert isinstance(node.driver, Qcow2)
            image = node.driver.image
            extensions = list(image.header.extensions)
            if method == "luks":
                count = -(-len(data) // image.cluster_size)
                first, _ = await image.refcounts.allocate(count, contiguous=True)
                await image.file.pwrite(first << image.cluster_bits, data.ljust(count << image.cluster_bits, b"\0"))
                extensions.append(headers.encryption_extension(first << image.cluster_bits, len(data)))
            await image.writeback.run(refcounts=True)
            await image.rewrite_header(crypt_method=METHODS[method], extensions=extensions)

    run(encrypt())
    return path


def image_opts(path: Path, method: str) -> str:
    """The image and its key, for ``--image-opts``."""
    return f"driver=qcow2,encrypt.format={method},encrypt.key-secret=s,file.filename={path}"


def read_all(path: Path, method: str, scratch: Path) -> bytes:
    """The content of the disk, as qemu-img sees it."""
    opts = image_opts(path, method)
    peers.run("qemu-img", "convert", *SECRET, "--image-opts", "-O", "raw", opts, str(scratch))
    return scratch.read_bytes()


def check(path: Path, method: str, *args: str) -> dict[str, Any]:
    """The judgement of qemu-img check."""
    opts = image_opts(path, method)
    done = peers.run("qemu-img", "check", "--output=json", *args, *SECRET, "--image-opts", opts, ok=(0, 2, 3))
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def assert_clean(path: Path, method: str) -> None:
    """No errors, no leaks."""
    result = check(path, method)
    assert not any(result.get(name) for name in ("corruptions", "leaks", "check-errors")), result
