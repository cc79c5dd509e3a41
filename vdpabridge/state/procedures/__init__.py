"""Save, load and migrate, with any driver: all or nothing, and never with both devices running, or neither.

Each checks what can be checked before it touches anything. If a step fails, it undoes what it has done. If a device
does not answer during that, it is not known what that device does: then the other stays stopped, and the error says so.
"""

from ..losses import Loss, StateWouldBeLost
from .load import load, load_state, require_loadable, verify
from .migrate import migrate
from .outcome import Advice, ProcedureFailed
from .save import save, save_file
from .steps import require_savable

__all__ = [
    "Advice",
    "Loss",
    "ProcedureFailed",
    "StateWouldBeLost",
    "load",
    "load_state",
    "migrate",
    "require_loadable",
    "require_savable",
    "save",
    "save_file",
    "verify",
]
