"""qcow2 images of all kinds, and random damage to their metadata.

Offsets come from the qcow2 specification (docs/interop/qcow2 in QEMU's documentation).
"""

from __future__ import annotations

import random
import struct
import sys
from array import array
from collections.abc import Callable
from pathlib import Path

from tests.support import images, peers

OFFSET = 0x00FFFFFFFFFFFE00

#: name: (size, options of qemu-img create, commands of qemu-io, snapshots between them, bitmaps)
KINDS: dict[str, tuple[str, str, tuple[str, ...], int, int]] = {
    "plain": ("4M", "", ("write 0 128k", "write 192k 64k", "write 1M 300k", "write -z 2M 64k"), 0, 0),
    "v2": ("4M", "compat=0.10", ("write 0 128k", "write 1M 300k"), 1, 0),
    "snapshots": ("4M", "", ("write 0 256k", "write 64k 128k", "write 2M 64k", "write -z 0 64k"), 3, 0),
    "compressed": ("4M", "", ("write -c -P 5 0 64k", "write -c -P 6 64k 64k", "write 128k 64k"), 1, 0),
    "bitmaps": ("8M", "", ("write 0 128k", "write 3M 200k"), 0, 2),
    "small": ("2M", "cluster_size=512", ("write 0 100k", "write 300k 50k", "write -z 1M 64k"), 1, 1),
    "small-packed": ("1M", "cluster_size=512,refcount_bits=2", ("write 0 60k", "write 300k 50k"), 1, 0),
    "large": ("16M", "cluster_size=2M", ("write 0 4k", "write 5M 3M"), 1, 0),
    "one-bit": ("4M", "refcount_bits=1,cluster_size=4k", ("write 0 100k", "write 1M 64k"), 0, 0),
    "four-bits": ("4M", "refcount_bits=4", ("write 0 128k", "write 1M 64k"), 2, 0),
    "eight-bits": ("4M", "refcount_bits=8", ("write 0 128k", "write 1M 64k"), 1, 0),
    "wide": ("4M", "refcount_bits=32", ("write 0 128k", "write 1M 64k"), 1, 0),
    "widest": ("4M", "refcount_bits=64,cluster_size=16k", ("write 0 128k", "write 1M 64k"), 1, 1),
    "subclusters": ("4M", "extended_l2=on", ("write 0 10k", "write 64k 64k", "write -z 128k 8k", "write 1M 2k"), 1, 0),
    "subclusters-packed": ("4M", "extended_l2=on,cluster_size=16k", ("write -c 0 16k", "write 64k 64k"), 0, 0),
    "data-file": ("4M", "data_file={raw},cluster_size=4k", ("write 0 100k", "write 1M 20k", "write -z 200k 64k"), 0, 0),
    "preallocated": ("4M", "preallocation=metadata,cluster_size=4k", ("write 0 10k",), 0, 0),
}


def make(path: Path, kind: str) -> None:
    """An image of one of `KINDS`."""
    size, options, commands, snapshots, bitmaps = KINDS[kind]
    images.create(path, size, "qcow2", options.format(raw=path.with_suffix(".raw")))
    for index in range(bitmaps):
        peers.run("qemu-img", "bitmap", "--add", "-g", "64k", "-f", "qcow2", path, f"b{index}")
    for index, command in enumerate(commands):
        images.io(path, command)
        if index < snapshots:
            peers.run("qemu-img", "snapshot", "-c", f"s{index}", path)


class Layout:
    """Where the metadata of a sound image is: offsets of 64-bit entries, by kind."""

    def __init__(self, data: bytes) -> None:
        def u64s(offset: int, count: int) -> array[int]:
            """Entries; 0 where the file ends before them."""
            found = array("Q", data[offset : offset + 8 * count].ljust(8 * count, b"\0"))
            if sys.byteorder == "little":
                found.byteswap()
            return found

        def u64(offset: int) -> int:
            return u64s(offset, 1)[0]

        def u32(offset: int) -> int:
            return int(struct.unpack_from(">I", data, offset)[0])

        self.size = 1 << u32(20)
        version = u32(4)
        extended = version >= 3 and bool(u64(72) & 16)
        self.l1: list[int] = []
        self.l2: list[int] = []
        self.bitmaps: list[int] = []
        reftable = u64s(u64(48), u32(56) * self.size // 8)
        self.reftable = [u64(48) + 8 * index for index, entry in enumerate(reftable) if entry]
        self.blocks = [entry for entry in reftable if entry]
        self._tables(u64s, u64(40), u32(36), extended)
        at = u64(64)
        for _ in range(u32(60)):
            self._tables(u64s, u64(at), u32(at + 8), extended)
            id_size, name_size = struct.unpack_from(">HH", data, at + 12)
            at += -(-(40 + u32(at + 36) + id_size + name_size) // 8) * 8
        if version >= 3 and u64(88) & 1:
            at = u32(100)
            while u32(at):
                if u32(at) == 0x23852875:
                    table = u64(u64(at + 8 + 16))
                    self.bitmaps = [table]
                at += 8 + -(-u32(at + 4) // 8) * 8

    def _tables(self, u64s: Callable[[int, int], array[int]], offset: int, size: int, extended: bool) -> None:
        for index, entry in enumerate(u64s(offset, size)):
            if entry:
                self.l1.append(offset + 8 * index)
                step = 16 if extended else 8
                table = entry & OFFSET
                entries = u64s(table, self.size // 8)
                both = zip(entries[::2], entries[1::2], strict=True) if extended else entries
                used = [table + step * number for number, value in enumerate(both) if value and value != (0, 0)]
                self.l2 += [*used, table + self.size - step]
                if extended:
                    self.l2 += [at + 8 for at in used]


def damage(data: bytearray, seed: int) -> str:
    """Change one to three things of a sound image; says what."""
    rng = random.Random(seed)
    layout = Layout(bytes(data))
    places = {
        "l1": layout.l1,
        "l2": layout.l2,
        "reftable": layout.reftable,
        "bitmap": layout.bitmaps,
        "refcounts": [at + 8 * rng.randrange(min(64, layout.size // 8)) for at in layout.blocks],
    }
    everything = [at & ~(layout.size - 1) for many in places.values() for at in many]
    done = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice([name for name, many in places.items() if many])
        at = rng.choice(places[kind])
        old = int.from_bytes(data[at : at + 8], "big")
        new = rng.choice(
            (
                0,
                old ^ 1 << rng.randrange(64),
                old ^ 1 << 63,
                old ^ 1,
                old + layout.size,
                old + 512,
                1 << 63 | rng.choice(everything),
                (old & ~OFFSET) | rng.choice(everything),
                1 << 63 | len(data) & ~(layout.size - 1),
                1 << 63 | (len(data) & ~(layout.size - 1)) + layout.size,
                1 << 62 | rng.choice(everything) + 512 * rng.randrange(4) | rng.randrange(4) << 54,
                rng.getrandbits(64),
                int.from_bytes(data[(other := rng.choice(places[kind])) : other + 8], "big"),
            )
        ) & ((1 << 64) - 1)
        data[at : at + 8] = new.to_bytes(8, "big")
        done.append(f"{kind} at {at:#x}: {old:#x} -> {new:#x}")
    if rng.random() < 0.1:
        keep = rng.randrange(len(data) // 2, len(data))
        del data[keep:]
        done.append(f"cut at {keep}")
    return "; ".join(done)
