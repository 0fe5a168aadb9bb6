"""LUKS headers and key slots, also those that qemu-img makes and reads, and hostile ones."""

from __future__ import annotations

import asyncio
import random
import struct
import traceback
from pathlib import Path
from typing import Any

import pytest

from pyqsd.crypto import hashes, luks
from pyqsd.crypto import luks_header as headers
from pyqsd.crypto.options import (
    LuksCreateOptions,
    QCryptoCipherAlgo,
    QCryptoCipherMode,
    QCryptoHashAlgo,
    QCryptoIVGenAlgo,
)
from pyqsd.qapi.errors import Error
from tests.support.peers import run as run_peer

QUICK = LuksCreateOptions(iter_time=1)


class Memory:
    """A header region in memory that keeps a log of what is written."""

    def __init__(self, region: bytes) -> None:
        self.data = bytearray(region)
        self.log: list[Any] = []

    async def read(self, offset: int, length: int) -> bytes:
        if offset + length > len(self.data):
            raise Error("Request for data outside of extension header")
        return bytes(self.data[offset : offset + length])

    async def write(self, offset: int, data: bytes | bytearray) -> None:
        assert offset + len(data) <= len(self.data)
        self.log.append((offset, len(data)))
        self.data[offset : offset + len(data)] = data

    async def flush(self) -> None:
        self.log.append("flush")


def _create(passphrase: bytes = b"geheim", options: LuksCreateOptions = QUICK) -> tuple[luks.Luks, Memory]:
    volume, region = asyncio.run(luks.create(options, passphrase))
    return volume, Memory(region)


async def _opens(memory: Memory, passphrase: bytes) -> bool:
    try:
        (await luks.open_volume(memory, passphrase)).close()
    except Error as exc:
        assert str(exc) == "Invalid password, cannot unlock any keyslot"
        return False
    return True


def test_create_and_open() -> None:
    volume, memory = _create()
    assert len(memory.data) == 8 * 512 + 8 * 504 * 512 and volume.header.payload_offset * 512 == len(memory.data)
    assert asyncio.run(_opens(memory, b"geheim"))
    # As with QEMU, a passphrase ends at a NUL.
    assert asyncio.run(_opens(memory, b"geheim\0more"))
    assert not asyncio.run(_opens(memory, b"geheim "))
    assert not asyncio.run(_opens(memory, b""))
    again = asyncio.run(luks.open_volume(memory, b"geheim"))
    assert volume.cipher is not None and again.cipher is not None
    plain, one, other = random.Random(1).randbytes(4096), bytearray(4096), bytearray(4096)
    volume.cipher.encrypt(3, plain, one)
    again.cipher.decrypt(3, one, other)
    assert other == plain != one
    assert headers.encode(headers.decode(memory.data)) == memory.data[: headers.HEADER_BYTES]


