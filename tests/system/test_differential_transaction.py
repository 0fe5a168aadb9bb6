"""Differential: `transaction`, with every type of action, and every mistake in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.daemon import DaemonProcess
from tests.system.differential import Session, add, check_session, cmd, delete
from tests.system.test_differential_bitmaps import sha
from tests.system.test_differential_persistent_bitmaps import SHOWN, make, qcow2, stored, tool


def act(kind: str, /, **data: Any) -> dict[str, Any]:
    return {"type": kind, "data": {key.replace("_", "-"): value for key, value in data.items()}}


def bitmap(action: str, name: str, node: str = "n", /, **more: Any) -> dict[str, Any]:
    return act(f"block-dirty-bitmap-{action}", node=node, name=name, **more)


def merge(target: str, *sources: Any, node: str = "n") -> dict[str, Any]:
    return act("block-dirty-bitmap-merge", node=node, target=target, bitmaps=list(sources))


def transaction(*actions: dict[str, Any], **properties: Any) -> dict[str, Any]:
    more = {key.replace("_", "-"): value for key, value in properties.items()}
    return cmd("transaction", actions=list(actions), **({"properties": more} if more else {}))


ABORT = act("abort")
NULL = add(driver="null-co", node_name="z", size=1 << 20)

SESSIONS = [
    Session(
        "transaction-form",
        [
            NULL,
            transaction(),
            transaction(ABORT),
            transaction(act("nosuch")),
            transaction({"type": "abort"}),
            transaction({"type": "abort", "data": {"x": 1}}),
            transaction({"data": {}}),
            transaction({"type": "abort", "data": {}, "more": 1}),
            cmd("transaction"),
            cmd("transaction", actions=5),
            cmd("transaction", actions=[5]),
            transaction(completion_mode="grouped"),
            transaction(completion_mode="individual"),
            transaction(completion_mode="nosuch"),
            transaction(nosuch=1),
            transaction(ABORT, completion_mode="grouped"),
            *(
                transaction(one, completion_mode="grouped")
                for one in (
                    *(bitmap(action, "b", "z") for action in ("add", "remove", "clear", "enable", "disable")),
                    merge("b", node="z"),
                    act("blockdev-snapshot", node="z", overlay="z"),
                    act("blockdev-snapshot-sync", node_name="z", snapshot_file="x"),
                    act("blockdev-snapshot-internal-sync", device="z", name="x"),
                )
            ),
            # Looked at before anything is done.
            transaction(bitmap("add", "b", "nosuch"), ABORT, completion_mode="grouped"),
            transaction(bitmap("add", "b", "z"), act("nosuch")),
            SHOWN,
            transaction(bitmap("add", "b", "z"), bitmap("add", "c", "z", nosuch=1)),
            transaction({"type": "block-dirty-bitmap-add", "data": {"node": "z"}}),
            transaction({"type": "block-dirty-bitmap-merge", "data": {"node": "z", "target": "x", "bitmaps": [5]}}),
        ],
    ),
    Session(
        "transaction-bitmaps",
        [
            make("a.qcow2", "8M", "x", "-g 512 --disable y"),
            qcow2("n"),
            NULL,
            transaction(bitmap("add", "p"), bitmap("add", "p")),
            SHOWN,
            transaction(
                bitmap("add", "p", persistent=True), bitmap("disable", "p"), bitmap("enable", "y"), merge("p", "x")
            ),
            SHOWN,
            transaction(
                bitmap("disable", "p"), bitmap("disable", "x"), bitmap("clear", "x"), bitmap("remove", "p"), ABORT
            ),
            SHOWN,
            stored("a.qcow2"),
            *(sha(name) for name in ("x", "y", "p")),
            # What is going to be removed is in use until then.
            *(
                transaction(bitmap("add", "t"), bitmap("remove", "t"), second)
                for second in (
                    bitmap("add", "t"),
                    bitmap("clear", "t"),
                    bitmap("disable", "t"),
                    bitmap("remove", "t"),
                    merge("t", "p"),
                    merge("p", "t"),
                )
            ),
            SHOWN,
            transaction(bitmap("add", "q"), bitmap("remove", "q")),
            transaction(bitmap("remove", "p"), bitmap("add", "q", granularity=4096), bitmap("remove", "y")),
            SHOWN,
            stored("a.qcow2"),
            transaction(bitmap("add", "b", "nosuch")),
            transaction(bitmap("clear", "b", "nosuch")),
            transaction(bitmap("clear", "nosuch")),
            transaction(merge("x", "nosuch")),
            transaction(bitmap("add", "b", "z"), merge("x", {"node": "z", "name": "b"})),
            transaction(bitmap("add", "p", "z", persistent=True)),
            transaction(bitmap("add", "", "z")),
            SHOWN,
            delete("n"),
            stored("a.qcow2"),
            tool("qemu-img", "check", "a.qcow2"),
            qcow2("n"),
            SHOWN,
            *(sha(name) for name in ("x", "q")),
        ],
    ),
    Session(
        "transaction-snapshots",
        [
            make("a.qcow2", "8M", "x"),
            make("over.qcow2", "8M"),
            qcow2("n"),
            qcow2("over", "over.qcow2", backing=None),
            NULL,
            transaction(
                bitmap("add", "p"),
                act("blockdev-snapshot-sync", node_name="n", snapshot_file="s1.qcow2", snapshot_node_name="s1"),
                act("blockdev-snapshot-sync", node_name="s1", snapshot_file="s2.qcow2", snapshot_node_name="s2"),
                bitmap("add", "q", "s2"),
                ABORT,
            ),
            SHOWN,
            transaction(act("blockdev-snapshot-internal-sync", device="n", name="s"), ABORT),
            transaction(
                act("blockdev-snapshot-internal-sync", device="n", name="s"),
                act("blockdev-snapshot-internal-sync", device="n", name="s"),
            ),
            SHOWN,
            tool("qemu-img", "snapshot", "-U", "-l", "a.qcow2"),
            transaction(act("blockdev-snapshot-internal-sync", device="z", name="s")),
            transaction(act("blockdev-snapshot", node="n", overlay="over"), ABORT),
            transaction(act("blockdev-snapshot", node="n", overlay="nosuch")),
            transaction(act("blockdev-snapshot", node="nosuch", overlay="over")),
            SHOWN,
            transaction(
                act("blockdev-snapshot", node="n", overlay="over"), act("blockdev-snapshot", node="n", overlay="over")
            ),
            SHOWN,
            transaction(
                bitmap("add", "fresh", "over"),
                act("blockdev-snapshot", node="n", overlay="over"),
                bitmap("disable", "x"),
            ),
            SHOWN,
            transaction(
                act("blockdev-snapshot-sync", node_name="over", snapshot_file="s1.qcow2", snapshot_node_name="s1"),
                act("blockdev-snapshot-sync", node_name="s1", snapshot_file="s2.qcow2", snapshot_node_name="s2"),
                bitmap("add", "q", "s2"),
            ),
            SHOWN,
            delete("s2"),
            delete("s1"),
            delete("over"),
            delete("n"),
            *(tool("qemu-img", "check", name) for name in ("a.qcow2", "over.qcow2", "s1.qcow2", "s2.qcow2")),
            stored("a.qcow2"),
        ],
    ),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, tmp_path: Path) -> None:
    check_session(session, tmp_path, tmp_path)


@pytest.mark.parametrize("killed", [False, True])
def test_bitmaps_that_were_removed_are_in_the_image_again(tmp_path: Path, killed: bool) -> None:
    """When the transaction fails. (In QSD they are in memory only, until the node is closed.)"""
    path = images.create(tmp_path / "a.qcow2", "8M")
    for name in ("x", "y", "z"):
        images.peers.run("qemu-img", "bitmap", "--add", path, name)

    def found() -> list[tuple[str, list[str]]]:
        info = images.peers.run("qemu-img", "info", "-U", "--output=json", str(path)).stdout
        bitmaps = json.loads(info)["format-specific"]["data"].get("bitmaps", [])
        return [(one["name"], one["flags"]) for one in bitmaps]

    with DaemonProcess("pyqsd", [], workdir=tmp_path) as daemon:
        qmp = daemon.qmp
        qmp.execute("blockdev-add", driver="qcow2", node_name="n", file={"driver": "file", "filename": str(path)})
        for names in ("xz", "zyx", "y"):
            actions = [*(bitmap("remove", name) for name in names), ABORT]
            refused = qmp.command("transaction", actions=actions)
            assert refused["error"]["desc"] == "Transaction aborted using Abort action"
            assert found() == [(name, ["in-use", "auto"]) for name in "xyz"]
        qmp.execute("transaction", actions=[bitmap("remove", "y")])
        assert found() == [(name, ["in-use", "auto"]) for name in "xz"]
        if killed:
            daemon.kill()
        else:
            assert daemon.terminate() == 0
    assert found() == [(name, ["in-use", "auto"] if killed else ["auto"]) for name in "xz"]
    images.assert_clean(path)
