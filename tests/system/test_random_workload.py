"""1,000 random steps over NBD, on pyqsd and on the real daemon: every byte as the model says, the same in the end."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tests.drivers.qcow2 import encrypted
from tests.support import images
from tests.system.workload import KiB, MiB, Runner, make_steps

SIZE = 3 * MiB
MAX_SIZE = 5 * MiB
STEPS = 1000

# name → (format, qemu-img options, backing?, extra format node options, extra file node options, seed)
KINDS: dict[str, tuple[str, str, bool, dict[str, Any], dict[str, Any], int]] = {
    "raw": ("raw", "", False, {"discard": "unmap"}, {"discard": "unmap"}, 1),
    "raw-direct": ("raw", "", False, {}, {"cache": {"direct": True}}, 2),
    "qcow2": ("qcow2", "", False, {"discard": "unmap"}, {"discard": "unmap"}, 3),
    "qcow2-v2": ("qcow2", "compat=0.10", False, {"discard": "unmap"}, {}, 4),
    "qcow2-4k": ("qcow2", "cluster_size=4k", False, {"discard": "unmap", "l2-cache-size": 8 * KiB}, {}, 5),
    "qcow2-512": ("qcow2", "cluster_size=512", False, {"discard": "unmap"}, {}, 6),
    "qcow2-2M": ("qcow2", "cluster_size=2M", False, {"discard": "unmap"}, {}, 7),
    "qcow2-backing": ("qcow2", "", True, {"discard": "unmap"}, {"discard": "unmap"}, 8),
    "qcow2-v2-backing": ("qcow2", "compat=0.10", True, {"discard": "unmap"}, {}, 9),
    "qcow2-4k-backing-lazy": ("qcow2", "cluster_size=4k,lazy_refcounts=on", True, {"discard": "unmap"}, {}, 10),
    "qcow2-refcount1": ("qcow2", "refcount_bits=1", False, {"discard": "unmap"}, {}, 11),
    "qcow2-refcount64": ("qcow2", "refcount_bits=64,cluster_size=8k", True, {"discard": "unmap"}, {}, 12),
    "qcow2-detect-zeroes": ("qcow2", "", True, {"discard": "unmap", "detect-zeroes": "unmap"}, {}, 13),
    "qcow2-discard-no-unref": ("qcow2", "", False, {"discard": "unmap", "discard-no-unref": True}, {}, 14),
    "qcow2-direct": ("qcow2", "cluster_size=16k", True, {"discard": "unmap"}, {"cache": {"direct": True}}, 15),
}


#: name → (method, creation options of `encrypted.make`, extra file node options, seed)
ENCRYPTED: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "luks": ("luks", {}, {"discard": "unmap"}, 16),
    "luks-extended-direct": ("luks", {"extended_l2": True}, {"cache": {"direct": True}}, 17),
}


def run_encrypted(daemon: str, root: Path, spec: tuple[str, dict[str, Any], dict[str, Any], int]) -> bytes:
    """The same for an encrypted image."""
    method, creation, file_options, seed = spec
    root.mkdir()
    path = encrypted.make(root / "disk.img", SIZE, method, **creation)
    model = bytearray(SIZE)
    options = {"discard": "unmap", "encrypt": {"format": method, "key-secret": "s"}}
    image = {
        "driver": "qcow2",
        "format": options,
        "file": {"filename": "disk.img", **file_options},
        "objects": [{"qom-type": "secret", "id": "s", "data": encrypted.PASSPHRASE}],
    }
    runner = Runner(daemon, root, image, model, extended=seed % 2 == 0)
    runner.run(make_steps(seed, STEPS, SIZE, MAX_SIZE, creation.get("cluster_size", 64 * KiB)))
    encrypted.assert_clean(path, method)
    content = encrypted.read_all(path, method, root / "scratch.raw")
    assert content == bytes(model), "qemu-img reads something else than the daemon did"
    return content


@pytest.mark.parametrize("name", ENCRYPTED)
def test_encrypted(name: str, tmp_path: Path) -> None:
    ours = run_encrypted("pyqsd", tmp_path / "pyqsd", ENCRYPTED[name])
    theirs = run_encrypted("qsd", tmp_path / "qsd", ENCRYPTED[name])
    assert hashlib.sha256(ours).digest() == hashlib.sha256(theirs).digest(), "the two daemons end with other contents"


#: name → (qemu-img options, cluster size, extra node options, seed)
DATA_FILES: dict[str, tuple[str, int, dict[str, Any], int]] = {
    "data-file": ("", 64 * KiB, {"discard": "unmap"}, 20),
    "data-file-raw": ("data_file_raw=on", 64 * KiB, {"discard": "unmap"}, 21),
    "data-file-512": ("cluster_size=512", 512, {"discard": "unmap"}, 22),
    "data-file-raw-extended": ("data_file_raw=on,extended_l2=on,cluster_size=16k", 16 * KiB, {"discard": "unmap"}, 23),
    "data-file-extended-lazy": ("extended_l2=on,lazy_refcounts=on,cluster_size=2M", 2 * MiB, {}, 24),
    "data-file-no-unref": ("cluster_size=4k", 4 * KiB, {"discard": "unmap", "discard-no-unref": True}, 25),
}


def run_data_file(root: Path, spec: tuple[str, int, dict[str, Any], int], steps: int, seed: int | None = None) -> None:
    """An image with an external data file, made larger and smaller every few steps. Not with the real daemon, which
    ends itself when such an image is resized without a writer, and refuses it with one."""
    options, cluster, node_options, own_seed = spec
    root.mkdir()
    data = root / "data.raw"
    path = images.create(root / "disk.img", SIZE, options=f"data_file={data}" + (options and f",{options}"))
    model = bytearray(SIZE)
    image = {
        "driver": "qcow2",
        "format": {**node_options, "data-file": "data"},
        "nodes": [{"driver": "file", "node-name": "data", "filename": "data.raw", "discard": "unmap"}],
        "file": {"filename": "disk.img", "discard": "unmap"},
    }
    runner = Runner("pyqsd", root, image, model, extended=own_seed % 2 == 0)
    # Every other size ends within a cluster.
    unit = cluster if own_seed % 2 else 512
    runner.run(make_steps(own_seed if seed is None else seed, steps, SIZE, MAX_SIZE, unit, resizes=8))
    images.assert_clean(path)
    content = images.read_all(path, "qcow2", root / "scratch.raw")
    assert content == bytes(model), "qemu-img reads something else than the daemon did"
    if "data_file_raw" in options:
        assert data.read_bytes() == content, "the data file is not the disk"


@pytest.mark.parametrize("name", DATA_FILES)
def test_data_file(name: str, tmp_path: Path) -> None:
    run_data_file(tmp_path / "pyqsd", DATA_FILES[name], 400)


def run_workload(
    daemon: str,
    root: Path,
    spec: tuple[str, str, bool, dict[str, Any], dict[str, Any], int],
    steps: int = STEPS,
    seed: int | None = None,
) -> bytes:
    """One whole run in the new directory `root`; the content of the image afterwards, as qemu-img reads it."""
    fmt, options, backing, format_options, file_options, own_seed = spec
    root.mkdir()
    model = bytearray(SIZE)
    if backing:
        images.create(root / "base.qcow2", 2 * MiB, "qcow2")
        images.io(root / "base.qcow2", "write -P 0x5a 0 700k", "write -P 0x77 1500k 300k")
        model[: 700 * KiB] = b"\x5a" * (700 * KiB)
        model[1500 * KiB : 1800 * KiB] = b"\x77" * (300 * KiB)
        images.create(root / "disk.img", SIZE, fmt, options, backing="base.qcow2", cwd=root)
        base = (root / "base.qcow2").read_bytes()
    else:
        images.create(root / "disk.img", SIZE, fmt, options)
    image: dict[str, Any] = {"driver": fmt, "format": format_options, "file": {"filename": "disk.img", **file_options}}
    if backing:
        image["backing"] = {"driver": "qcow2", "file": {"driver": "file", "filename": "base.qcow2"}}
    # QSD does not write to a raw file that does not end with a whole unit of O_DIRECT.
    unit = images.info(root / "disk.img")["cluster-size"] if fmt == "qcow2" else 4 * KiB if file_options else 512
    runner = Runner(daemon, root, image, model, extended=own_seed % 2 == 0)
    runner.run(make_steps(own_seed if seed is None else seed, steps, SIZE, MAX_SIZE, unit))
    if fmt == "qcow2":
        images.assert_clean(root / "disk.img")
    if backing:
        assert (root / "base.qcow2").read_bytes() == base, "the backing file was written"
    content = images.read_all(root / "disk.img", fmt, root / "scratch.raw")
    assert content == bytes(model), "qemu-img reads something else than the daemon did"
    return content


@pytest.mark.parametrize("name", KINDS)
def test_workload(name: str, tmp_path: Path) -> None:
    ours = run_workload("pyqsd", tmp_path / "pyqsd", KINDS[name])
    theirs = run_workload("qsd", tmp_path / "qsd", KINDS[name])
    assert hashlib.sha256(ours).digest() == hashlib.sha256(theirs).digest(), "the two daemons end with other contents"
