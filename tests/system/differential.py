"""Sends the same things to the real qemu-storage-daemon and to pyqsd and compares what comes back.

A `Session` is a command line and a list of steps, run on both daemons in directories that look the same to them (the
same relative names, fresh copies of the same images). Only these are normalised: time stamps, the version, the
program's own name, generated node names (their last two digits are random; they are numbered by their first appearance
in the session), the order of keys, and of lists that come out of a hash table. Everything else that differs is a
failure, unless `KNOWN` explains it; an explained difference that is not there any more fails as well.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import DaemonFailed, DaemonProcess, run_to_end
from tests.support.qmp import QmpClient
from tests.system.known_differences import KNOWN

STEP_TIMEOUT = 15.0
SHOWN = 25  # differences of one session that are printed


@dataclass
class Context:
    """What a `Do` step may use."""

    daemon: DaemonProcess
    workdir: Path
    keep: dict[str, Any] = field(default_factory=dict)  # for a step to leave something to a later one


@dataclass
class Do:
    """Something other than a command: `action` is called with the context, and what it returns is compared."""

    label: str
    action: Callable[[Context], Any]


@dataclass
class Event:
    """Waits for an event of this name and compares its data."""

    name: str


@dataclass
class Raw:
    """Sends bytes as they are and compares the next `replies` messages that are not events; without a number, all that
    come before the reply to a command sent after it."""

    data: bytes
    replies: int | None = 1


@dataclass
class Subset:
    """A command whose reply lists what the daemon has: what ours lists must be in QSD's list, entry for entry, and at
    least what `needs` names must be there."""

    command: Any
    key: str
    needs: Sequence[str]


Step = Any


@dataclass
class Session:
    name: str
    steps: list[Step]
    args: list[str] = field(default_factory=list)
    images: tuple[str, ...] = ()
    negotiate: bool = True
    may_fail_to_start: bool = False
    compare_stderr: bool = False
    compare_events: bool = True


def cmd(name: str, /, **arguments: Any) -> dict[str, Any]:
    """A command; underscores in argument names become dashes (`id_` is `id`)."""
    fixed = {key.rstrip("_").replace("_", "-"): value for key, value in arguments.items()}
    return {"execute": name, "arguments": fixed} if fixed else {"execute": name}


def add(**options: Any) -> dict[str, Any]:
    """blockdev-add"""
    return cmd("blockdev-add", **options)


def delete(name: str) -> dict[str, Any]:
    return cmd("blockdev-del", node_name=name)


def label_of(step: Step) -> str:
    if isinstance(step, Do):
        return step.label
    if isinstance(step, Event):
        return f"event {step.name}"
    if isinstance(step, Raw):
        return f"raw {step.data[:200]!r}"
    if isinstance(step, Subset):
        return "subset " + label_of(step.command)
    if isinstance(step, str):
        return step
    arguments = step.get("arguments", {})
    rest = {key: value for key, value in step.items() if key not in ("execute", "arguments")}
    text = str(step.get("execute")) + (" " + json.dumps(arguments) if arguments else "")
    return text + (" " + json.dumps(rest) if rest else "")


def normalise(value: Any, depth: int = 0) -> Any:
    """Removes time stamps and versions, where they can be."""
    if depth > 100:
        return value
    if isinstance(value, dict):
        result = {}
        for key, item in value.items():
            if key == "timestamp" and isinstance(item, dict):
                assert set(item) == {"seconds", "microseconds"}
                continue
            if key == "qemu" and isinstance(item, dict) and set(item) == {"major", "minor", "micro"}:
                assert all(isinstance(number, int) for number in item.values())
                item = "VERSION"
            elif key == "package" and isinstance(item, str):
                item = "PACKAGE"
            result[key] = normalise(item, depth + 1)
        return result
    if isinstance(value, list):
        return [normalise(item, depth + 1) for item in value]
    return value


class NodeNames:
    """Replaces generated node names by ones numbered in order of appearance."""

    PATTERN = re.compile(r"#block[0-9]{3,}")

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    def __call__(self, value: Any) -> Any:
        text = json.dumps(value, sort_keys=True)
        return json.loads(self.PATTERN.sub(lambda m: self.seen.setdefault(m[0], f"#block-{len(self.seen)}"), text))


# Lists that QSD takes out of a hash table, in no order, and what they are sorted by here.
UNORDERED = {"query-chardev": "label", "qom-list": "name"}


def command(qmp: QmpClient, message: dict[str, Any]) -> Any:
    """A command's reply; unordered lists in it are sorted."""
    reply = qmp.raw_command(message)
    key = UNORDERED.get(str(message.get("execute")))
    if key and isinstance(reply.get("return"), list):
        reply["return"].sort(key=lambda entry: str(entry[key]))
    return reply


