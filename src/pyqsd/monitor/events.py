"""Events on their way to the monitors: stamped, and some of them not too often."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable

from pyqsd.qapi.command import Event, EventBus

#: Events that are alike are at least this far apart, in seconds.
INTERVAL = 1.0

#: Gets an event and when it happened, in microseconds since the epoch.
Listener = Callable[[Event, int], None]


class EventStream:
    """Hands the events of a bus to the monitors.

    Of events with a rate limit the first goes out at once; of those like it that follow within a second only the last
    one does, when the second is over (qmp-spec, "Asynchronous events").
    """

    def __init__(self, bus: EventBus) -> None:
        self._listeners: list[Listener] = []
        self._unsubscribe = bus.subscribe(self._happened)
        #: For each kind of event that went out within the last second: what ends that, and what goes out then.
        self._timers: dict[Hashable, asyncio.TimerHandle] = {}
        self._held: dict[Hashable, tuple[Event, int]] = {}

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` for every event from now on; the returned function ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def close(self) -> None:
        """Send no more events."""
        self._unsubscribe()
        self._listeners.clear()
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._held.clear()

    def _happened(self, event: Event) -> None:
        now = time.time_ns() // 1000
        if event.RATE_LIMIT is None:
            self._send(event, now)
            return
        kind = (event.NAME, *(getattr(event, member) for member in event.RATE_LIMIT))
        if kind in self._timers:
            self._held[kind] = (event, now)
        else:
            self._send_limited(kind, event, now)

    def _send_limited(self, kind: Hashable, event: Event, when: int) -> None:
        self._timers[kind] = asyncio.get_running_loop().call_later(INTERVAL, self._over, kind)
        self._send(event, when)

    def _over(self, kind: Hashable) -> None:
        del self._timers[kind]
        held = self._held.pop(kind, None)
        if held is not None:
            self._send_limited(kind, *held)

    def _send(self, event: Event, when: int) -> None:
        for listener in tuple(self._listeners):
            listener(event, when)
