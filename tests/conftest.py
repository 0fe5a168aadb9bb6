"""For all tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# In continuous integration a missing peer program always fails (tests/support/peers.py).
if os.environ.get("CI") == "true":
    os.environ.pop("PYQSD_TESTS_SKIP_MISSING", None)

# How long an example takes says how busy the machine is.
settings.register_profile("busy", settings.default, deadline=None)
settings.load_profile("busy")

# What only makes sense in one process, or picks a few tests, for which starting several processes takes longer.
SERIAL_OPTIONS = ("collectonly", "usepdb", "trace", "keyword", "markexpr", "lf", "failedfirst", "stepwise")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in a process per processor (pytest-xdist), everything else in this one; `-n` says otherwise.

    A process takes the tests in the order of the files, so that what a module shares is mostly made once; the one
    that is done first takes over part of what the others have left.
    """
    option = config.option
    if (
        config.args_source == pytest.Config.ArgsSource.TESTPATHS
        and getattr(option, "numprocesses", 0) is None
        and not hasattr(config, "workerinput")
        and option.capture != "no"
        and not any(getattr(option, name, None) for name in SERIAL_OPTIONS)
    ):
        option.numprocesses = max(2, len(os.sched_getaffinity(0)))
        if option.dist == "no":
            option.dist = "worksteal"
