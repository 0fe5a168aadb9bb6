"""QMP commands that tell about the graph and its nodes."""

from __future__ import annotations

from typing import Any

from pyqsd.block import filenames, internal_snapshots, stats
from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend
from pyqsd.block.child import Child
from pyqsd.block.dirty_bitmap import DirtyBitmap
from pyqsd.block.graph import Graph
from pyqsd.block.info import (
    BlockdevCacheInfo,
    BlockDeviceInfo,
    BlockDirtyInfo,
    BlockInfo,
    BlockPermission,
    BlockStats,
    ImageInfo,
    ImageInfoSpecific,
    XDbgBlockGraph,
    XDbgBlockGraphEdge,
    XDbgBlockGraphNode,
    XDbgBlockGraphNodeType,
)
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevDetectZeroesOptions
from pyqsd.qapi.command import command


@command("query-named-block-nodes")
async def query_named_block_nodes(graph: Graph, /, *, flat: bool | None = None) -> list[BlockDeviceInfo]:
    """All nodes, the newest first; with `flat` without the images below each."""
    seen: dict[Node, ImageInfo] = {}
    return [device_info(node, bool(flat), seen) for node in reversed(nodes_in_order(graph))]


@command("query-block")
async def query_block(graph: Graph, /) -> list[BlockInfo]:
    """The block devices: guest devices and backends with a name, of which a storage daemon has none."""
    return []


@command("query-blockstats")
async def query_blockstats(graph: Graph, /, *, query_nodes: bool | None = None) -> list[BlockStats]:
    """The statistics of all nodes with `query_nodes`; without, those of the block devices, of which there are none."""
    return [stats.node_stats(node) for node in nodes_in_order(graph)] if query_nodes else []


@command("x-debug-query-block-graph", features=("unstable",))
async def x_debug_query_block_graph(graph: Graph, /) -> XDbgBlockGraph:
    """Every user, node and edge of the graph, numbered in the order in which they come up."""
    numbers: dict[Any, int] = {}
    nodes: list[XDbgBlockGraphNode] = []
    edges: list[XDbgBlockGraphEdge] = []

    def number(vertex: Any) -> int:
        return numbers.setdefault(vertex, len(numbers) + 1)

    def add_edge(child: Child) -> None:
        edges.append(
            XDbgBlockGraphEdge(
                parent=number_of(child.parent),
                child=number(child.node),
                name=child.name,
                perm=_permissions(child.perm),
                shared_perm=_permissions(child.shared),
            )
        )

    def number_of(parent: Any) -> int:
        # The edges of a job are one vertex together.
        return number(parent.owner if isinstance(parent, BlockBackend) and parent.owner is not None else parent)

    users = [backend for backend in graph.backends if backend.owner is None]
    for backend in users:
        nodes.append(XDbgBlockGraphNode(id=number(backend), type=XDbgBlockGraphNodeType.BLOCK_BACKEND, name=""))
        if backend.edge is not None:
            add_edge(backend.edge)
    for job in reversed(graph.block_jobs):
        nodes.append(XDbgBlockGraphNode(id=number(job), type=XDbgBlockGraphNodeType.BLOCK_JOB, name=job.id or ""))
        for backend in reversed(graph.backends):
            if backend.owner is job:
                assert backend.edge is not None
                add_edge(backend.edge)
    for node in nodes_in_order(graph):
        nodes.append(XDbgBlockGraphNode(id=number(node), type=XDbgBlockGraphNodeType.BLOCK_DRIVER, name=node.name))
        for child in reversed(node.children):
            add_edge(child)
    return XDbgBlockGraph(nodes=nodes[::-1], edges=edges[::-1])


def _permissions(bits: int) -> list[BlockPermission]:
    return [BlockPermission(name) for name in reversed(perms.qapi_names(bits))]


