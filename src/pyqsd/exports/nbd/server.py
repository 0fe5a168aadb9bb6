"""The NBD server: where it listens, who is connected, and which exports there are."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pyqsd.chardev import addresses
from pyqsd.exports.export import BlockExportType, Exports
from pyqsd.exports.nbd.connection import Connection
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Struct, Uint32

if TYPE_CHECKING:
    from pyqsd.exports.nbd.export import NbdExport

log = logging.getLogger(__name__)

DEFAULT_HANDSHAKE_SECONDS = 10
DEFAULT_MAX_CONNECTIONS = 100
#: Connections that may wait to be accepted.
_BACKLOG = 4096
#: Connections that are accepted at once before others get their turn.
_ACCEPTS = 16
#: Seconds until accepting is tried again after the system had no resources for it.
_RETRY_SECONDS = 0.5


class NbdServerOptions(Struct, kw_only=True):
    """`handshake_max_seconds`: a client must have chosen an export by then (default 10, 0: at any time);
    `max_connections`: clients at the same time (default 100, 0: no limit); `tls_creds`, `tls_authz`: encryption, which
    needs credentials."""

    handshake_max_seconds: Uint32 | None = None
    tls_creds: str | None = None
    tls_authz: str | None = None
    max_connections: Uint32 | None = None
    addr: addresses.SocketAddress


class NbdServer:
    """The one NBD server of a daemon, running or not."""

    def __init__(self, exports: Exports) -> None:
        self._service = exports
        #: The exports by the names that clients ask for, oldest first.
        self.exports: dict[str, NbdExport] = {}
        self.running = False
        self.max_connections = DEFAULT_MAX_CONNECTIONS
        self._handshake_seconds = DEFAULT_HANDSHAKE_SECONDS
        self._listener: addresses.Listener | None = None
        self._connections: set[Connection] = set()
        #: Whose requests were the last to be handled.
        self.last_served: Connection | None = None
        self._all_gone: asyncio.Event | None = None
        self._held = False
        self._accepting = False
        self._retry: asyncio.TimerHandle | None = None

    # --- for exports and connections --------------------------------------------------------------------------------

    def check_running(self) -> None:
        """Raise Error if it is not running."""
        if not self.running:
            raise Error("NBD server not running")

    def find(self, name: str) -> NbdExport | None:
        """The export with this name."""
        return self.exports.get(name)

    def listed(self) -> Iterable[NbdExport]:
        """All exports."""
        return self.exports.values()

    def left(self, connection: Connection) -> None:
        """A connection is over."""
        self._connections.discard(connection)
        if self.last_served is connection:
            self.last_served = None
        if self._all_gone is not None and not self._connections:
            self._all_gone.set()
        self._accept_more()

    # --- life -------------------------------------------------------------------------------------------------------

    async def start(
        self,
        address: addresses.SocketAddress | addresses.SocketAddressLegacy,
        *,
        handshake_max_seconds: int | None = None,
        tls_creds: str | None = None,
        max_connections: int | None = None,
    ) -> None:
        """Listen on `address`. Raises Error."""
        if self.running:
            raise Error("NBD server already running")
        self.running = True
        try:
            listener = await addresses.listen(addresses.plain(address), _BACKLOG)
            if tls_creds is not None:
                listener.close()
                raise Error(f"No TLS credentials with id '{tls_creds}'")
        except BaseException:
            self.running = False
            raise
        self._listener = listener
        self._handshake_seconds = DEFAULT_HANDSHAKE_SECONDS if handshake_max_seconds is None else handshake_max_seconds
        self.max_connections = DEFAULT_MAX_CONNECTIONS if max_connections is None else max_connections
        self._accept_more()

    async def start_from(self, options: NbdServerOptions) -> None:
        """Start with the options of the command line. Raises Error."""
        await self.start(
            options.addr,
            handshake_max_seconds=options.handshake_max_seconds,
            tls_creds=options.tls_creds,
            max_connections=options.max_connections,
        )

    async def stop(self) -> None:
        """Remove all exports, disconnect all clients and stop listening. Raises Error if it is not running."""
        self.check_running()
        if self._all_gone is not None:
            raise Error("NBD server is being stopped")
        self._accept_none()
        self._all_gone = asyncio.Event()
        for connection in list(self._connections):
            connection.abort()
        await self._service.remove_all(BlockExportType.NBD)
        while self._connections:
            self._all_gone.clear()
            await self._all_gone.wait()
        self._all_gone = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self.running = False

    async def close(self) -> None:
        """The end of the daemon."""
        if self.running and self._all_gone is None:
            await self.stop()

    def names(self) -> list[object]:
        """The addresses that it listens on, as the sockets have them."""
        return [sock.getsockname() for sock in self._sockets()]

    def _sockets(self) -> list[socket.socket]:
        return self._listener.sockets if self._listener is not None else []

    # --- accepting --------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Let clients wait until `release`."""
        self._held = True
        self._accept_none()

    def release(self) -> None:
        """Serve clients again."""
        self._held = False
        self._accept_more()

    def _full(self) -> bool:
        return bool(self.max_connections) and len(self._connections) >= self.max_connections

    def _accept_more(self) -> None:
        if self._accepting or self._held or self._retry is not None or self._all_gone is not None or self._full():
            return
        if self._listener is None:
            return
        loop = asyncio.get_running_loop()
        for sock in self._listener.sockets:
            loop.add_reader(sock, self._accept, sock)
        self._accepting = True

    def _accept_none(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._accepting:
            self._accepting = False
            loop = asyncio.get_running_loop()
            for sock in self._sockets():
                loop.remove_reader(sock)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_ACCEPTS):
            if self._full():
                self._accept_none()
                return
            try:
                sock, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                if exc.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.warning("NBD server: accepting a connection: %s", exc.strerror)
                # Trying at once would only keep the processor busy.
                self._accept_none()
                self._retry = asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._try_again)
                return
            self._connected(sock)

    def _try_again(self) -> None:
        self._retry = None
        self._accept_more()

    def _connected(self, sock: socket.socket) -> None:
        connection = Connection(self, sock, asyncio.get_running_loop())
        self._connections.add(connection)
        try:
            connection.begin(self._handshake_seconds)
        except OSError:
            connection.abort()
