"""The object type ``throttle-group``: limits that the nodes of the group share."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pyqsd.qapi.convert import convert
from pyqsd.qapi.errors import Error
from pyqsd.qapi.types import Features, Struct
from pyqsd.qom.object import Property, UserObject
from pyqsd.qom.options import ObjectOptions

#: No average and no burst may be higher, in bytes or requests per second.
VALUE_MAX: Final = 1_000_000_000_000_000
_LENGTH_MAX: Final = (1 << 32) - 1

_BUCKETS: Final = ("bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write")


class ThrottleLimits(Struct):
    """Averages and bursts (``-max``) of bytes and requests per second, 0 for no limit; ``-max-length``: for how many
    seconds a burst may last. `iops_size`: a request counts once for each so many bytes (0: once)."""

    iops_total: int | None = None
    iops_total_max: int | None = None
    iops_total_max_length: int | None = None
    iops_read: int | None = None
    iops_read_max: int | None = None
    iops_read_max_length: int | None = None
    iops_write: int | None = None
    iops_write_max: int | None = None
    iops_write_max_length: int | None = None
    bps_total: int | None = None
    bps_total_max: int | None = None
    bps_total_max_length: int | None = None
    bps_read: int | None = None
    bps_read_max: int | None = None
    bps_read_max_length: int | None = None
    bps_write: int | None = None
    bps_write_max: int | None = None
    bps_write_max_length: int | None = None
    iops_size: int | None = None


_Unstable = Annotated[int | None, Features("unstable")]


class ThrottleGroupOptions(ObjectOptions, tag="throttle-group"):
    """`limits`: what holds at first. The members beginning with ``x-`` say the same one by one."""

    limits: ThrottleLimits | None = None
    x_iops_total: _Unstable = None
    x_iops_total_max: _Unstable = None
    x_iops_total_max_length: _Unstable = None
    x_iops_read: _Unstable = None
    x_iops_read_max: _Unstable = None
    x_iops_read_max_length: _Unstable = None
    x_iops_write: _Unstable = None
    x_iops_write_max: _Unstable = None
    x_iops_write_max_length: _Unstable = None
    x_bps_total: _Unstable = None
    x_bps_total_max: _Unstable = None
    x_bps_total_max_length: _Unstable = None
    x_bps_read: _Unstable = None
    x_bps_read_max: _Unstable = None
    x_bps_read_max_length: _Unstable = None
    x_bps_write: _Unstable = None
    x_bps_write_max: _Unstable = None
    x_bps_write_max_length: _Unstable = None
    x_iops_size: _Unstable = None


#: The wire names of all limits.
NAMES: Final = tuple(ThrottleLimits.__struct_encode_fields__)


class _Limits(Property):
    """All limits at once; setting changes those that are given."""

    __slots__ = ()

    def get(self, obj: UserObject) -> Any:
        assert isinstance(obj, ThrottleGroup)
        return dict(obj.limits)

    def set(self, obj: UserObject, value: Any) -> None:
        assert isinstance(obj, ThrottleGroup)
        obj.change(convert(value, ThrottleLimits, name=self.name))


class _OneLimit(Property):
    """One limit, which cannot be changed in this way."""

    __slots__ = ()

    def get(self, obj: UserObject) -> Any:
        assert isinstance(obj, ThrottleGroup)
        return obj.limits[self.name.removeprefix("x-")]

    def set(self, obj: UserObject, value: Any) -> None:
        raise Error("Property cannot be set after initialization")


class ThrottleGroup(UserObject):
    """See above. `limits` has every limit by its wire name."""

    type_name = "throttle-group"
    Options = ThrottleGroupOptions
    properties = (
        _Limits("limits", "ThrottleLimits", ThrottleLimits, None),
        *(_OneLimit(f"x-{name}", "int", int, None) for name in NAMES),
    )

    def __init__(self, options: ThrottleGroupOptions, objects: Any) -> None:
        super().__init__(options, objects)
        self.limits: dict[str, int] = {name: int(name.endswith("-length")) for name in NAMES}

    async def complete(self) -> None:
        changed = dict(self.limits)
        for name in NAMES:
            value = getattr(self.options, f"x_{name.replace('-', '_')}")
            if value is None:
                continue
            if value < 0:
                raise Error("Property values cannot be negative")
            if name.endswith("-length") and value > _LENGTH_MAX:
                # (sic)
                raise Error(f"x-{name} value must be in therange [0, {_LENGTH_MAX}]")
            changed[name] = value
        self.limits = changed
        self.change(self.options.limits or ThrottleLimits())

    def change(self, given: ThrottleLimits) -> None:
        """Set the limits that are given. Raises Error, and then nothing has changed."""
        changed = dict(self.limits)
        for name in NAMES:
            value = getattr(given, name.replace("-", "_"))
            if value is None:
                continue
            if name.endswith("-length") and not 0 <= value <= _LENGTH_MAX:
                raise Error(f"{name} value must be in the range [0, {_LENGTH_MAX}]")
            changed[name] = value
        _check(changed)
        self.limits = changed


def _check(limits: dict[str, int]) -> None:
    """Raise Error unless the limits go together."""
    for kind in ("bps", "iops"):
        for what in ("", "-max"):
            if limits[f"{kind}-total{what}"] and (limits[f"{kind}-read{what}"] or limits[f"{kind}-write{what}"]):
                raise Error("bps/iops/max total values and read/write values cannot be used at the same time")
    if limits["iops-size"] and not any(limits[f"iops-{what}"] for what in ("total", "read", "write")):
        raise Error("iops size requires an iops value to be set")
    for name in _BUCKETS:
        average, burst, length = limits[name], limits[f"{name}-max"], limits[f"{name}-max-length"]
        if not (0 <= average <= VALUE_MAX and 0 <= burst <= VALUE_MAX):
            raise Error(f"bps/iops/max values must be within [0, {VALUE_MAX}]")
        if not length:
            raise Error("the burst length cannot be 0")
        if length > 1 and not burst:
            raise Error("burst length set without burst rate")
        if burst and length > VALUE_MAX // burst:
            raise Error("burst length too high for this burst rate")
        if burst and not average:
            raise Error("bps_max/iops_max require corresponding bps/iops values")
        if burst and burst < average:
            raise Error("bps_max/iops_max cannot be lower than bps/iops")


OBJECT = ThrottleGroup
