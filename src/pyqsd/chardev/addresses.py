"""Socket addresses (QAPI ``SocketAddress``), listening on them and connecting to them.

Used by everything that has sockets in its options. Sockets are non-blocking and close on exec.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
import stat
from typing import Any

from pyqsd.chardev.paths import encode
from pyqsd.qapi.errors import Error, from_oserror
from pyqsd.qapi.types import Struct, Uint16

#: A Linux socket path is shorter than this (unix(7)).
_UNIX_PATH_MAX = 108
#: Connections that may wait to be accepted.
_BACKLOG = 16
_IPPROTO_MPTCP = 262

# The texts of the C library differ from Python's only in being there for certain.
_GAI_TEXTS = {
    socket.EAI_NONAME: "Name or service not known",
    socket.EAI_SERVICE: "Servname not supported for ai_socktype",
    socket.EAI_ADDRFAMILY: "Address family for hostname not supported",
    socket.EAI_AGAIN: "Temporary failure in name resolution",
    socket.EAI_FAIL: "Non-recoverable failure in name resolution",
    socket.EAI_FAMILY: "ai_family not supported",
    socket.EAI_MEMORY: "Memory allocation failure",
    socket.EAI_NODATA: "No address associated with hostname",
}


class InetSocketAddress(Struct):
    """TCP. `numeric`: `host` and `port` are no names. `to`: when listening, try the ports up to this one. `ipv4`,
    `ipv6`: which families may be used; both unless given. `keep_alive`: probe idle connections. `mptcp`: multipath."""

    host: str
    port: str
    numeric: bool | None = None
    to: Uint16 | None = None
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool | None = None
    mptcp: bool | None = None


class UnixSocketAddress(Struct):
    """A Unix socket. `abstract`: the name is not in the file system. `tight`: an abstract name is as long as `path`,
    rather than filled up with zero bytes (true unless given)."""

    path: str
    abstract: bool | None = None
    tight: bool | None = None


class VsockSocketAddress(Struct):
    """A socket of a virtual machine's host or guest (vsock(7)): context id and port, both numbers."""

    cid: str
    port: str


class FdSocketAddress(Struct):
    """An open socket, by the number of its file descriptor."""

    str_: str


Plain = InetSocketAddress | UnixSocketAddress | VsockSocketAddress | FdSocketAddress


class SocketAddress(Struct, tag_field="type", tag="pyqsd-base"):
    """Any of them, with its members beside its type."""


class InetAddress(InetSocketAddress, SocketAddress, tag="inet"):
    """The branch ``inet``."""


class UnixAddress(UnixSocketAddress, SocketAddress, tag="unix"):
    """The branch ``unix``."""


class VsockAddress(VsockSocketAddress, SocketAddress, tag="vsock"):
    """The branch ``vsock``."""


class FdAddress(FdSocketAddress, SocketAddress, tag="fd"):
    """The branch ``fd``."""


class SocketAddressLegacy(Struct, tag_field="type", tag="pyqsd-base"):
    """A socket address whose members are one level down, in ``data``."""

    @property
    def data(self) -> Any:
        raise NotImplementedError


class InetSocketAddressWrapper(SocketAddressLegacy, tag="inet"):
    """The branch ``inet``."""

    data: InetSocketAddress


class UnixSocketAddressWrapper(SocketAddressLegacy, tag="unix"):
    """The branch ``unix``."""

    data: UnixSocketAddress


class VsockSocketAddressWrapper(SocketAddressLegacy, tag="vsock"):
    """The branch ``vsock``."""

    data: VsockSocketAddress


class FdSocketAddressWrapper(SocketAddressLegacy, tag="fd"):
    """The branch ``fd``."""

    data: FdSocketAddress


def plain(address: SocketAddress | SocketAddressLegacy) -> Plain:
    """The members of an address in either of its forms."""
    data = address.data if isinstance(address, SocketAddressLegacy) else address
    assert isinstance(data, InetSocketAddress | UnixSocketAddress | VsockSocketAddress | FdSocketAddress)
    return data


