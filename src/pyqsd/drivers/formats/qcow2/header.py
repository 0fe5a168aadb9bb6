"""The header of a qcow2 image and its extensions: bytes in, checked struct out, and back.

Source: QEMU docs/interop/qcow2, sections "Header", "Additional fields", "Header extensions". No I/O happens here, and
every field is checked before anything relies on it. Errors have QSD's words. Offsets and sizes are bytes.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from pyqsd.qapi.errors import Error

MAGIC = b"QFI\xfb"

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MAX_L1_BYTES = 32 << 20
MAX_REFTABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
SNAPSHOT_HEADER_BYTES = 40
MAX_BACKING_NAME = 1023

V2_HEADER_BYTES = 72
#: Refcounts have 16 bits there.
V2_REFCOUNT_ORDER = 4
V3_HEADER_BYTES = 104
#: The header that we write, with the compression type.
HEADER_BYTES = 112

INCOMPAT_DIRTY = 1 << 0
INCOMPAT_CORRUPT = 1 << 1
INCOMPAT_DATA_FILE = 1 << 2
INCOMPAT_COMPRESSION = 1 << 3
INCOMPAT_EXTENDED_L2 = 1 << 4
INCOMPAT_KNOWN = INCOMPAT_DIRTY | INCOMPAT_CORRUPT | INCOMPAT_DATA_FILE | INCOMPAT_COMPRESSION | INCOMPAT_EXTENDED_L2
COMPAT_LAZY_REFCOUNTS = 1 << 0
AUTOCLEAR_BITMAPS = 1 << 0
AUTOCLEAR_RAW_DATA = 1 << 1

COMPRESSION_ZLIB = 0
COMPRESSION_ZSTD = 1

CRYPT_NONE = 0
CRYPT_AES = 1
CRYPT_LUKS = 2

EXT_END = 0x00000000
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_TABLE = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_CRYPTO = 0x0537BE77
EXT_DATA_FILE = 0x44415441

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_EXT = struct.Struct(">II")
_BITMAPS_BYTES = 24
_FEATURE = struct.Struct(">BB46s")

#: Clusters up to this size (bytes) are kept for more important things than the feature name table, as QEMU does.
_NO_NAMES_UP_TO = 4096
#: What we call the features in the feature name table: (type, bit, name).
_FEATURE_NAMES = (
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"),
    (1, 0, b"lazy refcounts"),
    (2, 0, b"bitmaps"),
    (2, 1, b"raw external data"),
)


@dataclass
class BitmapsExtension:
    """The bitmaps extension: how many bitmaps, and where their directory is."""

    count: int
    directory_size: int
    directory_offset: int


@dataclass
class Header:
    """A decoded header. `extensions` keeps every extension in its order, also those that nobody here knows, so that
    they survive a rewrite; `unknown_fields` are the bytes of the header beyond the fields known here. `bitmaps` is what
    the bitmaps extension says, None if there is none or it is not valid; a rewrite goes by it alone. `bitmaps_error`:
    what is wrong with it, in a header that was decoded to be checked."""

    version: int
    backing_offset: int
    backing_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_offset: int
    reftable_offset: int
    reftable_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = V2_HEADER_BYTES
    compression_type: int = COMPRESSION_ZLIB
    unknown_fields: bytes = b""
    extensions: list[tuple[int, bytes]] = field(default_factory=list)
    backing_file: str | None = None
    bitmaps: BitmapsExtension | None = None
    bitmaps_error: str | None = None

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def data_file(self) -> str | None:
        """The name of the external data file; None if the image names none."""
        data = self.extension(EXT_DATA_FILE)
        return None if data is None else os_decode(data.split(b"\0", 1)[0])

    @property
    def backing_format(self) -> str | None:
        data = self.extension(EXT_BACKING_FORMAT)
        return None if data is None else os_decode(data)

    def extension(self, magic: int) -> bytes | None:
        """The data of the last extension of this type, or None."""
        found = None
        for kind, data in self.extensions:
            if kind == magic:
                found = data
        return found


def hexed(number: int) -> str:
    """A number as messages have it: C's ``%#x``, which has no prefix for zero."""
    return f"{number:#x}" if number else "0"


