"""One front-end: its messages, its memory, and its rings (QEMU's docs/interop/vhost-user).

A ring is started when all that it needs was told (size, addresses, memory, kick) and it is enabled, and is stopped by
GET_VRING_BASE. Whatever breaks the protocol or a ring ends the session, with one line in the log.
"""

from __future__ import annotations

import array
import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Final

from pyqsd.exports.vhost_user import protocol as p
from pyqsd.exports.vhost_user.protocol import Message, ProtocolError
from pyqsd.exports.vhost_user.sharing import SharedMemory, map_shared
from pyqsd.exports.virtio.blk import F_RING_EVENT_IDX, BlkDevice, BlkQueue
from pyqsd.exports.virtio.virtqueue import MAX_SIZE, BadRing, Inflight, Virtqueue

log = logging.getLogger(__name__)

#: Messages that have a reply of their own, and are not acknowledged besides.
_REPLIED: Final = frozenset(
    {
        Message.GET_FEATURES,
        Message.GET_PROTOCOL_FEATURES,
        Message.GET_QUEUE_NUM,
        Message.GET_VRING_BASE,
        Message.GET_CONFIG,
        Message.GET_INFLIGHT_FD,
        Message.GET_MAX_MEM_SLOTS,
        Message.SET_LOG_BASE,
    }
)


