"""Differential: blockdev-create and the commands for jobs."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.system.differential import Context, Do, Session, add, check_session, cmd, delete

MiB = 1 << 20
QUERY = cmd("query-jobs")


def created(name: str, /, label: str = "", **options: Any) -> Do:
    """Makes an image and forgets the job: what the command answers, the states, and what query-jobs says."""
    members = {key.rstrip("_").replace("_", "-"): value for key, value in options.items()}

    def run(context: Context) -> Any:
        qmp = context.daemon.qmp
        before = len(qmp.events)
        reply = qmp.command("blockdev-create", **{"job-id": name, "options": members})
        if "error" in reply:
            return reply
        qmp.wait_event("JOB_STATUS_CHANGE", match=lambda event: event["data"]["status"] == "concluded")
        states = [event["data"]["status"] for event in qmp.events[before:] if event["event"] == "JOB_STATUS_CHANGE"]
        jobs = qmp.execute("query-jobs")
        qmp.execute("job-dismiss", id=name)
        del qmp.events[before:]
        return reply, states, jobs

    return Do(label or f"create {members}", run)


def concluded(name: str) -> Do:
    def run(context: Context) -> None:
        context.daemon.qmp.wait_event(
            "JOB_STATUS_CHANGE", match=lambda event: event["data"] == {"id": name, "status": "concluded"}
        )

    return Do(f"{name} concludes", run)


def qcow2(**options: Any) -> Do:
    return created("q", driver="qcow2", **{"file": "t", "size": MiB, **options})


def file(filename: str, **options: Any) -> Do:
    return created("f", driver="file", **{"filename": filename, "size": MiB, **options})


def start(name: str, **options: Any) -> dict[str, Any]:
    return cmd("blockdev-create", job_id=name, options=options)


def image(name: str) -> Do:
    """What qemu-img tells about an image."""

    def run(context: Context) -> Any:
        path = context.workdir / name
        info = images.info(path, "-U")
        for key in ("actual-size", "children"):
            info.pop(key, None)
        return info, path.stat().st_size

    return Do(f"qemu-img info {name}", run)


def content(name: str) -> Do:
    def run(context: Context) -> Any:
        data = (context.workdir / name).read_bytes()
        return len(data), data.strip(b"\0")[:100].hex()

    return Do(f"content of {name}", run)


def fifo(name: str) -> Do:
    return Do(f"mkfifo {name}", lambda context: os.mkfifo(context.workdir / name))


TARGET = [file("t.qcow2", size=0), add(driver="file", node_name="t", filename="t.qcow2")]
OTHER_NODES = [
    file("d.img", size=0),
    add(driver="file", node_name="d", filename="d.img"),
    add(driver="null-co", node_name="ro", read_only=True),
]
NBD_START = cmd("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}})
VERBS = ("cancel", "pause", "resume", "complete", "finalize", "dismiss")

#: Mistakes, each of which QSD refuses; in pairs they show in which order it looks.
MISTAKES: dict[str, dict[str, Any]] = {
    "size": {"size": 513},
    "cluster": {"cluster_size": 513},
    "preallocated overlay": {"preallocation": "metadata", "backing_file": "x"},
    "format only": {"backing_fmt": "raw"},
    "extended v2": {"version": "v2", "extended_l2": True},
    "extended small": {"extended_l2": True, "cluster_size": 512},
    "lazy v2": {"version": "v2", "lazy_refcounts": True},
    "refcount": {"refcount_bits": 3},
    "refcount v2": {"version": "v2", "refcount_bits": 8},
    "data file v2": {"version": "v2", "data_file": "d"},
    "raw without": {"data_file_raw": True},
    "raw overlay": {"data_file_raw": True, "data_file": "d", "backing_file": "x"},
    "zstd v2": {"version": "v2", "compression_type": "zstd"},
    "read-only": {"file": "ro"},
    "no data file": {"data_file": "nosuch"},
    "no key": {"encrypt": {"format": "luks"}},
    "no secret": {"encrypt": {"format": "qcow", "key-secret": "nosuch"}},
    "no file": {"file": "nosuch"},
}


def pairs() -> list[Do]:
    steps = []
    for one, other in itertools.combinations(MISTAKES, 2):
        a, b = MISTAKES[one], MISTAKES[other]
        if all(a[key] == b[key] for key in a.keys() & b.keys()):
            steps.append(qcow2(**a, **{key: value for key, value in b.items() if key not in a}))
    return steps


SESSIONS = [
    Session(
        "jobs-verbs",
        [
            QUERY,
            *(cmd(f"job-{verb}", id="j") for verb in VERBS),
            *(cmd(f"job-{verb}") for verb in VERBS),
            cmd("job-pause", id=1),
            cmd("job-cancel", id="j", force=True),
            start("j", driver="file", filename="a", size=MiB),
            concluded("j"),
            QUERY,
            *(cmd(f"job-{verb}", id="j") for verb in VERBS if verb != "dismiss"),
            start("j", driver="file", filename="b", size=MiB),
            start("k", driver="file", filename="no/such", size=MiB),
            concluded("k"),
            QUERY,
            *(cmd(f"job-{verb}", id="k") for verb in VERBS if verb != "dismiss"),
            cmd("job-dismiss", id="j"),
            QUERY,
            cmd("job-dismiss", id="j"),
            start("j", driver="file", filename="b", size=MiB),
            concluded("j"),
            QUERY,
            cmd("job-dismiss", id="k"),
        ],
    ),
    Session(
        "jobs-ids",
        [
            *(start(name, driver="file", filename="a", size=0) for name in ("", "1", "a b", "#a", "ä", "a/b", "-")),
            *(created(name, driver="file", filename="a", size=0) for name in ("a-._1", "Z" * 300)),
        ],
    ),
    Session(
        "create-arguments",
        [
            cmd("blockdev-create"),
            cmd("blockdev-create", job_id="j"),
            cmd("blockdev-create", options={"driver": "file"}),
            start("j"),
            start("j", driver="nosuch"),
            start("j", driver="file"),
            start("j", driver="file", filename="a"),
            start("j", driver="file", filename="a", size="1"),
            # Like 2^64 - 1.
            start("j", driver="file", filename="a", size=-1),
            concluded("j"),
            cmd("job-dismiss", id="j"),
            start("j", driver="file", filename="a", size=1, preallocation="some"),
            start("j", driver="file", filename="a", size=1, nosuch=1),
            start("j", driver="qcow2", size=1),
            start("j", driver="qcow2", file="a"),
            start("j", driver="qcow2", file=None, size=1),
            start("j", driver="qcow2", file={"driver": "nosuch"}, size=1),
            start("j", driver="qcow2", file="a", size=1, version=3),
            start("j", driver="qcow2", file="a", size=1, version="v1"),
            start("j", driver="qcow2", file="a", size=1, encrypt={}),
            start("j", driver="qcow2", file="a", size=1, encrypt={"format": "aes"}),
            start("j", driver="qcow2", file="a", size=1, **{"backing-fmt": "nosuch"}),
            start("j", driver="qcow2", file="a", size=1, **{"compression-type": "lzma"}),
            *(start("1", driver=driver) for driver in ("raw", "null-co", "null-aio", "host_device")),
            start("j", driver="raw", file="a"),
            QUERY,
        ],
    ),
    Session(
        "create-file",
        [
            file("a.img"),
            content("a.img"),
            *(file("a.img", size=size) for size in (0, 1, 513, 1 << 60, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)),
            content("a.img"),
            *(file("a.img", preallocation=mode) for mode in ("off", "metadata", "falloc", "full")),
            *(file("a.img", size=1 << 62, preallocation=mode) for mode in ("metadata", "falloc")),
            *(file("a.img", size=1 << 63, preallocation=mode) for mode in ("off", "metadata", "falloc", "full")),
            *(file("a.img", extent_size_hint=hint) for hint in (0, 65536, (1 << 32) - 4096, 1 << 32, (1 << 64) - 1)),
            file("no/such", extent_size_hint=1 << 32),
            file("a.img", nocow=True),
            *(file(name) for name in ("", ".", "no/such", "file:a.img", "/dev/null", "/dev/full")),
            fifo("fifo"),
            file("fifo"),
            file("raw.img", size=65536),
            content("raw.img"),
        ],
        images=("raw.img",),
    ),
    Session(
        "create-file-in-use",
        [
            file("a.img"),
            add(driver="file", node_name="a", filename="a.img"),
            file("a.img"),
            add(driver="raw", node_name="r", file="a"),
            file("a.img"),
            NBD_START,
            cmd("block-export-add", type="nbd", id="e", node_name="r", writable=False),
            file("a.img", size=512),
            cmd("block-export-del", id="e"),
            cmd("block-export-add", type="nbd", id="e", node_name="r", writable=True),
            file("a.img", size=512),
            content("a.img"),
            cmd("block-export-del", id="e"),
            file("a.img", size=512),
            content("a.img"),
        ],
    ),
    Session(
        "create-qcow2-mistakes",
        [
            *TARGET,
            *OTHER_NODES,
            *(qcow2(**how) for how in MISTAKES.values()),
            *(
                qcow2(size=size)
                for size in (1, (1 << 63) - 512, (1 << 64) - 512, 1 << 62, 1 << 55, (1 << 63) - (1 << 30))
            ),
            *(qcow2(cluster_size=size) for size in (0, 1, 256, 513, 4 * MiB, 1 << 63, (1 << 64) - 1)),
            *(qcow2(refcount_bits=bits) for bits in (0, -1, 3, 128, 65, (1 << 63) - 1)),
            qcow2(backing_file="x" * 1024),
            qcow2(backing_file="x" * 1024, backing_fmt="raw"),
            qcow2(backing_file="x" * 500, cluster_size=512, backing_fmt="raw"),
            qcow2(data_file={"driver": "null-co"}),
            qcow2(file={"driver": "null-co", "size": MiB}),
            qcow2(file={"driver": "null-co", "size": MiB, "read-zeroes": True}),
            qcow2(file={"driver": "file", "filename": "nosuch"}),
            qcow2(file={"driver": "file", "filename": "t.qcow2", "read-only": True}),
        ],
    ),
    Session("create-qcow2-order", [*TARGET, *OTHER_NODES, *pairs()]),
    Session(
        "create-qcow2-in-use",
        [
            *TARGET,
            qcow2(),
            add(driver="qcow2", node_name="q", file="t"),
            qcow2(),
            qcow2(file="q", size=65536),
            qcow2(file="q", size=65536, preallocation="metadata"),
            delete("q"),
            add(driver="qcow2", node_name="q", file="t", read_only=True),
            qcow2(),
            delete("q"),
            NBD_START,
            cmd("block-export-add", type="nbd", id="e", node_name="t", writable=True),
            qcow2(),
            cmd("block-export-del", id="e"),
            cmd("block-export-add", type="nbd", id="e", node_name="t"),
            qcow2(),
            cmd("block-export-del", id="e"),
            add(driver="raw", node_name="r", file="t"),
            qcow2(),
            qcow2(file="r"),
            delete("r"),
            add(driver="raw", node_name="r", file="t", size=65536),
            qcow2(file="r"),
            qcow2(file="r", cluster_size=4096),
            qcow2(file="r", cluster_size=4096, preallocation="metadata"),
            qcow2(file="r", cluster_size=4096, preallocation="falloc"),
            delete("r"),
            delete("t"),
            add(driver="file", node_name="t", filename="t.qcow2", read_only=True),
            qcow2(),
            delete("t"),
            add(driver="file", node_name="t", filename="t.qcow2", read_only=True, auto_read_only=True),
            qcow2(),
            delete("t"),
            add(driver="file", node_name="t", filename="t.qcow2", auto_read_only=True),
            qcow2(),
            delete("t"),
            qcow2(file={"driver": "file", "filename": "t.qcow2"}),
            image("t.qcow2"),
        ],
    ),
    Session(
        "create-qcow2-images",
        [
            *TARGET,
            *itertools.chain.from_iterable(
                (
                    file("n.qcow2", size=0),
                    qcow2(file={"driver": "file", "filename": "n.qcow2"}, **how),
                    image("n.qcow2"),
                )
                for how in (
                    {},
                    {"size": 0},
                    {"size": 1 << 50},
                    {"version": "v2"},
                    {"version": "v2", "backing_file": "raw.img", "backing_fmt": "raw"},
                    {"backing_file": ""},
                    {"backing_file": "raw.img"},
                    {"lazy_refcounts": True},
                    {"refcount_bits": 1},
                    {"compression_type": "zstd", "cluster_size": 2 * MiB},
                    {"extended_l2": True},
                    {"preallocation": "metadata"},
                    {"preallocation": "full", "cluster_size": 4096},
                )
            ),
            file("d.img"),
            qcow2(data_file={"driver": "file", "filename": "d.img"}),
            image("t.qcow2"),
            qcow2(data_file={"driver": "file", "filename": "d.img"}, data_file_raw=True),
            image("t.qcow2"),
        ],
        images=("raw.img",),
    ),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, image_set: Path, tmp_path: Path) -> None:
    check_session(session, image_set, tmp_path)
