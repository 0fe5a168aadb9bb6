"""A part of QSD's schema, declared for tests: enough to have every kind of type, so that what the real daemon says to
``--blockdev`` and ``--export`` judges the conversion, whatever drivers pyqsd has."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import NULL, Alternate, Int32, Null, Size, Struct, Uint16, Uint32, Uint64, field


class Discard(StrEnum):
    IGNORE = "ignore"
    UNMAP = "unmap"


class Locking(StrEnum):
    AUTO = "auto"
    ON = "on"
    OFF = "off"


class DetectZeroes(StrEnum):
    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


class Cache(Struct, kw_only=True):
    direct: bool | None = None
    no_flush: bool | None = None


class Blockdev(Struct, kw_only=True, tag_field="driver", tag="base"):
    node_name: str | None = None
    discard: Discard | None = None
    cache: Cache | None = None
    active: bool | None = None
    read_only: bool | None = None
    auto_read_only: bool | None = None
    force_share: bool | None = None
    detect_zeroes: DetectZeroes | None = None


Ref = Annotated[str | Blockdev, Alternate("BlockdevRef")]
RefOrNull = Annotated[str | Blockdev | Null, Alternate("BlockdevRefOrNull")]


class NullCo(Blockdev, kw_only=True, tag="null-co"):
    size: int | None = None
    latency_ns: Uint64 | None = None
    read_zeroes: bool | None = None


class File(Blockdev, kw_only=True, tag="file"):
    filename: str
    pr_manager: str | None = None
    locking: Locking | None = None


class Raw(Blockdev, kw_only=True, tag="raw"):
    file: Ref
    offset: int | None = None
    size: int | None = None


class OverlapMode(StrEnum):
    NONE = "none"
    CONSTANT = "constant"
    CACHED = "cached"
    ALL = "all"


class OverlapFlags(Struct, kw_only=True):
    template: OverlapMode | None = None
    main_header: bool | None = None


class Encryption(Struct, kw_only=True, tag_field="format", tag="base"):
    pass


class Aes(Encryption, kw_only=True, tag="aes"):
    key_secret: str | None = None


class Luks(Encryption, kw_only=True, tag="luks"):
    key_secret: str | None = None


class Qcow2(Blockdev, kw_only=True, tag="qcow2"):
    file: Ref
    backing: RefOrNull | None = None
    lazy_refcounts: bool | None = None
    overlap_check: Annotated[OverlapFlags | OverlapMode, Alternate("Qcow2OverlapChecks")] | None = None
    cache_clean_interval: int | None = None
    encrypt: Encryption | None = None


class Quorum(Blockdev, kw_only=True, tag="quorum"):
    blkverify: bool | None = None
    children: list[Ref]
    vote_threshold: int


class BlkdebugEvent(StrEnum):
    READ_AIO = "read_aio"
    PWRITEV = "pwritev"


class InjectError(Struct, kw_only=True):
    event: BlkdebugEvent
    state: int | None = None


class Permission(StrEnum):
    WRITE = "write"
    RESIZE = "resize"


class Blkdebug(Blockdev, kw_only=True, tag="blkdebug"):
    image: Ref
    max_transfer: Int32 | None = None
    inject_error: list[InjectError] | None = None
    take_child_perms: list[Permission] | None = None


class SocketAddress(Struct, kw_only=True, tag_field="type", tag="base"):
    pass


class UnixAddress(SocketAddress, kw_only=True, tag="unix"):
    path: str


class InetAddress(SocketAddress, kw_only=True, tag="inet"):
    host: str
    port: str
    to: Uint16 | None = None
    ipv4: bool | None = None


class Nbd(Blockdev, kw_only=True, tag="nbd"):
    server: SocketAddress
    export: str | None = None
    reconnect_delay: Uint32 | None = None


class Export(Struct, kw_only=True, tag_field="type", tag="base"):
    id: str
    fixed_iothread: bool | None = None
    iothread: str | None = None
    node_name: str
    writable: bool | None = None

    @classmethod
    def branches(cls) -> Mapping[str, type[Struct]]:
        return {"vhost-user-blk": VhostUserBlk}


class VhostUserBlk(Export, kw_only=True, tag="vhost-user-blk"):
    addr: SocketAddress
    logical_block_size: Size | None = None
    num_queues: Uint16 | None = None


class Everything(Struct, kw_only=True):
    """What has no counterpart among QSD's options."""

    anything: Any
    number: float | None = None
    class_: str | None = None
    renamed: int = field(default=7, name="x-other")
    null: Null = NULL


async def blockdev_add(options: Blockdev) -> None:
    """What QSD says when nothing is wrong with the options but that there is no name."""
    if options.node_name is None:
        raise Error("'node-name' must be specified for the root node")
