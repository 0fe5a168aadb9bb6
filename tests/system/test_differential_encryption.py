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
