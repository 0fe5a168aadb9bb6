"""New images, byte for byte as the real tools make them, and what cannot be made."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from tests.block.inprocess import Commands, run

MiB = 1 << 20
GiB = 1 << 30


async def make(commands: Commands, **options: Any) -> None:
    """blockdev-create, until it has concluded. Raises AssertionError with the job's error."""
    members = {name.replace("_", "-"): value for name, value in options.items()}
    await commands("blockdev-create", job_id="job", options=members)
    await commands.daemon.jobs.find("job").wait()
    (job,) = await commands("query-jobs")
    await commands("job-dismiss", id="job")
    assert (job["status"], job["current-progress"], job["total-progress"]) == ("concluded", 1, 1)
    assert "error" not in job, job["error"]


def qemu_img(*arguments: str) -> str:
    return subprocess.run(["qemu-img", *arguments], check=True, capture_output=True, text=True).stdout


def pair(tmp_path: Path, size: int, data_file: bool = False, **options: Any) -> tuple[Path, Path]:
    """The image that qemu-img makes, and ours; each is called disk.qcow2, in a directory of its own."""
    theirs, ours = tmp_path / "them" / "disk.qcow2", tmp_path / "ours" / "disk.qcow2"
    theirs.parent.mkdir()
    ours.parent.mkdir()
    spelled = []
    for name, value in options.items():
        if name == "version":
            spelled.append("compat=" + {"v2": "0.10", "v3": "1.1"}[value])
        else:
            text = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
            spelled.append(f"{name}={text}")
    if data_file:
        # The name in the image is as long as ours.
        spelled.append(f"data_file={theirs.parent}/data.raw")
    settings = ["-o", ",".join(spelled)] if spelled else []
    qemu_img("create", "-q", "-u", "-f", "qcow2", *settings, str(theirs), str(size))

    async def ourselves(commands: Commands) -> None:
        ours.touch()
        members: dict[str, Any] = dict(options)
        if data_file:
            (ours.parent / "data.raw").touch()
            members["data_file"] = {"driver": "file", "filename": f"{ours.parent}/data.raw"}
        await make(commands, driver="qcow2", size=size, file={"driver": "file", "filename": str(ours)}, **members)

    run(ourselves)
    return theirs, ours


