"""What the drivers for files and devices of this host share: everything but the question what kind of file it is."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from typing import Any, ClassVar, Final

from pyqsd.aio import engine as engines
from pyqsd.aio import libc
from pyqsd.block import permissions as perms
from pyqsd.block.driver import FUA, MAY_UNMAP, NO_FALLBACK, Driver, Limits
from pyqsd.block.extents import DATA, OFFSET_VALID, ZERO, Extent
from pyqsd.block.info import ImageInfoSpecific
from pyqsd.block.node import Node
from pyqsd.drivers.protocols import _calls, _ioctl
from pyqsd.drivers.protocols._extents import Extents, find
from pyqsd.drivers.protocols._locking import FileLocks
from pyqsd.drivers.protocols._locking import supported as locks_supported
from pyqsd.drivers.protocols._options import BlockdevAioOptions, OnOffAuto
from pyqsd.qapi.errors import Error, from_oserror
from pyqsd.qapi.types import Size, Struct

#: Sizes are whole sectors, as everywhere in QEMU's block layer; what a file lacks of its last one reads as zeroes.
SECTOR: Final = 512
#: The largest size that a node may have.
MAX_LENGTH: Final = (1 << 63) - (1 << 30)

_WRITERS: Final = perms.WRITE | perms.WRITE_UNCHANGED | perms.RESIZE

#: A write in the loop's thread that takes longer than this (seconds) was held up: by the disk, because the memory for
#: dirty pages is used up, or because this thread was off its processor for a while.
_SLOW: Final = 0.010
#: The latter comes alone. A second slow one among so many writes means the disk, and the next ones go to the worker.
_SLOW_AMONG: Final = 16
#: After so many quick ones, that is forgotten.
_FORGIVEN: Final = 1024
#: How long they go there at first, and at most, before the quick way is tried again.
_AVOID_FIRST: Final = 0.05
_AVOID_LONGEST: Final = 2.0
#: More than this (bytes) is not written in the loop's thread: copying it would take too long.
_MOST_INLINE: Final = 4 << 20

#: It will never work on this file; and: it does not work for this range, or now.
_NEVER: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.ENODEV})
_NOT_NOW: Final = frozenset({errno.EINVAL, errno.EBUSY})

_perf_counter = time.perf_counter


class ImageInfoSpecificFile(Struct):
    """`extent_size_hint`: bytes that the file system allocates at once for this file (XFS), where it has that."""

    extent_size_hint: Size | None = None


class ImageInfoSpecificFileWrapper(ImageInfoSpecific, tag="file", kw_only=True):
    """The form in which QAPI wants it."""

    data: ImageInfoSpecificFile


class _File:
    """An open file: stays open until nobody uses it any more, even after it was replaced."""

    __slots__ = ("direct", "fd", "locks", "retired", "users", "writable")

    def __init__(self, fd: int, filename: str, writable: bool, direct: bool) -> None:
        self.fd = fd
        self.writable = writable
        self.direct = direct
        self.locks = FileLocks(fd, filename)
        self.users = 0
        self.retired = False

    def retire(self) -> None:
        """Close it as soon as its last request has ended."""
        self.retired = True
        self.close_if_unused()

    def release(self) -> None:
        """A request has ended."""
        self.users -= 1
        if self.retired:
            self.close_if_unused()

    def close_if_unused(self) -> None:
        """The last request on a retired file may have ended."""
        if self.users:
            return
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class PosixDriver(Driver):
    """Base of ``file`` and ``host_device``."""

    is_protocol = True
    write_flags = FUA
    zero_flags = MAY_UNMAP | NO_FALLBACK
    #: What ``blockdev-reopen`` may change beyond what every node can.
    mutable_options: ClassVar[frozenset[str]] = frozenset({"drop_cache", "x_check_cache_dropped"})

    def __init__(self, node: Any, options: Any) -> None:
        super().__init__(node, options)
        self._file: _File = _File(-1, "", False, False)
        self._fd = -1
        self._direct = False
        self._engine: engines.Engine | None = None
        self._batch_limit = max(options.aio_max_batch or 0, 0)
        #: The threads in which the calls are made that io_uring does not have.
        self._pool: engines.Engine | None = None
        self._size = 0
        self._is_device = False
        self._locking = False
        # Granted by the last set_perm.
        self._perm = 0
        self._shared = perms.ALL
        #: Made by check_perm for set_perm, or by reopen_prepare for reopen_commit.
        self._perm_file: _File | None = None
        self._reopen_file: _File | None = None
        #: The kernel reads without waiting if we ask for it.
        self._nowait = True
        self._slow_until = 0.0
        self._avoid = _AVOID_FIRST
        self._quick_writes = _SLOW_AMONG
        self._extents = Extents()
        #: errno of the flush after which the page cache may have forgotten data that was never written.
        self._flush_error = 0
        #: What the file system or the device has turned out not to be able to do.
        self._lacking: set[str] = set()
        self._mem_align = 1
        self._offset_align = 1
        self.discard_ok = 0
        self.discard_failed = 0
        self.discard_bytes = 0

    # --- the kind of file, which the drivers differ in -------------------------------------------------------------

    def _check_kind(self, mode: int) -> None:
        """Whether a file of this ``st_mode`` is what the driver is for. Raises Error."""
        raise NotImplementedError

    # --- opening ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        options = self.options
        node = self.node
        if not options.filename:
            raise Error(f"The '{self.name}' block driver requires a file name", errno.EINVAL)
        if options.pr_manager is not None:
            # There are no objects of that kind.
            raise Error(f"No persistent reservation manager with id '{options.pr_manager}'", errno.ENOENT)
        if options.x_check_cache_dropped:
            raise Error("'x-check-cache-dropped' is not supported", errno.ENOTSUP)
        self._check_aio(options, node.cache_direct)
        locking = options.locking or OnOffAuto.AUTO
        self._locking = locking != OnOffAuto.OFF and locks_supported()
        if locking == OnOffAuto.ON and not self._locking:
            raise Error("This system has no open file description locks, which 'locking=on' needs", errno.ENOTSUP)
        # With auto-read-only the file is opened for writing only while somebody writes.
        writable = not node.read_only and not node.auto_read_only
        self._pool = engines.acquire("threads")
        try:
            file = await self._call(self._open_path, options.filename, writable, node.cache_direct)
            try:
                await self._adopt_new(file)
            except BaseException:
                file.retire()
                raise
        except BaseException:
            self._let_engines_go()
            raise

    async def _adopt_new(self, file: _File) -> None:
        info = os.fstat(file.fd)
        self._check_kind(info.st_mode)
        self._is_device = not stat.S_ISREG(info.st_mode)
        if file.writable and stat.S_ISBLK(info.st_mode) and await self._call(_ioctl.is_read_only, file.fd):
            raise Error("The device is not writable: Permission denied", errno.EACCES)
        try:
            self._size = await self._call(_calls.size_of, file.fd)
        except OSError as exc:
            raise from_oserror(exc, "Could not refresh total sector count") from exc
        self._use(file)
        if self._size > MAX_LENGTH:
            raise Error("Could not refresh total sector count: File too large", errno.EFBIG)
        await self._probe_alignment()

    def _check_aio(self, options: Any, direct: bool) -> None:
        if options.aio == BlockdevAioOptions.NATIVE and not direct:
            raise Error(
                "aio=native was specified, but it requires cache.direct=on, which was not specified.", errno.EINVAL
            )

    def _open_path(self, path: str, writable: bool, direct: bool) -> _File:
        """Open the file. Waits. Raises Error."""
        flags = os.O_CLOEXEC | (os.O_RDWR if writable else os.O_RDONLY)
        if direct:
            flags |= os.O_DIRECT
        name = self.options.filename
        try:
            # Without NONBLOCK, a FIFO in place of the image would wait for a writer forever.
            fd = os.open(path, flags | os.O_NONBLOCK)
        except OSError as exc:
            if direct and exc.errno == errno.EINVAL:
                raise Error(f"Could not open '{name}': filesystem does not support O_DIRECT", errno.EINVAL) from exc
            raise from_oserror(exc, f"Could not open '{name}'") from exc
        except ValueError as exc:
            # A name that no file can have.
            raise Error(f"Could not open '{name}': {os.strerror(errno.ENOENT)}", errno.ENOENT) from exc
        try:
            os.set_blocking(fd, True)
        except BaseException:
            os.close(fd)
            raise
        return _File(fd, name, writable, direct)

    def _open_again(self, writable: bool, direct: bool) -> _File:
        """The very file that is open, once more with other flags: by way of /proc, because its name may meanwhile
        belong to another one. Waits. Raises Error."""
        path = f"/proc/self/fd/{self._file.fd}"
        if not os.path.exists(path):
            path = self.options.filename
        file = self._open_path(path, writable, direct)
        new, old = os.fstat(file.fd), os.fstat(self._file.fd)
        if (new.st_dev, new.st_ino) != (old.st_dev, old.st_ino):
            file.retire()
            raise Error(f"Could not reopen '{self.options.filename}': another file has its name now", errno.ESTALE)
        return file

    def _use(self, file: _File) -> None:
        self._file = file
        self._fd = file.fd
        self._direct = file.direct

    async def close(self) -> None:
        for file in (self._perm_file, self._reopen_file, self._file):
            if file is not None:
                file.retire()
        self._perm_file = self._reopen_file = None
        self._fd = -1
        self._let_engines_go()

    def _let_engines_go(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            if self._batch_limit:
                engine.unlimit_batch(self._batch_limit)
            engines.release(engine)
        pool, self._pool = self._pool, None
        if pool is not None:
            engines.release(pool)

    @property
    def engine(self) -> engines.Engine:
        """The loop's engine for this file's requests, from the first one on."""
        engine = self._engine
        if engine is None:
            kind = "threads" if self.options.aio == BlockdevAioOptions.THREADS else "io_uring"
            engine = self._engine = engines.acquire(kind)
            if self._batch_limit:
                engine.limit_batch(self._batch_limit)
        return engine

    async def _call(self, func: Any, *args: Any) -> Any:
        """Run a function that waits, in a thread. The file stays open until it has ended."""
        assert self._pool is not None
        file = self._file
        file.users += 1
        try:
            return await self._pool.call(func, *args)
        finally:
            file.release()

    async def _probe_alignment(self) -> None:
        """What O_DIRECT needs of offsets, lengths and addresses."""
        self._mem_align = self._offset_align = 1
        if self._direct:
            self._mem_align, self._offset_align = await self._call(_calls.alignment_of, self._fd)

    def refresh_limits(self, limits: Limits) -> None:
        limits.request_alignment = self._offset_align
        limits.memory_alignment = self._mem_align
        if self._is_device:
            # Longer zero writes and discards would keep the device busy for too long at a time.
            limits.max_pwrite_zeroes = 1 << 30
            limits.max_pdiscard = 1 << 30

    # --- permissions and locks --------------------------------------------------------------------------------------

    def check_perm(self, perm: int, shared: int) -> None:
        try:
            self._prepare_file(perm)
            self._check_locks(perm, ~shared & perms.ALL)
        except BaseException:
            self.abort_perm_update()
            raise

    def _prepare_file(self, perm: int) -> None:
        """Open the file anew if it is to be written to for the first time, or was for the last time."""
        if self._perm_file is not None:
            self._perm_file.retire()
            self._perm_file = None
        if self.node.read_only:
            return
        writable = bool(perm & _WRITERS) if self.node.auto_read_only else True
        current = self._reopen_file or self._file
        if writable != current.writable:
            file = self._open_again(writable, current.direct)
            if self._reopen_file is not None:
                self._reopen_file.retire()
                self._reopen_file = file
            else:
                self._perm_file = file
            if (
                writable
                and self._is_device
                and stat.S_ISBLK(os.fstat(file.fd).st_mode)
                and _ioctl.is_read_only(file.fd)
            ):
                raise Error("The device is not writable: Permission denied", errno.EACCES)

    def _check_locks(self, perm: int, unshared: int) -> None:
        if not self._locking:
            return
        locks = self._file.locks
        new = [file.locks for file in (self._perm_file, self._reopen_file) if file is not None]
        if perm & ~locks.held or unshared & ~locks.unshared:
            locks.add(perm, unshared)
            # What our own other descriptors hold must not look like somebody else's.
            for other in new:
                other.keep(0, 0)
            locks.check(perm, unshared)
        for other in new:
            other.add(locks.held, locks.unshared)

    def set_perm(self, perm: int, shared: int) -> None:
        self._perm, self._shared = perm, shared
        if self._perm_file is not None:
            old = self._file
            self._use(self._perm_file)
            self._perm_file = None
            old.retire()
        self._keep_locks()

    def abort_perm_update(self) -> None:
        if self._perm_file is not None:
            self._perm_file.retire()
            self._perm_file = None
        self._keep_locks()

    def _keep_locks(self) -> None:
        unshared = ~self._shared & perms.ALL
        self._file.locks.keep(self._perm, unshared)
        if self._reopen_file is not None:
            self._reopen_file.locks.keep(self._perm, unshared)

    # --- reopening --------------------------------------------------------------------------------------------------

    def _will_be_direct(self, options: Any) -> bool:
        """The effective ``cache.direct`` after a reopening: given, or the parent's for an inline child."""
        if options.cache is not None and options.cache.direct is not None:
            return bool(options.cache.direct)
        node = self.node
        if not node.monitor_owned:
            for edge in node.parents:
                parent = edge.parent
                if hasattr(parent, "cache_direct"):
                    return bool(parent.cache_direct)
        return False

    async def reopen_prepare(self, options: Any, read_only: bool) -> Any:
        if self.options.drop_cache is not None and options.drop_cache is None:
            raise Error("Option 'drop-cache' cannot be reset to its default value", errno.EINVAL)
        if options.x_check_cache_dropped:
            raise Error("'x-check-cache-dropped' is not supported", errno.ENOTSUP)
        direct = self._will_be_direct(options)
        if options.aio == self.options.aio:
            self._check_aio(options, direct)
        auto = self.node.auto_read_only if options.auto_read_only is None else options.auto_read_only
        writable = not read_only and (not auto or bool(self._perm & _WRITERS))
        if writable != self._file.writable or direct != self._direct:
            file = await self._call(self._open_again, writable, direct)
            try:
                if self._locking:
                    file.locks.add(self._file.locks.held, self._file.locks.unshared)
                alignment = await self._call(_calls.alignment_of, file.fd) if direct else (1, 1)
            except BaseException:
                file.retire()
                raise
            self._reopen_file = file
            return alignment
        return None

    def reopen_commit(self, state: Any) -> None:
        file, self._reopen_file = self._reopen_file, None
        if file is not None:
            old = self._file
            self._use(file)
            old.retire()
            self._mem_align, self._offset_align = state
            self._keep_locks()
        self.options = self.node.options

    async def reopen_abort(self, state: Any) -> None:
        file, self._reopen_file = self._reopen_file, None
        if file is not None:
            file.retire()

    async def activate(self) -> None:
        """Unless ``drop-cache=off``, forget the pages that this host caches: another one may have written the file."""
        self._extents.forget()
        self._size = await self._call(_calls.size_of, self._fd)
        if self.options.drop_cache is not False and not self._direct:
            await self._call(_calls.drop_cache, self._fd)

    # --- size -------------------------------------------------------------------------------------------------------

    def length(self) -> int:
        return -(-self._size // SECTOR) * SECTOR

    async def truncate(self, length: int, exact: bool, preallocation: str, zero_new: bool) -> None:
        if length > MAX_LENGTH:
            raise Error("Could not resize file: File too large", errno.EFBIG)
        if self._is_device:
            await self._truncate_device(length, exact, preallocation)
            return
        self._changing()
        try:
            await self._call(_calls.truncate, self._fd, length, preallocation)
        finally:
            self._changed()
            self._size = await self._call(_calls.size_of, self._fd)

    async def _truncate_device(self, length: int, exact: bool, preallocation: str) -> None:
        if preallocation != "off":
            raise Error(f"Preallocation mode '{preallocation}' unsupported for this non-regular file", errno.ENOTSUP)
        try:
            self._size = await self._call(_calls.size_of, self._fd)
        except OSError as exc:
            raise from_oserror(exc, "Failed to retrieve the device's length") from exc
        if length != self._size and exact:
            raise Error("Cannot resize device files", errno.ENOTSUP)
        if length > self._size:
            raise Error("Cannot grow device files", errno.EINVAL)

    def allocated_size(self) -> int | None:
        return os.fstat(self._fd).st_blocks * 512

    # --- where the data is ------------------------------------------------------------------------------------------

    def map(self, offset: int, length: int) -> Extent | None:
        return (length, DATA | OFFSET_VALID, self.node, offset)

    async def block_status(self, offset: int, length: int, want_zero: bool) -> Extent:
        if not want_zero:
            return (length, DATA | OFFSET_VALID, self.node, offset)
        extents = self._extents
        found = extents.lookup(offset)
        if found is None:
            seen = extents.generation
            try:
                runs = await self._call(find, self._fd, offset, offset + length)
            except OSError:
                # The file system does not tell holes from data.
                return (length, DATA | OFFSET_VALID, self.node, offset)
            extents.store(seen, runs)
            end, is_hole = runs[0][1], runs[0][2]
        else:
            end, is_hole = found
        align = self._offset_align
        if end >= self._size:
            # What the last sector has beyond the end of the file reads as zeroes.
            end = offset + length if is_hole else -(-end // align) * align
        elif not is_hole:
            end = -(-end // align) * align
        elif (end & -align) > offset:
            end &= -align
        else:
            # A hole smaller than a unit of transfer.
            is_hole, end = False, offset + align
        return (min(end - offset, length), (ZERO if is_hole else DATA) | OFFSET_VALID, self.node, offset)

    # --- reading and writing ----------------------------------------------------------------------------------------

    def read_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        if not self._nowait or self._direct:
            return False
        try:
            return os.preadv(self._fd, iov, offset, os.RWF_NOWAIT) == length
        except BlockingIOError:
            return False
        except OSError as exc:
            if exc.errno == errno.EOPNOTSUPP:
                self._nowait = False
            # Whatever it is, the waiting way will see it too, and report it.
            return False

    def write_now(self, offset: int, length: int, iov: list[memoryview]) -> bool:
        if self._direct or self._flush_error or length > _MOST_INLINE:
            return False
        before = _perf_counter()
        if before < self._slow_until:
            return False
        extents = self._extents
        if extents.runs:
            extents.forget()
        extents.generation += 1
        try:
            done = os.pwritev(self._fd, iov, offset)
        except OSError:
            return False
        if offset + done > self._size:
            self._size = offset + done
        after = _perf_counter()
        if after - before > _SLOW:
            if self._quick_writes < _SLOW_AMONG:
                self._slow_until = after + self._avoid
                self._avoid = min(2 * self._avoid, _AVOID_LONGEST)
            self._quick_writes = 0
        else:
            self._quick_writes += 1
            if self._quick_writes == _FORGIVEN:
                self._avoid = _AVOID_FIRST
        return done == length

    async def preadv(self, offset: int, length: int, iov: list[memoryview]) -> None:
        file = self._file
        file.users += 1
        try:
            await (self._engine or self.engine).preadv(file.fd, iov, offset, length)
        finally:
            file.users -= 1
            if file.retired:
                file.close_if_unused()

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        if flags & FUA and self._flush_error:
            raise engines.error(self._flush_error)
        file = self._file
        file.users += 1
        self._changing()
        try:
            await self.engine.pwritev(file.fd, iov, offset, length, os.RWF_DSYNC if flags & FUA else 0)
        except OSError as exc:
            if flags & FUA:
                self._flush_failed(exc)
            raise
        finally:
            self._changed()
            file.release()
        if offset + length > self._size:
            self._size = offset + length

    async def copy_from(self, offset: int, length: int, source: Node, at: int) -> bool:
        other = source.driver
        if not isinstance(other, PosixDriver) or self._direct or other._direct or self._flush_error:
            return False
        file, theirs = self._file, other._file
        file.users += 1
        theirs.users += 1
        self._changing()
        try:
            copied: bool = await self.engine.call(_calls.copy_range, theirs.fd, at, file.fd, offset, length)
        finally:
            self._changed()
            file.release()
            theirs.release()
        if copied and offset + length > self._size:
            self._size = offset + length
        return copied

    def _changing(self) -> None:
        """Something that may change what is data and what is a hole begins."""
        self._extents.forget()

    _changed = _changing

    async def flush(self) -> None:
        if self._flush_error:
            raise engines.error(self._flush_error)
        file = self._file
        file.users += 1
        try:
            await self.engine.fdatasync(file.fd)
        except OSError as exc:
            self._flush_failed(exc)
            raise
        finally:
            file.release()

    def _flush_failed(self, exc: OSError) -> None:
        """The kernel reports a failed write-back once and may then take the pages for clean: what was lost stays lost,
        so no later flush may say that all is well."""
        if not self._direct and exc.errno not in (errno.EINTR, errno.EAGAIN):
            self._flush_error = exc.errno or errno.EIO

    # --- zeroes and discards ----------------------------------------------------------------------------------------

    async def pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        self._changing()
        try:
            if self._is_device:
                await self._zero_device(offset, length, flags)
            else:
                await self._zero_file(offset, length, flags)
        finally:
            self._changed()
        if offset + length > self._size:
            self._size = offset + length

    async def _try(self, what: str, action: Callable[..., engines.Request], *args: Any) -> bool:
        """Do it, unless it is known not to work; False if it does not (whole or in part it may have been done)."""
        if what in self._lacking:
            return False
        file = self._file
        file.users += 1
        try:
            await action(file.fd, *args)
        except OSError as exc:
            if exc.errno in _NEVER:
                self._lacking.add(what)
                return False
            if exc.errno in _NOT_NOW:
                return False
            raise
        finally:
            file.release()
        return True

    async def _punch(self, offset: int, length: int) -> bool:
        mode = libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE
        return await self._try("punch hole", self.engine.fallocate, mode, offset, length)

    async def _zero_file(self, offset: int, length: int, flags: int) -> None:
        fallocate = self.engine.fallocate
        end = offset + length
        # A hole beyond the end does not make the file longer; its last byte does, whoever else extends it now.
        if (
            flags & MAY_UNMAP
            and await self._punch(offset, length)
            and (end <= self._size or await self._try("allocate", fallocate, 0, end - 1, 1))
        ):
            return
        if await self._try("zero range", fallocate, libc.FALLOC_FL_ZERO_RANGE, offset, length):
            return
        if (offset >= self._size or await self._punch(offset, length)) and await self._try(
            "allocate", fallocate, 0, offset, length
        ):
            return
        raise engines.error(errno.ENOTSUP)

    async def _zero_device(self, offset: int, length: int, flags: int) -> None:
        # On a device, a punched hole is a zero write that the kernel refuses rather than write the zeroes out.
        if flags & MAY_UNMAP and await self._punch(offset, length):
            return
        # The other one may be slow.
        if not flags & NO_FALLBACK and await self._try("zero out", self._in_thread, _ioctl.zero_out, offset, length):
            return
        raise engines.error(errno.ENOTSUP)

    def _in_thread(self, fd: int, func: Callable[..., None], *args: int) -> engines.Request:
        assert self._pool is not None
        return self._pool.call(func, fd, *args)

    async def pdiscard(self, offset: int, length: int) -> None:
        self._changing()
        try:
            if self._is_device:
                done = await self._try("discard", self._in_thread, _ioctl.discard, offset, length)
            else:
                done = await self._punch(offset, length)
        except OSError:
            self.discard_failed += 1
            raise
        finally:
            self._changed()
        if not done:
            self.discard_failed += 1
            raise engines.error(errno.ENOTSUP)
        self.discard_ok += 1
        self.discard_bytes += length

    # --- what people see --------------------------------------------------------------------------------------------

    def exact_filename(self) -> str:
        return str(self.options.filename)

    def image_info(self) -> dict[str, Any]:
        return {"dirty_flag": False}

    def format_specific(self) -> Struct | None:
        return ImageInfoSpecificFileWrapper(
            data=ImageInfoSpecificFile(extent_size_hint=_calls.extent_size_hint(self._fd))
        )
