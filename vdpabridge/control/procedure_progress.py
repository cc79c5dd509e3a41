"""How far a procedure is, for the method `status`."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from ..state.transfer.channel import Limits

__all__ = ["ProcedureProgress"]


class ProcedureProgress:
    """How far a procedure is, for `status` to report while it runs."""

    def __init__(self, method: str) -> None:
        self._method = method
        self._began_s = self._moved_s = time.monotonic()
        self._state_bytes = 0

    def wrap(self, limits: Limits) -> Limits:
        """``limits``, whose progress is noted here as well."""

        def note(state_bytes: int) -> None:
            self._state_bytes, self._moved_s = state_bytes, time.monotonic()
            if limits.progress is not None:
                limits.progress(state_bytes)

        return replace(limits, progress=note)

    def shown(self) -> dict[str, Any]:
        """The form that clients get."""
        now_s = time.monotonic()
        return {
            "method": self._method,
            "seconds": now_s - self._began_s,
            "state_bytes": self._state_bytes,
            "seconds_since_progress": now_s - self._moved_s,
        }
