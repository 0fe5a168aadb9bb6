"""Medians and ratios of the numbers that were measured."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from benchmarks.workloads import Workload

OURS = "pyqsd"
RIVALS = ("qsd-threads", "qsd-io_uring")
TITLES = {
    "pyqsd": "pyqsd",
    "qsd-threads": "QSD aio=threads",
    "qsd-io_uring": "QSD aio=io_uring",
    "nbdkit": "nbdkit",
}


@dataclass
class Results:
    """(workload, server) → the numbers of all rounds."""

    numbers: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, workload: str, server: str, value: float) -> None:
        self.numbers.setdefault((workload, server), []).append(value)

    def median(self, workload: str, server: str) -> float | None:
        numbers = self.numbers.get((workload, server))
        return statistics.median(numbers) if numbers else None

    def ratio(self, workload: Workload) -> float | None:
        """How many times better than QSD's better mode we are."""
        ours = self.median(workload.name, OURS)
        theirs = [value for name in RIVALS if (value := self.median(workload.name, name))]
        if not ours or not theirs:
            return None
        return min(theirs) / ours if workload.smaller_is_better else ours / max(theirs)

    def as_json(self, workloads: list[Workload]) -> list[dict[str, object]]:
        return [
            {
                "workload": workload.name,
                "unit": workload.unit,
                "smaller_is_better": workload.smaller_is_better,
                "medians": {
                    server: self.median(name, server) for name, server in self.numbers if name == workload.name
                },
                "rounds": {server: values for (name, server), values in self.numbers.items() if name == workload.name},
                "ratio_to_best_qsd": self.ratio(workload),
            }
            for workload in workloads
        ]


def number(value: float | None) -> str:
    if value is None:
        return "–"
    if value >= 10000:
        return f"{value / 1000:.0f}k"
    if value >= 1000:
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def table(results: Results, workloads: list[Workload], servers: list[str], markdown: bool) -> str:
    """One line per workload: every server's median, and pyqsd against QSD's better mode."""
    rows = [["", *(TITLES[server] for server in servers), "pyqsd / best QSD"]]
    for workload in workloads:
        ratio = results.ratio(workload)
        rows.append(
            [
                f"{workload.name} ({workload.unit})",
                *(number(results.median(workload.name, server)) for server in servers),
                "–"
                if ratio is None
                else f"{ratio:.2f}" + (" (smaller is better)" if workload.smaller_is_better else ""),
            ]
        )
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
        return "\n".join(lines)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        row[0].ljust(widths[0])
        + "  "
        + "  ".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )
