"""Changing properties of images that exist: the options of ``x-blockdev-amend``.

Drivers that can do that have the options for it (`Driver.amend_options`) and do it (`Driver.amend`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

from pyqsd.block import registry
from pyqsd.qapi.types import Struct


class BlockdevAmendOptions(Struct, tag_field="driver", tag="pyqsd-base"):
    """What is to change; the options of each driver are a branch."""

    @classmethod
    def branches(cls) -> Mapping[str, type[Struct]]:
        found = {name: registry.driver_class(name).amend_options() for name in registry.driver_names()}
        return {name: options for name, options in found.items() if options is not None}

    @classmethod
    def tags(cls) -> Iterable[str]:
        return registry.driver_names()

    @classmethod
    def branch(cls, tag: str) -> type[Struct] | None:
        if not registry.is_driver(tag):
            return None
        return registry.driver_class(tag).amend_options() or _without_options(tag)


@cache
def _without_options(driver: str) -> type[Struct]:
    """The branch of a driver whose images cannot be changed: it has no members."""
    return type("NoAmendOptions", (BlockdevAmendOptions,), {}, tag=driver)
