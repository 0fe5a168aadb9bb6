"""Making an image.

Source: QEMU docs/interop/qcow2. Where what goes is the business of `pyqsd.drivers.formats.qcow2.layout`. Errors have
QSD's words, and come in its order; but unlike QSD's, ours come before anything is overwritten, wherever that can be
known.
"""

from __future__ import annotations

import asyncio
import errno
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from pyqsd.block import filenames
from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.driver import MAY_UNMAP
from pyqsd.drivers.formats.qcow2 import header as headers
from pyqsd.drivers.formats.qcow2.layout import Layout, plan
from pyqsd.qapi.errors import Error, from_oserror

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator

    from pyqsd.block.graph import Graph
    from pyqsd.block.node import Node
    from pyqsd.drivers.formats.qcow2.create_options import CreateOptions, QCryptoBlockCreateOptions

_SECTOR = 512
#: The largest size of a disk (bytes), as everywhere.
_MAX_LENGTH = (1 << 63) - (1 << 30)
#: An image with more data clusters than this is laid out in a thread: it takes a while.
_MANY = 1 << 16
#: After so many writes the loop looks at other things.
_TURN = 16


def empty_image(
    size: int,
    *,
    cluster_size: int = 65536,
    version: int = 3,
    refcount_bits: int = 16,
    backing_file: str | None = None,
    backing_format: str | None = None,
    lazy_refcounts: bool = False,
    compression_type: int = headers.COMPRESSION_ZLIB,
    extended_l2: bool = False,
) -> bytes:
    """The content of a new image file for an empty disk of `size` bytes (a multiple of 512). Raises Error.

    `backing_file`: the name to store; `backing_format` the name of its driver.
    """
    header = new_header(
        size,
        cluster_size=cluster_size,
        version=version,
        refcount_bits=refcount_bits,
        backing_file=backing_file,
        backing_format=backing_format,
        lazy_refcounts=lazy_refcounts,
        extended_l2=extended_l2,
    )
    set_compression(header, compression_type)
    layout = _layout_of(header)
    plan(layout, "off", False, 0)
    data = bytearray(layout.end << layout.cluster_bits)
    for at, piece in [*layout.table_pieces(), (0, _header_bytes(header, layout))]:
        data[at : at + len(piece)] = piece
    return bytes(data)


def new_header(
    size: int,
    *,
    cluster_size: int = 65536,
    version: int = 3,
    refcount_bits: int = 16,
    backing_file: str | None = None,
    backing_format: str | None = None,
    lazy_refcounts: bool = False,
    extended_l2: bool = False,
    preallocation: str = "off",
) -> headers.Header:
    """The header of a new image, but for what only the layout of its tables and further features decide. Raises Error
    if there cannot be such an image."""
    bits = cluster_size.bit_length() - 1
    order = refcount_bits.bit_length() - 1
    newer = "only supported with compatibility level 1.1 and above (use version=v3 or greater)"
    if size % _SECTOR:
        raise Error("Image size must be a multiple of 512 bytes", errno.EINVAL)
    if extended_l2 and version < 3:
        raise Error(f"Extended L2 entries are {newer}", errno.EINVAL)
    if cluster_size != 1 << max(bits, 0) or not headers.MIN_CLUSTER_BITS <= bits <= headers.MAX_CLUSTER_BITS:
        raise Error("Cluster size must be a power of two between 512 and 2048k", errno.EINVAL)
    if extended_l2 and bits < 14:
        raise Error("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes", errno.EINVAL)
    if backing_file is not None and preallocation != "off" and not extended_l2:
        raise Error(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on", errno.EINVAL
        )
    if backing_format is not None and backing_file is None:
        raise Error("Backing format cannot be used without backing file", errno.EINVAL)
    if version < 3 and lazy_refcounts:
        raise Error(f"Lazy refcounts {newer}", errno.EINVAL)
    if refcount_bits <= 0 or refcount_bits != 1 << order or order > 6:
        raise Error("Refcount width must be a power of two and may not exceed 64 bits", errno.EINVAL)
    if version < 3 and refcount_bits != 16:
        raise Error(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or "
            "greater)",
            errno.EINVAL,
        )
    header = headers.Header(
        version=version,
        backing_offset=0,
        backing_size=0,
        cluster_bits=bits,
        size=size,
        crypt_method=headers.CRYPT_NONE,
        l1_size=0,
        l1_offset=0,
        reftable_offset=0,
        reftable_clusters=0,
        nb_snapshots=0,
        snapshots_offset=0,
        compatible=headers.COMPAT_LAZY_REFCOUNTS if lazy_refcounts else 0,
        incompatible=headers.INCOMPAT_EXTENDED_L2 if extended_l2 else 0,
        refcount_order=order,
        backing_file=backing_file,
    )
    if backing_format is not None:
        header.extensions.append((headers.EXT_BACKING_FORMAT, backing_format.encode()))
    return header


