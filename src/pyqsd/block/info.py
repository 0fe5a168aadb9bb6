"""What is told about nodes, images and bitmaps (QAPI ``BlockDeviceInfo``, ``ImageInfo``, ``BlockInfo`` …).

The members, their order and their types are QAPI's. `ImageInfoSpecific` and `BlockStatsSpecific` are unions whose
branches live beside their drivers::

    class ImageInfoSpecificQCow2Wrapper(ImageInfoSpecific, tag="qcow2"):
        data: ImageInfoSpecificQCow2
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

from pyqsd.block import registry
from pyqsd.block.options import BlockdevDetectZeroesOptions
from pyqsd.qapi.types import Struct, Uint32, Uint64, field


class ImageInfoSpecific(Struct, tag_field="type", tag="pyqsd-base"):
    """What only images of one format have (``ImageInfo.format-specific``)."""

    @classmethod
    def branches(cls) -> Mapping[str, type[Struct]]:
        _load_drivers()
        return super().branches()

    @classmethod
    def branch(cls, tag: str) -> type[Struct] | None:
        return cls.branches().get(tag)


class BlockStatsSpecific(Struct, tag_field="driver", tag="pyqsd-base"):
    """Statistics that only nodes of one driver have (``BlockStats.driver-specific``); tagged with the driver's name."""

    @classmethod
    def tags(cls) -> Iterable[str]:
        return registry.driver_names()

    @classmethod
    def branches(cls) -> Mapping[str, type[Struct]]:
        _load_drivers()
        return super().branches()

    @classmethod
    def branch(cls, tag: str) -> type[Struct] | None:
        return cls.branches().get(tag)


def _load_drivers() -> None:
    for name in registry.driver_names():
        registry.driver_class(name)


class SnapshotInfo(Struct, kw_only=True):
    """An internal snapshot. Sizes in bytes, times in seconds and nanoseconds."""

    id: str
    name: str
    vm_state_size: int
    date_sec: int
    date_nsec: int
    vm_clock_sec: int
    vm_clock_nsec: int
    icount: int | None = None


class BlockNodeInfo(Struct, kw_only=True):
    """One image, without its backing chain. Sizes in bytes."""

    filename: str
    format: str
    dirty_flag: bool | None = None
    actual_size: int | None = None
    virtual_size: int
    cluster_size: int | None = None
    encrypted: bool | None = None
    compressed: bool | None = None
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    backing_filename_format: str | None = None
    snapshots: list[SnapshotInfo] | None = None
    format_specific: ImageInfoSpecific | None = None


class ImageInfo(BlockNodeInfo, kw_only=True):
    """An image and, through `backing_image`, the images below it."""

    backing_image: ImageInfo | None = None


class BlockdevCacheInfo(Struct, kw_only=True):
    """The effective cache mode."""

    writeback: bool
    direct: bool
    no_flush: bool


class BlockDirtyInfo(Struct, kw_only=True):
    """A dirty bitmap; `count` and `granularity` in bytes."""

    name: str | None = None
    count: int
    granularity: Uint32
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool | None = None


class BlockDeviceInfo(Struct, kw_only=True):
    """A node as ``query-named-block-nodes`` and ``query-block`` show it."""

    file: str
    node_name: str | None = None
    ro: bool
    drv: str
    backing_file: str | None = field(default=None, name="backing_file")
    backing_file_depth: int = field(name="backing_file_depth")
    active: bool
    encrypted: bool
    detect_zeroes: BlockdevDetectZeroesOptions = field(name="detect_zeroes")
    bps: int
    bps_rd: int = field(name="bps_rd")
    bps_wr: int = field(name="bps_wr")
    iops: int
    iops_rd: int = field(name="iops_rd")
    iops_wr: int = field(name="iops_wr")
    image: ImageInfo
    bps_max: int | None = field(default=None, name="bps_max")
    bps_rd_max: int | None = field(default=None, name="bps_rd_max")
    bps_wr_max: int | None = field(default=None, name="bps_wr_max")
    iops_max: int | None = field(default=None, name="iops_max")
    iops_rd_max: int | None = field(default=None, name="iops_rd_max")
    iops_wr_max: int | None = field(default=None, name="iops_wr_max")
    bps_max_length: int | None = field(default=None, name="bps_max_length")
    bps_rd_max_length: int | None = field(default=None, name="bps_rd_max_length")
    bps_wr_max_length: int | None = field(default=None, name="bps_wr_max_length")
    iops_max_length: int | None = field(default=None, name="iops_max_length")
    iops_rd_max_length: int | None = field(default=None, name="iops_rd_max_length")
    iops_wr_max_length: int | None = field(default=None, name="iops_wr_max_length")
    iops_size: int | None = field(default=None, name="iops_size")
    group: str | None = None
    cache: BlockdevCacheInfo
    write_threshold: int = field(name="write_threshold")
    dirty_bitmaps: list[BlockDirtyInfo] | None = None


class BlockDeviceIoStatus(StrEnum):
    """What the last failed request left behind."""

    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"


class BlockInfo(Struct, kw_only=True):
    """A block device of ``query-block``: QSD has none that have a name, so its list is that of legacy devices only."""

    device: str
    qdev: str | None = None
    type: str
    removable: bool
    locked: bool
    inserted: BlockDeviceInfo | None = None
    tray_open: bool | None = field(default=None, name="tray_open")
    io_status: BlockDeviceIoStatus | None = None


class BlockLatencyHistogramInfo(Struct, kw_only=True):
    """Latencies in nanoseconds, counted between `boundaries`."""

    boundaries: list[Uint64]
    bins: list[Uint64]


