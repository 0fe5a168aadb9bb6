"""One client of the NBD server: its socket, and the requests that are on their way.

Requests are decoded from the receive buffer in batches. What can be answered without waiting (`BlockBackend.read_now`
and `write_now`) is answered at once, straight into the send buffer, and one ``send`` carries all replies of a batch;
the rest runs as coroutines, and each of those replies when it is done. A client that does not read its replies is not
read from either, and only so many requests may be on their way, so that the memory of a connection is bounded.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
from collections import deque
from collections.abc import Coroutine
from itertools import islice
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, cast

from pyqsd.aio import eager
from pyqsd.block.driver import FUA
from pyqsd.exports.nbd import protocol as p
from pyqsd.exports.nbd import requests
from pyqsd.exports.nbd.buffers import HEAD, NOTHING, POOL, Buffer
from pyqsd.exports.nbd.handshake import Handshake, MetaContexts
from pyqsd.qapi.errors import Error
from pyqsd.trace import events as trace

if TYPE_CHECKING:
    from pyqsd.exports.nbd.export import NbdExport
    from pyqsd.exports.nbd.server import NbdServer

log = logging.getLogger(__name__)

#: Bytes that are received at once.
_RX: Final = 256 << 10
#: Bytes of replies that are collected before they are sent.
_TX: Final = 256 << 10
#: Bytes of replies that are sent before the rest of the batch is handled, so that the client gets to work meanwhile.
_SEND: Final = 64 << 10
#: Reads from this size on are answered with a hole where they are known to be zeroes: looking is worth it then.
_HOLE: Final = 16 << 10
#: Reads up to this many bytes share the send buffer.
_SHARED_READ: Final = 128 << 10
#: Payloads from this size on are received into their own buffer.
_OWN_PAYLOAD: Final = 64 << 10
#: Bytes that are received at once while a client sends large payloads: little of them then has to be moved.
_RX_BULK: Final = 4 << 10
#: After so many reads (or writes) in a row that had to wait, so many more are not tried without waiting: the cache is
#: cold, or passed by (O_DIRECT).
_MISSES: Final = 16
_COLD: Final = 128
#: Requests that may be on their way, and bytes of payload that they and their replies may take.
_MAX_REQUESTS: Final = 256
_MAX_BYTES: Final = 2 * p.MAX_PAYLOAD
#: Bytes of replies that may wait for the client before no more of its requests are handled.
_MAX_BACKLOG: Final = 1 << 20
#: Requests, bytes received and calls to receive that one client is served before the others get their turn.
_TURN_REQUESTS: Final = 256
_TURN_BYTES: Final = 8 << 20
_TURN_ROUNDS: Final = 32
#: Socket buffers are to be this large if the system lets them.
_SOCKET_BUFFER: Final = 4 << 20
_IOV: Final = 64
#: Nanoseconds to look out for the next request before the event loop goes to sleep.
_LINGER: Final = 50_000 if len(os.sched_getaffinity(0)) > 1 else 0

_READ: Final = p.CMD_READ
_WRITE: Final = p.CMD_WRITE
_DONE: Final = p.REPLY_FLAG_DONE


class _Request:
    """A request that had to wait. `cost`: bytes of payload that it holds, in `buffer`."""

    __slots__ = ("buffer", "connection", "cookie", "cost", "kind", "length", "offset", "task")

    def __init__(
        self, connection: Connection, kind: int, cookie: int, offset: int, length: int, buffer: Buffer | None
    ) -> None:
        self.connection = connection
        self.kind = kind
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.buffer = buffer
        self.cost = length if buffer is not None else 0
        self.task: eager.Running | None = None

    def finished(self, result: Any, exc: BaseException | None) -> None:
        """It has its result, or failed."""
        self.connection.finished(self, result, exc)


class Connection:
    """A connection from its first byte to its last.

    It ends when the client says so or vanishes, does not speak the protocol, or with `abort`; `NbdServer.left` is
    called when nothing of it is in flight any more.
    """

    def __init__(self, server: NbdServer, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self._server = server
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._handshake: Handshake | None = Handshake(server.find, server.listed)
        self._timer: asyncio.TimerHandle | None = None
        self.export: NbdExport | None = None
        self.contexts = MetaContexts()
        self.mode = p.SIMPLE

        self._reading = False
        self._writing = False
        #: Nothing more comes from the client.
        self._eof = False
        #: No further requests are handled; the connection closes when all that is on its way has been answered.
        self._ending = False
        self._closed = False
        self._gone = False
        #: Inside `_serve`, which sends what is queued itself.
        self._busy = False
        #: There are requests in the receive buffer that had to be left there.
        self._stalled = False
        self._turn_scheduled = False
        self._flush_scheduled = False

        self._rx = NOTHING
        self._rx_start = 0
        self._rx_end = 0
        self._tx: Buffer | None = None
        self._out: deque[tuple[memoryview, Buffer | None]] = deque()
        self._out_bytes = 0
        #: A write whose payload is being received: (flags, cookie, offset, length), its buffer and how much is there.
        self._payload: tuple[int, int, int, int] = (0, 0, 0, 0)
        self._payload_buffer: Buffer | None = None
        self._payload_fill = 0
        #: Payload bytes of a refused request that are still to come.
        self._skip = 0
        #: The last request had a large payload; the next one may have one too.
        self._bulk = False
        self._requests = 0
        self._bytes = 0
        #: Batches that are not followed by lingering, because that was in vain the last times.
        self._linger_pause = 0
        self._linger_failures = 0
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        self._poll = poll.poll
        self._pending: set[_Request] = set()
        self._tools: tuple[Any, ...] = ()
        #: Reads (and writes) that are not tried without waiting, because that was in vain the last times.
        self._cold = 0
        self._misses = 0
        self._cold_writes = 0
        self._write_misses = 0

    # --- life -------------------------------------------------------------------------------------------------------

    def begin(self, handshake_seconds: int) -> None:
        """Greet the client, which must choose an export within `handshake_seconds` (0: at any time)."""
        if trace.NBD_NEGOTIATE_BEGIN.enabled:
            trace.NBD_NEGOTIATE_BEGIN()
        sock = self._sock
        sock.setblocking(False)
        if sock.family == socket.AF_UNIX:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
        elif sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if handshake_seconds:
            self._timer = self._loop.call_later(handshake_seconds, self.abort)
        self._queue(memoryview(Handshake.hello()), None)
        self._flush()
        if not self._closed:
            self._watch()

    def abort(self) -> None:
        """Disconnect now. What is in flight goes on, but its replies go nowhere."""
        if self._closed:
            return
        self._closed = True
        self._stop_timer()
        self._unwatch()
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._fd)
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._sock.close()
        for _, buffer in self._out:
            if buffer is not None:
                POOL.put(buffer)
        self._out.clear()
        if not self._busy:
            self._leave()

    def _leave(self) -> None:
        """Closed and out of `_serve`: give the buffers back, and once nothing is in flight, say that it is over."""
        for buffer in (self._rx, self._tx, self._payload_buffer):
            if buffer is not None and buffer is not NOTHING:
                POOL.put(buffer)
        self._rx, self._tx, self._payload_buffer = NOTHING, None, None
        if not self._requests and not self._gone:
            self._gone = True
            if self.export is not None:
                self.export.left(self)
            self._server.left(self)

    def _end(self) -> None:
        """Handle no further requests, answer those that are on their way, then close."""
        self._ending = True
        self._unwatch()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def pause(self) -> None:
        """Start no new requests until `resume`."""
        self._unwatch()

    def resume(self) -> None:
        """Go on after `pause`."""
        if not self._closed:
            self._schedule_turn()

    def _watch(self) -> None:
        if not (self._reading or self._closed or self._eof or self._ending):
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def _unwatch(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def _schedule_turn(self) -> None:
        if not self._turn_scheduled:
            self._turn_scheduled = True
            self._loop.call_soon(self._turn)

    # --- handshake --------------------------------------------------------------------------------------------------

    def _negotiate(self, handshake: Handshake) -> None:
        if self._out_bytes:
            # It reads no replies: it is not read from.
            self._unwatch()
            return
        try:
            data = self._sock.recv(_RX)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.abort()
            return
        if not data:
            self.abort()
            return
        handshake.feed(data)
        self._negotiate_on(handshake)

    def _negotiate_on(self, handshake: Handshake) -> None:
        try:
            while self._out_bytes < _MAX_BACKLOG:
                reply = handshake.step()
                if reply is None:
                    break
                if reply:
                    self._queue(memoryview(reply), None)
        except p.Violation as exc:
            log.debug("option negotiation failed: %s", exc)
            # What it asked before deserves its answer.
            self._flush()
            self.abort()
            return
        if handshake.ended:
            self._end()
        elif handshake.chosen is not None:
            self._transmit(handshake)
        if self._out:
            self._flush()

    def _transmit(self, handshake: Handshake) -> None:
        """The client has chosen an export."""
        self._stop_timer()
        self.export = cast("NbdExport", handshake.chosen)
        self.contexts = handshake.contexts
        self.mode = handshake.mode
        self._handshake = None
        self._rx = POOL.get(_RX)
        rest = handshake.rest()
        self._rx.data[: len(rest)] = rest
        self._rx_end = len(rest)
        self._tools = self._make_tools(self.export)
        self.export.joined(self)
        if trace.NBD_NEGOTIATE_SUCCESS.enabled:
            trace.NBD_NEGOTIATE_SUCCESS()
        if rest:
            self._schedule_turn()
        if self.export.paused:
            self._unwatch()

    def _make_tools(self, export: NbdExport) -> tuple[Any, ...]:
        """What `_serve_batch` uses, looked up once."""
        backend = export.backend
        if self.mode == p.EXTENDED:
            request, magic, data, done = (
                p.EXTENDED_REQUEST,
                p.EXTENDED_REQUEST_MAGIC,
                p.EXTENDED_DATA_CHUNK,
                p.EXTENDED_CHUNK,
            )
        else:
            request, magic, done = p.REQUEST, p.REQUEST_MAGIC, p.SIMPLE_REPLY
            data = p.DATA_CHUNK if self.mode else p.SIMPLE_REPLY
        return (
            request.unpack_from,
            request.size,
            magic,
            data.size,
            p.CMD_FLAG_PAYLOAD_LEN if self.mode == p.EXTENDED else 0,
            _HOLE if self.mode else _SHARED_READ + 1,
            backend.read_now,
            backend.write_now,
            backend.reads_as_zeroes_now,
            data.pack_into,
            done.pack_into,
        )

    # --- receiving --------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        if self._handshake is not None:
            self._negotiate(self._handshake)
            return
        if self._turn_scheduled:
            return
        if self._stalled:
            # More requests do not help a client whose requests are waiting already.
            self._unwatch()
            return
        # Somebody else was served since: there is no time to linger.
        alone = self._server.last_served is self
        self._server.last_served = self
        budget = _TURN_BYTES
        try:
            for _ in range(_TURN_ROUNDS):
                n = self._receive()
                if n == 0:
                    self._eof = True
                    self._unwatch()
                self._serve()
                budget -= n
                if n == 0 or budget <= 0 or self._stalled or self._turn_scheduled or self._closed:
                    return
                # A large payload goes on coming while the client is on another processor.
                if self._payload_buffer is None and not (alone and self._linger()):
                    return
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.abort()

    def _linger(self) -> bool:
        """Whether the next request came within a moment. Going to sleep and being woken up takes longer than most
        clients need for their next request, so that waiting pays as long as there is nobody else to serve."""
        if self._linger_pause:
            self._linger_pause -= 1
            return False
        if self._requests or not _LINGER or self._reading is False:
            return False
        ready = self._poll
        end = perf_counter_ns() + _LINGER
        while not ready(0):
            if perf_counter_ns() > end:
                self._linger_failures = min(self._linger_failures + 1, 6)
                self._linger_pause = (1 << self._linger_failures) - 1
                return False
        self._linger_failures = 0
        return True

    def _receive(self) -> int:
        """Receive what is there: the number of bytes, 0 at the end. Raises BlockingIOError, OSError."""
        buffer = self._payload_buffer
        if buffer is not None:
            length = self._payload[3]
            rest = length - self._payload_fill
            n = self._sock.recvmsg_into([buffer.data[self._payload_fill : length], self._rx.data[:_RX_BULK]])[0]
            if n > rest:
                self._payload_fill = length
                self._rx_end = n - rest
            else:
                self._payload_fill += n
            return n
        end = self._rx_end
        if self._bulk:
            self._bulk = False
            n = self._sock.recv_into(self._rx.data[end : end + _RX_BULK])
        else:
            n = self._sock.recv_into(self._rx.data[end:])
        self._rx_end = end + n
        return n

    def _turn(self) -> None:
        """Go on with what is in the receive buffer."""
        self._turn_scheduled = False
        if self._closed:
            return
        if self._handshake is not None:
            self._negotiate_on(self._handshake)
        else:
            self._serve()
        if not (self._stalled or self._turn_scheduled or (self.export is not None and self.export.paused)):
            self._watch()

    def _blocked(self) -> bool:
        """Whether requests have to wait: for their predecessors, for the client to read replies, for a drain to end."""
        return (
            self._requests >= _MAX_REQUESTS
            or self._out_bytes >= _MAX_BACKLOG
            or self._bytes >= _MAX_BYTES
            or (self.export is not None and self.export.paused)
        )

    def _serve(self) -> None:
        """Handle the requests in the receive buffer, and send the replies that there are."""
        self._busy = True
        self._stalled = False
        try:
            if self._payload_buffer is not None and self._payload_fill == self._payload[3]:
                self._payload_received()
            self._serve_batch()
        except Exception:
            log.exception("NBD connection: internal error")
            self.abort()
        self._busy = False
        if self._closed:
            self._leave()
            return
        start, end = self._rx_start, self._rx_end
        if start == end:
            self._rx_start = self._rx_end = 0
        elif start and end + _OWN_PAYLOAD + p.EXTENDED_REQUEST.size > _RX:
            self._rx.data[: end - start] = self._rx.data[start:end]
            self._rx_start, self._rx_end = 0, end - start
        if self._eof and not self._stalled and not self._turn_scheduled:
            self._end()
        if self._out or self._ending:
            self._flush()

    def _serve_batch(self) -> None:
        export = self.export
        assert export is not None
        unpack, header_size, wanted, data_head, write_flags, hole, read_now, write_now, holes, pack_data, pack_done = (
            self._tools
        )
        size = export.size
        fast_write = export.fast_write
        mode = self.mode
        rx = self._rx.data
        position, end = self._rx_start, self._rx_end
        if self._skip and position < end:
            n = min(self._skip, end - position)
            self._skip -= n
            position += n
        tx_buffer = self._tx
        if tx_buffer is None:
            tx_buffer = self._tx = POOL.get(_TX)
        tx = tx_buffer.data
        filled = 0
        left = _TURN_REQUESTS
        cold, misses = self._cold, self._misses
        cold_writes, write_misses = self._cold_writes, self._write_misses
        if (self._requests or self._out_bytes or export.paused) and end - position >= header_size and self._blocked():
            self._stalled = True
            left = 0
        while end - position >= header_size and left and not self._ending:
            left -= 1
            magic, flags, kind, cookie, offset, length = unpack(rx, position)
            if (
                magic == wanted
                and kind == _READ
                and not flags
                and 0 < length <= _SHARED_READ
                and offset + length <= size
            ):
                at = filled + data_head
                stop = at + length
                if length >= hole and holes(offset, length):
                    self._reply_hole(cookie, offset, length)
                    position += header_size
                    continue
                if stop > _TX or filled > _SEND:
                    tx = self._send_batch(tx, filled)
                    filled = 0
                    if self._closed:
                        return
                    if self._out_bytes >= _MAX_BACKLOG:
                        self._stalled = True
                        break
                    at = data_head
                    stop = at + length
                if cold:
                    cold -= 1
                    done = False
                else:
                    try:
                        done = read_now(offset, length, [tx[at:stop]])
                    except OSError:
                        done = False
                    if not done:
                        misses += 1
                        if misses >= _MISSES:
                            cold = _COLD
                if done:
                    misses = 0
                    if mode == 1:
                        pack_data(tx, filled, 0x668E33EF, 1, 1, cookie, length + 8, offset)
                    elif mode == 0:
                        pack_data(tx, filled, 0x67446698, 0, cookie)
                    else:
                        pack_data(tx, filled, 0x6E8A278C, 1, 1, cookie, offset, length + 8, offset)
                    filled = stop
                    position += header_size
                    continue
                position += header_size
                buffer = POOL.get(length)
                coro = export.backend.preadv(offset, length, [buffer.data[:length]])
                self._run(_READ, cookie, offset, length, buffer, coro)
                if self._blocked():
                    self._stalled = True
                    break
                continue
            elif (
                kind == _WRITE
                and magic == wanted
                and fast_write
                and not flags & ~write_flags
                and 0 < length <= end - position - header_size
                and offset + length <= size
                and filled + 32 <= _TX
            ):
                at = position + header_size
                if cold_writes:
                    cold_writes -= 1
                    done = False
                else:
                    try:
                        done = write_now(offset, length, [rx[at : at + length]])
                    except OSError:
                        done = False
                    if not done:
                        write_misses += 1
                        if write_misses >= _MISSES:
                            cold_writes = _COLD
                if done:
                    write_misses = 0
                    if mode != 2:
                        pack_done(tx, filled, 0x67446698, 0, cookie)
                        filled += 16
                    else:
                        pack_done(tx, filled, 0x6E8A278C, 1, 0, cookie, offset, 0)
                        filled += 32
                    position = at + length
                    continue
                if export.backend.node.active:
                    position = self._write_request(flags, cookie, offset, length, at, end)
                    if self._blocked():
                        self._stalled = True
                        break
                    continue
            # Everything else has no need to hurry.
            if magic != wanted:
                self._reply_error(cookie, offset, p.EINVAL, f"invalid magic (got 0x{magic:x}, expected 0x{wanted:x})")
                self._end()
                break
            after = self._slow_request(flags, kind, cookie, offset, length, position + header_size, end)
            if after < 0:
                break
            position = after
            if self._closed:
                return
            if self._blocked():
                self._stalled = True
                break
        self._rx_start = position
        self._cold, self._misses = cold, misses
        self._cold_writes, self._write_misses = cold_writes, write_misses
        if filled:
            self._send_batch(tx, filled)
        if not left and not self._stalled and not self._ending:
            self._schedule_turn()

    def _send_batch(self, tx: memoryview, filled: int) -> memoryview:
        """Send the first `filled` bytes of the send buffer; the send buffer to go on with."""
        sent = 0
        if not self._out:
            try:
                sent = self._sock.send(tx[:filled])
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                self.abort()
                return tx
            if sent == filled:
                return tx
        buffer, self._tx = self._tx, POOL.get(_TX)
        self._queue(tx[sent:filled], buffer)
        self._start_writing()
        return self._tx.data

    # --- requests that are not answered at once -----------------------------------------------------------------

    def _slow_request(
        self, flags: int, kind: int, cookie: int, offset: int, length: int, position: int, end: int
    ) -> int:
        """Begin a request whose header ends at `position` of the receive buffer, which is filled up to `end`. Returns
        where the next request is, or -1 if more of this one has to come first, or if it was the last."""
        export = self.export
        assert export is not None
        if kind == p.CMD_DISC:
            self._end()
            return -1
        with_payload = self.mode == p.EXTENDED and bool(flags & p.CMD_FLAG_PAYLOAD_LEN)
        payload = length if kind == _WRITE or with_payload else 0
        if length > p.MAX_PAYLOAD and (payload or kind in (p.CMD_READ, p.CMD_CACHE)):
            self._reply_error(cookie, offset, p.EINVAL, f"len ({length}) is larger than max len ({p.MAX_PAYLOAD})")
            if payload:
                self._end()
                return -1
            return position
        ids = self.contexts.ids
        effect = length
        if kind == p.CMD_BLOCK_STATUS and with_payload:
            chosen = None
            if length <= 8 + 4 * len(ids):
                if end - position < length:
                    return -1
                chosen = p.decode_status_payload(self._rx.data[position : position + length], ids)
            effect, listed = chosen or (0, [])
            ids = frozenset(listed)
        wrong = requests.check(export, self.mode, flags, kind, offset, effect)
        if wrong is None and kind == p.CMD_BLOCK_STATUS:
            wrong = requests.check_status(self.contexts.ids, ids, effect)
        if wrong is not None:
            self._reply_error(cookie, offset, p.EINVAL, wrong)
            taken = min(payload, end - position)
            self._skip = payload - taken
            return position + taken
        if kind != _READ and not export.backend.node.active:
            self._reply_error(cookie, offset, p.EPERM, "export is inactive")
            taken = min(payload, end - position)
            self._skip = payload - taken
            return position + taken
        if kind == _WRITE:
            return self._write_request(flags, cookie, offset, length, position, end)
        if not effect and kind != p.CMD_FLUSH:
            if kind == p.CMD_READ and self.mode == p.STRUCTURED:
                self._chunk(cookie, offset, p.REPLY_NONE, b"")
                return position
            if flags & p.CMD_FLAG_FUA and kind in (p.CMD_TRIM, p.CMD_WRITE_ZEROES):
                kind = p.CMD_FLUSH
            else:
                self._reply_done(cookie, offset)
                return position
        if kind == p.CMD_READ:
            self._read_request(flags, cookie, offset, length)
        elif kind == p.CMD_BLOCK_STATUS:
            most = 1 if flags & p.CMD_FLAG_REQ_ONE else p.MAX_EXTENTS
            self._run(kind, cookie, offset, 0, None, requests.block_status(export, sorted(ids), offset, effect, most))
        else:
            self._run(kind, cookie, offset, 0, None, requests.start(export, kind, flags, offset, length))
        return position + (payload if kind == p.CMD_BLOCK_STATUS else 0)

    def _read_request(self, flags: int, cookie: int, offset: int, length: int) -> None:
        export = self.export
        assert export is not None
        if self.mode and not flags & p.CMD_FLAG_DF and export.backend.reads_as_zeroes_now(offset, length):
            self._reply_hole(cookie, offset, length)
            return
        buffer = POOL.get(length)
        view = buffer.data[:length]
        if length > _SHARED_READ and requests.read_now(export, offset, length, view):
            self._reply_data(cookie, offset, length, buffer)
        else:
            self._run(_READ, cookie, offset, length, buffer, export.backend.preadv(offset, length, [view]))

    def _write_request(self, flags: int, cookie: int, offset: int, length: int, position: int, end: int) -> int:
        """A write whose payload begins at `position`."""
        there = end - position
        if there < length and length < _OWN_PAYLOAD:
            return -1
        buffer = POOL.get(length)
        taken = min(there, length)
        buffer.data[:taken] = self._rx.data[position : position + taken]
        if taken == length:
            self._write(flags, cookie, offset, length, buffer)
        else:
            self._bulk = True
            self._payload = (flags, cookie, offset, length)
            self._payload_fill = taken
            self._payload_buffer = buffer
        return position + taken

    def _payload_received(self) -> None:
        buffer, self._payload_buffer = self._payload_buffer, None
        assert buffer is not None
        flags, cookie, offset, length = self._payload
        export = self.export
        assert export is not None
        if (
            not flags & p.CMD_FLAG_FUA
            and not export.writethrough
            and not export.paused
            and requests.write_now(export, offset, length, buffer.data[:length])
        ):
            POOL.put(buffer)
            self._reply_done(cookie, offset)
        else:
            self._write(flags, cookie, offset, length, buffer)

    def _write(self, flags: int, cookie: int, offset: int, length: int, buffer: Buffer) -> None:
        export = self.export
        assert export is not None
        fua = FUA if flags & p.CMD_FLAG_FUA or export.writethrough else 0
        if not length:
            POOL.put(buffer)
            if not fua:
                self._reply_done(cookie, offset)
                return
            self._run(p.CMD_FLUSH, cookie, offset, 0, None, export.backend.flush())
            return
        coro = export.backend.pwritev(offset, length, [buffer.data[:length]], fua)
        self._run(_WRITE, cookie, offset, length, buffer, coro)

    def _run(
        self,
        kind: int,
        cookie: int,
        offset: int,
        length: int,
        buffer: Buffer | None,
        coro: Coroutine[Any, Any, Any],
    ) -> None:
        """Run a request that may have to wait."""
        request = _Request(self, kind, cookie, offset, length, buffer)
        self._requests += 1
        self._bytes += request.cost
        self._pending.add(request)
        request.task = eager.start_io(coro, request.finished)

    def finished(self, request: _Request, result: Any, exc: BaseException | None) -> None:
        """A request is done: reply."""
        self._pending.discard(request)
        self._requests -= 1
        self._bytes -= request.cost
        buffer = request.buffer
        if exc is not None:
            if buffer is not None:
                POOL.put(buffer)
            self._failed(request, exc)
        elif request.kind == _READ:
            assert buffer is not None
            self._reply_data(request.cookie, request.offset, request.length, buffer)
        elif request.kind == p.CMD_BLOCK_STATUS:
            self._reply_status(request.cookie, request.offset, result)
        else:
            if buffer is not None:
                POOL.put(buffer)
            self._reply_done(request.cookie, request.offset)
        if self._busy:
            return
        if self._closed:
            self._leave()
            return
        if self._stalled and not self._turn_scheduled:
            self._schedule_turn()
        if not self._requests:
            # Nobody to share the system call with.
            self._flush()
        elif not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush_now)

    # --- replies ------------------------------------------------------------------------------------------------------

    def _queue(self, view: memoryview, buffer: Buffer | None) -> None:
        """Send `view` with the next flush, then give `buffer` back."""
        if self._closed:
            if buffer is not None:
                POOL.put(buffer)
            return
        self._out.append((view, buffer))
        self._out_bytes += len(view)

    def _reply_done(self, cookie: int, offset: int) -> None:
        if self.mode == p.EXTENDED:
            data = p.EXTENDED_CHUNK.pack(p.EXTENDED_REPLY_MAGIC, _DONE, p.REPLY_NONE, cookie, offset, 0)
        else:
            data = p.SIMPLE_REPLY.pack(p.SIMPLE_MAGIC, 0, cookie)
        self._queue(memoryview(data), None)

    def _reply_error(self, cookie: int, offset: int, error: int, message: str) -> None:
        if self.mode == p.SIMPLE:
            self._queue(memoryview(p.SIMPLE_REPLY.pack(p.SIMPLE_MAGIC, error, cookie)), None)
        else:
            self._chunk(cookie, offset, p.REPLY_ERROR, p.error_payload(error, message))

    def _chunk(self, cookie: int, offset: int, kind: int, payload: bytes, flags: int = _DONE) -> None:
        if self.mode == p.EXTENDED:
            head = p.EXTENDED_CHUNK.pack(p.EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, len(payload))
        else:
            head = p.CHUNK.pack(p.STRUCTURED_MAGIC, flags, kind, cookie, len(payload))
        self._queue(memoryview(head + payload), None)

    def _reply_hole(self, cookie: int, offset: int, length: int) -> None:
        self._chunk(cookie, offset, p.REPLY_OFFSET_HOLE, p.HOLE.pack(offset, length))

    def _failed(self, request: _Request, exc: BaseException) -> None:
        if isinstance(exc, asyncio.CancelledError):
            self.abort()
            return
        if not isinstance(exc, (OSError, Error)):
            log.error("NBD request: internal error", exc_info=exc)
        error = p.nbd_error(getattr(exc, "errno", None))
        self._reply_error(request.cookie, request.offset, error, requests.FAILURES[request.kind])

    def _reply_data(self, cookie: int, offset: int, length: int, buffer: Buffer) -> None:
        """What was read, from the start of `buffer`, which is given back when it has been sent."""
        if self.mode == p.SIMPLE:
            start = HEAD - p.SIMPLE_REPLY.size
            p.SIMPLE_REPLY.pack_into(buffer.view, start, p.SIMPLE_MAGIC, 0, cookie)
        elif self.mode == p.STRUCTURED:
            start = HEAD - p.DATA_CHUNK.size
            p.DATA_CHUNK.pack_into(
                buffer.view, start, p.STRUCTURED_MAGIC, _DONE, p.REPLY_OFFSET_DATA, cookie, length + 8, offset
            )
        else:
            start = HEAD - p.EXTENDED_DATA_CHUNK.size
            p.EXTENDED_DATA_CHUNK.pack_into(
                buffer.view,
                start,
                p.EXTENDED_REPLY_MAGIC,
                _DONE,
                p.REPLY_OFFSET_DATA,
                cookie,
                offset,
                length + 8,
                offset,
            )
        self._queue(buffer.view[start : HEAD + length], buffer)

    def _reply_status(self, cookie: int, offset: int, result: list[tuple[int, requests.Extents]]) -> None:
        wide = self.mode == p.EXTENDED
        kind = p.REPLY_BLOCK_STATUS_EXT if wide else p.REPLY_BLOCK_STATUS
        for number, (context, extents) in enumerate(result, 1):
            payload = p.status_payload(context, extents, wide)
            self._chunk(cookie, offset, kind, payload, _DONE if number == len(result) else 0)

    # --- sending ------------------------------------------------------------------------------------------------------

    def _flush_now(self) -> None:
        self._flush_scheduled = False
        self._flush()

    def _flush(self) -> None:
        """Send what is queued, as far as the client takes it."""
        if self._closed:
            return
        out = self._out
        try:
            while out:
                if len(out) == 1:
                    n = self._sock.send(out[0][0])
                else:
                    n = self._sock.sendmsg([view for view, _ in islice(out, _IOV)])
                self._out_bytes -= n
                while n:
                    view, buffer = out[0]
                    if n < len(view):
                        out[0] = (view[n:], buffer)
                        break
                    n -= len(view)
                    out.popleft()
                    if buffer is not None:
                        POOL.put(buffer)
        except (BlockingIOError, InterruptedError):
            self._start_writing()
        except OSError:
            self.abort()
            return
        if not out:
            if self._writing:
                self._writing = False
                self._loop.remove_writer(self._fd)
            if self._ending and not self._requests:
                self.abort()
                return
        if self._out_bytes < _MAX_BACKLOG and (self._stalled or (self._handshake is not None and not self._reading)):
            self._schedule_turn()

    def _start_writing(self) -> None:
        if not self._writing and not self._closed:
            self._writing = True
            self._loop.add_writer(self._fd, self._flush)
