"""The base of user-creatable objects, and their properties."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from pyqsd.qapi.convert import convert
from pyqsd.qom.options import ObjectOptions

if TYPE_CHECKING:
    from pyqsd.qom.objects import Objects


class Property:
    """A property of a type: a member of its options, seen through ``qom-get`` and ``qom-set``.

    `type_name`: how QOM calls its type; `annotation`: its type here; `default`: what is read when it is not set.
    """

    __slots__ = ("annotation", "attribute", "default", "name", "type_name")

    def __init__(self, name: str, type_name: str, annotation: Any, default: Any) -> None:
        self.name = name
        self.attribute = name.replace("-", "_")
        self.type_name = type_name
        self.annotation = annotation
        self.default = default

    def get(self, obj: UserObject) -> Any:
        """The value, as a wire value."""
        value = getattr(obj.options, self.attribute)
        return self.default if value is None else msgspec.to_builtins(value)

    def set(self, obj: UserObject, value: Any) -> None:
        """Convert the wire value `value` and set it. Raises Error."""
        setattr(obj.options, self.attribute, convert(value, self.annotation, name=self.name))


def text(name: str) -> Property:
    """A property that is a string."""
    return Property(name, "string", str, "")


class UserObject:
    """Base of user-creatable objects."""

    #: QOM's name of the type.
    type_name: ClassVar[str]
    #: The types above it, nearest first, as (name, whether that is user-creatable itself).
    parents: ClassVar[tuple[tuple[str, bool], ...]] = ()
    #: The options struct: ``class Options(ObjectOptions, tag="secret")``.
    Options: ClassVar[type[ObjectOptions]] = ObjectOptions
    #: In QOM's order.
    properties: ClassVar[tuple[Property, ...]] = ()

    def __init__(self, options: Any, objects: Objects) -> None:
        self.options = options
        self.objects = objects

    @property
    def id(self) -> str:
        """The name that the user gave it."""
        name: str = self.options.id
        return name

    @property
    def in_use(self) -> bool:
        """It cannot be deleted just now."""
        return False

    async def complete(self) -> None:
        """Do what the options ask for; it can be found from then on. Raises Error."""

    async def close(self) -> None:
        """Release everything."""
