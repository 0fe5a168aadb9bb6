"""JSON text as QSD spells it."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqsd.qapi.json_writer import string, to_json, to_wire
from pyqsd.qapi.types import NULL, Struct


class Colour(StrEnum):
    RED = "red"


class Thing(Struct, kw_only=True):
    node_name: str | None = None
    colour: Colour
    inner: Any = None
    size: int


class Shape(Struct, kw_only=True, tag_field="kind", tag="base"):
    pass


class Square(Shape, kw_only=True, tag="square"):
    side: int


def test_to_wire() -> None:
    thing = Thing(colour=Colour.RED, size=1, inner=[Square(side=2), NULL, None, {"a": 1.5}])
    assert to_wire(thing) == {
        "colour": "red",
        "inner": [{"kind": "square", "side": 2}, None, None, {"a": 1.5}],
        "size": 1,
    }
    assert list(to_wire(Thing(node_name="n", colour=Colour.RED, size=1))) == ["node-name", "colour", "size"]
    assert to_wire(None) is None
    with pytest.raises(TypeError):
        to_wire(object())


def test_one_line() -> None:
    value = {"a": [1, True, None, "x"], "b": {}, "c": []}
    assert to_json(value) == '{"a": [1, true, null, "x"], "b": {}, "c": []}'
    assert to_json(value, echo=True) == to_json(value)


def test_pretty() -> None:
    assert to_json({"a": [1, {}, []], "b": "x"}, pretty=True) == (
        '{\n    "a": [\n        1,\n        {\n        },\n        [\n        ]\n    ],\n    "b": "x"\n}'
    )


def test_strings() -> None:
    assert string("\u20ac\x01\x7f\"\\/\n'\U0001f600") == '"\\u20AC\\u0001\\u007F\\"\\\\/\\n\'\\uD83D\\uDE00"'
    # What only looks like an escape stays as it is.
    assert string("\\u00e9") == '"\\\\u00e9"'
    assert to_json({"\u00e9": "\\u00e9"}) == '{"\\u00E9": "\\\\u00e9"}'


def test_numbers_as_echoed() -> None:
    assert to_json([1.0, 2.5, 0.1, 1e300], echo=True) == "[1, 2.5, 0.10000000000000001, 1.0000000000000001e+300]"


def test_bytes_that_are_no_text() -> None:
    """Names of files may have any bytes; what comes out of JSON is text nevertheless."""
    assert to_json("a\udcff\udc80b") == r'"a\uFFFD\uFFFDb"'
    # A character beyond the basic plane is a pair of surrogates, and stays one.
    assert to_json("\U0001f600\U0010fcff") == r'"\uD83D\uDE00\uDBFF\uDCFF"'
    assert to_json(r"\udcff") == r'"\\udcff"'


def test_depth() -> None:
    value: Any = 1
    for _ in range(5000):
        value = [value]
    assert to_json(value) == "[" * 5000 + "1" + "]" * 5000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=15,
)


@given(json_values, st.booleans(), st.booleans())
def test_round_trip(value: Any, pretty: bool, echo: bool) -> None:
    text = to_json(value, pretty=pretty, echo=echo)
    assert text.isascii() and "\x7f" not in text
    assert json.loads(text) == value
