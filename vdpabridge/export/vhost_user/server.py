"""Front-ends one after the other: wait for one, serve it, wait for the next."""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import stat
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self

from ...device import Device, RunState
from ...errors import DeadlineExceeded, DeviceFailed, KernelError, ProtocolError, VdpaBridgeError
from ...linux.descriptors import hang_up
from ...vhost_user.connection import Connection
from .session import Session, require_servable

__all__ = ["Server", "listen"]

#: What fits a ``struct sockaddr_un``, with the zero at the end.
_PATH_BYTES_MAX = 107
_PATIENCE_S = 0.1
_WAITING_MAX = 16
#: How many signals are read at a time, a byte each; their handlers have run already.
_SIGNALS = 64


def listen(path: str) -> socket.socket:
    """A socket that listens at ``path``, owned by the caller, who removes the file.

    A socket file that no process listens on is replaced. Raises `VdpaBridgeError` if a process does, if something else
    is there, if the path is too long, or if bind(2) or listen(2) fails.
    """
    if len(os.fsencode(path)) > _PATH_BYTES_MAX:
        why = f"a socket's path has {_PATH_BYTES_MAX} bytes at most, and this one has {len(os.fsencode(path))}"
        raise VdpaBridgeError("listen", device=path, why=why, hint="use a shorter one, relative if need be")
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(path)
        # if too many front-ends wait, one that does not block gets EAGAIN
        listener.listen(_WAITING_MAX)
    except OSError as error:
        listener.close()
        why = os.strerror(error.errno or 0)
        raise VdpaBridgeError("listen", device=path, why=why, hint="is the directory there, and yours?") from error
    return listener


def _remove_stale(path: str) -> None:
    """Remove a socket file that no process has bound. A back-end there must not take this check for a front-end."""
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise _occupied(path, os.strerror(error.errno or 0)) from None
    if not stat.S_ISSOCK(kind):
        raise _occupied(path, "something that is not a socket is there")
    # another type than a back-end's: the kernel refuses it before the back-end notices
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise _occupied(path, f"a socket is there: {error.strerror}") from None
    raise _occupied(path, "another process listens there")


def _occupied(path: str, why: str) -> VdpaBridgeError:
    return VdpaBridgeError("listen", device=path, why=why, hint="use another path")


class AlsoServed(Protocol):
    """What else the server's thread serves."""

    def fds(self) -> list[int]:
        """The descriptors to wait for; borrowed."""

    def serve(self, fd: int) -> None:
        """``fd`` is readable."""


def _for_ever() -> float | None:
    return None


