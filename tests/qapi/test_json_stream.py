"""The JSON parser: values, mistakes, recovery, limits. The real daemon judges it in tests/monitor."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyqsd.qapi import json_stream
from pyqsd.qapi.errors import Error
from pyqsd.qapi.json_stream import INCOMPLETE, JsonStream, parse_text, printable


def take(stream: JsonStream) -> list[Any]:
    """All that the stream has: values, and the descriptions of mistakes as ``("error", text)``."""
    out: list[Any] = []
    while True:
        try:
            value = stream.next()
        except Error as exc:
            out.append(("error", exc.desc))
            continue
        if value is INCOMPLETE:
            return out
        out.append(value)


def parse(*pieces: bytes) -> list[Any]:
    stream = JsonStream()
    out = []
    for piece in pieces:
        stream.feed(piece)
        out += take(stream)
    return out


def mistake(text: str) -> tuple[str, str]:
    return ("error", f"JSON parse error, {text}")


@pytest.mark.parametrize(
    ("data", "values"),
    [
        (b"", []),
        (b" \t\r\n", []),
        (b"{}", [{}]),
        (b"{}{}[]", [{}, {}, []]),
        (b'{"a": [1, {"b": null}], "c": {}}\n', [{"a": [1, {"b": None}], "c": {}}]),
        (b"{'a': 'b\"'}", [{"a": 'b"'}]),
        (b"'it\\'s'", ["it's"]),
        (b'"a""b"', ["a", "b"]),
        (b"true false null ", [True, False, None]),
        (b"1 -2 3.5 1e2 0 -0 ", [1, -2, 3.5, 100.0, 0, 0]),
        (b"[9223372036854775808,18446744073709551615]", [[1 << 63, (1 << 64) - 1]]),
        (b"[18446744073709551616,-9223372036854775809]", [[float(1 << 64), -float(1 << 63)]]),
        (b"[1e400,-1e400]", [[math.inf, -math.inf]]),
        (b'"\\u0041\\ud83d\\ude00\\n\\/\\b\\f\\r\\t\\\\\\u0000"', ["A\U0001f600\n/\b\f\r\t\\\0"]),
        ('"é€\U0001f600"'.encode(), ["é€\U0001f600"]),
        (b'"\xc0\x80"', ["\0"]),
        (b'"\x7f"', ["\x7f"]),
        (b'{"a":"' + b"x" * 100_000 + b'"}', [{"a": "x" * 100_000}]),
    ],
)
def test_values(data: bytes, values: list[Any]) -> None:
    assert parse(data) == values
    assert parse(*(data[at : at + 1] for at in range(min(len(data), 300))), data[300:]) == values
    for value, expected in zip(parse(data), values, strict=True):
        assert type(value) is type(expected)


def test_a_number_or_word_ends_with_what_follows() -> None:
    stream = JsonStream()
    stream.feed(b"12")
    assert take(stream) == []
    stream.feed(b"3")
    assert take(stream) == []
    stream.feed(b" tru")
    assert take(stream) == [123]
    stream.feed(b"e{")
    assert take(stream) == [True]
    stream.feed(b"}")
    assert take(stream) == [{}]


@pytest.mark.parametrize(
    ("data", "out"),
    [
        (b"}{}", [mistake("expecting value"), {}]),
        (b"[1}", [mistake("expected separator in list")]),
        (b'{"a":1]{}', [mistake("expected separator in dict"), {}]),
        (b"[1 2]{}", [mistake("expected separator in list"), {}]),
        (b"[1,]", [mistake("expecting value")]),
        (b'{"a" 1}', [mistake("missing : in object pair")]),
        (b"{1:2}", [mistake("key is not a string in object")]),
        (b'{"a":1,}', [mistake("expecting value")]),
        (b'{"a":1,"a":2}\n{}', [mistake("duplicate key"), {}]),
        (b'{"a":{"b":1,"b":2}}', [mistake("duplicate key")]),
        (b"nil {}", [mistake("invalid keyword 'nil'"), {}]),
        (b"[nil]{}", [mistake("invalid keyword 'nil'"), {}]),
        (b"@ x\n{}", [mistake("stray '@'"), {}]),
        (b"Not JSON at all\n{}", [mistake("stray 'N'"), {}]),
        (b"01\n", [mistake("stray '01'")]),
        (b"-\n{}", [mistake("stray '-\n'"), {}]),
        (b"1.\n{}", [mistake("stray '1.\n'"), {}]),
        (b'"a\n{}', [mistake("stray '\"a\n'"), {}]),
        (b'{"a": "unfinished\xff{}', [mistake("stray '\"unfinished\ufffd'"), {}]),
        (b"\xff\xff{}", [mistake("stray '\ufffd'")] * 2 + [{}]),
        (b"\x00{}", [mistake("stray ''"), {}]),
        (b"%d{}", [mistake("stray '%'"), {}]),
        (b'"\\x"{}', [mistake("invalid escape sequence in string"), {}]),
        (b'"\\ud800"', [mistake("\\ud800 is not a valid Unicode character")]),
        (b'"\\udc00"', [mistake("\\udc00 is not a valid Unicode character")]),
        (b'"\\uffff"', [mistake("\\uffff is not a valid Unicode character")]),
        (b'"\\u12"', [mistake('\\u12" is not a valid Unicode character')]),
        (b'"\xff"', [mistake("stray '\"\ufffd'"), mistake("stray '\"'")][:1]),
        (b'"\xed\xa0\x80"', [mistake("invalid UTF-8 sequence in string")]),
        (b'"\x80"', [mistake("invalid UTF-8 sequence in string")]),
        (b'"\xc1\x81"', [mistake("invalid UTF-8 sequence in string")]),
        (b"a" * 3000 + b" ", [mistake("invalid keyword '" + "a" * 1006)]),
    ],
)
def test_mistakes(data: bytes, out: list[Any]) -> None:
    assert parse(data) == out
    assert parse(*(data[at : at + 1] for at in range(len(data)))) == out


def test_nesting() -> None:
    limit = json_stream.MAX_NESTING
    value = parse(b"[" * limit + b"]" * limit)
    assert len(value) == 1
    depth = 0
    inner = value[0]
    while inner:
        (inner,) = inner
        depth += 1
    assert depth == limit - 1
    too_deep = parse(b"[" * (limit + 1))
    assert too_deep == [("error", "JSON nesting depth limit exceeded")]
    # The stream has forgotten all that was open.
    assert parse(b"[" * (limit + 1) + b"{}") == [*too_deep, {}]


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_TOKENS", 100)
    monkeypatch.setattr(json_stream, "MAX_SIZE", 1000)
    assert parse(b"[" + b"1," * 49 + b"]") == [mistake("expecting value")]
    assert parse(b"[" + b"1," * 50)[0] == ("error", "JSON token count limit exceeded")
    assert parse(b'["' + b"a" * 900 + b'"]') == [["a" * 900]]
    assert parse(b'["' + b"a" * 990 + b'","' + b"b" * 20 + b'"]')[0] == ("error", "JSON token size limit exceeded")
    for piece in (1, 7, 500):
        data = b'{"a": "' + b"a" * 1500 + b'"}\n\xff{}'
        out = parse(*(data[at : at + piece] for at in range(0, len(data), piece)))
        assert out[0] == ("error", "JSON token size limit exceeded")
        assert out[-1] == {}


@pytest.mark.parametrize("endless", [b"1", b"a", b'"a', b'"\\"', b"'\\\\", b"1.5", b"1e5", b"-1"])
def test_an_endless_token_takes_bounded_memory(endless: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_SIZE", 10_000)
    stream = JsonStream()
    stream.feed(endless)
    out = take(stream)
    for _ in range(20):
        stream.feed(endless[-1:] * 1000 if endless[-1:] not in b"\"\\'" else b"a" * 1000)
        out += take(stream)
        assert len(stream._partial) + len(stream._tokens) + stream.unread <= 12_000
    assert ("error", "JSON token size limit exceeded") in out


@pytest.mark.parametrize(
    ("text", "value"), [("{}", {}), (" 1", 1), ("1", 1), ("true", True), ('"x"', "x"), ("{'a': 1}\n", {"a": 1})]
)
def test_text(text: str, value: Any) -> None:
    assert parse_text(text) == value


@pytest.mark.parametrize(
    ("text", "desc"),
    [
        ("", "Expecting a JSON value"),
        ("{} {}", "Expecting at most one JSON value"),
        ("{}x", "Expecting at most one JSON value"),
        ("{", "JSON parse error, premature EOI"),
        ('{"a"', "JSON parse error, premature EOI"),
        ('{"a":', "JSON parse error, premature EOI"),
        ('{"a":1', "JSON parse error, premature EOI"),
        ('{"a":[1,', "JSON parse error, premature EOI"),
        ('{"a', "JSON parse error, stray '\"a'"),
    ],
)
def test_text_mistake(text: str, desc: str) -> None:
    with pytest.raises(Error) as caught:
        parse_text(text)
    assert caught.value.desc == desc


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"abc", "abc"),
        (b"a\0b", "a"),
        ("é€\U0001f600".encode(), "é€\U0001f600"),
        (b"\x80\xe2\x82\xff", "\ufffd" * 3),
        (b"\xed\xa0\x80x\xf8\x88\x80\x80\x80", "\ufffdx\ufffd"),
        (b"\xc0\x80", "\0"),
        (b"\xe2", "\ufffd"),
    ],
)
def test_printable(raw: bytes, text: str) -> None:
    assert printable(raw) == text


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=10).filter(
        lambda text: all(json_stream._valid(ord(char)) for char in text)
    ),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abc\n\"'\u00e9", max_size=4), inner, max_size=4)
    ),
    max_leaves=15,
)


@given(st.lists(json_values, max_size=4), st.booleans(), st.data())
def test_agrees_with_the_json_module(values: list[Any], ascii_only: bool, data: st.DataObject) -> None:
    indent = data.draw(st.sampled_from([None, 2]))
    text = "\n".join(json.dumps(value, ensure_ascii=ascii_only, indent=indent) for value in values) + "\n"
    raw = text.replace("Infinity", "1e999").encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    parsed = parse(*pieces)
    assert parsed == values
    assert json.dumps(parsed) == json.dumps(values)


@given(st.binary(max_size=60), st.integers(1, 5))
@example(b'{"a":\xf8\x00', 1)
def test_any_bytes_in_any_pieces(data: bytes, piece: int) -> None:
    out = parse(data)
    assert parse(*(data[at : at + piece] for at in range(0, len(data), piece))) == out
    # However it went, this brings the stream back.
    assert parse(data, b"\n\xff\n", b'{"back": 1}')[-1] == {"back": 1}


TOKENS = (
    b'{ } [ ] : , "a" \'b\' " \' \\ 1 - 0 .5 e3 null tru \n \xff \x00 {"a":1} \\u0041 \\ud83d \\ude00 \xc3\xa9 \xc3'
)
tokens = st.sampled_from(TOKENS.split(b" "))


@given(st.lists(tokens, max_size=25), st.integers(1, 7))
def test_any_tokens_in_any_pieces(parts: list[bytes], piece: int) -> None:
    data = b"".join(parts)
    out = parse(data)
    assert parse(*(data[at : at + piece] for at in range(0, len(data), piece))) == out
    for value in out:
        if not (isinstance(value, tuple) and value[0] == "error"):
            # What is taken as a value is JSON but for the quotes, and what json takes means the same.
            json.dumps(value)
    try:
        expected = json.loads(data, object_pairs_hook=refuse_twice)
    except ValueError:
        return
    if isinstance(expected, dict | list) and not any(ord(c) > 0xD7FF for c in json.dumps(expected, ensure_ascii=False)):
        assert out == [expected]


def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("twice")
    return dict(pairs)
