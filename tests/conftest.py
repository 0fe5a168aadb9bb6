"""For all tests."""

from __future__ import annotations

import os

# In continuous integration a missing peer program always fails (tests/support/peers.py).
if os.environ.get("CI") == "true":
    os.environ.pop("PYQSD_TESTS_SKIP_MISSING", None)
