"""Runs under the system's Python, which has libnbd's bindings: JSON lines in, JSON lines out.

Each line is a list: a method of `nbd.NBD` and its arguments; bytes travel as {"hex": …}. `connect_uri`, `pread` … as
libnbd has them; `block_status` gives [context, offset, entries] for every callback, and `storm` runs asynchronous
requests all at once and checks what comes back.
"""

import json
import sys

import nbd


def decode(value):
    return bytes.fromhex(value["hex"]) if isinstance(value, dict) and "hex" in value else value


def encode(value):
    if isinstance(value, (bytes, bytearray)):
        return {"hex": bytes(value).hex()}
    return value


def block_status(handle, length, offset):
    found = []
    handle.block_status(length, offset, lambda context, at, entries, error: found.append([context, at, list(entries)]))
    return found


def opt_list(handle):
    found = []
    handle.opt_list(lambda name, description: found.append([name, description]))
    return found


def opt_list_meta_context(handle):
    found = []
    handle.opt_list_meta_context(found.append)
    return found


def storm(handle, count, length):
    """`count` writes in flight together, each to its own place, then as many reads; the number that were right."""
    for read in (False, True):
        cookies = []
        buffers = []
        for index in range(count):
            data = bytes([index % 251 + 1]) * length
            buffer = nbd.Buffer(length) if read else nbd.Buffer.from_bytearray(bytearray(data))
            buffers.append((buffer, data))
            call = handle.aio_pread if read else handle.aio_pwrite
            cookies.append(call(buffer, index * length))
        for cookie in cookies:
            while not handle.aio_command_completed(cookie):
                handle.poll(-1)
        if read:
            return sum(bytes(buffer.to_bytearray()) == data for buffer, data in buffers)


def main():
    handle = nbd.NBD()
    extra = {"block_status": block_status, "opt_list": opt_list, "storm": storm}
    extra["opt_list_meta_context"] = opt_list_meta_context
    for line in sys.stdin:
        name, *args = json.loads(line)
        args = [decode(arg) for arg in args]
        try:
            result = extra[name](handle, *args) if name in extra else getattr(handle, name)(*args)
            answer = {"return": encode(result)}
        except nbd.Error as error:
            answer = {"error": error.string, "errno": error.errno}
        print(json.dumps(answer), flush=True)


main()
