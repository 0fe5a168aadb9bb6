"""Differential: block-commit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.test_commit import Chain
from tests.support import images, peers
from tests.support.daemon import DaemonProcess
from tests.support.images import MiB
from tests.system.differential import Context, Do, Session, add, check_session, cmd, delete

SIZE = 8 * MiB
NAMES = ("base", "m1", "m2", "m3", "top")
GRAPH = cmd("x-debug-query-block-graph")
JOBS = cmd("query-jobs")
BLOCK_JOBS = cmd("query-block-jobs")


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base ← m1 ← m2 ← m3 ← top, and fork over m2; the base is the smallest. A chain that is named in all ways."""
    root = tmp_path_factory.mktemp("chains")
    below = None
    for name in NAMES:
        size = SIZE // 2 if name == "base" else SIZE
        images.create(f"{name}.qcow2", size, "qcow2", "", below, "qcow2", root)
        below = f"{name}.qcow2"
    images.create("fork.qcow2", SIZE, "qcow2", "", "m2.qcow2", "qcow2", root)
    images.create("ov.qcow2", SIZE, "qcow2", "", None, "qcow2", root)
    images.io("base.qcow2", "write -P 1 0 1M", "write -P 2 2M 64k", cwd=root)
    images.io("m1.qcow2", "write -P 3 512k 1M", "write -P 4 5M 2M", cwd=root)
    images.io("m2.qcow2", "write -P 5 1M 1M", cwd=root)
    images.io("m3.qcow2", "write -P 6 1280k 64k", cwd=root)
    images.io("top.qcow2", "write -P 7 0 64k", cwd=root)
    for name in ("s", "o"):
        (root / name).mkdir()
    images.create("s/r.img", MiB, "raw", "", None, "raw", root)
    images.create("s/base.qcow2", MiB, "qcow2", "", "r.img", "raw", root)
    images.create("o/n1.qcow2", MiB, "qcow2", "", "../s/base.qcow2", "qcow2", root)
    inner = json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": "o/n1.qcow2"}})
    images.create("o/n2.qcow2", MiB, "qcow2", "", "json:" + inner, "qcow2", root)
    images.create("n3.qcow2", MiB, "qcow2", "", "file:o/n2.qcow2", "qcow2", root)
    images.create("ntop.qcow2", MiB, "qcow2", "", "n3.qcow2", "qcow2", root)
    return root


ALL = (*(f"{name}.qcow2" for name in NAMES), "fork.qcow2", "ov.qcow2", "s", "o", "n3.qcow2", "ntop.qcow2")
FILE = {"driver": "file", "filename": "s/r.img"}
INNER = 'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "o/n1.qcow2"}}'


def layer(name: str, backing: str | None, /, filename: str | None = None, **more: Any) -> dict[str, Any]:
    file = {"driver": "file", "filename": filename or f"{name}.qcow2", "node-name": f"{name}-file"}
    options = {"read_only": not name.endswith("top") and name != "fork", **more}
    return add(driver="qcow2", node_name=name, file=file, backing=backing, **options)


def stack(*names: str) -> list[dict[str, Any]]:
    return [layer(name, below) for name, below in zip(names, (None, *names[:-1]), strict=True)]


CHAIN = stack(*NAMES)


def reopen(name: str, backing: str | None, **more: Any) -> dict[str, Any]:
    options = {"driver": "qcow2", "node-name": name, "file": f"{name}-file", "backing": backing, **more}
    return cmd("blockdev-reopen", options=[options])


def commit(**arguments: Any) -> dict[str, Any]:
    return cmd("block-commit", **{"job_id": "j", "device": "top", **arguments})


MIDDLE = {"top_node": "m2", "base_node": "base"}


