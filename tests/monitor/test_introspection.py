"""``query-qmp-schema`` against what the real daemon answers, member by member.

What is not written yet may be missing, and nothing else: the values and branches of drivers, objects, chardevs and
exports, as the reference has them and the registries do not.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pyqsd.block.action import TransactionAction
from pyqsd.block.registry import driver_names
from pyqsd.chardev.registry import chardev_names
from pyqsd.exports.export import BlockExportOptions
from pyqsd.monitor import registry
from pyqsd.qapi.introspect import query_qmp_schema
from pyqsd.qapi.json_writer import to_wire
from pyqsd.qom.registry import object_tags

REFERENCE = Path(__file__).parent.parent / "data" / "qsd-introspection-10.0.2.json"

#: Members and commands of ours that QSD does not have: ``COMMAND.path.member``.
EXTRA: frozenset[str] = frozenset(
    [
        "x-blockdev-check",
        *(f"{path}|qcow2.x-snapshot" for path in ("blockdev-add", "blockdev-reopen.options[]")),
        "blockdev-create.options|qcow2.file<object>|qcow2.x-snapshot",
        *(
            f"x-blockdev-amend.options|qcow2.{member}"
            for member in (
                "backing-file",
                "backing-fmt",
                "data-file",
                "data-file-raw",
                "lazy-refcounts",
                "refcount-bits",
                "size",
                "version",
            )
        ),
    ]
)

#: Iothreads come later.
COMMANDS_NOT_WRITTEN = frozenset(
    [
        "x-blockdev-set-iothread",
    ]
)
EVENTS_NOT_WRITTEN = frozenset(
    [
        "QUORUM_FAILURE",
        "QUORUM_REPORT_BAD",
        "VSERPORT_CHANGE",
    ]
)

Info = dict[str, Any]


class Schema:
    def __init__(self, infos: list[Info]) -> None:
        self.types = {info["name"]: info for info in infos if info["meta-type"] not in ("command", "event")}
        self.commands = {info["name"]: info for info in infos if info["meta-type"] == "command"}
        self.events = {info["name"]: info for info in infos if info["meta-type"] == "event"}
        assert len(self.types) + len(self.commands) + len(self.events) == len(infos), "a name is there twice"

    def values(self, union: Info) -> set[str]:
        """The values of a union's tag."""
        (tag,) = (member for member in union["members"] if member["name"] == union["tag"])
        return set(self.types[tag["type"]]["values"])

    def member(self, info: Info, name: str) -> Info:
        (found,) = (member for member in info["members"] if member["name"] == name)
        return self.types[found["type"]]


@cache
def reference() -> Schema:
    with REFERENCE.open() as file:
        answer = json.load(file)
    return Schema(answer["return"] if isinstance(answer, dict) else answer)


@cache
def ours() -> Schema:
    registry.load()
    return Schema(to_wire(query_qmp_schema()))


@cache
def not_written() -> dict[frozenset[str], frozenset[str]]:
    """By all values of one of QSD's enumerations, those that pyqsd has nothing for yet."""
    theirs = reference()

    def argument(command: str) -> Info:
        return theirs.types[theirs.commands[command]["arg-type"]]

    drivers = frozenset(theirs.values(argument("blockdev-add")))
    objects = frozenset(theirs.values(argument("object-add")))
    exports = frozenset(theirs.values(argument("block-export-add")))
    chardevs = frozenset(theirs.values(theirs.member(argument("chardev-add"), "backend")))
    node = theirs.types[theirs.types[theirs.commands["query-named-block-nodes"]["ret-type"]]["element-type"]]
    specific = theirs.member(theirs.member(node, "image"), "format-specific")
    formats = frozenset(theirs.values(specific))
    actions = frozenset(theirs.values(theirs.types[theirs.member(argument("transaction"), "actions")["element-type"]]))
    missing = {
        actions: actions - set(TransactionAction.branches()),
        drivers: drivers - set(driver_names()),
        objects: objects - set(object_tags()),
        exports: exports - set(BlockExportOptions.branches()),
        chardevs: chardevs - set(chardev_names()),
        formats: formats - set(driver_names()),
    }
    assert all(len(missing[values]) < len(values) for values in missing)
    return missing


