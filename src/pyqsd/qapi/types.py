"""How a wire type is written down in Python.

==================  ==========================================================================================
QAPI                Python
==================  ==========================================================================================
struct              ``class X(Struct, kw_only=True)``; ``_`` in a name is ``-`` on the wire unless ``field(name=…)``
optional member     ``member: T | None = None`` (absent), or ``member: T = default`` for inputs with a default
union               ``class U(Struct, tag_field="driver", tag="…")`` with a branch per subclass: ``tag="qcow2"``
alternate           ``Annotated[str | BlockdevOptions, Alternate("BlockdevRef")]``: told apart by their JSON type
enum                ``class E(StrEnum)``
list                ``list[T]``
int8 … uint64, size the aliases below (``size`` also takes ``64k``, ``1G`` when it comes as key=value text)
any                 ``Any``
features            ``Annotated[T, Features("deprecated")]`` on members, ``__features__`` on classes and enums,
                    ``__member_features__ = {"value": ("deprecated",)}`` in an enum for its values
==================  ==========================================================================================

`pyqsd.qapi.convert` turns wire values into these, with QSD's messages; `pyqsd.qapi.introspect` describes them as
``query-qmp-schema`` does (QEMU docs/devel/qapi-code-gen). `pyqsd.qapi.json_writer` is the way back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Final

import msgspec

field = msgspec.field


class IntRange:
    """Marks an `int` of a given width, for conversion."""

    __slots__ = ("maximum", "minimum", "name", "suffixes")

    def __init__(self, name: str, minimum: int, maximum: int, suffixes: bool = False) -> None:
        self.name = name
        self.minimum = minimum
        self.maximum = maximum
        self.suffixes = suffixes


class Alternate:
    """The name of an alternate, which QSD's messages spell: ``Annotated[str | Null, Alternate("StrOrNull")]``."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Features:
    """QAPI features of a member ("deprecated", "unstable", …)."""

    __slots__ = ("names",)

    def __init__(self, *names: str) -> None:
        self.names = names


Int8 = Annotated[int, IntRange("int8", -(1 << 7), (1 << 7) - 1)]
Int16 = Annotated[int, IntRange("int16", -(1 << 15), (1 << 15) - 1)]
Int32 = Annotated[int, IntRange("int32", -(1 << 31), (1 << 31) - 1)]
Int64 = Annotated[int, IntRange("int64", -(1 << 63), (1 << 63) - 1)]
Uint8 = Annotated[int, IntRange("uint8", 0, (1 << 8) - 1)]
Uint16 = Annotated[int, IntRange("uint16", 0, (1 << 16) - 1)]
Uint32 = Annotated[int, IntRange("uint32", 0, (1 << 32) - 1)]
Uint64 = Annotated[int, IntRange("uint64", 0, (1 << 64) - 1)]
Size = Annotated[int, IntRange("size", 0, (1 << 64) - 1, suffixes=True)]


class Null:
    """The JSON ``null`` of an alternate (an absent optional member is ``None``)."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "NULL"


NULL: Final = Null()


def wire_name(name: str) -> str:
    """``node_name`` → ``node-name``; a trailing underscore (``class_``) is only there for Python."""
    return name.rstrip("_").replace("_", "-")


class Struct(msgspec.Struct, kw_only=True, omit_defaults=True, rename=wire_name):
    """A QAPI struct, or with ``tag_field`` the base of a union."""

    __features__: ClassVar[tuple[str, ...]] = ()
    #: Features of single values of a union's tag.
    __tag_features__: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @classmethod
    def branches(cls) -> Mapping[str, type[Struct]]:
        """The branches of this union by tag: every tagged subclass. A union with lazily loaded branches overrides."""
        found: dict[str, type[Struct]] = {}
        for sub in cls.__subclasses__():
            tag = sub.__struct_config__.tag
            if isinstance(tag, str) and sub.__struct_config__.tag_field:
                found[tag] = sub
        return found

    @classmethod
    def tags(cls) -> Iterable[str]:
        """The values of this union's tag; one without a branch has no further members (only in what is told)."""
        return cls.branches()

    @classmethod
    def branch(cls, tag: str) -> type[Struct] | None:
        """The branch for `tag`, loading the module that defines it where that is needed; None when there is none."""
        return cls.branches().get(tag)
