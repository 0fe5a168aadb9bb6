"""Changing properties of an image that is open: version, refcount width, key slots, names in the header, size.

Source: QEMU docs/interop/qcow2; which changes are possible, and their order, is as in ``qemu-img amend``.

Each change is complete on disk before the next begins, and leaves the image sound whenever it is interrupted. All that
can be known to be impossible is refused before anything is changed.
"""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import TYPE_CHECKING

from pyqsd.drivers.formats.qcow2 import downgrade
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.amend_options import QCryptoBlockAmendOptionsLUKS
from pyqsd.drivers.formats.qcow2.create_options import BlockdevQcow2Version
from pyqsd.drivers.formats.qcow2.options import settings as make_settings
from pyqsd.qapi.errors import Error

if TYPE_CHECKING:
    from pyqsd.drivers.formats.qcow2.amend_options import AmendOptions, QCryptoBlockAmendOptions
    from pyqsd.drivers.formats.qcow2.encryption import Encryption
    from pyqsd.drivers.formats.qcow2.image import Image
    from pyqsd.drivers.formats.qcow2.options import Options
    from pyqsd.drivers.formats.qcow2.unmap import Unmapper
    from pyqsd.drivers.formats.qcow2.write import Writer

#: QEMU's longest name of a format in the header, bytes.
_MAX_FORMAT_NAME = 15


def wanted(options: AmendOptions) -> bool:
    """Whether there is anything to do."""
    return any(getattr(options, name) is not None for name in options.__struct_fields__)


def check(image: Image, options: AmendOptions, opened_with: Options) -> None:
    """Raises Error if a change cannot be made. `opened_with`: the options of the node."""
    header = image.header
    version = _version(image, options)
    bits = header.refcount_bits if options.refcount_bits is None else options.refcount_bits
    if not 1 <= bits <= 64 or bits & (bits - 1):
        raise Error("Refcount width must be a power of two and may not exceed 64 bits", errno.EINVAL)
    if version < 3 <= header.version:
        downgrade.check(image, bits)
        # The node must be able to go on with its options.
        make_settings(opened_with, replace(header, version=2, compatible=0), image.node.discard_unmap, header.size)
    elif version < 3 and bits != 16:
        raise Error(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or "
            "greater)",
            errno.EINVAL,
        )
    if version < 3 and options.lazy_refcounts:
        raise Error(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)",
            errno.EINVAL,
        )
    has_data_file = bool(header.incompatible & headers.INCOMPAT_DATA_FILE)
    if options.data_file is not None and not has_data_file:
        raise Error("data-file can only be set for images that use an external data file", errno.EINVAL)
    if options.data_file_raw and not header.autoclear & headers.AUTOCLEAR_RAW_DATA:
        raise Error("data-file-raw cannot be set on existing images", errno.EINVAL)
    if options.backing_file and header.autoclear & headers.AUTOCLEAR_RAW_DATA and options.data_file_raw is not False:
        raise Error("Cannot set backing_file, as the image has a raw external data file", errno.EINVAL)
    backing = header.backing_file if options.backing_file is None else options.backing_file
    if options.backing_fmt is not None and not backing:
        raise Error("Backing format cannot be used without backing file", errno.EINVAL)
    if options.backing_fmt is not None and len(headers.os_encode(options.backing_fmt)) > _MAX_FORMAT_NAME:
        raise Error("Backing format name too long", errno.EINVAL)
    if options.backing_file is not None and len(headers.os_encode(options.backing_file)) > headers.MAX_BACKING_NAME:
        raise Error("Backing file name too long", errno.EINVAL)
    if options.encrypt is not None:
        _check_encrypt(image, options.encrypt)


def _version(image: Image, options: AmendOptions) -> int:
    if options.version is None:
        return image.header.version
    return 2 if options.version is BlockdevQcow2Version.V2 else 3


def _check_encrypt(image: Image, options: QCryptoBlockAmendOptions) -> None:
    if image.header.crypt_method == headers.CRYPT_NONE:
        raise Error("image is not encrypted, can't amend", errno.EOPNOTSUPP)
    if not isinstance(options, QCryptoBlockAmendOptionsLUKS):
        raise Error("Amend can't be used to change the qcow2 encryption format", errno.EOPNOTSUPP)
    if image.header.crypt_method != headers.CRYPT_LUKS:
        raise Error("Only LUKS encryption options can be amended for qcow2 with blockdev-amend", errno.EOPNOTSUPP)