def run_step(step: Step, context: Context) -> Any:
    qmp = context.daemon.qmp
    if isinstance(step, Do):
        return step.action(context)
    if isinstance(step, Event):
        return qmp.wait_event(step.name)
    if isinstance(step, Raw):
        qmp.send_raw(step.data)
        if step.replies is not None:
            return [qmp.reply() for _ in range(step.replies)]
        qmp.send({"execute": "query-block-exports", "id": "sync"})
        replies = []
        while True:
            replies.append(qmp.reply())
            if replies[-1].get("id") == "sync":
                return replies
    if isinstance(step, Subset):
        return qmp.raw_command(step.command if isinstance(step.command, dict) else {"execute": step.command})
    return command(qmp, {"execute": step} if isinstance(step, str) else step)


def run_session(kind: str, session: Session, workdir: Path) -> list[tuple[str, Any]]:
    """What each step gave: (label, normalised result)."""
    results: list[tuple[str, Any]] = []
    counts: dict[str, int] = {}
    rename = NodeNames()

    def record(label: str, value: Any) -> None:
        counts[label] = counts.get(label, 0) + 1
        results.append((label if counts[label] == 1 else f"{label} #{counts[label]}", rename(normalise(value))))

    try:
        daemon = DaemonProcess(kind, session.args, workdir=workdir)
    except DaemonFailed as failure:
        record("start", program_text(failure.stderr))
        return results
    daemon.qmp.timeout = STEP_TIMEOUT
    if not session.negotiate:
        daemon.qmp.close()
        daemon._qmp = daemon.connect_qmp(negotiate=False)
        record("greeting", daemon.qmp.greeting)
    context = Context(daemon, workdir)
    try:
        for step in session.steps:
            try:
                record(label_of(step), run_step(step, context))
            except (EOFError, TimeoutError, ConnectionError, DaemonFailed) as exc:
                record(label_of(step), f"BROKEN: {type(exc).__name__}: {exc}")
                break
        else:
            try:
                daemon.qmp.command("query-version")
            except (EOFError, TimeoutError, ConnectionError):
                pass  # the exit status tells
            if session.compare_events:
                record("events", daemon.qmp.events)
    finally:
        if daemon.running:
            code: Any = daemon.terminate()
        else:
            code = daemon.wait()
        record("exit status", code)
        if session.compare_stderr:
            record("stderr", program_text(daemon.stderr).splitlines())
        daemon.check_stderr()
    return results


def program_text(text: str) -> str:
    """Messages of a program, without its name."""
    return re.sub(r"(?<!\S)(\S*/)?(qemu-storage-daemon|pyqsd)(?=[\s:]|$)", "PROGRAM", text)


def pretty(value: Any) -> list[str]:
    return json.dumps(value, indent=1, sort_keys=True).splitlines()


def show(label: str, theirs: Any, ours: Any) -> str:
    diff = "\n".join(difflib.unified_diff(pretty(theirs), pretty(ours), "QSD", "pyqsd", lineterm="", n=2))
    return f"--- step: {label}\n{diff}\n"


