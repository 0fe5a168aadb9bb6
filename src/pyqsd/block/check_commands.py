"""The QMP command that checks an image. QSD has none; the answer is that of ``qemu-img check --output=json``."""

from __future__ import annotations

import errno
import os

from pyqsd.block import filenames
from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.graph import Graph
from pyqsd.block.image_check import CheckResult, ImageCheck
from pyqsd.block.node import Node
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import Error


@command("x-blockdev-check", features=("unstable",))
async def x_blockdev_check(graph: Graph, /, *, node_name: str) -> ImageCheck:
    """Look for errors in the metadata of an image. Requests to the node wait meanwhile."""
    node = graph.find(node_name)
    backend = BlockBackend(graph, "a check", perms.CONSISTENT_READ, perms.ALL)
    backend.insert(node)
    try:
        async with graph.drained(node):
            try:
                result = await node.driver.check()
            except OSError as exc:
                number = exc.errno or errno.EIO
                raise Error(f"Check failed: {os.strerror(number)}", number) from exc
    finally:
        backend.remove()
    return image_check(node, result)


def image_check(node: Node, result: CheckResult) -> ImageCheck:
    """What was found at `node`, for the wire."""
    return ImageCheck(
        filename=filenames.filename(node),
        format=node.driver.name,
        check_errors=result.check_errors,
        image_end_offset=result.image_end_offset or None,
        corruptions=result.corruptions or None,
        leaks=result.leaks or None,
        corruptions_fixed=result.corruptions_fixed or None,
        leaks_fixed=result.leaks_fixed or None,
        total_clusters=result.total_clusters or None,
        allocated_clusters=result.allocated_clusters or None,
        fragmented_clusters=result.fragmented_clusters or None,
        compressed_clusters=result.compressed_clusters or None,
    )
