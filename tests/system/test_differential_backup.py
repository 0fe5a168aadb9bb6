"""Differential: whole backup jobs. Replies, the order of events, the graph meanwhile, bitmaps, and what is copied."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import images, peers
from tests.system.differential import Context, Do, Session, add, check_session, cmd, delete
from tests.system.test_differential_filters import GRAPH, NBD_START, K, data, export, requests, unexport
from tests.system.test_differential_fleecing import NODES, bitmap, failing, image

MiB = 1 << 20
JOBS = cmd("query-jobs")
SET_ACTIVE = "blockdev-set-active"


def make(context: Context) -> None:
    def img(*argv: str) -> None:
        peers.run("qemu-img", "create", "-q", "-f", "qcow2", *argv, cwd=context.workdir)

    img("base.qcow2", "1M")
    peers.run("qemu-io", "-c", "write -P 8 0 700k", "base.qcow2", cwd=context.workdir)
    img("-b", "base.qcow2", "-F", "qcow2", "s.qcow2")
    writes = ("write -P 7 100k 100k", "write -z 320k 64k", "write -P 6 960k 64k")
    peers.run("qemu-io", *(word for write in writes for word in ("-c", write)), "s.qcow2", cwd=context.workdir)
    # One cluster, so that the first error is that of all of it.
    img("one.qcow2", "64k")
    peers.run("qemu-io", "-c", "write -P 5 0 64k", "one.qcow2", cwd=context.workdir)
    img("t.qcow2", "1M")
    img("u.qcow2", "1M")
    img("to.qcow2", "64k")
    img("-o", "cluster_size=512k", "large.qcow2", "1M")
    img("-b", "base.qcow2", "-F", "qcow2", "inc.qcow2")
    (context.workdir / "t.raw").write_bytes(bytes(MiB))


def start(**more: Any) -> dict[str, Any]:
    return cmd("blockdev-backup", **{"job_id": "j", "device": "s", "target": "t", "sync": "full", **more})


def until(status: str, id: str = "j") -> Do:
    def run(context: Context) -> None:
        context.daemon.qmp.wait_event(
            "JOB_STATUS_CHANGE", match=lambda event: event["data"] == {"id": id, "status": status}
        )

    return Do(f"{id} is {status}", run)


def backup(**more: Any) -> Do:
    """A job from its start to its end: the reply, and all events in order."""
    message = start(**more)

    def run(context: Context) -> Any:
        qmp = context.daemon.qmp
        before = len(qmp.events)
        reply = qmp.raw_command(message)
        if "error" not in reply:
            while not any(event["data"].get("status") == "null" for event in qmp.events[before:]):
                qmp.events.append(qmp.message())
        events = [[event["event"], event["data"]] for event in qmp.events[before:]]
        del qmp.events[before:]
        return reply, events

    return Do(f"backup {more}", run)


def _block_jobs(context: Context) -> Any:
    """Whether a job does something at the moment is a question of luck."""
    jobs = context.daemon.qmp.execute("query-block-jobs")
    for job in jobs:
        del job["busy"]
    return jobs


#: Events of jobs that have ended, so that nobody takes them for those of the next one.
FORGET = Do("forget", lambda context: context.daemon.qmp.events.clear())
BLOCK_JOBS = Do("block jobs", _block_jobs)


def bitmaps(*names: str) -> Do:
    def run(context: Context) -> Any:
        nodes = context.daemon.qmp.execute("query-named-block-nodes", flat=True)
        return {node["node-name"]: node.get("dirty-bitmaps") for node in nodes if node["node-name"] in names}

    return Do(f"bitmaps of {names}", run)


def content(name: str) -> Do:
    """What is in an image and where, after the node is closed."""

    def run(context: Context) -> Any:
        out = peers.run("qemu-img", "map", "--output=json", name, cwd=context.workdir).stdout
        extents: list[list[Any]] = []
        for extent in json.loads(out):
            kind = [extent["depth"], extent["zero"], extent["data"]]
            if extents and extents[-1][1] == kind:
                extents[-1][0] += extent["length"]
            else:
                extents.append([extent["length"], kind])
        peers.run("qemu-img", "convert", "-O", "raw", name, "content.raw", cwd=context.workdir)
        return extents, hash_of(context.workdir / "content.raw")

    return Do(f"content of {name}", run)


def only_content(name: str) -> Do:
    """The same without where: small writes to new clusters are not made in the same way."""
    whole = content(name)
    return Do(whole.label, lambda context: whole.action(context)[1])


def hash_of(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


START = [Do("make", make), NBD_START]
PAIR = [*START, image("s", discard="unmap"), image("t")]
#: Copies a cluster at a time, one in sixteen seconds.
SLOW: dict[str, Any] = {"speed": 4096, "x_perf": {"max-chunk": 65536, "max-workers": 1}}

#: Mistakes, each of which QSD refuses; in pairs they show in which order it looks.
MISTAKES: dict[str, dict[str, Any]] = {
    "device": {"device": "nosuch"},
    "target": {"target": "nosuch"},
    "same": {"target": "s"},
    "size": {"target": "one"},
    "blocked": {"target": "u"},
    "id": {"job_id": "-"},
    "used id": {"job_id": "k"},
    "no bitmap": {"sync": "bitmap"},
    "bitmap": {"bitmap": "nosuch"},
    "bitmap without mode": {"bitmap": "b"},
    "busy": {"bitmap": "busy", "bitmap_mode": "always"},
    "mode": {"bitmap_mode": "never"},
    "incremental": {"sync": "incremental", "bitmap": "b", "bitmap_mode": "always"},
    "none": {"sync": "none", "bitmap": "b", "bitmap_mode": "always"},
    "never": {"bitmap": "b", "bitmap_mode": "never"},
    "speed": {"speed": -1},
    "workers": {"x_perf": {"max-workers": 0}},
    "chunk": {"x_perf": {"max-chunk": -1}},
    "small chunk": {"x_perf": {"max-chunk": 4096}},
    "cluster": {"x_perf": {"min-cluster-size": 100}},
    "large cluster": {"x_perf": {"min-cluster-size": 1 << 63}},
    "filter": {"filter_node_name": "s"},
    "compress": {"compress": True, "target": "raw"},
}


def pairs() -> list[dict[str, Any]]:
    found = []
    for one, other in itertools.combinations(MISTAKES, 2):
        a, b = MISTAKES[one], MISTAKES[other]
        if all(a[key] == b[key] for key in a.keys() & b.keys()):
            found.append(start(**{**a, **b}))
    return found


def error_sessions() -> list[Session]:
    """Both ends, every policy, two kinds of errors; each of them once, so that going on works."""
    sessions = []
    for end, event in (("source", "read_aio"), ("target", "write_aio")):
        steps: list[Any] = []
        for number, policy in itertools.product((5, 28), ("report", "ignore", "stop", "enospc", "auto")):
            rule = {"event": event, "errno": number, "once": True}
            one = failing("one", rule) if end == "source" else image("one")
            to = failing("to", rule) if end == "target" else image("to")
            stops = policy == "stop" or (policy in ("enospc", "auto") and number == 28)
            options = {"device": "one", "target": "to", f"on_{end}_error": policy}
            steps += [one, to]
            if stops:
                steps += [
                    start(**options),
                    Do(
                        f"{end} {number} {policy}",
                        lambda context: context.daemon.qmp.wait_event("BLOCK_JOB_ERROR")["data"],
                    ),
                    Do("it stands still", wait_stopped),
                    BLOCK_JOBS,
                    cmd("job-resume", id="j"),
                    until("null"),
                ]
            else:
                steps.append(backup(**options))
            steps += [delete("one"), delete("to")]
        sessions.append(Session(f"backup-errors-{end}-{event}", [*START, *steps, content("to.qcow2")]))
    return sessions


def wait_stopped(context: Context) -> None:
    context.daemon.qmp.wait_event(
        "JOB_STATUS_CHANGE",
        match=lambda event: (
            event["data"]["status"] == "paused"
            and context.daemon.qmp.execute("query-block-jobs")[0]["io-status"] != "ok"
        ),
    )


def drive(target: str, **more: Any) -> Do:
    """A drive-backup job from its start to its end, and what the image is then."""
    message = cmd("drive-backup", **{"job_id": "j", "device": "s", "target": target, "sync": "full", **more})

    def run(context: Context) -> Any:
        qmp = context.daemon.qmp
        reply = qmp.raw_command(message)
        if "error" in reply:
            return reply
        end = qmp.wait_event("BLOCK_JOB_COMPLETED")["data"]
        qmp.wait_event("JOB_STATUS_CHANGE", match=lambda event: event["data"]["status"] == "null")
        info = images.info(context.workdir / target)
        return (
            reply,
            end,
            {key: info.get(key) for key in ("format", "virtual-size", "backing-filename", "cluster-size")},
        )

    return Do(f"drive-backup to {target} {more}", run)


def _own_nodes(context: Context) -> Any:
    nodes = context.daemon.qmp.execute("query-named-block-nodes", flat=True)
    keys = ("drv", "file", "ro", "detect_zeroes", "backing_file", "cache")
    return [{key: node.get(key) for key in keys} for node in nodes]


def pending(context: Context) -> None:
    """Until the job is, if there is one."""
    if context.daemon.qmp.execute("query-jobs"):
        context.daemon.qmp.wait_event("JOB_STATUS_CHANGE", match=lambda event: event["data"]["status"] == "pending")


def transaction(*actions: tuple[str, dict[str, Any]], **properties: Any) -> dict[str, Any]:
    wired = [
        {"type": kind, "data": {key.replace("_", "-"): value for key, value in options.items()}}
        for kind, options in actions
    ]
    return cmd("transaction", actions=wired, **({"properties": properties} if properties else {}))


def job(id: str, device: str, target: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return "blockdev-backup", {"job_id": id, "device": device, "target": target, "sync": "full", **more}


GROUPED = {"completion-mode": "grouped"}

SESSIONS = [
    Session(
        "backup-mistakes",
        [
            *PAIR,
            image("u"),
            add(driver="null-co", node_name="x", size=MiB),
            add(driver="file", node_name="raw", filename="t.raw"),
            image("one"),
            bitmap("s", "b"),
            bitmap("s", "busy"),
            start(job_id="k", target="u", sync="bitmap", bitmap="busy", bitmap_mode="never", auto_finalize=False),
            until("pending", "k"),
            *(start(**mistake) for mistake in MISTAKES.values()),
            *pairs(),
            start(on_source_error="x"),
            start(sync="x"),
            start(x_perf={"max-workers": 1 << 31}),
            start(x_perf={"max-workers": "1"}),
            start(x_perf={"min-cluster-size": (1 << 64) - 1}),
            cmd("blockdev-backup", job_id="j", device="s", target="t"),
            cmd("blockdev-backup", job_id="j", device="s", sync="full"),
            cmd("blockdev-backup", device="s", target="t", sync="full"),
            bitmaps("s"),
            JOBS,
            cmd("job-finalize", id="k"),
            bitmaps("s"),
        ],
        compare_events=False,
    ),
    Session(
        "backup-whole",
        [
            *PAIR,
            backup(),
            backup(sync="top"),
            backup(x_perf={"min-cluster-size": 1 << 24}),
            backup(x_perf={"max-workers": 1, "max-chunk": 1 << 30, "use-copy-range": True}),
            delete("t"),
            content("t.qcow2"),
            image("u"),
            backup(target="u", sync="top"),
            delete("u"),
            content("u.qcow2"),
            image("inc"),
            backup(target="inc", sync="top"),
            delete("inc"),
            content("inc.qcow2"),
            image("large"),
            backup(target="large", compress=True),
            delete("large"),
            content("large.qcow2"),
            add(driver="file", node_name="raw", filename="t.raw"),
            backup(target="raw"),
            backup(device="raw", target="raw2"),
            delete("raw"),
            Do("raw file", lambda context: hash_of(context.workdir / "t.raw")),
            add(driver="null-co", node_name="n", size=100 * K + 512),
            add(driver="null-co", node_name="n2", size=100 * K + 512, read_zeroes=True),
            backup(device="n", target="n2"),
            backup(device="n2", target="n", sync="top"),
            add(driver="null-co", node_name="empty", size=0),
            add(driver="null-co", node_name="empty2", size=0),
            backup(device="empty", target="empty2"),
            add(driver="qcow2", node_name="ro", read_only=True, file={"driver": "file", "filename": "u.qcow2"}),
            image("large"),
            backup(device="ro", target="large"),
            backup(device="large", target="ro"),
        ],
    ),
    Session(
        "backup-life",
        [
            *PAIR,
            start(auto_finalize=False, auto_dismiss=False, filter_node_name="f"),
            until("pending"),
            BLOCK_JOBS,
            JOBS,
            NODES,
            GRAPH,
            cmd("job-pause", id="j"),
            cmd("job-complete", id="j"),
            cmd("block-job-set-speed", device="j", speed=5),
            cmd("job-finalize", id="j"),
            BLOCK_JOBS,
            JOBS,
            cmd("job-dismiss", id="j"),
            GRAPH,
            start(auto_finalize=False),
            until("pending"),
            cmd("job-cancel", id="j"),
            until("null"),
            GRAPH,
            export("s"),
            FORGET,
            start(sync="none"),
            BLOCK_JOBS,
            NODES,
            requests("writes", "s", ("pwrite", 0, data(1, 200)), ("trim", 128 * K, 128 * K), ("zero", 400 * K, 64 * K)),
            BLOCK_JOBS,
            NODES,
            unexport("s"),
            cmd("job-cancel", id="j"),
            until("null"),
            start(sync="none", auto_dismiss=False),
            cmd("block-job-cancel", device="j"),
            until("concluded"),
            JOBS,
            cmd("job-dismiss", id="j"),
            FORGET,
            start(speed=4096),
            cmd("block-job-set-speed", device="j", speed=0),
            until("null"),
            delete("s"),
            delete("t"),
            content("s.qcow2"),
            content("t.qcow2"),
        ],
        compare_events=False,
    ),
    Session(
        "backup-while",
        [
            *PAIR,
            image("u"),
            export("s"),
            start(filter_node_name="f", **SLOW),
            GRAPH,
            start(),
            start(job_id="k", device="f", target="u"),
            start(job_id="k", target="f"),
            start(job_id="k", device="t", target="u"),
            start(job_id="k", device="u", target="s"),
            delete("f"),
            delete("s"),
            delete("t"),
            add(driver="raw", node_name="r", file="t"),
            add(driver="raw", node_name="r2", file="s"),
            add(driver="raw", node_name="r3", file="f"),
            cmd("block-export-add", type="nbd", id="e", node_name="s", writable=True, name="x"),
            cmd("block-export-add", type="nbd", id="e", node_name="t", name="x"),
            *(cmd("block_resize", node_name=name, size=2 * MiB) for name in "fst"),
            *(cmd("blockdev-snapshot", node=name, overlay="u") for name in "ft"),
            *(cmd(SET_ACTIVE, node_name=name, active=False) for name in "fst"),
            *(cmd("block-dirty-bitmap-add", node=name, name="b") for name in "fst"),
            cmd("blockdev-reopen", options=[{"driver": "raw", "node-name": "r2", "file": "s"}]),
            cmd("blockdev-reopen", options=[{"driver": "raw", "node-name": "r3", "file": "f"}]),
            cmd("blockdev-reopen", options=[{"driver": "raw", "node-name": "r3", "file": "s"}]),
            cmd("block-job-change", id="j", type="mirror", copy_mode="background"),
            cmd("job-complete", id="j"),
            cmd("job-finalize", id="j"),
            cmd("job-dismiss", id="j"),
            GRAPH,
            cmd("job-cancel", id="j"),
            until("null"),
            GRAPH,
        ],
        compare_events=False,
    ),
    Session(
        "backup-discard-source",
        [
            *PAIR,
            start(discard_source=True, auto_finalize=False),
            until("pending"),
            GRAPH,
            cmd("job-finalize", id="j"),
            export("s"),
            start(discard_source=True, sync="none"),
            GRAPH,
            requests("writes", "s", ("pwrite", 0, data(1, 200)), ("trim", 128 * K, 128 * K)),
            unexport("s"),
            cmd("job-cancel", id="j"),
            until("null"),
            delete("s"),
            delete("t"),
            only_content("s.qcow2"),
            content("t.qcow2"),
            add(driver="qcow2", node_name="ro", read_only=True, file={"driver": "file", "filename": "u.qcow2"}),
            image("t"),
            start(device="ro", discard_source=True),
        ],
        compare_events=False,
    ),
    *(
        Session(
            f"backup-bitmap-{mode}",
            [
                *PAIR,
                image("u"),
                failing("to", {"event": "write_aio", "errno": 5}),
                image("one"),
                bitmap("s", "fine", granularity=4096),
                bitmap("s", "coarse", granularity=1 << 20),
                bitmap("s", "off", disabled=True),
                bitmap("one", "b"),
                export("s"),
                export("one"),
                requests("changes", "s", ("pwrite", 70 * K, data(1, 10)), ("zero", 300 * K, 100 * K)),
                requests("changes one", "one", ("pwrite", 70, data(1, 10))),
                *(
                    step
                    for sync, name in itertools.product(("bitmap", "full", "top"), ("fine", "coarse", "off"))
                    for step in (
                        start(sync=sync, bitmap=name, bitmap_mode=mode, auto_finalize=False),
                        bitmaps("s"),
                        requests(f"meanwhile {sync} {name}", "s", ("pwrite", 500 * K, data(2, 70 * K))),
                        Do("until pending", pending),
                        bitmaps("s"),
                        BLOCK_JOBS,
                        *(
                            cmd(f"block-dirty-bitmap-{what}", node="s", name=name)
                            for what in ("clear", "remove", "disable", "enable")
                        ),
                        cmd("job-finalize", id="j"),
                        bitmaps("s"),
                        # The same, cancelled, and failing.
                        start(sync=sync, bitmap=name, bitmap_mode=mode, auto_finalize=False, target="u"),
                        Do("until pending again", pending),
                        cmd("job-cancel", id="j"),
                        bitmaps("s"),
                    )
                ),
                backup(device="one", target="to", sync="bitmap", bitmap="b", bitmap_mode=mode),
                bitmaps("one"),
                backup(device="one", target="to", sync="full", bitmap="b", bitmap_mode=mode),
                bitmaps("one"),
                backup(sync="incremental", bitmap="fine"),
                backup(sync="incremental", bitmap="fine", bitmap_mode="on-success"),
                bitmaps("s"),
            ],
            compare_events=False,
        )
        for mode in ("never", "on-success", "always")
    ),
    *error_sessions(),
    Session(
        "drive-backup",
        [
            *START,
            image("s", discard="unmap"),
            add(driver="file", node_name="raw", filename="t.raw"),
            drive("a.img"),
            drive("a.img", sync="top"),
            content("a.img"),
            drive("b.img", format="raw"),
            drive("b.img", format="raw", sync="top"),
            drive("b.img", format="nosuch"),
            drive("b.img", mode="nosuch"),
            drive("b.img", compress=True, format="raw"),
            drive("c.img", compress=True),
            content("c.img"),
            drive("nosuch.img", mode="existing"),
            drive("t.qcow2", mode="existing"),
            drive("u.qcow2", mode="existing", format="qcow2"),
            drive("u.qcow2", mode="existing", format="raw"),
            drive("inc.qcow2", mode="existing", sync="top"),
            content("inc.qcow2"),
            drive("no/such"),
            drive(""),
            drive("d.img", device="nosuch"),
            drive("d.img", device="raw"),
            drive("d.img", device="raw", format="qcow2", sync="top"),
            content("d.img"),
            drive("e.img", job_id="-"),
            drive("e.img", sync="bitmap", bitmap="nosuch", bitmap_mode="never"),
            drive("e.img", job_id=None),
            cmd("drive-backup", job_id="j", device="s", target="f.img", sync="none"),
            GRAPH,
            Do("nodes of a drive-backup", _own_nodes),
            cmd("job-cancel", id="j"),
            until("null", "j"),
            transaction(
                ("drive-backup", {"job_id": "g", "device": "s", "target": "g.img", "sync": "full"}),
                ("drive-backup", {"job_id": "h", "device": "raw", "target": "h.img", "sync": "full"}),
                **GROUPED,
            ),
            until("null", "g"),
            until("null", "h"),
            content("g.img"),
            transaction(
                ("drive-backup", {"job_id": "k", "device": "s", "target": "k.img", "sync": "full"}), ("abort", {})
            ),
            GRAPH,
            JOBS,
        ],
        compare_events=False,
    ),
    Session(
        "backup-transaction",
        [
            *PAIR,
            image("u"),
            image("one"),
            image("to"),
            bitmap("s", "b"),
            bitmap("one", "b"),
            transaction(job("j", "s", "t"), ("abort", {})),
            GRAPH,
            transaction(job("j", "s", "t", sync="bitmap", bitmap="b", bitmap_mode="never"), job("k", "one", "t")),
            bitmaps("s"),
            JOBS,
            transaction(job("j", "s", "t"), job("j", "one", "to")),
            transaction(job("j", "s", "t"), job("k", "s", "u"), job("l", "one", "to", auto_dismiss=False)),
            until("null", "j"),
            until("null", "k"),
            until("concluded", "l"),
            JOBS,
            cmd("job-dismiss", id="l"),
            transaction(
                ("block-dirty-bitmap-clear", {"node": "s", "name": "b"}),
                ("block-dirty-bitmap-add", {"node": "s", "name": "c"}),
                job("m", "s", "t", auto_finalize=False),
            ),
            until("pending", "m"),
            cmd("job-finalize", id="m"),
            bitmaps("s"),
            transaction(job("n", "s", "t", auto_finalize=False), job("o", "one", "to"), **GROUPED),
            until("pending", "n"),
            until("pending", "o"),
            BLOCK_JOBS,
            cmd("job-finalize", id="o"),
            JOBS,
            transaction(
                job("p", "s", "t", sync="incremental", bitmap="b"),
                job("q", "one", "to", sync="incremental", bitmap="b", auto_finalize=False),
                **GROUPED,
            ),
            until("pending", "q"),
            cmd("job-cancel", id="q"),
            JOBS,
            bitmaps("s", "one"),
            GRAPH,
            transaction(("block-dirty-bitmap-clear", {"node": "s", "name": "b"}), job("j", "s", "t"), **GROUPED),
        ],
        compare_events=False,
    ),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, tmp_path: Path) -> None:
    check_session(session, tmp_path, tmp_path)
