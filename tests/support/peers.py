"""The peer programs that judge us. A missing one fails the test; PYQSD_TESTS_SKIP_MISSING=1 turns that into a skip."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

import pytest

RUN_TIMEOUT = 60.0


def require(program: str) -> str:
    """The path of `program`; fails (or, on a developer's machine, skips) the test when it is not installed."""
    path = shutil.which(program)
    if path is None:
        text = f"the peer program {program} is not installed"
        if os.environ.get("PYQSD_TESTS_SKIP_MISSING") == "1":
            pytest.skip(text)
        pytest.fail(text)
    return path


def run(
    *argv: str | os.PathLike[str],
    ok: Sequence[int] = (0,),
    timeout: float = RUN_TIMEOUT,
    cwd: str | os.PathLike[str] | None = None,
    stdin: bytes | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a peer program to its end; fails with its output when the exit status is not in `ok` (empty: any)."""
    command = [require(os.fspath(argv[0])), *(os.fspath(arg) for arg in argv[1:])]
    done = subprocess.run(
        command,
        capture_output=True,
        timeout=timeout,
        cwd=cwd,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        check=False,
    )
    result = subprocess.CompletedProcess(
        command, done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
    )
    if ok and result.returncode not in ok:
        pytest.fail(
            f"{' '.join(command)}\nexit status {result.returncode}\nstdout: {result.stdout}\nstderr: {result.stderr}"
        )
    return result
