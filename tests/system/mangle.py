"""qcow2 images with one thing wrong: each field of the header, entries of L1, L2, refcount table and blocks, cut files.

Offsets and values come from the qcow2 specification (docs/interop/qcow2 in QEMU's documentation).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

Patch = Callable[[bytearray], None]

U64 = (1 << 64) - 1
CLUSTER = 65536


def header(name: str, data: bytes) -> int:
    """A field of the header of an image."""
    offset, form = {
        "l1_size": (36, ">I"),
        "l1_offset": (40, ">Q"),
        "refcount_offset": (48, ">Q"),
        "header_length": (100, ">I"),
    }[name]
    return int(struct.unpack_from(form, data, offset)[0])


def put(offset: int, form: str, value: int) -> Patch:
    def patch(data: bytearray) -> None:
        struct.pack_into(">" + form, data, offset, value)

    return patch


def at_table(which: str, index: int, value: int | Callable[[int], int]) -> Patch:
    """An 8-byte entry of the L1 table, the first L2 table, or the refcount table; `value` may be computed from it."""

    def patch(data: bytearray) -> None:
        if which == "l1":
            table = header("l1_offset", data)
        elif which == "l2":
            table = struct.unpack_from(">Q", data, header("l1_offset", data))[0] & 0x00FFFFFFFFFFFE00
        else:
            table = header("refcount_offset", data)
        at = table + 8 * index
        old = struct.unpack_from(">Q", data, at)[0]
        struct.pack_into(">Q", data, at, value(old) & U64 if callable(value) else value)

    return patch


def at_block(index: int, value: int) -> Patch:
    """A 16-bit refcount."""

    def patch(data: bytearray) -> None:
        block = struct.unpack_from(">Q", data, header("refcount_offset", data))[0]
        struct.pack_into(">H", data, block + 2 * index, value)

    return patch


def cut(length: int) -> Patch:
    def patch(data: bytearray) -> None:
        del data[length:]

    return patch


def extension(kind: int, length: int, body: bytes) -> Patch:
    """The first header extension replaced."""

    def patch(data: bytearray) -> None:
        at = header("header_length", data)
        data[at : at + 8 + len(body)] = struct.pack(">II", kind, length) + body

    return patch


def both(*patches: Patch) -> Patch:
    def patch(data: bytearray) -> None:
        for one in patches:
            one(data)

    return patch


def field(name: str, offset: int, form: str, *values: int) -> dict[str, Patch]:
    return {f"{name}={value:#x}": put(offset, form, value) for value in values}


HEADER: dict[str, Patch] = {
    **field("magic", 0, "I", 0, 0x514649FA, U64 & 0xFFFFFFFF),
    **field("version", 4, "I", 0, 1, 2, 4, 0xFFFFFFFF),
    **field("backing-offset", 8, "Q", 1, 100, 104, 0x200, 65536, 1 << 40, 1 << 63, U64),
    "backing-name": both(
        put(8, "Q", 0x300), put(16, "I", 6), lambda data: data.__setitem__(slice(0x300, 0x306), b"nosuch")
    ),
    "backing-name-long": both(put(8, "Q", 0x300), put(16, "I", 1024)),
    "backing-name-outside": both(put(8, "Q", 65530), put(16, "I", 100)),
    "backing-name-in-header": both(put(8, "Q", 8), put(16, "I", 8)),
    "backing-name-empty": both(put(8, "Q", 0x300), put(16, "I", 0)),
    **field("backing-size", 16, "I", 1, 1023, 1024, 0x7FFFFFFF, 0xFFFFFFFF),
    **field("cluster-bits", 20, "I", 0, 8, 9, 15, 17, 21, 22, 31, 32, 63, 0x80000000, 0xFFFFFFFF),
    **field("size", 24, "Q", 0, 1, 511, 1 << 20, 0x400001, 1 << 40, 1 << 53, 1 << 62, 1 << 63, U64, U64 - 511),
    **field("crypt-method", 32, "I", 1, 2, 3, 0xFFFFFFFF),
    **field("l1-size", 36, "I", 0, 2, 1000, 0x400000, 0x7FFFFFFF, 0xFFFFFFFF),
    **field("l1-offset", 40, "Q", 0, 1, 512, 65536, 100000, 1 << 30, 1 << 56, 1 << 63, U64, U64 - 65535),
    **field("refcount-offset", 48, "Q", 0, 1, 512, 196608, 1 << 30, 1 << 63, U64, U64 - 65535),
    **field("refcount-clusters", 56, "I", 0, 2, 1000, 129, 0x7FFFFFFF, 0xFFFFFFFF),
    **field("snapshots", 60, "I", 1, 65536, 65537, 0xFFFFFFFF),
    **field("snapshots-offset", 64, "Q", 1, 512, 65536, 1 << 40, 1 << 63, U64),
    "snapshot-nowhere": both(put(60, "I", 1), put(64, "Q", 1 << 20)),
    "snapshot-in-zeroes": both(put(60, "I", 1), put(64, "Q", 65536 * 2)),
    "snapshot-garbage": both(put(60, "I", 3), put(64, "Q", 65536)),
    **{f"incompatible-bit-{bit}": put(72, "Q", 1 << bit) for bit in (0, 1, 2, 3, 4, 5, 6, 31, 63)},
    "incompatible-all": put(72, "Q", U64),
    **{f"compatible-bit-{bit}": put(80, "Q", 1 << bit) for bit in (0, 1, 63)},
    **{f"autoclear-bit-{bit}": put(88, "Q", 1 << bit) for bit in (0, 1, 2, 63)},
    **field("refcount-order", 96, "I", 0, 3, 5, 6, 7, 32, 0xFFFFFFFF),
    **field("header-length", 100, "I", 0, 71, 72, 103, 104, 105, 111, 112, 120, 4096, 65536, 65537, 0xFFFFFFFF),
    **field("compression-type", 104, "B", 1, 2, 255),
    "compression-type-zstd": both(put(72, "Q", 8), put(104, "B", 1)),
    "compression-type-2": both(put(72, "Q", 8), put(104, "B", 2)),
    "compression-bit-alone": both(put(72, "Q", 8), put(104, "B", 0)),
    "extension-unknown": extension(0x12345678, 16, b"x" * 16),
    "extension-huge": extension(0x12345678, 0xFFFFFFFF, b"x" * 16),
    "extension-too-long": extension(0x12345678, 70000, b"x" * 16),
    "extension-end-long": extension(0, 70000, b""),
    "extension-backing-format-long": extension(0xE2792ACA, 1000, b"x" * 16),
    "extension-backing-format": extension(0xE2792ACA, 5, b"nosuc\0\0\0"),
    "extension-bitmaps-short": extension(0x23852875, 8, b"x" * 8),
    "extension-bitmaps": both(put(88, "Q", 1), extension(0x23852875, 24, b"\xff" * 24)),
    "extension-bitmaps-nowhere": both(
        put(88, "Q", 1), extension(0x23852875, 24, struct.pack(">IIQQ", 1, 0, 64, 1 << 30))
    ),
    "extension-crypto": extension(0x0537BE77, 16, b"\xff" * 16),
    "extension-data-file": extension(0x44415441, 8, b"raw.img\0"),
    "extension-features-odd": extension(0x6803F857, 17, b"x" * 24),
}

L1: dict[str, Patch] = {
    f"l1-{name}": at_table("l1", 0, value)
    for name, value in {
        "zero": 0,
        "unaligned": lambda old: old + 512,
        "unaligned-small": lambda old: old | 1,
        "reserved-low": lambda old: old | 0x100,
        "reserved-high": lambda old: old | 1 << 60,
        "no-copied": lambda old: old & ~(1 << 63),
        "beyond-end": 1 << 63 | 1 << 40,
        "huge": U64,
        "header": 1 << 63,
        "onto-refcount-table": 1 << 63 | 65536,
        "onto-refcount-block": 1 << 63 | 131072,
        "onto-l1": 1 << 63 | 196608,
    }.items()
}

L2: dict[str, Patch] = {
    f"l2-{name}": at_table("l2", 1, value)
    for name, value in {
        "zero": 0,
        "zero-flag": 1,
        "allocated-zero": lambda old: old | 1,
        "unaligned": lambda old: old + 512,
        "reserved-low": lambda old: old | 2,
        "reserved-high": lambda old: old | 1 << 60,
        "no-copied": lambda old: old & ~(1 << 63),
        "beyond-end": 1 << 63 | 1 << 40,
        "huge": (1 << 62) - 1,
        "copied-nowhere": 1 << 63,
        "onto-refcount-table": 1 << 63 | 65536,
        "onto-refcount-block": 1 << 63 | 131072,
        "onto-l1": 1 << 63 | 196608,
        "onto-l2": 1 << 63 | 262144,
        "compressed-nowhere": 1 << 62 | 1 << 50,
        "compressed-garbage": 1 << 62 | 5 * 65536,
        "compressed-header": 1 << 62,
        "compressed-far": 1 << 62 | 1 << 61 | 1 << 40,
        "all-ones": U64,
    }.items()
}

REFCOUNT: dict[str, Patch] = {
    **{
        f"rt-{name}": at_table("rt", 0, value)
        for name, value in {
            "zero": 0,
            "unaligned": lambda old: old + 512,
            "reserved": lambda old: old | 1,
            "beyond-end": 1 << 40,
            "huge": U64 - 0x1FF,
            "header": 0x0,
            "onto-itself": 65536,
            "onto-l1": 196608,
        }.items()
    },
    **{f"refcount-{index}-of-{value}": at_block(index, value) for index in (0, 2, 4, 5, 9) for value in (0, 2, 0xFFFF)},
    "refcounts-all-zero": lambda data: [at_block(index, 0)(data) for index in range(16)] and None,
}

CUT: dict[str, Patch] = {
    f"cut-at-{length}": cut(length)
    for length in (
        0,
        1,
        3,
        4,
        71,
        72,
        103,
        104,
        111,
        112,
        511,
        512,
        65535,
        65536,
        131072,
        196608,
        196616,
        262144,
        327680,
        400000,
    )
}


def packed(data: bytes, sectors: int, offset: int = 5 * CLUSTER + 100, zstd: bool = False) -> Patch:
    """The second cluster is compressed: `data` at `offset`, and the entry says that it reaches over so many more
    sectors."""

    def patch(image: bytearray) -> None:
        if zstd:
            both(put(72, "Q", 8), put(104, "B", 1))(image)
        image[offset : offset + len(data)] = data
        at_table("l2", 1, 1 << 62 | sectors << 54 | offset)(image)

    return patch


def deflated(size: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    return packer.compress(bytes(size)) + packer.flush()


def zstd_frame(size: int, said: int) -> bytes:
    """A frame (RFC 8878) of `size` bytes in run-length blocks, at most 128 KiB each, that says that it has `said`."""
    blocks = [min(size - at, 1 << 17) for at in range(0, size, 1 << 17)]
    body = b"".join(
        struct.pack("<I", length << 3 | 1 << 1 | (number == len(blocks) - 1))[:3] + b"z"
        for number, length in enumerate(blocks)
    )
    return struct.pack("<IBBQ", 0xFD2FB528, 0xC0, 0x58, said) + body


COMPRESSED: dict[str, Patch] = {
    f"compressed-{name}": patch
    for name, patch in {
        "whole": packed(deflated(CLUSTER), 1),
        "long": packed(deflated(CLUSTER + 1), 1),
        "bomb": packed(deflated(16 << 20), 40),
        "short": packed(deflated(CLUSTER - 1), 1),
        "empty": packed(deflated(0), 1),
        "cut": packed(deflated(CLUSTER)[:-20] + b"\xff" * 600, 0),
        "stored": packed(b"\1\0\1\xff\xfe" + b"s" * 256 + b"\1" * 300, 1),
        "zlib-header": packed(zlib.compress(bytes(CLUSTER)), 1),
        "random": packed(bytes(range(7, 256)), 1),
        "sectors-most": packed(deflated(CLUSTER), 255),
        "end-of-file": packed(b"", 200, 6 * CLUSTER),
        "over-the-end": packed(deflated(CLUSTER), 255, 7 * CLUSTER - 1000),
        "into-refcounts": packed(b"", 0, 2 * CLUSTER),
        "into-l2": packed(b"", 3, 4 * CLUSTER + 8),
        "into-l1": packed(b"", 0, 3 * CLUSTER),
        "zstd-whole": packed(zstd_frame(CLUSTER, CLUSTER), 1, zstd=True),
        "zstd-two": packed(zstd_frame(CLUSTER // 2, CLUSTER // 2) * 2, 1, zstd=True),
        "zstd-short": packed(zstd_frame(1000, 1000), 1, zstd=True),
        "zstd-says-more": packed(zstd_frame(CLUSTER, CLUSTER + 1), 1, zstd=True),
        "zstd-says-huge": packed(zstd_frame(CLUSTER, 1 << 62), 1, zstd=True),
        "zstd-bomb": packed(zstd_frame(16 << 20, 16 << 20), 2, zstd=True),
        "zstd-garbage": packed(b"\x28\xb5\x2f\xfd" + b"\xff" * 200, 1, zstd=True),
        "zstd-is-zlib": packed(deflated(CLUSTER), 1, zstd=True),
    }.items()
}

GROUPS = {"compressed": COMPRESSED, "header": HEADER, "l1": L1, "l2": L2, "refcount": REFCOUNT, "cut": CUT}


def write(path: Path, source: bytes, patch: Patch) -> None:
    data = bytearray(source)
    patch(data)
    path.write_bytes(data)
