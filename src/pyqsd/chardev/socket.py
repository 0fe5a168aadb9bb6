"""The backend ``socket``: a server for one client at a time, or a client, over a Unix socket, TCP or vsock."""

from __future__ import annotations

import asyncio
import socket
from typing import Annotated, Any

from pyqsd.chardev import addresses
from pyqsd.chardev.addresses import (
    FdSocketAddress,
    FdSocketAddressWrapper,
    InetSocketAddress,
    InetSocketAddressWrapper,
    Plain,
    SocketAddressLegacy,
    UnixSocketAddress,
    UnixSocketAddressWrapper,
)
from pyqsd.chardev.chardev import Chardev
from pyqsd.chardev.options import ChardevBackend, ChardevCommon
from pyqsd.chardev.opts import Opts
from pyqsd.chardev.stream import Stream
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Features
from pyqsd.trace import report

#: Seconds after which a failed accept is tried again.
_ACCEPT_AGAIN = 0.5


class ChardevSocket(ChardevCommon, kw_only=True):
    """`addr`: where to listen (`server`, the default over QMP) or to connect to. `wait`: a server is ready only once a
    client is there. `nodelay`: no Nagle algorithm on TCP. `reconnect` (seconds), `reconnect_ms` (milliseconds): a
    client that has no connection tries again after that time; 0: never."""

    addr: SocketAddressLegacy
    tls_creds: str | None = None
    tls_authz: str | None = None
    server: bool | None = None
    wait: bool | None = None
    nodelay: bool | None = None
    telnet: bool | None = None
    tn3270: bool | None = None
    websocket: bool | None = None
    reconnect: Annotated[int | None, Features("deprecated")] = None
    reconnect_ms: int | None = None


class SocketBackend(ChardevBackend, tag="socket"):
    """The branch ``socket``."""

    data: ChardevSocket


