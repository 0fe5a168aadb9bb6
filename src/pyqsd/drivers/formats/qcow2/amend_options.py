"""What ``x-blockdev-amend`` can change of a qcow2 image.

`encrypt` is QAPI's ``BlockdevAmendOptionsQcow2``; the others, which QSD has only in ``qemu-img amend``, are ours.
"""

from __future__ import annotations

from pyqsd.block.amend import BlockdevAmendOptions
from pyqsd.crypto.options import QCryptoBlockLUKSKeyslotState
from pyqsd.drivers.formats.qcow2.create_options import BlockdevQcow2Version
from pyqsd.qapi.types import Size, Struct


class QCryptoBlockAmendOptions(Struct, tag_field="format", tag="pyqsd-base"):
    """A change of the encryption."""


class QCryptoBlockAmendOptionsQCow(QCryptoBlockAmendOptions, tag="qcow"):
    """Nothing of it can be changed."""


class QCryptoBlockAmendOptionsLUKS(QCryptoBlockAmendOptions, kw_only=True, tag="luks"):
    """A change of key slots.

    `state`: what the slot becomes; `new_secret`: the id of a secret with the passphrase that it gets; `old_secret`: of
    one with the passphrase of the slots to erase; `keyslot`: the number of the slot; `iter_time`: milliseconds that
    deriving the key may take (2000); `secret`: of one with a passphrase that opens the image (that with which the node
    was opened).
    """

    state: QCryptoBlockLUKSKeyslotState
    new_secret: str | None = None
    old_secret: str | None = None
    keyslot: int | None = None
    iter_time: int | None = None
    secret: str | None = None


class AmendOptions(BlockdevAmendOptions, kw_only=True, tag="qcow2"):
    """`size` in bytes. `backing_file` "" is none. What is absent stays."""

    encrypt: QCryptoBlockAmendOptions | None = None
    version: BlockdevQcow2Version | None = None
    refcount_bits: int | None = None
    lazy_refcounts: bool | None = None
    backing_file: str | None = None
    backing_fmt: str | None = None
    data_file: str | None = None
    data_file_raw: bool | None = None
    size: Size | None = None
