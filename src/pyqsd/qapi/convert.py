"""Wire values into typed ones, with QSD's messages.

`convert` turns what a JSON or key=value parser made (dicts, lists, strings, numbers …) into a type of
`pyqsd.qapi.types`. In keyval mode every leaf is a string that is parsed as its type asks; in JSON mode values are typed
and nothing is coerced. Members are checked in their order of declaration, so that the first mistake reported is the one
that QSD reports.

A converter per type is made once, on first use, and kept. Raises `pyqsd.qapi.errors.Error`.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable
from enum import Enum
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import msgspec

from pyqsd.qapi.errors import Error
from pyqsd.qapi.hash_order import first_left
from pyqsd.qapi.types import NULL, Alternate, IntRange, Null, Struct, wire_name

if TYPE_CHECKING:
    from pyqsd.qapi.command import Command

T = TypeVar("T")

#: A value and the name of the member that holds it (None for a list element) to a typed value.
Converter = Callable[[Any, "str | None"], Any]


class _Mismatch(Exception):
    """A mistake whose message carries the whole path; `path` is filled from the inside out."""

    def __init__(self, template: str, name: str | int | None) -> None:
        super().__init__(template)
        self.template = template
        self.path: list[str | int] = [] if name is None else [name]

    def error(self, keyval: bool) -> Error:
        text = ""
        for part in reversed(self.path):
            if isinstance(part, int):
                text += f".{part}" if keyval else f"[{part}]"
            else:
                text += f".{part}" if text else part
        return Error(self.template % (text or "<anonymous>"))


def convert(value: Any, typ: type[T] | Any, *, keyval: bool = False, name: str = "") -> T:
    """Convert `value` to `typ` (any annotation of `pyqsd.qapi.types`).

    `keyval`: the leaves are strings to be parsed. `name`: the member that `value` belongs to, for messages; the root
    of an argument has none. Raises Error.
    """
    try:
        return cast(T, _converter(typ, keyval)(value, name or None))
    except _Mismatch as exc:
        raise exc.error(keyval) from None
    except RecursionError:
        raise Error("Parameters are nested too deeply") from None


def convert_arguments(command: Command, arguments: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments for `command.func` from the wire's `arguments`. Raises Error."""
    try:
        return cast(dict[str, Any], _arguments_converter(command)(arguments, None))
    except _Mismatch as exc:
        raise exc.error(False) from None
    except RecursionError:
        raise Error("Parameters are nested too deeply") from None


# --- signatures and annotations ----------------------------------------------------------------------------------


class Parameter:
    """A wire member of a command's arguments."""

    __slots__ = ("annotation", "name", "required", "wire")

    def __init__(self, name: str, wire: str, annotation: Any, required: bool) -> None:
        self.name = name
        self.wire = wire
        self.annotation = annotation
        self.required = required


@cache
def hints_of(func: Callable[..., Any]) -> dict[str, Any]:
    """The evaluated annotations of `func`, with their ``Annotated`` extras."""
    return typing.get_type_hints(func, include_extras=True)


def wire_parameters(command: Command) -> list[Parameter]:
    """The keyword parameters of `command`, in order of declaration."""
    hints = hints_of(command.func)
    return [
        Parameter(p.name, command.renames.get(p.name, wire_name(p.name)), hints[p.name], p.default is p.empty)
        for p in inspect.signature(command.func).parameters.values()
        if p.kind is not p.POSITIONAL_ONLY
    ]


def service_types(command: Command) -> list[Any]:
    """The annotations of the positional-only parameters of `command`: the services that it is called with."""
    hints = hints_of(command.func)
    parameters = inspect.signature(command.func).parameters.values()
    return [hints[p.name] for p in parameters if p.kind is p.POSITIONAL_ONLY]


def strip_optional(typ: Any) -> tuple[Any, bool]:
    """``T | None`` → (T, True); else (typ, False). An ``Annotated`` around the optional is kept on T."""
    if typing.get_origin(typ) is Annotated:
        inner, *extras = typing.get_args(typ)
        stripped, optional = strip_optional(inner)
        return (Annotated[(stripped, *extras)], True) if optional else (typ, False)
    if typing.get_origin(typ) in (typing.Union, types.UnionType):
        args = typing.get_args(typ)
        rest = tuple(arg for arg in args if arg is not type(None))
        if len(rest) < len(args):
            return (rest[0] if len(rest) == 1 else typing.Union[rest]), True  # noqa: UP007
    return typ, False


