"""The export type ``vhost-user-blk``."""
