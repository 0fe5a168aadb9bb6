"""The service that knows all user-creatable objects, and the tree in which QMP shows them and the chardevs.

::

    /             container
      backend     container (empty)
      chardevs    container
        LABEL     chardev-…
      objects     container
        ID        …
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any, TypeVar

from pyqsd.chardev.chardev import Chardev, Chardevs
from pyqsd.chardev.opts import check_id
from pyqsd.qapi.errors import DeviceNotFound, Error
from pyqsd.qom import registry
from pyqsd.qom.object import UserObject
from pyqsd.qom.options import ObjectOptions

T = TypeVar("T", bound=UserObject)


class Container:
    """An inner node of the tree."""

    def __init__(self, children: dict[str, TreeNode]) -> None:
        self.children = children


TreeNode = Container | UserObject | Chardev


class Objects:
    """All user-creatable objects of a daemon, by id."""

    def __init__(self, chardevs: Chardevs) -> None:
        self._chardevs = chardevs
        self._objects: dict[str, UserObject] = {}
        #: Objects that are being created: they have their name, but nobody can use them yet.
        self._incomplete: dict[str, UserObject] = {}

    def __iter__(self) -> Iterator[UserObject]:
        return iter(tuple(self._objects.values()))

    # --- for those who use objects ---------------------------------------------------------------------------------

    def get(self, id: str, kind: type[T]) -> T | None:
        """The object `id` if there is one and it is a `kind`, else None."""
        obj = self._objects.get(id)
        return obj if isinstance(obj, kind) else None

    def find(self, id: str) -> UserObject | None:
        """The object `id` of whatever type, or None."""
        return self._objects.get(id)

    def secret(self, id: str) -> bytes:
        """What the secret `id` holds. Raises Error."""
        from pyqsd.qom.secret_common import SecretObject

        obj = self._objects.get(id) or self._incomplete.get(id)
        if obj is None:
            raise Error(f"No secret with id '{id}'", errno.ENOENT)
        if not isinstance(obj, SecretObject):
            raise Error(f"Object with id '{id}' is not a secret")
        if obj.content is None:
            raise Error(f"Secret with id '{id}' has no data")
        return obj.content

    def secret_text(self, id: str) -> str:
        """The same as text. Raises Error when it is not UTF-8."""
        try:
            return self.secret(id).decode("utf-8")
        except UnicodeDecodeError as exc:
            raise Error(f"Data from secret {id} is not valid UTF-8") from exc

    # --- for the user ------------------------------------------------------------------------------------------------

    async def add(self, options: ObjectOptions) -> UserObject:
        """Create an object. Raises Error."""
        check_id(options.id)
        obj = registry.object_class(str(options.__struct_config__.tag))(options, self)
        # "type" is what the container of the objects itself has as a property.
        if obj.id in self._objects or obj.id in self._incomplete or obj.id == "type":
            raise Error(f"attempt to add duplicate property '{obj.id}' to object (type 'container')", errno.EEXIST)
        self._incomplete[obj.id] = obj
        try:
            await obj.complete()
        finally:
            del self._incomplete[obj.id]
        self._objects[obj.id] = obj
        return obj

    async def remove(self, id: str) -> None:
        """Delete an object. Raises Error when there is none, or when it is in use."""
        obj = self._objects.get(id)
        if obj is None:
            raise Error(f"object '{id}' not found", errno.ENOENT)
        if obj.in_use:
            raise Error(f"object '{id}' is in use, can not be deleted", errno.EBUSY)
        del self._objects[id]
        await obj.close()

    async def close_all(self) -> None:
        """Delete all, last one first."""
        for obj in reversed(tuple(self._objects.values())):
            del self._objects[obj.id]
            await obj.close()

    # --- the tree ----------------------------------------------------------------------------------------------------

    def resolve(self, path: str) -> TreeNode:
        """The node at `path`: absolute, or the end of exactly one path. Raises DeviceNotFound; Error when a relative
        path is ambiguous."""
        root = self._tree()
        parts = path.split("/")
        if path.startswith("/"):
            found = [node for node in [_descend(root, parts)] if node is not None]
        else:
            found = list(_search(root, [part for part in parts if part]))
        if not found:
            raise DeviceNotFound(f"Device '{path}' not found")
        if len(found) > 1:
            raise Error(f"Path '{path}' is ambiguous")
        return found[0]

    def _tree(self) -> Container:
        chardevs: dict[str, TreeNode] = {chardev.label: chardev for chardev in self._chardevs}
        objects: dict[str, TreeNode] = dict(self._objects)
        children: dict[str, TreeNode] = {
            "backend": Container({}),
            "objects": Container(objects),
            "chardevs": Container(chardevs),
        }
        return Container(children)

    def path_of(self, container: Container, name: str) -> str:
        """The absolute path of the child `name` of `container`."""
        child = container.children[name]
        if isinstance(child, Container):
            return f"/{name}"
        return f"/chardevs/{name}" if isinstance(child, Chardev) else f"/objects/{name}"


def help_for(type_name: str | None) -> str:
    """What ``--object help`` (None) and ``--object TYPE,help`` print."""
    from pyqsd.qom.help import help_text

    return help_text(type_name)


def type_of(node: TreeNode) -> str:
    """The QOM type of a node."""
    if isinstance(node, Container):
        return "container"
    return f"chardev-{node.name}" if isinstance(node, Chardev) else node.type_name


def properties_of(node: TreeNode) -> list[tuple[str, str]]:
    """(name, type) of the properties of a node; a child is one too."""
    own: list[tuple[str, str]]
    if isinstance(node, Container):
        own = [(name, f"child<{type_of(child)}>") for name, child in node.children.items()]
    elif isinstance(node, Chardev):
        own = list(node.qom_properties)
    else:
        own = [(prop.name, prop.type_name) for prop in node.properties]
    return [("type", "string"), *own]


def get_property(objects: Objects, node: TreeNode, name: str) -> Any:
    """The value of a property, as a wire value. Raises Error."""
    if name == "type":
        return type_of(node)
    if isinstance(node, Container):
        if name in node.children:
            return objects.path_of(node, name)
    elif isinstance(node, Chardev):
        if any(name == own for own, _ in node.qom_properties):
            return node.qom_get(name)
    else:
        for prop in node.properties:
            if prop.name == name:
                return prop.get(node)
    raise Error(f"Property '{type_of(node)}.{name}' not found")


def set_property(node: TreeNode, name: str, value: Any) -> None:
    """Set a property from a wire value. Raises Error."""
    if isinstance(node, UserObject):
        for prop in node.properties:
            if prop.name == name:
                prop.set(node, value)
                return
    if any(name == own for own, _ in properties_of(node)):
        raise Error(f"Property '{type_of(node)}.{name}' is not writable")
    raise Error(f"Property '{type_of(node)}.{name}' not found")


def _descend(node: TreeNode, parts: list[str]) -> TreeNode | None:
    for part in parts:
        if part:
            if not isinstance(node, Container) or part not in node.children:
                return None
            node = node.children[part]
    return node


def _search(node: TreeNode, parts: list[str]) -> Iterator[TreeNode]:
    found = _descend(node, parts)
    if found is not None:
        yield found
    if isinstance(node, Container):
        for child in node.children.values():
            yield from _search(child, parts)
