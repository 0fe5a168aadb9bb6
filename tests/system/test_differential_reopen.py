"""Differential: blockdev-reopen, with the whole graph after each step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.system.differential import Do, Event, Session, add, check_session, cmd, delete
from tests.system.test_differential_blockdev import NBD_START, export, file, null, qcow2, raw
from tests.system.test_differential_graph import SHOW, once, reopen


def wire(**options: Any) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in options.items()}


def raw_x(**more: Any) -> dict[str, Any]:
    return {"driver": "raw", "node-name": "x", "file": "f", **wire(**more)}


def file_f(**more: Any) -> dict[str, Any]:
    return {"driver": "file", "node-name": "f", "filename": "raw.img", **wire(**more)}


def qcow2_q(**more: Any) -> dict[str, Any]:
    return {"driver": "qcow2", "node-name": "q", "file": "qf", "backing": None, **wire(**more)}


def qcow2_of(name: str, below: str, **more: Any) -> dict[str, Any]:
    return {"driver": "qcow2", "node-name": name, "file": below, **wire(**more)}


BASE = (
    add(driver="file", node_name="f", filename="raw.img"),
    add(driver="raw", node_name="x", file="f"),
    add(driver="file", node_name="qf", filename="plain.qcow2"),
    add(driver="qcow2", node_name="q", file="qf"),
    null("n", size=1048576),
    null("n2", size=4096),
)

SESSIONS = [
    Session(
        "reopen-replace-file",
        [
            *BASE,
            reopen(raw_x(file="n")),
            *SHOW,
            reopen(raw_x(file="n2")),
            *SHOW,
            reopen(raw_x(file="n2", offset=4096)),
            reopen(raw_x(file="n2", offset=8192)),
            *SHOW,
            reopen(raw_x(file="n2", size=524288)),
            *SHOW,
            reopen(raw_x(file="f", offset=512)),
            *SHOW,
            reopen(raw_x()),
            *SHOW,
            reopen(raw_x(file={"driver": "null-co"})),
            reopen(raw_x(file={"driver": "file", "filename": "raw.img"})),
            reopen(raw_x(file=None)),
            reopen({"driver": "raw", "node-name": "x"}),
            reopen(raw_x(file="x")),
            reopen(raw_x(file="q")),
            *SHOW,
            reopen({"driver": "qcow2", "node-name": "q", "file": "x"}),
            reopen(qcow2_q(file="x")),
            reopen(qcow2_q(file="n")),
            *SHOW,
            reopen(qcow2_q(file="qf")),
            *SHOW,
        ],
        images=("raw.img", "plain.qcow2"),
    ),
    Session(
        "reopen-several",
        [
            *BASE,
            reopen(raw_x(read_only=True), file_f(read_only=True)),
            *SHOW,
            reopen(file_f(), raw_x()),
            *SHOW,
            reopen(raw_x(), file_f()),
            *SHOW,
            reopen(file_f(read_only=True), raw_x(read_only=True)),
            *SHOW,
            reopen(file_f()),
            *SHOW,
            reopen(raw_x()),
            *SHOW,
            reopen(
                raw_x(discard="unmap"), file_f(discard="unmap"), qcow2_q(lazy_refcounts=True, l2_cache_entry_size=7)
            ),
            *SHOW,
            reopen(raw_x(discard="unmap"), raw_x(discard="ignore")),
            *SHOW,
            reopen(raw_x(file="n"), qcow2_q(file="f")),
            *SHOW,
            reopen(raw_x(file="f"), qcow2_q(file="qf")),
            *SHOW,
            reopen(raw_x(file="n"), qcow2_q(file="f"), {"driver": "null-co", "node-name": "n", "size": 5}),
            *SHOW,
            reopen(raw_x(discard="unmap"), file_f(filename="other.img")),
            *SHOW,
            reopen(raw_x(discard="unmap"), {"driver": "file", "node-name": "nosuch", "filename": "x"}),
            reopen(raw_x(discard="unmap"), {"driver": "file", "filename": "x"}),
            *SHOW,
            reopen(raw_x(detect_zeroes="unmap")),
            reopen(raw_x(detect_zeroes="unmap", discard="unmap")),
            *SHOW,
            reopen(raw_x(detect_zeroes="on")),
            *SHOW,
            reopen(raw_x(force_share=True)),
            reopen(raw_x(force_share=True, read_only=True)),
            reopen(raw_x(force_share=False)),
            reopen(file_f(locking="on")),
            reopen(file_f(locking="off")),
            reopen(file_f(aio="threads")),
            reopen(file_f(aio="io_uring")),
            reopen(file_f(aio="native")),
            reopen(file_f(aio_max_batch=5)),
            reopen(file_f(drop_cache=False)),
            reopen(file_f(x_check_cache_dropped=True)),
            reopen(file_f(pr_manager="x")),
            reopen(file_f(drop_cache=True)),
            reopen(file_f()),
            reopen(file_f(cache={"direct": True})),
            *SHOW,
            reopen(file_f(cache={"direct": True, "no-flush": True})),
            *SHOW,
            reopen(file_f(cache={"no-flush": True})),
            *SHOW,
            reopen(raw_x(cache={"direct": True})),
            *SHOW,
            reopen(file_f(cache={})),
            *SHOW,
            reopen(file_f(auto_read_only=True)),
            *SHOW,
            reopen(file_f(auto_read_only=True), raw_x(auto_read_only=True)),
            *SHOW,
            reopen(file_f(read_only=True, auto_read_only=True)),
            *SHOW,
        ],
        images=("raw.img", "other.img", "plain.qcow2"),
    ),
    Session(
        "reopen-in-line",
        [
            raw("r"),
            qcow2("m", "mid.qcow2"),
            add(
                driver="qcow2",
                node_name="t",
                file=file("rawback.qcow2", node_name="tf"),
                backing={"driver": "raw", "node-name": "tb", "file": file("other.img")},
            ),
            *SHOW,
            reopen({"driver": "raw", "node-name": "r", "file": file("raw.img"), "read-only": True}),
            *SHOW,
            reopen(
                {
                    "driver": "raw",
                    "node-name": "r",
                    "file": file("raw.img"),
                    "cache": {"direct": True, "no-flush": True},
                    "discard": "unmap",
                }
            ),
            *SHOW,
            reopen(
                {
                    "driver": "raw",
                    "node-name": "r",
                    "file": file("raw.img", cache={"direct": False}),
                    "cache": {"direct": True, "no-flush": True},
                }
            ),
            *SHOW,
            reopen({"driver": "raw", "node-name": "r", "file": file("raw.img", read_only=True)}),
            *SHOW,
            reopen({"driver": "raw", "node-name": "r", "file": file("raw.img", discard="ignore")}),
            *SHOW,
            reopen({"driver": "raw", "node-name": "r", "file": file("other.img")}),
            reopen({"driver": "raw", "node-name": "r", "file": file("raw.img", node_name="nn")}),
            reopen({"driver": "raw", "node-name": "r", "file": {"driver": "host_device", "filename": "raw.img"}}),
            reopen({"driver": "qcow2", "node-name": "m", "file": file("mid.qcow2")}),
            reopen({"driver": "qcow2", "node-name": "m", "file": file("mid.qcow2"), "backing": None}),
            *SHOW,
            reopen({"driver": "qcow2", "node-name": "m", "file": file("mid.qcow2"), "backing": None}),
            *SHOW,
            reopen({"driver": "qcow2", "node-name": "m", "file": file("mid.qcow2"), "backing": "r"}),
            *SHOW,
            reopen({"driver": "qcow2", "node-name": "t", "file": "tf", "backing": "tb"}),
            *SHOW,
            reopen({"driver": "qcow2", "node-name": "t", "file": "tf", "backing": "tb", "read-only": True}),
            *SHOW,
            reopen({"driver": "qcow2", "node-name": "t", "file": "tf", "backing": "tb", "cache": {"direct": True}}),
            *SHOW,
            reopen(
                {
                    "driver": "qcow2",
                    "node-name": "t",
                    "file": "tf",
                    "backing": {"driver": "raw", "file": file("other.img")},
                }
            ),
            *SHOW,
            reopen(
                {
                    "driver": "qcow2",
                    "node-name": "t",
                    "file": "tf",
                    "backing": {"driver": "raw", "node-name": "tb", "file": file("other.img"), "read-only": False},
                }
            ),
            *SHOW,
            reopen(
                {
                    "driver": "qcow2",
                    "node-name": "t",
                    "file": "tf",
                    "backing": {"driver": "raw", "node-name": "tb", "file": file("other.img")},
                    "detect-zeroes": "on",
                }
            ),
            *SHOW,
            reopen({"driver": "raw", "node-name": "tb", "file": file("other.img")}),
            *SHOW,
            reopen({"driver": "file", "node-name": "tf", "filename": "rawback.qcow2", "read-only": True}),
            *SHOW,
            reopen({"driver": "file", "node-name": "tf", "filename": "rawback.qcow2", "cache": {"direct": True}}),
            *SHOW,
        ],
        images=("raw.img", "other.img", "base.qcow2", "mid.qcow2", "rawback.qcow2"),
    ),
    Session(
        "reopen-shared",
        [
            add(driver="file", node_name="f", filename="raw.img"),
            add(driver="raw", node_name="a", file="f"),
            add(driver="raw", node_name="b", file="f", offset=4096),
            NBD_START,
            export("ea", "a", writable=True),
            export("eb", "b"),
            *SHOW,
            reopen(file_f(read_only=True)),
            reopen({"driver": "raw", "node-name": "a", "file": "f", "read-only": True}),
            reopen({"driver": "raw", "node-name": "b", "file": "f", "offset": 4096, "read-only": True}),
            *SHOW,
            reopen(file_f(cache={"direct": True})),
            *SHOW,
            once("a", "write", lambda c: c.pwrite(0, b"a" * 1000)),
            once("b", "read", lambda c: c.pread(0, 8).hex()),
            null("n", size=65536, read_zeroes=True),
            reopen({"driver": "raw", "node-name": "b", "file": "n"}),
            *SHOW,
            once("b", "read", lambda c: c.pread(0, 8).hex()),
            reopen({"driver": "raw", "node-name": "a", "file": "n"}),
            *SHOW,
            delete("f"),
            *SHOW,
        ],
        images=("raw.img",),
    ),
    Session(
        "reopen-backing",
        [
            add(driver="qcow2", node_name="b", file=file("base.qcow2"), read_only=True),
            add(driver="qcow2", node_name="b2", file=file("plain.qcow2"), read_only=True),
            add(driver="qcow2", node_name="m", file=file("mid.qcow2"), backing="b", read_only=True),
            add(driver="qcow2", node_name="t", file=file("top.qcow2"), backing="m"),
            add(driver="qcow2", node_name="t2", file=file("c4k.qcow2"), backing=None),
            *SHOW,
            reopen({"driver": "qcow2", "node-name": "t", "file": file("top.qcow2"), "backing": "b2"}),
            *SHOW,
            reopen({"driver": "qcow2", "node-name": "t", "file": file("top.qcow2"), "backing": "t"}),
            reopen(
                {"driver": "qcow2", "node-name": "b", "file": file("base.qcow2"), "backing": "t", "read-only": True}
            ),
            reopen(
                {"driver": "qcow2", "node-name": "b", "file": file("base.qcow2"), "backing": "m", "read-only": True}
            ),
            reopen({"driver": "qcow2", "node-name": "t2", "file": file("c4k.qcow2"), "backing": "b2"}),
            *SHOW,
            reopen({"driver": "qcow2", "node-name": "t2", "file": file("c4k.qcow2"), "backing": None}),
            *SHOW,
            reopen(
                {"driver": "qcow2", "node-name": "t", "file": file("top.qcow2"), "backing": "t2"},
                {"driver": "qcow2", "node-name": "t2", "file": file("c4k.qcow2"), "backing": "m"},
            ),
            *SHOW,
            reopen(
                {"driver": "qcow2", "node-name": "t2", "file": file("c4k.qcow2"), "backing": "t"},
                {"driver": "qcow2", "node-name": "t", "file": file("top.qcow2"), "backing": "m"},
            ),
            *SHOW,
            reopen(
                {"driver": "qcow2", "node-name": "t", "file": file("top.qcow2"), "backing": "m"},
                {"driver": "qcow2", "node-name": "t2", "file": file("c4k.qcow2"), "backing": "t"},
            ),
            *SHOW,
            reopen({"driver": "qcow2", "node-name": "b", "file": file("base.qcow2")}),
            *SHOW,
            reopen({"driver": "qcow2", "node-name": "m", "file": file("mid.qcow2"), "backing": "b"}),
            *SHOW,
        ],
        images=("base.qcow2", "mid.qcow2", "top.qcow2", "plain.qcow2", "c4k.qcow2"),
    ),
    Session(
        "reopen-qcow2-options",
        [
            add(driver="file", node_name="f", filename="plain.qcow2"),
            add(driver="qcow2", node_name="q", file="f"),
            reopen(qcow2_of("q", "f", lazy_refcounts=True)),
            reopen(qcow2_of("q", "f", l2_cache_size=65536)),
            reopen(qcow2_of("q", "f", l2_cache_size=1, cache_size=0)),
            reopen(qcow2_of("q", "f", refcount_cache_size=1 << 20, cache_size=1024)),
            reopen(qcow2_of("q", "f", overlap_check="all")),
            reopen(qcow2_of("q", "f", overlap_check="nosuch")),
            reopen(qcow2_of("q", "f", overlap_check={"template": "none", "main-header": True})),
            reopen(qcow2_of("q", "f", overlap_check={"template": "zz"})),
            reopen(qcow2_of("q", "f", cache_clean_interval=5)),
            reopen(qcow2_of("q", "f", cache_clean_interval=1 << 33)),
            reopen(qcow2_of("q", "f", pass_discard_request=True, discard="unmap")),
            reopen(qcow2_of("q", "f", discard_no_unref=True)),
            *SHOW,
            reopen(qcow2_of("q", "f", encrypt={"format": "luks", "key-secret": "x"})),
            reopen(qcow2_of("q", "f", data_file=None)),
            reopen(qcow2_of("q", "f", data_file="f")),
            reopen(qcow2_of("q", "f", data_file=file("raw.img"))),
            *SHOW,
            reopen({"driver": "qcow2", "node-name": "q"}),
            reopen({"driver": "qcow2", "node-name": "q", "file": None}),
            reopen({"driver": "qcow2", "node-name": "q", "file": "f", "backing": "nosuch"}),
            reopen({"driver": "qcow2", "node-name": "q", "file": "f", "backing": ""}),
            reopen({"driver": "qcow2", "node-name": "q", "file": "f", "backing": {"driver": "null-co"}}),
            add(driver="qcow2", node_name="v2", file=file("v2.qcow2", node_name="v2f")),
            reopen(qcow2_of("v2", "v2f", lazy_refcounts=True)),
            reopen(qcow2_of("v2", "v2f", discard_no_unref=True)),
            reopen(qcow2_of("v2", "v2f", l2_cache_entry_size=512)),
            *SHOW,
        ],
        images=("plain.qcow2", "raw.img", "v2.qcow2"),
    ),
    Session(
        "reopen-null",
        [
            null("n", size=1 << 20),
            add(driver="null-aio", node_name="na", size=4096),
            reopen({"driver": "null-co", "node-name": "n", "size": 1 << 20, "latency-ns": 5}),
            reopen({"driver": "null-co", "node-name": "n", "size": 1 << 20, "read-zeroes": True}),
            reopen({"driver": "null-co", "node-name": "n"}),
            reopen({"driver": "null-aio", "node-name": "n", "size": 1 << 20}),
            reopen({"driver": "null-aio", "node-name": "na", "size": 4096, "read-only": True}),
            reopen(
                {
                    "driver": "null-co",
                    "node-name": "n",
                    "size": 1 << 20,
                    "cache": {"direct": True},
                    "detect-zeroes": "on",
                }
            ),
            *SHOW,
            reopen({"driver": "raw", "node-name": "n", "file": "na"}),
            reopen({"driver": "file", "node-name": "n", "filename": "x"}),
        ],
        images=(),
    ),
    Session(
        "reopen-exported-qcow2",
        [
            add(driver="file", node_name="f", filename="plain.qcow2"),
            add(driver="qcow2", node_name="q", file="f"),
            raw("r"),
            NBD_START,
            export("e", "q", writable=True),
            reopen(qcow2_of("q", "f", read_only=True)),
            reopen({"driver": "file", "node-name": "f", "filename": "plain.qcow2", "read-only": True}),
            reopen(
                qcow2_of("q", "f", read_only=True),
                {"driver": "file", "node-name": "f", "filename": "plain.qcow2", "read-only": True},
            ),
            *SHOW,
            reopen(qcow2_of("q", "f", backing="r")),
            *SHOW,
            once("q", "read", lambda c: (c.size, c.pread(2 << 20, 8).hex(), c.pread(0, 8).hex())),
            reopen(qcow2_of("q", "f", backing=None)),
            *SHOW,
            reopen(qcow2_of("q", "r")),
            *SHOW,
            reopen(qcow2_of("q", "f", auto_read_only=True)),
            *SHOW,
            cmd("block-export-del", id="e"),
            Event("BLOCK_EXPORT_DELETED"),
            reopen(qcow2_of("q", "f", read_only=True)),
            *SHOW,
            export("e", "q", writable=True),
            reopen(qcow2_of("q", "f")),
            export("e", "q", writable=True),
            *SHOW,
            delete("f"),
            delete("r"),
        ],
        images=("plain.qcow2", "raw.img"),
    ),
    Session(
        "reopen-file",
        [
            add(driver="file", node_name="f", filename="raw.img", read_only=True),
            add(driver="raw", node_name="x", file="f", read_only=True),
            reopen({"driver": "raw", "node-name": "x", "file": "f"}),
            *SHOW,
            NBD_START,
            export("e", "x", writable=True),
            reopen({"driver": "file", "node-name": "f", "filename": "raw.img"}),
            *SHOW,
            export("e", "x", writable=True),
            *SHOW,
            Do("chmod", lambda c: (c.workdir / "other.img").chmod(0o444)),
            add(driver="file", node_name="g", filename="other.img", read_only=True),
            reopen({"driver": "file", "node-name": "g", "filename": "other.img"}),
        ],
        images=("raw.img", "other.img"),
    ),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, image_set: Path, tmp_path: Path) -> None:
    check_session(session, image_set, tmp_path)
