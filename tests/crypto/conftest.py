"""Fixtures of whatever has to do with keys."""

from __future__ import annotations

import pytest

from pyqsd.crypto import hashes


@pytest.fixture(autouse=True)
def short_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast this machine derives keys is measured for a moment only, for each key slot: here it matters to nobody,
    but where daemons do it (tests/system)."""
    monkeypatch.setattr(hashes, "_MEASURE", 0.002)
