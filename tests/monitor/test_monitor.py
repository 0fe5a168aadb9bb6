"""Monitors on character devices."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pyqsd.chardev.chardev import Chardev, Chardevs
from pyqsd.monitor.commands import VERSION, Shutdown
from pyqsd.monitor.dispatcher import Dispatcher
from pyqsd.monitor.monitor import MonitorOptions, Monitors
from pyqsd.qapi.command import COMMANDS, Event, EventBus
from pyqsd.qapi.convert import convert
from pyqsd.qapi.errors import Error
from pyqsd.qapi.keyval import parse_option


class Stop(Shutdown):
    def __init__(self) -> None:
        self.requested = 0

    def request(self) -> None:
        self.requested += 1


class Happened(Event, kw_only=True):
    NAME = "HAPPENED"


class House:
    """The services that monitors need."""

    def __init__(self) -> None:
        self.events = EventBus()
        self.chardevs = Chardevs()
        self.stop = Stop()
        services: dict[Any, object] = {Shutdown: self.stop}
        own = ("qmp_capabilities", "query-version", "query-commands", "query-qmp-schema", "quit")
        services[Dispatcher] = self.dispatcher = Dispatcher(services, {name: COMMANDS[name] for name in own})
        self.monitors = Monitors(self.dispatcher, self.events, self.chardevs, VERSION)

    def add(self, text: str) -> None:
        value, keyval = parse_option(text, "chardev")
        self.monitors.add(convert(value, MonitorOptions, keyval=keyval))


@asynccontextmanager
async def house() -> AsyncIterator[House]:
    made = House()
    try:
        yield made
    finally:
        made.monitors.close()
        await made.chardevs.close_all()


class Client:
    """A QMP client on a unix socket, inside the same loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def message(self) -> Any:
        return json.loads(await self.reader.readline())

    async def command(self, name: str, **arguments: Any) -> Any:
        self.writer.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        return await self.message()

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()


async def connect(path: Path) -> Client:
    return Client(*await asyncio.open_unix_connection(path, limit=1 << 24))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Parameter 'chardev' is missing"),
        ("nosuch", 'chardev "nosuch" not found'),
        ("nosuch,mode=readline", 'chardev "nosuch" not found'),
        ("c,mode=readline", "Only QMP is supported"),
        ("c,mode=x", "Parameter 'mode' does not accept value 'x'"),
        ("c,pretty=x", "Parameter 'pretty' expects 'on' or 'off'"),
        ("c,x=1", "Parameter 'x' is unexpected"),
        ('{"chardev": 1}', "Invalid parameter type for 'chardev', expected: string"),
    ],
)
async def test_wrong_options(text: str, message: str) -> None:
    async with house() as home:
        await home.chardevs.add_from_command_line("null,id=c")
        with pytest.raises(Error) as caught:
            home.add(text)
        assert caught.value.desc == message


async def test_a_chardev_is_used_once() -> None:
    async with house() as home:
        await home.chardevs.add_from_command_line("null,id=c")
        home.add("chardev=c,mode=control,id=m")
        with pytest.raises(Error) as caught:
            home.add("c")
        assert caught.value.desc == "chardev 'c' is already in use"
        with pytest.raises(Error, match="is busy"):
            await home.chardevs.remove("c")


async def test_sessions_over_a_socket(tmp_path: Path) -> None:
    async with house() as home:
        path = tmp_path / "qmp.sock"
        await home.chardevs.add_from_command_line(f"socket,id=c,path={path},server=on,wait=off")
        home.add("c")
        for _ in range(2):  # each connection is a session of its own
            client = await connect(path)
            assert "QMP" in await client.message()
            assert (await client.command("query-version"))["error"]["class"] == "CommandNotFound"
            home.events.emit(Happened())
            assert await client.command("qmp_capabilities") == {"return": {}}
            assert (await client.command("query-version"))["return"]["qemu"]["major"] == 10
            home.events.emit(Happened())
            assert (await client.message())["event"] == "HAPPENED"
            schema = (await client.command("query-qmp-schema"))["return"]
            assert {"quit", "query-version"} <= {info["name"] for info in schema}
            await client.close()
        home.events.emit(Happened())  # to nobody


async def test_several_monitors(tmp_path: Path) -> None:
    async with house() as home:
        clients = []
        for number, options in enumerate(("", ",pretty=on", "")):
            path = tmp_path / f"qmp{number}.sock"
            await home.chardevs.add_from_command_line(f"socket,id=c{number},path={path},server=on,wait=off")
            home.add(f"c{number}{options}")
            clients.append(await connect(path))
        plain, pretty, silent = clients
        assert "QMP" in await plain.message()
        assert await pretty.reader.readline() == b"{\r\n"
        await plain.command("qmp_capabilities")
        pretty.writer.write(b'{"execute": "qmp_capabilities"}')
        await pretty.reader.readuntil(b'    "return": {\r\n    }\r\n}\r\n')
        home.events.emit(Happened())
        assert (await plain.message())["event"] == "HAPPENED"
        await pretty.reader.readuntil(b'    "event": "HAPPENED"\r\n}\r\n')
        assert "QMP" in await silent.message()
        assert (await silent.command("qmp_capabilities")) == {"return": {}}  # and no event before it
        plain.writer.write(b'{"execute": "quit"}{"execute": "query-version"}{"execute": "quit"}')
        assert await plain.message() == {"return": {}}
        assert home.stop.requested == 1
        # As with QSD, what comes after it is not done.
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(plain.message(), 0.05)
        assert home.stop.requested == 1
        for client in clients:
            await client.close()


async def test_a_client_that_does_not_read_is_not_read_from(tmp_path: Path) -> None:
    async with house() as home:
        path = tmp_path / "qmp.sock"
        await home.chardevs.add_from_command_line(f"socket,id=c,path={path},server=on,wait=off")
        home.add("c")
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.setblocking(False)
            await loop.sock_connect(client, str(path))
            await loop.sock_sendall(client, b'{"execute": "qmp_capabilities"}\n')
            request = b'{"execute": "query-qmp-schema", "id": 123456}\n'
            sent = 0
            with pytest.raises(TimeoutError):
                while True:
                    async with asyncio.timeout(1):
                        await loop.sock_sendall(client, request)
                    sent += 1
            # What is not read stays in the socket's buffers.
            assert sent < 100_000
            seen = b""
            async with asyncio.timeout(20):
                while seen.count(b'"id": 123456}\r\n') < min(sent, 50):
                    seen += await loop.sock_recv(client, 1 << 20)


async def test_detached_chardev_is_what_the_frontend_contract_says() -> None:
    """A chardev that is open when the monitor comes begins its session at once."""

    class Fake(Chardev):
        name = "fake"

        def __init__(self) -> None:
            super().__init__("fake", None)
            self.sent = b""

        def _write(self, data: bytes) -> None:
            self.sent += data

    async with house() as home:
        fake = Fake()
        home.chardevs._chardevs["fake"] = fake
        fake._opened()
        home.add("fake")
        assert fake.sent.startswith(b'{"QMP": ')
        fake.sent = b""
        fake._received(b'{"execute": "qmp_')
        fake._closed()
        assert fake.frontend is not None
        fake._opened()
        assert fake.sent.startswith(b'{"QMP": ')
        fake.sent = b""
        fake._received(b'capabilities"}')  # the half request of the last connection is forgotten
        assert b"invalid keyword 'capabilities'" in fake.sent
        del home.chardevs._chardevs["fake"]
