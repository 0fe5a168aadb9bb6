"""``blkdebug``: injects errors into requests, by rules, and can claim to be a device with awkward limits."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import Any, ClassVar, Final

from pyqsd.block import filenames
from pyqsd.block import permissions as perms
from pyqsd.block.child import Child
from pyqsd.block.driver import (
    FUA,
    MAY_UNMAP,
    NO_FALLBACK,
    ROLE_FILTERED,
    ROLE_PRIMARY,
    WRITE_UNCHANGED,
    Filter,
    Limits,
)
from pyqsd.block.extents import DRIVER as BY_DRIVER
from pyqsd.block.extents import Extent
from pyqsd.block.info import BlockPermission
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevOptions, BlockdevRef
from pyqsd.drivers.filters._blkdebug_rules import (
    BlkdebugEvent,
    BlkdebugInjectErrorOptions,
    BlkdebugIOType,
    BlkdebugSetStateOptions,
    Injection,
    Rule,
    Transition,
    read_config,
)
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Int32, Int64

_INT_MAX: Final = (1 << 31) - 1
_LIMITS: Final = ("max_transfer", "opt_write_zero", "max_write_zero", "opt_discard", "max_discard")


class Options(BlockdevOptions, kw_only=True, tag="blkdebug"):
    """QAPI ``BlockdevOptionsBlkdebug``; sizes in bytes."""

    image: BlockdevRef
    config: str | None = None
    align: Int64 | None = None
    max_transfer: Int32 | None = None
    opt_write_zero: Int32 | None = None
    max_write_zero: Int32 | None = None
    opt_discard: Int32 | None = None
    max_discard: Int32 | None = None
    inject_error: list[BlkdebugInjectErrorOptions] | None = None
    set_state: list[BlkdebugSetStateOptions] | None = None
    take_child_perms: list[BlockPermission] | None = None
    unshare_child_perms: list[BlockPermission] | None = None


class Blkdebug(Filter):
    """See docs/drivers/blkdebug.md."""

    name = "blkdebug"
    Options = Options
    names_images: ClassVar[bool] = True
    write_flags = FUA | WRITE_UNCHANGED
    zero_flags = FUA | MAY_UNMAP | NO_FALLBACK | WRITE_UNCHANGED
    strong_options = ("config", "align", *_LIMITS, "inject_error", "set_state")

    def __init__(self, node: Node, options: Any) -> None:
        super().__init__(node, options)
        self._injections: dict[BlkdebugEvent, list[Injection]] = {}
        self._transitions: dict[BlkdebugEvent, list[Transition]] = {}
        self._state = 1
        self._active: list[Injection] = []
        self._limited = False
        #: Requests must come by here, each on its own.
        self._watching = False
        self._take = self._unshare = 0

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        """``blkdebug:CONFIG:IMAGE``, where CONFIG may be empty."""
        config, colon, image = filename.removeprefix("blkdebug:").partition(":")
        if not colon:
            raise Error("blkdebug requires both config file and image path", errno.EINVAL)
        options: dict[str, Any] = {"image": {"filename": image}}
        if config:
            options["config"] = config
        return options

    async def open(self) -> None:
        options = self.options
        for name in ("align", *_LIMITS):
            value = getattr(options, name)
            if value is not None and value < 0:
                raise Error(f"Value '{value}' is out of range for parameter '{_wire(name)}'", errno.EINVAL)
        for name in ("inject_error", "set_state", "take_child_perms", "unshare_child_perms"):
            if getattr(options, name) == []:
                # An empty list is, in the form that QSD takes its options in, something that it does not know.
                raise Error(f"Block protocol 'blkdebug' doesn't support the option '{_wire(name)}'", errno.EINVAL)
        rules: list[Rule] = read_config(options.config) if options.config is not None else []
        rules += [*(options.inject_error or ()), *(options.set_state or ())]
        self._take = _bits(options.take_child_perms)
        self._unshare = _bits(options.unshare_child_perms)
        await self.node.open_child("image", options.image, ROLE_FILTERED | ROLE_PRIMARY)
        self._check_limits(options)
        self._limited = bool(options.align) or any(getattr(options, name) for name in _LIMITS)
        for rule in rules:
            if isinstance(rule, BlkdebugInjectErrorOptions):
                self._injections.setdefault(rule.event, []).append(Injection(rule))
            else:
                self._transitions.setdefault(rule.event, []).append(Transition(rule))
        if rules:
            self.node.debug_event = self._event
        self._watch()
        self._event(BlkdebugEvent.NONE)

    def _check_limits(self, options: Any) -> None:
        def check(name: str, value: int | None, good: bool) -> None:
            if value and (value >= _INT_MAX or not good):
                raise Error(f"Cannot meet constraints with {name} {value}", errno.EINVAL)

        align = options.align or 0
        check("align", align, align & (align - 1) == 0)
        align = max(align, self.target.limits.request_alignment)
        check("max-transfer", options.max_transfer, (options.max_transfer or 0) % align == 0)
        for what in ("write_zero", "discard"):
            best = getattr(options, f"opt_{what}") or 0
            most = getattr(options, f"max_{what}") or 0
            check(_wire(f"opt_{what}"), best, best % align == 0)
            check(_wire(f"max_{what}"), most, most % max(best, align) == 0)

    def refresh_limits(self, limits: Limits) -> None:
        options = self.options
        limits.request_alignment = options.align or limits.request_alignment
        limits.max_transfer = options.max_transfer or limits.max_transfer
        limits.pwrite_zeroes_alignment = options.opt_write_zero or limits.pwrite_zeroes_alignment
        limits.max_pwrite_zeroes = options.max_write_zero or limits.max_pwrite_zeroes
        limits.pdiscard_alignment = options.opt_discard or limits.pdiscard_alignment
        limits.max_pdiscard = options.max_discard or limits.max_pdiscard

    def child_perms(self, child: Child, role: int, perm: int, shared: int) -> tuple[int, int]:
        need, share = super().child_perms(child, role, perm, shared)
        return need | self._take, share & ~self._unshare

    # --- rules --------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        self._watching = self._limited or any(self._injections.values())

    def _event(self, name: str) -> None:
        """Something happens: which errors are to be injected from now on, and what is the state?"""
        event = BlkdebugEvent(name)
        found = [rule for rule in self._injections.get(event, ()) if rule.state in (0, self._state)]
        if found:
            self._active = found
        for change in self._transitions.get(event, ()):
            if change.state in (0, self._state):
                self._state = change.new_state
                break

    async def _check(self, kind: BlkdebugIOType, offset: int, length: int) -> None:
        """Fail this request if a rule says so. Raises OSError."""
        for rule in self._active:
            if rule.matches(kind, offset, length):
                break
        else:
            return
        if rule.errno <= 0:
            return
        if rule.once:
            self._active.remove(rule)
            for rules in self._injections.values():
                if rule in rules:
                    rules.remove(rule)
            self._watch()
        if not rule.immediately:
            await asyncio.sleep(0)
        raise OSError(rule.errno, os.strerror(rule.errno))

    # --- requests -----------------------------------------------------------------------------------------------------

    def map(self, offset: int, length: int) -> Extent | None:
        extent = super().map(offset, length)
        if extent is None or not self._watching:
            return extent
        n, flags, node, at = extent
        return (n, flags | BY_DRIVER, node, at)

    def map_write(self, offset: int, length: int) -> tuple[int, Node, int] | None:
        return None if self._watching else super().map_write(offset, length)

    async def preadv(self, offset: int, length: int, iov: list[memoryview]) -> None:
        await self._check(BlkdebugIOType.READ, offset, length)
        await super().preadv(offset, length, iov)

    async def pwritev(self, offset: int, length: int, iov: list[memoryview], flags: int) -> None:
        await self._check(BlkdebugIOType.WRITE, offset, length)
        await super().pwritev(offset, length, iov, flags)

    async def pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        limits = self.node.limits
        if length < max(limits.request_alignment, limits.pwrite_zeroes_alignment):
            raise OSError(errno.ENOTSUP, "less than can be zeroed at once")
        await self._check(BlkdebugIOType.WRITE_ZEROES, offset, length)
        await super().pwrite_zeroes(offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        if length < self.node.limits.request_alignment:
            raise OSError(errno.ENOTSUP, "less than can be discarded at once")
        await self._check(BlkdebugIOType.DISCARD, offset, length)
        await super().pdiscard(offset, length)

    async def flush(self) -> None:
        if self.node.needs_flush:
            await self._check(BlkdebugIOType.FLUSH, 0, 0)

    async def block_status(self, offset: int, length: int, want_zero: bool) -> Extent:
        await self._check(BlkdebugIOType.BLOCK_STATUS, offset, length)
        return await super().block_status(offset, length, want_zero)

    # --- what people see ----------------------------------------------------------------------------------------------

    def allocated_size(self) -> int | None:
        return None

    def exact_filename(self) -> str:
        """``blkdebug:CONFIG:IMAGE``, if that says it all."""
        options = self.options
        if any(getattr(options, name) is not None for name in self.strong_options if name != "config"):
            return ""
        image = filenames.exact_filename(self.target)
        return f"blkdebug:{options.config or ''}:{image}" if image else ""


def _wire(name: str) -> str:
    return name.replace("_", "-")


def _bits(names: list[BlockPermission] | None) -> int:
    wanted = [str(name) for name in names or ()]
    return sum(bit for bit in perms.NAMES if perms.qapi_names(bit)[0] in wanted)


DRIVER = Blkdebug
