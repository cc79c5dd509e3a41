"""One device-state interface for virtio devices behind vhost-vdpa and vhost-user.

`vdpabridge.device.Device` is the interface; `vdpabridge.drivers` has what implements it. Importing this package
imports neither: start-up time matters to the command line.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
