"""Differential: jobs that a transaction starts, each on its own or as a group: replies, and the order of all events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.system.differential import Context, Do, Session, add, check_session, cmd
from tests.system.job_steps import until
from tests.system.test_differential_bitmaps import NBD_START, export, sha, write
from tests.system.test_differential_transaction import ABORT, act, transaction

SIZE = 8 << 20


def backup(id: str, device: str, target: str, /, **more: Any) -> dict[str, Any]:
    return act("blockdev-backup", job_id=id, device=device, target=target, sync="full", **more)


def both(first: dict[str, Any] | None = None, second: dict[str, Any] | None = None, /) -> list[dict[str, Any]]:
    """A backup of each disk."""
    return [backup("j1", "a", "t1", **(first or {})), backup("j2", "b", "t2", **(second or {}))]


def step(command: dict[str, Any], *ends: str, unordered: str = "", pauses: bool = True, told: bool = True) -> Do:
    """The reply, and all events until these (as "job status"), in order. Which of two jobs is the first to have the
    status `unordered` is not always the same. Without `pauses`: when QSD drains everything, all jobs stand still. Not
    `told`: only the reply."""

    def run(context: Context) -> Any:
        reply = context.daemon.qmp.raw_command(command)
        for end in ends:
            until(context, end.split()[1], end.split()[0])
        events = [[event["event"], dict(event["data"])] for event in context.daemon.qmp.events]
        for name, data in events:
            if name == "BLOCK_JOB_CANCELLED":
                # How far it was depends on when that is.
                del data["offset"]
        context.daemon.qmp.events.clear()
        if not pauses:
            events = [event for event in events if event[1].get("status") not in ("paused", "running")]
        if not told:
            return reply
        loose = [event for event in events if event[1].get("status") == unordered]
        return reply, [event for event in events if event not in loose], sorted(loose, key=str)

    return Do(f"{command} until {ends}", run)


def incremental(id: str, bitmap: str) -> dict[str, Any]:
    return act("blockdev-backup", job_id=id, device="a", target="t1", sync="incremental", bitmap=bitmap)


def bitmap_add(name: str) -> dict[str, Any]:
    return act("block-dirty-bitmap-add", node="a", name=name)


def grouped(*actions: dict[str, Any]) -> dict[str, Any]:
    return transaction(*actions, completion_mode="grouped")


def disks() -> Do:
    def run(context: Context) -> None:
        for name in ("a", "b", "t1", "t2"):
            path = images.create(context.workdir / f"{name}.qcow2", str(SIZE))
            if name in "ab":
                images.io(path, f"write -P 7 0 {SIZE}")

    return Do("disks", run)


OPEN = [
    disks(),
    *(
        add(driver="qcow2", node_name=name, file={"driver": "file", "filename": f"{name}.qcow2"})
        for name in ("a", "b", "t1", "t2")
    ),
    add(driver="null-co", node_name="null", size=SIZE),
    add(
        driver="blkdebug",
        node_name="bad",
        image="null",
        inject_error=[{"event": "pwritev", "errno": 5}, {"event": "write_aio", "errno": 5}],
    ),
]
JOBS = Do(
    "jobs",
    lambda context: [
        {key: value for key, value in job.items() if key != "current-progress"}
        for job in context.daemon.qmp.execute("query-jobs")
    ],
)
SLOW = {"speed": 1}
STAYS = {"auto_dismiss": False}

SESSIONS = [
    Session(
        "grouped-success",
        [
            *OPEN,
            step(grouped(*both()), "j1 null", "j2 null", unordered="waiting"),
            step(grouped(*both({"auto_finalize": False})), "j1 pending", unordered="waiting"),
            JOBS,
            step(cmd("job-finalize", id="j2"), "j1 null"),
            step(
                grouped(*both({"auto_finalize": False, **STAYS}, {"auto_finalize": False})),
                "j1 pending",
                unordered="waiting",
            ),
            step(cmd("job-finalize", id="j1"), "j1 concluded"),
            JOBS,
            step(cmd("job-dismiss", id="j1"), "j1 null"),
            step(cmd("job-dismiss", id="j1")),
        ],
        compare_events=False,
    ),
    Session(
        "grouped-cancelled",
        [
            *OPEN,
            step(grouped(*both(None, SLOW)), "j1 waiting"),
            step(cmd("job-finalize", id="j1")),
            step(cmd("job-cancel", id="j1"), "j1 null"),
            step(grouped(*both(None, SLOW)), "j1 waiting"),
            step(cmd("job-cancel", id="j2"), "j1 null"),
            step(grouped(*both(SLOW)), "j2 waiting"),
            step(cmd("job-cancel", id="j1"), "j1 null"),
            step(grouped(*both(SLOW)), "j2 waiting"),
            step(cmd("job-cancel", id="j2"), "j1 null"),
            *(
                one
                for id in ("j1", "j2")
                for one in (
                    step(grouped(*both({"auto_finalize": False, **STAYS})), "j1 pending", unordered="waiting"),
                    step(cmd("job-cancel", id=id), "j1 concluded"),
                    JOBS,
                    step(cmd("job-dismiss", id="j1"), "j1 null"),
                )
            ),
            JOBS,
        ],
        compare_events=False,
    ),
    Session(
        "grouped-failed",
        [
            *OPEN,
            step(grouped(backup("j1", "a", "bad", **STAYS), backup("j2", "b", "t2", **SLOW)), "j1 concluded"),
            JOBS,
            step(cmd("job-dismiss", id="j1"), "j1 null"),
            # The one that is there first waits, or is still at work.
            step(
                grouped(backup("j1", "a", "t1", **STAYS, **SLOW), backup("j2", "b", "bad", **STAYS)),
                "j1 concluded",
            ),
            JOBS,
            step(cmd("job-dismiss", id="j1"), "j1 null"),
            step(cmd("job-dismiss", id="j2"), "j2 null"),
            # On their own, the other one goes on.
            step(transaction(backup("j1", "a", "bad"), backup("j2", "b", "t2", **SLOW)), "j1 null", pauses=False),
            step(cmd("job-cancel", id="j2"), "j2 null", pauses=False),
        ],
        compare_events=False,
    ),
    Session(
        "grouped-not-begun",
        [
            *OPEN,
            step(grouped(*both()[:1], backup("j2", "b", "t1"))),
            step(grouped(*both()[:1], backup("j2", "nosuch", "t2"))),
            step(grouped(*both()[:1], backup("j1", "b", "t2"))),
            step(grouped(backup("j1", "nosuch", "t1"), *both()[1:])),
            step(grouped(*both(), bitmap_add("x"))),
            step(transaction(*both()[:1], backup("j2", "b", "t1"))),
            step(transaction(*both()[:1], ABORT)),
            step(transaction(ABORT, *both())),
            step(transaction(bitmap_add("x"), *both()[:1], ABORT)),
            JOBS,
            sha("x", "a"),
            # All can be used again.
            step(grouped(*both()), "j1 null", unordered="waiting"),
        ],
        compare_events=False,
    ),
    Session(
        "grouped-bitmaps",
        [
            *OPEN,
            NBD_START,
            export("e", "a", writable=True),
            step(transaction(bitmap_add("x"), bitmap_add("y"), *both()[:1]), "j1 null"),
            write("e", lambda c: c.pwrite(1 << 20, b"x" * 300_000)),
            sha("x", "a"),
            # Failed: nothing that was dirty is clean.
            step(grouped(incremental("j1", "x"), backup("j2", "b", "bad")), "j1 null", told=False),
            sha("x", "a"),
            step(grouped(incremental("j1", "x"), backup("j2", "b", "t2", **SLOW)), "j1 waiting"),
            write("e", lambda c: c.pwrite(5 << 20, b"y" * 300_000)),
            cmd("transaction", actions=[act("block-dirty-bitmap-clear", node="a", name="x")]),
            step(cmd("job-cancel", id="j2"), "j1 null"),
            sha("x", "a"),
            # Succeeded: both are.
            step(grouped(incremental("j1", "x"), backup("j2", "b", "t2")), "j1 null", unordered="waiting"),
            sha("x", "a"),
            sha("y", "a"),
            # The bitmap is exchanged, and copied with, at one point in time.
            step(
                transaction(
                    act("block-dirty-bitmap-add", node="a", name="z"),
                    act("block-dirty-bitmap-merge", node="a", target="z", bitmaps=["y"]),
                    act("block-dirty-bitmap-clear", node="a", name="y"),
                    incremental("j1", "z"),
                ),
                "j1 null",
            ),
            *(sha(name, "a") for name in ("x", "y", "z")),
        ],
        compare_events=False,
    ),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, tmp_path: Path) -> None:
    check_session(session, tmp_path, tmp_path)
