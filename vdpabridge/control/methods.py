"""What the control socket of ``vdpabridge serve`` can be asked for."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..abi.features import feature_names
from ..device import Device, RunState
from ..errors import VdpaBridgeError
from ..export.vhost_user.server import Server
from ..linux.deadline import Deadline
from ..linux.files import replacing
from ..state.losses import Loss
from ..state.procedures import ProcedureFailed, load_state, save
from ..state.report import Report
from ..state.transfer.channel import Limits
from .server import Caller, Method

__all__ = ["methods_of"]

#: Between two notifications of progress.
_INTERVAL_S = 0.2
#: Who has asked for `suspend`.
_EVERYBODY = "everybody"
#: Who holds a device whose state has gone to another.
_MOVED = "moved"
#: What `stay` of the method `save` may be; the last: suspended for as long as whoever asked is connected.
_STAYS = (False, True, "connection")
Params = Mapping[str, Any]


class _Controlled:
    def __init__(self, device: Device, server: Server, timeout_s: float | None) -> None:
        self._device = device
        self._server = server
        self._timeout_s = timeout_s
        self._last: Report | None = None
        self._began_s = time.monotonic()
        self._counts = {name: {"done": 0, "failed": 0, "state_bytes": 0, "seconds": 0.0} for name in ("save", "load")}

    def status(self, _params: Params, _caller: Caller) -> dict[str, Any]:
        """What the device is, and what it does."""
        device = self._device
        stopped = device.state in (RunState.CONFIGURED, RunState.SUSPENDED)
        queues = {
            str(index): {
                "size": record.setup.size,
                "enabled": record.enabled,
                **({"position": device.get_base(index).encode()} if stopped else {}),
            }
            for index, record in sorted(device.queues.items())
            if record.setup is not None
        }
        return {
            "device": device.name,
            "device_id": device.identity.device_id,
            "state": device.state.value,
            "held": self._server.held,
            "moved": self._server.holds(_MOVED),
            "front_end": self._server.session is not None,
            "capabilities": sorted(each.value for each in device.capabilities),
            "features": feature_names(device.accepted_features, device.identity.device_id),
            "queues": queues,
            "last_procedure": None if self._last is None else _shown(self._last),
        }

    def statistics(self, _params: Params, _caller: Caller) -> dict[str, Any]:
        """What was done since the process began."""
        return {
            "device": self._device.name,
            "uptime_s": time.monotonic() - self._began_s,
            "front_ends": self._server.front_ends,
            "messages": self._server.messages,
            "procedures": self._counts,
        }

    def suspend(self, _params: Params, caller: Caller) -> dict[str, Any]:
        """Suspend, until `resume`, whatever front-ends do; who has held the device by a connection needs it no more."""
        self._server.hold(_EVERYBODY)
        self._server.release(caller)
        return {"state": self._device.state.value}

    def moved(self, _params: Params, caller: Caller) -> dict[str, Any]:
        """What was saved is another device's now: suspended, unless `resume` is forced or `load` replaces it."""
        self._server.hold(_MOVED)
        self._server.release(caller)
        self._server.release(_EVERYBODY)
        return {"state": self._device.state.value}

    def resume(self, params: Params, caller: Caller) -> dict[str, Any]:
        """Let the device do again what its front-end wants, unless somebody else holds it by a connection.

        With ``force`` also one whose state was moved to another device: two would run, if that one does.
        """
        force = params.get("force", False)
        if not isinstance(force, bool):
            raise VdpaBridgeError("resume", why=f"force {force!r} is neither true nor false")
        if self._server.holds(_MOVED) and not force:
            why = "its state was moved to another device, and with both at work the guest's data is destroyed"
            hint = "force it, if the other device does not run and never will"
            raise VdpaBridgeError("resume", device=self._device.name, why=why, hint=hint)
        for holder in (caller, _EVERYBODY, _MOVED):
            self._server.release(holder)
        return {"state": self._device.state.value}

    def save(self, params: Params, caller: Caller) -> dict[str, Any]:
        """Write an image to the descriptor, or to the file ``path``.

        ``stay``: true, the device stays suspended afterwards; ``connection``, for as long as whoever asked is
        connected, or until `suspend` makes it last.
        """
        stay = params.get("stay", False)
        if stay not in _STAYS:
            raise VdpaBridgeError("save", why=f"stay {stay!r} is none of {', '.join(map(str, _STAYS))}")
        if self._server.holds(_MOVED):
            why = "its state was moved to another device: what is here is old"
            hint = "'resume --force' first, if the other device does not run and never will"
            raise VdpaBridgeError("save", device=self._device.name, why=why, hint=hint)
        holder = {False: object(), True: _EVERYBODY, "connection": caller}[stay]
        was_held = self._server.holds(holder)
        report = Report()
        if stay == "connection":
            caller.when_gone = lambda: self._server.release(caller)
        try:
            with self._counted("save") as counted, _sink(params, caller) as fd:
                limits = self._limits(params, caller)
                with report.step("suspend"), report.watching(self._device):
                    self._server.hold(holder)
                saved = save(self._device, fd, limits, stay_suspended=True, accept=_accepted(params))
                saved.steps[:0] = report.steps
                counted(saved)
        except BaseException as error:
            if not was_held:
                self._give_back(holder)
            self._tell_state(error)
            raise
        if not stay:
            self._server.release(holder)
        return {**_shown(saved), "state": self._device.state.value}

    def load(self, params: Params, caller: Caller) -> dict[str, Any]:
        """Give the device the state in the image that the descriptor or the file ``path`` has.

        Its queues are its front-end's to set up.
        """
        with self._counted("load") as counted, _source(params, caller) as fd:
            loaded = load_state(self._device, fd, self._limits(params, caller), accept=_accepted(params))
            counted(loaded)
        # what it has now was not moved anywhere
        self._server.release(_MOVED)
        return {**_shown(loaded), "device": self._device.name}

    def _give_back(self, holder: object) -> None:
        """``holder`` held the device only for what has failed."""
        try:
            if self._server.holds(holder):
                self._server.release(holder)
        except VdpaBridgeError as error:
            self._tell_state(error)
            raise

    def _tell_state(self, error: BaseException) -> None:
        """Have ``error`` say what the device does now: a procedure knows of nobody who lets it go on afterwards."""
        if not isinstance(error, VdpaBridgeError):
            return
        state = self._device.state
        known = state is not RunState.RUNNING or not self._server.held
        what = f"the device is {state.value} now"
        error.hint = what if known else "it is not known whether the device runs: ask for 'resume' until that succeeds"
        if isinstance(error, ProcedureFailed):
            nothing = "nothing" if known else "not known"
            error.running = self._device.name if state is RunState.RUNNING and known else nothing

    def _limits(self, params: Params, caller: Caller) -> Limits:
        most = params.get("limit_bytes")
        if most is not None and (isinstance(most, bool) or not isinstance(most, int)):
            raise VdpaBridgeError("save", why=f"limit_bytes {most!r} is no number")
        progress = _progress(caller) if params.get("progress") else None
        return Limits(Deadline(self._timeout_s), size_bytes=most, progress=progress)

    @contextmanager
    def _counted(self, name: str) -> Iterator[Callable[[Report], None]]:
        """Note how the body went; it tells the function its report."""
        counts = self._counts[name]
        begin_s = time.monotonic()

        def note(report: Report) -> None:
            self._last = report
            counts["state_bytes"] += report.state_bytes

        try:
            yield note
        except BaseException:
            counts["failed"] += 1
            raise
        else:
            counts["done"] += 1
        finally:
            counts["seconds"] += time.monotonic() - begin_s