def set_compression(header: headers.Header, kind: int) -> None:
    """Let compressed clusters be compressed so. Raises Error."""
    if kind == headers.COMPRESSION_ZLIB:
        return
    if header.version < 3:
        raise Error(
            "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or "
            "greater)",
            errno.EINVAL,
        )
    header.compression_type = kind
    header.incompatible |= headers.INCOMPAT_COMPRESSION


def _check_size(header: headers.Header) -> None:
    """What QSD finds out about the size when it gives it to the new image. Raises Error."""
    size = header.size
    text = "Could not resize image: "
    if size >= 1 << 63:
        raise Error(text + "Image size cannot be negative", errno.EINVAL)
    if size > _MAX_LENGTH:
        raise Error(f"{text}offset({size}) exceeds maximum({_MAX_LENGTH})", errno.EFBIG)
    if headers.l1_entries_for(header, size) > headers.MAX_L1_BYTES // 8:
        raise from_oserror(OSError(errno.EFBIG, ""), text + "Failed to grow the L1 table")


def _check_backing_name(header: headers.Header) -> None:
    name, fmt = header.backing_file, header.backing_format
    if name is None:
        return
    try:
        if len(headers.os_encode(name)) > headers.MAX_BACKING_NAME:
            raise Error("", errno.EINVAL)
        headers.encode(header)
    except Error as exc:
        number = exc.errno or errno.EINVAL
        raise from_oserror(
            OSError(number, ""), f"Could not assign backing file '{name}' with format '{fmt or '(null)'}'"
        ) from exc


def _layout_of(header: headers.Header) -> Layout:
    _check_size(header)
    _check_backing_name(header)
    extended = bool(header.incompatible & headers.INCOMPAT_EXTENDED_L2)
    return Layout(header.size, header.cluster_bits, header.refcount_order, extended)


def _header_bytes(header: headers.Header, layout: Layout) -> bytes:
    """The first cluster."""
    bits = layout.cluster_bits
    header.l1_size, header.l1_offset = layout.l1_entries, layout.l1 << bits
    header.reftable_offset, header.reftable_clusters = layout.table << bits, layout.table_clusters
    if layout.luks_bytes:
        header.extensions.append(headers.encryption_extension(layout.luks << bits, layout.luks_bytes))
    return headers.encode(header).ljust(1 << bits, b"\0")


async def create(graph: Graph, options: CreateOptions) -> None:
    """``blockdev-create``. Raises Error, OSError."""
    preallocation = str(options.preallocation or "off")
    async with AsyncExitStack() as stack:
        file = await stack.enter_async_context(graph.using(options.file))
        header = new_header(
            options.size,
            cluster_size=65536 if options.cluster_size is None else options.cluster_size,
            version=2 if options.version == "v2" else 3,
            refcount_bits=16 if options.refcount_bits is None else options.refcount_bits,
            backing_file=options.backing_file,
            backing_format=options.backing_fmt,
            lazy_refcounts=bool(options.lazy_refcounts),
            extended_l2=bool(options.extended_l2),
            preallocation=preallocation,
        )
        if options.data_file_raw and options.backing_file is not None:
            raise Error("Backing file and data-file-raw cannot be used at the same time", errno.EINVAL)
        data_file = None
        if options.data_file is not None:
            if header.version < 3:
                raise Error(
                    "External data files are only supported with compatibility level 1.1 and above (use version=v3 or "
                    "greater)",
                    errno.EINVAL,
                )
            data_file = await stack.enter_async_context(graph.using(options.data_file))
            header.incompatible |= headers.INCOMPAT_DATA_FILE
            name = headers.os_encode(filenames.filename(data_file))
            header.extensions.append((headers.EXT_DATA_FILE, name))
        if options.data_file_raw:
            if data_file is None:
                raise Error("data-file-raw requires data-file", errno.EINVAL)
            header.autoclear |= headers.AUTOCLEAR_RAW_DATA
            if preallocation == "off":
                # Everything in the raw image belongs to the disk, so all of it is allocated.
                preallocation = "metadata"
        set_compression(header, headers.COMPRESSION_ZSTD if options.compression_type == "zstd" else 0)
        target = _use(stack, graph, file)
        layout = _layout_of(header)
        luks_region = b""
        if options.encrypt is not None:
            luks_region = await _set_up_encryption(graph, header, options.encrypt)
            layout.luks_bytes = len(luks_region)
            layout.zero_clusters = header.version >= 3
        data = None if data_file is None else _use(stack, graph, data_file)
        for backend in (target, data):
            # As the image has it when it is opened: nobody else writes, and data and tables are not in one file.
            if backend is not None:
                backend.set_perms(perms.WRITE | perms.RESIZE, perms.CONSISTENT_READ | perms.WRITE_UNCHANGED)
        await _Creation(target, data, header, layout, preallocation, luks_region).run()