class Comparison:
    """Collects what differs between two types and all that they refer to."""

    def __init__(self) -> None:
        self.differences: list[str] = []
        self._seen: set[tuple[str, str]] = set()

    def types(self, path: str, our_name: str, their_name: str) -> None:
        if (our_name, their_name) in self._seen:
            return
        self._seen.add((our_name, their_name))
        our, their = ours().types[our_name], reference().types[their_name]
        if our["meta-type"] != their["meta-type"]:
            self.differences.append(f"{path}: {our['meta-type']}, not {their['meta-type']}")
            return
        self.equal(path, our, their, "features")
        getattr(self, their["meta-type"])(path, our, their)

    def equal(self, path: str, our: Info, their: Info, *keys: str) -> None:
        for key in keys:
            if our.get(key) != their.get(key):
                self.differences.append(f"{path}: {key} is {our.get(key)}, not {their.get(key)}")

    def sets(self, path: str, our: set[str], their: set[str], all_values: frozenset[str] = frozenset()) -> None:
        missing = their - our - not_written().get(all_values, frozenset())
        extra = {name for name in our - their if f"{path}.{name}" not in EXTRA}
        if missing:
            self.differences.append(f"{path}: missing {sorted(missing)}")
        if extra:
            self.differences.append(f"{path}: extra {sorted(extra)}")

    def builtin(self, path: str, our: Info, their: Info) -> None:
        self.equal(path, our, their, "name", "json-type")

    def array(self, path: str, our: Info, their: Info) -> None:
        self.types(f"{path}[]", our["element-type"], their["element-type"])

    def enum(self, path: str, our: Info, their: Info) -> None:
        assert our["values"] == [member["name"] for member in our["members"]]
        self.sets(path, set(our["values"]), set(their["values"]), frozenset(their["values"]))
        our_members = {member["name"]: member for member in our["members"]}
        for member in their["members"]:
            if member["name"] in our_members:
                self.equal(f"{path}.{member['name']}", our_members[member["name"]], member, "features")

    def alternate(self, path: str, our: Info, their: Info) -> None:
        def kinds(schema: Schema, info: Info) -> dict[str, str]:
            named = ((schema.types[member["type"]], member["type"]) for member in info["members"])
            return {member.get("json-type", member["meta-type"]): name for member, name in named}

        our_kinds, their_kinds = kinds(ours(), our), kinds(reference(), their)
        self.sets(path, set(our_kinds), set(their_kinds))
        for kind in our_kinds.keys() & their_kinds.keys():
            self.types(f"{path}<{kind}>", our_kinds[kind], their_kinds[kind])

    def object(self, path: str, our: Info, their: Info) -> None:
        our_members = {member["name"]: member for member in our["members"]}
        their_members = {member["name"]: member for member in their["members"]}
        assert len(our_members) == len(our["members"])
        self.sets(path, set(our_members), set(their_members))
        for name, member in their_members.items():
            if name in our_members:
                inner = f"{path}.{name}"
                if ("default" in our_members[name]) != ("default" in member):
                    self.differences.append(f"{inner}: optional in one only")
                self.equal(inner, our_members[name], member, "default", "features")
                self.types(inner, our_members[name]["type"], member["type"])
        self.equal(path, our, their, "tag")
        our_cases = {variant["case"]: variant["type"] for variant in our.get("variants", ())}
        their_cases = {variant["case"]: variant["type"] for variant in their.get("variants", ())}
        if their_cases:
            self.sets(path, set(our_cases), set(their_cases), frozenset(reference().values(their)))
        for case in our_cases.keys() & their_cases.keys():
            self.types(f"{path}|{case}", our_cases[case], their_cases[case])


@pytest.mark.parametrize("name", sorted(reference().commands))
def test_command(name: str) -> None:
    our, their = ours().commands.get(name), reference().commands[name]
    if our is None:
        assert name in COMMANDS_NOT_WRITTEN, f"{name} is missing"
        return
    comparison = Comparison()
    comparison.equal(name, our, their, "features", "allow-oob")
    comparison.types(name, our["arg-type"], their["arg-type"])
    comparison.types(f"{name}()", our["ret-type"], their["ret-type"])
    assert comparison.differences == []


@pytest.mark.parametrize("name", sorted(reference().events))
def test_event(name: str) -> None:
    our, their = ours().events.get(name), reference().events[name]
    if our is None:
        assert name in EVENTS_NOT_WRITTEN, f"{name} is missing"
        return
    comparison = Comparison()
    comparison.equal(name, our, their, "features")
    comparison.types(name, our["arg-type"], their["arg-type"])
    assert comparison.differences == []


def test_nothing_of_ours_is_unknown() -> None:
    assert set(ours().commands) - set(reference().commands) <= EXTRA
    assert set(ours().events) - set(reference().events) <= EXTRA


def test_lists_of_what_is_not_written_are_right() -> None:
    assert not COMMANDS_NOT_WRITTEN & set(ours().commands)
    assert not EVENTS_NOT_WRITTEN & set(ours().events)


def test_every_type_is_described_once_and_used() -> None:
    schema = ours()
    used = {info["arg-type"] for info in (*schema.commands.values(), *schema.events.values())}
    used |= {info["ret-type"] for info in schema.commands.values()}
    for info in schema.types.values():
        used |= {info[key] for key in ("element-type",) if key in info}
        used |= {inner["type"] for key in ("members", "variants") for inner in info.get(key) or () if "type" in inner}
    assert used == set(schema.types)
