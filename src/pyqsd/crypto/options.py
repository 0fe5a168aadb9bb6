"""The words in which QAPI speaks of encrypted images (QEMU qapi/crypto)."""

from __future__ import annotations

from enum import StrEnum

from pyqsd.qapi.types import Struct


class QCryptoCipherAlgo(StrEnum):
    """Block ciphers. Names with a number of bits have keys of that length."""

    AES_128 = "aes-128"
    AES_192 = "aes-192"
    AES_256 = "aes-256"
    DES = "des"
    TRIPLE_DES = "3des"
    CAST5_128 = "cast5-128"
    SERPENT_128 = "serpent-128"
    SERPENT_192 = "serpent-192"
    SERPENT_256 = "serpent-256"
    TWOFISH_128 = "twofish-128"
    TWOFISH_192 = "twofish-192"
    TWOFISH_256 = "twofish-256"
    SM4 = "sm4"


class QCryptoCipherMode(StrEnum):
    """How a block cipher works on many blocks."""

    ECB = "ecb"
    CBC = "cbc"
    XTS = "xts"
    CTR = "ctr"


class QCryptoIVGenAlgo(StrEnum):
    """How the number of a sector becomes its initialization vector: its 32 bits, its 64 bits, or these encrypted with
    a hash of the key."""

    PLAIN = "plain"
    PLAIN64 = "plain64"
    ESSIV = "essiv"


class QCryptoHashAlgo(StrEnum):
    """Hash functions."""

    MD5 = "md5"
    SHA1 = "sha1"
    SHA224 = "sha224"
    SHA256 = "sha256"
    SHA384 = "sha384"
    SHA512 = "sha512"
    RIPEMD160 = "ripemd160"
    SM3 = "sm3"


class QCryptoBlockInfoLUKSSlot(Struct, kw_only=True):
    """A key slot: the iterations of its key derivation, the stripes of its key material, and where that begins in the
    LUKS header (bytes)."""

    active: bool
    iters: int | None = None
    stripes: int | None = None
    key_offset: int


class QCryptoBlockInfoLUKS(Struct, kw_only=True):
    """What a LUKS header says."""

    cipher_alg: QCryptoCipherAlgo
    cipher_mode: QCryptoCipherMode
    ivgen_alg: QCryptoIVGenAlgo
    ivgen_hash_alg: QCryptoHashAlgo | None = None
    hash_alg: QCryptoHashAlgo
    detached_header: bool
    payload_offset: int
    master_key_iters: int
    uuid: str
    slots: list[QCryptoBlockInfoLUKSSlot]


class LuksCreateOptions(Struct, kw_only=True):
    """How a LUKS header is to be made; the members of ``QCryptoBlockCreateOptionsLUKS`` but for ``key-secret``.
    `iter_time`: milliseconds that deriving a key may take (2000)."""

    cipher_alg: QCryptoCipherAlgo | None = None
    cipher_mode: QCryptoCipherMode | None = None
    ivgen_alg: QCryptoIVGenAlgo | None = None
    ivgen_hash_alg: QCryptoHashAlgo | None = None
    hash_alg: QCryptoHashAlgo | None = None
    iter_time: int | None = None


class QCryptoBlockLUKSKeyslotState(StrEnum):
    """What a key slot shall become."""

    ACTIVE = "active"
    INACTIVE = "inactive"
