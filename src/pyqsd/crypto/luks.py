"""LUKS1: making headers, finding the key that a passphrase opens, adding and erasing key slots.

Source: LUKS1 On-Disk Format Specification 1.2.3, section 4 (operations). Errors have QSD's words.

What takes long by design (deriving keys) happens in a thread of its own. Where the header is, only its `Storage` knows.
Passphrases end at the first NUL, as with QEMU.
"""

from __future__ import annotations

import hmac
import os
import uuid
from typing import Protocol

from pyqsd.crypto import hashes
from pyqsd.crypto import luks_header as headers
from pyqsd.crypto.cipher import KEY_BYTES
from pyqsd.crypto.luks_header import SECTOR, LuksHeader, Slot
from pyqsd.crypto.options import (
    LuksCreateOptions,
    QCryptoCipherAlgo,
    QCryptoCipherMode,
    QCryptoHashAlgo,
    QCryptoIVGenAlgo,
)
from pyqsd.crypto.sectors import IvSpec, SectorCipher, wipe
from pyqsd.qapi.errors import Error

#: Milliseconds that deriving a key takes, unless told otherwise.
_ITER_TIME = 2000
_LEAST_ITERATIONS = 1000
#: How often the key material of an erased slot is overwritten with random bytes, as QEMU does.
_ERASE_PASSES = 40


class Storage(Protocol):
    """Where the header is. Offsets (bytes) are relative to its beginning. All raise OSError, `read` also Error when the
    header has no such part."""

    async def read(self, offset: int, length: int) -> bytes | bytearray:
        """Bytes of the header region."""

    async def write(self, offset: int, data: bytes | bytearray) -> None:
        """Overwrite bytes of the header region."""

    async def flush(self) -> None:
        """All that was written is durable afterwards."""


def sector_cipher(header: LuksHeader, key: bytearray) -> SectorCipher:
    """The cipher that `header` describes, with `key`. Raises Error when it is not there."""
    iv = IvSpec(header.ivgen_alg, header.ivgen_cipher_alg, header.ivgen_hash_alg)
    return SectorCipher(header.cipher_alg, header.cipher_mode, key, iv)


def _phrase(passphrase: bytes) -> bytes:
    return passphrase.split(b"\0", 1)[0]


def _unlock(header: LuksHeader, slot: Slot, passphrase: bytes, material: bytearray) -> bytearray | None:
    """The master key, if `passphrase` belongs to `slot`. Takes long. Raises Error."""
    slot_key = hashes.pbkdf2(header.hash_alg, passphrase, slot.salt, slot.iterations, header.key_bytes)
    cipher = None
    try:
        cipher = sector_cipher(header, slot_key)
        # The material of some keys ends within a sector.
        length = len(material)
        padded = material + bytes(-length % SECTOR)
        cipher.decrypt(0, padded, padded)
        key = hashes.af_merge(header.hash_alg, padded[:length], header.key_bytes)
        wipe(padded)
    finally:
        wipe(slot_key)
        if cipher is not None:
            cipher.close()
    if hmac.compare_digest(_digest(header, key), header.digest):
        return key
    wipe(key)
    return None


def _digest(header: LuksHeader, key: bytearray) -> bytes:
    return bytes(
        hashes.pbkdf2(header.hash_alg, key, header.digest_salt, header.digest_iterations, headers.DIGEST_BYTES)
    )


def _lock(header: LuksHeader, slot: Slot, passphrase: bytes, key: bytearray) -> bytearray:
    """The key material for `slot`, whose salt and iterations are set. Takes long. Raises Error."""
    slot_key = hashes.pbkdf2(header.hash_alg, passphrase, slot.salt, slot.iterations, header.key_bytes)
    cipher = None
    try:
        cipher = sector_cipher(header, slot_key)
        split = hashes.af_split(header.hash_alg, key, slot.stripes)
        length = len(split)
        split += bytes(-length % SECTOR)
        cipher.encrypt(0, split, split)
        return split[:length]
    finally:
        wipe(slot_key)
        if cipher is not None:
            cipher.close()


def _new_slot(header: LuksHeader, offset: int, passphrase: bytes, key: bytearray, iter_time: int) -> tuple[Slot, bytes]:
    """A slot that `passphrase` opens, with its key material. Takes long. Raises Error."""
    iterations = hashes.iterations_for(header.hash_alg, passphrase, header.key_bytes, iter_time)
    hashes.check_iterations(iterations)
    salt = os.urandom(headers.SALT_BYTES)
    slot = Slot(True, max(iterations, _LEAST_ITERATIONS), salt, offset, headers.STRIPES)
    return slot, bytes(_lock(header, slot, passphrase, key))