def until(status: str, event: str | None = None) -> Do:
    """Waits for a state of the job, and gives the events until then but for those that drains lead to."""

    def run(context: Context) -> Any:
        qmp = context.daemon.qmp
        seen = []
        while True:
            seen += [taken for taken in qmp.events if not _drained(taken)]
            qmp.events.clear()
            if any(one["event"] == (event or "JOB_STATUS_CHANGE") and _is(one, status) for one in seen):
                return seen
            try:
                message = qmp.message()
            except TimeoutError:
                raise AssertionError(f"only {seen}") from None
            assert "event" in message
            qmp.events.append(message)

    return Do(f"until {event or status}", run)


def _is(event: dict[str, Any], status: str) -> bool:
    return event["event"] != "JOB_STATUS_CHANGE" or event["data"]["status"] == status


def _drained(event: dict[str, Any]) -> bool:
    """Graph changes drain in different numbers of steps, and each may pause the job."""
    if event["event"] == "NODE_UPDATED" or event["event"] == "JOB_STATUS_CHANGE":
        return event["data"].get("status") in ("paused", "running", "standby")
    return False


def image(name: str) -> Do:
    """What qemu-img tells about an image in use: its header, and what it has, but not where, nor in which way (zeroes
    that go into the base are zeroes there, for which QSD may write them as data)."""

    def run(context: Context) -> Any:
        path = context.workdir / name
        info = images.info(path, "-U")
        entries = peers.run("qemu-img", "map", "-U", "--output=json", path).stdout
        parts: list[Any] = []
        for entry in json.loads(entries):
            part = [entry["start"], entry["start"] + entry["length"], entry["depth"], entry["present"]]
            if parts and parts[-1][2:] == part[2:] and parts[-1][1] == part[0]:
                parts[-1][1] = part[1]
            else:
                parts.append(part)
        return {key: info.get(key) for key in ("virtual-size", "backing-filename", "backing-filename-format")}, parts

    return Do(f"image {name}", run)


def nodes() -> Do:
    """query-named-block-nodes without what depends on how much is written at once."""

    def run(context: Context) -> Any:
        found = context.daemon.qmp.execute("query-named-block-nodes", flat=True)
        for node in found:
            del node["image"]["actual-size"]
            if node["drv"] == "file":
                del node["image"]["virtual-size"]
        return found

    return Do("nodes", run)


def faulty(rules: dict[str, Any], target: str) -> list[dict[str, Any]]:
    """base ← m1 ← top, where one of the first two fails once."""
    steps = []
    for name, below in (("base", None), ("m1", "base")):
        file: dict[str, Any] = {"driver": "file", "filename": f"{name}.qcow2"}
        if name == target:
            file = {"driver": "blkdebug", "image": file, "inject-error": [{"once": True, **rules}]}
        steps.append(add(driver="qcow2", node_name=name, read_only=True, file=file, backing=below))
    return [*steps, layer("top", "m1")]


def policy(name: str, target: str, **rules: Any) -> Session:
    """What each policy makes of a fault. Where something else goes on at the same time, progress differs."""
    steps: list[Any] = []
    for on_error in ("report", "ignore", "enospc", "stop", "auto"):
        stops = on_error == "stop" or (on_error in ("enospc", "auto") and rules["errno"] == 28)
        steps += [
            *faulty(rules, target),
            commit(top_node="m1", base_node="base", on_error=on_error, auto_dismiss=False),
        ]
        if stops:
            steps += [PAUSED, Do("io-status", _io_status), cmd("job-resume", id="j")]
        steps += [CONCLUDED, Do("how it ended", _ended), cmd("job-dismiss", id="j")]
        steps += [delete(node) for node in ("top", "m1", "base")]
    # What a job that fails has copied until then is another thing.
    steps.append(image("base.qcow2"))
    return Session(f"commit-{name}", steps, images=ALL, compare_events=False)


def _concluded(context: Context) -> Any:
    qmp = context.daemon.qmp
    qmp.wait_event("JOB_STATUS_CHANGE", match=lambda event: event["data"]["status"] == "concluded")
    seen = [(event["event"], event["data"].get("action")) for event in qmp.events if not _drained(event)]
    qmp.events.clear()
    return seen


