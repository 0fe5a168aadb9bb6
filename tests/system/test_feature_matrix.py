"""Every feature of the format in both directions: one image is made and filled by pyqsd, one by qemu-img, with the same
options and the same content. Each side reads, checks and maps the image of the other, and goes on writing to it.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support import images, nbd, peers
from tests.support.daemon import DaemonProcess
from tests.support.images import KiB, MiB
from tests.support.nbd import NbdClient

SIZE = 4 * MiB
PASSPHRASE = "matrix"
SECRET = {"qom-type": "secret", "id": "key", "data": PASSPHRASE}


@dataclass(frozen=True)
class Case:
    """Options of ``blockdev-create`` (and qemu-img's names for them, which follow), and how the image is written."""

    options: dict[str, Any] = field(default_factory=dict)
    backing: bool = False
    data_file: bool = False
    luks: dict[str, Any] | None = None
    compress: bool = False

    def create_options(self, path: str) -> str:
        """What qemu-img wants to hear after -o."""
        parts = []
        for name, value in self.options.items():
            if name == "version":
                parts.append("compat=" + {"v2": "0.10", "v3": "1.1"}[value])
            else:
                text = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
                parts.append(f"{name.replace('-', '_')}={text}")
        if self.data_file:
            parts.append(f"data_file={path}.data")
        if self.luks is not None:
            parts += ["encrypt.format=luks", "encrypt.key-secret=key"]
            parts += [f"encrypt.{name}={value}" for name, value in self.luks.items()]
        return ",".join(parts)


QUICK = {"iter-time": 10}
CASES: dict[str, Case] = {
    "default": Case(),
    "v2": Case({"version": "v2"}),
    "v2-backing": Case({"version": "v2", "cluster-size": 4 * KiB}, backing=True),
    "cluster-512": Case({"cluster-size": 512}),
    "cluster-2M": Case({"cluster-size": 2 * MiB}),
    **{f"refcount-{bits}": Case({"refcount-bits": bits, "cluster-size": 4 * KiB}) for bits in (1, 2, 4, 8, 32, 64)},
    "lazy": Case({"lazy-refcounts": True}),
    "zlib-compressed": Case({"compression-type": "zlib"}, compress=True),
    "zstd-compressed": Case({"compression-type": "zstd", "cluster-size": 16 * KiB}, compress=True),
    "zstd-compressed-2M": Case({"compression-type": "zstd", "cluster-size": 2 * MiB}, compress=True),
    "subclusters": Case({"extended-l2": True, "cluster-size": 128 * KiB}),
    "subclusters-backing": Case({"extended-l2": True, "cluster-size": 16 * KiB}, backing=True),
    "subclusters-compressed": Case({"extended-l2": True}, backing=True, compress=True),
    "backing": Case(backing=True),
    "data-file": Case(data_file=True),
    "data-file-raw": Case({"data-file-raw": True}, data_file=True),
    "data-file-subclusters": Case({"extended-l2": True}, data_file=True),
    "luks": Case(luks=QUICK),
    "luks-cbc-essiv": Case(
        {"cluster-size": 4 * KiB},
        luks={
            **QUICK,
            "cipher-alg": "aes-128",
            "cipher-mode": "cbc",
            "ivgen-alg": "essiv",
            "ivgen-hash-alg": "sha256",
            "hash-alg": "sha512",
        },
    ),
    "luks-backing": Case(backing=True, luks=QUICK),
    "luks-subclusters": Case({"extended-l2": True}, luks=QUICK),
    "preallocation-metadata": Case({"preallocation": "metadata"}),
    "preallocation-falloc": Case({"preallocation": "falloc", "cluster-size": 16 * KiB}),
    "preallocation-full": Case({"preallocation": "full"}),
    "preallocation-subclusters": Case({"preallocation": "metadata", "extended-l2": True}),
    "preallocation-data-file": Case({"preallocation": "metadata", "data-file-raw": True}, data_file=True),
}


@pytest.fixture(scope="module")
def content() -> bytes:
    """Random, repeated and zero pieces of all sizes, at clusters' edges and elsewhere."""
    rng = random.Random(2)
    data = bytearray(SIZE)
    for _ in range(40):
        length = rng.choice((512, 3000, 4096, 65536, 100_000, 200_000))
        offset = rng.randrange(SIZE - length)
        if rng.random() < 0.5:
            offset &= ~0xFFFF
        data[offset : offset + length] = rng.randbytes(length) if rng.random() < 0.6 else b"\x2a" * length
    return bytes(data)


class Server:
    """A daemon of either kind that makes and opens images of a case in `workdir`."""

    def __init__(self, kind: str, workdir: Path, case: Case) -> None:
        self.case = case
        self.workdir = workdir
        self.daemon = DaemonProcess(kind, ["--nbd-server", "addr.type=unix,addr.path=nbd.sock"], workdir=workdir)

    def __enter__(self) -> Server:
        self.daemon.__enter__()
        if self.case.luks is not None:
            self.qmp("object-add", **SECRET)
        return self

    def __exit__(self, *exc: Any) -> None:
        self.daemon.__exit__(*exc)

    def qmp(self, command: str, **arguments: Any) -> Any:
        return self.daemon.qmp.execute(command, **arguments)

    def job(self, **options: Any) -> None:
        """``blockdev-create``, until its end."""
        self.qmp("blockdev-create", job_id="create", options=options)
        while self.daemon.qmp.wait_event("JOB_STATUS_CHANGE")["data"]["status"] != "concluded":
            pass
        (job,) = self.qmp("query-jobs")
        assert "error" not in job, job
        self.qmp("job-dismiss", id="create")

    def create(self, name: str) -> None:
        case = self.case
        self.job(driver="file", filename=name, size=0)
        self.qmp("blockdev-add", driver="file", node_name="target", filename=name)
        options: dict[str, Any] = {"driver": "qcow2", "file": "target", "size": SIZE, **case.options}
        if case.backing:
            options |= {"backing-file": "base.qcow2", "backing-fmt": "qcow2"}
        if case.data_file:
            self.job(driver="file", filename=f"{name}.data", size=0)
            self.qmp("blockdev-add", driver="file", node_name="data", filename=f"{name}.data")
            options["data-file"] = "data"
        if case.luks is not None:
            options["encrypt"] = {"format": "luks", "key-secret": "key", **case.luks}
        self.job(**options)
        self.qmp("blockdev-del", node_name="target")
        if case.data_file:
            self.qmp("blockdev-del", node_name="data")

    def open(self, name: str, *, compress: bool = False, read_only: bool = False) -> NbdClient:
        file = {"driver": "file", "filename": name, "discard": "unmap"}
        options: dict[str, Any] = {"driver": "qcow2", "file": file, "discard": "unmap", "read-only": read_only}
        if self.case.luks is not None:
            options["encrypt"] = {"format": "luks", "key-secret": "key"}
        if compress:
            options = {"driver": "compress", "file": options, "read-only": read_only}
        self.qmp("blockdev-add", **{**options, "node-name": "disk"})
        self.qmp("block-export-add", type="nbd", id="export", node_name="disk", writable=not read_only)
        return NbdClient(self.workdir / "nbd.sock", "disk", contexts=("base:allocation",))

    def close(self, client: NbdClient) -> None:
        client.disconnect()
        self.qmp("block-export-del", id="export", mode="hard")
        self.daemon.qmp.wait_event("BLOCK_EXPORT_DELETED")
        self.qmp("blockdev-del", node_name="disk")

    def content(self, name: str) -> bytes:
        client = self.open(name, read_only=True)
        data = b"".join(client.pread(at, MiB) for at in range(0, SIZE, MiB))
        self.close(client)
        return data


def write_all(client: NbdClient, data: bytes, unit: int) -> None:
    """The pieces of `data` that are not all zero."""
    for at in range(0, len(data), unit):
        piece = data[at : at + unit]
        if any(piece):
            client.pwrite(at, piece)
    client.flush()


def scribble(client: NbdClient, model: bytearray, seed: int, unit: int) -> None:
    """Random writes, zero writes and trims in steps of `unit` bytes."""
    rng = random.Random(seed)
    for _ in range(60):
        length = min(rng.choice((1, 7, 512, 4096, 40_000, 150_000)), SIZE)
        offset = rng.randrange(SIZE - length)
        offset, length = offset // unit * unit, -(-length // unit) * unit
        length = min(length, SIZE - offset)
        action = rng.random()
        if action < 0.7:
            data = rng.randbytes(length) if action < 0.5 else bytes([seed]) * length
            client.pwrite(offset, data)
            model[offset : offset + length] = data
        elif action < 0.85:
            client.zero(offset, length, rng.choice((0, nbd.F_NO_HOLE)))
            model[offset : offset + length] = bytes(length)
        else:
            client.trim(offset, length)
            model[offset : offset + length] = client.pread(offset, length)
    client.flush()


def opened(case: Case, path: Path) -> list[str]:
    """The image as an argument of qemu-img and qemu-io with --image-opts."""
    options = f"driver=qcow2,file.driver=file,file.filename={path}"
    if case.luks is None:
        return ["--image-opts", options]
    secret = f"secret,id=key,data={PASSPHRASE}"
    return ["--object", secret, "--image-opts", f"{options},encrypt.format=luks,encrypt.key-secret=key"]


def qemu_img(case: Case, path: Path, command: str, *more: str) -> str:
    return str(peers.run("qemu-img", command, *more, *opened(case, path), cwd=path.parent).stdout)


def described(case: Case, path: Path) -> dict[str, Any]:
    """What qemu-img tells about the image, without what differs from image to image."""
    found = json.loads(qemu_img(case, path, "info", "--output=json"))
    specific = found["format-specific"]["data"]
    if case.luks is not None:
        encrypt = specific["encrypt"]
        encrypt.pop("uuid")
        encrypt.pop("master-key-iters")
        for slot in encrypt["slots"]:
            slot.pop("iters", None)
    if "data-file" in specific:
        specific["data-file"] = specific["data-file"].replace(path.name, "NAME")
    names = ("virtual-size", "cluster-size", "encrypted", "dirty-flag", "backing-filename", "backing-filename-format")
    return {"specific": specific, **{name: found.get(name) for name in names}}


def extents(case: Case, path: Path) -> list[tuple[Any, ...]]:
    """`qemu-img map`, without the offsets in the file."""
    names = ("depth", "present", "zero", "data", "compressed")
    merged: list[tuple[Any, ...]] = []
    for extent in json.loads(qemu_img(case, path, "map", "--output=json")):
        kind = tuple(extent.get(name) for name in names)
        start, end = extent["start"], extent["start"] + extent["length"]
        if merged and merged[-1][2:] == kind:
            start = merged.pop()[0]
        merged.append((start, end, *kind))
    return merged


@pytest.mark.parametrize("name", CASES)
def test_both_directions(name: str, tmp_path: Path, content: bytes) -> None:
    case = CASES[name]
    unit = 64 * KiB if "cluster-size" not in case.options else case.options["cluster-size"]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    model = bytearray(SIZE)
    if case.backing:
        images.create(tmp_path / "base.qcow2", SIZE)
        images.io(tmp_path / "base.qcow2", "write -P 0x11 0 1M", "write -P 0x22 3M 256k")
        model[:MiB] = b"\x11" * MiB
        model[3 * MiB : 3 * MiB + 256 * KiB] = b"\x22" * (256 * KiB)
    for at in range(0, SIZE, unit):
        if any(content[at : at + unit]):
            model[at : at + unit] = content[at : at + unit]

    # Made by each side.
    with Server("pyqsd", tmp_path, case) as server:
        server.create("ours")
        client = server.open("ours", compress=case.compress)
        write_all(client, content, unit)
        server.close(client)
    argv = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if options := case.create_options("theirs"):
        argv += ["-o", options]
    if case.luks is not None:
        argv += ["--object", f"secret,id=key,data={PASSPHRASE}"]
    if case.backing:
        argv += ["-b", "base.qcow2", "-F", "qcow2"]
    peers.run(*argv, "theirs", str(SIZE), cwd=tmp_path)
    with Server("qsd", tmp_path, case) as server:
        client = server.open("theirs", compress=case.compress)
        write_all(client, content, unit)
        server.close(client)

    # Judged, compared, mapped.
    for path in (ours, theirs):
        qemu_img(case, path, "check", "-q")
    assert described(case, ours) == described(case, theirs)
    assert extents(case, ours) == extents(case, theirs)

    # Read and written on by the other side, and again by the first.
    state = {"ours": bytearray(model), "theirs": bytearray(model)}
    for turn, (kind, file) in enumerate((("qsd", "ours"), ("pyqsd", "theirs"), ("pyqsd", "ours"), ("qsd", "theirs"))):
        with Server(kind, tmp_path, case) as server:
            if turn < 2:
                assert server.content(file) == model
            client = server.open(file)
            scribble(client, state[file], turn + 1, 512 if case.luks is not None else 1)
            server.close(client)
            assert server.content(file) == state[file]
        qemu_img(case, tmp_path / file, "check", "-q")
    for kind, file in (("qsd", "ours"), ("pyqsd", "theirs")):
        with Server(kind, tmp_path, case) as server:
            assert server.content(file) == state[file]
    if case.options.get("data-file-raw"):
        assert (tmp_path / "ours.data").read_bytes()[:SIZE] == state["ours"]
