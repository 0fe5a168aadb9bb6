"""The types of all objects, as ``qom-list-types`` and ``qom-list-properties`` show them."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import NamedTuple

from pyqsd.chardev import registry as chardev_registry
from pyqsd.qom import registry


class TypeInfo(NamedTuple):
    """A QOM type. `properties`: (name, type), without ``type``, which all have. `settable`: the properties can be set
    when an object is created."""

    name: str
    parent: str | None = "object"
    abstract: bool = False
    user_creatable: bool = False
    properties: tuple[tuple[str, str], ...] = ()
    settable: bool = False


@cache
def type_table() -> dict[str, TypeInfo]:
    """All types by name, sorted."""
    found = [
        TypeInfo("object", None, abstract=True),
        TypeInfo("interface", None, abstract=True, user_creatable=False),
        TypeInfo("user-creatable", "interface", abstract=True, user_creatable=True),
        TypeInfo("container"),
        TypeInfo("chardev", abstract=True),
        TypeInfo("chardev-fd", "chardev", abstract=True),
    ]
    for name in chardev_registry.chardev_names():
        chardev = chardev_registry.chardev_class(name)
        found.append(TypeInfo(f"chardev-{name}", chardev.qom_parent, properties=chardev.qom_properties))
    parents: dict[str, TypeInfo] = {}
    for tag in registry.object_tags():
        cls = registry.object_class(tag)
        properties = tuple((prop.name, prop.type_name) for prop in cls.properties)
        chain = [*cls.parents, ("object", False)]
        found.append(TypeInfo(cls.type_name, chain[0][0], False, True, properties, True))
        for (name, user_creatable), (above, _) in pairwise(chain):
            # What an abstract type has is what all types below it have.
            had = parents[name].properties if name in parents else properties
            common = tuple(prop for prop in had if prop in properties)
            parents[name] = TypeInfo(name, above, True, user_creatable, common, True)
    found.extend(parents.values())
    return {info.name: info for info in sorted(found)}


def is_interface(info: TypeInfo) -> bool:
    """Whether it is an interface, or what all interfaces come from."""
    return info.name == "interface" or info.parent == "interface"


def implements(info: TypeInfo, name: str) -> bool:
    """Whether `name` is `info`, something above it, or an interface of it."""
    if name in ("user-creatable", "interface") and info.user_creatable:
        return True
    above: TypeInfo | None = info
    while above is not None:
        if above.name == name:
            return True
        above = type_table()[above.parent] if above.parent else None
    return False
