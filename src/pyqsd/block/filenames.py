"""What a node is called by people: its filename.

A node that can be opened again by a plain name has that name. One that cannot (a part of a file, another backing file
than the image names, options that decide what is read) has a ``json:`` name with those options, which is spelled as QSD
spells it, down to the order of the members.

Names inside images are relative to the directory of the image that they are in.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pyqsd.block.driver import ROLE_PRIMARY
from pyqsd.qapi.json_writer import to_json, to_wire

if TYPE_CHECKING:
    from pyqsd.block.node import Node

#: Names are cut to this many bytes.
_LONGEST = 4095


def filename(node: Node) -> str:
    """The name of `node`, never empty."""
    node = node.explicit()
    while node.driver.named_as_child and (main := primary(node)) is not None:
        node = main
    exact = exact_filename(node)
    if exact:
        return exact
    return _cut("json:" + to_json(_ordered(open_options(node))))


def exact_filename(node: Node) -> str:
    """The plain name with which the image could be opened again, or ""."""
    node = node.explicit()
    driver = node.driver
    if driver.is_protocol or driver.names_images:
        return driver.exact_filename()
    if driver.named_as_child:
        main = primary(node)
        return "" if main is None else exact_filename(main)
    below = primary(node)
    if below is None or driver.is_filter or _strong(node) or backing_overridden(node):
        return ""
    if not below.driver.is_protocol and not below.driver.names_images:
        return ""
    return exact_filename(below)


def open_options(node: Node) -> dict[str, Any]:
    """The options (wire values, nested) that open the same tree of images again."""
    node = node.explicit()
    options: dict[str, Any] = {"driver": node.driver.name, **_strong(node)}
    overridden = backing_overridden(node)
    for child in node.children:
        if child is node.driver.backing and not overridden:
            continue
        _put(options, child.name, open_options(child.node))
    if overridden and node.driver.backing is None:
        options["backing"] = None
    return options


def backing_overridden(node: Node) -> bool:
    """Whether the node has another backing file than its image names."""
    driver = node.driver
    if not driver.supports_backing:
        return False
    named = node.auto_backing_filename
    if named is None:
        named = driver.image_info().get("backing_filename") or ""
    if driver.backing is None:
        return bool(named)
    return filename(driver.backing.node) != named


def primary(node: Node) -> Node | None:
    """The child that the node's name and directory come from."""
    for child in node.children:
        if child.role & ROLE_PRIMARY:
            return child.node
    return None


def full_backing_filename(node: Node, backing: str) -> str:
    """The name `backing`, which stands in the image of `node`, as it is opened. Raises ValueError if there is no
    directory that it could be relative to."""
    if not backing or has_protocol(backing) or backing.startswith("/"):
        return backing
    base = _directory(node)
    if base is None:
        raise ValueError(f"Cannot generate a base directory for {node.driver.name} nodes")
    return base + backing


def find_backing_image(node: Node, name: str) -> Node | None:
    """The node in the backing chain of `node`, itself and filters not included, that `name` means: as a name may stand
    in the image above it, for which names are relative to where that image is. None if there is none."""
    above = without_filters(node)
    while (backing := above.driver.backing) is not None:
        below = without_filters(backing.node)
        if _names(above, name, below):
            return below
        above = below
    return None


def without_filters(node: Node) -> Node:
    """The node, or the first below it that is no filter."""
    while node.driver.is_filter and (below := node.below()) is not None:
        node = below
    return node


def _names(above: Node, name: str, below: Node) -> bool:
    """Whether the image of `above` could call its backing file `below` by `name`."""
    if backing_overridden(above):
        return name == filename(below)
    stored = above.driver.image_info().get("backing_filename") or ""
    if has_protocol(name) or has_protocol(stored):
        return bool(name == stored)
    try:
        path = os.path.realpath(full_backing_filename(above, name), strict=True)
        return bool(name) and path == os.path.realpath(full_backing_filename(above, stored), strict=True)
    except (OSError, ValueError):
        return False


def has_protocol(name: str) -> bool:
    """Whether `name` begins with ``protocol:`` (a colon before the first slash)."""
    colon = name.find(":")
    return colon >= 0 and "/" not in name[:colon]


def _directory(node: Node) -> str | None:
    name = exact_filename(node)
    if name:
        start = name.index(":") + 1 if has_protocol(name) else 0
        return name[: max(name.rfind("/") + 1, start)]
    below = primary(node)
    return None if below is None else _directory(below)


def _strong(node: Node) -> dict[str, Any]:
    """The given options that decide what is read, by wire name; members of structs are spelled ``option.member``."""
    options = node.options
    fields: tuple[str, ...] = options.__struct_fields__
    wire: tuple[str, ...] = options.__struct_encode_fields__
    found: dict[str, Any] = {}
    for name in node.driver.strong_options:
        name, dot, member = name.partition(".")
        value = getattr(options, name, None)
        path = wire[fields.index(name)]
        if dot and value is not None:
            path += "." + value.__struct_encode_fields__[value.__struct_fields__.index(member)]
            value = getattr(value, member)
        if value is not None:
            _flatten(found, path, to_wire(value))
    return found


def _flatten(options: dict[str, Any], path: str, value: Any) -> None:
    """Options that have members are told with dots in their names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(options, f"{path}.{key}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            _flatten(options, f"{path}.{index}", inner)
    else:
        options[path] = value


def _put(options: dict[str, Any], path: str, value: Any) -> None:
    """Children of a list are called ``children.0`` …"""
    name, dot, index = path.partition(".")
    if dot and index.isdigit():
        options.setdefault(name, []).append(value)
    else:
        options[path] = value


def _ordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _ordered(value[key]) for key in sorted(value, key=_place)}
    if isinstance(value, list):
        return [_ordered(item) for item in value]
    return value


def _place(key: str) -> int:
    """The place of a member in QSD's dictionaries: a bucket of its 512 by the string hash of TDB."""
    raw = key.encode()
    value = 0x238F13AF * len(raw)
    for index, byte in enumerate(raw):
        value += byte << (index * 5 % 24)
    return (1103515243 * value + 12345) % 512


def _cut(name: str) -> str:
    raw = name.encode(errors="surrogateescape")
    if len(raw) <= _LONGEST:
        return name
    return raw[: _LONGEST - 3].decode(errors="ignore") + "..."
