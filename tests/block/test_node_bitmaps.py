"""The bitmaps of a node: order, names, and successors, against a model of plain sets."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pyqsd.block.create import create_image
from pyqsd.block.dirty_bitmap import DirtyBitmap
from pyqsd.block.node_bitmaps import NodeBitmaps
from pyqsd.qapi.errors import Error

from .inprocess import Commands, run

SIZE = 300_000
GRANULARITY = 512


def named(*names: str) -> NodeBitmaps:
    bitmaps = NodeBitmaps()
    for name in names:
        bitmaps.add(DirtyBitmap(name, SIZE, GRANULARITY))
    return bitmaps


def written(bitmaps: NodeBitmaps, offset: int, length: int) -> None:
    """What a node does when it is written to."""
    for bitmap in bitmaps.values():
        if bitmap.enabled:
            bitmap.mark(offset, length)


def granules(bitmap: DirtyBitmap) -> set[int]:
    return {
        granule
        for start, length in bitmap.areas()
        for granule in range(start // GRANULARITY, (start + length - 1) // GRANULARITY + 1)
    }


def test_names_are_unique_and_anonymous_ones_are_not_found() -> None:
    bitmaps = named("a")
    with pytest.raises(Error, match=r"^Bitmap already exists: a$"):
        bitmaps.add(DirtyBitmap("a", SIZE, GRANULARITY))
    first = bitmaps.add_anonymous(SIZE, GRANULARITY)
    second = bitmaps.add_anonymous(SIZE, GRANULARITY, enabled=False)
    assert "" not in bitmaps and len(bitmaps) == 3
    written(bitmaps, 0, 1)
    assert (first.count, second.count) == (GRANULARITY, 0)
    bitmaps.discard(first)
    bitmaps.discard(first)
    # One of the same name that is not the node's stays out of it.
    bitmaps.discard(DirtyBitmap("a", SIZE, GRANULARITY))
    assert list(bitmaps.values()) == [bitmaps["a"], second]


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("success", [True, False])
def test_a_successor(enabled: bool, success: bool) -> None:
    bitmaps = named("a", "b", "c")
    a = bitmaps["a"]
    written(bitmaps, 0, GRANULARITY)
    a.enabled = enabled
    a.persistent = True
    a.readonly = True
    successor = bitmaps.freeze(a)
    bitmaps.add(DirtyBitmap("d", SIZE, GRANULARITY))
    assert a.busy and not successor.busy and a.recording is enabled and not successor.persistent
    with pytest.raises(Error, match=r"^Cannot create a successor for a bitmap that is in-use by an operation$"):
        bitmaps.freeze(a)
    with pytest.raises(Error, match=r"^Bitmap 'a' is currently in use by another operation and cannot be used$"):
        a.check()
    written(bitmaps, 5 * GRANULARITY, GRANULARITY)
    assert granules(a) == {0}
    assert granules(a.with_successor()) == ({0, 5} if enabled else {0})
    result = (bitmaps.abdicate if success else bitmaps.reclaim)(a)
    assert bitmaps["a"] is result and result is a
    assert successor not in bitmaps
    assert (result.name, result.persistent, result.readonly, result.busy) == ("a", True, True, False)
    assert result.enabled is enabled and result.successor is None
    assert granules(result) == ({5} if enabled else set()) | (set() if success else {0})
    # As in QSD, a successor is where it was added.
    assert list(bitmaps) == (["b", "c", "a", "d"] if success else ["a", "b", "c", "d"])


def test_random_life() -> None:
    dice = random.Random(77)
    bitmaps = named("a", "b")
    model: dict[str, set[int]] = {"a": set(), "b": set()}
    since: dict[str, set[int]] = {}
    enabled = {"a": True, "b": True}
    size = SIZE
    for _ in range(3000):
        name = dice.choice("ab")
        bitmap = bitmaps[name]
        what = dice.choice(["write"] * 6 + ["freeze", "abdicate", "reclaim", "toggle", "clear", "resize"])
        if what == "write":
            offset = dice.randrange(size)
            length = dice.randrange(min(size - offset, dice.choice([600, 50_000])) + 1)
            written(bitmaps, offset, length)
            touched = set(range(offset // GRANULARITY, (offset + length - 1) // GRANULARITY + 1)) if length else set()
            for one, recording in enabled.items():
                if recording:
                    (since if one in since else model)[one] |= touched
        elif what == "freeze":
            if name in since:
                with pytest.raises(Error):
                    bitmaps.freeze(bitmap)
            else:
                bitmaps.freeze(bitmap)
                since[name] = set()
        elif what in ("abdicate", "reclaim"):
            if name in since:
                getattr(bitmaps, what)(bitmap)
                new = since.pop(name)
                model[name] = new if what == "abdicate" else model[name] | new
        elif what == "resize":
            size = dice.choice([SIZE, SIZE // 2, 7 * GRANULARITY + 1])
            for each in bitmaps.values():
                each.truncate(size)
            for granules_of in (*model.values(), *since.values()):
                granules_of.difference_update(range(-(-size // GRANULARITY), -(-SIZE // GRANULARITY)))
        elif name not in since:
            if what == "toggle":
                bitmap.enabled = enabled[name] = not enabled[name]
            elif what == "clear":
                bitmap.clear()
                model[name] = set()
        for one in model:
            assert granules(bitmaps[one]) == model[one]
            assert granules(bitmaps[one].with_successor()) == model[one] | since.get(one, set())
            assert bitmaps[one].recording is enabled[one]
        assert len(bitmaps) == 2 + len(since)


def test_a_frozen_bitmap_is_stored_with_what_was_written_since(tmp_path: Path) -> None:
    image = str(tmp_path / "a.qcow2")

    async def test(qmp: Commands) -> None:
        file = {"driver": "file", "filename": image}
        await create_image(qmp.graph, "qcow2", image, SIZE // 512 * 512)
        await qmp.add("qcow2", "n", file=file)
        for name in ("abdicated", "reclaimed", "off"):
            await qmp("block-dirty-bitmap-add", node="n", name=name, persistent=True, granularity=GRANULARITY)
        node = qmp.graph.find("n")
        bitmaps = node.dirty_bitmaps
        await node.pwrite(0, b"x" * GRANULARITY)
        await qmp("block-dirty-bitmap-disable", node="n", name="off")
        frozen = [bitmaps[name] for name in ("abdicated", "reclaimed", "off")]
        for bitmap in frozen:
            bitmaps.freeze(bitmap)
        await node.pwrite(3 * GRANULARITY, b"y" * GRANULARITY)
        shown = {one.get("name"): one for one in (await qmp.node("n"))["dirty-bitmaps"]}
        assert shown["abdicated"]["busy"] and shown["abdicated"]["recording"] and not shown["off"]["recording"]
        assert len((await qmp.node("n"))["dirty-bitmaps"]) == 6
        error = await qmp.refused("block-dirty-bitmap-clear", node="n", name="off")
        assert error == "Bitmap 'off' is currently in use by another operation and cannot be used"
        await qmp("blockdev-set-active", node_name="n", active=False)
        assert all(isinstance(key, DirtyBitmap) for key in bitmaps) and len(bitmaps) == 3
        await qmp("blockdev-set-active", node_name="n", active=True)
        # The jobs end: what they froze has gone meanwhile, and what is there has everything.
        assert bitmaps.abdicate(frozen[0]) is bitmaps["abdicated"]
        assert bitmaps.reclaim(frozen[1]) is bitmaps["reclaimed"]
        bitmaps.abdicate(frozen[2])
        assert {name: granules(bitmaps[name]) for name in bitmaps if isinstance(name, str)} == {
            "abdicated": {0, 3},
            "reclaimed": {0, 3},
            "off": {0},
        }
        assert bitmaps["abdicated"].enabled and not bitmaps["off"].enabled
        bitmaps.freeze(bitmaps["abdicated"])
        await node.pwrite(5 * GRANULARITY, b"z" * GRANULARITY)
        bitmaps.abdicate(bitmaps["abdicated"])
        await qmp("blockdev-del", node_name="n")
        await qmp.add("qcow2", "n", file=file)
        found = qmp.graph.find("n").dirty_bitmaps
        assert granules(found["abdicated"]) == {5}
        assert granules(found["reclaimed"]) == {0, 3, 5}

    run(test)
