"""Hash functions, key derivation and the anti-forensic splitter.

Sources: RFC 8018, section 5.2 (PBKDF2); LUKS1 On-Disk Format, sections 2.4 (anti-forensic information splitter).
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pyqsd.crypto.options import QCryptoHashAlgo
from pyqsd.qapi.errors import Error

T = TypeVar("T")

_DIGEST_BYTES = {
    QCryptoHashAlgo.MD5: 16,
    QCryptoHashAlgo.SHA1: 20,
    QCryptoHashAlgo.SHA224: 28,
    QCryptoHashAlgo.SHA256: 32,
    QCryptoHashAlgo.SHA384: 48,
    QCryptoHashAlgo.SHA512: 64,
    QCryptoHashAlgo.RIPEMD160: 20,
    QCryptoHashAlgo.SM3: 32,
}
#: The library takes no more; the format has room for twice as many.
_MOST_ITERATIONS = (1 << 31) - 1
#: How long the speed of the key derivation is measured, seconds.
_MEASURE = 0.05


def digest_bytes(alg: QCryptoHashAlgo) -> int:
    """The size of a digest."""
    return _DIGEST_BYTES[alg]


def digest(alg: QCryptoHashAlgo, data: bytes | bytearray) -> bytes:
    """The digest of `data`. Raises Error when the function is not there."""
    try:
        return hashlib.new(alg.value, data, usedforsecurity=False).digest()
    except ValueError:
        raise _missing(alg) from None


def _missing(alg: QCryptoHashAlgo) -> Error:
    return Error(f"PBKDF does not support hash algorithm {alg}", errno.ENOTSUP)


def pbkdf2(alg: QCryptoHashAlgo, password: bytes | bytearray, salt: bytes, iterations: int, length: int) -> bytearray:
    """A key of `length` bytes. Takes long by design, and leaves the GIL to others meanwhile. Raises Error."""
    if iterations > _MOST_ITERATIONS:
        raise Error(f"PBKDF iterations {iterations} larger than {_MOST_ITERATIONS}", errno.ERANGE)
    try:
        return bytearray(hashlib.pbkdf2_hmac(alg.value, password, salt, iterations, length))
    except ValueError:
        raise _missing(alg) from None


def iterations_for(alg: QCryptoHashAlgo, password: bytes | bytearray, length: int, milliseconds: int) -> int:
    """How many iterations of `pbkdf2` take that long here. Waits. Raises Error."""
    if milliseconds == 0:
        raise Error("Parameter 'iter-time' expects a value other than zero", errno.EINVAL)
    salt = bytes(32)
    iterations = 1 << 12
    while True:
        start = time.thread_time()
        pbkdf2(alg, password, salt, iterations, length)
        taken = time.thread_time() - start
        if taken >= _MEASURE or iterations >= 1 << 28:
            break
        iterations *= 4 if taken < _MEASURE / 8 else 2
    per_second = int(iterations / max(taken, 1e-6))
    if milliseconds < 0:
        raise Error(f"PBKDF iterations {per_second} too large to scale: {os.strerror(errno.ERANGE)}", errno.ERANGE)
    return per_second * milliseconds // 1000


def check_iterations(iterations: int) -> None:
    """Raises Error when a header has no room for so many."""
    if iterations > 0xFFFFFFFF:
        raise Error(
            f"PBKDF iterations {iterations} larger than {0xFFFFFFFF}: {os.strerror(errno.ERANGE)}", errno.ERANGE
        )


async def in_thread(func: Callable[..., T], *args: Any) -> T:
    """Run what takes long in a thread that does not keep the daemon from ending. If the caller is cancelled, the thread
    goes on, and its result is dropped."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(value: Any, exception: BaseException | None) -> None:
        if done.cancelled():
            return
        if exception is None:
            done.set_result(value)
        else:
            done.set_exception(exception)

    def work() -> None:
        value, exception = None, None
        try:
            value = func(*args)
        except BaseException as exc:
            exception = exc
        try:
            loop.call_soon_threadsafe(finish, value, exception)
        except RuntimeError:
            # The loop has ended, and nobody waits any more.
            pass

    threading.Thread(target=work, name="pyqsd-kdf", daemon=True).start()
    return await done


def _diffuse(alg: QCryptoHashAlgo, block: bytearray) -> bytearray:
    """Each bit of the result depends on many bits of its piece of `block`: pieces are replaced by their digests, with
    their number before them."""
    size = digest_bytes(alg)
    mixed = bytearray()
    for number, at in enumerate(range(0, len(block), size)):
        piece = block[at : at + size]
        mixed += digest(alg, number.to_bytes(4, "big") + piece)[: len(piece)]
    return mixed


def _xor(one: bytearray, other: bytes | bytearray) -> bytearray:
    return bytearray((int.from_bytes(one, "little") ^ int.from_bytes(other, "little")).to_bytes(len(one), "little"))


def af_split(alg: QCryptoHashAlgo, key: bytearray, stripes: int) -> bytearray:
    """Spread `key` over `stripes` times its size, all of which is needed to get it back (`af_merge`)."""
    size = len(key)
    split = bytearray(os.urandom(size * (stripes - 1)))
    block = bytearray(size)
    for at in range(0, len(split), size):
        block = _diffuse(alg, _xor(block, split[at : at + size]))
    split += _xor(block, key)
    return split


def af_merge(alg: QCryptoHashAlgo, split: bytearray, size: int) -> bytearray:
    """The key of `size` bytes that `af_split` has spread."""
    block = bytearray(size)
    last = len(split) - size
    for at in range(0, last, size):
        block = _diffuse(alg, _xor(block, split[at : at + size]))
    return _xor(block, split[last:])
