"""The QMP commands of the NBD server."""

from __future__ import annotations

from pyqsd.chardev import addresses
from pyqsd.exports.export import BlockExportRemoveMode, BlockExportType, Exports
from pyqsd.exports.nbd.server import NbdServer
from pyqsd.qapi.command import command
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Struct, Uint32


class NbdServerAddOptions(Struct, kw_only=True):
    """`device`: a node's name. `bitmap`: one dirty bitmap that clients may query."""

    name: str | None = None
    description: str | None = None
    device: str
    writable: bool | None = None
    bitmap: str | None = None


@command("nbd-server-start")
async def nbd_server_start(
    exports: Exports,
    /,
    *,
    handshake_max_seconds: Uint32 | None = None,
    tls_creds: str | None = None,
    tls_authz: str | None = None,
    max_connections: Uint32 | None = None,
    addr: addresses.SocketAddressLegacy,
) -> None:
    """Start the NBD server; its exports are added afterwards."""
    server = exports.shared(NbdServer)
    if not server.running:
        addresses.check_not_passed(addresses.plain(addr))
    await server.start(
        addr,
        handshake_max_seconds=handshake_max_seconds,
        tls_creds=tls_creds,
        max_connections=max_connections,
    )


@command("nbd-server-stop")
async def nbd_server_stop(exports: Exports, /) -> None:
    """Remove all NBD exports, disconnect their clients and stop the server."""
    await exports.shared(NbdServer).stop()


@command("nbd-server-add", boxed=True, features=("deprecated",))
async def nbd_server_add(exports: Exports, /, *, options: NbdServerAddOptions) -> None:
    """Export a node over NBD; read-only nodes are exported read-only whatever `writable` says."""
    from pyqsd.exports.nbd.export import NbdOptions

    node = exports.graph.get(options.device)
    if node is None:
        raise Error(f"Cannot find device='{options.device}' nor node-name='{options.device}'")
    await exports.add(
        NbdOptions(
            id=options.device if options.name is None else options.name,
            node_name=node.name,
            writable=bool(options.writable) and not node.read_only,
            name=options.device if options.name is None else options.name,
            description=options.description,
            bitmaps=None if options.bitmap is None else [options.bitmap],
        )
    )


@command("nbd-server-remove", features=("deprecated",))
async def nbd_server_remove(
    exports: Exports, /, *, name: str, mode: BlockExportRemoveMode = BlockExportRemoveMode.SAFE
) -> None:
    """Remove the NBD export with the id `name`."""
    export = exports.find(name)
    if export is not None and export.export_type is not BlockExportType.NBD:
        raise Error(f"Block export '{name}' is not an NBD export")
    await exports.remove(name, mode)
