"""The image file as a crash may leave it, from the log of its writes (`support.LogFile`)."""

from __future__ import annotations

import random
from typing import Any


def _apply(image: bytearray, entry: tuple[Any, ...]) -> None:
    kind = entry[0]
    if kind == "write":
        _, offset, data = entry
        if offset + len(data) > len(image):
            image.extend(bytes(offset + len(data) - len(image)))
        image[offset : offset + len(data)] = data
    elif kind == "zero":
        _, offset, length = entry
        if offset + length > len(image):
            image.extend(bytes(offset + length - len(image)))
        image[offset : offset + length] = bytes(length)
    elif kind == "resize":
        image.extend(bytes(max(0, entry[1] - len(image))))
        del image[entry[1] :]


def _pieces(entry: tuple[Any, ...], rnd: random.Random) -> list[tuple[Any, ...]]:
    """Pages of a write reach the disk one by one."""
    if entry[0] != "write":
        return [entry]
    _, offset, data = entry
    found: list[tuple[Any, ...]] = []
    at = 0
    while at < len(data):
        n = 4096 - (offset + at) % 4096
        found.append(("write", offset + at, data[at : at + n]))
        at += n
    return found


def after_kill(image: bytes, log: list[tuple[Any, ...]], cut: int) -> bytes:
    """What is there when the process died after the first `cut` entries of the log."""
    result = bytearray(image)
    for entry in log[:cut]:
        _apply(result, entry)
    return bytes(result)


def after_power_cut(image: bytes, log: list[tuple[Any, ...]], cut: int, rnd: random.Random) -> bytes:
    """What may be there when the power failed then."""
    result = bytearray(image)
    durable = max((entry[1] for entry in log[:cut] if entry[0] == "flush"), default=0)
    for entry in log[:durable]:
        _apply(result, entry)
    pending = [piece for entry in log[durable:cut] for piece in _pieces(entry, rnd)]
    chance = rnd.choice((0.1, 0.5, 0.9))
    chosen = [piece for piece in pending if rnd.random() < chance]
    if rnd.random() < 0.5:
        # Pages of different places go in any order.
        rnd.shuffle(chosen)
        last: dict[int, tuple[Any, ...]] = {}
        for piece in pending:
            if piece in chosen and piece[0] == "write":
                last[piece[1]] = piece
        chosen = [p for p in chosen if p[0] != "write"] + list(last.values())
    for piece in chosen:
        _apply(result, piece)
    return bytes(result)