def describe(address: Plain) -> str:
    """How ``query-chardev`` spells an address."""
    match address:
        case InetSocketAddress():
            return f"tcp:{address.host}:{address.port}"
        case UnixSocketAddress():
            tight = address.tight is not False
            extra = ",abstract=on" + (",tight=on" if tight else "") if address.abstract else ""
            return f"unix:{address.path}{extra}"
        case VsockSocketAddress():
            return f"vsock:{address.cid}:{address.port}"
        case FdSocketAddress():
            return f"fd:{address.str_}"


def to_wire(address: Plain) -> dict[str, Any]:
    """The address as the flat QAPI union ``SocketAddress``."""
    kinds = {InetSocketAddress: "inet", UnixSocketAddress: "unix", VsockSocketAddress: "vsock", FdSocketAddress: "fd"}
    members = {
        field: value
        for field, value in zip(
            address.__struct_encode_fields__, (getattr(address, f) for f in address.__struct_fields__), strict=True
        )
        if value is not None
    }
    return {"type": kinds[type(address)], **members}


def local_address(sock: socket.socket) -> Plain:
    """The address that `sock` is bound to."""
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        path = os.fsdecode(name) if isinstance(name, str) else name.decode("utf-8", "surrogateescape")
        if path.startswith("\0"):
            tight = len(os.fsencode(path)) < _UNIX_PATH_MAX
            return UnixSocketAddress(path=path[1:].rstrip("\0"), abstract=True, tight=tight)
        return UnixSocketAddress(path=path)
    if sock.family == socket.AF_VSOCK:
        return VsockSocketAddress(cid=str(name[0]), port=str(name[1]))
    if sock.family == socket.AF_INET6:
        return InetSocketAddress(host=name[0], port=str(name[1]), ipv6=True)
    if sock.family == socket.AF_INET:
        return InetSocketAddress(host=name[0], port=str(name[1]), ipv4=True)
    raise Error("socket family unsupported")


def socket_from_fd(text: str) -> socket.socket:
    """The socket whose descriptor number `text` is. Raises Error."""
    if not text.isascii() or not text.isdigit():
        if text == "-1":
            raise Error("File descriptor '-1' is not a socket")
        raise Error(f"Unable to parse FD number {text}")
    number = int(text[:20])
    if number >= 1 << 31:
        raise Error(f"Unable to parse FD number {text}: {os.strerror(errno.ERANGE)}", errno.ERANGE)
    try:
        if not stat.S_ISSOCK(os.fstat(number).st_mode):
            raise OSError(errno.ENOTSOCK, "")
        sock = socket.socket(fileno=number)
    except OSError as exc:
        raise Error(f"File descriptor '{text}' is not a socket", errno.ENOTSOCK) from exc
    sock.setblocking(False)
    os.set_inheritable(number, False)
    return sock


# --- resolving --------------------------------------------------------------------------------------------------------


async def _resolve(address: InetSocketAddress, passive: bool) -> list[tuple[int, tuple[Any, ...]]]:
    """(family, socket address) for each address of a host. Raises Error."""
    ipv4, ipv6 = address.ipv4, address.ipv6
    if ipv4 is False and ipv6 is False:
        raise Error("Cannot disable IPv4 and IPv6 at same time")
    unresolved = Error(
        f"address resolution failed for {address.host}:{address.port}: {_GAI_TEXTS[socket.EAI_NONAME]}", errno.EINVAL
    )
    if not address.host and not (passive and address.port):
        raise unresolved
    family = socket.AF_UNSPEC
    if bool(ipv4) != bool(ipv6):
        family = socket.AF_INET if ipv4 else socket.AF_INET6
    elif not ipv4 and (ipv4 is False or ipv6 is False):
        family = socket.AF_INET6 if ipv4 is False else socket.AF_INET
    elif ipv4 and passive and not address.host:
        # One socket for both.
        family = socket.AF_INET6
    flags = socket.AI_PASSIVE if passive else 0
    if address.numeric:
        flags |= socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    host = address.host or None
    try:
        try:
            # Numbers need no name service, and so no thread that waits for it.
            numeric = flags | socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
            found = socket.getaddrinfo(host, address.port, family, socket.SOCK_STREAM, 0, numeric)
        except socket.gaierror:
            found = await asyncio.get_running_loop().getaddrinfo(
                host, address.port, family=family, type=socket.SOCK_STREAM, flags=flags
            )
    except socket.gaierror as exc:
        text = _GAI_TEXTS.get(exc.errno or 0, exc.strerror)
        raise Error(f"address resolution failed for {address.host}:{address.port}: {text}") from exc
    except (UnicodeError, ValueError) as exc:
        raise unresolved from exc
    return [(entry[0], entry[4]) for entry in found]


