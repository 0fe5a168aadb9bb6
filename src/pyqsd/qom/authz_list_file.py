"""The object type ``authz-list-file``: the rules of an ``authz-list``, as JSON in a file that may change."""

from __future__ import annotations

import os
from typing import Any

from pyqsd.chardev.paths import encode
from pyqsd.qapi import json_stream
from pyqsd.qapi.convert import convert
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Struct
from pyqsd.qom.authz import Authorizer, QAuthZListPolicy, QAuthZListRule, list_allows
from pyqsd.qom.object import Property, text
from pyqsd.qom.options import ObjectOptions
from pyqsd.trace import report


class AuthZListFileOptions(ObjectOptions, tag="authz-listfile", kw_only=True):
    """`filename`: the file. `refresh`: load it again when it has changed (true unless given)."""

    filename: str
    refresh: bool | None = None


class _Content(Struct):
    policy: QAuthZListPolicy | None = None
    rules: list[QAuthZListRule] | None = None


class AuthZListFile(Authorizer):
    """See above. While the file cannot be read or has a mistake, nobody is allowed."""

    type_name = "authz-list-file"
    Options = AuthZListFileOptions
    properties = (text("filename"), Property("refresh", "bool", bool, True))

    _content: _Content | None = None
    _stamp: Any = None

    async def complete(self) -> None:
        self._stamp = self._state()
        self._content = self._load()

    def is_allowed(self, identity: str) -> bool:
        if self.options.refresh is not False:
            stamp = self._state()
            if stamp != self._stamp:
                self._stamp = stamp
                self._content = None
                try:
                    self._content = self._load()
                except Error as exc:
                    report.error(exc.desc)
        if self._content is None:
            return False
        return list_allows(self._content.policy, self._content.rules, identity)

    def _state(self) -> Any:
        """Something that is another one when the file has changed."""
        name: str = self.options.filename
        try:
            found = os.stat(encode(name))
        except OSError as exc:
            return name, exc.errno
        return name, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _load(self) -> _Content:
        """Raises Error."""
        name: str = self.options.filename
        try:
            with open(encode(name), "rb") as file:
                data = file.read()
            value = json_stream.parse_text(data.decode("utf-8"))
        except OSError as exc:
            number = exc.errno or 0
            raise Error(f"Unable to read '{name}': {os.strerror(number)}", number) from exc
        except UnicodeDecodeError as exc:
            raise Error(f"File '{name}' is no UTF-8 text: {exc.reason}") from exc
        if not isinstance(value, dict):
            raise Error(f"File '{name}' must contain a JSON object")
        return convert(value, _Content)


OBJECT = AuthZListFile
