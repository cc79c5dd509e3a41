"""A `Device` over a `Device`: for what a device cannot do by itself. Exporters and procedures do not notice."""

from .drained import Drained, suspendable

__all__ = ["Drained", "suspendable"]
