"""Differential: wrong arguments for every command, made from what the real daemon's introspection says it takes.

For each command (and each variant of those that take a union) the arguments are a skeleton of all mandatory members,
and then: none at all, each mandatory one left out, one too many, and each member with each type of value that it does
not take, at any depth.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import DaemonProcess
from tests.system.differential import Session, check_session
from tests.system.test_differential_qmp import COMMANDS

WRONG: list[tuple[str, Any]] = [
    ("string", "x"),
    ("int", 7),
    ("number", 1.5),
    ("boolean", True),
    ("null", None),
    ("array", []),
    ("array", ["x"]),
    ("array", [1]),
    ("object", {}),
    ("object", {"nosuch": 1}),
]
MAX_DEPTH = 3

# Which variants of a union are this release's; a union that is not named here is walked whole.
VARIANTS = {
    "blockdev-add": ("file", "host_device", "raw", "null-co", "null-aio", "qcow2"),
    "blockdev-reopen": ("file", "raw", "null-co", "qcow2"),
    "block-export-add": ("nbd",),
    "object-add": ("secret", "secret_keyring", "authz-simple", "authz-list", "authz-list-file"),
    "chardev-add": ("file", "pipe", "socket", "null", "ringbuf"),
}


class Schema:
    """query-qmp-schema of the real daemon, by name."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self.types = {entry["name"]: entry for entry in entries}

    def members(self, name: str, tag_value: str | None = None) -> list[dict[str, Any]]:
        entry = self.types[name]
        members = list(entry["members"])
        for variant in entry.get("variants", []):
            if variant["case"] == tag_value:
                members += self.members(variant["type"])
        return members

    def skeleton(self, name: str, variant: str | None, depth: int = 0) -> Any:
        """A value of this type with only what is mandatory."""
        entry = self.types[name]
        kind = entry["meta-type"]
        if kind == "builtin":
            return {"string": "x", "int": 1, "number": 1.0, "boolean": True, "null": None}.get(entry["json-type"])
        if kind == "enum":
            return entry["members"][0]["name"]
        if kind == "array":
            return []
        if kind == "alternate":
            return self.skeleton(entry["members"][-1]["type"], None, depth)
        tag = entry.get("tag")
        value = {}
        if tag and variant is None:
            cases = [case["case"] for case in entry["variants"]]
            variant = "file" if "file" in cases else cases[0]
        for member in self.members(name, variant if tag else None):
            if "default" in member:
                continue
            value[member["name"]] = variant if member["name"] == tag else self.skeleton(member["type"], None, depth + 1)
        return value

    def accepts(self, name: str) -> set[str]:
        entry = self.types[name]
        if entry["meta-type"] == "builtin":
            kind = entry["json-type"]
            return {"int": {"int"}, "number": {"int", "number"}}.get(kind, {kind})
        if entry["meta-type"] == "enum":
            return set()  # no string of ours is one of its values
        if entry["meta-type"] == "alternate":
            return set().union(*(self.accepts(member["type"]) for member in entry["members"]))
        return set()  # an object or an array is always worth a look: {} and [] lack something or are accepted by both

    def mistakes(self, name: str, variant: str | None, depth: int = 0) -> Iterator[Any]:
        """Wrong values of an object type."""
        good = self.skeleton(name, variant)
        tag = self.types[name].get("tag")
        if good:
            yield {}
        yield {**good, "nosuch": 1}
        for member in self.members(name, variant if tag else None):
            key = member["name"]
            if key in good:
                yield {other: value for other, value in good.items() if other != key}
            accepted = self.accepts(member["type"])
            for kind, value in WRONG:
                if kind not in accepted:
                    yield {**good, key: value}
            if depth < MAX_DEPTH and key != tag:
                for value in self.nested(member["type"], depth):
                    yield {**good, key: value}

    def nested(self, name: str, depth: int) -> Iterator[Any]:
        entry = self.types[name]
        if entry["meta-type"] == "object":
            cases = [variant["case"] for variant in entry.get("variants", [])] if "tag" in entry else [None]
            # A union inside (a child node, an address) is walked for one of its variants; each has its own test.
            if "file" in cases:
                cases = ["file"]
            for case in cases[:1] if depth else cases:
                yield from self.mistakes(name, case, depth + 1)
        elif entry["meta-type"] == "alternate":
            for member in entry["members"]:
                if self.types[member["type"]]["meta-type"] == "object" and depth < 1:
                    yield from self.nested(member["type"], depth + 1)


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Schema:
    with DaemonProcess("qsd", workdir=tmp_path_factory.mktemp("schema")) as daemon:
        return Schema(daemon.qmp.execute("query-qmp-schema"))


def cases() -> list[tuple[str, str | None]]:
    result: list[tuple[str, str | None]] = []
    for command in COMMANDS:
        if command not in ("quit", "qmp_capabilities"):
            result += [(command, variant) for variant in VARIANTS.get(command, (None,))]
    return result


@pytest.mark.parametrize(("command", "variant"), cases())
def test_arguments(command: str, variant: str | None, schema: Schema, image_set: Path, tmp_path: Path) -> None:
    arg_type = schema.types[command]["arg-type"]
    if command == "chardev-add":
        backend = schema.types[next(m["type"] for m in schema.members(arg_type) if m["name"] == "backend")]
        arguments = [{"id": "x", "backend": value} for value in schema.mistakes(backend["name"], variant)]
    elif command == "blockdev-reopen":
        element = schema.types[schema.members(arg_type)[0]["type"]]["element-type"]
        arguments = [{"options": [value]} for value in schema.mistakes(element, variant)]
    else:
        arguments = list(schema.mistakes(arg_type, variant))
    steps = []
    for value in arguments:
        step = {"execute": command, "arguments": copy.deepcopy(value)}
        if step not in steps:
            steps.append(step)
    assert steps
    check_session(Session(f"arguments-{command}-{variant}", steps), image_set, tmp_path)
