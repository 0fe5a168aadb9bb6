"""Finding the types of user-creatable objects by name.

A type is a module of this room named like the type with ``-`` as ``_``, which has its class as ``OBJECT``; nothing else
is registered by hand. Modules are imported when their type is first used.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyqsd.qom.object import UserObject

#: The modules of this room that are no types.
_OTHERS = {"authz", "commands", "help", "object", "objects", "options", "registry", "secret_common", "types"}
#: The types whose tag in QAPI is not made from the module's name.
_TAGS = {"authz_list_file": "authz-listfile", "secret_keyring": "secret_keyring"}


@cache
def _modules() -> dict[str, str]:
    package = importlib.import_module("pyqsd.qom")
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__) if info.name not in _OTHERS)
    return {_TAGS.get(name, name.replace("_", "-")): f"pyqsd.qom.{name}" for name in names}


def object_tags() -> tuple[str, ...]:
    """The tags of all types (values of QAPI's ``ObjectType``), sorted."""
    return tuple(_modules())


def object_class(tag: str) -> type[UserObject]:
    """The class of the type `tag`; KeyError when there is none."""
    cls: type[UserObject] = importlib.import_module(_modules()[tag]).OBJECT
    return cls