COMBINATIONS = [
    {},
    {"cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "plain"},
    {"cipher-alg": "aes-192", "cipher-mode": "xts", "hash-alg": "sha512"},
    {"cipher-alg": "aes-256", "cipher-mode": "cbc", "ivgen-alg": "essiv", "hash-alg": "sha1"},
    {"cipher-alg": "aes-128", "cipher-mode": "ctr", "ivgen-alg": "essiv", "ivgen-hash-alg": "sha256"},
    {"cipher-alg": "aes-256", "cipher-mode": "xts", "ivgen-alg": "essiv", "ivgen-hash-alg": "md5"},
    {"cipher-alg": "aes-256", "cipher-mode": "ecb", "hash-alg": "ripemd160"},
    {"cipher-alg": "cast5-128", "cipher-mode": "cbc", "hash-alg": "md5"},
    {"cipher-alg": "cast5-128", "cipher-mode": "ctr", "hash-alg": "sha224"},
    {"cipher-alg": "aes-256", "ivgen-hash-alg": "sha1", "hash-alg": "sha384"},
]


SECRET = ("--object", "secret,id=s,data=sesam")


def _options(chosen: dict[str, str]) -> LuksCreateOptions:
    return LuksCreateOptions(
        cipher_alg=QCryptoCipherAlgo(chosen["cipher-alg"]) if "cipher-alg" in chosen else None,
        cipher_mode=QCryptoCipherMode(chosen["cipher-mode"]) if "cipher-mode" in chosen else None,
        ivgen_alg=QCryptoIVGenAlgo(chosen["ivgen-alg"]) if "ivgen-alg" in chosen else None,
        ivgen_hash_alg=QCryptoHashAlgo(chosen["ivgen-hash-alg"]) if "ivgen-hash-alg" in chosen else None,
        hash_alg=QCryptoHashAlgo(chosen["hash-alg"]) if "hash-alg" in chosen else None,
        iter_time=1,
    )


@pytest.mark.parametrize("chosen", COMBINATIONS, ids=lambda chosen: "-".join(chosen.values()) or "default")
def test_qemu_reads_and_writes_ours(tmp_path: Path, chosen: dict[str, str]) -> None:
    content = random.Random(str(chosen)).randbytes(64 << 10)
    made, region = asyncio.run(luks.create(_options(chosen), b"sesam"))
    assert made.cipher is not None
    out = bytearray(len(content))
    made.cipher.encrypt(0, content, out)
    ours = tmp_path / "ours.luks"
    ours.write_bytes(region + out)
    opened = f"driver=luks,key-secret=s,file.filename={ours}"
    run_peer("qemu-img", "convert", *SECRET, "--image-opts", "-O", "raw", opened, str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == content
    run_peer("qemu-io", *SECRET, "--image-opts", opened, "-c", "write -P 0x5a 1k 40k")
    data = ours.read_bytes()
    made.cipher.decrypt(0, data[len(region) :], out)
    assert out == content[:1024] + b"Z" * (40 << 10) + content[41 << 10 :]


@pytest.mark.parametrize("chosen", [COMBINATIONS[0], COMBINATIONS[3]], ids=("default", "essiv"))
def test_we_read_what_qemu_creates(tmp_path: Path, chosen: dict[str, str]) -> None:
    content = random.Random(str(chosen)).randbytes(64 << 10)
    (tmp_path / "plain").write_bytes(content)
    theirs = tmp_path / "theirs.luks"
    options = ",".join(["key-secret=s", "iter-time=10", *(f"{name}={value}" for name, value in chosen.items())])
    run_peer("qemu-img", "convert", "-O", "luks", *SECRET, "-o", options, str(tmp_path / "plain"), str(theirs))
    data = theirs.read_bytes()
    volume = asyncio.run(luks.open_volume(Memory(data), b"sesam"))
    assert volume.cipher is not None
    out = bytearray(len(content))
    volume.cipher.decrypt(0, data[volume.header.payload_offset * 512 :], out)
    assert out == content
    made, region = asyncio.run(luks.create(_options(chosen), b"sesam"))
    # What names the algorithms is the same to the letter; so are the sizes.
    assert region[:112] == data[:112]
    assert len(region) == volume.header.payload_offset * 512
    assert [slot.offset for slot in made.header.slots] == [slot.offset for slot in volume.header.slots]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (LuksCreateOptions(cipher_alg=QCryptoCipherAlgo.TRIPLE_DES), "Algorithm '3des' not supported"),
        (LuksCreateOptions(cipher_alg=QCryptoCipherAlgo.TWOFISH_256), "Unsupported cipher algorithm twofish-256"),
        (LuksCreateOptions(cipher_alg=QCryptoCipherAlgo.CAST5_128), "Unsupported cipher mode xts"),
        (
            LuksCreateOptions(ivgen_alg=QCryptoIVGenAlgo.ESSIV, ivgen_hash_alg=QCryptoHashAlgo.SHA1),
            "No AES cipher with key size 20 available",
        ),
        (LuksCreateOptions(iter_time=0), "Parameter 'iter-time' expects a value other than zero"),
        (LuksCreateOptions(iter_time=-1), "PBKDF iterations [0-9]+ too large to scale: Numerical result out of range"),
        (
            LuksCreateOptions(iter_time=10**12),
            "PBKDF iterations [0-9]+ larger than 4294967295: Numerical result out of range",
        ),
    ],
)
def test_create_refuses(options: LuksCreateOptions, message: str) -> None:
    with pytest.raises(Error, match=message):
        asyncio.run(luks.create(options, b"x"))