def os_decode(data: bytes) -> str:
    """A name in an image as text; any byte survives the way back (`os_encode`)."""
    return data.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def os_encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def shown(name: str) -> str:
    """A name in an image as people see it."""
    return os_encode(name).decode("utf-8", "replace")


def probe(buf: bytes) -> int:
    """100 if `buf` (the beginning of a file) is that of a qcow2 image, else 0."""
    return 100 if len(buf) >= 8 and buf[:4] == MAGIC and int.from_bytes(buf[4:8], "big") in (2, 3) else 0


def decode(first: bytes | bytearray, check_only: bool = False) -> Header:
    """Decode and check the fixed fields of the header from the first bytes of the image (at least the first cluster,
    as far as the file has it). With `check_only` it may say that there is no refcount table, or too many snapshots: a
    check deals with these. Raises Error.

    Extensions and the backing file name are decoded by `decode_extensions` and `decode_backing_file`.
    """
    first = bytes(first)
    if len(first) < V2_HEADER_BYTES:
        # Reads beyond the end of a file give zeroes.
        first = first.ljust(V2_HEADER_BYTES, b"\0")
    (
        magic,
        version,
        backing_offset,
        backing_size,
        cluster_bits,
        size,
        crypt_method,
        l1_size,
        l1_offset,
        reftable_offset,
        reftable_clusters,
        nb_snapshots,
        snapshots_offset,
    ) = _V2.unpack_from(first)
    if magic != MAGIC:
        raise Error("Image is not in qcow2 format", errno.EINVAL)
    if version not in (2, 3):
        raise Error(f"Unsupported qcow2 version {version}", errno.ENOTSUP)
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise Error(f"Unsupported cluster size: 2^{cluster_bits}", errno.EINVAL)
    header = Header(
        version,
        backing_offset,
        backing_size,
        cluster_bits,
        size,
        crypt_method,
        l1_size,
        l1_offset,
        reftable_offset,
        reftable_clusters,
        nb_snapshots,
        snapshots_offset,
    )
    cluster_size = 1 << cluster_bits
    if version >= 3:
        first = first.ljust(V3_HEADER_BYTES, b"\0")
        (
            header.incompatible,
            header.compatible,
            header.autoclear,
            header.refcount_order,
            header.header_length,
        ) = _V3.unpack_from(first, V2_HEADER_BYTES)
        if header.header_length < V3_HEADER_BYTES:
            raise Error("qcow2 header too short", errno.EINVAL)
    if header.header_length > cluster_size:
        raise Error("qcow2 header exceeds cluster size", errno.EINVAL)
    first = first.ljust(header.header_length, b"\0")
    if header.header_length > V3_HEADER_BYTES:
        header.compression_type = first[104]
    if header.header_length > HEADER_BYTES:
        header.unknown_fields = first[HEADER_BYTES : header.header_length]
    if header.backing_offset > cluster_size:
        raise Error("Invalid backing file offset", errno.EINVAL)
    _check_compression(header)
    unknown = header.incompatible & ~INCOMPAT_KNOWN
    if unknown:
        raise Error(f"Unsupported qcow2 feature(s): {_feature_names(header, first, unknown)}", errno.ENOTSUP)
    if header.incompatible & INCOMPAT_EXTENDED_L2 and cluster_bits < 14:
        raise Error(f"Unsupported subcluster size: {cluster_size // 32}", errno.EINVAL)
    if header.refcount_order > 6:
        raise Error("Reference count entry width too large; may not exceed 64 bits", errno.EINVAL)
    if header.crypt_method > CRYPT_LUKS:
        method = header.crypt_method - (header.crypt_method >> 31 << 32)
        raise Error(f"Unsupported encryption method {method}", errno.EINVAL)
    _check_tables(header, check_only)
    return header


def _check_compression(header: Header) -> None:
    kind = header.compression_type
    if kind not in (COMPRESSION_ZLIB, COMPRESSION_ZSTD):
        raise Error(f"qcow2: unknown compression type: {kind}", errno.ENOTSUP)
    marked = bool(header.incompatible & INCOMPAT_COMPRESSION)
    if kind == COMPRESSION_ZLIB and marked:
        raise Error("qcow2: Compression type incompatible feature bit must not be set", errno.EINVAL)
    if kind != COMPRESSION_ZLIB and not marked:
        raise Error("qcow2: Compression type incompatible feature bit must be set", errno.EINVAL)


