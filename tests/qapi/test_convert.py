"""Conversion: what the real daemon cannot be asked (values, types without an option, commands)."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import pytest

from pyqsd.qapi.command import Command
from pyqsd.qapi.convert import convert, convert_arguments, parse_integer, parse_size, service_types, wire_parameters
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import NULL, Alternate, Int8, Int64, Null, Size, Struct, Uint8, Uint16, Uint64
from tests.qapi import sample


def message(value: Any, typ: Any, **how: Any) -> str:
    with pytest.raises(Error) as caught:
        convert(value, typ, **how)
    assert caught.value.qmp_class == "GenericError"
    return caught.value.desc


def test_union_with_everything_in_it() -> None:
    value = {
        "driver": "qcow2",
        "node-name": "q",
        "read-only": True,
        "cache": {"direct": False},
        "file": {"driver": "file", "filename": "x", "locking": "auto"},
        "backing": None,
        "overlap-check": {"main-header": True},
        "encrypt": {"format": "luks", "key-secret": "s"},
    }
    options: sample.Blockdev = convert(value, sample.Blockdev)
    assert options == sample.Qcow2(
        node_name="q",
        read_only=True,
        cache=sample.Cache(direct=False),
        file=sample.File(filename="x", locking=sample.Locking.AUTO),
        backing=NULL,
        overlap_check=sample.OverlapFlags(main_header=True),
        encrypt=sample.Luks(key_secret="s"),
    )


def test_keyval_leaves_are_parsed() -> None:
    value = {
        "driver": "quorum",
        "vote-threshold": "0x10",
        "blkverify": "off",
        "children": ["a", {"driver": "null-co", "size": "-010", "latency-ns": "-1", "read-zeroes": "y"}],
    }
    options: sample.Blockdev = convert(value, sample.Blockdev, keyval=True)
    child = sample.NullCo(size=-8, latency_ns=(1 << 64) - 1, read_zeroes=True)
    assert options == sample.Quorum(vote_threshold=16, blkverify=False, children=["a", child])


def test_defaults_and_names() -> None:
    everything: sample.Everything = convert({"anything": [1, {"a": None}]}, sample.Everything)
    assert everything.anything == [1, {"a": None}]
    assert (everything.number, everything.class_, everything.renamed) == (None, None, 7)
    everything = convert({"anything": None, "number": 1, "class": "c", "x-other": 2, "null": None}, sample.Everything)
    assert everything.number == 1.0 and type(everything.number) is float
    assert (everything.class_, everything.renamed, everything.null) == ("c", 2, NULL)
    assert message({"anything": 1, "number": "1"}, sample.Everything) == (
        "Invalid parameter type for 'number', expected: number"
    )
    assert message({"anything": 1, "null": 0}, sample.Everything) == "Invalid parameter type for 'null', expected: null"
    assert message({"anything": 1, "class_": "x"}, sample.Everything) == "Parameter 'class_' is unexpected"


@pytest.mark.parametrize(("text", "number"), [("1", 1.0), (" 1.5", 1.5), ("1e3", 1000.0), ("-.5", -0.5)])
def test_keyval_number(text: str, number: float) -> None:
    assert convert(text, float, keyval=True) == number


@pytest.mark.parametrize("text", ["", "x", "inf", "nan", "1_0", "1 ", "1e999"])
def test_keyval_no_number(text: str) -> None:
    assert message(text, float, keyval=True, name="n") == "Parameter 'n' expects number"


@pytest.mark.parametrize(
    ("typ", "value", "text"),
    [
        (Int8, 128, "Parameter 'n' expects int8_t"),
        (Int8, -129, "Parameter 'n' expects int8_t"),
        (Uint8, 256, "Parameter 'n' expects uint8_t"),
        (Uint8, -1, "Parameter 'n' expects uint8_t"),
        (Uint16, 65536, "Parameter 'n' expects uint16_t"),
        (Int64, 1 << 63, "Invalid parameter type for 'n', expected: integer"),
        (Int64, True, "Invalid parameter type for 'n', expected: integer"),
        (Uint64, True, "Parameter 'n' expects uint64"),
        (Size, 1 << 64, "Parameter 'n' expects uint64"),
        (bool, 1, "Invalid parameter type for 'n', expected: boolean"),
        (str, 1, "Invalid parameter type for 'n', expected: string"),
        (list[str], {}, "Invalid parameter type for 'n', expected: array"),
        (list[str], [1], "Invalid parameter type for 'n[0]', expected: string"),
        (list[list[str]], [[], ["a", 1]], "Invalid parameter type for 'n[1][1]', expected: string"),
        (sample.Cache, [], "Invalid parameter type for 'n', expected: object"),
        (sample.Cache, {"direct": 1}, "Invalid parameter type for 'n.direct', expected: boolean"),
        (Annotated[str | Null, Alternate("StrOrNull")], 1, "Invalid parameter type for 'n', expected: StrOrNull"),
    ],
)
def test_message(typ: Any, value: Any, text: str) -> None:
    assert message(value, typ, name="n") == text


@pytest.mark.parametrize(
    ("typ", "value"), [(Int8, -128), (Uint8, 255), (Int64, (1 << 63) - 1), (Uint64, (1 << 64) - 1)]
)
def test_bounds(typ: Any, value: int) -> None:
    assert convert(value, typ) == value
    assert convert(str(value), typ, keyval=True) == value


def test_negative_wraps_in_wide_unsigned() -> None:
    assert convert(-1, Uint64) == (1 << 64) - 1
    assert convert(-5, Size) == (1 << 64) - 5


def test_branch_of_a_union_as_a_type() -> None:
    assert convert({"size": 1}, sample.NullCo) == sample.NullCo(size=1)
    assert convert({"driver": "null-co", "size": 1}, sample.NullCo) == sample.NullCo(size=1)
    assert message({"driver": "raw"}, sample.NullCo) == "Parameter 'driver' does not accept value 'raw'"
    assert message({"driver": "null-co", "x": 1}, sample.NullCo) == "Parameter 'x' is unexpected"


def test_tag_of_the_base_is_no_branch() -> None:
    assert message({"driver": "base"}, sample.Blockdev) == "Parameter 'driver' does not accept value 'base'"


def test_branches_are_looked_up_when_they_are_wanted() -> None:
    asked: list[str] = []

    class Lazy(Struct, kw_only=True, tag_field="t", tag="base"):
        @classmethod
        def branch(cls, tag: str) -> type[Struct] | None:
            asked.append(tag)
            return Branch if tag == "one" else None

    class Branch(Lazy, kw_only=True, tag="one"):
        a: int | None = None

    assert convert({"t": "one", "a": 1}, Lazy) == Branch(a=1)
    assert convert({"t": "one"}, Lazy) == Branch()
    assert message({"t": "two"}, Lazy) == "Parameter 't' does not accept value 'two'"
    assert asked == ["one", "two"]


def test_deep_value_is_refused_not_a_crash() -> None:
    value: Any = "n"
    for _ in range(1000):
        value = {"driver": "raw", "file": value}
    with pytest.raises(Error, match="nested too deeply"):
        convert(value, sample.Blockdev)


def test_what_is_no_wire_type() -> None:
    with pytest.raises(TypeError):
        convert({}, dict[str, int])
    with pytest.raises(TypeError, match="without a name"):
        convert("a", str | Null)


async def resize(
    graph: bytes, other: list[int], /, *, size: int, node_name: str | None = None, x_y: bool = True
) -> None:
    """A command."""


def command(func: Any, **more: Any) -> Command:
    return Command("test", func, more.get("boxed", False), False, (), more.get("renames", {}))


def test_arguments() -> None:
    plain = command(resize, renames={"x_y": "x_y"})
    assert service_types(plain) == [bytes, list[int]]
    assert [(p.name, p.wire, p.required) for p in wire_parameters(plain)] == [
        ("size", "size", True),
        ("node_name", "node-name", False),
        ("x_y", "x_y", False),
    ]
    assert convert_arguments(plain, {"size": 1, "x_y": False}) == {"size": 1, "x_y": False}
    for arguments, text in (
        ({}, "Parameter 'size' is missing"),
        ({"size": 1, "x-y": True}, "Parameter 'x-y' is unexpected"),
        ({"size": 1, "node-name": None}, "Invalid parameter type for 'node-name', expected: string"),
    ):
        with pytest.raises(Error) as caught:
            convert_arguments(plain, arguments)
        assert caught.value.desc == text
    boxed = command(sample.blockdev_add, boxed=True)
    assert convert_arguments(boxed, {"driver": "null-co"}) == {"options": sample.NullCo()}
    assert inspect.iscoroutinefunction(boxed.func)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("-0", 0),
        ("017", 15),
        ("0xfF", 255),
        ("\t -9", -9),
        ("08", None),
        ("", None),
        ("1 ", None),
        ("٣", None),
    ],
)
def test_parse_integer(text: str, number: int | None) -> None:
    assert parse_integer(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("1k", 1024),
        ("1.5M", 3 << 19),
        ("2E", 2 << 60),
        (".5k", 512),
        ("0x10", 16),
        ("16E", None),
        ("٣", None),
    ],
)
def test_parse_size(text: str, number: int | None) -> None:
    assert parse_size(text) == number


def test_a_huge_number_is_refused_at_once() -> None:
    assert message("9" * 100_000, int, keyval=True, name="n") == "Parameter 'n' expects integer"
    assert message("9" * 100_000, Size, keyval=True, name="n") == "Parameter 'n' expects size"
    assert message("0x" + "9" * 100_000, int, keyval=True, name="n") == "Parameter 'n' expects integer"
    assert message("0" + "7" * 100_000, int, keyval=True, name="n") == "Parameter 'n' expects integer"
