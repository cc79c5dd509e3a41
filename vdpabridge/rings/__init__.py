"""A virtqueue in guest memory, as a device sees it."""
