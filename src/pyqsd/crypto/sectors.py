"""Encryption of the sectors of an image, many at a time.

A sector of 512 bytes is encrypted by itself, with an initialization vector made from its number. Python cannot afford a
call per sector, so everything is done for many sectors at once: one call of the block cipher for all blocks, and numpy
for the arithmetic around it.

Sources: NIST SP 800-38A (ECB, CBC, CTR), IEEE 1619 and NIST SP 800-38E (XTS), LUKS1 On-Disk Format (vectors "plain",
"plain64", "essiv").
"""

from __future__ import annotations

import errno
from typing import Any

import numpy as np
import numpy.typing as npt

from pyqsd.crypto.cipher import KEY_BYTES, BlockCipher, block_bytes
from pyqsd.crypto.hashes import digest
from pyqsd.crypto.options import QCryptoCipherAlgo, QCryptoCipherMode, QCryptoHashAlgo, QCryptoIVGenAlgo
from pyqsd.qapi.errors import Error

SECTOR = 512
#: Sectors at a time, so that the scratch memory of a piece stays in the processor's cache.
_PIECE = 256
#: What the block cipher wants to have behind the result.
_SLACK = 16

Words = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]
Buffer = bytes | bytearray | memoryview


class IvSpec:
    """How the vectors are made. `cipher_alg` and `hash_alg` matter for essiv only (see `essiv_cipher`)."""

    __slots__ = ("alg", "cipher_alg", "hash_alg")

    def __init__(
        self,
        alg: QCryptoIVGenAlgo,
        cipher_alg: QCryptoCipherAlgo | None = None,
        hash_alg: QCryptoHashAlgo | None = None,
    ) -> None:
        self.alg = alg
        self.cipher_alg = cipher_alg
        self.hash_alg = hash_alg


class _Vectors:
    """The initialization vectors of consecutive sectors."""

    def __init__(self, spec: IvSpec, key: bytearray, size: int) -> None:
        """`key`: that of the image; `size`: bytes of a vector."""
        self._mask = 0xFFFFFFFF if spec.alg == QCryptoIVGenAlgo.PLAIN else (1 << 64) - 1
        words = size // 8
        counts = np.arange(_PIECE, dtype=np.uint64)
        plain = np.zeros((_PIECE, words), dtype=np.uint64)
        self._made = np.zeros(_PIECE * size + _SLACK, dtype=np.uint8)
        self._all = (counts, plain, self._made[: _PIECE * size].view(np.uint64).reshape(_PIECE, words))
        self._parts: dict[int, tuple[Words, Words, Words, Bytes, Words]] = {}
        self._essiv: BlockCipher | None = None
        if spec.alg == QCryptoIVGenAlgo.ESSIV:
            assert spec.cipher_alg is not None and spec.hash_alg is not None
            hashed = bytearray(digest(spec.hash_alg, key))
            self._essiv = BlockCipher(spec.cipher_alg, hashed)
            wipe(hashed)

    def _make_parts(self, count: int) -> tuple[Words, Words, Words, Bytes, Words]:
        counts, plain, made = (array[:count] for array in self._all)
        parts = self._parts[count] = (counts, plain, plain[:, 0], plain.view(np.uint8), made)
        return parts

    def of(self, sector: int, count: int) -> tuple[Words, Bytes]:
        """Those of `count` sectors, a row each, and the same as bytes. They are good until the next call."""
        counts, plain, low, plain_bytes, made = self._parts.get(count) or self._make_parts(count)
        if sector + count <= self._mask:
            np.add(counts, sector, low)
        else:
            for row in range(count):
                low[row] = (sector + row) & self._mask
        if self._essiv is None:
            return plain, plain_bytes
        self._essiv.encrypt(plain_bytes, self._made)
        return made, made.view(np.uint8)


def wipe(secret: bytearray) -> None:
    """Overwrite a key."""
    secret[:] = bytes(len(secret))


