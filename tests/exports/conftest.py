"""Fixtures for exports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.exports.service import Service


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A daemon without anything in it."""
    with Service(tmp_path) as service:
        yield service
