"""Differential: opening encrypted images with all the mistakes, what is told about them, and what clients read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tests.drivers.qcow2 import encrypted
from tests.support.nbd import NbdClient
from tests.system.differential import Context, Do, Session, add, check_session, cmd, delete

NODES = cmd("query-named-block-nodes")
OBJECTS = [
    cmd("object-add", qom_type="secret", id="s", data=encrypted.PASSPHRASE),
    cmd("object-add", qom_type="secret", id="wrong", data="simsalabim"),
    cmd("object-add", qom_type="secret", id="binary", data="/w==", format="base64"),
    cmd("object-add", qom_type="secret", id="empty", data=""),
    cmd("object-add", qom_type="throttle-group", id="throttle"),
]


def file(filename: str) -> dict[str, Any]:
    return {"driver": "file", "filename": filename}


def image(filename: str, **more: Any) -> dict[str, Any]:
    return add(driver="qcow2", node_name="disk", file=file(filename), **more)


def reopen(filename: str, **more: Any) -> dict[str, Any]:
    options = {"driver": "qcow2", "node-name": "disk", "file": file(filename), **more}
    return cmd("blockdev-reopen", options=[options])


def key(method: str, secret: str | None = "s") -> dict[str, Any]:
    return {"format": method} if secret is None else {"format": method, "key-secret": secret}


def mistakes(method: str, other: str) -> list[Any]:
    name = f"{method}.qcow2"
    steps: list[Any] = list(OBJECTS)
    for options in (
        {},
        {"encrypt": key(method, None)},
        {"encrypt": key(other)},
        {"encrypt": key(method, "nosuch")},
        {"encrypt": key(method, "binary")},
        {"encrypt": key(method, "throttle")},
        {"encrypt": {"key-secret": "s"}},
        {"encrypt": {"format": "rot13", "key-secret": "s"}},
        {"encrypt": {"format": method, "key-secret": 5}},
        {"encrypt": {"format": method, "key-secret": "s", "iter-time": 5}},
    ):
        steps.append(image(name, **options))
    for secret in ("wrong", "empty"):
        steps += [image(name, read_only=True, encrypt=key(method, secret)), delete("disk")]
    steps += [image("plain.qcow2", encrypt=key(method)), image("plain.qcow2", encrypt=key(method, "nosuch"))]
    return steps


def life(method: str, other: str) -> list[Any]:
    name = f"{method}.qcow2"
    return [
        *OBJECTS,
        image(name, encrypt=key(method)),
        NODES,
        reopen(name, encrypt=key(method)),
        reopen(name),
        reopen(name, encrypt=key(method, None)),
        reopen(name, encrypt=key(other)),
        reopen(name, encrypt=key(method, "nosuch")),
        NODES,
        cmd("object-del", id="s"),
        reopen(name, encrypt=key(method, "wrong"), **{"read-only": True}),
        NODES,
        delete("disk"),
        image(name, encrypt=key(method)),
    ]


def nbd(label: str, action: Any) -> Do:
    def run(context: Context) -> Any:
        with NbdClient(context.workdir / "nbd.sock", "disk", contexts=("base:allocation",)) as client:
            result = action(client)
            client.disconnect()
        return result

    return Do(label, run)


def requests(client: NbdClient) -> list[str]:
    """Aligned and odd requests, and what is there afterwards."""
    client.pwrite(0, b"first" * 3000)
    client.pwrite(70_001, b"odd")
    client.pwrite(0x100000 - 300, b"over the edge of a cluster" * 40)
    client.pwrite(300_000, bytes(range(256)) * 2000)
    client.zero(310_000, 5000)
    client.flush()
    return [hashlib.sha256(client.pread(at, 65536)).hexdigest() for at in range(0, 2 << 20, 65536)]


def information(context: Context) -> Any:
    with NbdClient(context.workdir / "nbd.sock") as client:
        return client.info("disk", (3,))[3].hex()


def export(method: str) -> list[Any]:
    return [
        *OBJECTS,
        image(f"{method}.qcow2", encrypt=key(method)),
        cmd("nbd-server-start", addr={"type": "unix", "data": {"path": "nbd.sock"}}),
        cmd("block-export-add", type="nbd", id="e", node_name="disk", name="disk", writable=True),
        Do("information", information),
        nbd("requests", requests),
        nbd("where data is", lambda client: client.block_map("base:allocation")),
        cmd("block-export-del", id="e", mode="hard"),
        cmd("block_resize", node_name="disk", size=3 << 20),
        cmd("block_resize", node_name="disk", size=1 << 20),
    ]


def mangled(data: bytes) -> dict[str, bytes]:
    """The luks image with one thing wrong in each copy, by name."""
    extension = data.index(b"\x05\x37\xbe\x77")
    area = int.from_bytes(data[extension + 8 : extension + 16], "big")
    slot = area + 208

    def number(at: int, value: int, size: int = 4) -> bytes:
        return data[:at] + value.to_bytes(size, "big") + data[at + size :]

    def text(at: int, value: bytes) -> bytes:
        return data[:at] + value.ljust(32, b"\0") + data[at + 32 :]

    def material(*changes: tuple[int, int]) -> bytes:
        changed = bytearray(data)
        for at, value in changes:
            changed[at : at + 4] = value.to_bytes(4, "big")
        return bytes(changed)

    made = {
        "area-unaligned": number(extension + 8, area + 512, 8),
        "area-far-away": number(extension + 8, 1 << 40, 8),
        "area-beyond": number(extension + 8, (1 << 64) - 65536, 8),
        "area-in-data": number(extension + 8, 0, 8),
        "area-short": number(extension + 16, 591, 8),
        "area-without-material": number(extension + 16, 4096, 8),
        "area-empty": number(extension + 16, 0, 8),
        "area-huge": number(extension + 16, (1 << 64) - 1, 8),
        "extension-length": number(extension + 4, 24),
        "extension-missing": number(extension, 0x11111111),
        "method": number(32, 1),
        "no-method": number(32, 0),
        "magic": number(area, 0),
        "version": number(area + 6, 2, 2),
        "cipher": text(area + 8, b"rot13"),
        "cipher-odd": text(area + 8, b"\xff\xfe"),
        "cipher-unterminated": text(area + 8, b"a" * 32),
        "mode": text(area + 40, b"xts"),
        "mode-unknown": text(area + 40, b"ofb-plain64"),
        "ivgen": text(area + 40, b"xts-plainer"),
        "essiv": text(area + 40, b"xts-essiv"),
        "essiv-hash": text(area + 40, b"xts-essiv:sha1"),
        "hash": text(area + 72, b"crc32"),
        "other-hash": text(area + 72, b"sha512"),
        "payload": number(area + 104, 0),
        "payload-near": number(area + 104, 500),
        "key-bytes": number(area + 108, 65),
        "key-bytes-zero": number(area + 108, 0),
        "digest": number(area + 112, 0),
        "salt": number(area + 132, 0),
        "digest-iterations": number(area + 164, 0),
        "slot-state": number(slot, 1),
        "slot-inactive": number(slot, 0xDEAD),
        "slot-iterations": number(slot + 4, 0),
        "slot-other-iterations": number(slot + 4, 1),
        "slot-offset": number(slot + 40, 7),
        "slot-overlap": number(slot + 40, 511),
        "slot-stripes": number(slot + 44, 3999),
        "slot-stripes-many": number(slot + 44, 0xFFFFFFFF),
        "slot-far": material((area + 104, 0x7FFFFFFF), (slot + 40, 0x7F000000)),
        "material": number(area + 4096, 0),
        "second-slot-alike": material((slot + 48, 0x00AC71F3), (slot + 52, 1000)),
    }
    assert all(len(one) == len(data) and one != data for one in made.values())
    return made


IMAGES = ("aes.qcow2", "luks.qcow2", "plain.qcow2")
SESSIONS = [
    Session("luks-mistakes", mistakes("luks", "aes"), images=IMAGES),
    Session("aes-mistakes", mistakes("aes", "luks"), images=IMAGES),
    Session("luks-life", life("luks", "aes"), images=IMAGES),
    Session("aes-life", life("aes", "luks"), images=IMAGES),
    Session("luks-export", export("luks"), images=IMAGES),
    Session("aes-export", export("aes"), images=IMAGES),
]


@pytest.fixture(scope="module")
def encrypted_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encrypted")
    for method in encrypted.METHODS:
        encrypted.make(root / f"{method}.qcow2", 2 << 20, method)
    (root / "plain.qcow2").write_bytes(encrypted.empty_image(2 << 20))
    return root


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, encrypted_set: Path, tmp_path: Path) -> None:
    check_session(session, encrypted_set, tmp_path)


def test_mangled(encrypted_set: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    steps: list[Any] = [OBJECTS[0]]
    for name, data in mangled((encrypted_set / "luks.qcow2").read_bytes()).items():
        (root / name).write_bytes(data)
        steps += [image(name, read_only=True, encrypt=key("luks")), delete("disk")]
    names = tuple(path.name for path in root.iterdir())
    check_session(Session("luks-mangled", steps, images=names), root, tmp_path)
