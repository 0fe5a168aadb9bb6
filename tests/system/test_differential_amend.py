"""Differential: x-blockdev-amend, as far as QSD has it (key slots)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support import images, peers
from tests.system.differential import Context, Do, Session, add, check_session, cmd, delete

SECRETS = [cmd("object-add", qom_type="secret", id=name, data=name) for name in ("key", "new", "bad")]


def concluded(context: Context) -> list[str]:
    """Waits for the end of a job, and tells its states."""
    states: list[str] = []
    while not states or states[-1] != "concluded":
        states.append(context.daemon.qmp.wait_event("JOB_STATUS_CHANGE")["data"]["status"])
    return states


CONCLUDED = Do("the job's way", concluded)


def luks(name: str = "disk", secret: str = "key", **more: Any) -> dict[str, Any]:
    return add(
        driver="qcow2",
        node_name=name,
        encrypt={"format": "luks", "key-secret": secret},
        file={"driver": "file", "filename": "luks.qcow2"},
        **more,
    )


def amend(node: str = "disk", *, force: bool | None = None, **encrypt: Any) -> list[Any]:
    """The command with its job from beginning to end."""
    options: dict[str, Any] = {"driver": "qcow2"}
    if encrypt:
        options["encrypt"] = {"format": "luks", **{key.replace("_", "-"): value for key, value in encrypt.items()}}
    arguments: dict[str, Any] = {"job_id": "job", "node_name": node, "options": options}
    if force is not None:
        arguments["force"] = force
    return [cmd("x-blockdev-amend", **arguments), CONCLUDED, cmd("query-jobs"), cmd("job-dismiss", id="job")]


def activate(**more: Any) -> list[Any]:
    return amend(state="active", **{"iter_time": 10, **more})


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("amend")
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=key,data=key"]
    options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
    peers.run(*create, "-o", options, root / "luks.qcow2", "4M")
    options = "encrypt.format=aes,encrypt.key-secret=key"
    peers.run(*create, "-o", options, root / "aes.qcow2", "4M")
    images.create(root / "plain.qcow2", 4 << 20)
    return root


PLAIN = add(driver="qcow2", node_name="plain", file={"driver": "file", "filename": "plain.qcow2"})
AES = add(
    driver="qcow2",
    node_name="aes",
    encrypt={"format": "aes", "key-secret": "key"},
    file={"driver": "file", "filename": "aes.qcow2"},
)

SESSIONS = [
    Session(
        "amend-mistakes",
        [
            *SECRETS,
            PLAIN,
            AES,
            luks(),
            add(driver="file", node_name="file", filename="plain.qcow2"),
            cmd("x-blockdev-amend", job_id="job", node_name="nosuch", options={"driver": "qcow2"}),
            cmd("x-blockdev-amend", job_id="job", node_name="disk", options={"driver": "raw"}),
            cmd("x-blockdev-amend", job_id="job", node_name="file", options={"driver": "file"}),
            cmd("x-blockdev-amend", job_id="1", node_name="disk", options={"driver": "qcow2"}),
            cmd("x-blockdev-amend", job_id="job", node_name="disk", options={}),
            cmd("x-blockdev-amend", job_id="job", node_name="disk", options={"driver": "qcow2", "encrypt": {}}),
            cmd(
                "x-blockdev-amend",
                job_id="job",
                node_name="disk",
                options={"driver": "qcow2", "encrypt": {"format": "luks"}},
            ),
            cmd(
                "x-blockdev-amend",
                job_id="job",
                node_name="disk",
                options={"driver": "qcow2", "encrypt": {"format": "qcow", "key-secret": "key"}},
            ),
            *amend("plain"),
            *amend("plain", state="active", new_secret="new"),
            *amend("aes", state="active", new_secret="new"),
            cmd(
                "x-blockdev-amend",
                job_id="job",
                node_name="disk",
                options={"driver": "qcow2", "encrypt": {"format": "qcow"}},
            ),
            CONCLUDED,
            cmd("query-jobs"),
            cmd("x-blockdev-amend", job_id="job", node_name="disk", options={"driver": "qcow2"}),
        ],
        images=("plain.qcow2", "aes.qcow2", "luks.qcow2"),
    ),
    Session(
        "amend-key-slots",
        [
            *SECRETS,
            luks(),
            *amend(),
            *activate(),
            *activate(new_secret="nosuch"),
            *activate(new_secret="new", secret="bad"),
            *activate(new_secret="new", keyslot=9),
            *activate(new_secret="new", keyslot=-1),
            *activate(new_secret="new", keyslot=0),
            *activate(new_secret="new", old_secret="key"),
            *amend(state="inactive"),
            *amend(state="inactive", new_secret="new"),
            *amend(state="inactive", keyslot=0, secret="key"),
            *amend(state="inactive", iter_time=10, keyslot=3),
            *amend(state="inactive", old_secret="bad"),
            *amend(state="inactive", old_secret="key"),
            *amend(state="inactive", keyslot=0, old_secret="bad"),
            *amend(state="inactive", keyslot=5),
            *activate(new_secret="new", keyslot=3),
            *activate(new_secret="key"),
            *amend(state="inactive", old_secret="key"),
            *amend(state="inactive", keyslot=3),
            delete("disk"),
            luks(),
            luks(secret="new"),
            *activate(new_secret="key", secret="new"),
            *amend(state="inactive", keyslot=3),
            *amend(state="inactive", keyslot=0, force=True),
            delete("disk"),
            luks(),
        ],
        images=("luks.qcow2",),
    ),
    Session(
        "amend-full",
        [
            *SECRETS,
            luks(),
            *(step for _ in range(7) for step in activate(new_secret="new")),
            *amend(state="inactive", old_secret="new"),
            *activate(new_secret="bad"),
        ],
        images=("luks.qcow2",),
    ),
]


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name)
def test_session(session: Session, encrypted: Path, tmp_path: Path) -> None:
    check_session(session, encrypted, tmp_path)
