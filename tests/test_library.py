"""pyqsd as a library: a `Daemon` inside somebody's own event loop."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyqsd import Daemon, Error
from tests.support import images, peers

MiB = 1 << 20


async def output_of(*argv: str) -> str:
    """Run a program without holding up the loop that serves it."""
    process = await asyncio.create_subprocess_exec(
        peers.require(argv[0]), *argv[1:], stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, output
    return output.decode("utf-8", "replace")


def test_serve_an_image(tmp_path: Path) -> None:
    images.create(tmp_path / "disk.qcow2", 8 * MiB, "qcow2")
    socket = str(tmp_path / "nbd.sock")
    events: list[dict[str, Any]] = []

    async def main() -> None:
        async with Daemon() as daemon:
            stop = daemon.on_event(events.append)
            deleted = asyncio.Event()
            daemon.on_event(lambda event: deleted.set())
            await daemon.qmp("blockdev-add", driver="file", node_name="file", filename=str(tmp_path / "disk.qcow2"))
            await daemon.qmp("blockdev-add", {"driver": "qcow2", "node-name": "disk", "file": "file"})
            await daemon.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": socket}})
            await daemon.qmp("block-export-add", type="nbd", id="e", node_name="disk", writable=True)
            assert await daemon.qmp("query-block-exports") == [
                {"id": "e", "type": "nbd", "node-name": "disk", "shutting-down": False}
            ]
            uri = f"nbd+unix:///disk?socket={socket}"
            info = json.loads(await output_of("nbdinfo", "--json", uri))
            assert info["exports"][0]["export-size"] == 8 * MiB
            await output_of("qemu-io", "-f", "raw", "-c", "write -P 7 1M 1M", uri)
            await daemon.qmp("block-export-del", id="e")
            await asyncio.wait_for(deleted.wait(), 10)
            assert events == [{"event": "BLOCK_EXPORT_DELETED", "data": {"id": "e"}}]
            stop()
            await daemon.qmp("block-export-add", type="nbd", id="e", node_name="disk")
            await daemon.qmp("block-export-del", id="e")
            assert (
                await daemon.qmp("query-block-jobs") == [] if "query-block-jobs" in daemon.dispatcher.commands else True
            )

    asyncio.run(main())
    assert len(events) == 1
    assert not Path(socket).exists()
    images.check(tmp_path / "disk.qcow2")
    images.io(tmp_path / "disk.qcow2", "read -P 7 1M 1M", "read -P 0 0 1M")


def test_results_are_plain(tmp_path: Path) -> None:
    async def main() -> Any:
        async with Daemon() as daemon:
            assert await daemon.qmp("blockdev-add", driver="null-co", node_name="n", size=MiB) == {}
            version = await daemon.qmp("query-version")
            assert version["qemu"] == {"major": 10, "minor": 0, "micro": 2}
            return await daemon.qmp("query-named-block-nodes", flat=True)

    nodes = asyncio.run(main())
    assert json.loads(json.dumps(nodes)) == nodes
    assert nodes[0]["node-name"] == "n" and nodes[0]["image"]["virtual-size"] == MiB


def test_mistakes_are_errors() -> None:
    async def main() -> None:
        async with Daemon() as daemon:
            for command, members, text in [
                ("nosuch", {}, "The command nosuch has not been found"),
                ("blockdev-add", {"driver": "nosuch", "node_name": "a"}, "does not accept value 'nosuch'"),
                ("blockdev-add", {"driver": "null-co", "node_name": "a", "x": 1}, "Parameter 'x' is unexpected"),
                ("blockdev-del", {"node_name": "a"}, "Failed to find node with node-name='a'"),
                ("blockdev-del", {}, "Parameter 'node-name' is missing"),
                ("block-export-del", {"id": "e"}, "Export 'e' is not found"),
                ("nbd-server-stop", {}, "NBD server not running"),
            ]:
                with pytest.raises(Error) as caught:
                    await daemon.qmp(command, **members)
                assert text in str(caught.value)
            with pytest.raises(Error) as caught:
                await daemon.qmp("nosuch")
            assert caught.value.qmp_class == "CommandNotFound"

    asyncio.run(main())


def test_absent_and_null_members() -> None:
    """None as a keyword is "not given"; a null is given in the dict."""

    async def main() -> None:
        async with Daemon() as daemon:
            await daemon.qmp("blockdev-add", driver="null-co", node_name="n", size=None)
            with pytest.raises(Error, match="Invalid parameter type for 'size'"):
                await daemon.qmp("blockdev-add", {"driver": "null-co", "node-name": "m", "size": None})

    asyncio.run(main())


def test_commands_of_many_callers_take_turns() -> None:
    async def main() -> int:
        async with Daemon() as daemon:
            names = [f"n{i}" for i in range(50)]
            await asyncio.gather(*(daemon.qmp("blockdev-add", driver="null-co", node_name=name) for name in names))
            nodes = await daemon.qmp("query-named-block-nodes")
            await asyncio.gather(*(daemon.qmp("blockdev-del", node_name=name) for name in names))
            assert await daemon.qmp("query-named-block-nodes") == []
            return len(nodes)

    assert asyncio.run(main()) == 50


def test_two_daemons_in_one_loop(tmp_path: Path) -> None:
    """They share nothing: the same names in both, and an image in use by one is locked for the other."""
    images.create(tmp_path / "disk.qcow2", MiB, "qcow2")
    file = {"driver": "file", "filename": str(tmp_path / "disk.qcow2")}

    async def main() -> None:
        async with Daemon() as one, Daemon() as two:
            for daemon in (one, two):
                await daemon.qmp("blockdev-add", driver="null-co", node_name="n")
            await one.qmp("blockdev-add", driver="qcow2", node_name="q", file=file)
            with pytest.raises(Error, match="lock"):
                await two.qmp("blockdev-add", driver="qcow2", node_name="q", file=file)
            await one.shutdown()
            assert len(await two.qmp("query-named-block-nodes")) == 1
            await two.qmp("blockdev-add", driver="qcow2", node_name="q", file=file)

    asyncio.run(main())


def test_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        daemon = Daemon()
        await daemon.qmp("blockdev-add", driver="null-co", node_name="n")
        waiting = asyncio.ensure_future(daemon.wait_shutdown_requested())
        await asyncio.sleep(0)
        assert not waiting.done() and not daemon.shutdown_requested
        await daemon.qmp("quit")
        await asyncio.wait_for(waiting, 5)
        await asyncio.gather(daemon.shutdown(), daemon.shutdown())
        await daemon.shutdown()
        assert not daemon.graph.nodes
        with pytest.raises(Error, match="shutting down"):
            await daemon.qmp("query-version")
        assert len(asyncio.all_tasks()) == 1

    with caplog.at_level(logging.INFO):
        asyncio.run(main(), debug=True)
    assert [record for record in caplog.records if record.name.startswith("pyqsd")] == []


def test_cancelled_caller_does_not_stop_the_end() -> None:
    async def main() -> None:
        daemon = Daemon()
        await daemon.qmp("blockdev-add", driver="null-co", node_name="n")
        ending = asyncio.ensure_future(daemon.shutdown())
        await asyncio.sleep(0)
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        await daemon.shutdown()
        assert not daemon.graph.nodes

    asyncio.run(main())


def test_listener_that_fails_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> list[str]:
        seen: list[str] = []
        async with Daemon() as daemon:
            daemon.on_event(lambda event: seen.append(event["nosuch"]))
            daemon.on_event(lambda event: seen.append(event["event"]))
            from pyqsd.exports.export import BlockExportDeleted

            daemon.events.emit(BlockExportDeleted(id="e"))
        return seen

    assert asyncio.run(main()) == ["BLOCK_EXPORT_DELETED"]
    assert "a listener failed on the event BLOCK_EXPORT_DELETED" in caplog.text


def test_warnings_go_to_logging(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """A library does not write to its user's stderr. (In a process of its own: the command line's tests set it up.)"""
    script = """
import logging
from pyqsd.trace import report
logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
report.warn("something", "a hint")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "WARNING pyqsd something\n"


def test_import_is_lazy() -> None:
    script = "import sys, pyqsd; assert 'asyncio' not in sys.modules; from pyqsd import Daemon; print(Daemon.__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "Daemon\n"
    with pytest.raises(ImportError):
        from pyqsd import nosuch  # type: ignore[attr-defined]  # noqa: F401
