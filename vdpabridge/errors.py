"""Every error that this package raises on purpose: each has its facts as attributes, and its text is one line."""

from __future__ import annotations

import errno as errno_names
import os
from collections.abc import Sequence

__all__ = [
    "BusError",
    "ConnectionLost",
    "DeadlineExceeded",
    "DeviceBusy",
    "DeviceFailed",
    "DeviceHeld",
    "FeatureError",
    "KernelError",
    "MissingCapability",
    "NoSuchDevice",
    "OwnershipError",
    "PeerRefused",
    "ProtocolError",
    "StateError",
    "UsageError",
    "VdpaBridgeError",
    "errno_name",
]

#: Kernel-internal ENOTSUPP, which reaches user space untranslated: no libc has a name for it.
ENOTSUPP = 524


def errno_name(code: int) -> str:
    """``EBUSY`` for 16, and so on, as kernel sources spell it; ``ENOTSUPP`` for the kernel's untranslated 524."""
    # 95 has two names in libc, and Python lists the other one
    kernel_names = {ENOTSUPP: "ENOTSUPP", errno_names.EOPNOTSUPP: "EOPNOTSUPP"}
    return kernel_names.get(code) or errno_names.errorcode.get(code, f"errno {code}")


class VdpaBridgeError(Exception):
    """The root of the tree: ``device: what: why (hint)``, each part an attribute."""

    nothing_done = False
    """Whether it is certain that the request had no effect. An error alone does not say so."""

    def __init__(self, what: str, *, device: str = "", why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.device = device
        self.what = what
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        text = ": ".join(part for part in (self.device, self.what, self.why) if part)
        return f"{text} ({self.hint})" if self.hint else text


class UsageError(VdpaBridgeError):
    """A request that makes no sense for any device; nothing was done."""

    nothing_done = True


class StateError(VdpaBridgeError):
    """An operation that the device's run state does not permit; nothing was done. See `device.rules.RULES`."""

    nothing_done = True

    def __init__(self, device: str, operation: str, state: str, legal_states: tuple[str, ...]) -> None:
        legal = " or ".join(legal_states)
        super().__init__(
            operation, device=device, why=f"not while the device is {state}", hint=f"only while it is {legal}"
        )
        self.operation = operation
        self.state = state
        self.legal_states = legal_states


class MissingCapability(VdpaBridgeError):
    """The device does not offer what the operation needs; nothing was done."""

    nothing_done = True

    def __init__(self, device: str, operation: str, capability: str, alternative: str) -> None:
        super().__init__(operation, device=device, why=f"the device does not offer {capability}", hint=alternative)
        self.operation = operation
        self.capability = capability


class FeatureError(VdpaBridgeError):
    """Feature bits that were not offered, or that the device refused."""

    def __init__(self, device: str, why: str, features: int) -> None:
        super().__init__("accept features", device=device, why=why)
        self.features = features


class DeviceFailed(VdpaBridgeError):
    """The device itself gave up (NEEDS_RESET, FAILED, or it vanished). Only a reset or a close helps."""


class OwnershipError(VdpaBridgeError):
    """The calling process does not own the device."""


class DeadlineExceeded(VdpaBridgeError, TimeoutError):
    """An operation did not end within ``timeout_s``."""

    def __init__(
        self,
        what: str,
        timeout_s: float,
        *,
        device: str = "",
        why: str = "",
        hint: str = "",
        nothing_done: bool = False,
    ) -> None:
        super().__init__(what, device=device, why=why or f"no answer within {timeout_s:g} s", hint=hint)
        self.timeout_s = timeout_s
        self.nothing_done = nothing_done


#: The kernel does not know the request, the device's driver does not have it, or the caller may not make it: the kernel
#: did not begin it. Any other errno can come from the middle of a request. Source: drivers/vhost/vdpa.c.
_NOT_BEGUN = frozenset({errno_names.ENOTTY, errno_names.EOPNOTSUPP, errno_names.EPERM, errno_names.EBADF})


class KernelError(VdpaBridgeError, OSError):
    """The kernel refused a request. ``errno`` is the kernel's own.

    ``request`` is the name of the ioctl or system call, ``queue`` the virtqueue it was about, or None.
    """

    def __init__(
        self, code: int, request: str, *, device: str, why: str = "", hint: str = "", queue: int | None = None
    ) -> None:
        what = request if queue is None else f"{request} queue {queue}"
        OSError.__init__(self, code, os.strerror(code))
        name = errno_name(code)
        VdpaBridgeError.__init__(self, what, device=device, why=f"{name}: {why or os.strerror(code)}", hint=hint)
        self.errno = code
        self.strerror = os.strerror(code)
        self.request = request
        self.queue = queue
        self.nothing_done = code in _NOT_BEGUN

    __str__ = VdpaBridgeError.__str__


# --- on the vDPA bus ---


class BusError(KernelError):
    """The kernel refused to change something on the bus."""


class NoSuchDevice(VdpaBridgeError):
    """No device of that name, no such node, or no vDPA at all in this kernel."""


class DeviceBusy(VdpaBridgeError):
    """The device has a user, which would lose it or would not let go of it."""

    nothing_done = True


class DeviceHeld(DeviceBusy):
    """A process has the device's node open; taking the device away would block until it lets go."""

    def __init__(self, device: str, what: str, node: str, holders: Sequence[object]) -> None:
        why = f"{node} is held by {', '.join(map(str, holders))}"
        hint = "end it first; forcing it blocks this and every other vDPA command on the machine until it lets go"
        super().__init__(what, device=device, why=why, hint=hint)
        self.node = node
        self.holders = holders


# --- on a vhost-user socket ---


class ProtocolError(VdpaBridgeError):
    """The peer broke the protocol. ``request`` is the message it was about, ``code`` the peer's own error."""

    def __init__(self, what: str, *, peer: str, why: str, request: int | None = None, code: int | None = None) -> None:
        super().__init__(what, device=peer, why=why)
        self.peer = peer
        self.request = request
        self.code = code


class PeerRefused(ProtocolError):
    """The peer understood a request and refused it; ``code`` is its answer. The connection is still usable."""


class ConnectionLost(ProtocolError, ConnectionError):
    """The peer is gone."""