class _Worker:
    """What one thread at a time needs to encrypt or decrypt: contexts of the cipher, and scratch memory."""

    def __init__(self, alg: QCryptoCipherAlgo, mode: QCryptoCipherMode, key: bytearray, spec: IvSpec) -> None:
        self._size = block_bytes(alg)
        if mode == QCryptoCipherMode.XTS:
            half = len(key) // 2
            first = key[:half]
            self._cipher = BlockCipher(alg, first)
            wipe(first)
        else:
            self._cipher = BlockCipher(alg, key)
        self._vectors = _Vectors(spec, key, self._size)
        self._in = np.zeros(_PIECE * SECTOR + _SLACK, dtype=np.uint8)
        self._out = np.zeros(_PIECE * SECTOR + _SLACK, dtype=np.uint8)
        self._in_words: Words = self._in[: _PIECE * SECTOR].view(np.uint64)
        self._in_parts: dict[int, tuple[Bytes, Words, Words]] = {}
        self._out_words: Words = self._out[: _PIECE * SECTOR].view(np.uint64)

    def _parts(self, count: int) -> tuple[Bytes, Words, Words]:
        """The scratch memory for so many sectors: what goes into the cipher, as bytes and as words, and what comes out
        of it. Slicing takes as long as the arithmetic of a small request, so that it is done once."""
        parts = self._in_parts.get(count)
        if parts is None:
            size = count * SECTOR
            parts = (self._in[:size], self._in_words[: size // 8], self._out_words[: size // 8])
            self._in_parts[count] = parts
        return parts

    def encrypt(self, sector: int, count: int, source: Words, target: Words) -> None:
        """Encrypt at most `_PIECE` sectors; `target` may be `source`."""
        raise NotImplementedError

    def decrypt(self, sector: int, count: int, source: Words, target: Words) -> None:
        """Decrypt at most `_PIECE` sectors; `target` may be `source`."""
        raise NotImplementedError

    def wipe(self) -> None:
        """Overwrite what the scratch memory holds of the content."""
        self._in.fill(0)
        self._out.fill(0)


class _Xts(_Worker):
    """Each block is added to a multiple of the sector's encrypted vector before and after encryption: block j to the
    vector times x to the power of j, in the field with 2^128 elements and x^128 = x^7 + x^2 + x + 1."""

    #: A shift of both halves of the vector by j, for j = 0 ... 31, and what it moves out of them.
    _BY = np.arange(32, dtype=np.uint64).reshape(1, 32)
    _BACK = np.uint64(64) - _BY
    _ONE = np.array([1], dtype=np.uint64)
    _SEVEN = np.array([7], dtype=np.uint64)

    def __init__(self, alg: QCryptoCipherAlgo, mode: QCryptoCipherMode, key: bytearray, spec: IvSpec) -> None:
        super().__init__(alg, mode, key, spec)
        second = key[len(key) // 2 :]
        self._tweak_cipher = BlockCipher(alg, second)
        wipe(second)
        self._first = np.zeros(_PIECE * 16 + _SLACK, dtype=np.uint8)
        self._tweaks = np.zeros((_PIECE, 32, 2), dtype=np.uint64)
        self._scratch = [np.zeros((_PIECE, 32), dtype=np.uint64) for _ in range(3)]
        self._views: dict[int, tuple[Words, ...]] = {}

    def _make_views(self, count: int) -> tuple[Words, ...]:
        first: Words = self._first[: count * 16].view(np.uint64).reshape(count, 2)
        tweaks = self._tweaks[:count]
        a, b, c = (scratch[:count] for scratch in self._scratch)
        views = (first[:, :1], first[:, 1:], tweaks[:, :, 0], tweaks[:, :, 1], a, b, c, tweaks.reshape(-1))
        self._views[count] = views
        return views

    def _tweaks_of(self, sector: int, count: int) -> Words:
        self._tweak_cipher.encrypt(self._vectors.of(sector, count)[1], self._first)
        low, high, low_out, high_out, a, b, c, flat = self._views.get(count) or self._make_views(count)
        shift_left, shift_right, xor = np.left_shift, np.right_shift, np.bitwise_xor
        shift_left(high, self._BY, a)
        shift_right(low, self._BACK, b)
        xor(a, b, high_out)
        # What leaves at the top comes back as x^7 + x^2 + x + 1 times it; with 31 bits it fits.
        shift_right(high, self._BACK, c)
        shift_left(low, self._BY, a)
        xor(a, c, a)
        shift_left(c, self._ONE, b)
        xor(c, b, b)
        shift_left(b, self._ONE, b)
        xor(a, b, a)
        shift_left(c, self._SEVEN, c)
        xor(a, c, low_out)
        return flat

    def encrypt(self, sector: int, count: int, source: Words, target: Words) -> None:
        tweaks = self._tweaks_of(sector, count)
        mixed_bytes, mixed, made = self._parts(count)
        np.bitwise_xor(source, tweaks, mixed)
        self._cipher.encrypt(mixed_bytes, self._out)
        np.bitwise_xor(made, tweaks, target)

    def decrypt(self, sector: int, count: int, source: Words, target: Words) -> None:
        tweaks = self._tweaks_of(sector, count)
        mixed_bytes, mixed, made = self._parts(count)
        np.bitwise_xor(source, tweaks, mixed)
        self._cipher.decrypt(mixed_bytes, self._out)
        np.bitwise_xor(made, tweaks, target)

    def wipe(self) -> None:
        super().wipe()
        self._first.fill(0)
        self._tweaks.fill(0)
        for array in self._scratch:
            array.fill(0)


class _Cbc(_Worker):
    """Each block is added to the encrypted one before it, the first one to the vector."""

    def encrypt(self, sector: int, count: int, source: Words, target: Words) -> None:
        words = self._size // 8
        shape = (count, SECTOR // self._size, words)
        plain, done = source.reshape(shape), target.reshape(shape)
        before, _ = self._vectors.of(sector, count)
        mixed_bytes = self._in[: count * self._size]
        mixed = self._in_words[: count * words].reshape(count, words)
        made = self._out_words[: count * words].reshape(count, words)
        # One step for the same block of all sectors.
        for step in range(shape[1]):
            np.bitwise_xor(plain[:, step], before, mixed)
            self._cipher.encrypt(mixed_bytes, self._out)
            done[:, step] = made
            before = made

    def decrypt(self, sector: int, count: int, source: Words, target: Words) -> None:
        shape = (count, SECTOR // self._size, self._size // 8)
        copied_bytes, copied, made = self._parts(count)
        # The target may be the source, which is needed for the sums.
        copied[:] = source
        self._cipher.decrypt(copied_bytes, self._out)
        encrypted, plain, done = copied.reshape(shape), made.reshape(shape), target.reshape(shape)
        np.bitwise_xor(plain[:, 0], self._vectors.of(sector, count)[0], done[:, 0])
        np.bitwise_xor(plain[:, 1:], encrypted[:, :-1], done[:, 1:])


class _Ctr(_Worker):
    """The text is added to the encrypted numbers that follow the vector, which are big-endian."""

    def encrypt(self, sector: int, count: int, source: Words, target: Words) -> None:
        words, blocks = self._size // 8, SECTOR // self._size
        number_bytes, flat, made = self._parts(count)
        vectors = self._vectors.of(sector, count)[0].byteswap()
        numbers = flat.reshape(count, blocks, words)
        low = vectors[:, words - 1 :] + np.arange(blocks, dtype=np.uint64)
        numbers[:, :, words - 1] = low.byteswap()
        if words == 2:
            # A sum that is smaller than what was added to has been carried over.
            numbers[:, :, 0] = (vectors[:, :1] + (low < vectors[:, 1:])).byteswap()
        self._cipher.encrypt(number_bytes, self._out)
        np.bitwise_xor(source, made, target)

    decrypt = encrypt


class _Ecb(_Worker):
    """Each block by itself, without a vector."""

    def encrypt(self, sector: int, count: int, source: Words, target: Words) -> None:
        self._cipher.encrypt(source.view(np.uint8), self._out)
        target[:] = self._parts(count)[2]

    def decrypt(self, sector: int, count: int, source: Words, target: Words) -> None:
        self._cipher.decrypt(source.view(np.uint8), self._out)
        target[:] = self._parts(count)[2]


_MODES: dict[QCryptoCipherMode, type[_Worker]] = {
    QCryptoCipherMode.ECB: _Ecb,
    QCryptoCipherMode.CBC: _Cbc,
    QCryptoCipherMode.XTS: _Xts,
    QCryptoCipherMode.CTR: _Ctr,
}


class SectorCipher:
    """Encrypts and decrypts sectors with one key. Any number of threads may use it at once; large calls leave the GIL
    to others most of the time."""

    def __init__(self, alg: QCryptoCipherAlgo, mode: QCryptoCipherMode, key: bytes | bytearray, iv: IvSpec) -> None:
        """`key`: as long as the cipher says, twice that for xts. Raises Error when the cipher is not there."""
        wanted = KEY_BYTES[alg] * (2 if mode == QCryptoCipherMode.XTS else 1)
        if len(key) != wanted:
            raise Error(f"Cipher key length {len(key)} should be {wanted}", errno.EINVAL)
        if mode == QCryptoCipherMode.XTS and block_bytes(alg) != 16:
            raise Error(f"Unsupported cipher mode {mode}", errno.ENOTSUP)
        self._alg = alg
        self._mode = mode
        self._key = bytearray(key)
        self._iv = iv
        self._closed = False
        self._idle: list[_Worker] = []
        try:
            self._idle.append(self._worker())
        except BaseException:
            self.close()
            raise

    def _worker(self) -> _Worker:
        return _MODES[self._mode](self._alg, self._mode, self._key, self._iv)

    def encrypt(self, sector: int, source: Buffer, target: Buffer) -> None:
        """Encrypt `source` (whole sectors) into `target`, which may be the same memory. `sector`: the number of the
        first one."""
        self._run(True, sector, source, target)

    def decrypt(self, sector: int, source: Buffer, target: Buffer) -> None:
        """Decrypt `source` (whole sectors) into `target`, which may be the same memory. `sector`: the number of the
        first one."""
        self._run(False, sector, source, target)

    def _run(self, encrypt: bool, sector: int, source: Buffer, target: Buffer) -> None:
        # Popping and appending are atomic: no two threads get the same.
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = self._worker()
        try:
            step: Any = worker.encrypt if encrypt else worker.decrypt
            words_in: Words = np.frombuffer(source, dtype=np.uint64)
            words_out: Words = np.frombuffer(target, dtype=np.uint64)
            words = len(words_in)
            if words % (SECTOR // 8) or len(words_out) != words:
                raise ValueError("not whole sectors, or not as much room as there is data")
            count = words // (SECTOR // 8)
            if count <= _PIECE:
                if count:
                    step(sector, count, words_in, words_out)
                return
            for first in range(0, count, _PIECE):
                n = min(_PIECE, count - first)
                at, end = first * (SECTOR // 8), (first + n) * (SECTOR // 8)
                step(sector + first, n, words_in[at:end], words_out[at:end])
        finally:
            self._idle.append(worker)
            if self._closed:
                self.close()

    def close(self) -> None:
        """Overwrite the key and everything that was derived from it, as far as that is in Python's hands. The cipher
        must not be used any more."""
        self._closed = True
        wipe(self._key)
        while self._idle:
            self._idle.pop().wipe()
