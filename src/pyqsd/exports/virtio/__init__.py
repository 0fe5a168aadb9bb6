"""What exports share whose clients are virtio drivers: guest memory, split virtqueues, the block device."""