async def _set_up_encryption(graph: Graph, header: headers.Header, how: QCryptoBlockCreateOptions) -> bytes:
    """Note in `header` that the image is encrypted. Returns the LUKS header with its key material, if it has one (where
    that goes is not known yet). Raises Error."""
    from pyqsd.drivers.formats.qcow2.create_options import QCryptoBlockCreateOptionsLUKS, QCryptoBlockOptionsQCow

    assert isinstance(how, (QCryptoBlockCreateOptionsLUKS, QCryptoBlockOptionsQCow))
    if how.key_secret is None:
        raise Error("Parameter 'encrypt.key-secret' is required for cipher", errno.EINVAL)
    passphrase = graph.secret_text(how.key_secret).encode()
    if isinstance(how, QCryptoBlockOptionsQCow):
        header.crypt_method = headers.CRYPT_AES
        return b""
    from pyqsd.crypto import luks
    from pyqsd.crypto.options import LuksCreateOptions

    members = {name: getattr(how, name) for name in LuksCreateOptions.__struct_fields__}
    volume, region = await luks.create(LuksCreateOptions(**members), passphrase)
    volume.close()
    header.crypt_method = headers.CRYPT_LUKS
    return region


def _use(stack: AsyncExitStack, graph: Graph, node: Node) -> BlockBackend:
    if not node.opened:
        # It was deleted meanwhile.
        raise Error(f"Cannot find device='{node.name}' nor node-name='{node.name}'")
    backend = BlockBackend(graph, "an unnamed block device", perms.WRITE | perms.RESIZE, perms.ALL)
    backend.insert(node)
    stack.callback(backend.remove)
    return backend


class _Creation:
    """Writes a new image into `target`, and gives `data`, its data file, the size of the disk."""

    def __init__(
        self,
        target: BlockBackend,
        data: BlockBackend | None,
        header: headers.Header,
        layout: Layout,
        preallocation: str,
        luks_region: bytes,
    ) -> None:
        self._luks_region = luks_region
        self._target = target
        self._data = data
        self._header = header
        self._layout = layout
        self._mode = preallocation

    async def run(self) -> None:
        """Raises Error, OSError."""
        layout, target, mode = self._layout, self._target, self._mode
        old = target.length
        arguments = (layout, mode, self._data is not None, old)
        if mode != "off" and layout.data_clusters > _MANY:
            await asyncio.to_thread(plan, *arguments)
        else:
            plan(*arguments)
        first_cluster = _header_bytes(self._header, layout)
        # First, on disk, the old header goes, and then all that could show through in the new image: from here on to
        # the last step, what is in the file is no image at all, rather than a mixture of two.
        end = min(old, layout.end << layout.cluster_bits)
        head = min(end, layout.cluster_size)
        for start, stop in ((0, head), (head, end)):
            if start < stop:
                zeroes = target.pwrite_zeroes(start, stop - start, MAY_UNMAP)
                await self._named("Could not write qcow2 header", zeroes)
                await self._named("Could not write qcow2 header", target.flush())
        await self._resize(old)
        await self._write(self._layout.table_pieces(), "Could not write refcount table")
        if layout.l2:
            await self._write(self._layout.l2_pieces(), "Could not resize image: Allocating clusters failed")
        if layout.luks_bytes:
            area = self._luks_region.ljust(layout.luks_clusters << layout.cluster_bits, b"\0")
            await self._write(iter([(layout.luks << layout.cluster_bits, area)]), "Could not write encryption header")
        await self._named("Could not write qcow2 header", target.flush())
        # The header refers to what is on disk now.
        await self._named("Could not write qcow2 header", target.pwrite(0, first_cluster))
        await target.flush()
        read = bytes(await target.node.pread(0, headers.V2_HEADER_BYTES))
        if headers.probe(read) == 0:
            # Whatever is written to this node, it is not what is read.
            raise Error("Image is not in qcow2 format", errno.EINVAL)

    async def _resize(self, old: int) -> None:
        """Give the files their lengths."""
        layout, mode = self._layout, self._mode
        text = "Could not resize image: "
        wanted = layout.file_bytes
        allocate = mode if mode in ("falloc", "full") else "off"
        if mode != "off" and self._data is None and wanted > old:
            try:
                await self._target.truncate(wanted, preallocation=allocate)
            except Error as exc:
                inner = "Failed to resize underlying file: " if allocate != "off" else ""
                raise exc.prefixed(text + inner) from exc
        if self._data is not None:
            size = layout.size
            if mode != "off":
                # The tables have whole clusters.
                size = layout.data_clusters << layout.cluster_bits
            grows = size > self._data.length
            try:
                await self._data.truncate(size, preallocation=allocate if grows else "off")
            except Error as exc:
                raise exc.prefixed(text) from exc
            await self._data.flush()

    async def _write(self, pieces: Iterator[tuple[int, bytes]], text: str) -> None:
        for number, (at, piece) in enumerate(pieces):
            await self._named(text, self._target.pwrite(at, piece))
            if number % _TURN == 0:
                await asyncio.sleep(0)

    @staticmethod
    async def _named(text: str, action: Awaitable[None]) -> None:
        try:
            await action
        except OSError as exc:
            raise from_oserror(exc, text) from exc