def nodes_in_order(graph: Graph) -> list[Node]:
    """All nodes in the order in which QSD opens them: the child that a node was given in line as ``file`` before it,
    all other children after it."""
    found: dict[str, Node] = {}

    def visit(node: Node) -> None:
        if node.name in found:
            return
        file = node.driver.file
        if file is not None and file.name == "file" and not file.node.monitor_owned and not file.node.job_owned:
            visit(file.node)
        found[node.name] = node
        for child in node.children:
            if not child.node.monitor_owned and not child.node.job_owned:
                visit(child.node)

    for node in graph.nodes.values():
        # Not those that a job is only just opening.
        if node.opened:
            visit(node)
    return list(found.values())


def device_info(node: Node, flat: bool, seen: dict[Node, ImageInfo]) -> BlockDeviceInfo:
    """What ``query-named-block-nodes`` tells about `node`; `seen` remembers images for further calls."""
    backing = node.driver.backing
    threshold = node.write_threshold
    shown = (bitmap for bitmap in reversed(list(node.dirty_bitmaps.values())) if not bitmap.hidden)
    bitmaps = [bitmap_info(bitmap) for bitmap in shown]
    image = image_info(node, flat, seen)
    return BlockDeviceInfo(
        file=image.filename,
        node_name=node.name,
        ro=node.read_only,
        drv=node.driver.name,
        backing_file=None if backing is None else filenames.filename(backing.node),
        backing_file_depth=0 if flat else _depth(node),
        active=node.active,
        encrypted=bool(image.encrypted),
        detect_zeroes=BlockdevDetectZeroesOptions(node.detect_zeroes),
        bps=0,
        bps_rd=0,
        bps_wr=0,
        iops=0,
        iops_rd=0,
        iops_wr=0,
        image=image,
        cache=BlockdevCacheInfo(writeback=True, direct=node.cache_direct, no_flush=node.no_flush),
        # The wire type is signed here and unsigned where it is set.
        write_threshold=threshold - (1 << 64) if threshold >> 63 else threshold,
        dirty_bitmaps=bitmaps or None,
    )


def image_info(node: Node, flat: bool, seen: dict[Node, ImageInfo]) -> ImageInfo:
    """What is told about the image of `node` and, unless `flat`, about those below it.

    `seen` remembers the answers (for one value of `flat`), so that a chain is walked once and not once a node.
    """
    if node in seen:
        return seen[node]
    driver = node.driver
    known = driver.image_info()
    backing_filename = known.get("backing_filename") or None
    full: str | None = None
    if backing_filename is not None:
        try:
            full = filenames.full_backing_filename(node, backing_filename)
        except ValueError:
            pass
    below = None if flat else _filtered_or_backing(node)
    specific = driver.format_specific()
    assert specific is None or isinstance(specific, ImageInfoSpecific)
    info = seen[node] = ImageInfo(
        filename=filenames.filename(node),
        format=driver.name,
        dirty_flag=known.get("dirty_flag"),
        actual_size=driver.allocated_size(),
        virtual_size=node.length,
        cluster_size=known.get("cluster_size") or None,
        encrypted=known.get("encrypted") or None,
        compressed=known.get("compressed") or None,
        backing_filename=backing_filename,
        full_backing_filename=full,
        backing_filename_format=None if backing_filename is None else known.get("backing_filename_format") or None,
        snapshots=internal_snapshots.listed(node) or None,
        format_specific=specific,
        backing_image=None if below is None else image_info(below, False, seen),
    )
    return info


def bitmap_info(bitmap: DirtyBitmap) -> BlockDirtyInfo:
    """What is told about a bitmap."""
    return BlockDirtyInfo(
        name=bitmap.name or None,
        count=bitmap.count,
        granularity=bitmap.granularity,
        recording=bitmap.recording,
        busy=bitmap.busy,
        persistent=bitmap.persistent,
        inconsistent=bitmap.inconsistent or None,
    )


def _filtered_or_backing(node: Node) -> Node | None:
    child = node.driver.file if node.driver.is_filter else node.driver.backing
    return None if child is None else child.node


def _depth(node: Node) -> int:
    depth = 0
    below = _filtered_or_backing(node)
    while below is not None:
        depth += 1
        below = _filtered_or_backing(below)
    return depth
