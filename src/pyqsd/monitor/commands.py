"""The commands that are about the monitor itself (QAPI ``control.json``, ``introspect.json``)."""

from __future__ import annotations

from enum import StrEnum

from pyqsd import __version__
from pyqsd.monitor.dispatcher import Dispatcher
from pyqsd.monitor.session import Session
from pyqsd.qapi.command import command
from pyqsd.qapi.introspect import SchemaInfo
from pyqsd.qapi.types import Struct


class VersionTriple(Struct):
    """A version, as three numbers."""

    major: int
    minor: int
    micro: int


class VersionInfo(Struct):
    """``qemu`` is the version of QEMU's interfaces that are spoken; ``package`` names this program."""

    qemu: VersionTriple
    package: str


#: What clients that look at the version are told: the interfaces are those of this QEMU release.
VERSION = VersionInfo(qemu=VersionTriple(major=10, minor=0, micro=2), package=f"pyqsd {__version__}")


class CommandInfo(Struct):
    """A command's name."""

    name: str


class QMPCapability(StrEnum):
    """What a client may enable."""

    OOB = "oob"


class Shutdown:
    """Service: how a command ends the daemon."""

    def request(self) -> None:
        """Begin a clean shutdown; returns at once."""
        raise NotImplementedError


@command("qmp_capabilities")
async def qmp_capabilities(session: Session, /, *, enable: list[QMPCapability] | None = None) -> None:
    """End the negotiation, with the capabilities `enable`."""
    session.negotiate(oob=QMPCapability.OOB in (enable or ()))


@command("query-version")
async def query_version() -> VersionInfo:
    """The version."""
    return VERSION


@command("query-commands")
async def query_commands(dispatcher: Dispatcher, /) -> list[CommandInfo]:
    """The names of all commands."""
    return [CommandInfo(name=name) for name in dispatcher.commands]


@command("query-qmp-schema")
async def query_qmp_schema(dispatcher: Dispatcher, /) -> list[SchemaInfo]:
    """All commands, events and types."""
    return await dispatcher.schema()


@command("quit")
async def quit(dispatcher: Dispatcher, shutdown: Shutdown, /) -> None:
    """Shut down. What clients sent after it is not done any more."""
    dispatcher.stop()
    shutdown.request()
