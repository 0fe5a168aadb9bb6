"""Unions with a branch for each driver that has options for an operation on images: making them, changing them.

Where a driver is named that has none, its branch has no members, and the operation says that it cannot be done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING

from pyqsd.block import registry
from pyqsd.qapi.types import Struct

if TYPE_CHECKING:
    from pyqsd.block.driver import Driver


class DriverUnion(Struct):
    """Base of such a union, whose tag is ``driver``."""

    @classmethod
    def options_of(cls, driver: type[Driver]) -> type[Struct] | None:
        """The branch of `driver`, or None if it has none."""
        raise NotImplementedError

    @classmethod
    def branches(cls) -> Mapping[str, type[Struct]]:
        found = {name: cls.options_of(registry.driver_class(name)) for name in registry.driver_names()}
        return {name: options for name, options in found.items() if options is not None}

    @classmethod
    def tags(cls) -> Iterable[str]:
        return registry.driver_names()

    @classmethod
    def branch(cls, tag: str) -> type[Struct] | None:
        if not registry.is_driver(tag):
            return None
        return cls.options_of(registry.driver_class(tag)) or _without_options(cls, tag)


@cache
def _without_options(union: type[DriverUnion], driver: str) -> type[Struct]:
    return type("NoOptions", (union,), {}, tag=driver)
