"""The header of LUKS1: bytes in, checked struct out, and back. No I/O happens here.

Source: LUKS1 On-Disk Format Specification 1.2.3, sections 4 (layout) and 6 (header, constants). The checks and their
words are QEMU's, which is stricter than the specification: stripes are 4000, and no two slots may overlap.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pyqsd.crypto.cipher import KEY_BYTES
from pyqsd.crypto.hashes import digest_bytes
from pyqsd.crypto.options import (
    QCryptoBlockInfoLUKS,
    QCryptoBlockInfoLUKSSlot,
    QCryptoCipherAlgo,
    QCryptoCipherMode,
    QCryptoHashAlgo,
    QCryptoIVGenAlgo,
)
from pyqsd.qapi.errors import Error

MAGIC = b"LUKS\xba\xbe"
SECTOR = 512
SLOTS = 8
STRIPES = 4000
SALT_BYTES = 32
DIGEST_BYTES = 20
ACTIVE = 0x00AC71F3
INACTIVE = 0x0000DEAD
#: Key material begins here at the earliest, and is aligned so much (sectors).
SLOTS_FROM = 8

_HEADER = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
#: The header without the key material.
HEADER_BYTES = _HEADER.size + SLOTS * _SLOT.size

#: What a header calls the ciphers, with the lengths of their keys in bytes.
_CIPHERS = {
    "aes": (QCryptoCipherAlgo.AES_128, QCryptoCipherAlgo.AES_192, QCryptoCipherAlgo.AES_256),
    "cast5": (QCryptoCipherAlgo.CAST5_128,),
    "serpent": (QCryptoCipherAlgo.SERPENT_128, QCryptoCipherAlgo.SERPENT_192, QCryptoCipherAlgo.SERPENT_256),
    "twofish": (QCryptoCipherAlgo.TWOFISH_128, QCryptoCipherAlgo.TWOFISH_192, QCryptoCipherAlgo.TWOFISH_256),
}


@dataclass
class Slot:
    """A key slot. `offset`: where its key material begins, sectors."""

    active: bool
    iterations: int
    salt: bytes
    offset: int
    stripes: int


@dataclass
class LuksHeader:
    """A decoded and checked header. `payload_offset`: where the encrypted data begins, sectors; `key_bytes`: the length
    of the master key."""

    cipher_name: str
    cipher_mode_spec: str
    hash_spec: str
    payload_offset: int
    key_bytes: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: list[Slot]
    cipher_alg: QCryptoCipherAlgo = QCryptoCipherAlgo.AES_256
    cipher_mode: QCryptoCipherMode = QCryptoCipherMode.XTS
    ivgen_alg: QCryptoIVGenAlgo = QCryptoIVGenAlgo.PLAIN64
    ivgen_hash_alg: QCryptoHashAlgo | None = None
    #: The cipher of essiv's vectors.
    ivgen_cipher_alg: QCryptoCipherAlgo = QCryptoCipherAlgo.AES_256
    hash_alg: QCryptoHashAlgo = QCryptoHashAlgo.SHA256

    @property
    def material_bytes(self) -> int:
        """The size of the key material of a slot."""
        return self.key_bytes * STRIPES

    def active_slots(self) -> list[int]:
        """The numbers of the slots that have a key."""
        return [number for number, slot in enumerate(self.slots) if slot.active]

    def info(self) -> QCryptoBlockInfoLUKS:
        """What QMP says of it."""
        essiv = self.ivgen_alg == QCryptoIVGenAlgo.ESSIV
        return QCryptoBlockInfoLUKS(
            cipher_alg=self.cipher_alg,
            cipher_mode=self.cipher_mode,
            ivgen_alg=self.ivgen_alg,
            ivgen_hash_alg=self.ivgen_hash_alg if essiv else None,
            hash_alg=self.hash_alg,
            detached_header=self.payload_offset == 0,
            payload_offset=self.payload_offset * SECTOR,
            master_key_iters=self.digest_iterations,
            uuid=self.uuid,
            slots=[
                QCryptoBlockInfoLUKSSlot(
                    active=slot.active,
                    iters=slot.iterations if slot.active else None,
                    stripes=slot.stripes if slot.active else None,
                    key_offset=slot.offset * SECTOR,
                )
                for slot in self.slots
            ],
        )


def has_format(first: bytes | bytearray) -> bool:
    """Whether a file that begins with `first` has a LUKS1 header."""
    return first[:6] == MAGIC and int.from_bytes(first[6:8], "big") == 1


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def _terminated(raw: bytes, what: str) -> str:
    if b"\0" not in raw:
        raise Error(f"LUKS header {what} is not NUL terminated")
    return _text(raw)


def material_sectors(key_bytes: int) -> int:
    """The room of a slot's key material, sectors."""
    sectors = -(-key_bytes * STRIPES // SECTOR)
    return -(-sectors // SLOTS_FROM) * SLOTS_FROM


def decode(data: bytes | bytearray, detached: bool = False) -> LuksHeader:
    """Decode and check a header from its first `HEADER_BYTES`. `detached`: the payload is elsewhere, so that nothing
    can overlap it. Raises Error."""
    data = bytes(data[:HEADER_BYTES]).ljust(HEADER_BYTES, b"\0")
    magic, version, cipher, mode, hash_spec, payload, key_bytes, mk_digest, salt, iterations, uuid = (
        _HEADER.unpack_from(data)
    )
    if magic != MAGIC:
        raise Error("Volume is not in LUKS format")
    if version != 1:
        raise Error(f"LUKS version {version} is not supported")
    name = _terminated(cipher, "cipher name")
    mode_spec = _terminated(mode, "cipher mode")
    hash_name = _terminated(hash_spec, "hash spec")
    if not detached and payload < SLOTS_FROM:
        raise Error("LUKS payload is overlapping with the header")
    if not iterations:
        raise Error("LUKS key iteration count is zero")
    raw = [_SLOT.unpack_from(data, _HEADER.size + number * _SLOT.size) for number in range(SLOTS)]
    _check_slots(raw, material_sectors(key_bytes), None if detached else payload)
    slots = [Slot(state == ACTIVE, *rest) for state, *rest in raw]
    header = LuksHeader(name, mode_spec, hash_name, payload, key_bytes, mk_digest, salt, iterations, _text(uuid), slots)
    _parse_names(header)
    return header


def _check_slots(raw: list[tuple[int, int, bytes, int, int]], room: int, payload: int | None) -> None:
    for number, (state, iterations, _, offset, stripes) in enumerate(raw):
        if stripes != STRIPES:
            signed = stripes - (stripes >> 31 << 32)
            raise Error(f"Keyslot {number} is corrupted (stripes {signed} != {STRIPES})")
        if state not in (ACTIVE, INACTIVE):
            raise Error(f"Keyslot {number} state (active/disable) is corrupted")
        if state == ACTIVE and not iterations:
            raise Error(f"Keyslot {number} iteration count is zero")
        if offset < SLOTS_FROM:
            raise Error(f"Keyslot {number} is overlapping with the LUKS header")
        if payload is not None and offset + room > payload:
            raise Error(f"Keyslot {number} is overlapping with the encrypted payload")
        for other in range(number + 1, SLOTS):
            start = raw[other][3]
            if offset < start + room and start < offset + room:
                raise Error(f"Keyslots {number} and {other} are overlapping in the header")


def _hash(name: str) -> QCryptoHashAlgo:
    try:
        return QCryptoHashAlgo(name)
    except ValueError:
        raise Error(f"Hash algorithm '{name}' not supported") from None


def _parse_names(header: LuksHeader) -> None:
    """The cipher mode is spelt ``mode-ivgen[:hash]``. Raises Error."""
    spec = header.cipher_mode_spec
    mode, dash, ivgen = spec.partition("-")
    if not dash:
        raise Error(f"Unexpected cipher mode string format '{spec}'")
    ivgen, colon, ivgen_hash = ivgen.partition(":")
    if colon:
        header.ivgen_hash_alg = _hash(ivgen_hash)
    try:
        header.cipher_mode = QCryptoCipherMode(mode)
    except ValueError:
        raise Error(f"Cipher mode '{mode}' not supported") from None
    size = header.key_bytes // 2 if header.cipher_mode == QCryptoCipherMode.XTS else header.key_bytes
    for alg in _CIPHERS.get(header.cipher_name, ()):
        if KEY_BYTES[alg] == size:
            header.cipher_alg = alg
            break
    else:
        size -= size >> 31 << 32
        raise Error(f"Algorithm '{header.cipher_name}' with key size {size} bytes not supported")
    header.hash_alg = _hash(header.hash_spec)
    try:
        header.ivgen_alg = QCryptoIVGenAlgo(ivgen)
    except ValueError:
        raise Error(f"IV generator '{ivgen}' not supported") from None
    header.ivgen_cipher_alg = header.cipher_alg
    if header.ivgen_alg == QCryptoIVGenAlgo.ESSIV:
        if header.ivgen_hash_alg is None:
            raise Error("Missing IV generator hash specification")
        header.ivgen_cipher_alg = essiv_cipher(header.cipher_alg, digest_bytes(header.ivgen_hash_alg))


def encode(header: LuksHeader) -> bytes:
    """The first `HEADER_BYTES` of the LUKS header."""
    data = _HEADER.pack(
        MAGIC,
        1,
        header.cipher_name.encode(),
        header.cipher_mode_spec.encode(),
        header.hash_spec.encode(),
        header.payload_offset,
        header.key_bytes,
        header.digest,
        header.digest_salt,
        header.digest_iterations,
        header.uuid.encode("utf-8", "replace"),
    )
    for slot in header.slots:
        state = ACTIVE if slot.active else INACTIVE
        data += _SLOT.pack(state, slot.iterations, slot.salt, slot.offset, slot.stripes)
    return data


def cipher_name(alg: QCryptoCipherAlgo) -> str:
    """What a header calls a cipher. Raises Error when it has no name for it."""
    for name, members in _CIPHERS.items():
        if alg in members:
            return name
    raise Error(f"Algorithm '{alg}' not supported")


_FAMILIES = (
    ("AES", _CIPHERS["aes"]),
    ("Serpent", _CIPHERS["serpent"]),
    ("Twofish", _CIPHERS["twofish"]),
)


def essiv_cipher(alg: QCryptoCipherAlgo, hash_bytes: int) -> QCryptoCipherAlgo:
    """The cipher for essiv's vectors, whose key is a digest of `hash_bytes`: the one of the same family that has such
    keys. Raises Error when there is none."""
    if KEY_BYTES[alg] == hash_bytes:
        return alg
    for name, members in _FAMILIES:
        if alg in members:
            for member in members:
                if KEY_BYTES[member] == hash_bytes:
                    return member
            raise Error(f"No {name} cipher with key size {hash_bytes} available")
    raise Error(f"Cipher {alg} not supported with essiv")
