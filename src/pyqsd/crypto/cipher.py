"""Ciphers."""

from __future__ import annotations

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes


def aes_cbc_decrypt(key: bytes, iv: bytes, ciphertext: bytes) -> bytes:
    """Decrypt with AES in CBC mode (NIST SP 800-38A, section 6.2). The key has 16, 24 or 32 bytes, the vector 16; the
    length of the text is a multiple of 16, and padding stays on. Raises ValueError otherwise."""
    decryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
    return decryptor.update(ciphertext) + decryptor.finalize()