def subset_problem(step: Subset, theirs: Any, ours: Any) -> str | None:
    if "return" not in theirs or "return" not in ours:
        return show(label_of(step), theirs, ours)
    have = {entry[step.key]: entry for entry in theirs["return"]}
    mine = {entry[step.key]: entry for entry in ours["return"]}
    lines = [f"missing: {name}" for name in step.needs if name not in mine]
    lines += [
        show(str(name), have[name], entry) for name, entry in mine.items() if name in have and have[name] != entry
    ]
    return f"--- step: {label_of(step)}\n" + "\n".join(lines) if lines else None


def check_session(session: Session, images: Path, tmp_path: Path) -> None:
    """Runs it on both and fails with all differences."""
    results: dict[str, list[tuple[str, Any]]] = {}
    workdir = tmp_path / "work"
    for kind in ("qsd", "pyqsd"):
        workdir.mkdir()
        if session.images:
            subprocess.run(
                ["cp", "-a", "--sparse=auto", *(os.fspath(images / name) for name in session.images), workdir],
                check=True,
            )
        results[kind] = run_session(kind, session, workdir)
        if kind == "qsd":
            shutil.rmtree(workdir)  # the second run sees the same paths
    # Two daemons that both do not do what the session waits for are no agreement.
    waited = [label for label, value in results["qsd"] if str(value).startswith("BROKEN: TimeoutError")]
    assert not waited, f"session {session.name}: QSD does not come to an end of: {waited}"
    compare_results(session, results["qsd"], results["pyqsd"])


def compare_results(session: Session, theirs: list[tuple[str, Any]], ours: list[tuple[str, Any]]) -> None:
    subsets = {label_of(step): step for step in session.steps if isinstance(step, Subset)}
    problems = []
    mine = dict(ours)
    if "start" in dict(theirs) and session.steps and not session.may_fail_to_start:
        problems.append(f"QSD does not start: {theirs}")
    if dict(theirs).get("exit status") not in (0, None):
        problems.append(f"this session kills QSD, it proves nothing: {theirs[-2:]}")
    for label, their in theirs:
        known = KNOWN.get((session.name, label))
        if label not in mine:
            problems.append(f"--- step: {label}\npyqsd did not get there; QSD answered {json.dumps(their)}\n")
            continue
        if label in subsets:
            problem = subset_problem(subsets[label], their, mine[label])
        else:
            problem = None if their == mine[label] else show(label, their, mine[label])
        if problem and not known:
            problems.append(problem)
        elif known and not problem:
            problems.append(f"--- step: {label}\nno difference any more, remove it from KNOWN: {known}\n")
    labels = {label for label, _ in theirs}
    problems += [
        f"--- KNOWN names a step that does not exist: {label}"
        for name, label in KNOWN
        if name == session.name and label not in labels
    ]
    if problems:
        more = f"\n… and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        text = "\n".join(problems[:SHOWN]) + more
        pytest.fail(f"session {session.name}: {len(problems)} differences\n{text}", pytrace=False)


def check_command_line(name: str, args: list[str], images: Path, names: Sequence[str], tmp_path: Path) -> None:
    """A command line that ends by itself: the same exit status, stdout and stderr after the program's name."""
    results: dict[str, list[tuple[str, Any]]] = {}
    workdir = tmp_path / "work"
    for kind in ("qsd", "pyqsd"):
        workdir.mkdir()
        for image in names:
            shutil.copy(images / image, workdir)
        done = run_to_end(kind, args, workdir=workdir)
        results[kind] = [
            (
                "command line",
                {
                    "exit status": done.returncode,
                    "stdout": program_text(done.stdout).splitlines(),
                    "stderr": program_text(done.stderr).splitlines(),
                },
            )
        ]
        shutil.rmtree(workdir)
    compare_results(Session(name, []), results["qsd"], results["pyqsd"])