def _unix_name(address: UnixSocketAddress) -> bytes:
    """The name for the kernel. Raises Error when it is too long."""
    path = encode(address.path)
    if len(path) + 1 > _UNIX_PATH_MAX:
        most = _UNIX_PATH_MAX - bool(address.abstract)
        raise Error(f"UNIX socket path '{address.path}' is too long", hint=f"Path must be less than {most} bytes")
    if not address.abstract:
        return path
    return b"\0" + path if address.tight is not False else (b"\0" + path).ljust(_UNIX_PATH_MAX, b"\0")


def _vsock_name(address: VsockSocketAddress) -> tuple[int, int]:
    numbers = []
    for what, text in (("cid", address.cid), ("port", address.port)):
        if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) >= 1 << 32:
            raise Error(f"Failed to parse {what} '{text}'")
        numbers.append(int(text))
    return numbers[0], numbers[1]


# --- listening --------------------------------------------------------------------------------------------------------


def check_not_passed(address: Plain) -> None:
    """Numbers of file descriptors mean something to who started the process, not to a client of a monitor, who gives
    this address. Raises Error."""
    if isinstance(address, FdSocketAddress):
        raise Error("only QEMU supports file descriptor passing")


class Listener:
    """Listening sockets of one address (a name may stand for several). `address` is where they really listen."""

    def __init__(self, sockets: list[socket.socket], unlink: tuple[bytes, int, int] | None = None) -> None:
        self.sockets = sockets
        self.address = local_address(sockets[0])
        self._unlink = unlink

    def close(self) -> None:
        """Stop listening, and remove the socket file if it is still the one made here."""
        for sock in self.sockets:
            sock.close()
        if self._unlink is not None:
            path, device, inode = self._unlink
            try:
                found = os.lstat(path)
                if (found.st_dev, found.st_ino) == (device, inode):
                    os.unlink(path)
            except OSError:
                pass


async def listen(address: Plain, backlog: int = _BACKLOG) -> Listener:
    """Listen on `address`. Raises Error."""
    match address:
        case InetSocketAddress():
            return await _listen_inet(address, backlog)
        case UnixSocketAddress():
            return _listen_unix(address, backlog)
        case FdSocketAddress():
            sock = socket_from_fd(address.str_)
            try:
                sock.listen(backlog)
            except OSError as exc:
                # It stays whose it was.
                sock.detach()
                raise from_oserror(exc, "Failed to listen on fd socket") from exc
            return Listener([sock])
        case VsockSocketAddress():
            return _listen_vsock(address, backlog)


async def _listen_inet(address: InetSocketAddress, backlog: int) -> Listener:
    sockets: list[socket.socket] = []
    failure: Error | None = None
    for family, name in await _resolve(address, passive=True):
        try:
            sockets.append(_bind_inet(address, family, name, backlog))
        except Error as exc:
            failure = failure or exc
    if not sockets:
        assert failure is not None
        raise failure
    return Listener(sockets)


def _bind_inet(address: InetSocketAddress, family: int, name: tuple[Any, ...], backlog: int) -> socket.socket:
    first = name[1]
    last = first if address.to is None else address.to
    if last < first:
        raise Error("Failed to create a socket: Transport endpoint is not connected", errno.ENOTCONN)
    sock: socket.socket | None = None
    for port in range(first, last + 1):
        if sock is None:
            sock = _tcp_socket(address, family)
        try:
            sock.bind((name[0], port, *name[2:]))
            sock.listen(backlog)
        except OSError as exc:
            sock.close()
            sock = None
            if exc.errno != errno.EADDRINUSE:
                raise from_oserror(exc, "Failed to bind socket") from exc
            continue
        return sock
    raise Error(f"Failed to find an available port: {os.strerror(errno.EADDRINUSE)}", errno.EADDRINUSE)


