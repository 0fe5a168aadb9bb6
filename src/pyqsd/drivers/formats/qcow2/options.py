"""The options of a qcow2 node (QAPI ``BlockdevOptionsQcow2``) and what follows from them."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

from pyqsd.block.options import BlockdevOptions, BlockdevRef, BlockdevRefOrNull
from pyqsd.drivers.formats.qcow2.header import Header
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Alternate, Struct


class Qcow2OverlapCheckMode(StrEnum):
    """Sets of overlap checks, each containing those before it."""

    NONE = "none"
    CONSTANT = "constant"
    CACHED = "cached"
    ALL = "all"


class Qcow2OverlapCheckFlags(Struct):
    """Single overlap checks; what is absent is as in `template` (default: none of them)."""

    template: Qcow2OverlapCheckMode | None = None
    main_header: bool | None = None
    active_l1: bool | None = None
    active_l2: bool | None = None
    refcount_table: bool | None = None
    refcount_block: bool | None = None
    snapshot_table: bool | None = None
    inactive_l1: bool | None = None
    inactive_l2: bool | None = None
    bitmap_directory: bool | None = None


class BlockdevQcow2EncryptionFormat(StrEnum):
    """How an image is encrypted."""

    AES = "aes"
    LUKS = "luks"


class BlockdevQcow2Encryption(Struct, tag_field="format", tag="pyqsd-base"):
    """The key of an encrypted image; all branches have the member `key_secret`, the id of the secret object."""

    if TYPE_CHECKING:
        key_secret: str | None


class QCryptoBlockOptionsQCow(BlockdevQcow2Encryption, tag="aes"):
    """The key."""

    key_secret: str | None = None


class QCryptoBlockOptionsLUKS(BlockdevQcow2Encryption, tag="luks"):
    """A passphrase of a key slot."""

    key_secret: str | None = None


Qcow2OverlapChecks = Annotated[Qcow2OverlapCheckFlags | Qcow2OverlapCheckMode, Alternate("Qcow2OverlapChecks")]


class Options(BlockdevOptions, kw_only=True, tag="qcow2"):
    """Sizes are bytes, `cache_clean_interval` is seconds. `x_snapshot`: show this internal snapshot (its id or name)
    instead of the active state, read-only."""

    file: BlockdevRef
    backing: BlockdevRefOrNull | None = None
    lazy_refcounts: bool | None = None
    pass_discard_request: bool | None = None
    pass_discard_snapshot: bool | None = None
    pass_discard_other: bool | None = None
    discard_no_unref: bool | None = None
    overlap_check: Qcow2OverlapChecks | None = None
    cache_size: int | None = None
    l2_cache_size: int | None = None
    l2_cache_entry_size: int | None = None
    refcount_cache_size: int | None = None
    cache_clean_interval: int | None = None
    encrypt: BlockdevQcow2Encryption | None = None
    data_file: BlockdevRef | None = None
    x_snapshot: str | None = None


#: The structures that writes are checked against, by the option's name, and what messages call them.
OVERLAP_NAMES = {
    "main_header": "qcow2_header",
    "active_l1": "active L1 table",
    "active_l2": "active L2 table",
    "refcount_table": "refcount table",
    "refcount_block": "refcount block",
    "snapshot_table": "snapshot table",
    "inactive_l1": "inactive L1 table",
    "inactive_l2": "inactive L2 table",
    "bitmap_directory": "bitmap directory",
}
_CONSTANT = frozenset({"main_header", "active_l1", "refcount_table", "snapshot_table", "bitmap_directory"})
_CACHED = _CONSTANT | {"active_l2", "refcount_block", "inactive_l1"}
_TEMPLATES = {
    Qcow2OverlapCheckMode.NONE: frozenset[str](),
    Qcow2OverlapCheckMode.CONSTANT: _CONSTANT,
    Qcow2OverlapCheckMode.CACHED: _CACHED,
    Qcow2OverlapCheckMode.ALL: _CACHED | {"inactive_l2"},
}


@dataclass
class Settings:
    """The effective values. Sizes are bytes."""

    l2_slice_bytes: int
    l2_cache_bytes: int
    refcount_cache_bytes: int
    cache_clean_interval: int
    overlap: frozenset[str]
    lazy_refcounts: bool
    discard_request: bool
    discard_snapshot: bool
    discard_other: bool
    discard_no_unref: bool


_DEFAULT_L2_CACHE = 32 << 20
_DEFAULT_SLICE = 64 << 10
_INT_MAX = (1 << 31) - 1


def settings(options: Options, header: Header, discard_unmap: bool, image_size: int) -> Settings:
    """Check `options` against the image and fill in the defaults. Raises Error with EINVAL."""
    for name in ("cache_size", "l2_cache_size", "l2_cache_entry_size", "refcount_cache_size"):
        value = getattr(options, name)
        if value is not None and value < 0:
            wire = name.replace("_", "-")
            raise Error(f"Value '{value}' is out of range for parameter '{wire}'", errno.EINVAL)
    cluster = header.cluster_size
    slice_bytes = options.l2_cache_entry_size
    if slice_bytes is None:
        slice_bytes = min(_DEFAULT_SLICE, cluster)
    l2_bytes, refcount_bytes = _cache_sizes(options, header, image_size)
    if slice_bytes & (slice_bytes - 1) or not 512 <= slice_bytes <= cluster:
        raise Error(
            f"L2 cache entry size must be a power of two between 512 and the cluster size ({cluster})", errno.EINVAL
        )
    if l2_bytes // slice_bytes > _INT_MAX:
        raise Error("L2 cache size too big", errno.EINVAL)
    if refcount_bytes // cluster > _INT_MAX:
        raise Error("Refcount cache size too big", errno.EINVAL)
    interval = options.cache_clean_interval
    if interval is None:
        interval = 600
    interval &= (1 << 64) - 1
    if interval > (1 << 32) - 1:
        raise Error("Cache clean interval too big", errno.EINVAL)
    lazy = options.lazy_refcounts
    if lazy is None:
        lazy = bool(header.compatible & 1)
    if lazy and header.version < 3:
        raise Error("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level", errno.EINVAL)
    if options.discard_no_unref and header.version < 3:
        raise Error("discard-no-unref is only supported since qcow2 version 3", errno.EINVAL)
    request = options.pass_discard_request
    snapshot = options.pass_discard_snapshot
    return Settings(
        l2_slice_bytes=slice_bytes,
        l2_cache_bytes=l2_bytes,
        refcount_cache_bytes=refcount_bytes,
        cache_clean_interval=interval,
        overlap=_overlap(options.overlap_check),
        lazy_refcounts=lazy,
        discard_request=discard_unmap if request is None else request,
        discard_snapshot=True if snapshot is None else snapshot,
        discard_other=bool(options.pass_discard_other),
        discard_no_unref=bool(options.discard_no_unref),
    )


def _overlap(checks: Qcow2OverlapChecks | None) -> frozenset[str]:
    if checks is None:
        return _CACHED
    if isinstance(checks, str):
        return _TEMPLATES[Qcow2OverlapCheckMode(checks)]
    chosen = set(_CACHED if checks.template is None else _TEMPLATES[checks.template])
    for name in OVERLAP_NAMES:
        value = getattr(checks, name)
        if value is not None:
            (chosen.add if value else chosen.discard)(name)
    return frozenset(chosen)


def _cache_sizes(options: Options, header: Header, image_size: int) -> tuple[int, int]:
    """The sizes of the L2 and the refcount cache; the combined size goes to the L2 tables first."""
    cluster = header.cluster_size
    combined, l2, refcount = options.cache_size, options.l2_cache_size, options.refcount_cache_size
    minimum_refcount = 4 * cluster
    # What it takes to have all L2 tables in memory.
    needed = -(-image_size // cluster) * (16 if header.incompatible & 16 else 8)
    needed = -(-needed // cluster) * cluster
    if combined is not None:
        if l2 is not None and refcount is not None:
            raise Error(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time", errno.EINVAL
            )
        if l2 is not None and l2 > combined:
            raise Error("l2-cache-size may not exceed cache-size", errno.EINVAL)
        if refcount is not None and refcount > combined:
            raise Error("refcount-cache-size may not exceed cache-size", errno.EINVAL)
        if l2 is not None:
            refcount = combined - l2
        elif refcount is not None:
            l2 = combined - refcount
        elif combined >= needed + minimum_refcount:
            l2 = needed
            refcount = combined - l2
        else:
            refcount = min(combined, minimum_refcount)
            l2 = combined - refcount
    # More than all tables is of no use.
    l2 = min(_DEFAULT_L2_CACHE if l2 is None else l2, needed)
    if refcount is None:
        refcount = minimum_refcount
    return max(l2, 2 * cluster), max(refcount, minimum_refcount)