class BlockDeviceTimedStats(Struct, kw_only=True):
    """Statistics over the last `interval_length` seconds; latencies in nanoseconds."""

    interval_length: int = field(name="interval_length")
    min_rd_latency_ns: int = field(name="min_rd_latency_ns")
    max_rd_latency_ns: int = field(name="max_rd_latency_ns")
    avg_rd_latency_ns: int = field(name="avg_rd_latency_ns")
    min_wr_latency_ns: int = field(name="min_wr_latency_ns")
    max_wr_latency_ns: int = field(name="max_wr_latency_ns")
    avg_wr_latency_ns: int = field(name="avg_wr_latency_ns")
    min_zone_append_latency_ns: int = field(name="min_zone_append_latency_ns")
    max_zone_append_latency_ns: int = field(name="max_zone_append_latency_ns")
    avg_zone_append_latency_ns: int = field(name="avg_zone_append_latency_ns")
    min_flush_latency_ns: int = field(name="min_flush_latency_ns")
    max_flush_latency_ns: int = field(name="max_flush_latency_ns")
    avg_flush_latency_ns: int = field(name="avg_flush_latency_ns")
    avg_rd_queue_depth: float = field(name="avg_rd_queue_depth")
    avg_wr_queue_depth: float = field(name="avg_wr_queue_depth")
    avg_zone_append_queue_depth: float = field(name="avg_zone_append_queue_depth")


class BlockDeviceStats(Struct, kw_only=True):
    """Counters of one device or node: bytes, operations, nanoseconds."""

    rd_bytes: int = field(name="rd_bytes")
    wr_bytes: int = field(name="wr_bytes")
    zone_append_bytes: int = field(name="zone_append_bytes")
    unmap_bytes: int = field(name="unmap_bytes")
    rd_operations: int = field(name="rd_operations")
    wr_operations: int = field(name="wr_operations")
    zone_append_operations: int = field(name="zone_append_operations")
    flush_operations: int = field(name="flush_operations")
    unmap_operations: int = field(name="unmap_operations")
    rd_total_time_ns: int = field(name="rd_total_time_ns")
    wr_total_time_ns: int = field(name="wr_total_time_ns")
    zone_append_total_time_ns: int = field(name="zone_append_total_time_ns")
    flush_total_time_ns: int = field(name="flush_total_time_ns")
    unmap_total_time_ns: int = field(name="unmap_total_time_ns")
    wr_highest_offset: int = field(name="wr_highest_offset")
    rd_merged: int = field(name="rd_merged")
    wr_merged: int = field(name="wr_merged")
    zone_append_merged: int = field(name="zone_append_merged")
    unmap_merged: int = field(name="unmap_merged")
    idle_time_ns: int | None = field(default=None, name="idle_time_ns")
    failed_rd_operations: int = field(name="failed_rd_operations")
    failed_wr_operations: int = field(name="failed_wr_operations")
    failed_zone_append_operations: int = field(name="failed_zone_append_operations")
    failed_flush_operations: int = field(name="failed_flush_operations")
    failed_unmap_operations: int = field(name="failed_unmap_operations")
    invalid_rd_operations: int = field(name="invalid_rd_operations")
    invalid_wr_operations: int = field(name="invalid_wr_operations")
    invalid_zone_append_operations: int = field(name="invalid_zone_append_operations")
    invalid_flush_operations: int = field(name="invalid_flush_operations")
    invalid_unmap_operations: int = field(name="invalid_unmap_operations")
    account_invalid: bool = field(name="account_invalid")
    account_failed: bool = field(name="account_failed")
    timed_stats: list[BlockDeviceTimedStats] = field(name="timed_stats")
    rd_latency_histogram: BlockLatencyHistogramInfo | None = field(default=None, name="rd_latency_histogram")
    wr_latency_histogram: BlockLatencyHistogramInfo | None = field(default=None, name="wr_latency_histogram")
    zone_append_latency_histogram: BlockLatencyHistogramInfo | None = field(
        default=None, name="zone_append_latency_histogram"
    )
    flush_latency_histogram: BlockLatencyHistogramInfo | None = field(default=None, name="flush_latency_histogram")


class BlockStats(Struct, kw_only=True):
    """The statistics of a device or node and, through `parent` and `backing`, of what is below it (QAPI calls the
    child that holds the data "parent")."""

    device: str | None = None
    qdev: str | None = None
    node_name: str | None = None
    stats: BlockDeviceStats
    driver_specific: BlockStatsSpecific | None = None
    parent: BlockStats | None = None
    backing: BlockStats | None = None


class XDbgBlockGraphNodeType(StrEnum):
    """What a vertex of the debug graph is."""

    BLOCK_BACKEND = "block-backend"
    BLOCK_JOB = "block-job"
    BLOCK_DRIVER = "block-driver"


class BlockPermission(StrEnum):
    """A permission on a node; see `pyqsd.block.permissions`."""

    CONSISTENT_READ = "consistent-read"
    WRITE = "write"
    WRITE_UNCHANGED = "write-unchanged"
    RESIZE = "resize"


class XDbgBlockGraphNode(Struct, kw_only=True):
    """A vertex of the debug graph."""

    id: Uint64
    type: XDbgBlockGraphNodeType
    name: str


class XDbgBlockGraphEdge(Struct, kw_only=True):
    """An edge of the debug graph: `parent` uses `child` under `name`."""

    parent: Uint64
    child: Uint64
    name: str
    perm: list[BlockPermission]
    shared_perm: list[BlockPermission]


class XDbgBlockGraph(Struct, kw_only=True):
    """The whole graph, for debugging."""

    nodes: list[XDbgBlockGraphNode]
    edges: list[XDbgBlockGraphEdge]


class BlockDirtyBitmapSha256(Struct, kw_only=True):
    """The SHA-256 digest of a bitmap's serialised bits, in hexadecimal."""

    sha256: str
