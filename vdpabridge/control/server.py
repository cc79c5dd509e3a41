"""The control socket's side in the process that owns the device.

A thread of its own reads and answers, so that a client gets an answer to `status` while the device's thread is busy.
The device's thread does all work on the device, in the order of the requests (`Errands`).
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

from ..errors import VdpaBridgeError
from ..linux.credentials import credentials_of
from ..linux.deadline import NOW
from .errands import Errand, Errands
from .lines import ANSWER_BYTES_MAX, METHOD_NOT_FOUND, REFUSED, Lines
from .requests import Caller, InvalidRequest, Method, Params, Request, outcome, refused

__all__ = ["ControlServer"]

_PAUSE_S = 0.1
#: How long the device's thread may be busy with something else before this thread answers in its place.
_BUSY_S = 0.3
#: After which it is tried again to put right what a client has left.
_AGAIN_S = 1.0
#: How many unanswered requests one client may have.
_REQUESTS_MAX = 16


def _nothing(_caller: Caller) -> None: ...


class _Client:
    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self.caller = Caller()
        self.open: list[Request] = []
        """Its requests that are not answered yet."""
        self.ended = False
        """Whether it will ask for nothing more; it may still read answers."""


class ControlServer:
    """Takes ownership of ``listener`` and answers requests on it, in a thread of its own, from ``with`` until `close`.

    The device's thread calls `serve` when `fds` are readable. Only clients of this user and of root are accepted.
    ``report`` gets messages that no client gets.
    """

    def __init__(self, listener: socket.socket, *, report: Callable[[str], None]) -> None:
        listener.setblocking(False)
        self.methods: Mapping[str, Method] = {}
        """The methods that clients can call; to be set before the thread starts. So is `when_gone`."""
        self.when_gone: Callable[[Caller], object] = _nothing
        """Called by the device's thread when a client's connection has ended and its requests are done."""
        self._report = report
        self._listener = listener
        self._clients: dict[int, _Client] = {}
        self._requests: set[Request] = set()
        """Those that are not answered yet; they own descriptors."""
        self._errands = Errands()
        self._for_others: deque[Callable[[], None]] = deque()
        """What other threads want the control socket's thread to do."""
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._later: list[tuple[float, Callable[[], None]]] = []
        """(when, what): for the control socket's thread to do."""
        self._running: Request | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="vdpabridge-control", daemon=True)

    # --- for the device's thread ---

    def fds(self) -> list[int]:
        """The descriptors that the device's thread is to wait for; borrowed."""
        return [self._errands.fileno()]

    def serve(self, _fd: int) -> None:
        """Do the next errand."""
        self._errands.run_one()

    # --- for any thread ---

    def cancel(self) -> bool:
        """Make the request that is being done end early; returns whether there is one that can."""
        running = self._running
        return running is not None and running.cancel()

    def tell(self, event: Params) -> None:
        """Tell the clients that listen of ``event``; a client that does not read at once misses it."""
        self._have_done(partial(self._tell, event))

    def close(self) -> None:
        """End the thread and close everything; drops requests that have not begun. Idempotent."""
        if self._ended:
            return
        self._ended = True
        os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join()
        for client in self._clients.values():
            client.lines.close()
        self._clients.clear()
        # also of clients that have left
        for request in self._requests:
            request.close()
        self._requests.clear()
        self._listener.close()
        self._errands.close()
        os.close(self._wake)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the control socket's thread ---

    def _run(self) -> None:
        while True:
            ready = self._wait()
            if self._ended:
                return
            if self._wake in ready:
                os.eventfd_read(self._wake)
            while self._for_others:
                self._for_others.popleft()()
            self._do_what_is_due()
            if self._listener.fileno() in ready:
                self._accept()
            for fd in ready.intersection(self._clients):
                self._read(fd)

    def _wait(self) -> set[int]:
        poll = select.poll()
        for fd in (self._listener.fileno(), self._wake):
            poll.register(fd, select.POLLIN)
        for fd, client in self._clients.items():
            # of one that has ended only that it is gone
            poll.register(fd, 0 if client.ended else select.POLLIN)
        if not self._later:
            return {fd for fd, _ in poll.poll()}
        left_s = max(0.0, min(when_s for when_s, _ in self._later) - time.monotonic())
        return {fd for fd, _ in poll.poll(left_s * 1000 + 1)}

    def _have_done(self, act: Callable[[], None]) -> None:
        """Have the control socket's thread do ``act``."""
        self._for_others.append(act)
        if not self._ended:
            os.eventfd_write(self._wake, 1)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            # perhaps this process is out of descriptors; the client keeps waiting
            self._report(f"a client of the control socket cannot be accepted: {error.strerror}")
            time.sleep(_PAUSE_S)
            return
        if credentials_of(connection).uid not in (0, os.geteuid()):
            connection.close()
            return
        # a client that does not read its answers is hung up on when they fill this
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ANSWER_BYTES_MAX)
        connection.setblocking(False)
        self._clients[connection.fileno()] = _Client(Lines(connection))

    def _read(self, fd: int) -> None:
        client = self._clients[fd]
        if client.ended:
            self._let_go(fd)
            return
        try:
            client.ended = not client.lines.read()
            while client.lines.has_line and not client.caller.gone:
                self._take(client, client.lines.receive() or b"")
                client.lines.drop_fds()
        except VdpaBridgeError:
            self._let_go(fd)
            return
        # one that has closed its sending side only waits for its answers
        if client.ended and (not client.open or NOW.wait({fd: 0})):
            self._let_go(fd)

    def _take(self, client: _Client, line: bytes) -> None:
        """Take in one request: answer it, or give it to the device's thread."""
        try:
            request = Request.parse(line, client.caller)
        except InvalidRequest as error:
            if not error.silent:
                client.lines.send({"jsonrpc": "2.0", "id": error.number} | error.outcome)
            return
        client.open.append(request)
        self._requests.add(request)
        method = self.methods.get(request.method)
        if method is None:
            message = f"there is no method {request.method!r}; there are {', '.join(self.methods)}"
            self._answer(client, request, {"error": {"code": METHOD_NOT_FOUND, "message": message}})
        elif len(client.open) > _REQUESTS_MAX:
            message = f"{_REQUESTS_MAX} requests of this client were not answered yet"
            self._answer(client, request, {"error": {"code": REFUSED, "message": message}})
        elif method.at_once:
            self._answer(client, request, outcome(method.act, request))
        else:
            self._send_on_errand(client, request, method)

    def _send_on_errand(self, client: _Client, request: Request, method: Method) -> None:
        while (fd := client.lines.take_fd()) is not None:
            request.fds.append(fd)
        if method.only_for_present and NOW.wait({client.lines.fileno(): 0}):
            # it has hung up; that is read after this line
            client.caller.gone = True
        if method.cancellable:
            try:
                request.make_cancellable()
            except OSError as error:
                self._answer(client, request, refused(error))
                return
        request.notify = lambda name, params: self._have_done(partial(self._notify, client, name, params))
        errand = Errand(partial(self._do, client, request, method))
        if method.meanwhile is not None:
            meanwhile = method.meanwhile

            def answer_for_it() -> None:
                if errand.claim():
                    self._answer(client, request, outcome(meanwhile, request))

            self._later.append((time.monotonic() + _BUSY_S, answer_for_it))
        self._errands.put(errand)

    def _do(self, client: _Client, request: Request, method: Method) -> None:
        """Do ``request``, in the device's thread."""
        if request.caller.gone and (method.cancellable or method.only_for_present):
            # nobody waits for it, and nothing has begun
            self._have_done(partial(self._answer, client, request, {}))
            return
        self._running = request
        try:
            result = outcome(method.act, request)
        finally:
            self._running = None
        self._have_done(partial(self._answer, client, request, result))

    def _do_what_is_due(self) -> None:
        now_s = time.monotonic()
        due = [act for when_s, act in self._later if when_s <= now_s]
        self._later = [each for each in self._later if each[0] > now_s]
        for act in due:
            act()

    def _answer(self, client: _Client, request: Request, result: dict[str, Any]) -> None:
        """Answer ``request``, whose caller may have left."""
        request.close()
        client.open.remove(request)
        self._requests.discard(request)
        if client.caller.gone:
            return
        try:
            if request.wants_answer:
                client.lines.send({"jsonrpc": "2.0", "id": request.number} | result)
        except VdpaBridgeError:
            self._let_go(client.lines.fileno())
            return
        if client.ended and not client.open:
            self._let_go(client.lines.fileno())

    def _notify(self, client: _Client, name: str, params: Params) -> None:
        if not client.caller.gone:
            client.lines.try_send({"jsonrpc": "2.0", "method": name, "params": dict(params)})

    def _tell(self, event: Params) -> None:
        for client in self._clients.values():
            if client.caller.listens:
                self._notify(client, "event", event)

    def _let_go(self, fd: int) -> None:
        client = self._clients.pop(fd, None)
        if client is None:
            return
        client.caller.gone = True
        client.lines.close()
        for request in client.open:
            request.cancel()
        # after its requests: one of them may have left something to put right
        self._errands.put(Errand(partial(self._put_right, client.caller)))

    def _put_right(self, caller: Caller, *, again: bool = False) -> None:
        """Do in the device's thread what ``caller`` has left to do, again and again until it succeeds."""
        try:
            self.when_gone(caller)
        except Exception as error:  # noqa: BLE001  # a client that has left must not end the process that owns it
            if not again:
                self._report(f"when a client of the control socket had left: {error}")
            errand = Errand(partial(self._put_right, caller, again=True))
            due = time.monotonic() + _AGAIN_S, partial(self._errands.put, errand)
            self._have_done(partial(self._later.append, due))