class Server:
    """Serves ``device`` (borrowed). `stop` may be called by a signal handler or another thread."""

    def __init__(
        self,
        device: Device,
        *,
        report: Callable[[str], None],
        trace: Callable[[str], None] | None = None,
        tell: Callable[[str, Mapping[str, Any]], None] = lambda _event, _facts: None,
        timeout_s: float | None = 10.0,
    ) -> None:
        """``report`` is told what goes wrong, ``trace`` of every message, ``tell`` of front-ends that come and leave.

        ``timeout_s`` bounds a message on its way; a front-end may be silent for ever between two.
        """
        require_servable(device)
        self._device = device
        self._report = report
        self._trace = trace
        self._tell = tell
        self._timeout_s = timeout_s
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.also_served: AlsoServed | None = None
        """Served beside the front-end, by the same thread."""
        self.signal_fd: int | None = None
        """Readable when a signal came (`signal.set_wakeup_fd`); borrowed. Without it, a signal between Python's last
        check and a wait would not end the wait."""
        self.session: Session | None = None
        """The session of the front-end that is served now."""
        self._holders: set[object] = set()
        self._gone_for_good = False
        """Whether the device failed in a way that its present front-end cannot survive."""
        self.front_ends = 0
        """How many front-ends were served, the present one included."""
        self.messages = 0
        """How many messages they have sent."""

    def stop(self) -> None:
        """Have `serve` and `serve_connection` return soon. Idempotent, also after `close`."""
        if self._stop >= 0:
            os.eventfd_write(self._stop, 1)

    @property
    def held(self) -> bool:
        """Whether the device is to stay suspended."""
        return bool(self._holders) or (self.session is not None and self.session.held)

    @property
    def holders(self) -> frozenset[object]:
        """Who has called `hold`, and not `release`."""
        return frozenset(self._holders)

    def hold(self, holder: object) -> None:
        """Suspend the device, whatever its front-end does, until each holder has called `release`.

        Raises what suspending it raises, or what resuming it after that raises: then it stays `held`, and `release`
        tries again.
        """
        first = not self._holders
        self._holders.add(holder)
        if first and self.session is not None:
            try:
                self.session.hold()
            except BaseException:
                self.release(holder)
                raise

    def holds(self, holder: object) -> bool:
        """Whether ``holder`` holds the device."""
        return holder in self._holders

    def release(self, holder: object) -> None:
        """End the hold of ``holder``. Raises what resuming the device raises."""
        self._holders.discard(holder)
        if not self._holders and self.session is not None:
            try:
                self.session.release()
            finally:
                # its front-end has sent no request, and would wait for ever
                self._gone_for_good = self.session.lost

    def serve(self, listener: socket.socket, *, once: bool = False) -> None:
        """Serve front-ends that connect to ``listener`` (borrowed), one at a time, until `stop`; if ``once``, only one.

        One that connects while another is served is sent away. Raises `DeviceFailed` if the device fails and a reset
        does not help.
        """
        listener.setblocking(False)
        while True:
            ready = self._wait([listener.fileno()])
            if ready is None:
                return
            if self._device.fileno() in ready:
                self._device.check_health()
            connected = self._accept(listener)
            if connected is not None:
                connection = Connection(connected, "the front-end", timeout_s=self._timeout_s)
                if not self.serve_connection(connection, listener) or once:
                    return

    def serve_connection(self, connection: Connection, listener: socket.socket | None = None) -> bool:
        """Serve one front-end until it leaves (True) or `stop` (False). Takes ownership of ``connection``."""
        try:
            session = Session(self._device, connection, report=self._report, trace=self._trace)
        except DeviceFailed:
            raise
        except (VdpaBridgeError, OSError) as error:
            # out of descriptors, for instance, or a device that does not answer
            self._report(f"a front-end cannot be served: {error}")
            time.sleep(_PATIENCE_S)
            return True
        self._tell("front-end came", {"process": connection.peer_process})
        why = ""
        try:
            with session:
                self.session = session
                self.front_ends += 1
                if self._holders:
                    session.hold()
                return self._attend(session, listener)
        except (ProtocolError, DeadlineExceeded, DeviceFailed, KernelError) as error:
            why = str(error)
            self._report(why)
        finally:
            self.session = None
            self._tell("front-end left", {"why": why} if why else {})
            self._gone_for_good = False
        if self._device.state is RunState.FAILED:
            why, hint = self._device.failure, "a reset did not help"
            raise DeviceFailed("the device failed", device=self._device.name, why=why, hint=hint)
        return True

    def _attend(self, session: Session, listener: socket.socket | None) -> bool:
        fds = [session.fileno(), session.config_changed, *([listener.fileno()] if listener else [])]
        while True:
            ready = self._wait(fds, session.left_s)
            if ready is None:
                return False
            if self._device.fileno() in ready:
                self._device.check_health()
            if session.config_changed in ready:
                session.announce_config_change()
            if session.fileno() in ready or not ready:
                before = session.messages
                stays = session.serve_one()
                self.messages += session.messages - before
                if not stays:
                    return True
            if listener is not None and listener.fileno() in ready and not session.is_leaving():
                self._send_away(listener)

    def close(self) -> None:
        """Close what `stop` uses. Idempotent."""
        if self._stop >= 0:
            os.close(self._stop)
            self._stop = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self, fds: list[int], time_left_s: Callable[[], float | None] = _for_ever) -> set[int] | None:
        """Those of ``fds`` that are ready, and the device's if it hung up; None after `stop`."""
        while True:
            # what is served in this loop may shorten it
            left_s = time_left_s()
            others = [] if self.also_served is None else self.also_served.fds()
            poll = select.poll()
            poll.register(self._device.fileno(), 0)
            signals = [] if self.signal_fd is None else [self.signal_fd]
            for fd in (*fds, *others, *signals, self._stop):
                poll.register(fd, select.POLLIN)
            ready = {fd for fd, _ in poll.poll(None if left_s is None else math.ceil(left_s * 1000))}
            if not ready:
                return ready
            for fd in ready.intersection(signals):
                os.read(fd, _SIGNALS)
                ready.discard(fd)
            if self._stop in ready:
                return None
            for fd in ready.intersection(others):
                if self.also_served is not None:
                    self.also_served.serve(fd)
            if self._gone_for_good:
                self._device.check_health()
            if ready := ready.difference(others):
                return ready

    def _send_away(self, listener: socket.socket) -> None:
        second = self._accept(listener)
        if second is not None:
            hang_up(second)
            self._report("a second front-end was sent away: the device is in use")

    def _accept(self, listener: socket.socket) -> socket.socket | None:
        try:
            return listener.accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            # perhaps this process is out of descriptors; the front-end keeps waiting
            self._report(f"a front-end cannot be accepted: {error.strerror}")
            time.sleep(_PATIENCE_S)
            return None
