"""Bytes in and out of non-blocking file descriptors, with bounded memory."""

from __future__ import annotations

import asyncio
import os
import select
from collections import deque
from collections.abc import Callable
from itertools import islice

#: Bytes per read: small, so that a peer cannot hand over thousands of requests before it has read an answer.
CHUNK = 4096
#: Unsent bytes from which on the peer is not read from any more, and below which it is again.
HIGH_WATER = 256 * 1024
LOW_WATER = 64 * 1024
#: Unsent bytes that are kept at most.
LIMIT = 64 * 1024 * 1024


class Stream:
    """Reads `input_fd` and writes `output_fd` (-1: there is none; both may be the same). They must be non-blocking;
    regular files are fine. The stream does not close them.

    `received` gets what was read, `ended` is called once when the other side is gone or reading failed; a different
    `output_fd` is written to even then. What does not fit below `LIMIT` any more is lost and `overflowed` is called;
    whole calls of `write` are lost, never parts.
    """

    def __init__(
        self,
        input_fd: int,
        output_fd: int,
        received: Callable[[bytes], None],
        ended: Callable[[], None],
        overflowed: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._input = input_fd
        self._output = output_fd
        self._received = received
        self._ended = ended
        self._overflowed = overflowed
        self._wanted = False
        self._reader = False
        self._file_read: asyncio.Handle | None = None
        self._unsent: deque[memoryview] = deque()
        self._unsent_bytes = 0
        self._pressed = False
        self._writer = False
        self._flush_soon: asyncio.Handle | None = None
        self._closed = False
        self._hangup: select.epoll | None = None
        self._watch = False

    @property
    def pressed(self) -> bool:
        """The other side does not take what is written."""
        return self._pressed

    def read(self, wanted: bool, watch: bool = False) -> None:
        """Start or stop reading. `watch`: without reading, notice at least when the other side hangs up, although what
        it sent last is lost then."""
        self._wanted = wanted
        self._watch = watch
        self._update()

    def write(self, data: bytes) -> None:
        """Send `data` as soon as possible; all that is written until the loop's next turn goes out at once."""
        if self._closed or self._output < 0 or not data:
            return
        if self._unsent_bytes and self._unsent_bytes + len(data) > LIMIT:
            self._overflowed()
            return
        self._unsent.append(memoryview(data))
        self._unsent_bytes += len(data)
        if self._unsent_bytes >= HIGH_WATER and not self._pressed:
            self._cancel_flush()
            self._flush()
        if not self._writer and self._flush_soon is None and self._unsent:
            self._flush_soon = self._loop.call_soon(self._flush)

    def close(self) -> None:
        """Send what goes without waiting, and stop."""
        if self._closed:
            return
        if self._unsent:
            self._flush(closing=True)
        self._stop()

    # --- reading ---------------------------------------------------------------------------------------------------

    def _update(self) -> None:
        if self._closed or self._input < 0:
            return
        wanted = self._wanted and not self._pressed
        if wanted != self._reader:
            self._reader = wanted
            if wanted:
                try:
                    self._loop.add_reader(self._input, self._on_readable)
                except PermissionError:
                    # epoll does not take regular files: they are always readable.
                    self._file_read = self._loop.call_soon(self._on_file)
            elif self._file_read is not None:
                self._file_read.cancel()
                self._file_read = None
            else:
                self._loop.remove_reader(self._input)
        if self._watch and not self._wanted:
            if self._hangup is None:
                self._hangup = select.epoll()
                self._hangup.register(self._input, 0)
                self._loop.add_reader(self._hangup.fileno(), self._fail)
        elif self._hangup is not None:
            self._forget_hangup()

    def _forget_hangup(self) -> None:
        if self._hangup is not None:
            self._loop.remove_reader(self._hangup.fileno())
            self._hangup.close()
            self._hangup = None

    def _on_readable(self) -> None:
        try:
            data = os.read(self._input, CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            self._received(data)
        else:
            self._fail()

    def _on_file(self) -> None:
        self._file_read = None
        if self._reader and not self._closed:
            self._on_readable()
            if self._reader and not self._closed and self._file_read is None:
                self._file_read = self._loop.call_soon(self._on_file)

    def _fail(self) -> None:
        """There is no more to read."""
        if self._closed:
            return
        if self._output >= 0 and self._output != self._input:
            # The other direction lives on.
            self._stop_reading()
            self._input = -1
        else:
            if self._unsent:
                self._flush(closing=True)
            self._stop()
        self._ended()

    def _stop_reading(self) -> None:
        if self._file_read is not None:
            self._file_read.cancel()
            self._file_read = None
        elif self._reader:
            self._loop.remove_reader(self._input)
        self._reader = False
        self._forget_hangup()

    # --- writing ---------------------------------------------------------------------------------------------------

    def _flush(self, closing: bool = False) -> None:
        """Send what goes without waiting."""
        self._flush_soon = None
        if self._closed:
            return
        unsent = self._unsent
        while unsent:
            try:
                sent = os.writev(self._output, list(islice(unsent, 512)))
            except InterruptedError:
                continue
            except BlockingIOError:
                break
            except OSError:
                # Reading tells that a peer is gone; it may have sent something before it went.
                unsent.clear()
                self._unsent_bytes = 0
                break
            self._unsent_bytes -= sent
            while unsent and sent >= len(unsent[0]):
                sent -= len(unsent.popleft())
            if sent:
                unsent[0] = unsent[0][sent:]
        if closing:
            return
        if bool(self._unsent) != self._writer:
            self._writer = bool(self._unsent)
            if self._writer:
                self._loop.add_writer(self._output, self._flush)
            else:
                self._loop.remove_writer(self._output)
        if self._unsent_bytes >= HIGH_WATER:
            self._set_pressed(True)
        elif self._unsent_bytes <= LOW_WATER:
            self._set_pressed(False)

    def _cancel_flush(self) -> None:
        if self._flush_soon is not None:
            self._flush_soon.cancel()
            self._flush_soon = None

    def _set_pressed(self, pressed: bool) -> None:
        if pressed != self._pressed:
            self._pressed = pressed
            self._update()

    def _stop(self) -> None:
        self._closed = True
        self._stop_reading()
        if self._writer:
            self._loop.remove_writer(self._output)
        self._cancel_flush()
        self._unsent.clear()
        self._unsent_bytes = 0
