"""What ``secret`` and ``secret_keyring`` share: decoding and decryption of what they hold."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from pyqsd.chardev.base64 import decode_base64
from pyqsd.qapi.errors import Error
from pyqsd.qom.object import Property, UserObject, text
from pyqsd.qom.options import ObjectOptions


class QCryptoSecretFormat(StrEnum):
    """How a secret is given: as it is, or in base64."""

    RAW = "raw"
    BASE64 = "base64"


class SecretOptions(ObjectOptions, tag="pyqsd-secret"):
    """`keyid`: another secret, of 32 bytes, that this one is encrypted with (AES-256-CBC, padded as in PKCS #7); `iv`:
    the initialization vector in base64."""

    format: QCryptoSecretFormat | None = None
    keyid: str | None = None
    iv: str | None = None


class SecretObject(UserObject):
    """A secret. What it held when it was created stays its content."""

    parents = (("secret_common", True),)
    properties: ClassVar[tuple[Property, ...]] = (
        text("iv"),
        text("keyid"),
        Property("format", "QCryptoSecretFormat", QCryptoSecretFormat, "raw"),
    )

    #: The bytes of the secret, once it is complete.
    content: bytes | None = None

    async def load(self) -> bytes:
        """What is given, before decoding. Raises Error."""
        raise NotImplementedError

    async def complete(self) -> None:
        data = await self.load()
        if self.options.keyid is not None:
            self.content = self._decrypt(data)
        else:
            self.content = self._decode(data)

    def _decode(self, data: bytes) -> bytes:
        if self.options.format == QCryptoSecretFormat.BASE64:
            return decode_base64(data.decode("latin-1"))
        return data

    def _decrypt(self, data: bytes) -> bytes:
        key = self.objects.secret(self.options.keyid)
        if len(key) != 32:
            raise Error("Key should be 32 bytes in length")
        if self.options.iv is None:
            raise Error("IV is required to decrypt secret")
        iv = decode_base64(self.options.iv)
        if len(iv) != 16:
            raise Error(f"IV should be 16 bytes in length not {len(iv)}")
        ciphertext = self._decode(data)
        if len(ciphertext) % 16:
            raise Error(f"Length {len(ciphertext)} must be a multiple of block size 16")
        from pyqsd.crypto.cipher import aes_cbc_decrypt

        plaintext = aes_cbc_decrypt(key, iv, ciphertext)
        padding = plaintext[-1] if plaintext else 0
        if padding > 16 or not plaintext:
            raise Error(f"Incorrect number of padding bytes ({padding}) found on decrypted data")
        return plaintext[: len(plaintext) - padding]
