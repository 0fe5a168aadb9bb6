"""Disk images made, looked at and checked with the peers' own tools."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.support import peers

KiB = 1024
MiB = 1024 * KiB
Pathish = str | os.PathLike[str]


def create(
    path: Pathish,
    size: int | str | None,
    fmt: str = "qcow2",
    options: str = "",
    backing: Pathish | None = None,
    backing_format: str | None = None,
    cwd: Pathish | None = None,
) -> Path:
    """qemu-img create."""
    argv = ["qemu-img", "create", "-q", "-f", fmt]
    if options:
        argv += ["-o", options]
    if backing is not None:
        argv += ["-b", os.fspath(backing), "-F", backing_format or fmt]
    argv.append(os.fspath(path))
    if size is not None:
        argv.append(str(size))
    peers.run(*argv, cwd=cwd)
    return Path(path)


def io(path: Pathish, *commands: str, fmt: str = "qcow2", options: str = "", cwd: Pathish | None = None) -> str:
    """qemu-io with several commands; fails when one of them fails."""
    argv = ["qemu-io", "-f", fmt]
    if options:
        argv = ["qemu-io", "--image-opts"]
    for command in commands:
        argv += ["-c", command]
    out = peers.run(*argv, options or os.fspath(path), cwd=cwd).stdout
    if "Pattern verification failed" in out or "failed:" in out:
        raise AssertionError(out)
    return out


def info(path: Pathish, *args: str) -> Any:
    return json.loads(peers.run("qemu-img", "info", "--output=json", *args, path).stdout)


def check(path: Pathish, fmt: str = "qcow2", *args: str) -> dict[str, Any]:
    """qemu-img check; its JSON (exit status 3 means leaks only, 2 corruption; the caller judges)."""
    done = peers.run("qemu-img", "check", "--output=json", "-f", fmt, *args, path, ok=(0, 2, 3))
    result = json.loads(done.stdout)
    result["exit"] = done.returncode
    assert isinstance(result, dict)
    return result


def assert_clean(path: Pathish, fmt: str = "qcow2", *, leaks: bool = False) -> None:
    """qemu-img check finds nothing (or, with `leaks`, nothing but leaks)."""
    result = check(path, fmt)
    assert not result.get("corruptions"), result
    assert not result.get("check-errors"), result
    if not leaks:
        assert not result.get("leaks"), result


def mapping(path: Pathish, fmt: str = "qcow2") -> Any:
    return json.loads(peers.run("qemu-img", "map", "--output=json", "-f", fmt, path).stdout)


def compare(left: Pathish, left_fmt: str, right: Pathish, right_fmt: str) -> None:
    """qemu-img compare: the same content to the last byte."""
    peers.run("qemu-img", "compare", "-f", left_fmt, "-F", right_fmt, left, right)


def read_all(path: Pathish, fmt: str, scratch: Pathish) -> bytes:
    """The whole guest content, through qemu-img convert."""
    peers.run("qemu-img", "convert", "-f", fmt, "-O", "raw", path, scratch)
    with open(scratch, "rb") as stream:
        data = stream.read()
    os.unlink(scratch)
    return data
