"""Differential: block-stream, and the commands for block jobs with it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.daemon import poll
from tests.system.differential import Context, Do, Session, add, check_session, cmd, delete
from tests.system.job_steps import FLAT, GRAPH, NODES, image, job, same, verb

K = 1024
STREAM = "block-stream"
JOBS = cmd("query-jobs")
BLOCK_JOBS = cmd("query-block-jobs")


def make_chain(context: Context) -> None:
    """base.raw ← mid ← low ← top, with data, zeroes and holes in each; `full` has the content of top."""
    d = context.workdir
    images.create(d / "base.raw", "1M", "raw")
    images.io(d / "base.raw", "write -P 1 0 256k", "write -P 5 900k 100k", fmt="raw")
    images.create("mid.qcow2", "1400k", "qcow2", "cluster_size=4k", "base.raw", "raw", d)
    images.io(d / "mid.qcow2", "write -P 2 128k 64k", "write -z 900k 4k", "write -P 6 1100k 8k")
    images.create("low.qcow2", "1500k", "qcow2", "cluster_size=64k", "mid.qcow2", "qcow2", d)
    images.io(d / "low.qcow2", "write -P 3 256k 64k", "write -z 512k 512k")
    images.create("top.qcow2", "3M", "qcow2", "cluster_size=32k", "low.qcow2", "qcow2", d)
    images.io(d / "top.qcow2", "write -P 4 384k 64k", "write -z 1400k 32k", "write -P 7 2900k 10k")
    images.peers.run("qemu-img", "convert", "-O", "raw", d / "top.qcow2", d / "full.raw")
    images.peers.run("qemu-img", "convert", "-O", "raw", d / "low.qcow2", d / "full-low.raw")


def more_data(context: Context) -> None:
    d = context.workdir
    images.io(d / "low.qcow2", "write -P 9 0 1400k")
    images.peers.run("qemu-img", "convert", "-O", "raw", d / "top.qcow2", d / "full.raw")


MAKE = Do("make chain", make_chain)
FILES = {name: {"driver": "file", "filename": f"{name}.qcow2"} for name in ("mid", "low", "top")}
NAMED = [
    add(driver="file", node_name="base-file", filename="base.raw", read_only=True),
    add(driver="raw", node_name="base", file="base-file", read_only=True),
    add(driver="qcow2", node_name="mid", file=FILES["mid"], backing="base", read_only=True),
    add(driver="qcow2", node_name="low", file=FILES["low"], backing="mid", read_only=True),
    add(driver="qcow2", node_name="top", file=FILES["top"], backing="low"),
]
CLOSE = [delete(name) for name in ("top", "low", "mid", "base", "base-file")]


def reopen(name: str, **options: Any) -> dict[str, Any]:
    return cmd("blockdev-reopen", options=[{"driver": "qcow2", "node-name": name, "file": FILES[name], **options}])


def named_session(name: str, *options: dict[str, Any], content: str = "top") -> Session:
    """Streams with `options`, in turns, and looks at everything."""
    return Session(
        f"stream-{name}",
        [
            MAKE,
            *NAMED,
            *(step for kw in options for step in (job(STREAM, **{"device": "top", **kw}), NODES, GRAPH)),
            *CLOSE,
            *(image(f"{name}.qcow2") for name in ("top", "low", "mid")),
            *([same("top.qcow2", "qcow2", "full.raw", "raw")] if content == "top" else []),
            *([same("low.qcow2", "qcow2", "full-low.raw", "raw")] if content == "low" else []),
        ],
    )


BAD: list[dict[str, Any]] = [
    {"device": "nosuch"},
    {"base": "base.raw", "base_node": "base"},
    {"base": "x", "bottom": "base"},
    {"base_node": "x", "bottom": "base"},
    {"base": "nosuch"},
    {"base": ""},
    {"base": "top.qcow2"},
    {"base_node": "nosuch"},
    {"base_node": "top"},
    {"base_node": "base-file"},
    {"bottom": "nosuch"},
    {"bottom": "base-file"},
    {"device": "low", "bottom": "top"},
    {"device": "low", "base_node": "top"},
    {"backing_file": "x"},
    {"bottom": "mid", "backing_file": "x"},
    {"speed": -1},
    {"speed": 1 << 63},
    {"speed": "1"},
    {"filter_node_name": "top"},
    {"filter_node_name": "1"},
    {"filter_node_name": ""},
    {"filter_node_name": "x" * 32},
    {"on_error": "nosuch"},
    {"device": "base"},
    {"snapshot_file": "x"},
]

POLICIES = ("report", "ignore", "stop", "enospc", "auto")


def errors_session(name: str, where: str, event: str, number: int, once: bool) -> Session:
    """An injected error, with each policy."""

    def steps(policy: str) -> list[Any]:
        rule = {"event": event, "errno": number, "once": once}
        files = dict(FILES)
        files[where] = {"driver": "blkdebug", "image": files[where], "inject-error": [rule]}
        stops = policy == "stop" or (number == 28 and policy in ("enospc", "auto"))
        arguments = {"device": "top", "base_node": "mid", "on_error": policy, "auto_dismiss": False}
        if not stops:
            run = [job(STREAM, "concluded", **arguments), JOBS, BLOCK_JOBS]
        else:
            run = [job(STREAM, "paused", **arguments), JOBS, BLOCK_JOBS]
            run += [verb("block-job-cancel", device="j")]
            if once:
                run += [verb("block-job-resume", "concluded", device="j"), JOBS, BLOCK_JOBS]
            else:
                run += [verb("block-job-cancel", "concluded", device="j", force=True), JOBS, BLOCK_JOBS]
        return [
            MAKE,
            Do("more data", more_data),
            add(driver="qcow2", node_name="mid", file=files["mid"], read_only=True, backing=None),
            add(driver="qcow2", node_name="low", file=files["low"], backing="mid", read_only=True),
            add(driver="qcow2", node_name="top", file=files["top"], backing="low"),
            *run,
            verb("job-resume", id="j"),
            verb("block-job-dismiss", id="j"),
            GRAPH,
            *CLOSE[:3],
            # How much had come up already depends on how much is under way at once.
            same("top.qcow2", "qcow2", "full.raw", "raw"),
        ]

    return Session(f"stream-error-{name}", [step for policy in POLICIES for step in steps(policy)])


def at_rest(context: Context) -> Any:
    """What is told of the job once it waits because of its limit."""

    def jobs() -> Any:
        found = context.daemon.qmp.execute("query-block-jobs")
        return found if found[0]["offset"] >= 320 * K and not found[0]["busy"] else None

    return poll(jobs, "the job to wait")


SLOW = job(
    STREAM,
    "running",
    device="top",
    base_node="mid",
    speed=1,
    filter_node_name="cor",
    auto_finalize=False,
    auto_dismiss=False,
)

SESSIONS = [
    Session(
        "stream-mistakes",
        [
            MAKE,
            *NAMED,
            cmd(STREAM, device="top"),
            cmd(STREAM, job_id="1", device="top"),
            *(verb(STREAM, **{"job_id": "j", "device": "top", **kw}) for kw in BAD),
            *(
                verb(STREAM, **{"job_id": "j", "device": "top", **one, **other})
                for one, other in itertools.combinations(BAD, 2)
                if not one.keys() & other.keys()
            ),
            verb(STREAM, job_id="1", device="top", filter_node_name="1", speed=-1),
            FLAT,
            GRAPH,
        ],
    ),
    named_session("whole", {}),
    named_session("base-name", {"base": "mid.qcow2"}),
    named_session("base-path", {"base": "./base.raw"}),
    named_session("base-node", {"base_node": "base"}),
    named_session("base-node-mask", {"base_node": "base", "backing_mask_protocol": True}),
    named_session("bottom-low", {"bottom": "low"}),
    named_session("bottom-mid", {"bottom": "mid"}),
    named_session("bottom-base", {"bottom": "base"}),
    named_session("bottom-top", {"bottom": "top"}),
    named_session("nothing", {"base_node": "low"}),
    named_session("nothing-named", {"base_node": "low", "backing_file": "other"}, content=""),
    named_session("backing-file", {"base_node": "mid", "backing_file": "./mid.qcow2"}),
    named_session("backing-file-long", {"base_node": "mid", "backing_file": "x" * 1024}),
    named_session("backing-file-empty", {"base_node": "mid", "backing_file": ""}, content=""),
    named_session("twice", {"base_node": "mid"}, {"bottom": "base"}, {}),
    named_session("intermediate", {"device": "low", "base_node": "base"}, content="low"),
    named_session("intermediate-whole", {"device": "low"}, {"device": "top"}, content="low"),
    named_session("not-an-overlay", {"device": "base-file"}),
    Session(
        "stream-protocol-base",
        [
            step
            for kw in ({}, {"backing_mask_protocol": True}, {"backing_mask_protocol": True, "backing_file": "zz"})
            for step in (
                MAKE,
                NAMED[0],
                add(driver="qcow2", node_name="mid", file=FILES["mid"], backing="base-file", read_only=True),
                add(driver="qcow2", node_name="top", file=FILES["top"], backing="mid"),
                job(STREAM, device="top", base_node="base-file", **kw),
                NODES,
                *(delete(name) for name in ("top", "mid", "base-file")),
                image("top.qcow2"),
            )
        ],
    ),
    Session(
        "stream-inline",
        [
            MAKE,
            add(
                driver="qcow2",
                node_name="top",
                file=FILES["top"],
                backing={
                    "driver": "qcow2",
                    "node-name": "low",
                    "file": FILES["low"],
                    "backing": {
                        "driver": "qcow2",
                        "node-name": "mid",
                        "file": FILES["mid"],
                        "backing": {"driver": "raw", "file": {"driver": "file", "filename": "base.raw"}},
                    },
                },
            ),
            job(STREAM, device="low", base="base.raw"),
            NODES,
            GRAPH,
            job(STREAM, device="top"),
            NODES,
            GRAPH,
            delete("top"),
            FLAT,
            image("top.qcow2"),
            image("low.qcow2"),
            same("top.qcow2", "qcow2", "full.raw", "raw"),
        ],
    ),
    Session(
        "stream-filters",
        [
            MAKE,
            NAMED[0],
            add(driver="raw", node_name="base", file="base-file", read_only=True),
            add(driver="preallocate", node_name="above-base", file="base", read_only=True),
            add(driver="qcow2", node_name="low", file=FILES["low"], backing="above-base", read_only=True),
            add(driver="qcow2", node_name="top", file=FILES["top"], backing="low"),
            add(driver="copy-on-read", node_name="u", file="top"),
            verb(STREAM, job_id="j", device="u", base_node="top"),
            verb(STREAM, job_id="j", device="u", bottom="u"),
            verb(STREAM, job_id="j", device="u", bottom="above-base"),
            job(STREAM, device="u", bottom="top"),
            job(STREAM, "pending", device="u", base_node="base", filter_node_name="ff", auto_finalize=False),
            GRAPH,
            verb("block-job-finalize", "null", id="j"),
            NODES,
            job(STREAM, device="u"),
            GRAPH,
            *(delete(name) for name in ("u", "top", "low", "above-base", "base")),
            image("top.qcow2"),
        ],
    ),
    Session(
        "stream-frozen",
        [
            MAKE,
            *NAMED,
            add(driver="copy-on-read", node_name="u", file="top", bottom="low"),
            *(
                verb(STREAM, job_id="j", **kw)
                for kw in (
                    {"device": "top", "base_node": "mid"},
                    {"device": "u", "base_node": "mid"},
                    {"device": "u", "bottom": "top"},
                    {"device": "top"},
                    {"device": "low"},
                )
            ),
            job(STREAM, device="mid"),
            delete("u"),
            job(STREAM, device="top"),
            NODES,
        ],
    ),
    Session(
        "stream-verbs",
        [
            MAKE,
            *NAMED,
            verb("block-job-pause", device="j"),
            verb("block-job-change", id="j", type="stream"),
            SLOW,
            Do("at rest", at_rest),
            JOBS,
            FLAT,
            GRAPH,
            *(verb(f"block-job-{name}", device="j") for name in ("complete", "resume")),
            *(verb(f"block-job-{name}", id="j") for name in ("finalize", "dismiss")),
            *(verb(f"job-{name}", id="j") for name in ("complete", "resume", "finalize", "dismiss")),
            *(verb("block-job-change", id="j", type=kind) for kind in ("stream", "commit")),
            verb("block-job-change", id="j", type="mirror", **{"copy_mode": "background"}),
            *(verb("block-job-set-speed", device="j", speed=speed) for speed in (-1, 1)),
            verb("block-job-pause", device="j"),
            verb("block-job-pause", device="j"),
            verb("job-pause", id="j"),
            BLOCK_JOBS,
            verb("block-job-cancel", device="j"),
            verb("block-job-set-speed", device="j", speed=0),
            verb("block-job-change", id="j", type="stream"),
            BLOCK_JOBS,
            verb("block-job-resume", "pending", device="j"),
            BLOCK_JOBS,
            *(verb(f"block-job-{name}", device="j") for name in ("complete", "resume", "pause")),
            verb("block-job-set-speed", device="j", speed=1),
            verb("block-job-dismiss", id="j"),
            GRAPH,
            verb("block-job-finalize", "concluded", id="j"),
            BLOCK_JOBS,
            *(verb(f"block-job-{name}", device="j") for name in ("complete", "resume", "pause", "cancel")),
            verb("block-job-finalize", id="j"),
            verb("block-job-set-speed", device="j", speed=1),
            delete("low"),
            delete("top"),
            verb("block-job-dismiss", id="j"),
            verb("block-job-dismiss", id="j"),
            FLAT,
            GRAPH,
        ],
    ),
    Session(
        "stream-cancel",
        [
            MAKE,
            *NAMED,
            *(
                step
                for name, more in (
                    ("block-job-cancel", {"device": "j"}),
                    ("block-job-cancel", {"device": "j", "force": True}),
                    ("job-cancel", {"id": "j"}),
                )
                for step in (
                    job(STREAM, "running", device="top", speed=1),
                    verb(name, "null", **more),
                    FLAT,
                    job(STREAM, "pending", device="top", base_node="mid", auto_finalize=False, auto_dismiss=False),
                    verb(name, "concluded", **more),
                    JOBS,
                    BLOCK_JOBS,
                    verb("job-dismiss", id="j"),
                    FLAT,
                )
            ),
            *CLOSE,
            same("top.qcow2", "qcow2", "full.raw", "raw"),
        ],
    ),
    Session(
        "stream-busy",
        [
            MAKE,
            *NAMED,
            SLOW,
            *(
                verb(STREAM, job_id="k", **kw)
                for kw in (
                    {"device": "top", "base_node": "mid"},
                    {"device": "cor", "base_node": "mid"},
                    {"device": "low", "base_node": "base"},
                    {"device": "low"},
                )
            ),
            verb(STREAM, job_id="j", device="mid"),
            *(delete(name) for name in ("low", "cor", "top")),
            *(reopen("top", backing=backing) for backing in (None, "mid", "low")),
            *(reopen("low", backing=backing) for backing in ("base", "mid")),
            *(
                cmd("blockdev-snapshot-sync", node_name=name, snapshot_file="s.qcow2", snapshot_node_name="s")
                for name in ("top", "cor", "low")
            ),
            cmd("block_resize", node_name="top", size=4 << 20),
            cmd("block_resize", node_name="cor", size=4 << 20),
            verb("block-job-set-speed", "pending", device="j", speed=0),
            verb("block-job-finalize", "concluded", id="j"),
        ],
    ),
    Session(
        "stream-implicit",
        [
            MAKE,
            *NAMED,
            job(STREAM, "running", device="low", speed=1),
            NODES,
            GRAPH,
            *(reopen("top", backing=backing) for backing in ("low", None, "mid")),
            verb("job-cancel", "null", id="j"),
            job(STREAM, "running", device="low", speed=1, filter_node_name="cor"),
            NODES,
            *(reopen("top", backing=backing) for backing in ("cor", "low", None, "mid")),
            verb("job-cancel", "null", id="j"),
            NODES,
            GRAPH,
        ],
    ),
    errors_session("read", "low", "read_aio", 5, True),
    errors_session("read-always", "low", "read_aio", 5, False),
    errors_session("write", "top", "write_aio", 5, True),
    errors_session("write-always", "top", "write_aio", 5, False),
    errors_session("full", "top", "write_aio", 28, True),
    errors_session("full-always", "top", "write_aio", 28, False),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, tmp_path: Path) -> None:
    check_session(session, tmp_path, tmp_path)
