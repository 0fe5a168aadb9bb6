"""The object type ``secret_keyring``: a key of the Linux kernel (keyrings(7))."""

from __future__ import annotations

import os
from typing import ClassVar

from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Int32
from pyqsd.qom.object import Property
from pyqsd.qom.secret_common import SecretObject, SecretOptions


class SecretKeyringOptions(SecretOptions, tag="secret_keyring", kw_only=True):
    """`serial`: the key's serial number."""

    serial: Int32


class SecretKeyring(SecretObject):
    """See above."""

    type_name = "secret_keyring"
    Options = SecretKeyringOptions
    properties: ClassVar[tuple[Property, ...]] = (*SecretObject.properties, Property("serial", "int32_t", Int32, 0))

    async def load(self) -> bytes:
        serial: int = self.options.serial
        if serial == 0:
            raise Error("'serial' should not be equal to 0")
        from pyqsd.crypto.keyring import read_key

        try:
            return read_key(serial)
        except OSError as exc:
            number = exc.errno or 0
            raise Error(f"Unable to read serial key {serial & 0xFFFFFFFF:08x}: {os.strerror(number)}", number) from exc


OBJECT = SecretKeyring
