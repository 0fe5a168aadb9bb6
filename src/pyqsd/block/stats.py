"""What ``query-blockstats`` shows.

QSD's exports are not accounted and have no name, so that of its statistics only the highest offset written and what a
driver counts for itself are ever filled in; so it is here.
"""

from __future__ import annotations

from pyqsd.block.driver import ROLE_DATA, ROLE_FILTERED, ROLE_PRIMARY
from pyqsd.block.info import BlockDeviceStats, BlockStats, BlockStatsSpecific
from pyqsd.block.node import Node


def node_stats(node: Node) -> BlockStats:
    """The statistics of `node` and of the nodes below it that hold its data."""
    specific = node.driver.driver_specific_stats()
    assert specific is None or isinstance(specific, BlockStatsSpecific)
    below = _data_child(node)
    return BlockStats(
        node_name=node.name,
        stats=_counters(node),
        driver_specific=specific,
        parent=None if below is None else node_stats(below),
    )


def _data_child(node: Node) -> Node | None:
    holders = [child for child in node.children if child.role & (ROLE_DATA | ROLE_FILTERED)]
    for child in holders:
        if child.role & ROLE_PRIMARY:
            return child.node
    return holders[0].node if len(holders) == 1 else None


def _counters(node: Node) -> BlockDeviceStats:
    return BlockDeviceStats(
        rd_bytes=0,
        wr_bytes=0,
        zone_append_bytes=0,
        unmap_bytes=0,
        rd_operations=0,
        wr_operations=0,
        zone_append_operations=0,
        flush_operations=0,
        unmap_operations=0,
        rd_total_time_ns=0,
        wr_total_time_ns=0,
        zone_append_total_time_ns=0,
        flush_total_time_ns=0,
        unmap_total_time_ns=0,
        wr_highest_offset=node.wr_highest_offset,
        rd_merged=0,
        wr_merged=0,
        zone_append_merged=0,
        unmap_merged=0,
        failed_rd_operations=0,
        failed_wr_operations=0,
        failed_zone_append_operations=0,
        failed_flush_operations=0,
        failed_unmap_operations=0,
        invalid_rd_operations=0,
        invalid_wr_operations=0,
        invalid_zone_append_operations=0,
        invalid_flush_operations=0,
        invalid_unmap_operations=0,
        account_invalid=False,
        account_failed=False,
        timed_stats=[],
    )
