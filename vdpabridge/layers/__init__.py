"""A `Device` over a `Device`: for what a device cannot do by itself. Exporters and procedures do not notice."""

from .drained import Drained, suspendable
from .layer import Layer
from .logged import Logged, loggable

__all__ = ["Drained", "Layer", "Logged", "loggable", "suspendable"]
