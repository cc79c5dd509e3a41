"""Save, load and migrate, over any driver: all or nothing, and never both running or neither.

Each checks what can be checked before it touches anything, and puts back what it has done where a step fails. Where a
device does not answer while that is done, nobody can know what it does: then the other stays stopped, and the error
says so.
"""

from ..losses import Loss, StateWouldBeLost
from .load import load, load_state, verify
from .migrate import migrate
from .outcome import Advice, ProcedureFailed
from .save import save, save_file

__all__ = [
    "Advice",
    "Loss",
    "ProcedureFailed",
    "StateWouldBeLost",
    "load",
    "load_state",
    "migrate",
    "save",
    "save_file",
    "verify",
]
