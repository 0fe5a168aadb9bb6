"""The trace events that exist, with the names and formats of qemu-storage-daemon (`pyqsd.trace` says how to use them).

Pointers are the `id` of the object in question: good for telling things apart within one log, and for nothing else.
"""

from __future__ import annotations

from pyqsd.trace import Event

MONITOR_PROTOCOL_EVENT_EMIT = Event("monitor_protocol_event_emit", "event=%s data=%r")
MONITOR_QMP_RESPOND = Event("monitor_qmp_respond", "mon 0x%x resp: %s")
HANDLE_QMP_COMMAND = Event("handle_qmp_command", "mon 0x%x req: %s")
BDRV_OPEN_COMMON = Event("bdrv_open_common", 'bs 0x%x filename "%s" flags 0x%x format_name "%s"')
BLK_ROOT_ATTACH = Event("blk_root_attach", "child 0x%x blk 0x%x bs 0x%x")
BLK_ROOT_DETACH = Event("blk_root_detach", "child 0x%x blk 0x%x bs 0x%x")
NBD_NEGOTIATE_BEGIN = Event("nbd_negotiate_begin", "Beginning negotiation")
NBD_NEGOTIATE_SUCCESS = Event("nbd_negotiate_success", "Negotiation succeeded")
