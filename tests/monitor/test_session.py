"""The session's own logic: order, pauses, out-of-band execution, events, failures of commands."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import re
import time
from typing import Any

import pytest

from pyqsd.monitor.events import EventStream
from pyqsd.monitor.session import QUEUE_LIMIT, Session
from pyqsd.qapi.command import Event, EventBus
from pyqsd.qapi.errors import DeviceNotFound, Error
from pyqsd.qapi.types import Struct
from tests.monitor.wire import NEGOTIATE, NEGOTIATE_OOB, Local, command


class Gate:
    """A service whose commands wait until they are let through."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.waiting: dict[int, asyncio.Future[None]] = {}

    def release(self, number: int) -> None:
        self.waiting.pop(number).set_result(None)


class Answer(Struct, kw_only=True):
    number: int


async def wait(gate: Gate, /, *, number: int) -> Answer:
    gate.begun.append(number)
    gate.waiting[number] = asyncio.get_running_loop().create_future()
    await gate.waiting[number]
    return Answer(number=number)


async def hello(*, number: int = 0) -> Answer:
    return Answer(number=number)


async def fail(*, how: str) -> Answer:
    match how:
        case "error":
            raise Error("That went wrong", errno.EIO, "A hint")
        case "class":
            raise DeviceNotFound("Device 'x' not found")
        case "errno":
            raise OSError(errno.ENOSPC, "disk is full")
        case "mistake":
            raise ZeroDivisionError("by zero")
        case "result":
            return object()  # type: ignore[return-value]
    raise AssertionError(how)


WAIT = command("wait", wait)
HELLO = command("hello", hello)
FAIL = command("fail", fail)
SIDE = command("side", wait, allow_oob=True)
QUICK_SIDE = command("quick-side", hello, allow_oob=True)


def request(name: str, identity: Any, *, oob: bool = False, **arguments: Any) -> bytes:
    message = {"exec-oob" if oob else "execute": name, "id": identity, "arguments": arguments}
    return json.dumps(message).encode() + b"\n"


def ids(messages: list[Any]) -> list[Any]:
    return [message.get("id") for message in messages]


