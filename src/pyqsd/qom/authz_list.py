"""The object type ``authz-list``: a list of rules, of which the first that matches counts."""

from __future__ import annotations

from pyqsd.qom.authz import Authorizer, QAuthZListPolicy, QAuthZListRule, list_allows
from pyqsd.qom.object import Property
from pyqsd.qom.options import ObjectOptions


class AuthZListOptions(ObjectOptions, tag="authz-list"):
    """`policy`: what holds where no rule matches; deny unless given."""

    policy: QAuthZListPolicy | None = None
    rules: list[QAuthZListRule] | None = None


class AuthZList(Authorizer):
    """See above."""

    type_name = "authz-list"
    Options = AuthZListOptions
    properties = (
        Property("policy", "QAuthZListPolicy", QAuthZListPolicy, "deny"),
        Property("rules", "QAuthZListRule", list[QAuthZListRule], []),
    )

    def is_allowed(self, identity: str) -> bool:
        return list_allows(self.options.policy, self.options.rules, identity)


OBJECT = AuthZList