def annotation_extra(typ: Any, kind: type[T]) -> T | None:
    """The first extra of `kind` in an ``Annotated`` type, also inside its optional part."""
    typ, _ = strip_optional(typ)
    while typing.get_origin(typ) is Annotated:
        inner, *extras = typing.get_args(typ)
        for extra in extras:
            if isinstance(extra, kind):
                return extra
        typ = inner
    return None


def plain_type(typ: Any) -> Any:
    """`typ` without its optional part and without ``Annotated`` extras."""
    while True:
        typ, _ = strip_optional(typ)
        if typing.get_origin(typ) is not Annotated:
            return typ
        typ = typing.get_args(typ)[0]


def union_members(typ: Any) -> tuple[Any, ...] | None:
    """The members of an alternate, or None when `typ` is not a union of types."""
    if typing.get_origin(typ) in (typing.Union, types.UnionType):
        return typing.get_args(typ)
    return None


def union_root(cls: type[Struct]) -> type[Struct] | None:
    """The base of the union that `cls` belongs to (itself for the base), None for a plain struct."""
    if not cls.__struct_config__.tag_field:
        return None
    root = cls
    for base in cls.__mro__:
        if issubclass(base, Struct) and base.__struct_config__.tag_field:
            root = base
    return root


def tag_of(cls: type[Struct]) -> tuple[str, str]:
    """The tag member's wire name and value of a union's branch."""
    config = cls.__struct_config__
    return str(config.tag_field), str(config.tag)


# --- converters ---------------------------------------------------------------------------------------------------

_CONVERTERS: dict[tuple[Any, bool], Converter] = {}


def _converter(typ: Any, keyval: bool) -> Converter:
    key = (typ, keyval)
    found = _CONVERTERS.get(key)
    if found is None:
        found = _CONVERTERS[key] = _make(typ, keyval)
    return found


def _make(typ: Any, keyval: bool) -> Converter:
    typ, _ = strip_optional(typ)
    bounds = annotation_extra(typ, IntRange)
    alternate = annotation_extra(typ, Alternate)
    typ = plain_type(typ)
    if typ is Any:
        return lambda value, name: value
    members = union_members(typ)
    if members is not None:
        if alternate is None:
            raise TypeError(f"{typ!r} is an alternate without a name")
        return _make_alternate(members, alternate.name, keyval)
    if typ is int:
        return _make_int(bounds or IntRange("int", -(1 << 63), (1 << 63) - 1), keyval)
    if typ is bool:
        return _keyval_bool if keyval else _json_bool
    if typ is str:
        return _keyval_str if keyval else _json_str
    if typ is float:
        return _keyval_number if keyval else _json_number
    if typ is Null:
        return _null
    if typing.get_origin(typ) is list:
        return _make_list(typing.get_args(typ)[0], keyval)
    if isinstance(typ, type) and issubclass(typ, Enum):
        return _make_enum(typ, keyval)
    if isinstance(typ, type) and issubclass(typ, Struct):
        return _make_struct(typ, keyval)
    raise TypeError(f"{typ!r} is not a wire type")


def _wrong_type(name: str | None, expected: str) -> _Mismatch:
    return _Mismatch(f"Invalid parameter type for '%s', expected: {expected}", name)


def _bare(name: str | None) -> str:
    """The name as messages without the whole path spell it: an element of a list has none."""
    return "null" if name is None else name


def _json_bool(value: Any, name: str | None) -> Any:
    if value is True or value is False:
        return value
    raise _wrong_type(name, "boolean")


def _json_str(value: Any, name: str | None) -> Any:
    if type(value) is str:
        return value
    raise _wrong_type(name, "string")


def _json_number(value: Any, name: str | None) -> Any:
    if type(value) is float or type(value) is int:
        return float(value)
    raise _wrong_type(name, "number")


def _null(value: Any, name: str | None) -> Any:
    if value is None:
        return NULL
    raise _wrong_type(name, "null")


def _keyval_str(value: Any, name: str | None) -> Any:
    if type(value) is str:
        return value
    if isinstance(value, (dict, list)):
        raise _Mismatch("Parameters '%s.*' are unexpected", name)
    raise _wrong_type(name, "string")


def _keyval_bool(value: Any, name: str | None) -> Any:
    text = _keyval_str(value, name)
    if text in ("on", "yes", "true", "y"):
        return True
    if text in ("off", "no", "false", "n"):
        return False
    raise _Mismatch("Parameter '%s' expects 'on' or 'off'", name)


