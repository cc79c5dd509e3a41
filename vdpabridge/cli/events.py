"""What happens to a served device: into the log, and to who listens at the control socket."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..control.server import ControlServer
from .log import Log

__all__ = ["Events"]


class Events:
    """Tells ``log`` (borrowed), and `control` if there is one."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.control: ControlServer | None = None

    def tell(self, event: str, facts: Mapping[str, Any]) -> None:
        """``event`` has happened; ``facts`` say more of it."""
        level = "warning" if event.endswith("failed") else "info"
        self._log.say(level, f"{event}{_text(facts)}")
        if self.control is not None:
            self.control.tell({"event": event, **facts})


def _text(facts: Mapping[str, Any]) -> str:
    words = [
        f"{value:.3f} s" if name == "seconds" else f"{_LABELS.get(name, '')}{value}" for name, value in facts.items()
    ]
    return f": {', '.join(words)}" if words else ""


#: Fact -> what is said before its value, for those that need it.
_LABELS = {"process": "process ", "state_bytes": "bytes of device state: "}
