"""Block ciphers, and those of them that images can be encrypted with."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from pyqsd.crypto.options import QCryptoCipherAlgo
from pyqsd.qapi.errors import Error

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import BlockCipherAlgorithm

#: Bytes of a key.
KEY_BYTES = {
    QCryptoCipherAlgo.AES_128: 16,
    QCryptoCipherAlgo.AES_192: 24,
    QCryptoCipherAlgo.AES_256: 32,
    QCryptoCipherAlgo.DES: 8,
    QCryptoCipherAlgo.TRIPLE_DES: 24,
    QCryptoCipherAlgo.CAST5_128: 16,
    QCryptoCipherAlgo.SERPENT_128: 16,
    QCryptoCipherAlgo.SERPENT_192: 24,
    QCryptoCipherAlgo.SERPENT_256: 32,
    QCryptoCipherAlgo.TWOFISH_128: 16,
    QCryptoCipherAlgo.TWOFISH_192: 24,
    QCryptoCipherAlgo.TWOFISH_256: 32,
    QCryptoCipherAlgo.SM4: 16,
}
_SHORT_BLOCKS = (QCryptoCipherAlgo.DES, QCryptoCipherAlgo.TRIPLE_DES, QCryptoCipherAlgo.CAST5_128)
_AES = (QCryptoCipherAlgo.AES_128, QCryptoCipherAlgo.AES_192, QCryptoCipherAlgo.AES_256)


def block_bytes(alg: QCryptoCipherAlgo) -> int:
    """The size of the blocks that a cipher encrypts."""
    return 8 if alg in _SHORT_BLOCKS else 16


def aes_cbc_decrypt(key: bytes, iv: bytes, ciphertext: bytes) -> bytes:
    """Decrypt with AES in CBC mode (NIST SP 800-38A, section 6.2). The key has 16, 24 or 32 bytes, the vector 16; the
    length of the text is a multiple of 16, and padding stays on. Raises ValueError otherwise."""
    decryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
    return decryptor.update(ciphertext) + decryptor.finalize()


def _algorithm(alg: QCryptoCipherAlgo, key: bytearray) -> BlockCipherAlgorithm | None:
    if alg in _AES:
        return algorithms.AES(key)
    if alg == QCryptoCipherAlgo.CAST5_128:
        try:
            from cryptography.hazmat.decrepit.ciphers.algorithms import CAST5
        except ImportError:
            return None
        return CAST5(key)  # type: ignore[arg-type]  # it takes any buffer
    return None


class BlockCipher:
    """One block cipher with one key, on many independent blocks in one call. Calls release the GIL. Not for two
    threads at once."""

    __slots__ = ("_decryptor", "_encryptor", "block_bytes")

    def __init__(self, alg: QCryptoCipherAlgo, key: bytearray) -> None:
        """Raises Error when the cipher is not there."""
        algorithm = _algorithm(alg, key)
        self.block_bytes = block_bytes(alg)
        try:
            if algorithm is None:
                raise UnsupportedAlgorithm("")
            cipher = Cipher(algorithm, modes.ECB())
            self._encryptor: Any = cipher.encryptor()
            self._decryptor: Any = cipher.decryptor()
        except UnsupportedAlgorithm:
            raise Error(f"Unsupported cipher algorithm {alg}", errno.ENOTSUP) from None

    def encrypt(self, source: Any, target: Any) -> None:
        """Encrypt the blocks of `source` into `target`, which has at least 15 bytes more."""
        self._encryptor.update_into(source, target)

    def decrypt(self, source: Any, target: Any) -> None:
        """Decrypt the blocks of `source` into `target`, which has at least 15 bytes more."""
        self._decryptor.update_into(source, target)