def _paused(context: Context) -> None:
    context.daemon.qmp.wait_event("BLOCK_JOB_ERROR")
    context.daemon.qmp.wait_event("JOB_STATUS_CHANGE", match=lambda event: event["data"]["status"] == "paused")


def _io_status(context: Context) -> Any:
    return [(job["io-status"], job["paused"], job["busy"]) for job in context.daemon.qmp.execute("query-block-jobs")]


def _ended(context: Context) -> Any:
    return [job.get("error") for job in context.daemon.qmp.execute("query-jobs")]


def _gone(context: Context) -> None:
    context.daemon.qmp.wait_event("JOB_STATUS_CHANGE", match=lambda event: event["data"]["status"] == "null")


GONE = Do("gone", _gone)
CONCLUDED = Do("concluded", _concluded)
PAUSED = Do("paused", _paused)

FILENAMES = [
    *("n3.qcow2", "./n3.qcow2", "s/../n3.qcow2", "file:n3.qcow2", "n2.qcow2", "o/n2.qcow2", "file:o/n2.qcow2"),
    *("file:./o/n2.qcow2", "o/../o/n2.qcow2", "n1.qcow2", "o/n1.qcow2", INNER, 'json:{"driver":"qcow2"}'),
    *("base.qcow2", "s/base.qcow2", "../s/base.qcow2", "../o/../s/base.qcow2", "r.img", "s/r.img", "", "ntop.qcow2"),
    *("./ntop.qcow2", "n3", "other.img", "/", "/" + "x" * 5000),
]


def _header(context: Context) -> Any:
    """The names in the header of an image whose backing file may not exist."""
    return peers.run("strings", "-n", "3", context.workdir / "o/n2.qcow2").stdout


#: What a commit may go down into, with the names that it has.
BASES: list[dict[str, Any]] = [
    {"driver": "raw", "file": FILE},
    FILE,
    {"driver": "raw", "file": FILE, "size": MiB},
    {"driver": "null-co", "size": MiB},
    {"driver": "compress", "file": {"driver": "qcow2", "file": {"driver": "file", "filename": "s/base.qcow2"}}},
    {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": "s/base.qcow2"},
        "backing": {"driver": "raw", "file": FILE},
        "read_only": True,
    },
]

#: The chain with filters: f0 over the base, f2 over m2, ftop over all. (With one as the top of a commit, QSD hangs.)
FILTERED = [
    layer("base", None, "ov.qcow2"),
    add(driver="compress", node_name="f0", file="base", read_only=True),
    layer("m1", "f0"),
    layer("m2", "m1"),
    add(driver="compress", node_name="f2", file="m2", read_only=True),
    layer("m3", "f2"),
    layer("top", "m3"),
    add(driver="compress", node_name="ftop", file="top"),
]