def check_table(header: Header, offset: int, entries: int, entry_bytes: int, limit: int, name: str) -> None:
    """Refuse a table that is larger than `limit` bytes or lies where none can be. Raises Error."""
    if entries > limit // entry_bytes:
        raise Error(f"{name} too large", errno.EFBIG)
    if offset & (header.cluster_size - 1) or offset + entries * entry_bytes > (1 << 63) - 1:
        raise Error(f"{name} offset invalid", errno.EINVAL)


def l2_bits(header: Header) -> int:
    """Bits of a guest cluster index that select the entry in an L2 table."""
    return header.cluster_bits - (4 if header.incompatible & INCOMPAT_EXTENDED_L2 else 3)


def l1_entries_for(header: Header, size: int) -> int:
    """How many L1 entries a disk of `size` bytes needs."""
    shift = header.cluster_bits + l2_bits(header)
    return ((size + (1 << shift) - 1) & ((1 << 64) - 1)) >> shift


def _check_tables(header: Header, check_only: bool) -> None:
    if header.reftable_clusters == 0 and not check_only:
        raise Error("Image does not contain a reference count table", errno.EINVAL)
    check_table(
        header,
        header.reftable_offset,
        header.reftable_clusters << (header.cluster_bits - 3),
        8,
        MAX_REFTABLE_BYTES,
        "Reference count table",
    )
    check_table(
        header,
        header.snapshots_offset,
        min(header.nb_snapshots, MAX_SNAPSHOTS) if check_only else header.nb_snapshots,
        SNAPSHOT_HEADER_BYTES,
        SNAPSHOT_HEADER_BYTES * MAX_SNAPSHOTS,
        "Snapshot table",
    )
    check_table(header, header.l1_offset, header.l1_size, 8, MAX_L1_BYTES, "Active L1 table")
    needed = l1_entries_for(header, header.size)
    if needed > (1 << 31) - 1:
        raise Error("Image is too big", errno.EFBIG)
    if header.l1_size < needed:
        raise Error("L1 table is too small", errno.EINVAL)


def _extension_area(header: Header) -> tuple[int, int]:
    end = header.backing_offset if header.backing_offset else header.cluster_size
    return header.header_length, end