# --- key slots -------------------------------------------------------------------------------------------------------


def test_add_and_erase_keys() -> None:
    volume, memory = _create()
    header = volume.header

    async def go() -> None:
        with pytest.raises(Error, match="Refusing to overwrite active keyslot 0 - please erase it first"):
            await luks.add_key(header, memory, b"geheim", b"zwei", keyslot=0, iter_time=1)
        for number, shown in ((8, "8"), (-1, "4294967295")):
            with pytest.raises(Error, match=f"Invalid keyslot {shown} specified, must be between 0 and 7"):
                await luks.add_key(header, memory, b"geheim", b"zwei", keyslot=number)
        with pytest.raises(Error, match="Invalid password"):
            await luks.add_key(header, memory, b"falsch", b"zwei")
        memory.log.clear()
        await luks.add_key(header, memory, b"geheim", b"zwei", iter_time=1)
        # The material is durable before the header says that there is some.
        assert memory.log == [(header.slots[1].offset * 512, 256000), "flush", (0, 592), "flush"]
        await luks.add_key(header, memory, b"zwei", b"drei", keyslot=5, iter_time=1)
        assert header.active_slots() == [0, 1, 5] == (await luks.read_header(memory)).active_slots()
        for phrase in (b"geheim", b"zwei", b"drei"):
            assert await _opens(memory, phrase)
        with pytest.raises(Error, match="Given keyslot 5 doesn't contain the given old password for erase operation"):
            await luks.erase_keys(header, memory, keyslot=5, old_passphrase=b"zwei")
        with pytest.raises(Error, match=r"Given keyslot 4 is already erased \(inactive\) $"):
            await luks.erase_keys(header, memory, keyslot=4)
        with pytest.raises(Error, match="Invalid keyslot -1 specified, must be between 0 and 7"):
            await luks.erase_keys(header, memory, keyslot=-1)
        with pytest.raises(Error, match="No keyslots match given"):
            await luks.erase_keys(header, memory, old_passphrase=b"vier")
        with pytest.raises(Error, match=r"To erase keyslot\(s\), either"):
            await luks.erase_keys(header, memory)
        old = bytes(memory.data[header.slots[0].offset * 512 :][:256000])
        memory.log.clear()
        await luks.erase_keys(header, memory, old_passphrase=b"geheim")
        # Nobody uses the material any more before it goes.
        assert memory.log[:2] == [(0, 592), "flush"] and memory.log[-1] == "flush" and len(memory.log) == 43
        assert bytes(memory.data[header.slots[0].offset * 512 :][:256000]) != old
        assert not await _opens(memory, b"geheim")
        await luks.erase_keys(header, memory, keyslot=1, old_passphrase=b"zwei")
        with pytest.raises(Error, match="Attempt to erase the only active keyslot 5 which will"):
            await luks.erase_keys(header, memory, keyslot=5)
        with pytest.raises(Error, match="All the active keyslots match"):
            await luks.erase_keys(header, memory, old_passphrase=b"drei")
        assert await _opens(memory, b"drei") and not await _opens(memory, b"zwei")
        for _ in range(7):
            await luks.add_key(header, memory, b"drei", b"mehr", iter_time=1)
        with pytest.raises(Error, match="Can't add a keyslot - all keyslots are in use"):
            await luks.add_key(header, memory, b"drei", b"mehr")
        await luks.add_key(header, memory, b"drei", b"neu", keyslot=5, iter_time=1, force=True)
        assert await _opens(memory, b"neu") and not await _opens(memory, b"drei")
        await luks.erase_keys(header, memory, old_passphrase=b"mehr", force=True)
        await luks.erase_keys(header, memory, old_passphrase=b"neu", force=True)
        assert not header.active_slots() and not await _opens(memory, b"neu")

    asyncio.run(go())