SESSIONS = [
    Session(
        "commit-mistakes",
        [
            *CHAIN,
            commit(top_node="m2", base_node="m2"),
            commit(device="nosuch"),
            commit(device="m2"),
            commit(device=""),
            commit(device="nosuch", top_node="x", base_node="y"),
            commit(top_node="m1", base_node="m2"),
            commit(top_node="nosuch", base_node="m2"),
            commit(top_node="m2", base_node="nosuch"),
            commit(top_node="nosuch", base_node="nosuch"),
            commit(top_node="base"),
            commit(top_node="base-file"),
            commit(top_node="m1", base_node="base-file"),
            commit(top="m1.qcow2", top_node="m1"),
            commit(base="m1.qcow2", base_node="m1"),
            commit(top="nosuch", top_node="nosuch", base="nosuch", base_node="nosuch"),
            commit(top="nosuch.qcow2"),
            commit(base="nosuch.qcow2"),
            commit(top="m2", base="base"),
            commit(base="top.qcow2"),
            commit(base_node="top"),
            commit(top_node="top", base_node="top"),
            commit(top_node="base", base_node="base"),
            commit(top_node="m1", speed=-1),
            commit(top_node="m1", speed=-1, filter_node_name="1x"),
            commit(top_node="m1", filter_node_name="m1"),
            commit(top_node="m1", filter_node_name="1x"),
            commit(top_node="m1", filter_node_name=""),
            commit(top_node="m1", filter_node_name="a" * 40),
            commit(top_node="m1", job_id="1x"),
            commit(top_node="m1", job_id=""),
            cmd("block-commit", device="top", top_node="m1"),
            cmd("block-commit", job_id="j", top_node="m1"),
            commit(top_node="m1", on_error="nosuch"),
            commit(top_node="m1", job_id=3),
            commit(top_node="m1", speed="x"),
            commit(top_node="m1", backing_mask_protocol=1),
            commit(top_node="m1", auto_finalize="x"),
            commit(top_node="m1", nosuch=1),
            commit(base_node="base", backing_file="x"),
            commit(top_node="top", base_node="base", backing_file="x"),
            GRAPH,
            JOBS,
        ],
        images=ALL,
    ),
    Session(
        "commit-whole",
        [
            *CHAIN,
            commit(**MIDDLE, auto_finalize=False, auto_dismiss=False, filter_node_name="flt"),
            until("pending", "BLOCK_JOB_PENDING"),
            GRAPH,
            nodes(),
            JOBS,
            BLOCK_JOBS,
            cmd("job-finalize", id="j"),
            until("concluded"),
            GRAPH,
            JOBS,
            BLOCK_JOBS,
            delete("m2"),
            cmd("job-dismiss", id="j"),
            until("null"),
            GRAPH,
            delete("m2"),
            delete("m1"),
            image("base.qcow2"),
            image("m3.qcow2"),
            image("top.qcow2"),
        ],
        images=ALL,
    ),
    Session(
        "commit-dismissed-by-itself",
        [*CHAIN, commit(**MIDDLE), until("null"), GRAPH, JOBS, image("m3.qcow2"), image("base.qcow2")],
        images=ALL,
    ),
    Session(
        "commit-one-layer",
        [
            *CHAIN,
            commit(top_node="m2", base_node="m1", auto_finalize=False, backing_file="a/b"),
            until("pending", "BLOCK_JOB_PENDING"),
            GRAPH,
            cmd("job-finalize", id="j"),
            until("null"),
            GRAPH,
            nodes(),
            image("m1.qcow2"),
        ],
        images=ALL,
    ),
    Session(
        "commit-cancelled-while-pending",
        [
            *CHAIN,
            commit(**MIDDLE, auto_finalize=False, auto_dismiss=False, backing_file="x"),
            until("pending", "BLOCK_JOB_PENDING"),
            cmd("job-cancel", id="j"),
            until("concluded"),
            JOBS,
            BLOCK_JOBS,
            GRAPH,
            cmd("job-dismiss", id="j"),
            GRAPH,
            image("m3.qcow2"),
        ],
        images=ALL,
    ),
    Session(
        "commit-cancelled",
        [
            *CHAIN,
            commit(**MIDDLE, speed=1, auto_dismiss=False, filter_node_name="flt"),
            cmd("job-complete", id="j"),
            cmd("job-finalize", id="j"),
            cmd("job-dismiss", id="j"),
            cmd("job-pause", id="j"),
            cmd("job-pause", id="j"),
            cmd("job-resume", id="j"),
            cmd("block-job-set-speed", device="j", speed=2),
            cmd("block-job-set-speed", device="j", speed=-2),
            cmd("block-job-cancel", device="j", force=True),
            CONCLUDED,
            GRAPH,
        ],
        images=ALL,
        compare_events=False,
    ),
    Session(
        "commit-in-the-way",
        [
            *CHAIN,
            layer("ov", None, read_only=False),
            NBD := cmd("nbd-server-start", addr={"type": "unix", "data": {"path": "n.sock"}}),
            cmd("block-export-add", type="nbd", id="e", node_name="top", writable=True),
            commit(**MIDDLE, speed=1, filter_node_name="flt"),
            GRAPH,
            *(cmd("blockdev-snapshot", node=name, overlay="ov") for name in (*NAMES, "flt")),
            reopen("m2", "base", **{"read-only": True}),
            reopen("m2", None, **{"read-only": True}),
            reopen("m1", None, **{"read-only": True}),
            reopen("m3", "flt", **{"read-only": True}),
            reopen("base", None),
            reopen("base", None, **{"read-only": True}),
            reopen("m1", "base"),
            *(delete(name) for name in (*NAMES, "flt")),
            *(cmd("block_resize", node_name=name, size=MiB) for name in NAMES),
            cmd("change-backing-file", device="top", image_node_name="m2", backing_file="x"),
            cmd("change-backing-file", device="top", image_node_name="m3", backing_file="x"),
            cmd("blockdev-snapshot-internal-sync", device="m1", name="x"),
            cmd("blockdev-snapshot-sync", node_name="top", snapshot_file="new.qcow2", snapshot_node_name="new"),
            commit(job_id="k", **MIDDLE),
            commit(job_id="k", top_node="m3", base_node="m2"),
            commit(job_id="j", device="ov"),
            cmd("block-export-add", type="nbd", id="m1", node_name="m1"),
            cmd("block-export-add", type="nbd", id="m2", node_name="m2"),
            cmd("block-export-add", type="nbd", id="m3", node_name="m3"),
            cmd("block-export-add", type="nbd", id="base", node_name="base"),
            cmd("block-export-add", type="nbd", id="basew", node_name="base", writable=True),
            add(driver="raw", node_name="r", file="m2"),
            delete("r"),
            cmd("job-cancel", id="j"),
            until("null"),
            GRAPH,
        ],
        images=ALL,
        compare_events=False,
    ),
    Session(
        "commit-somebody-reads",
        [
            *CHAIN,
            NBD,
            cmd("block-export-add", type="nbd", id="e", node_name="m1"),
            commit(**MIDDLE),
            GRAPH,
            commit(top_node="m1", auto_finalize=False),
            until("pending", "BLOCK_JOB_PENDING"),
            GRAPH,
            cmd("job-finalize", id="j"),
            until("null"),
            GRAPH,
        ],
        images=ALL,
    ),
    Session(
        "commit-two-overlays",
        [
            *CHAIN,
            layer("fork", "m2"),
            commit(**MIDDLE, auto_finalize=False),
            until("pending", "BLOCK_JOB_PENDING"),
            GRAPH,
            commit(job_id="k", device="fork", top_node="m2", base_node="m1"),
            cmd("job-finalize", id="j"),
            until("null"),
            GRAPH,
            image("m3.qcow2"),
            image("fork.qcow2"),
        ],
        images=ALL,
    ),
    Session(
        "commit-several",
        [
            # Two chains have the same base, and one of them is not the other's business.
            *stack("base", "m1", "m2", "m3", "top"),
            layer("fork", "m2"),
            commit(job_id="k", device="fork", top_node="m2", base_node="m1", speed=1),
            commit(job_id="l", top_node="m3", base_node="m1", speed=1),
            commit(job_id="l", top_node="m3", base_node="m2", speed=1),
            commit(job_id="l", top_node="m1", base_node="base", speed=1),
            GRAPH,
            cmd("job-cancel", id="k"),
        ],
        images=ALL,
        compare_events=False,
    ),
    Session(
        "commit-two-at-once",
        [
            *CHAIN,
            layer("fork", "m2"),
            commit(job_id="k", device="fork", top_node="m1", base_node="base", speed=1, auto_dismiss=False),
            commit(job_id="l", top_node="m3", base_node="m2", speed=1, auto_dismiss=False),
            GRAPH,
            commit(job_id="n", device="fork", base_node="m2"),
            cmd("block-job-set-speed", device="l", speed=0),
            CONCLUDED,
            cmd("block-job-set-speed", device="k", speed=0),
            CONCLUDED,
            JOBS,
            GRAPH,
            cmd("job-dismiss", id="k"),
            cmd("job-dismiss", id="l"),
            GRAPH,
            nodes(),
            image("top.qcow2"),
            image("fork.qcow2"),
        ],
        images=ALL,
        compare_events=False,
    ),
    Session(
        "commit-filters",
        [
            *FILTERED,
            commit(device="ftop", top_node="f2", base_node="m2"),
            commit(device="ftop", top_node="f0", base_node="base"),
            commit(device="ftop", base_node="top"),
            commit(device="ftop", top_node="m2", base_node="f0"),
            commit(top_node="m2", base_node="m1"),
            Do("forget", lambda context: context.daemon.qmp.events.clear()),
            commit(device="ftop", top_node="m2", base_node="base", auto_finalize=False),
            until("pending", "BLOCK_JOB_PENDING"),
            GRAPH,
            cmd("job-finalize", id="j"),
            until("null"),
            GRAPH,
            nodes(),
        ],
        images=ALL,
        compare_events=False,
    ),
    Session(
        "commit-filter-and-a-base-that-has-to-grow",
        [
            layer("base", None),
            *FILTERED[1:],
            commit(device="ftop", top_node="m2", base_node="base"),
            commit(device="ftop", top_node="top", base_node="base"),
            GRAPH,
        ],
        images=ALL,
    ),
    Session(
        "active-commit-filters",
        [
            *FILTERED,
            commit(device="ftop", top_node="top", base_node="base"),
            until("ready", "BLOCK_JOB_READY"),
            GRAPH,
            cmd("job-complete", id="j"),
            until("null"),
            GRAPH,
            nodes(),
        ],
        images=ALL,
    ),
    Session(
        "commit-inactive",
        [
            *CHAIN,
            cmd("blockdev-set-active", active=False),
            commit(**MIDDLE),
            commit(base_node="m2"),
            GRAPH,
            cmd("blockdev-set-active", active=True),
            commit(**MIDDLE, speed=1),
            cmd("blockdev-set-active", active=False),
            cmd("blockdev-set-active", node_name="m2", active=False),
            cmd("blockdev-set-active", node_name="base", active=False),
            cmd("job-cancel", id="j"),
            GRAPH,
        ],
        images=ALL,
        compare_events=False,
    ),
    Session(
        "active-commit-whole",
        [
            *CHAIN,
            NBD,
            cmd("block-export-add", type="nbd", id="e", node_name="top", writable=True),
            commit(base_node="m1", filter_node_name="flt", auto_dismiss=False),
            until("ready", "BLOCK_JOB_READY"),
            GRAPH,
            nodes(),
            JOBS,
            BLOCK_JOBS,
            image("m1.qcow2"),
            cmd("job-complete", id="j"),
            until("concluded"),
            GRAPH,
            nodes(),
            JOBS,
            BLOCK_JOBS,
            image("m2.qcow2"),
            image("top.qcow2"),
            cmd("job-dismiss", id="j"),
            GRAPH,
            delete("top"),
            delete("m3"),
            delete("m2"),
            delete("m1"),
        ],
        images=ALL,
    ),
    Session(
        "active-commit-into-the-last",
        [
            *CHAIN,
            commit(auto_finalize=False),
            until("ready", "BLOCK_JOB_READY"),
            GRAPH,
            cmd("job-complete", id="j"),
            until("pending", "BLOCK_JOB_PENDING"),
            GRAPH,
            cmd("job-finalize", id="j"),
            until("null"),
            GRAPH,
            nodes(),
            image("base.qcow2"),
        ],
        images=ALL,
    ),
    Session(
        "active-commit-that-does-not-end",
        [
            *CHAIN,
            commit(base_node="m1", auto_dismiss=False),
            until("ready", "BLOCK_JOB_READY"),
            cmd("job-cancel", id="j"),
            until("concluded"),
            GRAPH,
            JOBS,
            cmd("job-dismiss", id="j"),
            Do("forget", lambda context: context.daemon.qmp.events.clear()),
            commit(base_node="m1"),
            until("ready", "BLOCK_JOB_READY"),
            # It ends here, and leaves the graph as it was.
            cmd("block-job-cancel", device="j"),
            until("null"),
            GRAPH,
            image("m1.qcow2"),
            image("top.qcow2"),
        ],
        images=ALL,
        compare_events=False,
    ),
    Session(
        "active-commit-in-the-way",
        [
            *CHAIN,
            layer("ov", None, read_only=False),
            commit(base_node="m1", filter_node_name="flt"),
            until("ready", "BLOCK_JOB_READY"),
            *(cmd("blockdev-snapshot", node=name, overlay="ov") for name in (*NAMES, "flt")),
            reopen("m2", "base", **{"read-only": True}),
            reopen("m2", None, **{"read-only": True}),
            reopen("m3", "m1", **{"read-only": True}),
            reopen("top", None),
            *(delete(name) for name in (*NAMES, "flt")),
            *(cmd("block_resize", node_name=name, size=MiB) for name in (*NAMES, "flt")),
            commit(job_id="k", base_node="m1"),
            commit(job_id="k", **MIDDLE),
            commit(job_id="k", device="flt"),
            commit(job_id="k", device="flt", top_node="m3", base_node="m2"),
            commit(job_id="j", device="ov"),
            cmd("job-finalize", id="j"),
            cmd("job-dismiss", id="j"),
            cmd("block-job-change", id="j", type="commit"),
            cmd("block-job-set-speed", device="j", speed=MiB),
            BLOCK_JOBS,
            cmd("job-cancel", id="j"),
            GONE,
            GRAPH,
        ],
        images=ALL,
        compare_events=False,
    ),
    Session(
        "active-commit-mistakes",
        [
            *CHAIN,
            commit(base_node="m1", speed=-1),
            commit(base_node="m1", filter_node_name="m2"),
            commit(base_node="m1", filter_node_name=""),
            commit(base_node="m1", job_id="1x"),
            commit(base_node="m1", job_id=""),
            cmd("block-commit", device="top"),
            commit(base_node="m1", on_error="nosuch"),
            commit(base_node="m1", auto_dismiss=1),
            NBD,
            cmd("block-export-add", type="nbd", id="e", node_name="m2"),
            commit(base_node="m1"),
            GRAPH,
            JOBS,
        ],
        images=ALL,
    ),
    Session(
        "active-commit-of-a-read-only-node",
        [
            layer("base", None),
            layer("m1", "base"),
            commit(device="m1", auto_dismiss=False),
            until("ready", "BLOCK_JOB_READY"),
            GRAPH,
            cmd("job-complete", id="j"),
            until("concluded"),
            GRAPH,
            JOBS,
        ],
        images=ALL,
    ),
    Session(
        "active-commit-of-a-layer-that-is-written-to",
        [
            layer("base", None),
            layer("m1", "base"),
            layer("m2", "m1", read_only=False),
            layer("m3", "m2", read_only=False),
            layer("top", "m3"),
            NBD,
            cmd("block-export-add", type="nbd", id="e", node_name="m2", writable=True),
            commit(top_node="m2", base_node="base", backing_file="x"),
            commit(top_node="m2", base_node="base"),
            until("ready", "BLOCK_JOB_READY"),
            GRAPH,
            cmd("job-complete", id="j"),
            until("null"),
            GRAPH,
            image("m3.qcow2"),
        ],
        images=ALL,
    ),
    Session(
        "active-commit-base-that-does-not-grow",
        [
            add(driver="null-co", node_name="base", size=MiB),
            layer("m1", "base"),
            layer("top", "m1"),
            commit(auto_dismiss=False),
            until("concluded"),
            JOBS,
            GRAPH,
        ],
        images=ALL,
    ),
    *(
        Session(
            f"active-commit-{name}",
            [
                *faulty(rules, target),
                commit(base_node="base", on_error="stop", auto_dismiss=False),
                PAUSED,
                Do("io-status", _io_status),
                cmd("job-resume", id="j"),
                until("ready", "BLOCK_JOB_READY"),
                cmd("job-complete", id="j"),
                CONCLUDED,
                Do("how it ended", _ended),
                image("base.qcow2"),
            ],
            images=ALL,
            compare_events=False,
        )
        for name, target, rules in (
            ("read", "m1", {"event": "read_aio", "errno": 5}),
            ("nospace", "base", {"event": "write_aio", "errno": 28}),
        )
    ),
    Session(
        "commit-base-that-stays-read-only",
        [
            add(driver="file", node_name="file", filename="base.qcow2", read_only=True),
            add(driver="qcow2", node_name="base", file="file", read_only=True),
            layer("m1", "base"),
            layer("top", "m1"),
            commit(top_node="m1", base_node="base"),
            GRAPH,
        ],
        images=ALL,
    ),
    *(
        Session(
            f"commit-base-that-does-not-grow-{name}",
            [
                add(node_name="base", read_only=name != "null", **options),
                layer("m1", "base"),
                layer("top", "m1"),
                commit(top_node="m1", base_node="base", auto_dismiss=False),
                until("concluded"),
                JOBS,
                cmd("job-dismiss", id="j"),
                GRAPH,
            ],
            images=ALL,
        )
        for name, options in (
            ("part", {"driver": "raw", "size": MiB, "file": {"driver": "file", "filename": "s/r.img"}}),
            ("null", {"driver": "null-co", "size": MiB}),
        )
    ),
    Session(
        "commit-backing-names",
        [
            step
            for more in ({}, {"backing_mask_protocol": True}, {"backing_mask_protocol": True, "backing_file": "q"})
            for options in BASES
            for step in (
                add(node_name="base", **options),
                layer("m1", "base", "o/n1.qcow2"),
                layer("top", "m1", "o/n2.qcow2"),
                commit(top_node="m1", base_node="base", **more),
                until("null"),
                Do("header", _header),
                nodes(),
                delete("top"),
                delete("m1"),
                delete("base"),
            )
        ],
        images=ALL,
        compare_events=False,
    ),
    Session(
        "commit-filenames",
        [
            add(driver="qcow2", node_name="top", file={"driver": "file", "filename": "ntop.qcow2"}),
            *(commit(top=name, base_node="top") for name in FILENAMES),
            *(commit(base=name, top="n3.qcow2", filter_node_name="0") for name in FILENAMES),
            *(commit(base=name, filter_node_name="0") for name in FILENAMES),
            commit(top="n3.qcow2", base="n2.qcow2"),
            Do("forget", lambda context: context.daemon.qmp.events.clear()),
            commit(top="file:o/n2.qcow2", base="../s/base.qcow2"),
            until("null"),
            nodes(),
        ],
        images=ALL,
    ),
    policy("read", "m1", event="read_aio", errno=5),
    policy("write", "base", event="write_aio", errno=5),
    policy("nospace", "base", event="write_aio", errno=28),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_same_as_qsd(session: Session, chains: Path, tmp_path: Path) -> None:
    check_session(session, chains, tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_same_content_as_qsd(seed: int, tmp_path: Path) -> None:
    """Random chains, with zeroes and holes and several formats: both leave the same in the base, and above it."""
    layers, base = 4, seed % 2
    found = []
    for kind in ("qsd", "pyqsd"):
        root = tmp_path / kind
        root.mkdir()
        chain = Chain(root, 500 + seed, layers, equal=True)
        with DaemonProcess(kind, workdir=root) as daemon:
            for index in range(layers):
                daemon.qmp.execute("blockdev-add", **chain.options(index))
            names = {"device": "n3", "top_node": "n2", "base_node": f"n{base}"}
            daemon.qmp.execute("block-commit", job_id="j", **names)
            daemon.qmp.wait_event("JOB_STATUS_CHANGE", match=lambda event: event["data"]["status"] == "null")
        for index in range(base + 1, layers - 1):
            (root / chain.names[index]).unlink()
        chain.models[base] = chain.models[2]
        chain.check(base)
        chain.check(3)
        info = images.info(root / chain.names[3])
        found.append([str(info.get(key)).replace(str(root), "") for key in sorted(info) if "backing" in key])
    assert found[0] == found[1]
