"""The QMP commands ``object-*`` and ``qom-*``."""

from __future__ import annotations

from typing import Any

from pyqsd.qapi.command import command
from pyqsd.qapi.errors import DeviceNotFound, Error
from pyqsd.qapi.types import Struct
from pyqsd.qom.objects import Objects, TreeNode, get_property, properties_of, set_property
from pyqsd.qom.options import ObjectOptions
from pyqsd.qom.types import implements as type_implements
from pyqsd.qom.types import is_interface, type_table


class ObjectPropertyInfo(Struct, kw_only=True):
    """A property of an object or of a type."""

    name: str
    type: str
    description: str | None = None
    default_value: Any = None


class ObjectTypeInfo(Struct, kw_only=True):
    """A type. `abstract`: there are no objects of this very type."""

    name: str
    abstract: bool | None = None
    parent: str | None = None


@command("object-add", boxed=True)
async def object_add(objects: Objects, /, *, options: ObjectOptions) -> None:
    """Create an object."""
    await objects.add(options)


@command("object-del")
async def object_del(objects: Objects, /, *, id: str) -> None:
    """Delete an object."""
    await objects.remove(id)


@command("qom-list")
async def qom_list(objects: Objects, /, *, path: str) -> list[ObjectPropertyInfo]:
    """The properties of the object at `path`, of which its children are some."""
    return [ObjectPropertyInfo(name=name, type=typ) for name, typ in properties_of(objects.resolve(path))]


@command("qom-get")
async def qom_get(objects: Objects, /, *, path: str, property: str) -> Any:
    """The value of a property."""
    return get_property(objects, _resolve(objects, path), property)


@command("qom-set")
async def qom_set(objects: Objects, /, *, path: str, property: str, value: Any) -> None:
    """Set a property."""
    set_property(_resolve(objects, path), property, value)


def _resolve(objects: Objects, path: str) -> TreeNode:
    try:
        return objects.resolve(path)
    except Error as exc:
        # Unlike qom-list, these do not tell an ambiguous path from one that leads nowhere.
        raise DeviceNotFound(f"Device '{path}' not found") from exc


@command("qom-list-types")
async def qom_list_types(*, implements: str | None = None, abstract: bool | None = None) -> list[ObjectTypeInfo]:
    """The types that there are: those that are or implement `implements`; with abstract ones if `abstract`."""
    return [
        ObjectTypeInfo(name=info.name, abstract=True if info.abstract else None, parent=info.parent)
        for info in type_table().values()
        if (abstract or not info.abstract) and (implements is None or type_implements(info, implements))
    ]


@command("qom-list-properties")
async def qom_list_properties(*, typename: str) -> list[ObjectPropertyInfo]:
    """The properties of the objects of a type."""
    info = type_table().get(typename)
    if info is None:
        raise DeviceNotFound(f"Class '{typename}' not found")
    if is_interface(info):
        raise Error("Parameter 'typename' expects a QOM type")
    return [ObjectPropertyInfo(name=name, type=typ) for name, typ in (("type", "string"), *info.properties)]
