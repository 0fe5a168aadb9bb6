"""The export type ``vhost-user-blk``: a node as a virtio block device for a virtual machine on this host."""

from __future__ import annotations

import asyncio
import logging
import socket

from pyqsd.chardev import addresses
from pyqsd.exports.export import BlockExportOptions, BlockExportType, Export
from pyqsd.exports.vhost_user.session import Session
from pyqsd.exports.virtio.blk import BlkDevice
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Size, Uint16

log = logging.getLogger(__name__)

#: Seconds until accepting is tried again after the system had no resources for it.
_RETRY_SECONDS = 0.5
_SERIAL = b"vhost_user_blk"


class VhostUserBlkOptions(BlockExportOptions, kw_only=True, tag="vhost-user-blk"):
    """`addr`: where front-ends connect to, one at a time. `logical_block_size`: bytes (default 512). `num_queues`: how
    many virtqueues there are (default 1)."""

    addr: addresses.SocketAddress
    logical_block_size: Size | None = None
    num_queues: Uint16 | None = None


class VhostUserBlkExport(Export):
    """A node as a front-end sees it."""

    export_type = BlockExportType.VHOST_USER_BLK
    Options = VhostUserBlkOptions

    _device: BlkDevice
    _listener: addresses.Listener | None = None
    _session: Session | None = None
    _serving: asyncio.Task[None] | None = None
    _accepting = False
    _paused = False
    _retry: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        """Listen. Raises Error."""
        options = self.options
        assert isinstance(options, VhostUserBlkOptions)
        address = addresses.plain(options.addr)
        if not isinstance(address, addresses.UnixSocketAddress | addresses.FdSocketAddress):
            raise Error("Only socket address types 'unix' and 'fd' are supported")
        block_size = options.logical_block_size or 512
        if not 512 <= block_size <= 2 << 20 or block_size & (block_size - 1):
            raise Error("parameter logical-block-size must be a power of 2 between 512 and 2097152")
        queues = 1 if options.num_queues is None else options.num_queues
        if not queues:
            raise Error("num-queues must be greater than 0")
        if self.from_monitor:
            addresses.check_not_passed(address)
        self._device = BlkDevice(
            self.backend,
            writable=self.writable,
            writethrough=bool(options.writethrough),
            block_size=block_size,
            queues=queues,
            serial=_SERIAL,
        )
        self._loop = asyncio.get_running_loop()
        self._paused = bool(self.backend.quiesced)
        self._listener = await addresses.listen(address)
        self._accept_more()

    def _accept_more(self) -> None:
        """Wait for the next front-end; those that come while one is served wait."""
        self._retry = None
        if self._listener is not None and self._session is None and not self._accepting:
            self._accepting = True
            for sock in self._listener.sockets:
                self._loop.add_reader(sock, self._accept, sock)

    def _stop_accepting(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._accepting:
            assert self._listener is not None
            self._accepting = False
            for sock in self._listener.sockets:
                self._loop.remove_reader(sock)

    def _accept(self, listening: socket.socket) -> None:
        try:
            sock, _ = listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as exc:
            log.error("export '%s': cannot accept a connection: %s", self.id, exc)
            self._stop_accepting()
            self._retry = self._loop.call_later(_RETRY_SECONDS, self._accept_more)
            return
        self._stop_accepting()
        self._session = Session(sock, self.id, self._device, self._paused)
        self._serving = self._loop.create_task(self._serve(self._session))

    async def _serve(self, session: Session) -> None:
        try:
            await session.serve()
        except Exception:
            log.exception("export '%s': the vhost-user session failed", self.id)
        finally:
            self._session = None
            self._accept_more()

    async def stop(self) -> None:
        """Disconnect the front-end and wait for what it has in flight."""
        listener = self._listener
        self._stop_accepting()
        self._listener = None
        if self._session is not None:
            self._session.abort()
        if self._serving is not None:
            await asyncio.wait([self._serving])
        if listener is not None:
            listener.close()

    def in_use(self) -> bool:
        """A front-end does not count as a user: QSD removes such exports under it without `hard`."""
        return False

    def resized(self) -> None:
        """Tell the front-end."""
        if self._session is not None:
            self._session.config_changed()

    def drain_begin(self) -> None:
        """Take no further requests."""
        self._paused = True
        if self._session is not None:
            self._session.pause()

    def drain_end(self) -> None:
        """Go on."""
        self._paused = False
        if self._session is not None:
            self._session.resume()


EXPORT = VhostUserBlkExport
