"""The dirty bitmaps of a node: those that users know by name, and those that jobs have for themselves.

How a job uses them:

* **A bitmap of its own** (mirror: what is still to be copied). It has no name, so that no command can touch it. As in
  QSD, ``query-named-block-nodes`` shows it, and it records writes like any other unless it is disabled::

      bitmap = node.dirty_bitmaps.add_anonymous(node.length, granularity)    # enabled=False: only the job marks it
      …
      node.dirty_bitmaps.discard(bitmap)

* **A bitmap of the user** (backup: ``sync=bitmap``). It must stay as it is while the job reads it, and no write may be
  missed meanwhile, whatever becomes of the job. So it gets a successor, an anonymous bitmap that records in its place;
  until the end it is busy for all others::

      bitmap.check()                                     # busy, read-only, inconsistent: Error
      node.dirty_bitmaps.freeze(bitmap)
      …
      bitmap = node.dirty_bitmaps.abdicate(bitmap)       # it worked: from now on, only what was written since is dirty
      bitmap = node.dirty_bitmaps.reclaim(bitmap)        # it did not: that, and all that was dirty before

  Both return the bitmap that has the name from then on (a job that failed, but is to count what it did, abdicates
  and merges what is left to do into what it gets). A persistent bitmap that is stored while it is frozen is stored with
  all that its successor has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from pyqsd.block.dirty_bitmap import DirtyBitmap
from pyqsd.qapi.errors import Error

#: Those methods `DirtyBitmap.mark` that are to be called with every write.
Marks = tuple[Callable[[int, int], None], ...]


class NodeBitmaps(Mapping[str | DirtyBitmap, DirtyBitmap]):
    """The bitmaps of one node by name, anonymous ones by themselves, the oldest first.

    `on_marks` is called with the marks whenever they change.
    """

    def __init__(self, on_marks: Callable[[Marks], None] | None = None) -> None:
        self._bitmaps: dict[str | DirtyBitmap, DirtyBitmap] = {}
        self._on_marks = on_marks

    def __getitem__(self, key: str | DirtyBitmap) -> DirtyBitmap:
        return self._bitmaps[key]

    def __iter__(self) -> Iterator[str | DirtyBitmap]:
        return iter(self._bitmaps)

    def __len__(self) -> int:
        return len(self._bitmaps)

    def _enter(self, bitmap: DirtyBitmap) -> None:
        self._bitmaps[bitmap.name or bitmap] = bitmap
        bitmap.on_enable = self._changed
        self._changed()

    def _changed(self) -> None:
        if self._on_marks is not None:
            self._on_marks(tuple(bitmap.mark for bitmap in self._bitmaps.values() if bitmap.enabled))

    def add(self, bitmap: DirtyBitmap) -> None:
        """It is the node's from now on. Raises Error if there is another one of its name."""
        if bitmap.name in self:
            raise Error(f"Bitmap already exists: {bitmap.name}")
        self._enter(bitmap)

    def add_anonymous(self, size: int, granularity: int, *, enabled: bool = True) -> DirtyBitmap:
        """A new bitmap that no command can address; sizes in bytes."""
        bitmap = DirtyBitmap("", size, granularity, enabled=enabled)
        self._enter(bitmap)
        return bitmap

    def discard(self, bitmap: DirtyBitmap) -> None:
        """Forget a bitmap, if it is the node's."""
        key = bitmap.name or bitmap
        if self.get(key) is bitmap:
            del self._bitmaps[key]
            bitmap.on_enable = None
            self._changed()

    def freeze(self, bitmap: DirtyBitmap) -> DirtyBitmap:
        """Keep `bitmap` as it is, and busy, until `abdicate` or `reclaim`; its successor is returned, which records in
        its place if it was enabled. Raises Error if somebody uses it already."""
        if bitmap.busy:
            raise Error("Cannot create a successor for a bitmap that is in-use by an operation")
        successor = self.add_anonymous(bitmap.size, bitmap.granularity, enabled=bitmap.enabled)
        bitmap.enabled = False
        bitmap.busy = True
        bitmap.successor = successor
        return successor

    def abdicate(self, bitmap: DirtyBitmap) -> DirtyBitmap:
        """`bitmap` has what its successor has recorded, and goes on; what it had itself is forgotten.

        From now on it is as new as the successor, which is what remains in QSD.
        """
        successor = self._release(bitmap)
        if self.get(bitmap.name) is not bitmap:
            return self._gone(bitmap, successor)
        bitmap.exchange(successor)
        del self._bitmaps[bitmap.name]
        self._bitmaps = {
            (bitmap.name if one is successor else key): (bitmap if one is successor else one)
            for key, one in self._bitmaps.items()
        }
        successor.on_enable = None
        bitmap.enabled = successor.enabled
        return bitmap

    def reclaim(self, bitmap: DirtyBitmap) -> DirtyBitmap:
        """`bitmap` takes over all that its successor has recorded, and goes on."""
        successor = self._release(bitmap)
        if self.get(bitmap.name) is not bitmap:
            return self._gone(bitmap, successor)
        bitmap.merge(successor)
        bitmap.enabled = successor.enabled
        self.discard(successor)
        return bitmap

    def _release(self, bitmap: DirtyBitmap) -> DirtyBitmap:
        successor, bitmap.successor = bitmap.successor, None
        assert successor is not None
        bitmap.busy = False
        return successor

    def _gone(self, bitmap: DirtyBitmap, successor: DirtyBitmap) -> DirtyBitmap:
        """The node was inactive meanwhile: what it has of that name now was stored with all that the two had."""
        self.discard(successor)
        return self.get(bitmap.name, bitmap)
