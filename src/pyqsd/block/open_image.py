"""Opening an image by a name that stands in another image: a backing file, a data file.

Such a name was written by whoever made the image, not by the user. It is a path (relative to the directory of the image
that it is in), ``protocol:…``, or ``json:{…}`` with options. `resolve` turns it into the options that a user would have
given, `check_policy` decides whether they may be opened, and only then are they.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import stat
from contextvars import ContextVar, copy_context
from enum import Enum
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints

from pyqsd.block import filenames, registry
from pyqsd.block.child import Child
from pyqsd.block.driver import ROLE_COW, ROLE_DATA, Driver
from pyqsd.block.node import Node
from pyqsd.block.options import BlockdevCacheOptions, BlockdevOptions
from pyqsd.qapi.convert import convert
from pyqsd.qapi.errors import Error
from pyqsd.qapi.json_stream import parse_text
from pyqsd.qapi.types import Size

log = logging.getLogger(__name__)

#: Formats tell themselves from the others by the first bytes of a file.
_PROBE_BYTES = 512

_WHOLE = re.compile(r"-?[0-9]+")

#: What is being opened above: identities of images (see `_identity`), the outermost first.
_opening: ContextVar[tuple[Any, ...]] = ContextVar("_opening", default=())

_Tree = dict[str, Any]

_MIXED = "Cannot reference an existing block device with additional options or a new filename"


async def open_backing(node: Node, filename: str, fmt: str | None) -> Child | None:
    """Open the backing file that the image of `node` names, attach it, and return the edge (None if there is no name).

    `fmt`: the format that the image gives for it; without, it is found out by its content. Raises Error.
    """
    if not filename:
        return None
    try:
        child = await open_child_image(node, "backing", filename, fmt, ROLE_COW)
    except (Error, OSError) as exc:
        cause = exc if isinstance(exc, Error) else Error(os.strerror(exc.errno or errno.EIO), exc.errno or errno.EIO)
        raise cause.prefixed("Could not open backing file: ") from exc
    node.auto_backing_filename = filenames.filename(child.node)
    return child


async def open_data_file(node: Node, filename: str) -> Child:
    """Open the data file that the image of `node` names, and attach it as ``data-file``. As in QSD it is an ordinary
    file, whatever the name looks like, and the name is relative to the working directory. Raises Error."""
    if not filename:
        raise Error("The 'file' block driver requires a file name", errno.EINVAL)
    tree: _Tree = {"driver": "file", "filename": filename}
    check_policy(node, tree)
    return await node.open_child("data-file", to_options(tree), ROLE_DATA)


async def open_child_image(node: Node, child_name: str, filename: str, fmt: str | None, role: int) -> Child:
    """Open the image `filename`, which the image of `node` names, and attach it to `node` as `child_name`.

    Raises Error, OSError.
    """
    try:
        full = filenames.full_backing_filename(node, filename)
    except ValueError as exc:
        raise Error(str(exc), errno.EINVAL) from exc
    tree = resolve(full, fmt)
    if not isinstance(tree.get("driver"), str):
        tree["driver"] = await _probe(node, tree["file"], full)
    identity = check_policy(node, tree)
    options = to_options(tree)
    # A task of its own, because chains may be longer than the interpreter's stack is deep. It has a context of its own,
    # because this may have begun outside of any task, and go on in one.
    context = copy_context()
    context.run(_opening.set, (*_opening.get(), identity))
    opening = node.open_child(child_name, options, role)
    return await asyncio.get_running_loop().create_task(opening, context=context)


def check_policy(node: Node, tree: _Tree) -> Any:
    """The one place that decides whether an image may name what `tree` (from `resolve`) says as another image.

    As in QSD, every driver may be named. Refused is an image that is already being opened further up, with the same
    options: its chain would never end. Returns the identity of what is going to be opened. Raises Error.
    """
    identity = _identity(tree)
    if identity in _opening.get():
        raise Error(f"The backing chain of node '{node.name}' has a loop", errno.ELOOP)
    return identity


def resolve(filename: str, fmt: str | None) -> _Tree:
    """The options that `filename` stands for, as a tree of wire names; leaves are strings (as in key=value) or None.

    The member ``driver`` is missing if the format must be found out. Raises Error.
    """
    tree: _Tree = {}
    name: str | None = filename
    if filename.startswith("json:"):
        tree, name = _from_json(filename[len("json:") :]), None
    if fmt:
        tree["driver"] = fmt
    _complete(tree, name)
    return tree


def protocol_options(filename: str) -> _Tree:
    """The options (wire names) of the protocol node that `filename` means. Raises Error."""
    return _protocol(filename)


def to_options(tree: _Tree) -> BlockdevOptions:
    """`tree` as typed options. Raises Error with QSD's words for what a driver does not know."""
    _check_members(tree)
    options: BlockdevOptions = convert(tree, BlockdevOptions, keyval=True)
    return options


