"""Socket addresses to listen on (QAPI ``SocketAddress`` and ``SocketAddressLegacy``)."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
import stat
from enum import StrEnum
from typing import cast

from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Struct, Uint16

_BACKLOG = 4096
_IPPROTO_MPTCP = 262
#: Bytes of a socket's path that the system has room for.
_PATH_MAX = 108


class InetSocketAddress(Struct):
    """A host and a port; `to`: take the first free port from `port` up to this one."""

    host: str
    port: str
    numeric: bool | None = None
    to: Uint16 | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool | None = None
    mptcp: bool | None = None


class UnixSocketAddress(Struct):
    """A path, or with `abstract` a name outside the file system (`tight`: without padding)."""

    path: str
    abstract: bool | None = None
    tight: bool | None = None


class VsockSocketAddress(Struct):
    """A context id and a port of a virtual machine socket."""

    cid: str
    port: str


class FdSocketAddress(Struct):
    """The number of a listening socket that the process has inherited."""

    str_: str


class SocketAddressType(StrEnum):
    """The kinds of addresses."""

    INET = "inet"
    UNIX = "unix"
    VSOCK = "vsock"
    FD = "fd"


class SocketAddress(Struct, tag_field="type", tag="pyqsd-base"):
    """Any of them, flat."""


class InetAddress(InetSocketAddress, SocketAddress, tag="inet"):
    """Branch ``inet``."""


class UnixAddress(UnixSocketAddress, SocketAddress, tag="unix"):
    """Branch ``unix``."""


class VsockAddress(VsockSocketAddress, SocketAddress, tag="vsock"):
    """Branch ``vsock``."""


class FdAddress(FdSocketAddress, SocketAddress, tag="fd"):
    """Branch ``fd``."""


class SocketAddressLegacy(Struct, tag_field="type", tag="pyqsd-base"):
    """Any of them, with the members in ``data``."""


class InetAddressLegacy(SocketAddressLegacy, tag="inet"):
    """Branch ``inet``."""

    data: InetSocketAddress


class UnixAddressLegacy(SocketAddressLegacy, tag="unix"):
    """Branch ``unix``."""

    data: UnixSocketAddress


class VsockAddressLegacy(SocketAddressLegacy, tag="vsock"):
    """Branch ``vsock``."""

    data: VsockSocketAddress


class FdAddressLegacy(SocketAddressLegacy, tag="fd"):
    """Branch ``fd``."""

    data: FdSocketAddress


Plain = InetSocketAddress | UnixSocketAddress | VsockSocketAddress | FdSocketAddress


def plain(address: SocketAddress | SocketAddressLegacy) -> Plain:
    """The members of an address in either of its forms."""
    data = getattr(address, "data", address)
    assert isinstance(data, (InetSocketAddress, UnixSocketAddress, VsockSocketAddress, FdSocketAddress))
    return data


class Listener:
    """A listening socket, and the path to remove when it is closed."""

    def __init__(self, sock: socket.socket, path: str | None = None) -> None:
        self.sock = sock
        self.path = path
        sock.setblocking(False)

    def close(self) -> None:
        """Stop listening, and remove the socket from the file system."""
        self.sock.close()
        if self.path is not None:
            try:
                os.unlink(self.path)
            except OSError:
                pass


async def listen(address: Plain) -> list[Listener]:
    """Listen on `address`: a host name may stand for several. Raises Error."""
    if isinstance(address, UnixSocketAddress):
        return [_listen_unix(address)]
    if isinstance(address, VsockSocketAddress):
        return [_listen_vsock(address)]
    if isinstance(address, FdSocketAddress):
        return [_listen_fd(address.str_)]
    return await _listen_inet(address)


def _failure(what: str, exc: OSError) -> Error:
    return Error(f"{what}: {os.strerror(exc.errno or errno.EIO)}", exc.errno or errno.EIO)


# --- unix ---


def _too_long(path: str, limit: int) -> Error:
    return Error(f"UNIX socket path '{path}' is too long", hint=f"Path must be less than {limit} bytes")


def _listen_unix(address: UnixSocketAddress) -> Listener:
    path = os.fsencode(address.path)
    if address.abstract:
        if len(path) >= _PATH_MAX:
            raise _too_long(address.path, _PATH_MAX - 1)
        name = b"\0" + path
        if address.tight is False:
            name = name.ljust(_PATH_MAX, b"\0")
        return _bound(socket.AF_UNIX, name, f"Failed to bind socket to {address.path}")
    if not path:
        path = os.fsencode(f"{os.environ.get('TMPDIR') or '/tmp'}/pyqsd-socket-{os.urandom(4).hex()}")
    if len(path) >= _PATH_MAX:
        # (The kernel would also take a path that just fills its room; Python's sockets do not.)
        raise _too_long(address.path, _PATH_MAX)
    name_text = os.fsdecode(path)
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as exc:
        if exc.errno != errno.ENOENT:
            raise _failure(f"Failed to unlink socket {name_text}", exc) from exc
    return _bound(socket.AF_UNIX, path, f"Failed to bind socket to {name_text}", os.path.abspath(name_text))


def _bound(family: int, address: bytes | tuple[int, int], what: str, path: str | None = None) -> Listener:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as exc:
        raise _failure("Failed to create socket", exc) from exc
    try:
        sock.bind(address)
    except OSError as exc:
        sock.close()
        raise _failure(what, exc) from exc
    try:
        sock.listen(_BACKLOG)
    except OSError as exc:
        Listener(sock, path).close()
        raise _failure("Failed to listen on socket", exc) from exc
    return Listener(sock, path)


# --- vsock ---


def _listen_vsock(address: VsockSocketAddress) -> Listener:
    numbers = []
    for what, text in (("cid", address.cid), ("port", address.port)):
        if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > 0xFFFFFFFF:
            raise Error(f"Failed to parse {what} '{text}'")
        numbers.append(int(text))
    return _bound(socket.AF_VSOCK, (numbers[0], numbers[1]), "Failed to bind socket")


# --- file descriptors ---


def _listen_fd(text: str) -> Listener:
    if not re.fullmatch(r"[-+]?[0-9]{1,9}", text):
        raise Error(f"Unable to parse FD number {text}")
    fd = int(text)
    try:
        is_socket = fd >= 0 and stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        is_socket = False
    if not is_socket:
        raise Error(f"File descriptor '{text}' is not a socket")
    sock = socket.socket(fileno=fd)
    try:
        sock.listen(_BACKLOG)
    except OSError as exc:
        sock.detach()
        raise _failure("Failed to listen on fd socket", exc) from exc
    os.set_inheritable(fd, False)
    return Listener(sock)


# --- internet ---


def _family(address: InetSocketAddress) -> int:
    if address.ipv4 is False and address.ipv6 is False:
        raise Error("Cannot disable IPv4 and IPv6 at same time")
    if address.ipv6 or (address.ipv4 is False):
        return socket.AF_INET6
    if address.ipv4 or (address.ipv6 is False):
        return socket.AF_INET
    return socket.AF_UNSPEC


async def _listen_inet(address: InetSocketAddress) -> list[Listener]:
    family = _family(address)
    flags = socket.AI_PASSIVE | (socket.AI_NUMERICHOST if address.numeric else 0)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            address.host or None, address.port or "0", family=family, type=socket.SOCK_STREAM, flags=flags
        )
    except (socket.gaierror, UnicodeError) as exc:
        text = exc.args[1] if isinstance(exc, socket.gaierror) else "Name or service not known"
        raise Error(f"address resolution failed for {address.host}:{address.port}: {text}") from exc
    listeners: list[Listener] = []
    first: Error | None = None
    for family, _, _, _, where in found:
        try:
            listeners.append(_listen_at(address, family, cast("tuple[str | int, ...]", where)))
        except Error as exc:
            first = first or exc
    if not listeners:
        raise first or Error("Failed to create a socket", errno.EINVAL)
    return listeners


def _listen_at(address: InetSocketAddress, family: int, where: tuple[str | int, ...]) -> Listener:
    """Listen at one address, on the first free port of those allowed."""
    start = int(where[1])
    stop = start if address.to is None else address.to
    protocol = _IPPROTO_MPTCP if address.mptcp else 0
    if stop < start:
        raise Error(f"Failed to create a socket: {os.strerror(errno.EINVAL)}", errno.EINVAL)
    for port in range(start, stop + 1):
        try:
            sock = socket.socket(family, socket.SOCK_STREAM, protocol)
        except OSError as exc:
            raise _failure("Failed to create a socket", exc) from exc
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                both = bool(address.ipv4 and address.ipv6)
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if both else 1)
            if address.keep_alive:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.bind((where[0], port, *where[2:]))
            sock.listen(_BACKLOG)
        except OSError as exc:
            sock.close()
            if exc.errno != errno.EADDRINUSE:
                raise _failure("Failed to bind socket", exc) from exc
        else:
            return Listener(sock)
    raise Error(f"Failed to find an available port: {os.strerror(errno.EADDRINUSE)}", errno.EADDRINUSE)
