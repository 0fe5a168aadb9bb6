"""The object type ``authz-simple``: exactly one identity is allowed."""

from __future__ import annotations

from pyqsd.qom.authz import Authorizer
from pyqsd.qom.object import text
from pyqsd.qom.options import ObjectOptions


class AuthZSimpleOptions(ObjectOptions, tag="authz-simple", kw_only=True):
    """`identity`: the one that is allowed."""

    identity: str


class AuthZSimple(Authorizer):
    """See above."""

    type_name = "authz-simple"
    Options = AuthZSimpleOptions
    properties = (text("identity"),)

    def is_allowed(self, identity: str) -> bool:
        return bool(identity == self.options.identity)


OBJECT = AuthZSimple