def _create(options: LuksCreateOptions, passphrase: bytes, detached: bool) -> tuple[LuksHeader, bytearray, bytes]:
    alg = options.cipher_alg or QCryptoCipherAlgo.AES_256
    mode = options.cipher_mode or QCryptoCipherMode.XTS
    ivgen = options.ivgen_alg or QCryptoIVGenAlgo.PLAIN64
    hash_alg = options.hash_alg or QCryptoHashAlgo.SHA256
    iter_time = _ITER_TIME if options.iter_time is None else options.iter_time
    ivgen_hash = options.ivgen_hash_alg
    if ivgen == QCryptoIVGenAlgo.ESSIV and ivgen_hash is None:
        ivgen_hash = QCryptoHashAlgo.SHA256
    name = headers.cipher_name(alg)
    spec = f"{mode}-{ivgen}" + (f":{ivgen_hash}" if ivgen_hash is not None else "")
    key_bytes = KEY_BYTES[alg] * (2 if mode == QCryptoCipherMode.XTS else 1)
    iv_cipher = alg
    if ivgen == QCryptoIVGenAlgo.ESSIV:
        assert ivgen_hash is not None
        iv_cipher = headers.essiv_cipher(alg, hashes.digest_bytes(ivgen_hash))
    room = headers.material_sectors(key_bytes)
    end = headers.SLOTS_FROM + headers.SLOTS * room
    slots = [
        Slot(False, 0, bytes(headers.SALT_BYTES), headers.SLOTS_FROM + number * room, headers.STRIPES)
        for number in range(headers.SLOTS)
    ]
    header = LuksHeader(
        name,
        spec,
        str(hash_alg),
        0 if detached else end,
        key_bytes,
        b"",
        os.urandom(headers.SALT_BYTES),
        0,
        str(uuid.uuid4()),
        slots,
        alg,
        mode,
        ivgen,
        ivgen_hash,
        iv_cipher,
        hash_alg,
    )
    key = bytearray(os.urandom(key_bytes))
    sector_cipher(header, key).close()
    iterations = hashes.iterations_for(hash_alg, key, headers.DIGEST_BYTES, iter_time) // 8
    hashes.check_iterations(iterations)
    header.digest_iterations = max(iterations, _LEAST_ITERATIONS)
    header.digest = _digest(header, key)
    header.slots[0], material = _new_slot(header, headers.SLOTS_FROM, passphrase, key, iter_time)
    region = bytearray(end * SECTOR)
    region[: headers.HEADER_BYTES] = headers.encode(header)
    region[headers.SLOTS_FROM * SECTOR : headers.SLOTS_FROM * SECTOR + len(material)] = material
    return header, key, bytes(region)


class Luks:
    """An encrypted volume: its header, and the cipher of its content once it is unlocked."""

    def __init__(self, header: LuksHeader, cipher: SectorCipher | None) -> None:
        self.header = header
        self.cipher = cipher

    def close(self) -> None:
        """Wipe the key."""
        if self.cipher is not None:
            self.cipher.close()
            self.cipher = None


async def create(options: LuksCreateOptions, passphrase: bytes, detached: bool = False) -> tuple[Luks, bytes]:
    """Make a header with a new random key, which `passphrase` opens. Returns the volume, unlocked, and the whole header
    region with the key material, a multiple of 4096 bytes. Takes about twice `options.iter_time`. Raises Error."""
    header, key, region = await hashes.in_thread(_create, options, _phrase(passphrase), detached)
    try:
        return Luks(header, sector_cipher(header, key)), region
    finally:
        wipe(key)


async def read_header(storage: Storage, detached: bool = False) -> LuksHeader:
    """Read and check the header. Raises Error, OSError."""
    return headers.decode(await storage.read(0, headers.HEADER_BYTES), detached)


async def _load_key(header: LuksHeader, storage: Storage, number: int, passphrase: bytes) -> bytearray | None:
    slot = header.slots[number]
    if not slot.active:
        return None
    material = bytearray(await storage.read(slot.offset * SECTOR, header.material_bytes))
    return await hashes.in_thread(_unlock, header, slot, passphrase, material)


async def find_key(header: LuksHeader, storage: Storage, passphrase: bytes) -> bytearray:
    """The master key, from the first slot that `passphrase` opens; whoever gets it wipes it. Raises Error."""
    passphrase = _phrase(passphrase)
    for number in range(headers.SLOTS):
        key = await _load_key(header, storage, number, passphrase)
        if key is not None:
            return key
    raise Error("Invalid password, cannot unlock any keyslot")