def _tcp_socket(address: InetSocketAddress, family: int) -> socket.socket:
    protocol = _IPPROTO_MPTCP if address.mptcp else 0
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, protocol)
    except OSError as exc:
        raise from_oserror(exc, "Failed to create a socket") from exc
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        # Every family gets a socket of its own, unless both are asked for by name.
        both = bool(address.ipv4 and address.ipv6)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if both else 1)
    if address.keep_alive:
        # Connections that are accepted inherit it.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return sock


def _listen_unix(address: UnixSocketAddress, backlog: int) -> Listener:
    path = address.path
    if not path and not address.abstract:
        import tempfile

        handle, path = tempfile.mkstemp(prefix="pyqsd-socket-")
        os.close(handle)
        os.unlink(path)
    elif not address.abstract:
        _unlink_stale(path)
    name = _unix_name(UnixSocketAddress(path=path, abstract=address.abstract, tight=address.tight))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.bind(name)
    except OSError as exc:
        sock.close()
        raise from_oserror(exc, f"Failed to bind socket to {path}") from exc
    unlink = None
    if not address.abstract:
        made = os.lstat(name)
        unlink = (os.path.abspath(name), made.st_dev, made.st_ino)
    sock.listen(backlog)
    return Listener([sock], unlink)


def _unlink_stale(path: str) -> None:
    """Remove a socket that an earlier program has left behind; never anything else, which may be somebody's data."""
    try:
        mode = os.lstat(encode(path)).st_mode
        if not stat.S_ISSOCK(mode) and not stat.S_ISDIR(mode):
            raise Error(f"Failed to unlink socket {path}: it is not a socket", errno.EEXIST)
        os.unlink(encode(path))
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        pass  # binding will say so
    except OSError as exc:
        raise from_oserror(exc, f"Failed to unlink socket {path}") from exc


def _listen_vsock(address: VsockSocketAddress, backlog: int) -> Listener:
    name = _vsock_name(address)
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as exc:
        raise from_oserror(exc, "Failed to create socket") from exc
    try:
        sock.bind(name)
        sock.listen(backlog)
    except OSError as exc:
        sock.close()
        raise from_oserror(exc, "Failed to bind socket") from exc
    return Listener([sock])


# --- connecting -------------------------------------------------------------------------------------------------------


async def connect(address: Plain) -> socket.socket:
    """A connection to `address`. Raises Error."""
    name: Any
    match address:
        case InetSocketAddress():
            failure: Error | None = None
            for family, name in await _resolve(address, passive=False):
                protocol = _IPPROTO_MPTCP if address.mptcp else 0
                try:
                    return await _connect(family, protocol, name, f"{address.host}:{address.port}")
                except Error as exc:
                    failure = exc
            assert failure is not None
            raise failure
        case UnixSocketAddress():
            name = _unix_name(address)
            if name:
                return await _connect(socket.AF_UNIX, 0, name, address.path)
            raise Error(f"Failed to connect to '': {os.strerror(errno.ECONNREFUSED)}", errno.ECONNREFUSED)
        case FdSocketAddress():
            return socket_from_fd(address.str_)
        case VsockSocketAddress():
            return await _connect(socket.AF_VSOCK, 0, _vsock_name(address), f"{address.cid}:{address.port}")


async def _connect(family: int, protocol: int, name: Any, text: str) -> socket.socket:
    loop = asyncio.get_running_loop()
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, protocol)
    except OSError as exc:
        raise from_oserror(exc, "Failed to create socket") from exc
    try:
        try:
            sock.connect(name)
        except BlockingIOError as exc:
            if exc.errno != errno.EINPROGRESS:
                raise
            await _writable(loop, sock)
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                raise OSError(number, os.strerror(number)) from None
    except OSError as exc:
        sock.close()
        raise from_oserror(exc, f"Failed to connect to '{text}'") from exc
    except BaseException:
        sock.close()
        raise
    return sock


async def _writable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    ready: asyncio.Future[None] = loop.create_future()

    def writable() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_writer(sock, writable)
    try:
        await ready
    finally:
        loop.remove_writer(sock)
