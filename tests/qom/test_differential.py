"""The same object commands and command lines to the real qemu-storage-daemon and to pyqsd."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from tests.chardev.test_differential import compare, get
from tests.qom.test_objects import IV, KEY, b64, encrypt
from tests.support.daemon import run_to_end
from tests.system.differential import Session, Subset, cmd, program_text

SECRETS = [
    {"data": "hello"},
    {"data": "größer"},
    {"data": ""},
    {},
    {"data": "x", "file": "x"},
    {"file": "text"},
    {"file": "nonexistent"},
    {"file": "/"},
    {"file": ""},
    {"data": 5},
    {"data": "x", "foo": 1},
    {"data": "x", "format": "nosuch"},
    *({"data": data, "format": "base64"} for data in ("aGVsbG8=", "ab*d", "a b", "YW\nJj", "====", "YWJjZ", "YWI=x")),
    {"data": "x", "keyid": "nosuch"},
    {"data": "x", "keyid": "nosuch", "iv": "*"},
    {"data": "x", "keyid": ""},
    {"data": "x", "keyid": "plain"},
    {"data": "x", "keyid": "short"},
    {"data": "x", "keyid": "key"},
    {"data": "x", "keyid": "key", "iv": "*"},
    {"data": "x", "keyid": "key", "iv": ""},
    {"data": "x", "keyid": "key", "iv": b64(IV * 2)},
    {"data": "x", "keyid": "key", "iv": b64(IV)},
    {"data": "x", "iv": "*"},
]


def ciphertexts() -> list[dict[str, str]]:
    encrypted = {"format": "base64", "keyid": "key", "iv": b64(IV)}
    return [
        {"data": encrypt(b"hello"), **encrypted},
        {"data": encrypt(b""), **encrypted},
        {"data": encrypt(b"x" * 16, pad=False), **encrypted},
        *({"data": encrypt(b"x" * 15 + bytes((n,)), pad=False), **encrypted} for n in (0, 1, 3, 16, 17, 255)),
        {"data": encrypt(b"hello"), **encrypted, "format": "raw"},
        {"data": encrypt(b"hello")[:-4], **encrypted},
    ]


def add(qom_type: str, id: str = "a", **members: Any) -> dict[str, Any]:
    return {"execute": "object-add", "arguments": {"qom-type": qom_type, "id": id, **members}}


def listed(*paths: str) -> list[dict[str, Any]]:
    return [cmd("qom-list", path=path) for path in paths]


def put(path: str, **properties: Any) -> list[dict[str, Any]]:
    return [cmd("qom-set", path=path, property=name, value=value) for name, value in properties.items()]


def test_secrets(tmp_path: Path) -> None:
    names = ("data", "file", "format", "keyid", "iv", "type", "rawdata")
    steps: list[Any] = [
        add("secret", "key", data=b64(KEY), format="base64"),
        add("secret", "short", data="short"),
        add("authz-simple", "plain", identity="x"),
    ]
    for members in SECRETS + ciphertexts():
        steps += [add("secret", **members), *get("a", *names), cmd("object-del", id="a")]
    compare(Session("secrets", steps), tmp_path)


RULES = [{"match": "a*", "policy": "allow", "format": "glob"}, {"match": "b", "policy": "deny"}]

OBJECTS = Session(
    "objects",
    [
        cmd("object-add"),
        cmd("object-add", id_="a"),
        {"execute": "object-add", "arguments": {"qom-type": "secret"}},
        add("nosuch"),
        *(add("secret", name, data="x") for name in ("1", "a b", "", "ä", "type", "z" * 300)),
        cmd("object-del"),
        cmd("object-del", id="nosuch"),
        cmd("object-del", id="qmp0"),
        cmd("object-del", id="type"),
        add("secret", "s", data="x"),
        add("secret", "s", data="x"),
        add("authz-simple", "s", identity="x"),
        add("secret", "qmp0", data="x"),
        *listed("/", "/objects", "objects", "/chardevs", "/backend", "s", "/objects/s", "//objects//s/", "qmp0"),
        *listed("", "/nosuch", "nosuch", "objects/s", "/objects/s/data", "/objects/../s", "/s", "/machine"),
        *get("qmp0", "type"),
        *put("qmp0", type="x"),
        cmd("object-del", id="qmp0"),
        *get("/objects", "s", "type", "nosuch"),
        *get("/", "objects", "type", "chardevs", "nosuch"),
        *get("", "type"),
        *get("nosuch", "type"),
        *put("/objects", s="x", type="x", nosuch="x"),
        *put("nosuch", s="x"),
        cmd("qom-get", path="s"),
        cmd("qom-set", path="s", property="data"),
        cmd("qom-list"),
        *put("s", data="new", format="base64", keyid="k", iv="i", file="f", type="x", nosuch="x"),
        *get("s", "data", "format", "keyid", "iv", "file"),
        *put("s", data=None, format="x", keyid=5),
        *get("s", "data", "format", "keyid"),
        add("authz-simple"),
        add("authz-simple", "z", identity="fred"),
        *listed("z"),
        *get("z", "identity", "policy"),
        *put("z", identity="bob", policy="x"),
        *put("z", identity=5),
        *get("z", "identity"),
        add("authz-list", "l", rules=RULES),
        *listed("l"),
        *get("l", "rules", "policy", "identity"),
        *put("l", rules=[{"match": "c"}], policy="nosuch"),
        *put("l", rules=[{"match": "c", "policy": "nosuch"}], policy=5),
        *put("l", rules=5),
        *put("l", rules=[], policy="allow"),
        *get("l", "rules", "policy"),
        add("authz-list", "m", rules=[{"match": "c", "policy": "nosuch"}]),
        add("authz-list", "m", rules=[{"match": "c"}]),
        add("authz-list", "m", rules=[5]),
        add("authz-list", "m"),
        *get("m", "rules", "policy"),
        add("authz-listfile", "f"),
        add("secret_keyring", "k"),
        add("secret_keyring", "k", serial=0),
        add("secret_keyring", "k", serial=-16),
        add("secret_keyring", "k", serial=1 << 31),
        add("secret_keyring", "k", serial="1"),
        *(
            cmd("qom-list-properties", typename=name)
            for name in (
                "object",
                "interface",
                "user-creatable",
                "container",
                "secret",
                "secret_common",
                "secret_keyring",
                "authz",
                "authz-simple",
                "authz-list",
                "authz-list-file",
                "authz-listfile",
                "chardev",
                "chardev-fd",
                "chardev-socket",
                "chardev-stdio",
                "chardev-memory",
                "nosuch",
                "",
            )
        ),
        cmd("qom-list-properties"),
        Subset("qom-list-types", "name", ["secret", "container", "chardev-socket"]),
        Subset(cmd("qom-list-types", abstract=True), "name", ["secret_common", "object", "interface", "authz"]),
        Subset(cmd("qom-list-types", implements="user-creatable"), "name", ["secret", "authz-list-file"]),
        Subset(cmd("qom-list-types", implements="user-creatable", abstract=True), "name", ["secret_common"]),
        Subset(cmd("qom-list-types", implements="interface", abstract=True), "name", ["interface", "secret"]),
        Subset(cmd("qom-list-types", implements="object", abstract=True), "name", ["object", "secret"]),
        cmd("qom-list-types", implements="secret_common", abstract=True),
        cmd("qom-list-types", implements="authz"),
        cmd("qom-list-types", implements="nosuch"),
        cmd("qom-list-types", abstract="yes"),
        Subset(cmd("qom-list-types", implements="chardev", abstract=True), "name", ["chardev-fd", "chardev-pty"]),
        Subset("query-chardev-backends", "name", ["socket", "stdio", "file", "pipe", "pty", "null", "ringbuf"]),
    ],
)


def test_objects(tmp_path: Path) -> None:
    compare(OBJECTS, tmp_path)


def limits(**values: int) -> dict[str, int]:
    return {name.replace("_", "-"): value for name, value in values.items()}


GROUPS: list[dict[str, Any]] = [
    {},
    *(
        {"limits": limits(**values)}
        for values in (
            {},
            {"iops_total": 100},
            {"iops_total": 100, "iops_read": 5},
            {"bps_total": 100, "bps_write": 5},
            {"bps_total": 100, "iops_write": 5},
            {"bps_total": -1},
            {"bps_total": 10**15},
            {"bps_total": 10**15 + 1},
            {"iops_size": 4096},
            {"iops_size": 4096, "bps_total": 5},
            {"iops_size": 4096, "iops_total_max": 5},
            {"iops_size": 4096, "iops_read": 5},
            {"iops_size": -1, "iops_read": 5},
            {"iops_total_max": 10},
            {"iops_total": 10, "iops_total_max": 5},
            {"iops_total": 10, "iops_total_max": 50, "iops_total_max_length": 60},
            {"iops_total": 10, "iops_total_max": 50, "iops_total_max_length": 0},
            {"iops_total": 10, "iops_total_max_length": 5},
            {"iops_total": 10, "iops_total_max": 50, "iops_total_max_length": 1 << 32},
            {"iops_total": 10, "iops_total_max": 50, "iops_total_max_length": (1 << 32) - 1},
            {"iops_total": 1, "iops_total_max": 10**15, "iops_total_max_length": 2},
            {"iops_total": 1, "iops_total_max": 10**15, "iops_total_max_length": 1},
            {"iops_total": 7, "iops_total_max": 6, "iops_total_max_length": 0},
            {"bps_total": 7, "bps_total_max": 6, "iops_total_max": 5},
            {"bps_read": 10, "bps_write": 20, "bps_read_max": 100},
            {"bps_read": 10, "bps_total_max": 100},
            {"iops_total_max": 7, "iops_read_max": 6},
            {"iops_total": 6, "iops_read_max": 6},
            {"foo": 1},
        )
    ),
    {"limits": {"iops-total": "1"}},
    {"limits": 5},
    {"x-iops-total": 100},
    {"x-iops-total": 100, "limits": {"iops-read": 5}},
    {"x-iops-total": 100, "limits": {"bps-read": 5}},
    {"x-iops-total": -5},
    {"x-iops-size": -5},
    {"x-iops-total-max-length": 0},
    {"x-iops-total-max-length": -1},
    {"x-iops-total-max-length": 1 << 32},
    {"x-bps-total": 1000, "x-bps-total-max": 2000, "x-bps-total-max-length": 3, "x-iops-write": 5, "x-iops-size": 5},
]


def test_throttle_groups(tmp_path: Path) -> None:
    steps: list[Any] = []
    for members in GROUPS:
        steps += [add("throttle-group", **members), *get("a", "limits"), cmd("object-del", id="a")]
    steps += [add("throttle-group", limits=limits(iops_total=10)), *listed("a")]
    for value in (
        limits(bps_total=5),
        limits(iops_total=5, iops_total_max=50),
        limits(iops_total_max=60),
        limits(iops_read=5),
        limits(iops_total=0),
        limits(iops_total=0, iops_total_max=0),
        {"foo": 1},
        {"iops-total": "x"},
        5,
    ):
        steps += [*put("a", limits=value), *get("a", "limits", "x-iops-total", "x-iops-total-max-length", "iops-total")]
    steps += [cmd("qom-set", path="a", property="x-iops-total", value=value) for value in (5, -5, "x")]
    steps.append(cmd("qom-list-properties", typename="throttle-group"))
    compare(Session("throttle groups", steps), tmp_path)


MISTAKES = [
    "throttle-group,id=x,limits.iops-total=1k",
    "throttle-group,id=x,x-iops-total=abc",
    "throttle-group,id=x,limits.iops-total=1,limits.iops-read=1",
    "throttle-group,help",
    "secret,id=x,data=a,nosuch=1",
    "secret,id=,data=a",
    "authz-list-file,id=x",
    "authz-simple,id=x",
    "authz-list,id=x,policy=foo",
    "authz-list,id=x,rules.0.match=foo",
    "authz-list,id=x,rules.0.match=foo,rules.0.policy=foo",
    "authz-list,id=x,rules.1.match=foo,rules.1.policy=deny",
    "secret,id=x,file=/nonexistent",
    "secret,id=x,data=x,keyid=x",
    "secret_keyring,id=x,serial=abc",
    "secret_keyring,id=x,serial=99999999999",
    "secret,id=x,data",
    '{"qom-type":"secret","id":"x","data":1}',
    '{"qom-type":"secret_keyring","id":"x","serial":"1"}',
    "secret,help",
    "secret_keyring,help",
    "authz-list,id=x,?",
    "authz-simple,help",
    "authz-list-file,help",
    "container,help",
    "chardev-socket,help",
    "authz,help",
    "secret_common,help",
]


@pytest.mark.parametrize("text", MISTAKES)
def test_command_line(text: str, tmp_path: Path) -> None:
    results = []
    for kind in ("qsd", "pyqsd"):
        done = run_to_end(kind, ["--object", text], workdir=tmp_path)
        results.append((done.returncode, done.stdout, program_text(done.stderr)))
    assert results[0] == results[1]


def test_a_secret_for_another_on_the_command_line(tmp_path: Path) -> None:
    """Both take the same command line; the differential sessions above need no more than that they start."""
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "secret").write_bytes(base64.b64decode(encrypt(b"hello")))
    args = ["--object", "secret,id=key,file=key", "--object", f"secret,id=a,file=secret,keyid=key,iv={b64(IV)}"]
    sentinel = ["--object", "nosuch-sentinel"]
    for kind in ("qsd", "pyqsd"):
        done = run_to_end(kind, [*args, *sentinel], workdir=tmp_path)
        assert "does not accept value 'nosuch-sentinel'" in done.stderr and done.returncode == 1
