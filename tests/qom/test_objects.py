"""User-creatable objects: the service, the types and the tree."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import json
import os
import subprocess
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from pyqsd.chardev.chardev import Chardevs
from pyqsd.chardev.options import ChardevBackend
from pyqsd.qapi.convert import convert
from pyqsd.qapi.errors import DeviceNotFound, Error
from pyqsd.qapi.keyval import parse_keyval
from pyqsd.qom import commands, registry
from pyqsd.qom.authz import Authorizer
from pyqsd.qom.object import UserObject
from pyqsd.qom.objects import Objects, help_for
from pyqsd.qom.options import ObjectOptions
from pyqsd.qom.secret import Secret
from pyqsd.qom.types import type_table
from tests.support import peers

KEY = b"0123456789abcdef0123456789ABCDEF"
IV = b"fedcba9876543210"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            await coroutine

    asyncio.run(main())


@pytest.fixture
def objects() -> Objects:
    return Objects(Chardevs())


async def add(objects: Objects, qom_type: str, id: str = "a", **members: Any) -> UserObject:
    return await objects.add(convert({"qom-type": qom_type, "id": id, **members}, ObjectOptions))


# --- secrets ----------------------------------------------------------------------------------------------------------


def encrypt(data: bytes, *, pad: bool = True) -> str:
    argv = [peers.require("openssl"), "enc", "-aes-256-cbc", "-K", KEY.hex(), "-iv", IV.hex()]
    done = subprocess.run(argv + ([] if pad else ["-nopad"]), input=data, capture_output=True, check=True)
    return b64(done.stdout)


@pytest.mark.parametrize(
    ("members", "content"),
    [
        ({"data": "hello"}, b"hello"),
        ({"data": "größer"}, "größer".encode()),
        ({"data": ""}, b""),
        ({"data": "aGVsbG8=", "format": "base64"}, b"hello"),
        ({"data": "aGVs\nbG8=\n", "format": "base64"}, b"hello"),
        ({"data": "/wA=", "format": "base64"}, b"\xff\0"),
        ({"data": "aGVsbG8=", "format": "raw"}, b"aGVsbG8="),
        # What is left over after the last four digits does not count, as with QSD.
        ({"data": "aGVsbG", "format": "base64"}, b"hel"),
        ({"data": "====", "format": "base64"}, b"\0"),
        ({"data": "QU=D", "format": "base64"}, b"A\x03"),
    ],
)
def test_secret(objects: Objects, members: dict[str, str], content: bytes) -> None:
    async def body() -> None:
        await add(objects, "secret", **members)
        assert objects.secret("a") == content

    run(body())


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 100])
@pytest.mark.parametrize("raw", [True, False])
def test_encrypted_secret(objects: Objects, tmp_path: Path, length: int, raw: bool) -> None:
    async def body() -> None:
        await add(objects, "secret", "key", data=b64(KEY), format="base64")
        content = os.urandom(length)
        ciphertext = encrypt(content)
        members: dict[str, Any] = {"data": ciphertext, "format": "base64"}
        if raw:
            (tmp_path / "file").write_bytes(base64.b64decode(ciphertext))
            members = {"file": str(tmp_path / "file"), "format": "raw"}
        await add(objects, "secret", "a", **members, keyid="key", iv=b64(IV))
        assert objects.secret("a") == content
        # The key may go; the secret stays.
        await objects.remove("key")
        assert objects.secret("a") == content

    run(body())


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({}, "Either 'file' or 'data' must be provided"),
        ({"data": "x", "file": "x"}, "'file' and 'data' are mutually exclusive"),
        ({"data": "ab*d", "format": "base64"}, "Base64 data contains invalid characters"),
        ({"data": "a b", "format": "base64"}, "Base64 data contains invalid characters"),
        ({"data": "ab\0d", "format": "base64"}, "Base64 data contains embedded NUL characters"),
        ({"data": "x", "keyid": "nosuch"}, "No secret with id 'nosuch'"),
        ({"data": "x", "keyid": "plain"}, "Object with id 'plain' is not a secret"),
        ({"data": "x", "keyid": "short", "iv": b64(IV)}, "Key should be 32 bytes in length"),
        ({"data": "x", "keyid": "key"}, "IV is required to decrypt secret"),
        ({"data": "x", "keyid": "key", "iv": "*"}, "Base64 data contains invalid characters"),
        ({"data": "x", "keyid": "key", "iv": b64(IV * 2)}, "IV should be 16 bytes in length not 32"),
        ({"data": "x", "keyid": "key", "iv": b64(IV)}, "Length 1 must be a multiple of block size 16"),
        (
            {"data": "PADDED", "format": "base64", "keyid": "key", "iv": b64(IV)},
            "Incorrect number of padding bytes (17) found on decrypted data",
        ),
        (
            {"data": "", "format": "base64", "keyid": "key", "iv": b64(IV)},
            "Incorrect number of padding bytes (0) found on decrypted data",
        ),
        (
            {"file": "/nonexistent/f"},
            "Unable to read /nonexistent/f: Failed to open file “/nonexistent/f”: No such file or directory",
        ),
        ({"file": "/"}, "Unable to read /: Error reading file “/”: Is a directory"),
    ],
)
def test_secret_mistakes(objects: Objects, members: dict[str, str], text: str) -> None:
    async def body() -> None:
        await add(objects, "secret", "key", data=KEY.decode())
        await add(objects, "secret", "short", data="short")
        await add(objects, "authz-simple", "plain", identity="x")
        if members.get("data") == "PADDED":
            members["data"] = encrypt(b"x" * 15 + b"\x11", pad=False)
        with pytest.raises(Error) as caught:
            await add(objects, "secret", "a", **members)
        assert caught.value.desc == text
        assert objects.find("a") is None
        with pytest.raises(Error, match="No secret with id 'a'"):
            objects.secret("a")
        # The name is free again.
        await add(objects, "secret", "a", data="x")

    run(body())


def test_secret_from_a_slow_pipe(objects: Objects, tmp_path: Path) -> None:
    """Reading what takes its time does not hold up the loop, and the name is taken meanwhile."""

    async def body() -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        # Open both ends first: a writer that is not there yet would be the end of the file.
        keep = os.open(fifo, os.O_RDWR)
        adding = asyncio.create_task(add(objects, "secret", file=str(fifo)))
        await asyncio.sleep(0)
        with pytest.raises(Error, match="attempt to add duplicate property 'a'"):
            await add(objects, "secret", data="x")
        assert objects.find("a") is None and not adding.done()

        def write() -> None:
            with open(fifo, "wb") as file:
                os.close(keep)
                file.write(b"x" * 100_000)

        thread = threading.Thread(target=write)
        thread.start()
        await adding
        thread.join()
        assert objects.secret("a") == b"x" * 100_000

    run(body())


def test_secret_text(objects: Objects) -> None:
    async def body() -> None:
        await add(objects, "secret", "a", data="schön")
        await add(objects, "secret", "b", data="/w==", format="base64")
        assert objects.secret_text("a") == "schön"
        with pytest.raises(Error, match="Data from secret b is not valid UTF-8"):
            objects.secret_text("b")

    run(body())


def test_keyring(objects: Objects) -> None:
    async def body() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        numbers = {"x86_64": 248}
        machine = os.uname().machine
        serial = libc.syscall(numbers.get(machine, 217), b"user", b"pyqsd-test", b"sekret" * 100, 600, ctypes.c_int(-3))
        if serial < 0:
            text = f"add_key: {os.strerror(ctypes.get_errno())}"
            if os.environ.get("PYQSD_TESTS_SKIP_MISSING") == "1":
                pytest.skip(text)
            pytest.fail(text)
        await add(objects, "secret_keyring", serial=serial)
        assert objects.secret("a") == b"sekret" * 100
        assert await commands.qom_get(objects, path="a", property="serial") == serial
        libc.syscall({"x86_64": 250}.get(machine, 219), 3, serial)  # KEYCTL_REVOKE
        with pytest.raises(Error, match=f"Unable to read serial key {serial:08x}: Key has been revoked"):
            await add(objects, "secret_keyring", "b", serial=serial)
        with pytest.raises(Error, match="Unable to read serial key fffffff0: Required key not available"):
            await add(objects, "secret_keyring", "b", serial=-16)
        with pytest.raises(Error, match="'serial' should not be equal to 0"):
            await add(objects, "secret_keyring", "b", serial=0)

    run(body())


# --- authorization ----------------------------------------------------------------------------------------------------


def allowed(objects: Objects, *identities: str) -> list[bool]:
    authorizer = objects.get("a", Authorizer)
    assert authorizer is not None
    return [authorizer.is_allowed(identity) for identity in identities]


def test_authz_simple(objects: Objects) -> None:
    async def body() -> None:
        await add(objects, "authz-simple", identity="fred")
        assert allowed(objects, "fred", "Fred", "", "fre*") == [True, False, False, False]
        await commands.qom_set(objects, path="a", property="identity", value="bob")
        assert allowed(objects, "fred", "bob") == [False, True]

    run(body())


def test_authz_list(objects: Objects) -> None:
    async def body() -> None:
        rules = [
            {"match": "bob", "policy": "deny"},
            {"match": "b*", "policy": "allow", "format": "glob"},
            {"match": "d*", "policy": "allow", "format": "exact"},
            {"match": "[!x]?\\*", "policy": "allow", "format": "glob"},
        ]
        await add(objects, "authz-list", rules=rules)
        assert allowed(objects, "bob", "bo", "bobby", "dan", "d*", "ab*", "abc", "xb*") == [
            False,
            True,
            True,
            False,
            True,
            True,
            False,
            False,
        ]
        await commands.qom_set(objects, path="a", property="policy", value="allow")
        assert allowed(objects, "bob", "somebody") == [False, True]
        await objects.remove("a")
        await add(objects, "authz-list")
        assert allowed(objects, "bob") == [False]

    run(body())


def test_authz_list_file(objects: Objects, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        file = tmp_path / "rules"
        file.write_text(json.dumps({"rules": [{"match": "bob", "policy": "allow"}]}))
        await add(objects, "authz-listfile", filename=str(file))
        await add(objects, "authz-listfile", "still", filename=str(file), refresh=False)
        assert allowed(objects, "bob", "dan") == [True, False]
        replace(file, json.dumps({"policy": "allow", "rules": [{"match": "bob", "policy": "deny"}]}))
        assert allowed(objects, "bob", "dan") == [False, True]
        still = objects.get("still", Authorizer)
        assert still is not None and still.is_allowed("bob") and not still.is_allowed("dan")
        assert caplog.text == ""
        replace(file, "{")
        assert allowed(objects, "bob", "dan", "dan") == [False, False, False]
        assert len(caplog.records) == 1
        replace(file, "[]")
        assert allowed(objects, "dan") == [False]
        assert caplog.records[-1].getMessage() == f"File '{file}' must contain a JSON object"
        file.unlink()
        assert allowed(objects, "dan") == [False]
        assert caplog.records[-1].getMessage() == f"Unable to read '{file}': No such file or directory"
        file.write_text('{"policy": "allow"}')
        assert allowed(objects, "dan") == [True]
        with pytest.raises(Error, match="Unable to read '/nonexistent/f': No such file or directory"):
            await add(objects, "authz-listfile", "b", filename="/nonexistent/f")
        file.write_text('{"policy": "maybe"}')
        with pytest.raises(Error, match="Parameter 'policy' does not accept value 'maybe'"):
            await add(objects, "authz-listfile", "b", filename=str(file))

    run(body())


def replace(file: Path, text: str) -> None:
    new = file.with_suffix(".new")
    new.write_text(text)
    new.rename(file)


# --- the service ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", ["1", "a b", "", "ä", "_a", "a\n"])
def test_wrong_ids(objects: Objects, id: str) -> None:
    async def body() -> None:
        with pytest.raises(Error) as caught:
            await add(objects, "secret", id, data="x")
        assert caught.value.desc == "Parameter 'id' expects an identifier"
        hint = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
        assert caught.value.hint == hint

    run(body())


def test_names_and_deletion(objects: Objects) -> None:
    async def body() -> None:
        await add(objects, "secret", "a.b-c_d0", data="x")
        for name in ("a.b-c_d0", "type"):
            with pytest.raises(Error) as caught:
                await add(objects, "authz-simple", name, identity="x")
            text = f"attempt to add duplicate property '{name}' to object (type 'container')"
            assert caught.value.desc == text
        assert objects.get("a.b-c_d0", Secret) is not None
        assert objects.get("a.b-c_d0", Authorizer) is None
        await commands.object_del(objects, id="a.b-c_d0")
        for name in ("a.b-c_d0", "type"):
            with pytest.raises(Error, match=f"object '{name}' not found"):
                await commands.object_del(objects, id=name)

    run(body())


def test_objects_in_use_and_the_order_of_closing(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        closed: list[str] = []

        async def close(self: UserObject) -> None:
            closed.append(self.id)

        monkeypatch.setattr(UserObject, "close", close)
        monkeypatch.setattr(Secret, "in_use", property(lambda self: self.id == "b"))
        for name in "abc":
            await add(objects, "secret", name, data="x")
        with pytest.raises(Error, match="object 'b' is in use, can not be deleted"):
            await objects.remove("b")
        assert objects.find("b") is not None
        await objects.remove("c")
        await objects.close_all()
        assert closed == ["c", "b", "a"]
        assert list(objects) == []

    run(body())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nosuch,id=a", "Parameter 'qom-type' does not accept value 'nosuch'"),
        ("iothread,id=a", "Parameter 'qom-type' does not accept value 'iothread'"),
        ("id=a", "Parameter 'qom-type' is missing"),
        ("secret", "Parameter 'id' is missing"),
        ("secret,id=a,foo=b", "Parameter 'foo' is unexpected"),
        ("secret,id=a,format=x", "Parameter 'format' does not accept value 'x'"),
        ("authz-simple,id=a", "Parameter 'identity' is missing"),
        ("authz-list,id=a,rules.0.match=x", "Parameter 'rules.0.policy' is missing"),
        ("secret_keyring,id=a,serial=x", "Parameter 'serial' expects integer"),
        ("secret_keyring,id=a,serial=99999999999", "Parameter 'serial' expects int32_t"),
    ],
)
def test_option_mistakes(text: str, message: str) -> None:
    with pytest.raises(Error) as caught:
        convert(parse_keyval(text, "qom-type"), ObjectOptions, keyval=True)
    assert caught.value.desc == message


# --- the tree ---------------------------------------------------------------------------------------------------------


def test_tree() -> None:
    async def body() -> None:
        chardevs = Chardevs()
        objects = Objects(chardevs)
        await chardevs.add("c", convert({"type": "null", "data": {}}, ChardevBackend))
        await chardevs.add("both", convert({"type": "null", "data": {}}, ChardevBackend))
        await add(objects, "secret", "s", data="x")
        await add(objects, "secret", "both", data="x")

        async def listed(path: str) -> dict[str, str]:
            return {info.name: info.type for info in await commands.qom_list(objects, path=path)}

        string = {"type": "string"}
        containers = {name: "child<container>" for name in ("backend", "chardevs", "objects")}
        assert await listed("/") == string | containers
        assert await listed("/backend") == string
        assert await listed("/objects") == string | {"s": "child<secret>", "both": "child<secret>"}
        assert await listed("chardevs") == string | {"c": "child<chardev-null>", "both": "child<chardev-null>"}
        secret = string | dict.fromkeys(("iv", "keyid", "file", "data"), "string") | {"format": "QCryptoSecretFormat"}
        for path in ("s", "/objects/s", "//objects//s/", "objects/s"):
            assert await listed(path) == secret
        for path in ("/s", "/nosuch", "nosuch", "/objects/s/x", "objects/../s", "/objects/c"):
            with pytest.raises(DeviceNotFound) as caught:
                await listed(path)
            assert caught.value.desc == f"Device '{path}' not found"
        for path in ("both", ""):
            with pytest.raises(Error) as ambiguous:
                await listed(path)
            assert (ambiguous.value.desc, ambiguous.value.qmp_class) == (f"Path '{path}' is ambiguous", "GenericError")
            with pytest.raises(DeviceNotFound, match=f"Device '{path}' not found"):
                await commands.qom_get(objects, path=path, property="type")

    run(body())


def test_properties(objects: Objects) -> None:
    async def body() -> None:
        await add(objects, "secret", "s", data="x")
        await add(objects, "authz-list", "l")

        async def get(path: str, name: str) -> Any:
            return await commands.qom_get(objects, path=path, property=name)

        async def put(path: str, name: str, value: Any) -> None:
            await commands.qom_set(objects, path=path, property=name, value=value)

        assert [await get("s", name) for name in ("type", "data", "file", "format", "iv", "keyid")] == [
            "secret",
            "x",
            "",
            "raw",
            "",
            "",
        ]
        assert (await get("l", "rules"), await get("l", "policy")) == ([], "deny")
        assert await get("/objects", "s") == "/objects/s"
        assert await get("/", "objects") == "/objects"
        assert await get("/objects", "type") == "container"
        await put("s", "data", "new")
        await put("s", "format", "base64")
        assert (await get("s", "data"), await get("s", "format")) == ("new", "base64")
        assert objects.secret("s") == b"x"  # the content was made when the secret was
        rules = [{"match": "x", "policy": "allow", "format": "glob"}]
        await put("l", "rules", rules)
        assert await get("l", "rules") == rules
        for path, name, value, text in (
            ("s", "type", "x", "Property 'secret.type' is not writable"),
            ("s", "nosuch", "x", "Property 'secret.nosuch' not found"),
            ("s", "format", "x", "Parameter 'format' does not accept value 'x'"),
            ("s", "data", None, "Invalid parameter type for 'data', expected: string"),
            ("l", "rules", 5, "Invalid parameter type for 'rules', expected: array"),
            ("l", "rules", [{"match": "x"}], "Parameter 'rules[0].policy' is missing"),
            ("/objects", "s", "x", "Property 'container.s' is not writable"),
            ("/objects", "nosuch", "x", "Property 'container.nosuch' not found"),
        ):
            with pytest.raises(Error) as caught:
                await put(path, name, value)
            assert caught.value.desc == text
        assert await get("l", "rules") == rules
        with pytest.raises(Error, match=r"Property 'secret\.nosuch' not found"):
            await get("s", "nosuch")

    run(body())


# --- types ------------------------------------------------------------------------------------------------------------


def test_types() -> None:
    async def body() -> None:
        async def names(**members: Any) -> list[str]:
            return [info.name for info in await commands.qom_list_types(**members)]

        creatable = ["authz-list", "authz-list-file", "authz-simple", "secret", "secret_keyring", "throttle-group"]
        assert await names(implements="user-creatable") == creatable
        assert await names(implements="user-creatable", abstract=True) == sorted(
            [*creatable, "secret_common", "user-creatable"]
        )
        assert await names(implements="interface", abstract=True) == sorted(
            [*creatable, "interface", "secret_common", "user-creatable"]
        )
        assert await names(implements="secret_common") == ["secret", "secret_keyring"]
        assert await names(implements="nosuch") == []
        assert set(await names()) < set(await names(abstract=True))
        assert "interface" not in await names(implements="object", abstract=True)
        infos = {info.name: info for info in await commands.qom_list_types(abstract=True)}
        assert (infos["chardev-memory"].parent, infos["chardev-memory"].abstract) == ("chardev-ringbuf", None)
        assert (infos["authz"].parent, infos["authz"].abstract, infos["object"].parent) == ("object", True, None)
        for name, text in (("nosuch", "Class 'nosuch' not found"), ("", "Class '' not found")):
            with pytest.raises(DeviceNotFound, match=text):
                await commands.qom_list_properties(typename=name)
        for name in ("interface", "user-creatable"):
            with pytest.raises(Error, match="Parameter 'typename' expects a QOM type"):
                await commands.qom_list_properties(typename=name)

    run(body())


def test_registry() -> None:
    expected = {"authz-list", "authz-listfile", "authz-simple", "secret", "secret_keyring", "throttle-group"}
    assert set(registry.object_tags()) == expected
    for tag in registry.object_tags():
        cls = registry.object_class(tag)
        assert cls.Options.__struct_config__.tag == tag
        assert type_table()[cls.type_name].parent == (cls.parents[0][0] if cls.parents else "object")
        # Every property is a member of the options, and the other way round.
        members = set(cls.Options.__struct_encode_fields__) - {"id"}
        assert {prop.name for prop in cls.properties} == members


def test_help() -> None:
    listing = help_for(None)
    assert listing.splitlines() == [
        "List of user creatable objects:",
        "  authz-list",
        "  authz-list-file",
        "  authz-simple",
        "  secret",
        "  secret_keyring",
        "  throttle-group",
    ]
    assert help_for("nosuch") == help_for("user-creatable") == listing
    assert help_for("authz-list") == "authz-list options:\n  policy=<QAuthZListPolicy>\n  rules=<QAuthZListRule>\n"
    assert help_for("container") == "There are no options for container.\n"