class Vring:
    """What the front-end has told of a ring."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.size = 0
        self.addresses: p.VringAddresses | None = None
        self.base = 0
        self.enabled = False
        self.kick = -1
        self.call = -1
        self.err = -1
        self.queue: Virtqueue | None = None
        self.runner: BlkQueue | None = None

    def notify(self) -> None:
        """Something was used."""
        if self.call >= 0:
            try:
                os.eventfd_write(self.call, 1)
            except OSError:
                # It is full: the driver has been told already.
                pass


class Session:
    """One connection.

    Arguments:
        name: the export, for messages.
        paused: the node is drained when it begins.
    """

    def __init__(self, sock: socket.socket, name: str, device: BlkDevice, paused: bool) -> None:
        self._sock = sock
        self._name = name
        self._device = device
        self._loop = asyncio.get_running_loop()
        self._paused = paused
        self._memory = SharedMemory()
        self._rings = [Vring(index) for index in range(device.queues)]
        self._offered = device.features | p.F_NOTIFY_ON_EMPTY | p.F_LOG_ALL | p.F_PROTOCOL_FEATURES
        self._features = 0
        self._protocol = 0
        self._backend_socket: socket.socket | None = None
        self._inflight: tuple[memoryview, int] | None = None
        self._fds: list[int] = []
        self._readable: asyncio.Future[None] | None = None
        self._problem: str | None = None
        self._handlers: dict[int, Callable[[bytes], Awaitable[bytes | None]]] = {
            Message.GET_FEATURES: self._get_features,
            Message.SET_FEATURES: self._set_features,
            Message.SET_OWNER: self._nothing,
            Message.RESET_OWNER: self._nothing,
            Message.SET_MEM_TABLE: self._set_mem_table,
            Message.SET_LOG_BASE: self._set_log_base,
            Message.SET_LOG_FD: self._nothing,
            Message.SET_VRING_NUM: self._set_vring_num,
            Message.SET_VRING_ADDR: self._set_vring_addr,
            Message.SET_VRING_BASE: self._set_vring_base,
            Message.GET_VRING_BASE: self._get_vring_base,
            Message.SET_VRING_KICK: self._set_vring_kick,
            Message.SET_VRING_CALL: self._set_vring_call,
            Message.SET_VRING_ERR: self._set_vring_err,
            Message.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Message.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Message.GET_QUEUE_NUM: self._get_queue_num,
            Message.SET_VRING_ENABLE: self._set_vring_enable,
            Message.SET_BACKEND_REQ_FD: self._set_backend_req_fd,
            Message.GET_CONFIG: self._get_config,
            Message.SET_CONFIG: self._set_config,
            Message.GET_INFLIGHT_FD: self._get_inflight_fd,
            Message.SET_INFLIGHT_FD: self._set_inflight_fd,
            Message.GET_MAX_MEM_SLOTS: self._get_max_mem_slots,
            Message.ADD_MEM_REG: self._add_mem_reg,
            Message.REM_MEM_REG: self._rem_mem_reg,
        }
        sock.setblocking(False)
        device.reset()

    # --- from outside ------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Until the front-end is gone, or has broken the protocol. Nothing of it is in flight afterwards."""
        try:
            while await self._one_message():
                pass
        except ProtocolError as exc:
            log.error("export '%s': the vhost-user front-end is disconnected: %s", self._name, exc)
        except OSError as exc:
            log.info("export '%s': the vhost-user connection ended: %s", self._name, exc)
        finally:
            await self._close()

    def abort(self) -> None:
        """End the session soon."""
        self._end("")

    def pause(self) -> None:
        """Begin no further requests (a drain)."""
        self._paused = True
        for ring in self._rings:
            if ring.runner is not None:
                ring.runner.paused = True

    def resume(self) -> None:
        """Go on."""
        self._paused = False
        for ring in self._rings:
            if ring.runner is not None:
                ring.runner.paused = False
                ring.runner.process()

    def config_changed(self) -> None:
        """The configuration space has changed: tell the front-end, if it wants to know."""
        if self._backend_socket is not None and self._protocol & p.P_CONFIG:
            try:
                self._backend_socket.send(p.backend_request(p.BACKEND_CONFIG_CHANGE))
            except OSError as exc:
                log.warning("export '%s': the front-end was not told of the new size: %s", self._name, exc)

    # --- messages ----------------------------------------------------------------------------------------------------

    def _end(self, problem: str) -> None:
        if self._problem is None:
            self._problem = problem
            self._wake()

    async def _receive(self, count: int) -> bytes:
        """`count` bytes; fewer at the end. File descriptors that come along are added to `_fds`."""
        data = b""
        while len(data) < count and self._problem is None:
            try:
                part, ancillary, flags, _ = self._sock.recvmsg(
                    count - len(data), socket.CMSG_SPACE(4 * p.MAX_FDS), socket.MSG_CMSG_CLOEXEC
                )
            except (BlockingIOError, InterruptedError):
                await self._wait_readable()
                continue
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    self._fds += array.array("i", payload[: len(payload) // 4 * 4])
            if flags & socket.MSG_CTRUNC or len(self._fds) > p.MAX_FDS:
                raise ProtocolError(f"more than {p.MAX_FDS} file descriptors in a message")
            if not part:
                break
            data += part
        if self._problem:
            raise ProtocolError(self._problem)
        return data

    async def _wait_readable(self) -> None:
        self._readable = self._loop.create_future()
        self._loop.add_reader(self._sock, self._wake)
        try:
            await self._readable
        finally:
            self._loop.remove_reader(self._sock)
            self._readable = None

    def _wake(self) -> None:
        if self._readable is not None and not self._readable.done():
            self._readable.set_result(None)

    async def _one_message(self) -> bool:
        """Handle a message. False at the end."""
        data = await self._receive(p.HEADER.size)
        if len(data) < p.HEADER.size:
            if data:
                raise ProtocolError("the connection ended within a message")
            return False
        header = p.decode_header(data)
        payload = await self._receive(header.size)
        if len(payload) < header.size:
            raise ProtocolError("the connection ended within a message")
        wants_ack = header.need_reply and bool(self._protocol & p.P_REPLY_ACK) and header.request not in _REPLIED
        try:
            handler = self._handlers.get(header.request)
            if handler is None:
                raise ProtocolError(_unknown(header.request))
            try:
                answer = await handler(payload)
            except ValueError as exc:
                raise ProtocolError(str(exc)) from exc
        except ProtocolError as exc:
            if not wants_ack:
                raise
            log.error("export '%s': the vhost-user front-end is refused: %s", self._name, exc)
            answer = p.pack_u64(1)
        else:
            if wants_ack:
                answer = p.pack_u64(0)
        finally:
            for fd in self._fds:
                os.close(fd)
            self._fds.clear()
        if answer is not None:
            await self._loop.sock_sendall(self._sock, p.reply(header.request, answer))
        return True

    def _take_fd(self, what: str) -> int:
        """The one file descriptor that came with the message; the caller has it now."""
        if len(self._fds) != 1:
            raise ProtocolError(f"{len(self._fds)} file descriptors come with {what}, not one")
        return self._fds.pop()

    def _ring(self, index: int) -> Vring:
        if index >= len(self._rings):
            raise ProtocolError(f"ring {index} of {len(self._rings)}")
        return self._rings[index]

    async def _nothing(self, payload: bytes) -> bytes | None:
        return None

    async def _get_features(self, payload: bytes) -> bytes | None:
        return p.pack_u64(self._offered)

    async def _set_features(self, payload: bytes) -> bytes | None:
        features = p.u64(payload)
        if features & ~self._offered:
            raise ProtocolError(f"features 0x{features & ~self._offered:x} are not offered")
        self._features = features
        logging_was, self._memory.logging = self._memory.logging, bool(features & p.F_LOG_ALL)
        if logging_was != self._memory.logging:
            self._relocate()
        self._start_rings()
        return None

    async def _get_protocol_features(self, payload: bytes) -> bytes | None:
        return p.pack_u64(p.PROTOCOL_FEATURES)

    async def _set_protocol_features(self, payload: bytes) -> bytes | None:
        features = p.u64(payload)
        if features & ~p.PROTOCOL_FEATURES:
            raise ProtocolError(f"protocol features 0x{features & ~p.PROTOCOL_FEATURES:x} are not offered")
        self._protocol = features
        return None

    async def _get_queue_num(self, payload: bytes) -> bytes | None:
        return p.pack_u64(len(self._rings))

    # --- configuration -----------------------------------------------------------------------------------------------

    async def _get_config(self, payload: bytes) -> bytes | None:
        access = p.config(payload)
        space = self._device.config()
        size = len(access.data)
        if access.offset + size > len(space):
            # No data: an error, and the front-end goes on.
            return b""
        return p.pack_config(access.offset, space[access.offset : access.offset + size])

    async def _set_config(self, payload: bytes) -> bytes | None:
        access = p.config(payload)
        self._device.set_config(access.offset, access.data)
        return None

    async def _set_backend_req_fd(self, payload: bytes) -> bytes | None:
        fd = self._take_fd("SET_BACKEND_REQ_FD")
        if self._backend_socket is not None:
            self._backend_socket.close()
        try:
            self._backend_socket = socket.socket(fileno=fd)
        except OSError as exc:
            os.close(fd)
            raise ProtocolError(f"the channel to the front-end is no socket: {exc}") from exc
        self._backend_socket.setblocking(False)
        return None

    # --- memory ------------------------------------------------------------------------------------------------------

    async def _set_mem_table(self, payload: bytes) -> bytes | None:
        self._memory.replace(p.regions(payload), self._fds)
        self._relocate()
        self._start_rings()
        return None

    async def _get_max_mem_slots(self, payload: bytes) -> bytes | None:
        return p.pack_u64(p.MAX_SLOTS)

    async def _add_mem_reg(self, payload: bytes) -> bytes | None:
        region = p.region(payload)
        if len(self._fds) != 1:
            raise ProtocolError(f"{len(self._fds)} file descriptors come with a memory region, not one")
        self._memory.add(region, self._fds[0])
        self._relocate()
        self._start_rings()
        return None

    async def _rem_mem_reg(self, payload: bytes) -> bytes | None:
        self._memory.remove(p.region(payload))
        self._relocate()
        return None

    async def _set_log_base(self, payload: bytes) -> bytes | None:
        if len(self._fds) != 1:
            raise ProtocolError(f"{len(self._fds)} file descriptors come with SET_LOG_BASE, not one")
        size, offset = p.log_area(payload)
        self._memory.set_log(self._fds[0], size, offset)
        self._relocate()
        return p.pack_u64(0)

    def _relocate(self) -> None:
        """The memory is another one, or is logged: the rings that run go on with that."""
        memory = self._memory.guest()
        for ring in self._rings:
            if ring.queue is not None:
                ring.queue.relocate(memory, *self._ring_memory(ring), used_written=self._used_logger(ring))

    def _ring_memory(self, ring: Vring) -> tuple[memoryview, memoryview, memoryview]:
        addresses, size = ring.addresses, ring.size
        assert addresses is not None
        return (
            self._memory.ring(addresses.desc, 16 * size),
            self._memory.ring(addresses.avail, 6 + 2 * size),
            self._memory.ring(addresses.used, 6 + 8 * size),
        )

    def _used_logger(self, ring: Vring) -> Callable[[int, int], None] | None:
        addresses = ring.addresses
        if addresses is None or not addresses.flags & p.VRING_F_LOG or not self._memory.logging:
            return None
        base = addresses.log
        return lambda offset, length: self._memory.log(base + offset, length)

    # --- rings -------------------------------------------------------------------------------------------------------

    async def _set_vring_num(self, payload: bytes) -> bytes | None:
        index, size = p.state(payload)
        ring = self._ring(index)
        if not size or size > MAX_SIZE or size & (size - 1):
            raise ProtocolError(f"ring {index} with {size} descriptors")
        self._check_stopped(ring)
        ring.size = size
        return None

    async def _set_vring_addr(self, payload: bytes) -> bytes | None:
        addresses = p.addresses(payload)
        ring = self._ring(addresses.index)
        if addresses.desc & 15 or addresses.avail & 1 or addresses.used & 3:
            raise ProtocolError(f"the addresses of ring {ring.index} are not aligned")
        before, ring.addresses = ring.addresses, addresses
        if ring.queue is not None:
            assert before is not None
            if (before.desc, before.avail, before.used) != (addresses.desc, addresses.avail, addresses.used):
                ring.addresses = before
                raise ProtocolError(f"ring {ring.index} is moved while it runs")
            self._relocate()
        self._start_rings()
        return None

    async def _set_vring_base(self, payload: bytes) -> bytes | None:
        index, base = p.state(payload)
        ring = self._ring(index)
        self._check_stopped(ring)
        ring.base = base & 0xFFFF
        return None

    async def _get_vring_base(self, payload: bytes) -> bytes | None:
        index, _ = p.state(payload)
        ring = self._ring(index)
        await self._stop_ring(ring)
        self._set_fd(ring, "call", -1)
        return p.pack_state(index, ring.base)

    async def _set_vring_enable(self, payload: bytes) -> bytes | None:
        index, enabled = p.state(payload)
        ring = self._ring(index)
        ring.enabled = bool(enabled)
        if ring.runner is not None:
            ring.runner.paused = self._paused or not ring.enabled
            ring.runner.process()
        self._start_rings()
        return None

    async def _set_vring_kick(self, payload: bytes) -> bytes | None:
        ring, fd = self._vring_fd(payload, "kick")
        if fd < 0:
            raise ProtocolError(f"ring {ring.index} is to be polled, which is not supported")
        self._check_stopped(ring, fd)
        self._set_fd(ring, "kick", fd)
        self._start_rings()
        return None

    async def _set_vring_call(self, payload: bytes) -> bytes | None:
        ring, fd = self._vring_fd(payload, "call")
        self._set_fd(ring, "call", fd)
        # What was used meanwhile nobody was told of.
        if ring.queue is not None:
            ring.notify()
        return None

    async def _set_vring_err(self, payload: bytes) -> bytes | None:
        ring, fd = self._vring_fd(payload, "err")
        self._set_fd(ring, "err", fd)
        return None

    def _vring_fd(self, payload: bytes, what: str) -> tuple[Vring, int]:
        value = p.u64(payload)
        ring = self._ring(value & 0xFF)
        if value & p.NO_FD:
            return ring, -1
        fd = self._take_fd(f"the {what} of ring {ring.index}")
        os.set_blocking(fd, False)
        return ring, fd

    @staticmethod
    def _set_fd(ring: Vring, what: str, fd: int) -> None:
        before = getattr(ring, what)
        setattr(ring, what, fd)
        if before >= 0:
            os.close(before)

    @staticmethod
    def _check_stopped(ring: Vring, fd: int = -1) -> None:
        if ring.queue is not None:
            if fd >= 0:
                os.close(fd)
            raise ProtocolError(f"ring {ring.index} is set up anew while it runs")

    def _start_rings(self) -> None:
        """Start all rings that have got all that they need."""
        negotiated = bool(self._features & p.F_PROTOCOL_FEATURES)
        for ring in self._rings:
            told = ring.size and ring.addresses is not None and ring.kick >= 0 and len(self._memory)
            if told and ring.queue is None and (ring.enabled or not negotiated):
                self._start_ring(ring)

    def _start_ring(self, ring: Vring) -> None:
        memory = self._memory.guest()
        try:
            ring.queue = Virtqueue(
                memory,
                ring.size,
                *self._ring_memory(ring),
                ring.base,
                event_idx=bool(self._features & F_RING_EVENT_IDX),
                notify=ring.notify,
                used_written=self._used_logger(ring),
                inflight=self._inflight_of(ring),
                notify_on_empty=bool(self._features & p.F_NOTIFY_ON_EMPTY),
            )
        except BadRing as exc:
            raise ProtocolError(f"ring {ring.index}: {exc}") from exc
        ring.runner = BlkQueue(self._device, ring.queue, lambda problem: self._end(f"ring {ring.index}: {problem}"))
        ring.runner.paused = self._paused
        try:
            self._loop.add_reader(ring.kick, self._kicked, ring)
        except OSError as exc:
            raise ProtocolError(f"the kick of ring {ring.index} cannot be waited for: {exc}") from exc
        # There may be something in it already.
        ring.runner.process()

    def _kicked(self, ring: Vring) -> None:
        try:
            if not os.read(ring.kick, 8):
                raise OSError("end of file")
        except BlockingIOError:
            return
        except OSError as exc:
            self._loop.remove_reader(ring.kick)
            self._end(f"the kick of ring {ring.index} cannot be read: {exc}")
            return
        if ring.runner is not None:
            ring.runner.process()

    async def _stop_ring(self, ring: Vring) -> None:
        runner = ring.runner
        if ring.kick >= 0:
            self._loop.remove_reader(ring.kick)
            self._set_fd(ring, "kick", -1)
        if runner is not None:
            await runner.stop()
            ring.base = runner.next_avail
            ring.runner = ring.queue = None

    # --- requests that outlive this daemon ---------------------------------------------------------------------------

    async def _get_inflight_fd(self, payload: bytes) -> bytes | None:
        wanted = p.inflight(payload)
        if not 0 < wanted.queues <= len(self._rings) or not 0 < wanted.queue_size <= MAX_SIZE:
            raise ProtocolError(f"an inflight area for {wanted.queues} queues of {wanted.queue_size}")
        size = Inflight.bytes_for(wanted.queue_size) * wanted.queues
        fd = os.memfd_create("pyqsd-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            self._inflight = map_shared(fd, size, 0), wanted.queue_size
            answer = p.reply(
                Message.GET_INFLIGHT_FD,
                p.pack_inflight(p.InflightArea(size, 0, wanted.queues, wanted.queue_size)),
            )
            self._sock.sendmsg([answer], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        finally:
            os.close(fd)
        return None

    async def _set_inflight_fd(self, payload: bytes) -> bytes | None:
        area = p.inflight(payload)
        if len(self._fds) != 1:
            raise ProtocolError(f"{len(self._fds)} file descriptors come with SET_INFLIGHT_FD, not one")
        if not 0 < area.queues <= len(self._rings) or not 0 < area.queue_size <= MAX_SIZE:
            raise ProtocolError(f"an inflight area for {area.queues} queues of {area.queue_size}")
        if area.size < Inflight.bytes_for(area.queue_size) * area.queues:
            raise ProtocolError(f"an inflight area of {area.size} bytes")
        self._inflight = map_shared(self._fds[0], area.size, area.offset), area.queue_size
        return None

    def _inflight_of(self, ring: Vring) -> Inflight | None:
        if self._inflight is None:
            return None
        view, size = self._inflight
        step = Inflight.bytes_for(size)
        part = view[ring.index * step : (ring.index + 1) * step]
        if size != ring.size or len(part) < step:
            return None
        return Inflight(part, size)

    # --- the end -----------------------------------------------------------------------------------------------------

    async def _close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        for ring in self._rings:
            if ring.runner is not None:
                # The front-end has noted where its rings stand; nothing in them may change from now on.
                ring.runner.abandon()
        for ring in self._rings:
            await self._stop_ring(ring)
            self._set_fd(ring, "call", -1)
            self._set_fd(ring, "err", -1)
        if self._backend_socket is not None:
            self._backend_socket.close()
        self._sock.close()
        self._device.reset()
        # The guest's memory is given back now.
        self._memory = SharedMemory()
        self._inflight = None
        self._handlers.clear()


def _unknown(request: int) -> str:
    if request in (Message.POSTCOPY_ADVISE, Message.POSTCOPY_LISTEN, Message.POSTCOPY_END):
        return "postcopy migration is not supported"
    return f"request {request} is not known"
