"""What happens to a served device: into the log, and to who listens at the control socket."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..control.server import ControlServer
from .log import Log
from .readable import bytes_text, duration_text

__all__ = ["Events"]


class Events:
    """Tells ``log`` (borrowed), and `control` if there is one."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self.control: ControlServer | None = None

    def tell(self, event: str, facts: Mapping[str, Any]) -> None:
        """``event`` has happened; ``facts`` say more of it."""
        level = "warning" if event.endswith("failed") else "info"
        details = [_FACTS[name](value) for name, value in facts.items() if name in _FACTS]
        self._log.say(level, ": ".join((event, ", ".join(details))) if details else event)
        if self.control is not None:
            self.control.tell({"event": event, **facts})


#: Fact -> its words in the log; what is not here is said by the event itself.
_FACTS: Mapping[str, Callable[[Any], str]] = {
    "process": "process {}".format,
    "why": str,
    "state_bytes": lambda count: f"{bytes_text(count)} of device state",
    "seconds": duration_text,
}