def _keyval_number(value: Any, name: str | None) -> Any:
    text = _keyval_str(value, name)
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if number - number != 0 or "_" in text or text != text.rstrip():
        raise _Mismatch("Parameter '%s' expects number", name)
    return number


_INTEGER = re.compile(r"[ \t\n\v\f\r]*([+-]?)(?:0[xX]([0-9a-fA-F]+)|0([0-7]*)|([1-9][0-9]*))\Z", re.ASCII)
_SIZE = re.compile(r"[ \t\n\v\f\r]*\+?(?:([0-9]*)(\.[0-9]*)?([bBkKmMgGtTpPeE]?)|0[xX]([0-9a-fA-F]+))\Z", re.ASCII)
_SHIFTS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


def parse_integer(text: str) -> int | None:
    """An integer as C's strtoll() with base 0 reads it, the whole of `text`; None when it is none."""
    match = _INTEGER.match(text) if len(text) < 1000 else None
    if match is None:
        return None
    sign, hexadecimal, octal, decimal = match.groups()
    if hexadecimal is not None:
        number = int(hexadecimal, 16)
    elif octal is not None:
        number = int(octal or "0", 8)
    else:
        number = int(decimal)
    return -number if sign == "-" else number


def parse_size(text: str) -> int | None:
    """A size in bytes: decimal with an optional fraction and suffix (B, K, M, G, T, P, E: powers of 1024), or
    hexadecimal; None when it is none, or beyond 64 bits."""
    match = _SIZE.match(text) if len(text) < 100 else None
    if match is None:
        return None
    whole, fraction, suffix, hexadecimal = match.groups()
    if hexadecimal is not None:
        number = int(hexadecimal, 16)
    else:
        if not whole and len(fraction or "") < 2:
            return None
        shift = _SHIFTS[suffix.lower()]
        part = Fraction(float("0" + fraction)) if fraction and len(fraction) > 1 else Fraction(0)
        if part and not shift:
            return None
        number = (int(whole or "0") << shift) + int(part * (1 << shift) + Fraction(1, 2))
    return number if number < 1 << 64 else None


def _make_int(bounds: IntRange, keyval: bool) -> Converter:
    minimum, maximum = bounds.minimum, bounds.maximum
    unsigned = minimum == 0
    if unsigned:
        wide_minimum, wide_maximum = (-(1 << 64) + 1 if keyval else -(1 << 63)), (1 << 64) - 1
    else:
        wide_minimum, wide_maximum = -(1 << 63), (1 << 63) - 1
    wide = maximum == wide_maximum
    ctype = f"{bounds.name}_t"

    def ranged(number: int, name: str | None) -> int:
        if number < 0 and unsigned:
            number &= (1 << 64) - 1
        if not wide and not minimum <= number <= maximum:
            raise Error(f"Parameter '{_bare(name)}' expects {ctype}")
        return number

    if bounds.suffixes and keyval:

        def keyval_size(value: Any, name: str | None) -> int:
            number = parse_size(_keyval_str(value, name))
            if number is None:
                raise _Mismatch("Parameter '%s' expects size", name)
            return number

        return keyval_size

    if keyval:

        def keyval_int(value: Any, name: str | None) -> int:
            number = parse_integer(_keyval_str(value, name))
            if number is None or not wide_minimum <= number <= wide_maximum:
                raise _Mismatch("Parameter '%s' expects integer", name)
            return ranged(number, name)

        return keyval_int

    def json_int(value: Any, name: str | None) -> int:
        if type(value) is int:
            if minimum <= value <= maximum:
                return value
            if wide_minimum <= value <= wide_maximum:
                return ranged(value, name)
        if unsigned:
            raise _Mismatch("Parameter '%s' expects uint64", name)
        raise _wrong_type(name, "integer")

    return json_int


def _make_enum(cls: type[Enum], keyval: bool) -> Converter:
    values = {member.value: member for member in cls}
    text = _keyval_str if keyval else _json_str

    def enum(value: Any, name: str | None) -> Any:
        if type(value) is str:
            found = values.get(value)
            if found is not None:
                return found
            raise Error(f"Parameter '{_bare(name)}' does not accept value '{value}'")
        return text(value, name)

    return enum


def _make_list(element: Any, keyval: bool) -> Converter:
    inner: Converter | None = None

    def sequence(value: Any, name: str | None) -> Any:
        nonlocal inner
        if type(value) is not list:
            raise _wrong_type(name, "array")
        if inner is None:
            inner = _converter(element, keyval)
        result: list[Any] = []
        try:
            for item in value:
                result.append(inner(item, None))
        except _Mismatch as exc:
            exc.path.append(len(result))
            if name is not None:
                exc.path.append(name)
            raise
        return result

    return sequence


