"""``query-qmp-schema``: the declared commands, events and their types, described as QSD describes its own.

The names of types carry no meaning (QEMU docs/devel/qapi-code-gen, "Client JSON Protocol introspection"): they are
numbers, handed out in the order in which types are first referred to.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Mapping
from enum import Enum, StrEnum
from typing import Annotated, Any

import msgspec

from pyqsd.qapi.command import COMMANDS, EVENTS, Command, Event
from pyqsd.qapi.convert import (
    annotation_extra,
    hints_of,
    plain_type,
    strip_optional,
    tag_of,
    union_members,
    union_root,
    wire_parameters,
)
from pyqsd.qapi.types import NULL, Features, Null, Struct, field


class SchemaMetaType(StrEnum):
    """The kinds of `SchemaInfo`."""

    BUILTIN = "builtin"
    ENUM = "enum"
    ARRAY = "array"
    OBJECT = "object"
    ALTERNATE = "alternate"
    COMMAND = "command"
    EVENT = "event"


class JSONType(StrEnum):
    """What a builtin type is in JSON."""

    STRING = "string"
    NUMBER = "number"
    INT = "int"
    BOOLEAN = "boolean"
    NULL = "null"
    OBJECT = "object"
    ARRAY = "array"
    VALUE = "value"


class SchemaInfo(Struct, tag_field="meta-type", tag="pyqsd-base", kw_only=True):
    """A command, an event or a type."""

    name: str
    features: list[str] | None = None


class SchemaInfoBuiltin(SchemaInfo, tag="builtin", kw_only=True):
    """A type of JSON's own."""

    json_type: JSONType


class SchemaInfoEnumMember(Struct, kw_only=True):
    """A value of an enumeration."""

    name: str
    features: list[str] | None = None


class SchemaInfoEnum(SchemaInfo, tag="enum", kw_only=True):
    """An enumeration."""

    members: list[SchemaInfoEnumMember]
    values: Annotated[list[str], Features("deprecated")]


class SchemaInfoArray(SchemaInfo, tag="array", kw_only=True):
    """A list."""

    element_type: str


class SchemaInfoObjectMember(Struct, kw_only=True):
    """A member of an object; an optional one has a default, which is always null (that is: not told)."""

    name: str
    type_: str = field(name="type")
    default: Any | None = None
    features: list[str] | None = None


class SchemaInfoObjectVariant(Struct, kw_only=True):
    """The further members of an object when its tag has the value `case`."""

    case: str
    type_: str = field(name="type")


class SchemaInfoObject(SchemaInfo, tag="object", kw_only=True):
    """A struct or a union."""

    members: list[SchemaInfoObjectMember]
    tag: str | None = None
    variants: list[SchemaInfoObjectVariant] | None = None


class SchemaInfoAlternateMember(Struct, kw_only=True):
    """One of the types of an alternate."""

    type_: str = field(name="type")


class SchemaInfoAlternate(SchemaInfo, tag="alternate", kw_only=True):
    """A value of one of several types, told apart by their JSON type."""

    members: list[SchemaInfoAlternateMember]


class SchemaInfoCommand(SchemaInfo, tag="command", kw_only=True):
    """A command."""

    arg_type: str
    ret_type: str
    allow_oob: bool | None = None


class SchemaInfoEvent(SchemaInfo, tag="event", kw_only=True):
    """An event."""

    arg_type: str


_BUILTINS: dict[Any, tuple[str, JSONType]] = {
    str: ("str", JSONType.STRING),
    int: ("int", JSONType.INT),
    bool: ("bool", JSONType.BOOLEAN),
    float: ("number", JSONType.NUMBER),
    Null: ("null", JSONType.NULL),
    Any: ("any", JSONType.VALUE),
}

#: A member: its wire name, annotation, and whether it is optional.
_Member = tuple[str, Any, bool]


def query_qmp_schema(
    commands: Mapping[str, Command] = COMMANDS, events: Mapping[str, type[Event]] = EVENTS
) -> list[SchemaInfo]:
    """Describe `commands`, `events` and all the types that they use. Loads every branch of every union."""
    return _Schema(commands, events).infos


def _features(names: Iterable[str] | None) -> list[str] | None:
    return list(names) if names else None


