"""Key=value texts; the messages are judged by the real daemon in test_against_qsd.py."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyqsd.qapi.errors import Error
from pyqsd.qapi.keyval import HelpRequested, parse_keyval, parse_option


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", {}),
        ("a=1", {"a": "1"}),
        ("a=", {"a": ""}),
        ("a=1,", {"a": "1"}),
        ("raw", {"driver": "raw"}),
        ("raw,a=b", {"driver": "raw", "a": "b"}),
        ("a=1,,2,b=,,,c=x=y", {"a": "1,2", "b": ",", "c": "x=y"}),
        ("a.b.c=1,a.d=2", {"a": {"b": {"c": "1"}, "d": "2"}}),
        ("l.0=a,l.1=b", {"l": ["a", "b"]}),
        ("l.1=b,l.0=a", {"l": ["a", "b"]}),
        ("l.0.x=1,l.1.0=2", {"l": [{"x": "1"}, ["2"]]}),
        ("l.00=a,l.01=b", {"l": ["a", "b"]}),
        ("a=1,a=2", {"a": "2"}),
        ("__org.x.y_a.b=1", {"__org.x.y_a": {"b": "1"}}),
    ],
)
def test_value(text: str, value: Any) -> None:
    assert parse_keyval(text, "driver") == value


def test_no_implied_key() -> None:
    with pytest.raises(Error, match="Expected '=' after parameter 'raw'"):
        parse_keyval("raw", None)


def test_json_or_keyval() -> None:
    assert parse_option('{"driver": "raw", "size": 5}', "driver") == ({"driver": "raw", "size": 5}, False)
    assert parse_option("raw,size=5", "driver") == ({"driver": "raw", "size": "5"}, True)
    assert parse_option("{'driver': 'raw'} ", "driver") == ({"driver": "raw"}, False)


@pytest.mark.parametrize(
    "text", ["help", "secret,help", "secret,?", "help,qom-type=secret", "id=x,help,qom-type=secret"]
)
def test_help(text: str) -> None:
    with pytest.raises(HelpRequested) as caught:
        parse_keyval(text, "qom-type", allow_help=True)
    assert caught.value.options.get("qom-type") == ("secret" if "secret" in text else None)
    with pytest.raises(Error, match="Help is not available for this option"):
        parse_keyval(text, "qom-type")


keys = st.from_regex(r"[a-zA-Z][a-zA-Z0-9_-]{0,5}", fullmatch=True)
# Values that the syntax can express: no empty lists or objects.
values = st.recursive(
    st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, min_size=1, max_size=4) | st.dictionaries(keys, inner, min_size=1, max_size=4),
    max_leaves=10,
)


def spell(prefix: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return [f"{prefix}={value.replace(',', ',,')}"]
    items = enumerate(value) if isinstance(value, list) else value.items()
    return [text for key, inner in items for text in spell(f"{prefix}.{key}" if prefix else key, inner)]


@given(st.dictionaries(keys, values, max_size=4), st.randoms(use_true_random=False))
def test_round_trip(value: dict[str, Any], random: Any) -> None:
    texts = spell("", value)
    random.shuffle(texts)
    assert parse_keyval(",".join(texts), None) == value


@given(st.text(st.sampled_from("ab.0123,=_-?{}\u00e9 help"), max_size=40))
def test_any_text_gives_a_value_or_an_error(text: str) -> None:
    try:
        value = parse_keyval(text, "driver")
    except Error:
        return
    check_strings(value)


def check_strings(value: Any) -> None:
    for inner in value if isinstance(value, list) else value.values():
        if not isinstance(inner, str):
            assert inner
            check_strings(inner)


def test_a_long_text_takes_no_long_time() -> None:
    value = parse_keyval(",".join(f"l.{index}.a={index}" for index in range(20_000)), None)
    assert len(value["l"]) == 20_000 and value["l"][-1] == {"a": "19999"}
    assert parse_keyval("a=" + ",," * 100_000, None) == {"a": "," * 100_000}
    with pytest.raises(Error, match="missing"):
        parse_keyval("l.99999999999999999999999999=1", None)


def test_a_deep_text_is_no_crash() -> None:
    text = "a" + ".a" * 20_000 + "=1"
    value: Any = parse_keyval(text, None)
    depth = 0
    while isinstance(value, dict):
        value = value["a"]
        depth += 1
    assert (value, depth) == ("1", 20_001)