def test_a_cut_while_keys_change() -> None:
    """Whatever was written of an operation, one of the passphrases that were good before it is still good."""
    volume, memory = _create()

    async def go() -> None:
        await luks.add_key(volume.header, memory, b"geheim", b"zwei", iter_time=1)
        states = []

        class Cut(Memory):
            async def write(self, offset: int, data: bytes | bytearray) -> None:
                if len(states) < 8:
                    states.append(bytes(self.data))
                await super().write(offset, data)

        cut = Cut(bytes(memory.data))
        header = await luks.read_header(cut)
        await luks.add_key(header, cut, b"zwei", b"drei", iter_time=1)
        await luks.erase_keys(header, cut, old_passphrase=b"geheim")
        for state in states:
            assert await _opens(Memory(state), b"zwei")
        assert await _opens(cut, b"drei") and not await _opens(cut, b"geheim")

    asyncio.run(go())


# --- hostile ---------------------------------------------------------------------------------------------------------


def _mangled(region: bytes, at: int, data: bytes) -> bytes:
    return region[:at] + data + region[at + len(data) :]


SLOT0 = 208
HOSTILE = [
    (0, b"X", "Volume is not in LUKS format"),
    (6, b"\0\2", "LUKS version 2 is not supported"),
    (8, b"a" * 32, "LUKS header cipher name is not NUL terminated"),
    (40, b"a" * 32, "LUKS header cipher mode is not NUL terminated"),
    (72, b"a" * 32, "LUKS header hash spec is not NUL terminated"),
    (8, b"rot13\0", "Algorithm 'rot13' with key size 32 bytes not supported"),
    (40, b"xts\0", "Unexpected cipher mode string format 'xts'"),
    (40, b"ofb-plain64\0", "Cipher mode 'ofb' not supported"),
    (40, b"xts-plain65\0", "IV generator 'plain65' not supported"),
    (40, b"xts-essiv\0", "Missing IV generator hash specification"),
    (40, b"xts-essiv:sha512\0", "No AES cipher with key size 64 available"),
    (40, b"xts-plain64:abc\0", "Hash algorithm 'abc' not supported"),
    (72, b"SHA256\0", "Hash algorithm 'SHA256' not supported"),
    (104, struct.pack(">I", 7), "LUKS payload is overlapping with the header"),
    (104, struct.pack(">I", 4000), "Keyslot 7 is overlapping with the encrypted payload"),
    (108, struct.pack(">I", 63), "Algorithm 'aes' with key size 31 bytes not supported"),
    (108, struct.pack(">I", 128), "Keyslots 0 and 1 are overlapping in the header"),
    (108, struct.pack(">I", 0), "Algorithm 'aes' with key size 0 bytes not supported"),
    (164, struct.pack(">I", 0), "LUKS key iteration count is zero"),
    (SLOT0, struct.pack(">I", 5), r"Keyslot 0 state \(active/disable\) is corrupted"),
    (SLOT0 + 4, struct.pack(">I", 0), "Keyslot 0 iteration count is zero"),
    (SLOT0 + 40, struct.pack(">I", 0), "Keyslot 0 is overlapping with the LUKS header"),
    (SLOT0 + 40, struct.pack(">I", 600), "Keyslots 0 and 1 are overlapping in the header"),
    (SLOT0 + 44, struct.pack(">I", 0), r"Keyslot 0 is corrupted \(stripes 0 != 4000\)"),
    (SLOT0 + 44, struct.pack(">I", 0xFFFFFFFF), r"Keyslot 0 is corrupted \(stripes -1 != 4000\)"),
]


@pytest.fixture(scope="module")
def region() -> bytes:
    return bytes(_create()[1].data)


