"""What the whole-daemon tests share: processes, a QMP client, an NBD client, images and peer programs."""
