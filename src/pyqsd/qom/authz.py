"""What the ``authz-*`` types share: deciding whether somebody who has been identified may use something."""

from __future__ import annotations

import ctypes
from enum import StrEnum
from functools import cache
from typing import Any

from pyqsd.qapi.types import Struct
from pyqsd.qom.object import UserObject


class QAuthZListPolicy(StrEnum):
    """What a rule says."""

    DENY = "deny"
    ALLOW = "allow"


class QAuthZListFormat(StrEnum):
    """How a rule matches: the whole identity, or a pattern as of the shell (fnmatch(3))."""

    EXACT = "exact"
    GLOB = "glob"


class QAuthZListRule(Struct):
    """`policy` holds for the identities that `match` matches, exactly unless `format` says otherwise."""

    match: str
    policy: QAuthZListPolicy
    format: QAuthZListFormat | None = None


class Authorizer(UserObject):
    """Base of the ``authz-*`` types."""

    parents = (("authz", False),)

    def is_allowed(self, identity: str) -> bool:
        """Whether `identity` (an x509 distinguished name, a user name …) may go on."""
        raise NotImplementedError


@cache
def _fnmatch() -> Any:
    return ctypes.CDLL(None).fnmatch


def list_allows(policy: QAuthZListPolicy | None, rules: list[QAuthZListRule] | None, identity: str) -> bool:
    """What the first matching rule says, or `policy` (deny, unless given) when none matches."""
    for rule in rules or ():
        if rule.format == QAuthZListFormat.GLOB:
            pattern, text = (part.encode("utf-8", "surrogateescape") for part in (rule.match, identity))
            matches = b"\0" not in pattern + text and _fnmatch()(pattern, text, 0) == 0
        else:
            matches = rule.match == identity
        if matches:
            return rule.policy == QAuthZListPolicy.ALLOW
    return policy == QAuthZListPolicy.ALLOW