@pytest.mark.parametrize(("at", "data", "message"), HOSTILE)
def test_hostile_headers(tmp_path: Path, region: bytes, at: int, data: bytes, message: str) -> None:
    bad = _mangled(region, at, data)
    with pytest.raises(Error, match=message) as caught:
        asyncio.run(luks.open_volume(Memory(bad), b"geheim"))
    path = tmp_path / "bad.luks"
    path.write_bytes(bad + bytes(4096))
    opened = f"driver=luks,key-secret=s,file.filename={path}"
    done = run_peer("qemu-img", "info", "--object", "secret,id=s,data=geheim", "--image-opts", opened, ok=())
    # `info` opens without a key, but with all checks.
    assert str(caught.value) in done.stderr


def test_random_headers_raise_errors_only(region: bytes) -> None:
    rng = random.Random(2)
    for _ in range(3000):
        data = bytearray(region[: headers.HEADER_BYTES])
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(data))
            width = rng.choice((1, 1, 4))
            data[at : at + width] = rng.choice((bytes(width), b"\xff" * width, rng.randbytes(width)))
        try:
            header = headers.decode(data[: rng.choice((headers.HEADER_BYTES, len(data) - rng.randrange(200)))])
        except Error:
            continue
        # What is accepted is small, and inside.
        assert header.material_bytes <= 64 * 4000
        assert len(headers.encode(header)) == headers.HEADER_BYTES


def test_material_outside_of_the_region(region: bytes) -> None:
    # Fits before the payload as the header has it, but the region is shorter.
    bad = _mangled(_mangled(region, 104, b"\x7f\xff\xff\xff"), SLOT0 + 40, struct.pack(">I", 0x7F000000))
    with pytest.raises(Error, match="outside of extension header"):
        asyncio.run(luks.open_volume(Memory(bad), b"geheim"))


def test_huge_iteration_counts_hold_up_nobody(region: bytes) -> None:
    bad = _mangled(region, SLOT0 + 4, struct.pack(">I", 20_000_000))

    async def go() -> None:
        task = asyncio.ensure_future(luks.open_volume(Memory(bad), b"geheim"))
        # The loop goes on, and the caller can give up.
        for _ in range(100):
            await asyncio.sleep(0)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())


def test_more_iterations_than_there_can_be(region: bytes) -> None:
    bad = _mangled(region, SLOT0 + 4, struct.pack(">I", 0xFFFFFFFF))
    with pytest.raises(Error, match="PBKDF iterations 4294967295 larger than 2147483647"):
        asyncio.run(luks.open_volume(Memory(bad), b"geheim"))


def test_errors_do_not_show_passphrases(region: bytes) -> None:
    try:
        asyncio.run(luks.open_volume(Memory(region), b"not-this-one"))
    except Error as exc:
        text = "".join(traceback.format_exception(exc)) + repr(exc.__dict__)
        assert "not-this-one" not in text.replace('b"not-this-one"', "")
    else:
        pytest.fail("opened")
    assert "geheim" not in repr(headers.decode(region))


# --- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", list(QCryptoHashAlgo))
def test_splitter(alg: QCryptoHashAlgo) -> None:
    key = bytearray(random.Random(3).randbytes(61))
    split = hashes.af_split(alg, key, 100)
    assert len(split) == 6100 and hashes.af_merge(alg, split, 61) == key
    split[random.Random(4).randrange(len(split))] ^= 1
    assert hashes.af_merge(alg, split, 61) != key


def test_pbkdf2() -> None:
    # RFC 6070, and RFC 7914, section 11.
    assert hashes.pbkdf2(QCryptoHashAlgo.SHA1, b"password", b"salt", 4096, 20).hex() == (
        "4b007901b765489abead49d926f721d065a429c1"
    )
    assert hashes.pbkdf2(QCryptoHashAlgo.SHA256, b"passwd", b"salt", 1, 64).hex() == (
        "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc"
        "49ca9cccf179b645991664b39d77ef317c71b845b1e30bd509112041d3a19783"
    )
