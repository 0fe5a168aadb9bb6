"""The options with which a qcow2 image is made (QAPI ``BlockdevCreateOptionsQcow2``)."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from pyqsd.block import registry
from pyqsd.block.create import BlockdevCreateOptions, PreallocMode
from pyqsd.block.options import BlockdevRef
from pyqsd.crypto.options import QCryptoCipherAlgo, QCryptoCipherMode, QCryptoHashAlgo, QCryptoIVGenAlgo
from pyqsd.drivers.formats.qcow2.info import Qcow2CompressionType
from pyqsd.qapi.types import Size, Struct


class BlockdevQcow2Version(StrEnum):
    """The versions of the format, which tools also call compatibility level 0.10 and 1.1."""

    V2 = "v2"
    V3 = "v3"


if TYPE_CHECKING:

    class BlockdevDriver(StrEnum):
        """The drivers that there are."""

else:
    BlockdevDriver = StrEnum("BlockdevDriver", [(name.upper(), name) for name in registry.driver_names()])
    BlockdevDriver.__doc__ = "The drivers that there are."


class QCryptoBlockCreateOptions(Struct, tag_field="format", tag="pyqsd-base"):
    """How a new image is encrypted."""


class QCryptoBlockOptionsQCow(QCryptoBlockCreateOptions, tag="qcow"):
    """AES-CBC, which nothing should be encrypted with any more. `key_secret`: id of the secret object."""

    key_secret: str | None = None


class QCryptoBlockCreateOptionsLUKS(QCryptoBlockCreateOptions, tag="luks"):
    """LUKS1. `key_secret`: id of the secret object. `iter_time`: milliseconds that deriving the key may take."""

    key_secret: str | None = None
    cipher_alg: QCryptoCipherAlgo | None = None
    cipher_mode: QCryptoCipherMode | None = None
    ivgen_alg: QCryptoIVGenAlgo | None = None
    ivgen_hash_alg: QCryptoHashAlgo | None = None
    hash_alg: QCryptoHashAlgo | None = None
    iter_time: int | None = None


class CreateOptions(BlockdevCreateOptions, kw_only=True, tag="qcow2"):
    """Sizes are bytes. `data_file_raw`: the data file is to be a raw image of the disk by itself."""

    file: BlockdevRef
    data_file: BlockdevRef | None = None
    data_file_raw: bool | None = None
    extended_l2: bool | None = None
    size: Size
    version: BlockdevQcow2Version | None = None
    backing_file: str | None = None
    backing_fmt: BlockdevDriver | None = None
    encrypt: QCryptoBlockCreateOptions | None = None
    cluster_size: Size | None = None
    preallocation: PreallocMode | None = None
    lazy_refcounts: bool | None = None
    refcount_bits: int | None = None
    compression_type: Qcow2CompressionType | None = None
