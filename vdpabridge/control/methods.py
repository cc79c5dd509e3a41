"""The methods of the control socket of ``vdpabridge serve``."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from ..abi.features import feature_names
from ..device import Device, RunState
from ..errors import VdpaBridgeError
from ..export.vhost_user.server import Server
from ..state.procedures import ProcedureFailed, load_state, require_loadable, require_savable, save
from ..state.report import Report
from ..state.transfer.channel import Limits
from .parameters import accepted, choice, flag, limits, move_of, required_move, shown, sink, source
from .possession import Possession
from .procedure_progress import ProcedureProgress
from .requests import Caller, Method, Request
from .server import ControlServer

__all__ = ["Controlled", "control_server", "methods_of"]

#: Holds the device after `suspend`.
_EVERYBODY = "everybody"
#: Holds nothing. To release it is to try again what a release could not do.
_NOBODY = "nobody"
#: The values of `stay` of the method `save`; the last: suspended as long as the client is connected.
_STAYS = (False, True, "connection")


class Controlled:
    """The device that ``server`` serves, and what was done with it. ``tell`` is called for each event."""

    def __init__(
        self,
        device: Device,
        server: Server,
        possession: Possession,
        timeout_s: float | None,
        tell: Callable[[str, Mapping[str, Any]], None],
    ) -> None:
        self._device = device
        self._server = server
        self._possession = possession
        self._timeout_s = timeout_s
        self._tell = tell
        self._procedure: ProcedureProgress | None = None
        self._last: Report | None = None
        self._retrying: Caller | None = None
        """For which client that has left the server tries again and again to resume the device."""
        self._began_s = time.monotonic()
        self._counts = {name: {"done": 0, "failed": 0, "state_bytes": 0, "seconds": 0.0} for name in ("save", "load")}

    def status(self, _request: Request) -> dict[str, Any]:
        """What the device is, and what it does."""
        stopped = self._device.state in (RunState.CONFIGURED, RunState.SUSPENDED)
        return self._status(self._device.get_base if stopped else None)

    def status_meanwhile(self, _request: Request) -> dict[str, Any]:
        """The same without asking the device: its thread is busy, with a procedure or with the front-end."""
        return self._status(None)

    def _status(self, base_of: Callable[[int], Any] | None) -> dict[str, Any]:
        device, server, procedure = self._device, self._server, self._procedure
        queues = {
            str(index): {
                "size": record.setup.size,
                "enabled": record.enabled,
                **({} if base_of is None else {"position": base_of(index).encode()}),
            }
            for index, record in sorted(dict(device.queues).items())
            if record.setup is not None
        }
        return {
            "device": device.name,
            "device_id": device.identity.device_id,
            "state": device.state.value,
            "held": server.held,
            "moved": self._possession.moved,
            "arriving": self._possession.arriving,
            "arrived": self._possession.arrived,
            "lost": self._possession.lost,
            "moves": [{"move": move, "fate": fate.value} for move, fate in self._possession.fates.items()],
            "front_end": server.session is not None,
            "capabilities": sorted(each.value for each in device.capabilities),
            "features": feature_names(device.accepted_features, device.identity.device_id),
            "queues": queues,
            "procedure": None if procedure is None else procedure.shown(),
            "last_procedure": None if self._last is None else shown(self._last),
        }

    def statistics(self, _request: Request) -> dict[str, Any]:
        """What was done since the process began."""
        return {
            "device": self._device.name,
            "uptime_s": time.monotonic() - self._began_s,
            "front_ends": self._server.front_ends,
            "messages": self._server.messages,
            "procedures": self._counts,
        }

    def suspend(self, request: Request) -> dict[str, Any]:
        """Suspend until `resume`, whatever front-ends do. This replaces a hold by the caller's connection."""
        with self._owing(request):
            self._server.hold(_EVERYBODY)
            self._server.release(request.caller)
        return self._told("suspended")

    def moved(self, request: Request) -> dict[str, Any]:
        """Another device has the saved state now: stay suspended until `load` replaces it or `resume` is forced."""
        move = required_move(request)
        self._possession.require("moved")
        self._possession.require_new(move, "moved")
        self._refuse_while_moving(request)
        with self._owing(request):
            self._possession.give_away(move)
            self._server.release(request.caller)
            self._server.release(_EVERYBODY)
        return self._told("moved")

    def arrived(self, request: Request) -> dict[str, Any]:
        """The state that `load` has brought is this device's: the one that it came from was told `moved`."""
        move = required_move(request)
        if not self._possession.is_done(move):
            self._possession.require_brought(request.caller, move)
            with self._owing(request):
                self._possession.take()
        return self._told("arrived") | self._if_held()

    def resume(self, request: Request) -> dict[str, Any]:
        """Let the device do again what its front-end wants, unless another client holds it by its connection.

        With ``move``, also if its state came by that move, and nobody has said that it arrived. With ``force``,
        whatever state it has. In both cases two devices run, if the other device runs too.
        """
        move, force = move_of(request), flag(request, "force")
        if move is not None and not force:
            self._possession.require_here(move)
        elif not force:
            self._possession.require("resume")
        with self._owing(request):
            for holder in (request.caller, _EVERYBODY):
                self._server.release(holder)
            self._possession.take()
        return self._told("resumed") | self._if_held()

    def release(self, request: Request) -> dict[str, Any]:
        """Give back what the caller holds by its connection, and nothing else: a `suspend` of anybody lasts."""
        with self._owing(request):
            self._server.release(request.caller)
        return self._told("released")

    def save(self, request: Request) -> dict[str, Any]:
        """Write an image to the descriptor, or to the file ``path``.

        ``stay``: if true, the device stays suspended afterwards; if ``connection``, as long as the client is
        connected, or until `suspend` makes it last.
        """
        stay = choice(request, "stay", _STAYS)
        self._possession.require("save")
        if stay == "connection":
            self._refuse_while_moving(request)
        holder = {False: object(), True: _EVERYBODY, "connection": request.caller}[stay]
        was_held = self._server.holds(holder)
        report = Report()
        if stay == "connection":
            request.caller.holders.add(request.caller)
        try:
            with self._procedure_of(request) as (bounds, note), sink(request) as fd:
                # before it is suspended: without RESUME, to resume it takes a reset
                require_savable(self._device, "save", accepted(request), resumes=False)
                with report.step("suspend"), report.watching(self._device):
                    self._server.hold(holder)
                saved = save(self._device, fd, bounds, stay_suspended=True, accept=accepted(request))
                saved.steps[:0] = report.steps
                note(saved)
        except BaseException:
            with self._owing(request):
                if not was_held and self._server.holds(holder):
                    self._server.release(holder)
                raise
        if not stay:
            resumes = self._server.holders == {holder}
            with self._owing(request, "the state was saved; "), saved.step("resume") if resumes else nullcontext():
                self._server.release(holder)
        return {**shown(saved), "state": self._device.state.value}

    def load(self, request: Request) -> dict[str, Any]:
        """Give the device the state in the image that the descriptor or the file ``path`` has.

        The front-end sets up the queues. With ``move``, it starts the device only after `arrived`.
        """
        move = move_of(request)
        self._possession.require_no_other(request.caller, "load")
        expected = new = False
        try:
            with self._procedure_of(request) as (bounds, note), source(request, bounds) as fd:
                # before it is held: a device at work would be suspended for nothing
                require_loadable(self._device)
                if move is not None:
                    self._possession.require_new(move, "load")
                    self._possession.require_room("load")
                    with self._owing(request):
                        new = self._possession.expect(move)
                    expected = True
                loaded = load_state(self._device, fd, bounds, accept=accepted(request))
                note(loaded)
        except BaseException:
            if expected:
                with self._owing(request):
                    self._possession.not_come(new=new)
            raise
        if move is not None:
            self._possession.came(request.caller)
        else:
            with self._owing(request, "the state was loaded; "):
                self._possession.replace()
        return {**shown(loaded), "device": self._device.name}

    def left(self, caller: Caller) -> None:
        """Release what held the device because of ``caller``, which has left."""
        self._possession.left(caller)
        try:
            while caller.holders:
                self._server.release(caller.holders.pop())
            if self._retrying is caller:
                self._server.release(_NOBODY)
        except Exception:
            # the last one tries for all: each attempt keeps the device's thread from other work
            self._retrying = caller
            raise
        if self._retrying is caller:
            self._retrying = None

    def _refuse_while_moving(self, request: Request) -> None:
        """Raise if another client holds the device by its connection: it may be moving the state."""
        if any(isinstance(holder, Caller) and holder is not request.caller for holder in self._server.holders):
            why, hint = "another client is moving its state", "try again when that has ended"
            raise VdpaBridgeError(request.method, device=self._device.name, why=why, hint=hint)

    def _if_held(self) -> dict[str, Any]:
        return {"held": True} if self._server.held else {}

    def _told(self, event: str) -> dict[str, Any]:
        result = {"state": self._device.state.value}
        self._tell(event, result)
        return result

    @contextmanager
    def _owing(self, request: Request, done: str = "") -> Iterator[None]:
        """The body holds or releases the device. If it raises, its error says what the device does now. If nobody holds
        a device then that is suspended all the same, the server tries again when the caller has left.

        ``done``: what was done before, in words.
        """
        try:
            yield
        except Exception as error:
            if self._server.held and not self._server.holders:
                request.caller.holders.add(_NOBODY)
            if isinstance(error, VdpaBridgeError):
                self._tell_state(error, done)
                raise
            why = str(error) or type(error).__name__
            if isinstance(error, OSError) and error.errno:
                why = os.strerror(error.errno) + (f": {error.filename}" if error.filename else "")
            told = VdpaBridgeError(request.method, device=self._device.name, why=why)
            self._tell_state(told, done)
            raise told from error

    def _tell_state(self, error: VdpaBridgeError, done: str) -> None:
        """Make ``error`` say what the device does now: the procedure does not know whether it is resumed afterwards."""
        state = self._device.state
        known = state is not RunState.RUNNING or not self._server.held
        owed = self._server.held and not self._server.holders
        what = f"the device is {state.value} now" if known else "it is not known whether the device runs"
        error.hint = done + what + (": ask for 'resume' until that succeeds" if owed else "")
        if isinstance(error, ProcedureFailed):
            nothing = "nothing" if known else "not known"
            error.running = self._device.name if state is RunState.RUNNING and known else nothing

    @contextmanager
    def _procedure_of(self, request: Request) -> Iterator[tuple[Limits, Callable[[Report], None]]]:
        """The limits of the procedure in the body, and a function that takes its report. Counts how it went, tells the
        clients that listen, and lets `status` show its progress."""
        name = request.method
        counts = self._counts[name]
        progress = ProcedureProgress(name)
        reports: list[Report] = []
        self._tell(f"{name} begins", {})
        self._procedure = progress
        try:
            yield progress.wrap(limits(request, self._timeout_s)), reports.append
        except BaseException as error:
            counts["failed"] += 1
            self._tell(f"{name} failed", {"why": str(error) or type(error).__name__})
            raise
        else:
            counts["done"] += 1
        finally:
            self._procedure = None
            took_s: float = progress.shown()["seconds"]
            counts["seconds"] += took_s
        self._last = reports[-1]
        counts["state_bytes"] += self._last.state_bytes
        self._tell(f"{name} done", {"state_bytes": self._last.state_bytes, "seconds": took_s})


