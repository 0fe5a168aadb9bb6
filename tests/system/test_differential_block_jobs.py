"""Differential: the commands for block jobs, with each of these jobs in each of its states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.daemon import poll
from tests.system.differential import Context, Do, Session, add, check_session, cmd, label_of, run_step
from tests.system.job_steps import FLAT, job, verb

K = 1024
JOBS = cmd("query-jobs")
BLOCK_JOBS = cmd("query-block-jobs")


def make(context: Context) -> None:
    d = context.workdir
    images.create(d / "base.raw", "2M", "raw")
    images.create("s.qcow2", "2M", "qcow2", "", "base.raw", "raw", d)
    images.io(d / "s.qcow2", "write -P 1 0 2M")
    images.create("top.qcow2", "2M", "qcow2", "", "s.qcow2", "qcow2", d)
    images.create(d / "t.raw", "2M", "raw")


NODES = [
    add(driver="raw", node_name="base", file={"driver": "file", "filename": "base.raw"}, read_only=True),
    add(driver="qcow2", node_name="s", file={"driver": "file", "filename": "s.qcow2"}, backing="base", read_only=True),
    add(driver="qcow2", node_name="top", file={"driver": "file", "filename": "top.qcow2"}, backing="s"),
    add(driver="raw", node_name="t", file={"driver": "file", "filename": "t.raw"}),
]
#: A job of each kind: its command and arguments.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "stream": ("block-stream", {"device": "top", "base_node": "base"}),
    "commit": ("block-commit", {"device": "top", "top_node": "s", "base_node": "base"}),
    "backup": ("blockdev-backup", {"device": "top", "target": "t", "sync": "full"}),
    "mirror": ("blockdev-mirror", {"device": "top", "target": "t", "sync": "full"}),
    "active-commit": ("block-commit", {"device": "top", "base_node": "base"}),
}


def resting(context: Context) -> Any:
    """What is told of the job while it waits because of its limit, but for how far it has come by then."""

    def jobs() -> Any:
        found = context.daemon.qmp.execute("query-block-jobs")
        return found if found[0]["offset"] and not found[0]["busy"] else None

    return [{**entry, "offset": None} for entry in poll(jobs, "the job to wait")]


def without_offsets(step: Any) -> Do:
    """The step, but for how far the job has come: how much is begun at once in spite of a limit is up to the job."""

    def masked(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: None if key in ("offset", "current-progress") else masked(v) for key, v in value.items()}
        return [masked(item) for item in value] if isinstance(value, list | tuple) else value

    return Do(label_of(step), lambda context: masked(run_step(step, context)))


ALL = ("complete", "resume", "pause", "cancel")


def verbs_session(kind: str) -> Session:
    command, arguments = KINDS[kind]
    ready = kind in ("mirror", "active-commit")
    later = {"auto_finalize": False, "auto_dismiss": False}

    def run(status: str, **more: Any) -> list[Any]:
        return [job(command, status, **arguments, **more)]

    end: list[Any]
    if ready:
        end = [
            verb("block-job-resume", "ready", device="j"),
            BLOCK_JOBS,
            verb("block-job-pause", "standby", device="j"),
            BLOCK_JOBS,
            verb("block-job-complete", device="j"),
            verb("block-job-cancel", device="j"),
            # It was told to complete.
            verb("block-job-resume", "pending", device="j"),
            verb("block-job-complete", device="j"),
        ]
    else:
        end = [verb("block-job-resume", "pending", device="j")]
    return Session(
        f"block-job-verbs-{kind}",
        [
            Do("make", make),
            *NODES,
            *run("running", speed=1, **later),
            Do("resting", resting),
            *(verb(f"block-job-{name}", device="j") for name in ("complete", "resume")),
            *(verb(f"block-job-{name}", id="j") for name in ("finalize", "dismiss")),
            *(verb("block-job-change", id="j", type=other) for other in ("stream", "commit", "mirror")),
            *(verb("block-job-set-speed", device="j", speed=speed) for speed in (-1, 1)),
            verb("block-job-pause", "paused", device="j"),
            verb("block-job-pause", device="j"),
            verb("block-job-cancel", device="j"),
            verb("block-job-complete", device="j"),
            verb("block-job-set-speed", device="j", speed=0),
            *end,
            BLOCK_JOBS,
            JOBS,
            *(verb(f"block-job-{name}", device="j") for name in ("complete", "resume", "pause")),
            verb("block-job-dismiss", id="j"),
            verb("block-job-finalize", "concluded", id="j"),
            BLOCK_JOBS,
            JOBS,
            *(verb(f"block-job-{name}", device="j") for name in ALL),
            verb("block-job-set-speed", device="j", speed=1),
            verb("block-job-dismiss", id="j"),
            verb("block-job-dismiss", id="j"),
            FLAT,
        ],
    )


def cancel_session(kind: str) -> Session:
    """Cancelled in each state, by each command."""
    command, arguments = KINDS[kind]
    ready = kind in ("mirror", "active-commit")
    steps: list[Any] = []
    states = ("running", "paused", "ready", "pending") if ready else ("running", "paused", "pending")
    for name, more in (
        ("block-job-cancel", {"device": "j"}),
        ("block-job-cancel", {"device": "j", "force": True}),
        ("job-cancel", {"id": "j"}),
    ):
        for state in states:
            slow = {"speed": 1} if state in ("running", "paused") else {}
            steps += [Do("make", make), *NODES]
            steps.append(
                job(
                    command,
                    "ready" if ready and not slow else "running" if slow else "pending",
                    **arguments,
                    **slow,
                    auto_finalize=False,
                    auto_dismiss=False,
                )
            )
            begun = len(steps)
            if slow:
                steps.append(Do("resting", resting))
            if state == "paused":
                steps.append(verb("job-pause", "paused", id="j"))
            if state == "pending" and ready:
                steps.append(verb("job-complete", "pending", id="j"))
            if state == "paused" and name == "block-job-cancel" and "force" not in more:
                steps.append(verb(name, **more))
                steps.append(verb("job-cancel", "concluded", id="j"))
            elif state == "ready" and name == "block-job-cancel" and "force" not in more:
                steps.append(verb(name, "pending", **more))
                steps.append(BLOCK_JOBS)
                steps.append(verb("job-finalize", "concluded", id="j"))
            else:
                steps.append(verb(name, "concluded", **more))
            steps += [JOBS, BLOCK_JOBS, verb("job-dismiss", id="j")]
            if slow:
                steps[begun:] = [without_offsets(step) for step in steps[begun:]]
            steps.append(FLAT)
            steps += [cmd("blockdev-del", node_name=node) for node in ("t", "top", "s", "base")]
    return Session(f"block-job-cancel-{kind}", steps)


SESSIONS = [make_session(kind) for make_session in (verbs_session, cancel_session) for kind in KINDS]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, tmp_path: Path) -> None:
    check_session(session, tmp_path, tmp_path)
