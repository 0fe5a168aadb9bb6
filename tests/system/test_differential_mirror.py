"""Differential: blockdev-mirror and drive-mirror."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.nbd import NbdClient
from tests.system.differential import Context, Do, Event, Session, add, check_session, cmd, delete
from tests.system.test_differential_blockdev import NBD_START, export, file
from tests.system.test_differential_graph import SHOW

KiB, MiB = images.KiB, images.MiB
JOBS = cmd("query-block-jobs")
QUERY = (JOBS, cmd("query-jobs"))
READY = Event("BLOCK_JOB_READY")
COMPLETED = Event("BLOCK_JOB_COMPLETED")
CANCELLED = Event("BLOCK_JOB_CANCELLED")


def mirror(device: str = "a", target: str = "b", sync: str = "full", **more: Any) -> dict[str, Any]:
    return cmd("blockdev-mirror", **{"job_id": "j", "device": device, "target": target, "sync": sync, **more})


def drive(device: str = "a", target: str = "x.img", sync: str = "full", **more: Any) -> dict[str, Any]:
    return cmd("drive-mirror", **{"job_id": "j", "device": device, "target": target, "sync": sync, **more})


def verb(name: str, **more: Any) -> dict[str, Any]:
    return cmd(f"job-{name}", id_="j", **more)


def block_verb(name: str, **more: Any) -> dict[str, Any]:
    return cmd(f"block-job-{name}", device="j", **more)


def change(mode: str = "write-blocking", kind: str = "mirror", **more: Any) -> dict[str, Any]:
    return cmd("block-job-change", **{"id_": "j", "type": kind, "copy_mode": mode, **more})


def sized(name: str, size: int, **more: Any) -> list[Any]:
    """A node of a new empty file of this size."""

    def run(context: Context) -> None:
        with open(context.workdir / name, "wb") as stream:
            stream.truncate(size)

    return [Do(f"make {name}", run), add(node_name=name, **file(name), **more)]


def fill(name: str, byte: int = 0x77) -> Do:
    def run(context: Context) -> None:
        with open(context.workdir / name, "r+b") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            stream.write(bytes([byte]) * size)

    return Do(f"fill {name}", run)


def content(name: str) -> Do:
    def run(context: Context) -> Any:
        data = (context.workdir / name).read_bytes()
        return len(data), [(key, len(list(group))) for key, group in itertools.groupby(data)][:20]

    return Do(f"content of {name}", run)


def info(name: str) -> Do:
    def run(context: Context) -> Any:
        told = images.info(context.workdir / name, "-U")
        return {key: told.get(key) for key in ("format", "virtual-size", "backing-filename", "backing-filename-format")}

    return Do(f"qemu-img info {name}", run)


def client(name: str, what: str, action: Any) -> Do:
    def run(context: Context) -> Any:
        with NbdClient(context.workdir / "nbd.sock", name) as nbd:
            result = action(nbd)
            nbd.disconnect()
        return result

    return Do(f"{name}: {what}", run)


def status(word: str) -> Do:
    """Until the job has this state."""

    def run(context: Context) -> None:
        context.daemon.qmp.wait_event("JOB_STATUS_CHANGE", match=lambda event: event["data"]["status"] == word)

    return Do(f"until {word}", run)


def ab(size: int = MiB) -> list[Any]:
    return [*sized("a", size), *sized("b", size)]


OPTION_ERRORS: list[Any] = [
    mirror("nosuch"),
    mirror(target="nosuch"),
    mirror("a", "a"),
    cmd("blockdev-mirror", device="a", target="b", sync="full"),
    cmd("blockdev-mirror", job_id="j", target="b", sync="full"),
    cmd("blockdev-mirror", job_id="j", device="a", target="b"),
    mirror(job_id="#j"),
    mirror(sync="nosuch"),
    mirror(sync="incremental"),
    mirror(sync="bitmap"),
    *(mirror(granularity=value) for value in (1, 511, 513, 1000, 1 << 27, 3 << 20, -1, 1 << 32)),
    mirror(buf_size=-1),
    mirror(speed=-1),
    mirror(copy_mode="nosuch"),
    mirror(on_source_error="nosuch"),
    mirror(on_target_error="nosuch"),
    mirror(replaces="nosuch"),
    mirror(replaces="b"),
    mirror(replaces="c"),
    mirror(filter_node_name="a"),
    mirror(filter_node_name="#a"),
    mirror(filter_node_name="n" * 32),
    mirror(unmap=True),
    mirror(target_is_zero=True),
    mirror(target="ro"),
    mirror("below", "b"),
    # Which of two mistakes is told.
    mirror("nosuch", "nosuch"),
    mirror(target="nosuch", granularity=1),
    mirror(granularity=1, buf_size=-1),
    mirror(granularity=513, replaces="nosuch"),
    mirror(replaces="nosuch", sync="bitmap"),
    mirror(sync="bitmap", buf_size=-1),
    mirror("a", "a", buf_size=-1),
    mirror("a", "a", filter_node_name="#"),
    mirror(filter_node_name="#", job_id="#"),
    mirror(job_id="#", speed=-1),
    mirror(speed=-1, target="ro"),
    mirror("a", "a", sync="incremental"),
    *QUERY,
    *SHOW,
]

DRIVE_ERRORS: list[Any] = [
    drive("nosuch"),
    cmd("drive-mirror", device="a", target="x", sync="full"),
    drive(format="nosuch"),
    drive(target="nodir/x"),
    drive(target=""),
    drive(target="nosuch.img", mode="existing"),
    drive(mode="nosuch"),
    drive(target="raw.img", mode="existing", format="qcow2"),
    drive(replaces="a"),
    drive(replaces="nosuch", node_name="n"),
    drive(replaces="c", node_name="n"),
    drive(format="raw", node_name="a"),
    drive(format="raw", node_name="#"),
    drive(format="raw", granularity=3),
    drive(format="raw", buf_size=-3),
    drive(format="raw", speed=-3),
    drive(format="raw", sync="incremental"),
    drive(format="raw", job_id="#"),
    drive(format="raw", sync="none"),
    drive("below"),
    *QUERY,
    *SHOW,
]

#: Rounds with each of these, from the start to the end, by each of these ways.
ENDS: dict[str, list[Any]] = {
    "complete": [verb("complete"), COMPLETED],
    "block-complete": [block_verb("complete"), COMPLETED],
    "soft": [block_verb("cancel"), COMPLETED],
    "force": [block_verb("cancel", force=True), CANCELLED],
    "cancel": [verb("cancel"), CANCELLED],
}


def rounds() -> list[Any]:
    steps: list[Any] = []
    for name, end in ENDS.items():
        for mode in ("background", "write-blocking"):
            steps += [mirror(copy_mode=mode, filter_node_name=f"f-{name}"), READY, *QUERY, *SHOW, *end, *SHOW, JOBS]
    return steps


def blkdebug(node: str, below: str, kind: str | None = None, errno: int = 5, once: bool = True) -> dict[str, Any]:
    rules = {} if kind is None else {"inject_error": [{"event": "none", "iotype": kind, "errno": errno, "once": once}]}
    return add(driver="blkdebug", node_name=node, image=below, **rules)


def policies(side: str) -> list[Any]:
    """Errors of one side with each policy. One piece is copied, so that there is one error at a time."""
    steps: list[Any] = []
    kind = "read" if side == "source" else "write"
    for policy, number in itertools.product(("report", "ignore", "stop", "enospc", "auto"), (5, 28)):
        steps += [
            blkdebug("s", "a", kind if side == "source" else None, number),
            blkdebug("t", "b", kind if side == "target" else None, number),
            mirror("s", "t", auto_dismiss=False, **{f"on_{side}_error": policy}),
        ]
        stops = policy == "stop" or (policy in ("enospc", "auto") and number == 28)
        if stops:
            steps += [status("paused"), *QUERY, verb("resume"), READY, *QUERY, verb("cancel"), CANCELLED]
        elif policy == "ignore":
            steps += [READY, *QUERY, verb("cancel"), CANCELLED]
        else:
            steps += [COMPLETED, *QUERY]
        steps += [status("concluded"), verb("dismiss"), delete("s"), delete("t")]
    return steps


CHAIN = [
    add(driver="qcow2", node_name="base", file=file("base.qcow2")),
    add(driver="qcow2", node_name="mid", file=file("mid.qcow2"), backing="base"),
    add(driver="qcow2", node_name="a", file=file("top.qcow2"), backing="mid"),
]


def target(name: str, size: int, **more: Any) -> list[Any]:
    """An empty qcow2 image as a target."""
    return [
        Do(f"create {name}", lambda context: images.create(context.workdir / name, size) and None),
        add(driver="qcow2", node_name=name.partition(".")[0], file=file(name), **more),
    ]


def write(offset: int, length: int, byte: int) -> Do:
    return client(
        "e", f"write {byte} {offset}+{length}", lambda nbd: nbd.pwrite(offset, bytes([byte]) * length) or nbd.flush()
    )


def read(offset: int, length: int) -> Do:
    return client("e", f"read {offset}+{length}", lambda nbd: nbd.pread(offset, length).hex()[:64])


SESSIONS = [
    Session(
        "mirror-options",
        [
            *ab(),
            *sized("c", MiB),
            *sized("below", MiB),
            add(driver="raw", node_name="above", file="below"),
            *sized("ro", MiB, read_only=True),
            *OPTION_ERRORS,
        ],
    ),
    Session(
        "mirror-drive-options",
        [
            *ab(),
            *sized("c", MiB),
            *sized("below", MiB),
            add(driver="raw", node_name="above", file="below"),
            *DRIVE_ERRORS,
        ],
        images=("raw.img",),
    ),
    Session("mirror-ends", [*ab(), *rounds()]),
    Session(
        "mirror-granularities",
        [
            *ab(100 * KiB),
            *(
                step
                for value in (512, 4096, 65536, 64 * MiB)
                for step in (mirror(granularity=value, filter_node_name="f"), READY, *SHOW, *ENDS["complete"])
            ),
            mirror(buf_size=1),
            READY,
            *ENDS["complete"],
            mirror(buf_size=100_001),
            READY,
            *ENDS["complete"],
            mirror(buf_size=1 << 30),
            READY,
            *ENDS["complete"],
        ],
    ),
    Session(
        "mirror-sizes",
        [
            *ab(),
            *sized("small", 64 * KiB),
            *sized("big", 2 * MiB),
            *sized("odd", 100 * KiB),
            *sized("odd2", 100 * KiB),
            *sized("none", 0),
            *sized("none2", 0),
            mirror(target="small"),
            COMPLETED,
            mirror(target="big", sync="none"),
            COMPLETED,
            mirror("odd", "odd2"),
            READY,
            *ENDS["complete"],
            mirror("none", "none2", copy_mode="write-blocking"),
            READY,
            *QUERY,
            *ENDS["complete"],
            mirror("none", "none2"),
            READY,
            *QUERY,
            *ENDS["cancel"],
            *SHOW,
        ],
    ),
    Session(
        "mirror-verbs",
        [
            *ab(),
            mirror(speed=1000, auto_finalize=False, auto_dismiss=False),
            *(verb(name) for name in ("complete", "finalize", "dismiss", "resume")),
            block_verb("complete"),
            cmd("block-job-complete", device="nosuch"),
            verb("pause"),
            status("paused"),
            verb("pause"),
            *QUERY,
            verb("resume"),
            status("running"),
            block_verb("set-speed", speed=-1),
            block_verb("set-speed", speed=0),
            READY,
            *QUERY,
            verb("pause"),
            status("standby"),
            *QUERY,
            verb("complete"),
            verb("resume"),
            Event("BLOCK_JOB_PENDING"),
            *(verb(name) for name in ("complete", "pause", "dismiss")),
            change(),
            *SHOW,
            verb("finalize"),
            COMPLETED,
            *SHOW,
            verb("dismiss"),
            # Cancelled when it is pending already.
            mirror(auto_finalize=False, auto_dismiss=False),
            READY,
            block_verb("complete"),
            Event("BLOCK_JOB_PENDING"),
            block_verb("cancel"),
            CANCELLED,
            *QUERY,
            verb("dismiss"),
            # Pending without pivot.
            mirror(auto_finalize=False, auto_dismiss=False),
            READY,
            block_verb("cancel"),
            Event("BLOCK_JOB_PENDING"),
            *SHOW,
            cmd("block-job-finalize", id_="j"),
            COMPLETED,
            cmd("block-job-dismiss", id_="j"),
            *SHOW,
            # Not ready yet.
            mirror(speed=1000),
            block_verb("cancel"),
            CANCELLED,
            # Paused when it is ready.
            mirror(),
            READY,
            block_verb("pause"),
            status("standby"),
            block_verb("cancel"),
            block_verb("cancel", force=True),
            CANCELLED,
            block_verb("resume"),
            *QUERY,
        ],
    ),
    Session(
        "mirror-change",
        [
            *ab(),
            mirror(speed=1000),
            change("background"),
            change("nosuch"),
            change(kind="commit"),
            cmd("block-job-change", id_="j", type="commit"),
            cmd("block-job-change", id_="nosuch", type="mirror", copy_mode="background"),
            cmd("block-job-change", id_="j", type="mirror"),
            change(),
            change(),
            change("background"),
            block_verb("set-speed", speed=0),
            READY,
            Do("synced", lambda context: context.daemon.qmp.execute("query-block-jobs")[0]["actively-synced"]),
            *ENDS["complete"],
        ],
    ),
    Session(
        "mirror-busy",
        [
            *ab(),
            *sized("c", MiB),
            *sized("d", MiB),
            NBD_START,
            mirror(speed=1000, filter_node_name="f"),
            mirror(job_id="k", target="c"),
            mirror("c", "a", job_id="k"),
            mirror("c", "b", job_id="k"),
            mirror("b", "c", job_id="k"),
            mirror("f", "c", job_id="k"),
            mirror("c", "f", job_id="k"),
            mirror("c", "d"),
            *(delete(name) for name in ("a", "b", "f")),
            *(cmd("block_resize", node_name=name, size=65536) for name in ("a", "b", "f")),
            export("x", "b", writable=True),
            export("x", "b"),
            *QUERY,
            *ENDS["cancel"],
        ],
        # QSD drains everything for each of these commands, which shows as pauses of the job.
        compare_events=False,
    ),
    Session("mirror-source-errors", [*ab(), fill("a"), *policies("source")]),
    Session("mirror-target-errors", [*ab(), fill("a"), *policies("target")]),
    Session(
        "mirror-in-use",
        [
            *ab(),
            NBD_START,
            export("x", "b", writable=True),
            mirror(),
            cmd("block-export-del", id_="x"),
            Event("BLOCK_EXPORT_DELETED"),
            export("x", "b"),
            mirror(),
            *SHOW,
        ],
    ),
    Session(
        "mirror-read-only",
        [
            *sized("a", MiB, read_only=True),
            *sized("b", MiB),
            mirror(),
            READY,
            *SHOW,
            *ENDS["complete"],
            *SHOW,
        ],
    ),
    Session(
        "mirror-exported",
        [
            *CHAIN,
            *target("b.qcow2", 8 * MiB),
            NBD_START,
            export("e", "a", name="e", writable=True),
            mirror(),
            READY,
            *SHOW,
            read(192 * KiB, 64 * KiB),
            write(64 * KiB, 64 * KiB, 0x11),
            change(),
            write(4 * MiB, 4096, 0x22),
            write(100, 17, 0x33),
            *ENDS["complete"],
            *SHOW,
            cmd("query-block-exports"),
            read(0, 256),
            read(64 * KiB, 64 * KiB),
            write(MiB, 4096, 0x44),
            cmd("block-export-del", id_="e"),
            Event("BLOCK_EXPORT_DELETED"),
            delete("a"),
            *SHOW,
        ],
        images=("base.qcow2", "mid.qcow2", "top.qcow2"),
    ),
    Session(
        "mirror-top",
        [
            *CHAIN,
            *target("b.qcow2", 8 * MiB, backing=None),
            mirror(sync="top"),
            READY,
            *SHOW,
            *ENDS["complete"],
            *SHOW,
            *target("c.qcow2", 8 * MiB, backing="mid"),
            mirror(target="c", sync="top"),
            READY,
            *SHOW,
            *ENDS["complete"],
            *SHOW,
        ],
        images=("base.qcow2", "mid.qcow2", "top.qcow2"),
    ),
    Session(
        "mirror-replaces",
        [
            *ab(),
            *sized("c", MiB),
            add(driver="raw", node_name="r", file="a"),
            add(driver="copy-on-read", node_name="cor", file="r"),
            NBD_START,
            export("e", "cor", name="e", writable=True),
            mirror("cor", "b", replaces="c"),
            mirror("cor", "b", replaces="a"),
            mirror("cor", "b", replaces="r"),
            READY,
            *SHOW,
            *ENDS["complete"],
            *SHOW,
            mirror("cor", "c"),
            READY,
            *SHOW,
            *ENDS["complete"],
            *SHOW,
        ],
    ),
    Session(
        "mirror-drive",
        [
            *sized("a", MiB),
            fill("a"),
            drive("a", "x.img"),
            READY,
            *SHOW,
            *ENDS["soft"],
            content("x.img"),
            drive("a", "x.raw", format="raw", unmap=False),
            READY,
            *SHOW,
            *ENDS["complete"],
            *SHOW,
            content("x.raw"),
            drive("a", "x.qcow2", format="qcow2", node_name="n"),
            READY,
            *SHOW,
            *ENDS["complete"],
            *SHOW,
            info("x.qcow2"),
        ],
    ),
    Session(
        "mirror-drive-existing",
        [
            add(driver="qcow2", node_name="base", file=file("base.qcow2"), read_only=True),
            add(driver="qcow2", node_name="mid", file=file("mid.qcow2"), backing="base", read_only=True),
            CHAIN[2],
            *sized("c", MiB),
            add(driver="null-co", node_name="null", size=MiB),
            add(driver="copy-on-read", node_name="cor", file="c"),
            NBD_START,
            export("e", "a", name="e", writable=True),
            drive("null", "x"),
            drive("cor", "x"),
            drive("cor", "c", mode="existing"),
            drive("cor", "nosuch", mode="existing", format="qcow2"),
            drive("null", "null-co://", format="raw"),
            drive("null", "null-co://", format="raw", mode="existing"),
            COMPLETED,
            drive("a", "mid.qcow2", mode="existing"),
            drive("a", "top.qcow2", mode="existing"),
            Do(
                "create x.qcow2",
                lambda context: images.create(context.workdir / "x.qcow2", 8 * MiB, backing="mid.qcow2") and None,
            ),
            drive("a", "x.qcow2", mode="existing", node_name="x", unmap=False),
            READY,
            *SHOW,
            *ENDS["soft"],
            *SHOW,
            drive("a", "x.qcow2", "top", mode="existing", node_name="x", copy_mode="write-blocking"),
            READY,
            *SHOW,
            write(5 * MiB, 512, 0x55),
            *ENDS["complete"],
            *SHOW,
            read(5 * MiB, 65536),
            read(0, 65536),
        ],
        images=("base.qcow2", "mid.qcow2", "top.qcow2"),
    ),
    Session(
        "mirror-drive-exported",
        [
            *CHAIN,
            NBD_START,
            export("e", "a", name="e", writable=True),
            drive("a", "x.qcow2", "top"),
            READY,
            *SHOW,
            write(3 * MiB, 100, 0x55),
            *ENDS["complete"],
            *SHOW,
            info("x.qcow2"),
            read(3 * MiB, 65536),
            cmd("block-export-del", id_="e"),
            Event("BLOCK_EXPORT_DELETED"),
            export("e", "a", name="e", writable=True),
            drive("a", "y.qcow2", "none", format="qcow2", node_name="y"),
            READY,
            *SHOW,
            write(2 * MiB, 65536, 0x66),
            *ENDS["complete"],
            *SHOW,
            info("y.qcow2"),
            read(2 * MiB, 65536),
        ],
        images=("base.qcow2", "mid.qcow2", "top.qcow2"),
    ),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_same_as_qsd(session: Session, image_set: Path, tmp_path: Path) -> None:
    check_session(session, image_set, tmp_path)