def control_server(
    listener: socket.socket,
    device: Device,
    server: Server,
    timeout_s: float | None,
    *,
    report: Callable[[str], None],
    tell: Callable[[str, Mapping[str, Any]], None] | None = None,
    possession: Possession | None = None,
) -> ControlServer:
    """A control server for ``device``, which ``server`` serves (both borrowed). Takes ownership of ``listener``.

    ``timeout_s`` bounds each transfer, during which the front-end waits. ``report`` gets messages that no client gets.
    ``tell`` is called for each event; by default it tells the clients that listen.
    """
    control = ControlServer(listener, report=report)
    controlled = Controlled(
        device,
        server,
        possession or Possession(server, device),
        timeout_s,
        tell or (lambda event, facts: control.tell({"event": event, **facts})),
    )
    control.methods = methods_of(controlled, control.cancel)
    control.when_gone = controlled.left
    return control


def methods_of(controlled: Controlled, cancel: Callable[[], bool]) -> dict[str, Method]:
    """The methods, by name. ``cancel`` ends the procedure that is under way."""

    def listen(request: Request) -> dict[str, Any]:
        request.caller.listens = True
        return {"listening": True}

    return {
        "status": Method(controlled.status, meanwhile=controlled.status_meanwhile),
        "statistics": Method(controlled.statistics, at_once=True),
        "suspend": Method(controlled.suspend),
        "moved": Method(controlled.moved, only_for_present=True),
        "arrived": Method(controlled.arrived, only_for_present=True),
        "resume": Method(controlled.resume),
        "release": Method(controlled.release),
        "save": Method(controlled.save, cancellable=True),
        "load": Method(controlled.load, cancellable=True),
        "cancel": Method(lambda _request: {"cancelled": cancel()}, at_once=True),
        "listen": Method(listen, at_once=True),
    }
