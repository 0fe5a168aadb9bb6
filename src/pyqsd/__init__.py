"""pyqsd: a storage daemon for disk images, a drop-in for qemu-storage-daemon."""

__version__ = "0.1.0"
