"""Evaluates many command lines of pyqsd without paying Python's start for each of them.

Reads a JSON object per line, ``{"argv": […], "cwd": …}``; runs it in a fresh child process from the very beginning of
`pyqsd.cli.daemon.main`; answers ``{"status": …, "stdout": …, "stderr": …}``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time

import pyqsd.cli.daemon
import pyqsd.cli.run

TIMEOUT = 30.0


def evaluate(argv: list[str], cwd: str) -> dict[str, object]:
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.chdir(cwd)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(stdout.fileno(), 1)
                os.dup2(stderr.fileno(), 2)
                status = pyqsd.cli.daemon.main(["pyqsd", *argv])
                sys.stdout.flush()
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        deadline = time.monotonic() + TIMEOUT
        while True:
            done, raw = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return {"status": "does not end", "stdout": "", "stderr": ""}
            time.sleep(0.002)
        stdout.seek(0)
        stderr.seek(0)
        return {
            "status": os.waitstatus_to_exitcode(raw),
            "stdout": stdout.read().decode("utf-8", "replace"),
            "stderr": stderr.read().decode("utf-8", "replace"),
        }


if __name__ == "__main__":
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(evaluate(request["argv"], request["cwd"])), flush=True)
