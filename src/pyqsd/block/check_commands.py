"""The QMP command that checks an image. QSD has none; the answer is that of ``qemu-img check --output=json``."""

from __future__ import annotations

import errno
import logging
import os

from pyqsd.block import filenames
from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.graph import Graph
from pyqsd.block.image_check import BlockdevCheckRepair, CheckResult, ImageCheck
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevOptions
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import Error

log = logging.getLogger(__name__)


@command("x-blockdev-check", features=("unstable",))
async def x_blockdev_check(
    graph: Graph,
    /,
    *,
    node_name: str | None = None,
    image: BlockdevOptions | None = None,
    repair: BlockdevCheckRepair | None = None,
) -> ImageCheck:
    """Look for errors in the metadata of an image, and repair them (not by default): that of the node `node_name`,
    requests to which wait meanwhile, or `image`, which is opened for this only, also if it is so broken that it does
    not open otherwise. Nothing is repaired while somebody may write to it."""
    what = repair or BlockdevCheckRepair.NONE
    if (node_name is None) == (image is None):
        raise Error("Exactly one of 'node-name' and 'image' must be specified")
    if node_name is not None:
        return await _check(graph, graph.find(node_name), what, f"node '{node_name}'")
    assert image is not None
    async with graph.opened_for_check(image, what != BlockdevCheckRepair.NONE) as node:
        return await _check(graph, node, what, f"image '{filenames.filename(node)}'")


async def _check(graph: Graph, node: Node, what: BlockdevCheckRepair, name: str) -> ImageCheck:
    """`name`: how log messages call it."""
    shared = perms.ALL if what == BlockdevCheckRepair.NONE else perms.CONSISTENT_READ
    backend = BlockBackend(graph, "a check", perms.CONSISTENT_READ, shared)
    backend.insert(node)
    try:
        async with graph.drained(node):
            try:
                result = await node.driver.check(what.value)
            except OSError as exc:
                number = exc.errno or errno.EIO
                raise Error(f"Check failed: {os.strerror(number)}", number) from exc
    finally:
        backend.remove()
    for finding, times in result.findings.items():
        log.warning("%s: %d %s", name, times, finding)
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
