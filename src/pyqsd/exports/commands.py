"""The QMP commands for exports of any type."""

from __future__ import annotations

from pyqsd.exports.export import BlockExportInfo, BlockExportOptions, BlockExportRemoveMode, Exports
from pyqsd.qapi.command import command


@command("block-export-add", boxed=True)
async def block_export_add(exports: Exports, /, *, options: BlockExportOptions) -> None:
    """Export a node."""
    await exports.add(options, from_monitor=True)


@command("block-export-del")
async def block_export_del(
    exports: Exports, /, *, id: str, mode: BlockExportRemoveMode = BlockExportRemoveMode.SAFE
) -> None:
    """Remove an export; the event BLOCK_EXPORT_DELETED says when it is gone."""
    await exports.remove(id, mode)


@command("query-block-exports")
async def query_block_exports(exports: Exports, /) -> list[BlockExportInfo]:
    """All exports, the newest first."""
    return exports.query()