class _Schema:
    def __init__(self, commands: Mapping[str, Command], events: Mapping[str, type[Event]]) -> None:
        self.infos: list[SchemaInfo] = []
        self._names: dict[Any, str] = {}
        self._number = 0
        #: Types that have a name but are not described yet. Not recursion: types are as deep as they like.
        self._waiting: list[Callable[[], None]] = []
        for name, event in events.items():
            self.infos.append(SchemaInfoEvent(name=name, arg_type=self._struct(event)))
        for command in commands.values():
            self._command(command)
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            for describe in waiting:
                describe()

    def _command(self, command: Command) -> None:
        parameters = wire_parameters(command)
        if command.boxed:
            argument = self._type(parameters[0].annotation)
        else:
            members = [(p.wire, p.annotation, not p.required) for p in parameters]
            argument = self._object(command, members, ())
        result = hints_of(command.func).get("return", type(None))
        self.infos.append(
            SchemaInfoCommand(
                name=command.name,
                features=_features(command.features),
                arg_type=argument,
                ret_type=self._object(None, [], ()) if result is type(None) else self._type(result),
                allow_oob=command.allow_oob or None,
            )
        )

    def _name(self, key: Any, describe: Callable[[str], None]) -> str:
        """The name of the type `key`, which is described later if it is new."""
        name = self._names.get(key)
        if name is None:
            name = self._names[key] = str(self._number)
            self._number += 1
            self._waiting.append(lambda: describe(name))
        return name

    def _type(self, typ: Any) -> str:
        typ = plain_type(typ)
        if typ in _BUILTINS:
            name, json_type = _BUILTINS[typ]
            if typ not in self._names:
                self._names[typ] = name
                self.infos.append(SchemaInfoBuiltin(name=name, json_type=json_type))
            return name
        if typing.get_origin(typ) is list:
            element = self._type(typing.get_args(typ)[0])
            name = f"[{element}]"
            if name not in self._names:
                self._names[name] = name
                self.infos.append(SchemaInfoArray(name=name, element_type=element))
            return name
        alternatives = union_members(typ)
        if alternatives is not None:
            return self._name(typ, lambda name: self._alternate(name, alternatives))
        if not isinstance(typ, type) or not issubclass(typ, (Enum, Struct)):
            raise TypeError(f"{typ!r} is not a wire type")
        if issubclass(typ, Enum):
            features = getattr(typ, "__member_features__", {})
            values = [str(member.value) for member in typ]
            return self._enum(typ, values, features, typ.__dict__.get("__features__", ()))
        return self._struct(typ)

    def _alternate(self, name: str, alternatives: tuple[Any, ...]) -> None:
        members = [SchemaInfoAlternateMember(type_=self._type(member)) for member in alternatives]
        self.infos.append(SchemaInfoAlternate(name=name, members=members))

    def _enum(self, key: Any, values: list[str], features: Mapping[str, tuple[str, ...]], own: Iterable[str]) -> str:
        def describe(name: str) -> None:
            members = [SchemaInfoEnumMember(name=value, features=_features(features.get(value))) for value in values]
            self.infos.append(SchemaInfoEnum(name=name, features=_features(own), members=members, values=values))

        return self._name(key, describe)

    def _struct(self, cls: type[Struct]) -> str:
        features = cls.__dict__.get("__features__", ())
        root = union_root(cls)
        if root is cls:
            return self._name(cls, lambda name: self._union(name, cls))
        members = _members(cls)
        if root is not None:
            members.insert(0, (tag_of(cls)[0], str, False))
        return self._object(cls, members, features)

    def _union(self, name: str, cls: type[Struct]) -> None:
        tag_field, base_tag = tag_of(cls)
        common = _members(cls)
        inherited = {wire for wire, _, _ in common}
        branches = cls.branches()
        tags = [tag for tag in cls.tags() if tag != base_tag]
        variants: list[SchemaInfoObjectVariant] = []
        for tag in tags:
            branch = branches.get(tag, cls)
            own = [member for member in _members(branch) if member[0] not in inherited]
            variant = self._object(("variant", cls, tag), own, branch.__dict__.get("__features__", ()))
            variants.append(SchemaInfoObjectVariant(case=tag, type_=variant))
        tag_type = self._enum(("tag", cls), tags, cls.__tag_features__, ())
        self.infos.append(
            SchemaInfoObject(
                name=name,
                features=_features(cls.__dict__.get("__features__")),
                members=[SchemaInfoObjectMember(name=tag_field, type_=tag_type), *self._describe(common)],
                tag=tag_field,
                variants=variants,
            )
        )

    def _object(self, key: Any, members: list[_Member], features: Iterable[str]) -> str:
        # All types without members are one.
        if not members and not features:
            key = None

        def describe(name: str) -> None:
            self.infos.append(
                SchemaInfoObject(name=name, features=_features(features), members=self._describe(members))
            )

        return self._name(key, describe)

    def _describe(self, members: list[_Member]) -> list[SchemaInfoObjectMember]:
        result = []
        for wire, typ, optional in members:
            extra = annotation_extra(typ, Features)
            result.append(
                SchemaInfoObjectMember(
                    name=wire,
                    type_=self._type(typ),
                    default=NULL if optional else None,
                    features=_features(extra.names if extra else None),
                )
            )
        return result


def _members(cls: type[Struct]) -> list[_Member]:
    return [(f.encode_name, f.type, not f.required or strip_optional(f.type)[1]) for f in msgspec.structs.fields(cls)]