def _make_alternate(members: tuple[Any, ...], type_name: str, keyval: bool) -> Converter:
    by_json_type: dict[type, Converter] = {}
    for member in members:
        converter = _converter(member, keyval)
        typ = plain_type(member)
        if typ is Null:
            by_json_type[type(None)] = converter
        elif typing.get_origin(typ) is list:
            by_json_type[list] = converter
        elif issubclass(typ, Struct):
            by_json_type[dict] = converter
        elif issubclass(typ, str):
            by_json_type[str] = converter
        else:
            by_json_type[typ] = converter

    def alternate(value: Any, name: str | None) -> Any:
        converter = by_json_type.get(type(value))
        if converter is None:
            raise Error(f"Invalid parameter type for '{_bare(name)}', expected: {type_name}")
        return converter(value, name)

    return alternate


_Plan = list[tuple[str, str, Converter, bool]]


def _members(plan: _Plan, value: dict[str, Any], tag_field: str | None) -> dict[str, Any]:
    """The keyword arguments of a struct from `value`; its member `tag_field` has been dealt with."""
    result: dict[str, Any] = {}
    for wire, attribute, converter, required in plan:
        if wire in value:
            result[attribute] = converter(value[wire], wire)
        elif required:
            raise _Mismatch("Parameter '%s' is missing", wire)
    if len(result) + (tag_field is not None) != len(value):
        expected = {tag_field or "", *(wire for wire, *_ in plan)}
        unexpected = [key for key in value if key not in expected]
        # With a huge number of members the order is not worth its price.
        first = first_left(value, expected) if len(unexpected) > 1 and len(value) < 500 else unexpected[0]
        raise _Mismatch("Parameter '%s' is unexpected", first)
    return result


def _struct_plan(cls: type[Struct], keyval: bool) -> _Plan:
    return [(f.encode_name, f.name, _converter(f.type, keyval), f.required) for f in msgspec.structs.fields(cls)]


def _make_struct(cls: type[Struct], keyval: bool) -> Converter:
    root = union_root(cls)
    if root is cls:
        return _make_union(cls, keyval)
    tag_field, tag = tag_of(cls) if root is not None else ("", "")
    # Made on first use: a struct may hold itself, and a driver's options need not be loaded before.
    plan: _Plan | None = None

    def struct(value: Any, name: str | None) -> Any:
        nonlocal plan
        if type(value) is not dict:
            raise _wrong_type(name, "object")
        if plan is None:
            plan = _struct_plan(cls, keyval)
        try:
            if tag_field and tag_field in value:
                if value[tag_field] != tag:
                    raise Error(f"Parameter '{tag_field}' does not accept value '{value[tag_field]}'")
                return cls(**_members(plan, value, tag_field))
            return cls(**_members(plan, value, None))
        except _Mismatch as exc:
            if name is not None:
                exc.path.append(name)
            raise

    return struct


def _make_union(cls: type[Struct], keyval: bool) -> Converter:
    tag_field, base_tag = tag_of(cls)
    text = _keyval_str if keyval else _json_str
    plans: dict[str, tuple[type[Struct], _Plan]] = {}

    def find(tag: str) -> tuple[type[Struct], _Plan]:
        branch = cls.branch(tag) if tag != base_tag else None
        if branch is None:
            raise Error(f"Parameter '{tag_field}' does not accept value '{tag}'")
        plans[tag] = found = (branch, _struct_plan(branch, keyval))
        return found

    def union(value: Any, name: str | None) -> Any:
        if type(value) is not dict:
            raise _wrong_type(name, "object")
        try:
            if tag_field not in value:
                raise _Mismatch("Parameter '%s' is missing", tag_field)
            tag = text(value[tag_field], tag_field)
            branch, plan = plans.get(tag) or find(tag)
            return branch(**_members(plan, value, tag_field))
        except _Mismatch as exc:
            if name is not None:
                exc.path.append(name)
            raise

    return union


@cache
def _arguments_converter(command: Command) -> Converter:
    parameters = wire_parameters(command)
    if command.boxed:
        (boxed,) = parameters
        convert_boxed = _converter(boxed.annotation, False)
        attribute = boxed.name
        return lambda value, name: {attribute: convert_boxed(value, name)}
    plan: _Plan = [(p.wire, p.name, _converter(p.annotation, False), p.required) for p in parameters]
    return lambda value, name: _members(plan, value, None)