def methods_of(device: Device, server: Server, timeout_s: float | None) -> dict[str, Method]:
    """The methods, by name. ``timeout_s`` bounds each transfer, during which the front-end waits."""
    controlled = _Controlled(device, server, timeout_s)
    return {
        "status": controlled.status,
        "statistics": controlled.statistics,
        "suspend": controlled.suspend,
        "moved": controlled.moved,
        "resume": controlled.resume,
        "save": controlled.save,
        "load": controlled.load,
    }


@contextmanager
def _sink(params: Params, caller: Caller) -> Iterator[int]:
    """Where an image is to go."""
    if (path := _path(params)) is not None:
        with replacing(path) as fd:
            yield fd
        return
    with _given(caller, "save") as fd:
        yield fd


@contextmanager
def _source(params: Params, caller: Caller) -> Iterator[int]:
    """Where an image is to come from."""
    if (path := _path(params)) is None:
        with _given(caller, "load") as fd:
            yield fd
        return
    try:
        # what keeps a reader waiting, as a FIFO does, is waited for where there is a deadline
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise VdpaBridgeError("load", device=path, why=os.strerror(error.errno or 0)) from error
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _given(caller: Caller, method: str) -> Iterator[int]:
    fd = caller.take_fd()
    if fd is None:
        raise VdpaBridgeError(method, why="no descriptor came with the request, and no path", hint="send one of them")
    try:
        yield fd
    finally:
        os.close(fd)


def _accepted(params: Params) -> frozenset[Loss]:
    """What of its state the caller can do without."""
    words = params.get("accept", [])
    known = [loss.value for loss in Loss]
    if not isinstance(words, list) or any(word not in known for word in words):
        raise VdpaBridgeError("control socket", why=f"accept {words!r} is not a list of {', '.join(known)}")
    return frozenset(map(Loss, words))


def _path(params: Params) -> str | None:
    path = params.get("path")
    if path is None:
        return None
    if isinstance(path, str) and os.path.isabs(path) and _is_encodable(path):
        return path
    # the directory of this process is not that of whoever asks
    raise VdpaBridgeError("control socket", why=f"path {path!r} is no absolute path")


def _is_encodable(path: str) -> bool:
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _progress(caller: Caller) -> Callable[[int], None]:
    """Tells ``caller`` of bytes, now and then."""
    told_s = time.monotonic()

    def tell(state_bytes: int) -> None:
        nonlocal told_s
        if (now_s := time.monotonic()) - told_s >= _INTERVAL_S:
            told_s = now_s
            caller.notify("progress", {"state_bytes": state_bytes})

    return tell


def _shown(report: Report) -> dict[str, Any]:
    steps = [dataclasses.asdict(step) for step in report.steps]
    return {
        "state_bytes": report.state_bytes,
        "copied_by": report.copied_by,
        "digest": report.digest.hex(),
        "steps": steps,
    }
