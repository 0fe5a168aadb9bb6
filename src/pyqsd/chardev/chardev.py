"""Character devices: where monitors read and write, and the service that knows all of them.

A chardev has at most one frontend. While a frontend is attached it is told of connections and gets what arrives;
without one nothing is read, so that a peer's first words are still there when the frontend comes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pyqsd.chardev import registry
from pyqsd.chardev.options import ChardevBackend, ChardevCommon
from pyqsd.chardev.paths import encode
from pyqsd.qapi.errors import Error, from_oserror
from pyqsd.trace import report

if TYPE_CHECKING:
    from pyqsd.chardev.opts import Opts


class Frontend(Protocol):
    """What uses a chardev."""

    def opened(self) -> None:
        """There is a peer from now on (also called by `Chardev.attach`, if there is one already)."""

    def received(self, data: bytes) -> None:
        """The peer sent `data` (a few KiB at most)."""

    def closed(self) -> None:
        """The peer is gone; another one may come, with `opened`."""


class Chardev:
    """Base of the backends. A subclass calls `_opened`, `_received` and `_closed`, and overrides what is below."""

    #: The backend's name on the wire.
    name: ClassVar[str]
    #: The QOM type above ``chardev-NAME``.
    qom_parent: ClassVar[str] = "chardev"
    #: QOM properties of the type as (name, type); read with `qom_get`, none can be written.
    qom_properties: ClassVar[tuple[tuple[str, str], ...]] = ()

    def __init__(self, label: str, options: Any) -> None:
        self.label = label
        self.options = options
        self.frontend: Frontend | None = None
        #: There is a peer.
        self.is_open = False
        self._reading_paused = False
        self._log = -1
        self._loss_reported = False

    # --- for the frontend ------------------------------------------------------------------------------------------

    def attach(self, frontend: Frontend) -> None:
        """Make `frontend` the one that gets what arrives here. Raises Error when there is one already."""
        if self.frontend is not None:
            raise Error(f"chardev '{self.label}' is already in use")
        self.frontend = frontend
        self._reading_paused = False
        if self.is_open:
            frontend.opened()
        self._update_reading()

    def detach(self) -> None:
        """Let the frontend go. It is not called any more."""
        self.frontend = None
        self._update_reading()

    def write(self, data: bytes) -> None:
        """Send `data`, or keep it until the peer takes it; never blocks. Without a peer it is lost. A peer that does
        not read is not read from either; past a limit, what it does not take is lost, and a connection is cut."""
        if self._log >= 0:
            try:
                os.write(self._log, data)
            except OSError:
                pass  # a log that cannot be written must not stop what is logged
        if self.is_open:
            if self._loss_reported and not self.pressed:
                self._loss_reported = False
            self._write(data)

    @property
    def pressed(self) -> bool:
        """The peer has not yet taken so much that was written that nothing more should be made for it just now."""
        return False

    def pause_reading(self) -> None:
        """Do not call `Frontend.received` until `resume_reading`."""
        self._reading_paused = True
        self._update_reading()

    def resume_reading(self) -> None:
        """Go on calling `Frontend.received`."""
        self._reading_paused = False
        self._update_reading()

    # --- for the backend -------------------------------------------------------------------------------------------

    @property
    def _wants_input(self) -> bool:
        return self.frontend is not None and not self._reading_paused

    def _opened(self) -> None:
        if not self.is_open:
            self.is_open = True
            if self.frontend is not None:
                self.frontend.opened()

    def _received(self, data: bytes) -> None:
        if self.frontend is not None:
            self.frontend.received(data)

    def _closed(self) -> None:
        if self.is_open:
            self.is_open = False
            if self.frontend is not None:
                self.frontend.closed()

    def _output_lost(self) -> None:
        """Say that something written was lost, once until the peer reads again."""
        if not self._loss_reported:
            self._loss_reported = True
            report.warn(f"character device {self.label}: nobody reads it, output is lost")

    # --- what a backend does ---------------------------------------------------------------------------------------

    @classmethod
    def options_from(cls, opts: Opts) -> ChardevCommon:
        """The options from a command line's flat ones. Raises Error."""
        return ChardevCommon(**opts.common())

    async def open(self) -> None:
        """Open the device; waits for a peer if the options ask for that. Raises Error."""
        self._opened()

    async def close(self) -> None:
        """Release everything; what is still unsent and the peer takes at once is sent."""

    def filename(self) -> str:
        """How ``query-chardev`` describes it."""
        return self.name

    def reply(self) -> str | None:
        """The name of the pseudo terminal, if it is one."""
        return None

    def qom_get(self, name: str) -> Any:
        """The value of the QOM property `name`, one of `qom_properties`."""
        raise KeyError(name)

    def _write(self, data: bytes) -> None:
        """Send `data` to the peer, without blocking."""

    def _update_reading(self) -> None:
        """Start or stop reading as `_wants_input` says."""

    # --- the log ---------------------------------------------------------------------------------------------------

    def open_log(self) -> None:
        """Open the file that everything written is copied to. Raises Error."""
        name = self.options.logfile
        if name is None:
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        flags |= os.O_APPEND if self.options.logappend else os.O_TRUNC
        try:
            self._log = os.open(encode(name), flags, 0o666)
        except OSError as exc:
            raise from_oserror(exc, f"Could not create '{name}'") from exc

    def close_log(self) -> None:
        """Close that file."""
        if self._log >= 0:
            os.close(self._log)
            self._log = -1


