"""What ``--object help`` and ``--object TYPE,help`` print."""

from __future__ import annotations

from pyqsd.qom.types import type_table


def help_text(type_name: str | None) -> str:
    """The help for the type `type_name`; for none, or one that does not exist, the list of types."""
    info = type_table().get(type_name or "")
    if info is None or info.parent in (None, "interface"):
        names = [f"  {info.name}" for info in type_table().values() if info.user_creatable and not info.abstract]
        return "\n".join(["List of user creatable objects:", *names]) + "\n"
    if not info.settable or not info.properties:
        return f"There are no options for {info.name}.\n"
    lines = sorted(f"  {name}=<{typ}>" for name, typ in info.properties)
    return "\n".join([f"{info.name} options:", *lines]) + "\n"