async def amend_key_slots(
    image: Image, encryption: Encryption, options: QCryptoBlockAmendOptions, key_secret: str, force: bool
) -> None:
    """Give a key slot to a new passphrase, or take slots from an old one. `key_secret`: the secret with which the node
    was opened. Raises Error, OSError."""
    from pyqsd.crypto import luks
    from pyqsd.crypto.options import QCryptoBlockLUKSKeyslotState

    assert isinstance(options, QCryptoBlockAmendOptionsLUKS)
    assert encryption.luks is not None
    header, storage = encryption.luks.header, encryption.storage(image)

    def passphrase(secret: str) -> bytes:
        return image.node.graph.secret_text(secret).encode()

    if options.state is QCryptoBlockLUKSKeyslotState.ACTIVE:
        if options.new_secret is None:
            raise Error("'new-secret' is required to activate a keyslot", errno.EINVAL)
        if options.old_secret is not None:
            raise Error("'old-secret' must not be given when activating keyslots", errno.EINVAL)
        secret = options.secret if options.secret is not None else key_secret
        await luks.add_key(
            header,
            storage,
            passphrase(secret),
            passphrase(options.new_secret),
            options.keyslot,
            options.iter_time,
            force,
        )
        return
    if options.new_secret is not None:
        raise Error("'new-secret' must not be given when erasing keyslots", errno.EINVAL)
    if options.iter_time is not None:
        raise Error("'iter-time' must not be given when erasing keyslots", errno.EINVAL)
    if options.secret is not None:
        raise Error("'secret' must not be given when erasing keyslots", errno.EINVAL)
    old = None if options.old_secret is None else passphrase(options.old_secret)
    await luks.erase_keys(header, storage, options.keyslot, old, force)


async def amend_image(image: Image, writer: Writer, unmapper: Unmapper, options: AmendOptions) -> None:
    """Make all changes but those of key slots and of the size; `check` has been passed, nothing is in flight, and
    everything is on disk. Raises Error, OSError."""
    header = image.header
    version = _version(image, options)
    if version > header.version:
        await image.rewrite_header(version=3)
    if options.refcount_bits is not None and options.refcount_bits != header.refcount_bits:
        await _change_refcount_width(image, options.refcount_bits)
    if options.lazy_refcounts is not None:
        await image.mark_clean()
        bit = headers.COMPAT_LAZY_REFCOUNTS
        if header.version >= 3:
            lazy = header.compatible | bit if options.lazy_refcounts else header.compatible & ~bit
            await image.set_features(header.incompatible, lazy, header.autoclear)
    if options.data_file_raw is False and header.autoclear & headers.AUTOCLEAR_RAW_DATA:
        autoclear = header.autoclear & ~headers.AUTOCLEAR_RAW_DATA
        await image.set_features(header.incompatible, header.compatible, autoclear)
        image.raw_data = False
    await _rename(image, options)
    if version < header.version:
        await downgrade.downgrade(image, writer, unmapper)


async def _change_refcount_width(image: Image, bits: int) -> None:
    from pyqsd.drivers.formats.qcow2.check.repairing import change_refcount_width

    try:
        await change_refcount_width(image, bits.bit_length() - 1)
    except OSError as exc:
        raise Error(f"Cannot change the refcount width to {bits} bits: {exc.strerror}", exc.errno or errno.EIO) from exc


async def _rename(image: Image, options: AmendOptions) -> None:
    """Change the names of other images in the header."""
    header = image.header
    extensions = list(header.extensions)

    def put(magic: int, name: str | None) -> None:
        extensions[:] = [one for one in extensions if one[0] != magic]
        if name:
            extensions.append((magic, headers.os_encode(name)))

    backing = header.backing_file
    if options.backing_file is not None:
        backing = options.backing_file or None
        put(headers.EXT_BACKING_FORMAT, options.backing_fmt if backing else None)
    elif options.backing_fmt is not None:
        put(headers.EXT_BACKING_FORMAT, options.backing_fmt)
    if options.data_file is not None:
        put(headers.EXT_DATA_FILE, options.data_file)
    if (backing, extensions) != (header.backing_file, header.extensions):
        await image.rewrite_header(backing_file=backing, extensions=extensions)
