"""``commit_top``: the filter that a commit puts over the uppermost layer that it commits.

While the job runs, what is between that layer and the base is not consistent any more: the base already has what came
from above. Nobody may read these layers but through the whole chain, and the filter, which needs nothing of the layer
below it, stands between them and the overlays, which may.
"""

from __future__ import annotations

from pyqsd.block import permissions as perms
from pyqsd.block.child import Child
from pyqsd.block.filenames import without_filters
from pyqsd.block.internal_filter import InternalFilter
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevOptions


def shared_below(layer: Node, base: Node) -> int:
    """What others may do with `layer`, which is above `base`, while that is committed to: who reads it gets what is not
    right any more, unless it is only a filter of the base."""
    shared = perms.WRITE_UNCHANGED | perms.WRITE
    if without_filters(layer) is without_filters(base):
        shared |= perms.CONSISTENT_READ
    return shared


class CommitTop(InternalFilter):
    """See the module."""

    name = "commit_top"

    class Options(BlockdevOptions, tag="commit_top"):
        """Nobody gives them."""

    def child_perms(self, child: Child, role: int, perm: int, shared: int) -> tuple[int, int]:
        return 0, perms.ALL