def _walk(first: bytes, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    at = start
    while at < end:
        head = first[at : at + 8].ljust(8, b"\0")
        magic, length = _EXT.unpack(head)
        at += 8
        # The end has a length, too.
        if at > end or length > end - at:
            raise Error("Header extension too large", errno.EINVAL)
        if magic == EXT_END:
            break
        yield magic, first[at : at + length].ljust(length, b"\0")
        at += (length + 7) & ~7


def _feature_names(header: Header, first: bytes, unknown: int) -> str:
    table: dict[int, str] = {}
    start, end = _extension_area(header)
    try:
        for magic, data in _walk(first.ljust(header.cluster_size, b"\0"), start, end):
            if magic == EXT_FEATURE_TABLE:
                for at in range(0, len(data) - 47, 48):
                    kind, bit, name = _FEATURE.unpack_from(data, at)
                    if kind == 0 and bit < 64:
                        table.setdefault(bit, name.split(b"\0", 1)[0].decode("utf-8", "replace"))
    except Error:
        pass
    names = []
    rest = unknown
    for bit in range(64):
        if unknown >> bit & 1 and table.get(bit):
            names.append(table[bit])
            rest &= ~(1 << bit)
    if rest:
        names.append(f"Unknown incompatible feature: {rest:x}")
    return ", ".join(names)


def decode_extensions(header: Header, first: bytes | bytearray, check_only: bool = False) -> None:
    """Fill in `header.extensions` and `header.bitmaps` from the first cluster; with `check_only` what is wrong with the
    latter is no error, but `header.bitmaps_error`. Raises Error."""
    start, end = _extension_area(header)
    header.extensions = []
    header.bitmaps = header.bitmaps_error = None
    # What is wrong with one is said before the next one is looked at.
    for magic, data in _walk(bytes(first), start, end):
        header.extensions.append((magic, data))
        if magic == EXT_BACKING_FORMAT and len(data) >= 16:
            raise Error(f"ERROR: ext_backing_format: len={len(data)} too large (>=16)", errno.EINVAL)
        if magic == EXT_CRYPTO:
            if header.crypt_method != CRYPT_LUKS:
                raise Error("CRYPTO header extension only expected with LUKS encryption method", errno.EINVAL)
            if len(data) != 16:
                raise Error(f"CRYPTO header extension size {len(data)}, but expected size 16", errno.EINVAL)
            offset = int.from_bytes(data[:8], "big")
            if offset & (header.cluster_size - 1):
                raise Error(
                    f"Encryption header offset '{offset}' is not a multiple of cluster size '{header.cluster_size}'",
                    errno.EINVAL,
                )
        if magic == EXT_BITMAPS:
            try:
                _decode_bitmaps(header, data)
                header.bitmaps_error = None
            except Error as exc:
                if not check_only:
                    raise
                header.bitmaps, header.bitmaps_error = None, exc.desc
                if len(data) != _BITMAPS_BYTES:
                    # What follows may be anything; extensions that matter more are before it.
                    break
    if header.crypt_method == CRYPT_LUKS and header.extension(EXT_CRYPTO) is None:
        raise Error(f"Missing CRYPTO header for crypt method {header.crypt_method}", errno.EINVAL)


def encryption_area(header: Header) -> tuple[int, int] | None:
    """Where the image file has its LUKS header with the key material: (offset, bytes), the offset at a cluster; None if
    it has none. These clusters are in use, and count as referred to once."""
    data = header.extension(EXT_CRYPTO)
    return None if data is None else (int.from_bytes(data[:8], "big"), int.from_bytes(data[8:16], "big"))


def encryption_extension(offset: int, length: int) -> tuple[int, bytes]:
    """The header extension that says where the LUKS header is (bytes)."""
    return EXT_CRYPTO, offset.to_bytes(8, "big") + length.to_bytes(8, "big")


def _decode_bitmaps(header: Header, data: bytes) -> None:
    if len(data) != _BITMAPS_BYTES:
        raise Error("bitmaps_ext: Invalid extension length", errno.EINVAL)
    if not header.autoclear & AUTOCLEAR_BITMAPS:
        # The spec: without its autoclear bit the extension is inconsistent.
        return
    count, reserved, size, offset = struct.unpack(">IIQQ", data)
    if reserved:
        raise Error("bitmaps_ext: Reserved field is not zero", errno.EINVAL)
    if count > 65535:
        raise Error(
            f"bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of 65535", errno.EINVAL
        )
    if count == 0:
        raise Error("found bitmaps extension with zero bitmaps", errno.EINVAL)
    if offset & (header.cluster_size - 1):
        raise Error("bitmaps_ext: invalid bitmap directory offset", errno.EINVAL)
    limit = 65535 * 1024
    if size > limit:
        raise Error(
            f"bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size ({limit})", errno.EINVAL
        )
    header.bitmaps = BitmapsExtension(count, size, offset)


def decode_backing_file(header: Header, first: bytes | bytearray) -> None:
    """Fill in `header.backing_file`. Raises Error."""
    header.backing_file = None
    if not header.backing_offset:
        return
    size = header.backing_size
    if size > min(MAX_BACKING_NAME, header.cluster_size - header.backing_offset):
        raise Error("Backing file name too long", errno.EINVAL)
    data = bytes(first[header.backing_offset : header.backing_offset + size])
    header.backing_file = os_decode(data)


def feature_name_table() -> bytes:
    """The data of the feature name table extension."""
    return b"".join(_FEATURE.pack(kind, bit, name) for kind, bit, name in _FEATURE_NAMES)


def _in_order(header: Header) -> list[tuple[int, bytes]]:
    """The extensions as QEMU orders them: those that it knows, then all others in the order in which they were."""
    known: dict[int, bytes] = {}
    others = []
    for magic, data in header.extensions:
        if magic in (EXT_BACKING_FORMAT, EXT_DATA_FILE, EXT_CRYPTO):
            known[magic] = data
        elif magic not in (EXT_FEATURE_TABLE, EXT_BITMAPS):
            others.append((magic, data))
    if header.version >= 3 and header.cluster_size > _NO_NAMES_UP_TO:
        known[EXT_FEATURE_TABLE] = feature_name_table()
    if header.bitmaps is not None:
        one = header.bitmaps
        known[EXT_BITMAPS] = struct.pack(">IIQQ", one.count, 0, one.directory_size, one.directory_offset)
    order = (EXT_BACKING_FORMAT, EXT_DATA_FILE, EXT_CRYPTO, EXT_FEATURE_TABLE, EXT_BITMAPS)
    return [(magic, known[magic]) for magic in order if magic in known] + others


def _extension_bytes(extensions: list[tuple[int, bytes]]) -> bytes:
    area = b"".join(_EXT.pack(magic, len(data)) + data + bytes(-len(data) % 8) for magic, data in extensions)
    return area + _EXT.pack(EXT_END, 0)


def encode(header: Header, spare: int = 0) -> bytes:
    """The whole header area as it is written: fixed fields, extensions, backing file name. Raises Error if that does
    not fit into the first cluster. `header.header_length`, `backing_offset` and `backing_size` are set to what they
    are there.

    `spare`: what may be more than a sector (in version 3 the extensions, and the name) begins at this offset instead of
    right behind what is before it; then the result may be too long.
    """
    length = V2_HEADER_BYTES if header.version == 2 else HEADER_BYTES + len(header.unknown_fields)
    backing = b"" if header.backing_file is None else os_encode(header.backing_file)
    area = _extension_bytes(_in_order(header))
    if length + len(area) + len(backing) > header.cluster_size:
        raise Error("Could not update qcow2 header: No space left on device", errno.ENOSPC)
    header.header_length = length if header.version == 2 else max(length, spare)
    name_at = max(header.header_length + len(area), spare)
    header.backing_offset, header.backing_size = (name_at, len(backing)) if header.backing_file is not None else (0, 0)
    fixed = _V2.pack(
        MAGIC,
        header.version,
        header.backing_offset,
        header.backing_size,
        header.cluster_bits,
        header.size,
        header.crypt_method,
        header.l1_size,
        header.l1_offset,
        header.reftable_offset,
        header.reftable_clusters,
        header.nb_snapshots,
        header.snapshots_offset,
    )
    if header.version >= 3:
        fixed += _V3.pack(
            header.incompatible, header.compatible, header.autoclear, header.refcount_order, header.header_length
        )
        fixed += bytes([header.compression_type]) + bytes(7) + header.unknown_fields
    return (fixed.ljust(header.header_length, b"\0") + area).ljust(name_at if backing else 0, b"\0") + backing


# Single fields that change while the image is open, as (offset in the header, bytes): each is one small write.


def size_field(size: int) -> tuple[int, bytes]:
    return 24, size.to_bytes(8, "big")


def l1_fields(entries: int, offset: int) -> tuple[int, bytes]:
    return 36, entries.to_bytes(4, "big") + offset.to_bytes(8, "big")


def refcount_fields(header: Header) -> tuple[int, bytes]:
    """Where the refcount table is, and (version 3) how wide refcounts are, with the fields in between."""
    data = struct.pack(">QI", header.reftable_offset, header.reftable_clusters)
    if header.version >= 3:
        data += struct.pack(">IQ", header.nb_snapshots, header.snapshots_offset)
        data += feature_fields(header)[1] + struct.pack(">I", header.refcount_order)
    return 48, data


def size_and_l1_fields(header: Header) -> tuple[int, bytes]:
    """The size of the disk and where its L1 table is, which change together."""
    return 24, struct.pack(">QIIQ", header.size, header.crypt_method, header.l1_size, header.l1_offset)


def reftable_fields(offset: int, clusters: int) -> tuple[int, bytes]:
    return 48, offset.to_bytes(8, "big") + clusters.to_bytes(4, "big")


def snapshot_fields(header: Header) -> tuple[int, bytes]:
    return 60, struct.pack(">IQ", header.nb_snapshots, header.snapshots_offset)


def feature_fields(header: Header) -> tuple[int, bytes]:
    """All three feature masks (version 3)."""
    return 72, struct.pack(">QQQ", header.incompatible, header.compatible, header.autoclear)