class SocketChardev(Chardev):
    """See above. While a client is connected, others wait in the listening socket's queue."""

    name = "socket"
    qom_properties = (("connected", "bool"), ("addr", "SocketAddress"))

    def __init__(self, label: str, options: ChardevSocket) -> None:
        super().__init__(label, options)
        self._server = options.server is not False
        self._address: Plain = options.addr.data
        self._retry_after = 0.0
        self._listener: addresses.Listener | None = None
        self._accepting = False
        self._retry: asyncio.TimerHandle | None = None
        self._sock: socket.socket | None = None
        self._stream: Stream | None = None
        self._description = ""
        self._connecting: asyncio.Task[None] | None = None
        self._failure_reported = False
        self._first_client: asyncio.Future[None] | None = None

    @classmethod
    def options_from(cls, opts: Opts) -> ChardevCommon:
        path, host, port, fd = (opts.get(name) for name in ("path", "host", "port", "fd"))
        if sum(value is not None for value in (path, host, fd)) > 1:
            raise Error("None or one of 'path', 'fd' or 'host' option required.")
        address: SocketAddressLegacy
        if host is not None and port is None:
            raise Error("chardev: socket: no port given")
        if opts.get("delay") is not None and opts.get("nodelay") is not None:
            raise Error("'delay' and 'nodelay' are mutually exclusive")
        if path is not None:
            address = UnixSocketAddressWrapper(
                data=UnixSocketAddress(path=path, abstract=opts.get("abstract"), tight=opts.get("tight"))
            )
        elif host is not None:
            to = opts.get("to")
            address = InetSocketAddressWrapper(
                data=InetSocketAddress(
                    host=host,
                    port=port,
                    to=None if to is None else to & 0xFFFF,
                    ipv4=opts.get("ipv4"),
                    ipv6=opts.get("ipv6"),
                )
            )
        else:
            address = FdSocketAddressWrapper(data=FdSocketAddress(str_=fd or ""))
        delay, nodelay = opts.get("delay"), opts.get("nodelay")
        server = bool(opts.get("server"))
        wait = opts.get("wait")
        return _FromCommandLine(
            addr=address,
            tls_creds=opts.get("tls-creds"),
            tls_authz=opts.get("tls-authz"),
            server=server,
            wait=True if wait is None and server else wait,
            nodelay=nodelay if delay is None else not delay,
            telnet=opts.get("telnet"),
            tn3270=opts.get("tn3270"),
            websocket=opts.get("websocket"),
            reconnect=_signed(opts.get("reconnect")),
            reconnect_ms=_signed(opts.get("reconnect-ms")),
            **opts.common(),
        )

    # --- opening and closing -----------------------------------------------------------------------------------------

    async def open(self) -> None:
        self._check()
        options = self.options
        if not isinstance(options, _FromCommandLine):
            addresses.check_not_passed(self._address)
        if self._server:
            self._listener = await addresses.listen(self._address)
            self._address = self._listener.address
            try:
                if options.wait:
                    report.info(f"QEMU waiting for connection on: {self.filename()}")
                    self._first_client = asyncio.get_running_loop().create_future()
                    self._accept(True)
                    await self._first_client
                self._accept(self._sock is None)
            except BaseException:
                await self.close()
                raise
        elif self._retry_after:
            self._connecting = asyncio.create_task(self._connect_again(0))
        else:
            self._connected(await addresses.connect(self._address))

    def _check(self) -> None:
        """Refuse options that contradict each other. Raises Error."""
        options = self.options
        if options.tls_creds is not None:
            # There are no objects that could be meant.
            raise Error(f"No TLS credentials with id '{options.tls_creds}'")
        if options.tls_authz is not None:
            raise Error("'tls_authz' option requires 'tls_creds' option")
        if not self._server:
            if options.websocket:
                raise Error("Websocket client is not implemented")
            if options.wait is not None:
                raise Error("'wait' option is incompatible with socket in client connect mode")
        elif options.reconnect is not None:
            raise Error("'reconnect' option is incompatible with socket in server listen mode")
        for name in ("telnet", "tn3270", "websocket"):
            if getattr(options, name):
                raise Error(f"chardev: socket: '{name}' is not supported")
        if options.reconnect is not None and options.reconnect_ms is not None:
            raise Error("'reconnect' and 'reconnect-ms' are mutually exclusive")
        if not self._server:
            self._retry_after = max(0, options.reconnect or 0) + max(0, options.reconnect_ms or 0) / 1000

    async def close(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.gather(self._connecting, return_exceptions=True)
            self._connecting = None
        self._accept(False)
        if self._retry is not None:
            self._retry.cancel()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._disconnect()

    # --- connections -------------------------------------------------------------------------------------------------

    def _accept(self, wanted: bool) -> None:
        """Start or stop accepting clients."""
        if self._listener is None or wanted == self._accepting:
            return
        self._accepting = wanted
        loop = asyncio.get_running_loop()
        for sock in self._listener.sockets:
            if wanted:
                loop.add_reader(sock, self._on_client, sock)
            else:
                loop.remove_reader(sock)

    def _on_client(self, listening: socket.socket) -> None:
        if self._sock is not None:
            return
        try:
            sock, _ = listening.accept()
        except BlockingIOError:
            return  # it has gone again
        except OSError:
            # No descriptor or memory is left: asking again at once would only burn time.
            self._accept(False)
            self._retry = asyncio.get_running_loop().call_later(_ACCEPT_AGAIN, self._accept, True)
            return
        sock.setblocking(False)
        self._accept(False)
        self._connected(sock)
        if self._first_client is not None and not self._first_client.done():
            self._first_client.set_result(None)

    def _connected(self, sock: socket.socket) -> None:
        self._sock = sock
        self._failure_reported = False
        address = self.options.addr.data
        try:
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                if self.options.nodelay:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if isinstance(address, InetSocketAddress) and address.keep_alive:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        except OSError:
            pass  # it has gone already, as reading will show
        self._description = self._describe(sock)
        self._stream = Stream(sock.fileno(), sock.fileno(), self._received, self._lost, self._overflowed)
        self._opened()
        self._update_reading()

    def _describe(self, sock: socket.socket) -> str:
        server = ",server=on" if self._server else ""
        if sock.family == socket.AF_UNIX:
            # The name of an abstract socket is not shown (it comes as bytes).
            name: Any = sock.getsockname() if self._server else sock.getpeername()
            path = name if isinstance(name, str) else ""
            return f"unix:{path}{server}"
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            left, right = ("[", "]") if sock.family == socket.AF_INET6 else ("", "")
            try:
                here, there = sock.getsockname(), sock.getpeername()
            except OSError:
                return f"{addresses.describe(self._address)}{server}"
            return f"tcp:{left}{here[0]}{right}:{here[1]}{server} <-> {left}{there[0]}{right}:{there[1]}"
        return "unknown"

    def _lost(self) -> None:
        """The peer is gone."""
        self._disconnect()
        self._accept(self._listener is not None)
        if self._retry_after and self._connecting is None:
            self._connecting = asyncio.create_task(self._connect_again(self._retry_after))

    def _overflowed(self) -> None:
        report.warn(f"character device {self.label}: the peer does not read, and is disconnected")
        asyncio.get_running_loop().call_soon(self._cut, self._sock)

    def _cut(self, sock: socket.socket | None) -> None:
        if sock is not None and sock is self._sock:
            self._lost()

    def _disconnect(self) -> None:
        if self._sock is None:
            return
        sock, stream = self._sock, self._stream
        self._sock = self._stream = None
        if stream is not None:
            stream.close()
        sock.close()
        self._closed()

    async def _connect_again(self, delay: float) -> None:
        """Try to connect until that succeeds, first after `delay` seconds."""
        while True:
            await asyncio.sleep(delay)
            delay = self._retry_after
            try:
                sock = await addresses.connect(self._address)
            except Error as exc:
                if not self._failure_reported:
                    self._failure_reported = True
                    report.error(f"Unable to connect character device {self.label}: {exc}")
                continue
            self._connecting = None
            self._connected(sock)
            return

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def pressed(self) -> bool:
        return self._stream is not None and self._stream.pressed

    def filename(self) -> str:
        if self._sock is not None:
            return self._description
        return f"disconnected:{addresses.describe(self._address)}{',server=on' if self._server else ''}"

    def qom_get(self, name: str) -> Any:
        return self._sock is not None if name == "connected" else addresses.to_wire(self._address)

    def _write(self, data: bytes) -> None:
        if self._stream is not None:
            self._stream.write(data)

    def _update_reading(self) -> None:
        if self._stream is not None:
            self._stream.read(self._wants_input, watch=self.frontend is None)


class _FromCommandLine(ChardevSocket, kw_only=True):
    """Options from the command line, where file descriptors have numbers."""


def _signed(number: int | None) -> int | None:
    return None if number is None else (number ^ (1 << 63)) - (1 << 63)


CHARDEV = SocketChardev
BACKEND = SocketBackend
