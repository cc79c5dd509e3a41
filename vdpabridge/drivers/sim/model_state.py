"""The transfer of the simulator's state: begun, checked, or dropped with nothing changed."""

from __future__ import annotations

import os

from ...device.values import StateDirection, StatePhase
from .model import Died, Faults, Loaded, Model, StateRefused
from .stream import STREAM_VERSION, decode, encode
from .transfer import Transfer

__all__ = ["ModelState"]


class ModelState:
    """At most one transfer at a time of ``model``'s state."""

    def __init__(self, model: Model, faults: Faults) -> None:
        self._model = model
        self._faults = faults
        self._transfer: Transfer | None = None

    def begin(self, direction: StateDirection, phase: StatePhase, fd: int) -> None:
        """Start a transfer through ``fd`` (takes ownership). Ends one that was not checked. Raises `StateRefused`."""
        if phase is not StatePhase.STOPPED or self._faults.refuse_transfer:
            os.close(fd)
            raise StateRefused("told to refuse it" if self._faults.refuse_transfer else f"no transfer in phase {phase}")
        self.drop()
        work = self._save if direction is StateDirection.SAVE else self._load
        self._transfer = Transfer(fd, work, stall_s=self._faults.stall_s)

    def check(self, timeout_s: float | None) -> None:
        """Wait for the end, and make loaded state the device's.

        Raises `StateRefused`, `Died`, and TimeoutError after ``timeout_s``; the transfer is over in any case.
        """
        if self._transfer is None:
            raise StateRefused("no transfer was begun")
        try:
            loaded = self._transfer.finish(timeout_s)
        except BaseException:
            self.drop()
            raise
        self._transfer.close()
        self._transfer = None
        if self._faults.fail_check:
            if loaded is not None:
                loaded.discard()
            raise StateRefused("told to fail")
        if loaded is not None:
            loaded.commit()

    def drop(self) -> None:
        """End a transfer that was not checked; drops what a load brought. Idempotent."""
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None

    def _save(self, transfer: Transfer) -> None:
        version = STREAM_VERSION if self._faults.version is None else self._faults.version
        stream = encode(self._model.device_id, self._model.save(), version=version)
        transfer.write(stream, self._faults.cut_state_bytes)
        self._maybe_die()

    def _load(self, transfer: Transfer) -> Loaded:
        loaded = self._model.load(decode(self._model.device_id, transfer.read))
        try:
            self._maybe_die()
        except Died:
            loaded.discard()
            raise
        return loaded

    def _maybe_die(self) -> None:
        if self._faults.die_in_transfer:
            raise Died("it was told to die in a transfer")
