"""qcow2: QEMU's copy-on-write image format (QEMU docs/interop/qcow2)."""

from pyqsd.drivers.formats.qcow2.driver import Qcow2

DRIVER = Qcow2
