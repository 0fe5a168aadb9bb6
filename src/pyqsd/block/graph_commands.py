"""QMP commands that change edges of the graph, or what images say about them."""

from __future__ import annotations

import errno
import os

from pyqsd.block import activation
from pyqsd.block.commands import find_root, lookup
from pyqsd.block.graph import Graph
from pyqsd.block.node import Node
from pyqsd.block.reopen import set_read_only
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import Error


@command("blockdev-set-active")
async def blockdev_set_active(graph: Graph, /, *, node_name: str | None = None, active: bool) -> None:
    """Make a node, or all of them, active or inactive: an inactive node is left to other programs."""
    if node_name is None:
        if active:
            await activation.activate(graph, *graph.nodes.values())
        else:
            await activation.inactivate_all(graph)
        return
    node = graph.get(node_name)
    if node is None:
        raise Error(f"Failed to find node with node-name='{node_name}'")
    if active:
        await activation.activate(graph, node)
    else:
        await activation.inactivate(graph, node)


@command("x-blockdev-change", features=("unstable",))
async def x_blockdev_change(graph: Graph, /, *, parent: str, child: str | None = None, node: str | None = None) -> None:
    """Add the node `node` to the children of `parent`, or remove its child `child`, where the driver lets one."""
    above = graph.find(parent)
    if child is None and node is None:
        raise Error("Either child or node must be specified")
    if child is not None:
        if node is not None:
            raise Error("The parameters child and node are in conflict")
        edge = next((one for one in above.children if one.name == child), None)
        if edge is None:
            raise Error(f"Node '{parent}' does not have child '{child}'")
        async with graph.drained(above):
            await above.driver.del_child(edge)
        return
    new = graph.get(node or "")
    if new is None:
        raise Error(f"Node '{node}' not found")
    async with graph.drained(above, new):
        await above.driver.add_child(new)


@command("change-backing-file")
async def change_backing_file(graph: Graph, /, *, device: str, image_node_name: str, backing_file: str) -> None:
    """Write the name `backing_file` into the image of `image_node_name`, which is in the backing chain of `device`. The
    graph does not change."""
    top = find_root(graph, device)
    image = lookup(graph, None, image_node_name)
    if image.below() is None:
        raise Error("not allowing backing file change on an image without a backing file")
    layer: Node | None = top
    while layer is not image:
        layer = layer.below() if layer is not None else None
        if layer is None:
            raise Error(f"'{device}' and image file are not in the same chain")
    read_only = image.read_only
    if read_only:
        await set_read_only(graph, image, False)
    try:
        async with graph.drained(image):
            await image.driver.change_backing_file(backing_file, image.driver.name)
    except (OSError, Error) as exc:
        number = exc.errno or errno.EIO
        raise Error(f"Could not change backing file to '{backing_file}': {os.strerror(number)}", number) from exc
    finally:
        if read_only:
            await set_read_only(graph, image, True)
