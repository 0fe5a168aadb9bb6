"""Where pyqsd differs from QSD 10.0.2 and why: (session, step) → reason.

Every entry is a decision; a difference that nobody decided is a bug and does not belong here.
"""

from __future__ import annotations

KNOWN: dict[tuple[str, str], str] = {}
