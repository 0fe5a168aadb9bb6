"""Finding chardev backends by name.

A backend is a module of this room named like the backend, which has its class as ``CHARDEV`` and its branch of
`ChardevBackend` as ``BACKEND``; nothing is registered by hand. Modules are imported when their backend is first used.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyqsd.chardev.chardev import Chardev
    from pyqsd.chardev.options import ChardevBackend

#: The modules of this room that are no backends.
_OTHERS = {"addresses", "base64", "chardev", "commands", "options", "opts", "paths", "registry", "stream"}


@cache
def chardev_names() -> tuple[str, ...]:
    """The names of all backends, sorted."""
    package = importlib.import_module("pyqsd.chardev")
    return tuple(sorted(info.name for info in pkgutil.iter_modules(package.__path__) if info.name not in _OTHERS))


@cache
def _module(name: str) -> Any:
    if name not in chardev_names():
        raise KeyError(name)
    return importlib.import_module(f"pyqsd.chardev.{name}")


def chardev_class(name: str) -> type[Chardev]:
    """The class of the backend `name`; KeyError when there is none."""
    chardev: type[Chardev] = _module(name).CHARDEV
    return chardev


def backend_class(name: str) -> type[ChardevBackend]:
    """The branch of `ChardevBackend` of the backend `name`; KeyError when there is none."""
    backend: type[ChardevBackend] = _module(name).BACKEND
    return backend
