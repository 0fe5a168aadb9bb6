"""Images that a command makes, or finds, at a filename, and opens like a node that there is: the overlay of
``blockdev-snapshot-sync``, the target of ``drive-mirror``
and ``drive-backup``."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from msgspec import structs

from pyqsd.block import filenames, open_image
from pyqsd.block.create import create_image
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevCacheOptions, BlockdevDiscardOptions, BlockdevOptions
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import NULL


class NewImageMode(StrEnum):
    """Whether the image is there already, or is to be made with the full name of its backing file."""

    EXISTING = "existing"
    ABSOLUTE_PATHS = "absolute-paths"


def check_not_own(node: Node, filename: str) -> None:
    """The new image `filename` is not one that `node` itself is made of, which would be lost. Raises Error."""
    rest = [node]
    for below in rest:
        rest += [child.node for child in below.children if child.node not in rest]
        own = getattr(below.options, "filename", None)
        if own is not None and _is_same_file(own, filename):
            raise Error(f"'{filename}' is in use as node '{below.name}', below node '{node.name}'", errno.EBUSY)


def _is_same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def options_like(node: Node, filename: str, fmt: str | None, name: str | None) -> BlockdevOptions:
    """The options of a node `name` of the image `filename` that is opened as `node` is, but without a backing file.
    Without `fmt` it is `raw`. Raises Error."""
    options = open_image.to_options(open_image.resolve(filename, fmt))
    cache = BlockdevCacheOptions(direct=node.cache_direct, no_flush=node.no_flush)
    like: dict[str, Any] = {
        "read_only": node.read_only,
        "auto_read_only": node.auto_read_only,
        "discard": BlockdevDiscardOptions.UNMAP if node.discard_unmap else BlockdevDiscardOptions.IGNORE,
        "cache": cache,
    }
    if not node.active:
        like["active"] = False
        file = getattr(options, "file", None)
        if isinstance(file, BlockdevOptions):
            like["file"] = structs.replace(file, active=False)
    if hasattr(options, "backing"):
        like["backing"] = NULL
    return structs.replace(options, node_name=name or None, **like)


async def open_target(
    source: Node,
    filename: str,
    fmt: str | None,
    mode: NewImageMode,
    backing: Node | None,
    name: str | None,
    more: Mapping[str, Any] | None = None,
) -> Node:
    """A node of the image `filename` for a job to write to, opened like `source`; it lives as long as somebody uses it,
    or until `Graph.unref`.

    Arguments:
        fmt: its format; None: that of `source`, or of an image that is there already what it looks like.
        backing: what a new image names as its backing file.
        name: of the node; None: one is made up.
        more: options (attribute names) that are not like those of `source`, if its driver has them.

    Raises Error.
    """
    graph = source.graph
    try:
        if mode is NewImageMode.ABSOLUTE_PATHS:
            fmt = fmt or source.driver.name
            check_not_own(source, filename)
            named = (filenames.filename(backing.explicit()), backing.explicit().driver.name) if backing else ()
            await create_image(graph, fmt, filename, source.length, *named)
        elif fmt is None:
            fmt = await open_image.probe(source, filename)
        options = options_like(source, filename, fmt, name)
        changes = {option: value for option, value in (more or {}).items() if hasattr(options, option)}
        return await graph.open_unattached(structs.replace(options, read_only=False, **changes))
    except OSError as exc:
        number = exc.errno or errno.EIO
        raise Error(f"Could not open '{filename}': {os.strerror(number)}", number) from exc
