"""The options that every chardev has, and the union of all of them (QAPI ``ChardevBackend``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pyqsd.chardev import registry
from pyqsd.qapi.types import Struct


class ChardevCommon(Struct):
    """`logfile`: a file that gets a copy of what is written; `logappend`: add to it rather than begin it anew."""

    logfile: str | None = None
    logappend: bool | None = None


class ChardevBackend(Struct, tag_field="type", tag="pyqsd-base"):
    """A backend and its options: each branch has the backend's own struct as ``data``."""

    __tag_features__: ClassVar[Mapping[str, tuple[str, ...]]] = {"memory": ("deprecated",)}

    @property
    def data(self) -> Any:
        raise NotImplementedError

    @classmethod
    def branches(cls) -> Mapping[str, type[Struct]]:
        return {name: registry.backend_class(name) for name in registry.chardev_names()}

    @classmethod
    def branch(cls, tag: str) -> type[Struct] | None:
        return registry.backend_class(tag) if tag in registry.chardev_names() else None


class ChardevCommonWrapper(ChardevBackend, tag="pyqsd-common"):
    """A branch without options of its own."""

    data: ChardevCommon
