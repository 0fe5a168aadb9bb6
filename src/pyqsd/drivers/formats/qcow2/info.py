"""What is told about a qcow2 image (QAPI ``ImageInfoSpecificQCow2``)."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

from pyqsd.block.info import ImageInfoSpecific, SnapshotInfo
from pyqsd.crypto.options import QCryptoBlockInfoLUKS as LuksInfo
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.options import BlockdevQcow2EncryptionFormat
from pyqsd.qapi.types import Struct, Uint32

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.bitmap_format import StoredBitmap
    from pyqsd.drivers.formats.qcow2.encryption import Encryption
    from pyqsd.drivers.formats.qcow2.image import Image
    from pyqsd.drivers.formats.qcow2.snapshots import Snapshot


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


class QCryptoBlockInfoLUKS(LuksInfo, ImageInfoSpecificQCow2Encryption, kw_only=True, tag="luks"):
    """A LUKS header in the image."""


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


def bitmap_infos(stored: list[StoredBitmap]) -> list[Qcow2BitmapInfo]:
    """What is told about the bitmaps in the image."""
    shown = []
    for one in stored:
        flags = []
        if one.in_use:
            flags.append(Qcow2BitmapInfoFlags.IN_USE)
        if one.auto:
            flags.append(Qcow2BitmapInfoFlags.AUTO)
        name = headers.shown(one.name)
        shown.append(Qcow2BitmapInfo(name=name, granularity=1 << one.granularity_bits, flags=flags))
    return shown


def specific(image: Image, encryption: Encryption | None) -> ImageInfoSpecificQCow2Wrapper:
    """``ImageInfo.format-specific``."""
    header = image.header
    encrypt = _encryption(encryption)
    kind = Qcow2CompressionType.ZSTD if header.compression_type else Qcow2CompressionType.ZLIB
    if header.version < 3:
        data = ImageInfoSpecificQCow2(
            compat="0.10", refcount_bits=header.refcount_bits, encrypt=encrypt, compression_type=kind
        )
    else:
        shown = image.bitmaps if header.autoclear & headers.AUTOCLEAR_BITMAPS else []
        data = ImageInfoSpecificQCow2(
            compat="1.1",
            data_file=header.data_file,
            data_file_raw=image.raw_data if image.external else None,
            lazy_refcounts=bool(header.compatible & headers.COMPAT_LAZY_REFCOUNTS),
            corrupt=bool(header.incompatible & headers.INCOMPAT_CORRUPT),
            extended_l2=bool(header.incompatible & headers.INCOMPAT_EXTENDED_L2),
            refcount_bits=header.refcount_bits,
            compression_type=kind,
            encrypt=encrypt,
            bitmaps=bitmap_infos(shown) or None,
        )
    return ImageInfoSpecificQCow2Wrapper(data=data)


def _encryption(encryption: Encryption | None) -> ImageInfoSpecificQCow2Encryption | None:
    if encryption is None:
        return None
    if encryption.luks is None:
        return ImageInfoSpecificQCow2EncryptionAES()
    shown = encryption.luks.header.info()
    return QCryptoBlockInfoLUKS(**{name: getattr(shown, name) for name in shown.__struct_fields__})


def image_info(image: Image) -> dict[str, Any]:
    """Members of ``ImageInfo``, by attribute name."""
    info: dict[str, Any] = {
        "cluster_size": image.cluster_size,
        "encrypted": image.encrypted,
        "dirty_flag": bool(image.header.incompatible & headers.INCOMPAT_DIRTY),
    }
    if image.header.backing_file:
        info["backing_filename"] = image.header.backing_file
        info["backing_filename_format"] = image.header.backing_format
    return info


def snapshot_infos(image: Image) -> list[SnapshotInfo]:
    """What is told about the snapshots in the image."""
    return [snapshot_info(one) for one in image.snapshots]


def snapshot_info(one: Snapshot) -> SnapshotInfo:
    """What is told about a snapshot."""
    return SnapshotInfo(
        id=headers.shown(one.id),
        name=headers.shown(one.name),
        vm_state_size=one.vm_state_size,
        date_sec=one.date_sec,
        date_nsec=one.date_nsec,
        vm_clock_sec=one.vm_clock_nsec // 1_000_000_000,
        vm_clock_nsec=one.vm_clock_nsec % 1_000_000_000,
        icount=one.icount,
    )
