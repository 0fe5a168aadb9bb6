"""Fixtures of the tests of qcow2."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.crypto.conftest import short_measurement
from tests.drivers.qcow2 import mangled

__all__ = ["short_measurement", "sound"]


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """A function that gives the bytes of an image of a kind."""
    root = tmp_path_factory.mktemp("sound")

    def get(kind: str) -> bytes:
        path = root / f"{kind}.qcow2"
        if not path.exists():
            mangled.make(path, kind)
        return path.read_bytes()

    return get
