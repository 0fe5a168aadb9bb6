"""Keys that the Linux kernel keeps (keyrings(7))."""

from __future__ import annotations

import ctypes
import os
import platform

_KEYCTL_READ = 11

# keyctl(2) has no wrapper in the C library; these are its numbers in the kernel's tables of system calls.
_NUMBERS = {"x86_64": 250, "i386": 288, "i686": 288, "ppc64le": 271, "ppc64": 271, "s390x": 280, "armv7l": 311}
#: Of the architectures that use the kernel's generic table.
_GENERIC = 219


def read_key(serial: int) -> bytes:
    """The payload of a key. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    number = _NUMBERS.get(platform.machine(), _GENERIC)
    length = 0
    while True:
        buffer = ctypes.create_string_buffer(length) if length else None
        result = libc.syscall(
            ctypes.c_long(number),
            ctypes.c_long(_KEYCTL_READ),
            ctypes.c_int32(serial),
            buffer,
            ctypes.c_size_t(length),
        )
        if result < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        if result <= length:
            return bytes(buffer.raw[:result]) if buffer is not None else b""
        length = result
