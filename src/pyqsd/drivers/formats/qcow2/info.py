"""What is told about a qcow2 image (QAPI ``ImageInfoSpecificQCow2``)."""

from __future__ import annotations

import errno
import struct
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from pyqsd.block.info import ImageInfoSpecific, SnapshotInfo
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.options import BlockdevQcow2EncryptionFormat
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Struct, Uint32

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.image import Image


class Qcow2CompressionType(StrEnum):
    """How compressed clusters are compressed."""

    ZLIB = "zlib"
    ZSTD = "zstd"


class Qcow2BitmapInfoFlags(StrEnum):
    """State of a bitmap in the image."""

    IN_USE = "in-use"
    AUTO = "auto"


class Qcow2BitmapInfo(Struct, kw_only=True):
    """A bitmap in the image; `granularity` in bytes."""

    name: str
    granularity: Uint32
    flags: list[Qcow2BitmapInfoFlags]


class ImageInfoSpecificQCow2Encryption(Struct, tag_field="format", tag="pyqsd-base"):
    """How the image is encrypted."""


class ImageInfoSpecificQCow2EncryptionAES(ImageInfoSpecificQCow2Encryption, tag="aes"):
    """AES-CBC."""


class ImageInfoSpecificQCow2(Struct, kw_only=True):
    """Properties of the image that only qcow2 has."""

    compat: str
    data_file: str | None = None
    data_file_raw: bool | None = None
    extended_l2: bool | None = None
    lazy_refcounts: bool | None = None
    corrupt: bool | None = None
    refcount_bits: int
    encrypt: ImageInfoSpecificQCow2Encryption | None = None
    bitmaps: list[Qcow2BitmapInfo] | None = None
    compression_type: Qcow2CompressionType


class ImageInfoSpecificQCow2Wrapper(ImageInfoSpecific, kw_only=True, tag="qcow2"):
    """The branch of ``ImageInfoSpecific``."""

    data: ImageInfoSpecificQCow2


__all__ = ["BlockdevQcow2EncryptionFormat"]

_BITMAP = struct.Struct(">QIIBBHI")


def decode_bitmap_directory(data: bytes | bytearray, count: int, cluster_size: int) -> list[Qcow2BitmapInfo]:
    """The bitmaps of a directory (QEMU docs/interop/qcow2, "Bitmap directory"). Raises Error."""
    found: list[Qcow2BitmapInfo] = []
    at = 0
    while at < len(data):
        if len(data) - at < _BITMAP.size:
            raise Error("Broken bitmap directory", errno.EINVAL)
        offset, entries, flags, kind, granularity_bits, name_size, extra = _BITMAP.unpack_from(data, at)
        size = _BITMAP.size + extra + name_size
        padded = -(-size // 8) * 8
        if padded > len(data) - at:
            raise Error("Broken bitmap directory", errno.EINVAL)
        if len(found) == count:
            raise Error("More bitmaps found than specified in header extension", errno.EINVAL)
        if extra:
            raise Error("Bitmap extra data is not supported", errno.EINVAL)
        name = bytes(data[at + _BITMAP.size : at + size]).decode("utf-8", "replace")
        if (
            not entries
            or offset & (cluster_size - 1)
            or not offset
            or entries > 0x8000000
            or kind != 1
            or not 9 <= granularity_bits <= 31
            or not 1 <= name_size <= 1023
            or flags & ~3
        ):
            raise Error(f"Bitmap '{name}' doesn't satisfy the constraints", errno.EINVAL)
        shown = []
        if flags & 1:
            shown.append(Qcow2BitmapInfoFlags.IN_USE)
        if flags & 2:
            shown.append(Qcow2BitmapInfoFlags.AUTO)
        found.append(Qcow2BitmapInfo(name=name, granularity=1 << granularity_bits, flags=shown))
        at += padded
    if len(found) != count:
        raise Error("Less bitmaps found than specified in header extension", errno.EINVAL)
    return found


def specific(image: Image, bitmaps: list[Qcow2BitmapInfo]) -> ImageInfoSpecificQCow2Wrapper:
    """``ImageInfo.format-specific``."""
    header = image.header
    kind = Qcow2CompressionType.ZSTD if header.compression_type else Qcow2CompressionType.ZLIB
    if header.version < 3:
        data = ImageInfoSpecificQCow2(compat="0.10", refcount_bits=header.refcount_bits, compression_type=kind)
    else:
        named = header.extension(headers.EXT_DATA_FILE)
        shown = bitmaps if header.autoclear & headers.AUTOCLEAR_BITMAPS else []
        data = ImageInfoSpecificQCow2(
            compat="1.1",
            data_file=headers.os_decode(named) if named is not None else None,
            lazy_refcounts=bool(header.compatible & headers.COMPAT_LAZY_REFCOUNTS),
            corrupt=bool(header.incompatible & headers.INCOMPAT_CORRUPT),
            extended_l2=bool(header.incompatible & headers.INCOMPAT_EXTENDED_L2),
            refcount_bits=header.refcount_bits,
            compression_type=kind,
            bitmaps=shown or None,
        )
    return ImageInfoSpecificQCow2Wrapper(data=data)


def image_info(image: Image) -> dict[str, Any]:
    """Members of ``ImageInfo``, by attribute name."""
    info: dict[str, Any] = {
        "cluster_size": image.cluster_size,
        "dirty_flag": bool(image.header.incompatible & headers.INCOMPAT_DIRTY),
    }
    if image.header.backing_file:
        info["backing_filename"] = image.header.backing_file
        info["backing_filename_format"] = image.header.backing_format
    if image.snapshots:
        info["snapshots"] = [
            SnapshotInfo(
                id=one.id,
                name=one.name,
                vm_state_size=one.vm_state_size,
                date_sec=one.date_sec,
                date_nsec=one.date_nsec,
                vm_clock_sec=one.vm_clock_nsec // 1_000_000_000,
                vm_clock_nsec=one.vm_clock_nsec % 1_000_000_000,
                icount=one.icount,
            )
            for one in image.snapshots
        ]
    return info