async def turn() -> None:
    """Lets everything that can go on go on."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_greeting_and_first_command() -> None:
    local = Local(HELLO)
    (greeting,) = [json.loads(local.greeting)]
    assert greeting["QMP"]["capabilities"] == ["oob"]
    assert set(greeting["QMP"]["version"]) == {"qemu", "package"}
    assert local.greeting.endswith(b"}\r\n")
    assert local.send(NEGOTIATE) == b'{"return": {}}\r\n'
    assert local.send(request("hello", "a", number=3)) == b'{"return": {"number": 3}, "id": "a"}\r\n'


async def test_pipelined_commands_run_in_order_one_at_a_time() -> None:
    gate = Gate()
    local = Local(WAIT, HELLO, services={Gate: gate})
    local.send(NEGOTIATE)
    local.send(b"".join(request("wait" if number % 2 else "hello", number, number=number) for number in range(1, 7)))
    assert gate.begun == [1] and local.paused
    for number in (1, 3, 5):
        gate.release(number)
        await turn()
    assert gate.begun == [1, 3, 5]
    assert not local.paused
    answers = local.messages()
    assert answers == [{"return": {"number": number}, "id": number} for number in range(1, 7)]


async def test_reading_pauses_until_the_answer_without_oob() -> None:
    gate = Gate()
    local = Local(WAIT, HELLO, services={Gate: gate})
    local.send(NEGOTIATE)
    local.send(request("wait", 1, number=1))
    assert local.paused
    # What arrives nevertheless is not lost.
    assert local.send(request("hello", 2) + b'{"execute": "hel') == b""
    gate.release(1)
    await turn()
    assert not local.paused
    assert ids(local.messages()) == [1, 2]
    local.session.received(b'lo"}')
    assert local.messages() == [{"return": {"number": 0}}]


async def test_oob_overtakes() -> None:
    gate = Gate()
    local = Local(WAIT, HELLO, SIDE, QUICK_SIDE, services={Gate: gate})
    local.send(NEGOTIATE_OOB)
    local.send(request("wait", 1, number=1) + request("hello", 2))
    assert not local.paused
    local.session.received(request("quick-side", "quick", oob=True))
    assert ids(local.messages()) == ["quick"]
    local.send(request("side", "a", oob=True, number=10) + request("side", "b", oob=True, number=11))
    assert gate.begun == [1, 10, 11]
    gate.release(11)
    await turn()
    gate.release(10)
    await turn()
    assert ids(local.messages()) == ["b", "a"]
    gate.release(1)
    await turn()
    assert ids(local.messages()) == [1, 2]


async def test_in_band_command_that_allows_oob_waits_its_turn() -> None:
    gate = Gate()
    local = Local(WAIT, QUICK_SIDE, services={Gate: gate})
    local.send(NEGOTIATE_OOB)
    local.send(request("wait", 1, number=1) + request("quick-side", 2))
    assert local.take() == b""
    gate.release(1)
    await turn()
    assert ids(local.messages()) == [1, 2]


async def test_queue_limit() -> None:
    gate = Gate()
    local = Local(WAIT, HELLO, QUICK_SIDE, services={Gate: gate})
    local.send(NEGOTIATE_OOB)
    local.send(request("wait", 0, number=0))
    for number in range(1, QUEUE_LIMIT):
        local.send(request("wait", number, number=number))
        assert not local.paused
    local.send(request("wait", QUEUE_LIMIT, number=QUEUE_LIMIT))
    assert local.paused
    # Beyond the limit nothing overtakes.
    local.send(request("wait", 99, number=99) + request("quick-side", "quick", oob=True))
    assert local.take() == b""
    gate.release(0)
    await turn()
    # One place is free, and taken again; then the one that overtakes is still behind.
    assert ids(local.messages()) == [0]
    assert local.paused
    gate.release(1)
    await turn()
    assert ids(local.messages()) == [1, "quick"]
    assert not local.paused
    for number in (*range(2, QUEUE_LIMIT + 1), 99):
        gate.release(number)
        await turn()
    assert ids(local.messages()) == [*range(2, QUEUE_LIMIT + 1), 99]


async def test_mistakes_are_answered_in_turn() -> None:
    gate = Gate()
    local = Local(WAIT, services={Gate: gate})
    local.send(NEGOTIATE_OOB)
    local.send(request("wait", 1, number=1) + b'[1,}\n{"id": 2}\n' + request("nosuch", 3))
    assert local.take() == b""
    gate.release(1)
    await turn()
    first, second, third, fourth = local.messages()
    assert first["id"] == 1
    assert second == {"error": {"class": "GenericError", "desc": "JSON parse error, expecting value"}}
    assert third["id"] == 2 and third["error"]["desc"] == "QMP input lacks member 'execute'"
    assert fourth["id"] == 3 and fourth["error"]["class"] == "CommandNotFound"


async def test_sessions_take_turns() -> None:
    gate = Gate()
    one = Local(WAIT, HELLO, services={Gate: gate})
    two = Local(dispatcher=one.dispatcher)
    for local in (one, two):
        local.send(NEGOTIATE_OOB)
    one.send(request("wait", 0, number=0) + request("wait", 1, number=1) + request("wait", 3, number=3))
    two.send(request("wait", 2, number=2))
    assert gate.begun == [0]
    for number in (0, 1, 2, 3):
        gate.release(number)
        await turn()
    # One command at a time in all, and none that was there first has to wait for all of the other session's.
    assert gate.begun == [0, 1, 2, 3]
    assert ids(one.messages()) == [0, 1, 3]
    assert ids(two.messages()) == [2]


async def test_capabilities_are_each_sessions_own() -> None:
    one = Local(QUICK_SIDE)
    two = Local(dispatcher=one.dispatcher)
    one.send(NEGOTIATE_OOB)
    two.send(NEGOTIATE)
    assert one.call({"exec-oob": "quick-side"}) == {"return": {"number": 0}}
    assert two.call({"exec-oob": "quick-side"})["error"]["desc"] == "QMP input member 'exec-oob' is unexpected"
    three = Local(dispatcher=one.dispatcher)
    assert three.call({"execute": "quick-side"})["error"]["class"] == "CommandNotFound"


@pytest.mark.parametrize(
    ("how", "qmp_class", "desc"),
    [
        ("error", "GenericError", "That went wrong"),
        ("class", "DeviceNotFound", "Device 'x' not found"),
        ("errno", "GenericError", "No space left on device"),
        ("mistake", "GenericError", "Internal error in command fail: ZeroDivisionError: by zero"),
    ],
)
async def test_failures(how: str, qmp_class: str, desc: str, caplog: pytest.LogCaptureFixture) -> None:
    local = Local(FAIL, HELLO)
    local.send(NEGOTIATE)
    answer = local.call({"execute": "fail", "arguments": {"how": how}, "id": 1})
    assert answer == {"id": 1, "error": {"class": qmp_class, "desc": desc}}
    assert bool([record for record in caplog.records if record.levelno >= logging.ERROR]) == (how == "mistake")
    assert local.call({"execute": "hello"}) == {"return": {"number": 0}}


async def test_a_result_that_has_no_wire_form(caplog: pytest.LogCaptureFixture) -> None:
    local = Local(FAIL, HELLO)
    local.send(NEGOTIATE)
    answer = local.call({"execute": "fail", "arguments": {"how": "result"}, "id": 1})
    assert answer["error"]["desc"].startswith("Internal error in command fail: TypeError")
    assert caplog.records
    assert local.call({"execute": "hello"}) == {"return": {"number": 0}}


class Happened(Event, kw_only=True):
    NAME = "HAPPENED"
    number: int | None = None


async def test_events() -> None:
    bus = EventBus()
    local = Local(HELLO)
    EventStream(bus).subscribe(local.session.emit)
    bus.emit(Happened(number=1))
    assert local.take() == b""  # nothing before the negotiation has ended
    local.send(NEGOTIATE)
    before = time.time()
    bus.emit(Happened(number=2))
    bus.emit(Happened())
    after = time.time()
    text = local.take()
    assert re.fullmatch(
        rb'{"timestamp": {"seconds": \d+, "microseconds": \d+}, "event": "HAPPENED", "data": {"number": 2}}\r\n'
        rb'{"timestamp": {"seconds": \d+, "microseconds": \d+}, "event": "HAPPENED"}\r\n',
        text,
    )
    for line in text.splitlines():
        stamp = json.loads(line)["timestamp"]
        assert 0 <= stamp["microseconds"] < 1_000_000
        assert before - 0.001 <= stamp["seconds"] + stamp["microseconds"] / 1e6 <= after + 0.001
    local.session.close()
    bus.emit(Happened())
    assert local.take() == b""


async def test_an_event_keeps_its_place_among_the_answers() -> None:
    bus = EventBus()

    async def announce(*, number: int) -> None:
        bus.emit(Happened(number=number))

    local = Local(command("announce", announce))
    EventStream(bus).subscribe(local.session.emit)
    local.send(NEGOTIATE)
    local.session.received(request("announce", 1, number=1) + request("announce", 2, number=2))
    kinds = [message.get("id", message.get("event")) for message in local.messages()]
    assert kinds == ["HAPPENED", 1, "HAPPENED", 2]


async def test_pretty() -> None:
    bus = EventBus()
    local = Local(HELLO, pretty=True)
    EventStream(bus).subscribe(local.session.emit)
    assert local.greeting.startswith(b'{\r\n    "QMP": {\r\n        "version": {\r\n')
    local.send(NEGOTIATE)
    assert local.send(request("hello", [])) == (
        b'{\r\n    "return": {\r\n        "number": 0\r\n    },\r\n    "id": [\r\n    ]\r\n}\r\n'
    )
    assert local.send(request("nosuch", 5)) == (
        b'{\r\n    "id": 5,\r\n    "error": {\r\n        "class": "CommandNotFound",\r\n'
        b'        "desc": "The command nosuch has not been found"\r\n    }\r\n}\r\n'
    )
    bus.emit(Happened())
    assert b'\r\n    "event": "HAPPENED"\r\n}\r\n' in local.take()


async def test_close_forgets_what_waits() -> None:
    gate = Gate()
    local = Local(WAIT, services={Gate: gate})
    other = Local(dispatcher=local.dispatcher)
    local.send(NEGOTIATE_OOB)
    other.send(NEGOTIATE)
    local.send(request("wait", 1, number=1) + request("wait", 2, number=2))
    other.send(request("wait", 3, number=3))
    local.session.close()
    local.send(request("wait", 4, number=4))
    gate.release(1)
    await turn()
    assert gate.begun == [1, 3]
    gate.release(3)
    await turn()
    assert local.take() == b""
    assert ids(other.messages()) == [3]


async def test_other_things_run_while_commands_stream_in(impatience: None) -> None:
    local = Local(HELLO)
    local.send(NEGOTIATE)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counter = asyncio.get_running_loop().create_task(count())
    try:
        answers = await local.feed(request("hello", 1) * 500, 1 << 20)
    finally:
        counter.cancel()
    assert answers.count(b"\r\n") == 500
    assert turns >= 500


async def test_deep_arguments_are_an_error_not_a_crash() -> None:
    async def anything(*, value: Any) -> Any:
        return value

    local = Local(command("anything", anything))
    local.send(NEGOTIATE)
    deep = b"[" * 1000 + b"]" * 1000
    answer = local.send(b'{"execute": "anything", "arguments": {"value": ' + deep + b'}, "id": 1}')
    assert answer.endswith(b"\r\n") and answer.count(b"\r\n") == 1
    assert local.call({"execute": "query-commands", "id": 2})["id"] == 2


def test_session_is_for_one_loop() -> None:
    async def make() -> Session:
        return Local().session

    assert asyncio.run(make()).negotiated is False