# --- names and JSON to a tree ---------------------------------------------------------------------------------------


def _from_json(text: str) -> _Tree:
    try:
        value = parse_text(text)
    except Error as exc:
        raise exc.prefixed("Could not parse the JSON options: ") from exc
    if not isinstance(value, dict):
        raise Error("Invalid JSON object given", errno.EINVAL)
    tree: _Tree = {}
    # Without recursion: a name may be nested deeper than the interpreter's stack is.
    rest: list[tuple[str, Any]] = list(value.items())[::-1]
    while rest:
        path, item = rest.pop()
        if isinstance(item, dict):
            rest += [(f"{path}.{key}", inner) for key, inner in item.items()][::-1]
        elif isinstance(item, list):
            rest += [(f"{path}.{index}", inner) for index, inner in enumerate(item)][::-1]
        elif item is None or isinstance(item, str):
            _put(tree, path, item)
        elif path.rpartition(".")[2] not in ("driver", "filename"):
            # Those that are no names count for nothing, as in QSD.
            _put(tree, path, ("on" if item else "off") if isinstance(item, bool) else str(item))
    return tree


def _put(tree: _Tree, path: str, leaf: Any) -> None:
    """Members may be nested or dotted, as one likes."""
    *outer, last = path.split(".")
    for key in outer:
        inner = tree.setdefault(key, {})
        if not isinstance(inner, dict):
            raise Error(_MIXED, errno.EINVAL)
        tree = inner
    if isinstance(tree.get(last), dict):
        raise Error(_MIXED, errno.EINVAL)
    tree[last] = leaf


def _listed(value: Any) -> Any:
    """Dictionaries with the keys 0, 1, … are lists."""
    if not isinstance(value, dict):
        return value
    if value and all(key.isdecimal() for key in value):
        return [_listed(value[key]) for key in sorted(value, key=int)]
    return {key: _listed(item) for key, item in value.items()}


def _complete(tree: _Tree, name: str | None) -> None:
    """Add what `name` says, and the drivers that can be told from filenames."""
    driver = tree.get("driver")
    if isinstance(driver, str):
        cls = _driver_class(driver)
        if cls.is_protocol or cls.names_images:
            if name is not None:
                for key, value in cls.parse_filename(name).items():
                    tree.setdefault(key, value)
            if "filename" in cls.Options.__struct_fields__ and not tree.get("filename"):
                raise Error(f"The '{driver}' block driver requires a file name", errno.EINVAL)
            if cls.names_images:
                _complete_image(tree)
            return
    elif name is None and "file" not in tree:
        raise Error("Must specify either driver or file", errno.EINVAL)
    if name is not None:
        tree["file"] = _protocol(name)
    elif tree.get("file") is None:
        raise Error('A block device must be specified for "file"', errno.EINVAL)
    if tree.get("backing") == "":
        log.warning('Use of "backing": "" is deprecated; use "backing": null instead')
        tree["backing"] = None
    for child in tree.values():
        if isinstance(child, dict) and ("driver" in child or child is tree["file"]):
            _complete_child(child)


def _complete_image(tree: _Tree) -> None:
    """The child ``image`` of a driver that takes its name from that of an image."""
    image = tree.get("image")
    if image is None:
        raise Error('A block device must be specified for "image"', errno.EINVAL)
    if isinstance(image, dict) and image.keys() == {"filename"} and isinstance(image["filename"], str):
        tree["image"] = _protocol(image["filename"])
    elif isinstance(image, dict):
        _complete_child(image)


def _complete_child(tree: _Tree) -> None:
    if not isinstance(tree.get("driver"), str):
        filename = tree.get("filename")
        if not isinstance(filename, str):
            raise Error("Must specify either driver or file", errno.EINVAL)
        tree["driver"] = "host_device" if _is_device(filename) else "file"
    _complete(tree, None)


def _protocol(name: str) -> _Tree:
    """The options of the protocol node that `name` means."""
    if _is_device(name):
        return {"driver": "host_device", "filename": name}
    if not filenames.has_protocol(name):
        return {"driver": "file", "filename": name}
    prefix = name.partition(":")[0]
    for driver in (prefix, prefix.partition("+")[0]):
        if registry.is_driver(driver):
            cls = registry.driver_class(driver)
            if cls.is_protocol or cls.names_images:
                tree: _Tree = {"driver": driver, **cls.parse_filename(name)}
                _complete(tree, None)
                return tree
    raise Error(f"Unknown protocol '{prefix}'", errno.ENOENT)