class Chardevs:
    """All chardevs of a daemon, by label (a service)."""

    def __init__(self) -> None:
        self._chardevs: dict[str, Chardev] = {}
        #: Labels of chardevs that are still being opened.
        self._opening: set[str] = set()

    def __iter__(self) -> Iterator[Chardev]:
        return iter(tuple(self._chardevs.values()))

    def get(self, label: str) -> Chardev | None:
        """The chardev `label`, or None."""
        return self._chardevs.get(label)

    def find(self, label: str) -> Chardev:
        """The chardev `label`. Raises Error."""
        chardev = self._chardevs.get(label)
        if chardev is None:
            raise Error(f"Chardev '{label}' not found", errno.ENOENT)
        return chardev

    async def add(self, label: str, backend: ChardevBackend) -> Chardev:
        """Open a chardev. Raises Error, also when the label is taken."""
        cls = registry.chardev_class(str(backend.__struct_config__.tag))
        return await self._add(cls(label, backend.data))

    async def add_from_command_line(self, text: str) -> Chardev:
        """Open the chardev that ``--chardev`` describes. Raises Error; see `pyqsd.chardev.opts.help_for` for help."""
        from pyqsd.chardev.opts import parse

        opts = parse(text)
        label = opts.label()
        cls = opts.backend()
        options = cls.options_from(opts)
        opts.refuse_unsupported()
        chardev = await self._add(cls(label, options))
        name = chardev.reply()
        if name is not None:
            print(f"char device redirected to {name} (label {label})", flush=True)
        return chardev

    async def _add(self, chardev: Chardev) -> Chardev:
        label = chardev.label
        # "type" is what the container of the chardevs itself has as a property.
        if label in self._chardevs or label in self._opening or label == "type":
            raise Error(f"attempt to add duplicate property '{label}' to object (type 'container')", errno.EEXIST)
        await self._open(chardev)
        self._chardevs[label] = chardev
        return chardev

    async def _open(self, chardev: Chardev) -> None:
        self._opening.add(chardev.label)
        try:
            chardev.open_log()
            try:
                await chardev.open()
            except BaseException:
                chardev.close_log()
                raise
        finally:
            self._opening.discard(chardev.label)

    async def change(self, label: str, backend: ChardevBackend) -> Chardev:
        """Put `backend` in the place of the chardev `label`, which must have no frontend; it stays if that cannot be
        opened. Raises Error."""
        old = self._chardevs.get(label)
        if old is None or label in self._opening:
            raise Error(f"Chardev '{label}' does not exist", errno.ENOENT)
        if old.frontend is not None:
            raise Error("Chardev user does not support chardev hotswap", errno.EBUSY)
        chardev = registry.chardev_class(str(backend.__struct_config__.tag))(label, backend.data)
        await self._open(chardev)
        self._chardevs[label] = chardev
        await old.close()
        old.close_log()
        return chardev

    async def remove(self, label: str) -> None:
        """Close the chardev `label`. Raises Error when there is none, or when it has a frontend."""
        chardev = self.find(label)
        if chardev.frontend is not None:
            raise Error(f"Chardev '{label}' is busy", errno.EBUSY)
        await self._close(chardev)

    async def close_all(self) -> None:
        """Close all, with or without frontend."""
        for chardev in reversed(tuple(self._chardevs.values())):
            chardev.frontend = None
            await self._close(chardev)

    async def _close(self, chardev: Chardev) -> None:
        del self._chardevs[chardev.label]
        await chardev.close()
        chardev.close_log()
