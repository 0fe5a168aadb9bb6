"""Checking and repairing qcow2 images, on whole tables at a time.

`counting` counts how often each cluster is referred to, `comparing` compares that with the refcounts of the image and
the flags in the active tables, `repairing` puts right what can be, `rebuilding` writes new refcount structures. What is
found, and how it is counted, is what ``qemu-img check`` finds in the same image.

Nothing outside of this package imports it before it is needed: it brings numpy along.
"""
