"""Events with and without a rate limit."""

from __future__ import annotations

import asyncio
import time

import pytest

from pyqsd.block.events import BlockErrorAction, BlockIoError, IoOperationType
from pyqsd.monitor import events
from pyqsd.monitor.events import EventStream
from pyqsd.qapi.command import Event, EventBus


class Often(Event, kw_only=True):
    NAME = "OFTEN"
    number: int


class Seldom(Event, kw_only=True):
    NAME = "SELDOM"
    RATE_LIMIT = ("device",)
    device: str
    number: int


class Rig:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(events, "INTERVAL", 0.05)
        self.bus = EventBus()
        self.stream = EventStream(self.bus)
        self.seen: list[Event] = []
        self.times: list[int] = []
        self.more = asyncio.Event()
        self.unsubscribe = self.stream.subscribe(self.listen)

    def listen(self, event: Event, when: int) -> None:
        self.seen.append(event)
        self.times.append(when)
        self.more.set()

    async def next(self) -> None:
        self.more.clear()
        await self.more.wait()

    async def quiet(self) -> None:
        """Until no timer runs any more."""
        while self.stream._timers:  # noqa: ASYNC110 -- the end of a timer is no event to anybody else
            await asyncio.sleep(0.01)


async def test_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    before = time.time_ns() // 1000
    for number in range(5):
        rig.bus.emit(Often(number=number))
    assert rig.seen == [Often(number=number) for number in range(5)]
    assert before <= rig.times[0] <= rig.times[-1] <= time.time_ns() // 1000
    rig.unsubscribe()
    rig.bus.emit(Often(number=6))
    assert len(rig.seen) == 5


async def test_with_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    for number in range(5):
        rig.bus.emit(Seldom(device="a", number=number))
        rig.bus.emit(Seldom(device="b", number=number))
    last = time.time_ns() // 1000
    # The first ones at once; one device's do not hold up another's.
    assert rig.seen == [Seldom(device="a", number=0), Seldom(device="b", number=0)]
    await rig.next()
    while len(rig.seen) < 4:
        await rig.next()
    # Of the others the last ones, with the time when they happened.
    assert rig.seen[2:] == [Seldom(device="a", number=4), Seldom(device="b", number=4)]
    assert all(when <= last for when in rig.times)
    await rig.quiet()
    rig.bus.emit(Seldom(device="a", number=9))
    assert rig.seen[4:] == [Seldom(device="a", number=9)]
    rig.bus.emit(Seldom(device="a", number=10))
    await rig.quiet()
    assert rig.seen[5:] == [Seldom(device="a", number=10)]


async def test_close(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch)
    rig.bus.emit(Seldom(device="a", number=1))
    rig.bus.emit(Seldom(device="a", number=2))
    rig.stream.close()
    rig.bus.emit(Often(number=1))
    await asyncio.sleep(2 * events.INTERVAL)
    assert rig.seen == [Seldom(device="a", number=1)]


def test_errors_of_a_busy_disk_are_limited() -> None:
    assert BlockIoError.RATE_LIMIT is not None
    event = BlockIoError(
        qom_path="", device="d", operation=IoOperationType.READ, action=BlockErrorAction.REPORT, reason="I/O error"
    )
    assert [getattr(event, member) for member in BlockIoError.RATE_LIMIT] == ["", "d", None]