def _driver_class(name: str) -> type[Driver]:
    if not registry.is_driver(name):
        raise Error(f"Unknown driver '{name}'", errno.ENOENT)
    return registry.driver_class(name)


def _is_device(filename: str) -> bool:
    try:
        mode = os.stat(filename).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def _check_members(tree: _Tree) -> None:
    """Every member is one that its driver knows. Raises Error."""
    cls = _driver_class(str(tree.get("driver")))
    known = cls.Options.__struct_encode_fields__
    for key, value in tree.items():
        if key == "driver":
            continue
        if key not in known:
            raise _unknown(cls, key)
        if isinstance(value, dict):
            if "driver" in value:
                _check_members(value)
                continue
            if key == "cache":
                for member in value:
                    if member not in BlockdevCacheOptions.__struct_encode_fields__:
                        raise _unknown(cls, f"cache.{member}")
            tree[key] = _listed(value)
        elif isinstance(value, str):
            tree[key] = _plain(cls, key, value)


def _unknown(cls: type[Driver], option: str) -> Error:
    if cls.is_protocol or cls.names_images:
        return Error(f"Block protocol '{cls.name}' doesn't support the option '{option}'", errno.EINVAL)
    return Error(f"Block format '{cls.name}' does not support the option '{option}'", errno.EINVAL)


def _plain(cls: type[Driver], key: str, value: str) -> str:
    """`value` for the option `key` as key=value text. Images may have suffixes in any number, unlike users. Raises
    Error with the words that QSD has for this way of giving options."""
    kind = _kinds(cls.name)[key]
    if kind is int and not _WHOLE.fullmatch(value):
        try:
            return str(convert(value, Size, keyval=True, name=key))
        except Error as exc:
            raise Error(f"Parameter '{key}' expects a non-negative number below 2^64", errno.EINVAL) from exc
    if isinstance(kind, type) and issubclass(kind, Enum) and value not in [member.value for member in kind]:
        raise Error("Invalid discard option" if key == "discard" else f"invalid parameter value: {value}", errno.EINVAL)
    return value


@cache
def _kinds(driver: str) -> dict[str, Any]:
    """The types of a driver's options by wire name: those that are not optional, or what is left without None."""
    options = registry.driver_class(driver).Options
    hints = get_type_hints(options)
    kinds: dict[str, Any] = {}
    for name, wire in zip(options.__struct_fields__, options.__struct_encode_fields__, strict=True):
        args = [arg for arg in get_args(hints[name]) if arg is not NoneType]
        kinds[wire] = args[0] if len(args) == 1 else hints[name]
    return kinds


def _identity(tree: _Tree) -> Any:
    """Something equal for the same image opened in the same way; files are told by what they are, not by their name."""
    parts: list[Any] = []
    for key, value in sorted(tree.items()):
        if isinstance(value, dict):
            parts.append((key, _identity(value)))
        elif key == "filename" and isinstance(value, str):
            try:
                status = os.stat(value)
                parts.append((key, status.st_dev, status.st_ino))
            except (OSError, ValueError):
                parts.append((key, value))
        else:
            parts.append((key, str(value)))
    return tuple(parts)


# --- the format of an image that does not say it --------------------------------------------------------------------


async def probe(node: Node, filename: str) -> str:
    """The format of the image `filename`, by its first bytes, opened like the backing file of `node`. Raises Error,
    OSError."""
    tree = resolve(filename, None)
    driver = tree.get("driver")
    return driver if isinstance(driver, str) else await _probe(node, tree["file"], filename)


async def _probe(node: Node, file: Any, filename: str) -> str:
    """The format of what is in `file` (a tree or a node name), by its first bytes; ``raw`` if it is no other."""
    graph = node.graph
    if isinstance(file, str):
        return await _format_of(graph.find(file), filename)
    if not isinstance(file, dict):
        raise Error("Must specify either driver or file", errno.EINVAL)
    below = await graph.open_unattached(to_options(file), node, ROLE_COW)
    try:
        return await _format_of(below, filename)
    finally:
        await graph.unref(below)


async def _format_of(node: Node, filename: str) -> str:
    length = min(node.length, _PROBE_BYTES)
    start = bytes(await node.pread(0, length)) if length else b""
    start = start.ljust(_PROBE_BYTES, b"\0")
    best, best_score = "raw", 0
    for name in registry.driver_names():
        cls = registry.driver_class(name)
        if not cls.is_protocol and (score := cls.probe(start, filename)) > best_score:
            best, best_score = name, score
    return best
