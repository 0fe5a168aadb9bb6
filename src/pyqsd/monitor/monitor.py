"""Monitors: QMP sessions on character devices (``--monitor``)."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from pyqsd.monitor.events import EventStream
from pyqsd.monitor.session import Session
from pyqsd.qapi.errors import Error
from pyqsd.qapi.json_writer import to_wire
from pyqsd.qapi.types import Struct

if TYPE_CHECKING:
    from pyqsd.chardev.chardev import Chardev, Chardevs
    from pyqsd.monitor.dispatcher import Dispatcher
    from pyqsd.qapi.command import EventBus


class MonitorMode(StrEnum):
    """The language of a monitor."""

    READLINE = "readline"
    CONTROL = "control"


class MonitorOptions(Struct, kw_only=True):
    """``--monitor``. `mode`: only ``control``, which is QMP, exists here. `pretty`: JSON in many lines."""

    id: str | None = None
    mode: MonitorMode | None = None
    pretty: bool = False
    chardev: str


class Monitors:
    """Service: the monitors of the daemon."""

    def __init__(self, dispatcher: Dispatcher, events: EventBus, chardevs: Chardevs, version: Struct) -> None:
        self._dispatcher = dispatcher
        self._events = EventStream(events)
        self._chardevs = chardevs
        self._version = to_wire(version)
        self._monitors: list[_Monitor] = []

    def add(self, options: MonitorOptions) -> None:
        """Serve QMP on a character device. Raises Error if there is none such, or it is in use."""
        try:
            chardev = self._chardevs.find(options.chardev)
        except Error:
            raise Error(f'chardev "{options.chardev}" not found')
        if options.mode is MonitorMode.READLINE:
            raise Error("Only QMP is supported")
        monitor = _Monitor(self._dispatcher, self._events, chardev, self._version, options.pretty)
        try:
            chardev.attach(monitor)
        except Error:
            raise Error(f"chardev '{options.chardev}' is already in use")
        self._monitors.append(monitor)

    def close(self) -> None:
        """End all sessions."""
        for monitor in self._monitors:
            monitor.closed()
        self._events.close()


class _Monitor:
    """The front end of a character device: each connection is a session of its own."""

    def __init__(
        self, dispatcher: Dispatcher, events: EventStream, chardev: Chardev, version: Any, pretty: bool
    ) -> None:
        self._dispatcher = dispatcher
        self._events = events
        self._chardev = chardev
        self._version = version
        self._pretty = pretty
        self._session: Session | None = None
        self._unsubscribe: Callable[[], None] | None = None

    def opened(self) -> None:
        self.closed()
        chardev = self._chardev
        session = Session(
            self._dispatcher,
            chardev.write,
            version=self._version,
            pretty=self._pretty,
            pause=chardev.pause_reading,
            resume=chardev.resume_reading,
        )
        self._session = session
        self._unsubscribe = self._events.subscribe(session.emit)
        session.open()

    def received(self, data: bytes) -> None:
        if self._session is not None:
            self._session.received(data)

    def closed(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
