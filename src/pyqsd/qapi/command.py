"""Declaring QMP commands and events.

A command is a coroutine function whose signature is its schema: keyword parameters are the members of its argument
struct, the return annotation is its return type. Positional-only parameters are services, given by their type::

    @command("block_resize")
    async def block_resize(graph: Graph, /, *, size: int, node_name: str | None = None) -> None: ...

Commands live in the room whose business they are, in modules that `pyqsd.monitor.registry` lists.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, TypeVar

from pyqsd.qapi.types import Struct
from pyqsd.trace import events as trace

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])


class Command:
    """A declared command: its wire name, its function, and how it may be called.

    `boxed`: the only keyword parameter is the whole argument (a struct or a union), as in ``blockdev-add``.
    `allow_oob`: it may run out of band (qmp-spec, section 2.3.1).
    `renames`: parameter names whose wire name is not the usual ``_`` → ``-``.
    """

    __slots__ = ("allow_oob", "boxed", "features", "func", "name", "renames")

    def __init__(
        self,
        name: str,
        func: Callable[..., Awaitable[Any]],
        boxed: bool,
        allow_oob: bool,
        features: tuple[str, ...],
        renames: dict[str, str],
    ) -> None:
        self.name = name
        self.func = func
        self.boxed = boxed
        self.allow_oob = allow_oob
        self.features = features
        self.renames = renames


#: Every declared command by wire name, in order of declaration.
COMMANDS: dict[str, Command] = {}


def command(
    name: str,
    *,
    boxed: bool = False,
    allow_oob: bool = False,
    features: tuple[str, ...] = (),
    renames: dict[str, str] | None = None,
) -> Callable[[F], F]:
    """Declare the decorated coroutine function as the QMP command `name`."""

    def declare(func: F) -> F:
        if name in COMMANDS:
            raise ValueError(f"command {name} is declared twice")
        COMMANDS[name] = Command(name, func, boxed, allow_oob, features, renames or {})
        return func

    return declare


class Event(Struct):
    """A QMP event: a struct whose members are the event's data; `NAME` is its wire name.

    `RATE_LIMIT`: for an event that clients are told of once a second at most, the members that say which ones are
    alike (qmp-spec, "Asynchronous events").
    """

    NAME: ClassVar[str] = ""
    RATE_LIMIT: ClassVar[tuple[str, ...] | None] = None


#: Every declared event by wire name.
EVENTS: dict[str, type[Event]] = {}

E = TypeVar("E", bound=type[Event])


def event(name: str, *, rate_limit: tuple[str, ...] | None = None) -> Callable[[E], E]:
    """Declare the decorated `Event` subclass as the QMP event `name`; `rate_limit` becomes its `RATE_LIMIT`."""

    def declare(cls: E) -> E:
        if name in EVENTS:
            raise ValueError(f"event {name} is declared twice")
        cls.NAME = name
        cls.RATE_LIMIT = rate_limit
        EVENTS[name] = cls
        return cls

    return declare


class EventBus:
    """Where the rooms send events and the monitors listen (a service of the daemon)."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[Event], None]] = []

    def subscribe(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call `listener` for every event from now on; the returned function ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def emit(self, event: Event) -> None:
        """Hand `event` to every listener, in order of their subscription."""
        if trace.MONITOR_PROTOCOL_EVENT_EMIT.enabled:
            trace.MONITOR_PROTOCOL_EVENT_EMIT(event.NAME, event)
        for listener in tuple(self._listeners):
            listener(event)