async def open_volume(storage: Storage, passphrase: bytes, detached: bool = False) -> Luks:
    """Unlock a volume. Raises Error, OSError."""
    header = await read_header(storage, detached)
    key = await find_key(header, storage, passphrase)
    try:
        return Luks(header, sector_cipher(header, key))
    finally:
        wipe(key)


# --- key slots ---------------------------------------------------------------------------------------------------


def _check_number(keyslot: int, spelling: str) -> None:
    if not 0 <= keyslot < headers.SLOTS:
        number = keyslot & 0xFFFFFFFF if spelling == "u" else keyslot
        raise Error(f"Invalid keyslot {number} specified, must be between 0 and {headers.SLOTS - 1}")


async def add_key(
    header: LuksHeader,
    storage: Storage,
    passphrase: bytes,
    new_passphrase: bytes,
    keyslot: int | None = None,
    iter_time: int | None = None,
    force: bool = False,
) -> None:
    """Let `new_passphrase` open the volume too; `passphrase` is one that does already. `keyslot`: which slot (the first
    free one); `force`: even if that is in use. Raises Error, OSError, and then the slot is what it was, or free.

    On disk: the key material, flushed, before the header that calls the slot active. A slot that is overwritten is free
    meanwhile.
    """
    if keyslot is not None:
        _check_number(keyslot, "u")
    else:
        keyslot = next((number for number, slot in enumerate(header.slots) if not slot.active), None)
        if keyslot is None:
            raise Error("Can't add a keyslot - all keyslots are in use")
    if header.slots[keyslot].active and not force:
        raise Error(f"Refusing to overwrite active keyslot {keyslot} - please erase it first")
    key = await find_key(header, storage, passphrase)
    try:
        offset = header.slots[keyslot].offset
        time = _ITER_TIME if iter_time is None else iter_time
        slot, material = await hashes.in_thread(_new_slot, header, offset, _phrase(new_passphrase), key, time)
    finally:
        wipe(key)
    if header.slots[keyslot].active and len(header.active_slots()) > 1:
        await _erase(header, storage, keyslot)
    await storage.write(offset * SECTOR, material)
    await storage.flush()
    header.slots[keyslot] = slot
    await _write_header(header, storage)


async def _write_header(header: LuksHeader, storage: Storage) -> None:
    await storage.write(0, headers.encode(header))
    await storage.flush()


async def _erase(header: LuksHeader, storage: Storage, number: int) -> None:
    """On disk: first nobody uses the slot, then its material goes."""
    old = header.slots[number]
    header.slots[number] = Slot(False, 0, bytes(headers.SALT_BYTES), old.offset, old.stripes)
    try:
        await _write_header(header, storage)
    except BaseException:
        header.slots[number] = old
        raise
    for _ in range(_ERASE_PASSES):
        await storage.write(old.offset * SECTOR, os.urandom(header.material_bytes))
    await storage.flush()


async def erase_keys(
    header: LuksHeader,
    storage: Storage,
    keyslot: int | None = None,
    old_passphrase: bytes | None = None,
    force: bool = False,
) -> None:
    """Erase the slot `keyslot`, or all that `old_passphrase` opens; with both, the slot only if the passphrase opens
    it. `force`: even if nobody can open the volume any more. Raises Error, OSError."""
    if old_passphrase is not None:
        old_passphrase = _phrase(old_passphrase)
    if keyslot is not None:
        _check_number(keyslot, "i")
        if old_passphrase is not None and not await _opens(header, storage, keyslot, old_passphrase):
            raise Error(f"Given keyslot {keyslot} doesn't contain the given old password for erase operation")
        if not force and not header.slots[keyslot].active:
            raise Error(f"Given keyslot {keyslot} is already erased (inactive) ")
        if not force and len(header.active_slots()) == 1:
            raise Error(
                f"Attempt to erase the only active keyslot {keyslot} which will erase all the data in the image "
                "irreversibly - refusing operation"
            )
        await _erase(header, storage, keyslot)
        return
    if old_passphrase is None:
        raise Error(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be "
            "given"
        )
    found = [n for n in range(headers.SLOTS) if await _opens(header, storage, n, old_passphrase)]
    if not found:
        raise Error("No keyslots match given (old) password for erase operation")
    if not force and len(found) == len(header.active_slots()):
        raise Error(
            "All the active keyslots match the (old) password that was given and erasing them will erase all the data "
            "in the image irreversibly - refusing operation"
        )
    for number in found:
        await _erase(header, storage, number)


async def _opens(header: LuksHeader, storage: Storage, number: int, passphrase: bytes) -> bool:
    key = await _load_key(header, storage, number, passphrase)
    if key is None:
        return False
    wipe(key)
    return True
