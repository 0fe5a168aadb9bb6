"""Encrypted images: what is done with the guest's data on its way to the file and back.

Source: QEMU docs/interop/qcow2, sections "Header" (crypt_method), "Full disk encryption header pointer", "Data
encryption". Metadata and compressed clusters are never encrypted; all other clusters are, in sectors of 512 bytes.
Their initialization vectors are made from the sector's place in the file (luks), or on the disk (aes).

With ``luks``, a header extension (0x0537be77) says where in the file the LUKS header with its key material is: offset
and length in bytes, big-endian, 8 bytes each. These clusters are in use like any other metadata. The payload offset
of the LUKS header means nothing here.

This module is imported for encrypted images only, as it takes numpy along.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyqsd.block import iov as iovs
from pyqsd.block.extents import ALLOCATED, DATA, DRIVER, OFFSET_VALID, ZERO, Extent
from pyqsd.crypto import luks
from pyqsd.crypto.options import QCryptoCipherAlgo, QCryptoCipherMode, QCryptoIVGenAlgo
from pyqsd.crypto.sectors import SECTOR, IvSpec, SectorCipher, wipe
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.extended import ExtendedWriter
from pyqsd.drivers.formats.qcow2.write import InFlight, Writer
from pyqsd.qapi.errors import Error, from_oserror

if TYPE_CHECKING:
    from pyqsd.block.node import Node
    from pyqsd.drivers.formats.qcow2.compression import Unpacked
    from pyqsd.drivers.formats.qcow2.image import Image

_LONGEST_FILE = (1 << 63) - 1
#: From this length on (bytes) the cipher runs in a worker thread, while the loop serves others.
_WORKER_FROM = 256 << 10
#: Requests are worked on in pieces of this size (bytes), which bounds the memory that they take.
_PIECE = 1 << 20
#: Buffers that are kept for the next request.
_KEPT_BUFFERS = 8
_SMALL_BUFFER = 64 << 10


class HeaderArea:
    """The part of the file that has the LUKS header (`pyqsd.crypto.luks.Storage`). Offsets are relative to it."""

    def __init__(self, image: Image, offset: int, length: int) -> None:
        self._image = image
        self._offset = offset
        self._length = length

    def _check(self, offset: int, length: int) -> None:
        if offset + length > self._length:
            raise Error("Request for data outside of extension header", errno.EINVAL)

    async def read(self, offset: int, length: int) -> bytearray:
        """Bytes of the header. Raises Error when they are not inside of it."""
        self._check(offset, length)
        try:
            if self._offset + offset + length > _LONGEST_FILE:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return await self._image.file.pread(self._offset + offset, length)
        except OSError as exc:
            raise from_oserror(exc, "Could not read encryption header") from exc

    async def write(self, offset: int, data: bytes | bytearray) -> None:
        """Overwrite bytes of the header. Raises Error, OSError."""
        self._check(offset, len(data))
        await self._image.file.pwrite(self._offset + offset, data)

    async def flush(self) -> None:
        """Make what was written durable. Raises OSError."""
        await self._image.file.flush()


class Encryption:
    """The cipher of an open image. `luks` is the volume with its header (None with aes), `area` where that is."""

    def __init__(
        self, cipher: SectorCipher, volume: luks.Luks | None = None, area: tuple[int, int] | None = None
    ) -> None:
        self.cipher = cipher
        self.luks = volume
        self.area = area
        #: The vectors depend on the place on the disk, not on that in the file.
        self.by_guest = volume is None
        #: The last write took no waiting, so that it is worth trying with the next one. What was encrypted for a try in
        #: vain has to be encrypted again.
        self.quick = True
        self._small: list[memoryview] = []
        self._large: list[memoryview] = []

    def storage(self, image: Image) -> HeaderArea:
        """Where the LUKS header is, to change its key slots."""
        assert self.area is not None
        return HeaderArea(image, *self.area)

    def close(self) -> None:
        """Wipe keys, and what buffers hold."""
        self.cipher.close()
        if self.luks is not None:
            self.luks.close()
        for buffer in self._small + self._large:
            buffer[:] = bytes(len(buffer))
        self._small.clear()
        self._large.clear()

    async def reload(self, image: Image) -> None:
        """Others may have changed the key slots. Raises Error."""
        area = headers.encryption_area(image.header)
        if self.luks is not None and area is not None:
            self.area = area
            self.luks.header = await luks.read_header(self.storage(image))

    # --- buffers -----------------------------------------------------------------------------------------------------

    def take(self, length: int) -> memoryview:
        """A page-aligned buffer of at least `length` bytes, at most a piece; to be given back."""
        small = length <= _SMALL_BUFFER
        kept = self._small if small else self._large
        return kept.pop() if kept else iovs.aligned_buffer(_SMALL_BUFFER if small else _PIECE)

    def give(self, buffer: memoryview) -> None:
        """The buffer is not used any more."""
        kept = self._small if len(buffer) == _SMALL_BUFFER else self._large
        if len(kept) < _KEPT_BUFFERS:
            kept.append(buffer)

    # --- the data ----------------------------------------------------------------------------------------------------

    def _sector(self, host: int, guest: int) -> int:
        return (guest if self.by_guest else host) // SECTOR

    def encrypt(self, sector: int, iov: list[memoryview], target: memoryview) -> None:
        """Encrypt all of `iov` into `target`, which is as long."""
        if len(iov) == 1:
            self.cipher.encrypt(sector, iov[0], target)
        else:
            iovs.copy([target], iov)
            self.cipher.encrypt(sector, target, target)

    def write_now(self, node: Node, host: int, guest: int, length: int, iov: list[memoryview]) -> bool:
        """Encrypt and write, if that takes no waiting and is quick."""
        if not self.quick or length > _WORKER_FROM:
            return False
        buffer = self.take(length)
        try:
            encrypted = buffer[:length]
            self.encrypt(self._sector(host, guest), iov, encrypted)
            self.quick = node.write_now(host, length, [encrypted])
            return self.quick
        finally:
            self.give(buffer)

    async def write(
        self, node: Node, host: int, guest: int, length: int, iov: list[memoryview], flags: int = 0
    ) -> None:
        """Encrypt all of `iov` and write it to `node` at `host`. Raises OSError."""
        done = 0
        while done < length:
            n = min(length - done, _PIECE)
            part = iov if n == length else iovs.part(iov, done, n)
            buffer = self.take(n)
            try:
                encrypted = buffer[:n]
                sector = self._sector(host + done, guest + done)
                if n < _WORKER_FROM:
                    self.encrypt(sector, part, encrypted)
                else:
                    await _in_worker(self.encrypt, sector, part, encrypted)
                self.quick = not flags and node.write_now(host + done, n, [encrypted])
                if not self.quick:
                    await node.pwritev(host + done, n, [encrypted], flags)
            finally:
                self.give(buffer)
            done += n

    def read_now(self, node: Node, host: int, guest: int, length: int, iov: list[memoryview]) -> bool:
        """Read and decrypt, if that takes no waiting and is quick."""
        if length > _WORKER_FROM or len(iov) != 1 or not node.read_now(host, length, iov):
            return False
        self.cipher.decrypt(self._sector(host, guest), iov[0], iov[0])
        return True

    async def read(self, node: Node, host: int, guest: int, length: int, iov: list[memoryview]) -> None:
        """Fill `iov` with what `node` has at `host`, decrypted. Raises OSError."""
        done = 0
        while done < length:
            n = min(length - done, _PIECE)
            part = iov if n == length else iovs.part(iov, done, n)
            if len(part) == 1:
                await self._read_piece(node, host + done, guest + done, part[0])
            else:
                buffer = self.take(n)
                try:
                    await self._read_piece(node, host + done, guest + done, buffer[:n])
                    iovs.copy(part, [buffer[:n]])
                finally:
                    self.give(buffer)
            done += n

    async def _read_piece(self, node: Node, host: int, guest: int, view: memoryview) -> None:
        length = len(view)
        if not node.read_now(host, length, [view]):
            await node.preadv(host, length, [view])
        sector = self._sector(host, guest)
        if length < _WORKER_FROM:
            self.cipher.decrypt(sector, view, view)
        else:
            await _in_worker(self.cipher.decrypt, sector, view, view)


async def _in_worker(func: Callable[..., None], *args: Any) -> None:
    """Run `func` in a worker thread. If the caller is cancelled, that waits for its end: buffers are the caller's
    again afterwards."""
    work = asyncio.get_running_loop().run_in_executor(None, func, *args)
    try:
        await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            try:
                await asyncio.wait([work])
            except asyncio.CancelledError:
                continue
        raise


# --- opening ---------------------------------------------------------------------------------------------------------


async def open_encryption(image: Image, key_secret: str | None) -> Encryption:
    """The cipher of an encrypted image, with the key or passphrase from the secret `key_secret`. Takes as long as
    deriving a key does. Raises Error."""
    if key_secret is None:
        raise Error("Parameter 'encrypt.key-secret' is required for cipher", errno.EINVAL)
    passphrase = image.node.graph.secret_text(key_secret).encode()
    if image.header.crypt_method == headers.CRYPT_AES:
        key = bytearray(passphrase.split(b"\0", 1)[0][:16].ljust(16, b"\0"))
        try:
            vectors = IvSpec(QCryptoIVGenAlgo.PLAIN64)
            return Encryption(SectorCipher(QCryptoCipherAlgo.AES_128, QCryptoCipherMode.CBC, key, vectors))
        finally:
            wipe(key)
    area = headers.encryption_area(image.header)
    assert area is not None
    volume = await luks.open_volume(HeaderArea(image, *area), passphrase)
    assert volume.cipher is not None
    return Encryption(volume.cipher, volume, area)


# --- reading and writing ---------------------------------------------------------------------------------------------


class Access:
    """The driver's way to encrypted clusters: it takes the place of the methods of these names. `map` and `map_write`
    of the driver say where clusters are, and this that nobody but the driver can read and write them. `write_new_now`
    writes a prefix of a range to new clusters."""

    def __init__(
        self,
        encryption: Encryption,
        map: Callable[[int, int], Extent | None],
        map_write: Callable[[int, int], tuple[int, Node, int] | None],
        write_new_now: Callable[[int, int, list[memoryview]], int],
    ) -> None:
        self._encryption = encryption
        self.where = map
        self._where_to_write = map_write
        self._write_new_now = write_new_now

    def map(self, offset: int, length: int) -> Extent | None:
        extent = self.where(offset, length)
        if extent is None or not extent[1] & OFFSET_VALID:
            return extent
        n, flags, _, _ = extent
        return (n, ZERO | ALLOCATED, None, 0) if flags & ZERO else (n, DATA | ALLOCATED | DRIVER, None, 0)

    def map_write(self, offset: int, length: int) -> tuple[int, Node, int] | None:
        return None

    async def read(self, offset: int, length: int, iov: list[memoryview]) -> None:
        """Read from ordinary clusters that follow each other in the file, after `map` has said that they are. Raises
        OSError."""
        extent = self.where(offset, length)
        assert extent is not None and extent[0] >= length and extent[2] is not None
        await self._encryption.read(extent[2], extent[3], offset, length, iov)

    def read_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        if (offset | length) & (SECTOR - 1):
            return False
        extent = self.where(offset, length)
        if extent is None:
            return False
        n, flags, node, at = extent
        if n < length or flags & (DRIVER | ZERO) or node is None:
            return False
        return self._encryption.read_now(node, at, offset, length, iov)

    def write_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        if (offset | length) & (SECTOR - 1):
            return False
        done = 0
        while True:
            left = length - done
            target = self._where_to_write(offset + done, left)
            if target is not None:
                n, node, at = target
                part = iov if n == length else iovs.part(iov, done, n)
                if not self._encryption.write_now(node, at, offset + done, n, part):
                    return False
            else:
                n = self._write_new_now(offset + done, left, iovs.part(iov, done, left) if done else iov)
                if not n:
                    return False
            done += n
            if done == length:
                return True


class _Encrypting(Writer):
    """The parts of a writer that touch the guest's data."""

    def __init__(self, image: Image, unpacked: Unpacked, encryption: Encryption) -> None:
        super().__init__(image, unpacked)
        self._encryption = encryption
        # Zeroes in the file are no zeroes for the guest.
        self._zero_calls = False

    async def _write_in_place(self, first: int, count: int, host: int, length: int, iov: list[memoryview]) -> None:
        image = self.image
        image.check_data_overlap(host >> image.cluster_bits, count)
        guest = (first << image.cluster_bits) | (host & image.cluster_mask)
        # While it is encrypted elsewhere, the clusters stay what they are.
        request = InFlight(first, first + count - 1, False)
        self.in_flight.append(request)
        try:
            await self._encryption.write(image.data, host, guest, length, iov)
        finally:
            self.finished(request)

    async def store(self, host: int, guest: int, length: int, iov: list[memoryview], flags: int) -> None:
        await self._encryption.write(self.image.data, host, guest, length, iov, flags)

    def _store_now(self, host: int, guest: int, length: int, iov: list[memoryview]) -> bool:
        return self._encryption.write_now(self.image.data, host, guest, length, iov)

    async def _fetch(self, host: int, guest: int, view: memoryview) -> None:
        await self._encryption.read(self.image.data, host, guest, len(view), [view])


class EncryptingWriter(_Encrypting):
    """Writes to ordinary clusters."""


class EncryptingExtendedWriter(_Encrypting, ExtendedWriter):
    """Writes to subclusters."""
