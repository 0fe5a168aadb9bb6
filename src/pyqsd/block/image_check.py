"""What a check of an image finds (QAPI ``ImageCheck``)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from pyqsd.qapi.types import Struct


class BlockdevCheckRepair(StrEnum):
    """What a check may change: nothing, the counts of clusters that nothing refers to, or all that it can put right."""

    NONE = "none"
    LEAKS = "leaks"
    ALL = "all"


class ImageCheck(Struct, kw_only=True):
    """The outcome of a check, as ``qemu-img check --output=json`` has it. Counts of nothing are left out."""

    filename: str
    format: str
    check_errors: int
    image_end_offset: int | None = None
    corruptions: int | None = None
    leaks: int | None = None
    corruptions_fixed: int | None = None
    leaks_fixed: int | None = None
    total_clusters: int | None = None
    allocated_clusters: int | None = None
    fragmented_clusters: int | None = None
    compressed_clusters: int | None = None


@dataclass
class CheckResult:
    """What `Driver.check` found.

    `check_errors`: what could not be looked at; `corruptions`: what endangers data, `leaks`: clusters that are only
    lost space (both as they are now, after repair), `…_fixed`: what was repaired. `image_end_offset` in bytes.
    `findings`: how often each kind of thing was found, in words.
    """

    check_errors: int = 0
    corruptions: int = 0
    leaks: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    image_end_offset: int = 0
    findings: Counter[str] = field(default_factory=Counter)

    def corrupt(self, what: str, times: int = 1) -> None:
        """Count corruptions."""
        if times:
            self.corruptions += times
            self.findings[what] += times

    def failed(self, what: str, times: int = 1) -> None:
        """Count what could not be checked."""
        if times:
            self.check_errors += times
            self.findings[what] += times

    def leaked(self, times: int) -> None:
        """Count leaked clusters."""
        if times:
            self.leaks += times
            self.findings["leaked clusters"] += times
