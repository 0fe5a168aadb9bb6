"""The options of user-creatable objects (QAPI ``ObjectOptions``)."""

from __future__ import annotations

from collections.abc import Mapping

from pyqsd.qapi.types import Struct
from pyqsd.qom import registry


class ObjectOptions(Struct, tag_field="qom-type", tag="pyqsd-base"):
    """The type and the name of an object; each type's ``Options`` is a branch, found through the registry."""

    id: str

    @classmethod
    def branches(cls) -> Mapping[str, type[Struct]]:
        return {tag: registry.object_class(tag).Options for tag in registry.object_tags()}

    @classmethod
    def branch(cls, tag: str) -> type[Struct] | None:
        return registry.object_class(tag).Options if tag in registry.object_tags() else None
