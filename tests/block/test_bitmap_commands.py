"""Dirty bitmaps of nodes: what is recorded. tests/system compares the commands' replies with QSD's."""

from __future__ import annotations

import random
from pathlib import Path

from pyqsd.block import permissions as perms
from pyqsd.block.backend import BlockBackend

from .inprocess import Commands, run

SIZE = 1 << 20
GRANULARITY = 4096


def test_random_writes_are_all_recorded(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    image.write_bytes(bytes(SIZE))
    dice = random.Random(20)

    async def test(qmp: Commands) -> None:
        await qmp.add("file", "f", filename=str(image), discard="unmap")
        await qmp.add("raw", "r", file="f", discard="unmap")
        for node, name in (("r", "all"), ("r", "paused"), ("f", "below")):
            await qmp("block-dirty-bitmap-add", node=node, name=name, granularity=GRANULARITY)
        user = BlockBackend(qmp.graph, "a test", perms.CONSISTENT_READ | perms.WRITE, perms.ALL)
        user.insert(qmp.graph.find("r"))
        expected: dict[str, set[int]] = {"all": set(), "paused": set()}
        recording = True
        for _ in range(300):
            offset = dice.randrange(0, SIZE - 1)
            length = min(dice.choice([1, 511, 512, 4096, 65536, 100000]), SIZE - offset)
            what = dice.choice(["now", "write", "zero", "discard", "read", "toggle"])
            if what == "toggle":
                recording = not recording
                await qmp(f"block-dirty-bitmap-{'enable' if recording else 'disable'}", node="r", name="paused")
                continue
            data = [memoryview(bytearray(b"\x33" * length))]
            if what == "read":
                await user.preadv(offset, length, data)
                continue
            if what == "now":
                if not user.write_now(offset, length, data):
                    await user.pwritev(offset, length, data)
            elif what == "write":
                await user.pwritev(offset, length, data)
            elif what == "zero":
                await user.pwrite_zeroes(offset, length, 0)
            else:
                await user.pdiscard(offset, length)
            touched = range(offset // GRANULARITY, (offset + length - 1) // GRANULARITY + 1)
            expected["all"].update(touched)
            if recording:
                expected["paused"].update(touched)
        bitmaps = qmp.graph.find("r").dirty_bitmaps
        for name, granules in expected.items():
            assert {g for g in range(SIZE // GRANULARITY) if bitmaps[name].is_dirty(g * GRANULARITY)} == granules
        below = qmp.graph.find("f").dirty_bitmaps["below"]
        assert all(below.is_dirty(granule * GRANULARITY) for granule in expected["all"])
        shown = {b["name"]: b for b in (await qmp.node("r"))["dirty-bitmaps"]}
        assert shown["all"]["count"] == len(expected["all"]) * GRANULARITY
        user.remove()

    run(test)


def test_what_does_not_change_the_content_is_not_recorded() -> None:
    async def test(qmp: Commands) -> None:
        await qmp.add("null-co", "n", size=SIZE)
        await qmp("block-dirty-bitmap-add", node="n", name="b")
        user = BlockBackend(qmp.graph, "a test", perms.CONSISTENT_READ | perms.WRITE, perms.ALL)
        user.insert(qmp.graph.find("n"))
        # A discard is ignored by default.
        await user.pdiscard(0, 65536)
        await user.preadv(0, 65536, [memoryview(bytearray(65536))])
        await user.flush()
        assert (await qmp.node("n"))["dirty-bitmaps"][0]["count"] == 0
        user.remove()

    run(test)


def test_a_merge_that_fails_changes_nothing() -> None:
    async def test(qmp: Commands) -> None:
        await qmp.add("null-co", "n", size=SIZE)
        await qmp.add("null-co", "large", size=2 * SIZE)
        for node, name in (("n", "into"), ("n", "from"), ("large", "other")):
            await qmp("block-dirty-bitmap-add", node=node, name=name)
        qmp.graph.find("n").dirty_bitmaps["from"].mark(0, 1)
        into = qmp.graph.find("n").dirty_bitmaps["into"]
        wrong = [
            ({"node": "large", "name": "other"}, "Bitmaps are of different sizes"),
            ("nosuch", "Dirty bitmap 'nosuch' not found"),
            ({"node": "nosuch", "name": "b"}, "Node 'nosuch' not found"),
        ]
        for last, message in wrong:
            bitmaps = ["from", last]
            error = await qmp.refused("block-dirty-bitmap-merge", node="n", target="into", bitmaps=bitmaps)
            assert error.startswith(message)
            assert into.count == 0
        await qmp("block-dirty-bitmap-merge", node="n", target="into", bitmaps=["from", "into"])
        assert into.count == 65536
        await qmp("block-dirty-bitmap-merge", node="n", target="into", bitmaps=[])
        assert into.count == 65536

    run(test)


def test_persistent_bitmaps_need_a_place() -> None:
    async def test(qmp: Commands) -> None:
        await qmp.add("null-co", "n")
        arguments = {"node": "n", "name": "b", "persistent": True}
        assert await qmp.refused("block-dirty-bitmap-add", **arguments) == (
            "Can't store persistent bitmaps to n: Operation not supported"
        )
        assert "dirty-bitmaps" not in await qmp.node("n")

    run(test)


def test_states_forbid_commands() -> None:
    async def test(qmp: Commands) -> None:
        await qmp.add("null-co", "n")
        await qmp("block-dirty-bitmap-add", node="n", name="b")
        bitmap = qmp.graph.find("n").dirty_bitmaps["b"]
        bitmap.inconsistent = True
        for action in ("clear", "enable", "disable"):
            error = await qmp.refused(f"block-dirty-bitmap-{action}", node="n", name="b")
            assert error == "Bitmap 'b' is inconsistent and cannot be used"
        assert (await qmp.node("n"))["dirty-bitmaps"][0]["inconsistent"] is True
        bitmap.readonly = True
        error = await qmp.refused("block-dirty-bitmap-remove", node="n", name="b")
        assert error == "Bitmap 'b' is readonly and cannot be modified"
        bitmap.readonly = False
        await qmp("block-dirty-bitmap-remove", node="n", name="b")
        assert not qmp.graph.find("n").dirty_bitmaps

    run(test)


def test_a_bitmap_that_would_be_too_large() -> None:
    async def test(qmp: Commands) -> None:
        await qmp.add("null-co", "n", size=1 << 62)
        error = await qmp.refused("block-dirty-bitmap-add", node="n", name="b")
        assert error == f"Granularity 65536 is too small for a node of {1 << 62} bytes"
        await qmp("block-dirty-bitmap-add", node="n", name="b", granularity=1 << 22)
        user = BlockBackend(qmp.graph, "a test", perms.CONSISTENT_READ | perms.WRITE, perms.ALL)
        user.insert(qmp.graph.find("n"))
        for n in range(2000):
            await user.pwritev(n << 41, 512, [memoryview(bytearray(512))])
        assert (await qmp.node("n"))["dirty-bitmaps"][0]["count"] == 2000 << 22
        user.remove()

    run(test)