def pieces(path: Path) -> Iterator[tuple[int, bytes]]:
    """What is not zero in the file, in pieces of up to 64 KiB at multiples of that."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        at = 0
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) & -65536
            except OSError:
                return
            data = os.pread(file.fileno(), 65536, at)
            if data.count(0) < len(data):
                yield at, data
            at += 65536


def same_content(theirs: Path, ours: Path) -> None:
    """Both files have the same length and bytes, but for the name of the directory that they are in."""
    assert ours.stat().st_size == theirs.stat().st_size
    for (at, data), (their_at, their_data) in zip_longest(pieces(ours), pieces(theirs), fillvalue=(-1, b"")):
        assert at == their_at
        assert data.replace(b"/ours/", b"/dirs/") == their_data.replace(b"/them/", b"/dirs/"), f"at {at:#x}"


def sound(path: Path) -> None:
    """qemu-img finds nothing wrong, without a look at the backing file."""
    image = json.dumps({"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": str(path)}})
    assert "No errors" in qemu_img("check", f"json:{image}")


PREALLOCATED = [
    {"preallocation": mode, "cluster_size": size} for mode in ("metadata", "falloc", "full") for size in (4096, 65536)
]


@pytest.mark.parametrize(
    "how",
    [
        {"size": 0},
        {"size": 512},
        {"size": MiB},
        {"size": 1 << 50},
        {"size": MiB, "version": "v2"},
        {"size": MiB, "version": "v3"},
        {"size": GiB, "cluster_size": 512},
        {"size": GiB, "cluster_size": 512, "refcount_bits": 64},
        {"size": 64 * GiB, "cluster_size": 4096},
        {"size": MiB, "cluster_size": 2 * MiB},
        *({"size": MiB, "refcount_bits": bits} for bits in (1, 2, 4, 8, 16, 32, 64)),
        {"size": MiB, "lazy_refcounts": True},
        {"size": MiB, "compression_type": "zstd"},
        {"size": MiB, "compression_type": "zlib"},
        {"size": MiB, "extended_l2": True},
        {"size": 64 * MiB, "extended_l2": True, "cluster_size": 16384},
        {"size": MiB, "backing_file": "base.img", "backing_fmt": "raw"},
        {"size": MiB, "backing_file": "base.img", "backing_fmt": "raw", "version": "v2"},
        {"size": MiB, "backing_file": "a" * 1023, "backing_fmt": "qcow2"},
        {"size": MiB, "cluster_size": 512, "backing_file": "a" * 300, "backing_fmt": "qcow2"},
        {"size": 0, "preallocation": "metadata"},
        {"size": 512, "preallocation": "metadata"},
        {"size": 512, "preallocation": "falloc"},
        *({"size": 10 * MiB + 512, **how} for how in PREALLOCATED),
        {"size": 10 * MiB, "preallocation": "metadata", "version": "v2"},
        {"size": 2 * MiB, "preallocation": "metadata", "cluster_size": 512},
        {"size": 3 * GiB, "preallocation": "metadata", "cluster_size": 8192},
        {"size": 20 * GiB, "preallocation": "metadata", "cluster_size": MiB},
        {"size": 10 * GiB, "preallocation": "metadata"},
        {"size": 100 * MiB, "preallocation": "metadata", "refcount_bits": 1},
        {"size": 100 * MiB, "preallocation": "falloc", "refcount_bits": 64},
        {"size": 2 * MiB, "preallocation": "falloc", "refcount_bits": 64, "cluster_size": 512},
        {"size": 20 * MiB, "preallocation": "full", "refcount_bits": 8, "cluster_size": 512},
        {"size": 10 * MiB, "preallocation": "metadata", "extended_l2": True},
        {"size": 10 * MiB, "preallocation": "falloc", "extended_l2": True},
        {"size": 10 * MiB, "preallocation": "metadata", "extended_l2": True, "backing_file": "b", "backing_fmt": "raw"},
        {"size": 10 * MiB, "preallocation": "full", "extended_l2": True, "backing_file": "b", "backing_fmt": "raw"},
    ],
    ids=lambda how: ",".join(f"{k}={v}" for k, v in how.items())[:80],
)
def test_same_bytes(how: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, **how)
    same_content(theirs, ours)
    sound(ours)


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_data_file(preallocation: str, raw: bool, extended: bool, tmp_path: Path) -> None:
    how: dict[str, Any] = {"preallocation": preallocation, "data_file_raw": raw, "extended_l2": extended}
    theirs, ours = pair(tmp_path, 10 * MiB, data_file=True, **how)
    same_content(theirs, ours)
    data = [(path / "data.raw").stat() for path in (theirs.parent, ours.parent)]
    assert data[0].st_size == data[1].st_size == 10 * MiB
    assert (data[1].st_blocks >= 10 * MiB // 512) == (preallocation in ("falloc", "full"))
    sound(ours)


def test_data_file_is_used(tmp_path: Path) -> None:
    """An image with a data file that we have made is opened, and the raw data file is the disk."""

    async def test(commands: Commands) -> None:
        files = {}
        for name in ("disk", "data"):
            path = tmp_path / name
            await make(commands, driver="file", filename=str(path), size=0)
            await commands.add("file", name, filename=str(path))
            files[name] = path
        await make(commands, driver="qcow2", size=MiB, file="disk", data_file="data", data_file_raw=True)
        await commands.add("qcow2", "q", file="disk", data_file="data")
        await commands.graph.find("q").pwrite(65536, b"x" * 1000)
        await commands("blockdev-del", node_name="q")
        await commands.add("qcow2", "q", file="disk")  # by its name in the image, with another node
        assert await commands.graph.find("q").pread(65536, 1000) == b"x" * 1000
        assert files["data"].read_bytes() == bytes(65536) + b"x" * 1000 + bytes(MiB - 66536)

    run(test)
    sound(tmp_path / "disk")


LUKS = {"format": "luks", "key-secret": "s", "iter-time": 10}
SECRET = "secret,id=s,data=abc"


@pytest.mark.parametrize(
    "how",
    [
        {"version": "v2", "backing_file": "base", "backing_fmt": "raw"},
        {"cluster_size": 4096, "preallocation": "metadata"},
        {"preallocation": "falloc"},
        {"encrypt": {"format": "qcow", "key-secret": "s"}},
    ],
    ids=str,
)
def test_encrypted(how: dict[str, Any], tmp_path: Path) -> None:
    """The same header and tables as qemu-img makes (keys are random), and each reads what the other wrote."""
    theirs, ours = tmp_path / "theirs.qcow2", tmp_path / "ours.qcow2"
    encrypt = how.get("encrypt", LUKS)
    kind = {"qcow": "aes"}.get(encrypt["format"], encrypt["format"])
    spelled = [f"encrypt.{name}={kind if name == 'format' else value}" for name, value in encrypt.items()]
    plain = {name: value for name, value in how.items() if name not in ("encrypt", "version")}
    spelled += [f"{name}={value}" for name, value in plain.items()]
    spelled += ["compat=0.10"] if how.get("version") == "v2" else []
    qemu_img("create", "-q", "-u", "-f", "qcow2", "--object", SECRET, "-o", ",".join(spelled), str(theirs), "10M")
    target = {"driver": "qcow2", "backing": None, "file": {"driver": "file", "filename": str(ours)}}
    opened = json.dumps({**target, "encrypt": {"format": kind, "key-secret": "s"}})

    async def ourselves(commands: Commands) -> None:
        await commands("object-add", qom_type="secret", id="s", data="abc")
        ours.touch()
        await make(commands, driver="qcow2", size=10 * MiB, file=target["file"], encrypt=encrypt, **plain, **version)

    version = {"version": how["version"]} if "version" in how else {}
    run(ourselves)
    assert ours.stat().st_size == theirs.stat().st_size
    cluster = how.get("cluster_size", 65536)
    # Preallocated clusters are zero clusters with us, and with QEMU contain what zeroes are when they are decrypted.
    same = 1 if "preallocation" in how else 3
    assert ours.read_bytes()[: same * cluster] == theirs.read_bytes()[: same * cluster]
    io = ["qemu-io", "--object", SECRET, f"json:{opened}"]
    if kind == "luks":
        # Written by the one, read by the other.
        command = ["-c", "write -P 7 1M 64k", "-c", "read -P 7 1M 64k"]
        subprocess.run([*io[:3], *command, io[3]], check=True, capture_output=True)
        if "cluster_size" in how:
            assert "No errors" in qemu_img("check", "--object", SECRET, f"json:{opened}")

    async def read_back(commands: Commands) -> None:
        await commands("object-add", qom_type="secret", id="s", data="abc")
        await commands.daemon.qmp("blockdev-add", {**json.loads(opened), "node-name": "n"})
        node = commands.graph.find("n")
        if kind == "luks":
            assert await node.pread(MiB, 65536) == bytes([7]) * 65536
            assert await node.pread(2 * MiB, 65536) == bytes(65536)
        assert node.length == 10 * MiB

    run(read_back)
