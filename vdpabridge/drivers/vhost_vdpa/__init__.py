"""The driver for ``/dev/vhost-vdpa-N``: a virtio device under the kernel's vhost-vdpa."""

from .driver import VhostVdpa
from .iotlb import MappingError
from .node import NodeError

__all__ = ["MappingError", "NodeError", "VhostVdpa"]
